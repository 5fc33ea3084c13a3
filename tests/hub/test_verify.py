"""`models verify`: every file against its digest, offline where a fetch left one."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from avatarctl.registry import ASSETS
from tests.hub.conftest import CONFIG, WEIGHTS
from tests.hub.hub_server import HubServer
from tests.hub.test_pull import FILES, NAME, REPO, error_of, models


def states(*words: str, code: int = 0) -> dict[str, str]:
    document = json.loads(models("verify", NAME, "--json", *words, code=code).stdout)
    return {Path(item["name"]).name: item["state"] for item in document["files"]}


@pytest.fixture(params=["cache", "root", "hub's own tool"])
def fetched(request: pytest.FixtureRequest, hub: HubServer, client: Path, tmp_path: Path) -> tuple[str, ...]:
    """The files fetched in one of three ways; the words that name where they are."""
    root = tmp_path / "root"
    if request.param == "cache":
        models("pull", NAME)
        return ()
    if request.param == "root":
        models("pull", NAME, "--weights-root", str(root))
    else:
        for name in FILES:
            hf_hub_download(REPO, name, local_dir=root / NAME)
    return ("--weights-root", str(root))


def test_fetched_files_need_no_connection(
    fetched: tuple[str, ...], hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert states(*fetched) == dict.fromkeys(FILES, "ok")
    (path,) = [path for path in tmp_path.rglob("model.safetensors") if path.is_file()]
    content = bytearray(WEIGHTS)
    content[123_456] ^= 1
    path.resolve().write_bytes(content)
    assert states(*fetched, code=3) == {**dict.fromkeys(FILES, "ok"), "model.safetensors": "damaged"}
    line = error_of(models("verify", NAME, *fetched, code=3))
    assert line.startswith(f"{path}: its SHA-256 is not ") and f"models pull {NAME}" in line
    path.unlink()
    result = models("verify", NAME, *fetched, code=4)
    assert "missing      model.safetensors or pytorch_model.bin" in result.stdout


def test_somebodys_own_folder_is_compared_with_the_hub(
    hub: HubServer, client: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path("pretrained_models") / NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(CONFIG)
    (folder / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (folder / "preprocessor_config.json").write_bytes(b"[]")
    assert states(code=3) == dict(zip(FILES, ("ok", "damaged", "damaged"), strict=True))
    out = models("verify", NAME, code=3).stdout
    assert f"it has 43 bytes, the hub's has {len(WEIGHTS)}" in out
    assert hub.fetched() == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = models("verify", NAME, code=4)
    assert result.stdout.count("not checked  ") == 3 and "HF_HUB_OFFLINE is set" in result.stdout
    assert result.stdout.splitlines()[-1] == "total        3 not checked"
    assert error_of(result).startswith(f"{NAME}: no file was checked: HF_HUB_OFFLINE is set")


def test_what_is_missing_is_named_with_all_that_the_user_named(hub: HubServer, client: Path) -> None:
    """The hint for one part would leave the others missing."""
    folder = client.parent / "my root"
    result = models("verify", "cartoon-i2v", "omniavatar-1.3b", "--weights-root", str(folder), code=4)
    assert f"`avatarctl models pull omniavatar-1.3b --weights-root '{folder}'`" in error_of(result)
    assert result.stdout.splitlines()[-1] == "total        6 ok, 9 missing"
    assert f"pytorch_model.pt: not here: fetch it, or put it in {folder}/OmniAvatar-1.3B/" in result.stdout
    assert "built in" in models("verify", "stableavatar-tiny").stdout


def test_show_says_how_to_get_what_is_missing(hub: HubServer, client: Path) -> None:
    out = models("show", "omniavatar-1.3b").stdout
    where = "pretrained_models/OmniAvatar-1.3B/pytorch_model.pt"
    assert f"missing    pytorch_model.pt  (from OmniAvatar/OmniAvatar-1.3B; by hand: {where})" in out
    assert out.splitlines()[-1] == "fetch      avatarctl models pull omniavatar-1.3b"
    by_hand = models("show", "yunet").stdout
    assert "fetch  " not in by_hand and "pretrained_models/yunet/" in by_hand


def test_files_without_a_repository(hub: HubServer, client: Path) -> None:
    folder = Path("ckpt/videomae-v2-g")
    folder.mkdir(parents=True)
    (folder / "vit_g_hybrid_pt_1200e_ssv2_ft.pth").write_bytes(b"x")
    assert "no digest of it is published" in models("verify", "videomae-v2-g", code=4).stdout
    vgg = Path("ckpt/lpips-vgg16/vgg16-397923af.pth")
    vgg.parent.mkdir()
    vgg.write_bytes(b"x")
    assert not hashlib.sha256(b"x").hexdigest().startswith("397923af")
    assert "does not begin with 397923af" in error_of(models("verify", "lpips-vgg16", code=3))


def test_a_folder_is_checked_file_by_file(hub: HubServer, client: Path) -> None:
    folder = Path("pretrained_models/StableAvatar/wav2vec2-base-960h")
    folder.mkdir(parents=True)
    base = Path("checkpoints/StableAvatar/Wan2.1-Fun-V1.1-1.3B-InP/google")
    base.mkdir(parents=True)
    (base / "a.json").write_bytes(b"{}")
    (base.parent / "config.json").write_bytes(b"{}")
    out = models("verify", "wan2.1-fun-1.3b-inp", code=4).stdout
    assert [line.split()[2].split("InP/")[1].rstrip(":") for line in out.splitlines()[:-1]] == [
        "config.json", "google/a.json"
    ]  # fmt: skip


def test_a_stop_in_the_middle(hub: HubServer, client: Path) -> None:
    from avatarctl.errors import Interrupted
    from avatarctl.hub.verify import verify
    from avatarctl.registry import find

    models("pull", NAME)
    with pytest.raises(Interrupted):
        list(verify([find(NAME)], None, lambda event: None, lambda: True))


def test_files_of_the_package_are_not_to_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "assets"
    shutil.copytree(ASSETS, copy)
    monkeypatch.setattr("avatarctl.registry.row.ASSETS", copy)
    vae = copy / "cartoon/vae.safetensors"
    vae.write_bytes(vae.read_bytes()[:-1] + b"x")
    found = error_of(models("verify", "cartoon-i2v", code=4))
    assert "vae.safetensors" in found and "SHA-256" in found and "(install avatarctl again)" in found
    vae.unlink()
    assert "(install avatarctl again)" in error_of(models("verify", "cartoon-i2v", code=4))
