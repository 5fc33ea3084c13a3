"""`models pull` with the real client of the hub against a server on this machine that misbehaves."""

from __future__ import annotations

import collections
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download, scan_cache_dir

from avatarctl.atomic import _mark
from avatarctl.errors import Interrupted
from avatarctl.hub.locate import locate, snapshots
from avatarctl.hub.pull import plan_pull, run_pull
from avatarctl.loading.needs import wanted_by_names
from avatarctl.registry import find
from tests.hub.conftest import CONFIG, WEIGHTS
from tests.hub.hub_server import Break, HubServer, Repo, Status, Wrong, digest_of
from tests.hub.pulling import FILES, NAME, REPO, error_of, incomplete, models


def test_a_clean_pull_into_the_cache(hub: HubServer, client: Path) -> None:
    result = models("pull", NAME)
    assert sorted(hub.fetched()) == FILES, "only what the row needs"
    (snapshot,) = snapshots(REPO)
    assert result.stdout.splitlines() == [str(snapshot / name) for name in FILES]
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS
    assert f"license    {REPO}: apache-2.0" in result.stderr
    assert "total      1.0 MB in 3 files" in result.stderr
    assert locate(find(NAME), None).folder == snapshot and not incomplete(client)
    shown = models("show", NAME).stdout
    assert f"found      {snapshot}/model.safetensors" in shown and "all files are here" in shown
    assert "license    apache-2.0" in shown
    # What was fetched is the hub's client's own: it finds all of it offline, and its cache is in order.
    assert hf_hub_download(REPO, "config.json", local_files_only=True) == str(snapshot / "config.json")
    assert not scan_cache_dir(client).warnings


def test_a_second_pull_asks_nobody(hub: HubServer, client: Path) -> None:
    models("pull", NAME)
    hub.requests.clear()
    again = models("pull", NAME)
    assert hub.requests == [] and again.stdout == ""
    assert "nothing to fetch: everything is here" in again.stderr


def test_a_root_instead_of_the_cache(hub: HubServer, client: Path, tmp_path: Path) -> None:
    root = tmp_path / "my weights"
    models("pull", NAME, "--weights-root", str(root))
    folder = root / NAME
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == FILES
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert not client.exists() and not incomplete(root)
    # The hub's own tool takes the folder for its own: nothing but metadata is asked for.
    hub.requests.clear()
    hf_hub_download(REPO, "model.safetensors", local_dir=folder)
    assert hub.gets() == []
    assert "nothing to fetch" in models("pull", NAME, "--weights-root", str(root)).stderr


def test_what_lies_in_a_usual_folder_is_not_fetched_again(hub: HubServer, client: Path) -> None:
    folder = Path("checkpoints") / NAME
    folder.mkdir(parents=True)
    for name in ("config.json", "pytorch_model.bin", "preprocessor_config.json"):
        (folder / name).write_bytes(b"mine")
    result = models("pull", NAME)
    assert hub.fetched() == [] and f"here       {folder}/pytorch_model.bin" in result.stderr


def test_a_part_of_a_set_is_completed_where_a_pull_puts_it(hub: HubServer, client: Path) -> None:
    """Else a pull would succeed and leave files that no run can read: half here, half in the cache."""
    folder = Path("checkpoints") / NAME
    folder.mkdir(parents=True)
    (folder / "pytorch_model.bin").write_bytes(b"mine")
    result = models("pull", NAME)
    assert sorted(hub.fetched()) == FILES
    assert f"{folder} has a part of {NAME}" in result.stderr
    assert "--weights-root checkpoints completes them there" in result.stderr
    (snapshot,) = snapshots(REPO)
    assert locate(find(NAME), None).folder == snapshot
    hub.requests.clear()
    models("pull", NAME, "--weights-root", "checkpoints")
    assert hub.requests == [], "a whole copy is in the cache"
    shutil.rmtree(client)
    models("pull", NAME, "--weights-root", "checkpoints")
    assert sorted(hub.fetched()) == ["config.json", "preprocessor_config.json"]
    assert locate(find(NAME), "checkpoints").folder == folder


def test_a_new_commit_is_fetched_as_a_whole(hub: HubServer, client: Path) -> None:
    models("pull", NAME)
    (old,) = snapshots(REPO)
    (old / "config.json").unlink()
    hub.repos[REPO].commit = "f" * 40
    hub.requests.clear()
    models("pull", NAME)
    found = locate(find(NAME), None)
    assert found.folder == old.with_name("f" * 40) and found.missing == ()
    assert hub.fetched() == [], "all bytes were among the blobs"


def test_a_repository_of_which_a_part_is_elsewhere(hub: HubServer, client: Path) -> None:
    part = Path("checkpoints/org--loras/a.safetensors")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x")
    models("pull", "org/loras")
    assert sorted(hub.fetched()) == ["a.safetensors", "config.json", "sub/b.safetensors"]


def test_a_broken_connection_goes_on_where_it_broke(hub: HubServer, client: Path) -> None:
    hub.faults["model.safetensors"] = [Break(300_000), Break(200_000, clean=True), Status(503)]
    models("pull", NAME)
    ranges = [each.range for each in hub.gets() if each.path.startswith("/storage")]
    assert len(ranges) == 4 and ranges[0] == ""
    starts = [int(each.removeprefix("bytes=").rstrip("-")) for each in ranges[1:]]
    assert 0 < starts[0] < starts[1] == starts[2] < len(WEIGHTS)
    assert locate(find(NAME), None).missing == ()


def test_a_server_without_ranges(hub: HubServer, client: Path) -> None:
    hub.ignores_ranges = True
    hub.faults["model.safetensors"] = [Break(300_000)]
    models("pull", NAME)
    (snapshot,) = snapshots(REPO)
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS


def test_a_connection_that_never_holds(hub: HubServer, client: Path) -> None:
    hub.faults["model.safetensors"] = [Break(300_000), *[Status(502)] * 9]
    result = models("pull", NAME, code=4)
    assert (
        "nothing more came in 5 tries" in error_of(result) and "run the same command again" in result.stderr
    )
    (part,) = incomplete(client)
    kept = part.stat().st_size
    assert 0 < kept < len(WEIGHTS)
    hub.faults.clear()
    hub.requests.clear()
    again = models("pull", NAME)
    assert f"going on after {kept} bytes" in again.stderr
    assert [each.range for each in hub.gets() if each.path.startswith("/storage")] == [f"bytes={kept}-"]
    assert not incomplete(client)


@pytest.mark.parametrize("content", [WEIGHTS[:-1] + b"?", b"?" + WEIGHTS[1:]])
def test_wrong_bytes_never_get_a_name(content: bytes, hub: HubServer, client: Path) -> None:
    hub.faults["model.safetensors"] = [Wrong(content)] * 9
    result = models("pull", NAME, code=3)
    assert f"{REPO}/model.safetensors: " in error_of(result) and "the file was removed" in error_of(result)
    assert "model.safetensors or pytorch_model.bin" in {
        wanted.file for wanted in locate(find(NAME), None).missing
    }
    assert not incomplete(client) and not list(client.rglob(digest_of(WEIGHTS)))


@pytest.mark.parametrize("content", [b"<html>log in</html>", WEIGHTS[:5000], WEIGHTS + b"more"])
def test_an_answer_of_another_size_leaves_the_part_alone(
    content: bytes, hub: HubServer, client: Path
) -> None:
    hub.faults["model.safetensors"] = [Break(300_000), *[Wrong(content)] * 9]
    hub.ignores_ranges = True
    result = models("pull", NAME, code=4)
    assert f"about {len(content)} bytes, the file has {len(WEIGHTS)}" in error_of(result)
    (part,) = incomplete(client)
    assert 0 < part.stat().st_size <= 300_000 and WEIGHTS.startswith(part.read_bytes())
    hub.faults.clear()
    hub.ignores_ranges = False
    assert "going on after" in models("pull", NAME).stderr


def test_wrong_bytes_of_a_small_file(hub: HubServer, client: Path) -> None:
    hub.faults["config.json"] = [Wrong(CONFIG.replace(b"2", b"3"))]
    assert "SHA-1 is not the one" in error_of(models("pull", NAME, code=3))
    models("pull", NAME)


def test_a_wrong_part_from_an_earlier_start_is_dropped_once(hub: HubServer, client: Path) -> None:
    blobs = client / f"models--{REPO.replace('/', '--')}" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{digest_of(WEIGHTS)}.incomplete").write_bytes(b"\0" * 5000)
    result = models("pull", NAME)
    assert "the part from an earlier start is dropped" in result.stderr
    (snapshot,) = snapshots(REPO)
    assert (snapshot / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        ({"private": True}, NAME, "has no such repository, or it is private"),
        ({"gated": True}, NAME, f"accept the terms at http://127.0.0.1:*/{REPO}, then set HF_TOKEN"),
        ({}, "org/absent", "org/absent: http://127.0.0.1:* has no such repository"),
        ({}, "org/loras/absent.safetensors", "org/loras: the repository has no absent.safetensors"),
    ],
)
def test_no_access(change: dict[str, bool], name: str, says: str, hub: HubServer, client: Path) -> None:
    vars(hub.repos[REPO]).update(change)
    line = error_of(models("pull", name, code=4)).replace(str(hub.port), "*")
    assert says in line
    assert hub.fetched() == [] and not client.exists()


def test_the_token_opens_and_goes_to_the_hub_only(
    hub: HubServer, client: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repos[REPO].gated = hub.repos[REPO].private = True
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    result = models("pull", NAME, "--json")
    assert json.loads(result.stdout)["licenses"] == {REPO: "apache-2.0"}
    assert "hf_right" not in result.output
    storage = [each for each in hub.requests if each.path.startswith("/storage")]
    assert storage and {each.authorization for each in storage} == {""}
    assert all(each.authorization for each in hub.requests if each not in storage)


def test_a_wrong_token_is_not_shown(hub: HubServer, client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = models("pull", NAME, code=4)
    assert "no access (HTTP 401)" in error_of(result) and "hf_secret" not in result.output


def test_offline(hub: HubServer, client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in error_of(models("pull", NAME, code=4))
    assert hub.requests == []


def test_no_hub_there(hub: HubServer, client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://user:secret@127.0.0.1:9")
    result = models("pull", NAME, code=4)
    assert "no connection to http://127.0.0.1:9 (ConnectError)" in error_of(result)
    assert "secret" not in result.output


@pytest.mark.parametrize(
    "name", ["../../../canary", "/canary", "a/../../../../canary", "..\\canary", "a\x1b[31m", "C:/canary"]
)
def test_names_that_lead_out_of_the_folder(name: str, hub: HubServer, client: Path, tmp_path: Path) -> None:
    hub.repos["org/loras"].files[name] = b"x" * 2000
    assert "the hub lists a file named" in error_of(models("pull", "org/loras", code=3))
    assert not list(tmp_path.rglob("*canary*"))


def test_an_answer_that_is_no_hubs(hub: HubServer, client: Path) -> None:
    hub.repos[REPO].commit = "../../x"
    assert "is not the one of a hub" in error_of(models("pull", NAME, code=3))


def test_no_space(hub: HubServer, client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 0, 10**6))
    line = error_of(models("pull", NAME, code=3))
    total = len(WEIGHTS) + len(CONFIG) + 2
    assert f"{total:,} bytes are needed and 1,000,000 are free" in line
    assert hub.fetched() == [] and not client.exists()


def test_a_place_that_cannot_be_written(hub: HubServer, client: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = error_of(models("pull", NAME, "--weights-root", str(tmp_path / "file"), code=2))
    assert "not a folder" in line and "--weights-root" in line


def test_a_cache_that_cannot_be_written(client: Path) -> None:
    """It was nobody's wish that it lies there: the variables that move it are named."""
    client.write_bytes(b"")
    result = models("pull", NAME, code=4)
    assert "set HF_HOME or HF_HUB_CACHE to a folder that can be written, or" in error_of(result)


@pytest.mark.parametrize("below", ["refs", "blobs", ".cache/huggingface/download"])
def test_what_a_dead_pull_left_is_removed_and_a_part_is_not(below: str, hub: HubServer, client: Path) -> None:
    root = [] if below in ("refs", "blobs") else ["--weights-root", "root"]
    folder = (Path("root") / NAME if root else client / f"models--{REPO.replace('/', '--')}") / below
    folder.mkdir(parents=True)
    if not (mark := _mark(folder)):
        pytest.skip("no locks, or no number of this boot")
    left = folder / f".tmp-{mark}-0123456789abcdef"
    left.mkdir()
    part = folder / f"{'0' * 64}.incomplete"
    part.write_bytes(b"of another file")
    assert models("pull", NAME, *root).stderr.count(f"removed {left}, which a run left") == 1
    assert part.exists() and not left.exists()


def test_for_a_command_with_parts_by_hand(hub: HubServer, client: Path) -> None:
    base = [f"diffusion_pytorch_model-{i:05d}-of-00006.safetensors" for i in range(1, 7)]
    base += ["diffusion_pytorch_model.safetensors.index.json", "models_t5_umt5-xxl-enc-bf16.pth"]
    base += ["Wan2.1_VAE.pth", "google/umt5-xxl/spiece.model", "google/umt5-xxl/tokenizer.json"]
    others = ["examples/huge.mp4", "README.md", "google/other"]
    hub.repos["Wan-AI/Wan2.1-T2V-14B"] = Repo({name: name.encode() for name in (*base, *others)})
    hub.repos["OmniAvatar/OmniAvatar-14B"] = Repo(
        {"config.json": b"{}", "pytorch_model.pt": b"adapter", "assets/x.png": b"x"}, license=None
    )
    words = ("stable-syncnet", "lpips-vgg16", "--for", "infer --model omniavatar-14b --chunked")
    dry = models("pull", *words, "--dry-run")
    assert hub.fetched() == [] and "by hand    pretrained_models/lpips-vgg16/vgg16-397923af.pth" in dry.stdout
    result = models("pull", *words, "--json", code=4)
    document = json.loads(result.stdout)
    assert {(file["repo"], file["name"]) for file in document["files"]} == {
        *(("Wan-AI/Wan2.1-T2V-14B", name) for name in base),
        ("OmniAvatar/OmniAvatar-14B", "config.json"),
        ("OmniAvatar/OmniAvatar-14B", "pytorch_model.pt"),
        *((REPO, name) for name in FILES),
        ("ByteDance/LatentSync-1.6", "stable_syncnet.pt"),
    }  # fmt: skip
    assert all(Path(file["path"]).is_file() for file in document["files"])
    assert len(hub.fetched()) == len(document["files"])
    assert document["licenses"]["OmniAvatar/OmniAvatar-14B"] == ""
    assert "OmniAvatar/OmniAvatar-14B: none stated" in result.stderr
    assert "to be fetched by hand: pretrained_models/lpips-vgg16/vgg16-397923af.pth (torchvision" in (
        error_of(result)
    )
    by_hand = Path("pretrained_models/lpips-vgg16")
    by_hand.mkdir(parents=True)
    (by_hand / "vgg16-397923af.pth").touch()
    models("pull", *words)


def test_a_folder_that_is_not_whole_is_completed(hub: HubServer, client: Path) -> None:
    name = "wan2.1-fun-1.3b-inp"
    folder = "Wan2.1-Fun-V1.1-1.3B-InP"
    hub.repos["FrancisRing/StableAvatar"] = Repo(
        {f"{folder}/config.json": b"{}", f"{folder}/google/umt5-xxl/a.json": b"[]", "Kim_Vocal_2.onnx": b"x"}
    )
    models("pull", name)
    (snapshot,) = snapshots("FrancisRing/StableAvatar")
    (snapshot / folder / "config.json").unlink()
    hub.requests.clear()
    models("pull", name)
    assert (snapshot / folder / "config.json").read_bytes() == b"{}"
    assert hub.fetched() == [], "its bytes were still among the blobs"
    assert "nothing to fetch" in models("pull", name).stderr
    # Somebody's own folder comes first and is not touched.
    mine = Path("pretrained_models/StableAvatar") / folder
    mine.mkdir(parents=True)
    (mine / "config.json").touch()
    line = error_of(models("pull", name, code=4))
    assert f"{mine}/google/umt5-xxl/a.json (incomplete, from FrancisRing/StableAvatar)" in line
    assert [path.name for path in mine.iterdir()] == ["config.json"]


def test_whole_folders_offline(hub: HubServer, client: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Path("pretrained_models/StableAvatar/Wan2.1-Fun-V1.1-1.3B-InP")
    mine.mkdir(parents=True)
    (mine / "config.json").touch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "whether it is complete is not known" in models("pull", "wan2.1-fun-1.3b-inp").stderr


def test_lora_files_by_their_name_on_the_hub(hub: HubServer, client: Path) -> None:
    result = models("pull", "org/loras/sub/b.safetensors")
    assert hub.fetched() == ["sub/b.safetensors"] and "license    org/loras: my-own" in result.stderr
    hub.requests.clear()
    models("pull", "--for", "infer --lora org/loras/sub/b.safetensors:0.5")
    assert hub.requests == []
    models("pull", "org/loras")
    assert hub.fetched() == ["a.safetensors", "config.json"], "no pickle beside safetensors"


def test_a_hub_name_below_a_root_says_whose_it_is(hub: HubServer, client: Path, tmp_path: Path) -> None:
    mine = tmp_path / "root" / "loras" / "a.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"of somebody else")
    result = models("pull", "org/loras/a.safetensors", "--weights-root", str(tmp_path / "root"))
    assert result.stdout.splitlines() == [str(tmp_path / "root/org--loras/a.safetensors")]
    assert mine.read_bytes() == b"of somebody else"


def test_a_folder_that_another_repository_filled(hub: HubServer, client: Path, tmp_path: Path) -> None:
    root = ("--weights-root", str(tmp_path / "root"))
    models("pull", NAME, *root)
    record = tmp_path / "root" / NAME / ".cache/huggingface/avatarctl.json"
    record.write_text(json.dumps({"repository": f"other/{NAME}", "license": "forged"}))
    shown = models("show", NAME, *root).stdout
    assert "found " not in shown and "forged" not in shown
    line = error_of(models("pull", NAME, *root, code=2))
    assert f"root/{NAME}: holds files of other/{NAME}, not of {REPO}" in line
    for damaged in (b"[" * 60_000, b"\xff", b'{"repository": 5}'):
        record.write_bytes(damaged)
        assert "all files are here" in models("show", NAME, *root).stdout


def test_a_stop_keeps_the_part(hub: HubServer, client: Path) -> None:
    plan = plan_pull(wanted_by_names([NAME]), None, lambda event: None)
    with pytest.raises(Interrupted, match="run the same command again: what was fetched is kept"):
        run_pull(
            plan, lambda event: None, lambda: bool(sum(p.stat().st_size for p in incomplete(client)) > 10**5)
        )
    (part,) = incomplete(client)
    assert part.stat().st_size > 10**5


def test_two_at_once(hub: HubServer, client: Path) -> None:
    plan = plan_pull(wanted_by_names([NAME]), None, lambda event: None)
    (file,) = (file for file in plan.fetch if file.name == "model.safetensors")
    with plan.store.lend(file):
        line = error_of(models("pull", NAME, code=2))
    assert f"{REPO}/model.safetensors: another program is fetching this file" in line


def test_nothing_named(hub: HubServer, client: Path) -> None:
    assert "nothing is named" in error_of(models("pull", code=2))
    assert "did you mean wav2vec2-base-960h?" in error_of(models("pull", "wav2vec2-base-960", code=2))
    assert "nothing to fetch" in models("pull", "--for", "infer --chunked").stderr  # the built-in model
    assert "did you mean infer?" in error_of(models("pull", "--for", "infr --chunked", code=2))
