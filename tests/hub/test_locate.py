"""Files are found where people keep them: a named root, other toolkits' folders, the hub's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from avatarctl.hub.locate import (
    HubName,
    files_together,
    folder_name,
    locate,
    locate_hub_name,
    missing_files,
    read_hub_name,
    with_needs,
)
from avatarctl.loading.sources import _transformer_of
from avatarctl.registry import ROWS, find

WAV2VEC = ("config.json", "model.safetensors", "preprocessor_config.json")
TRANSFORMER = "diffusion_pytorch_model.safetensors"
_WAN_PARTS = ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl/spiece.model")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLDER = "f" * 40


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder and an empty cache of the hub."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def put(folder: Path, *files: str) -> None:
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def cached(tmp_path: Path, repo: str, *files: str, commit: str = COMMIT, main: bool = True) -> Path:
    """Files as the hub's client leaves them: blobs, and links to them below the commit."""
    home = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    for name in files:
        blob = home / "blobs" / f"{commit[:4]}-{name.replace('/', '-')}"
        link = home / "snapshots" / commit / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(b"x")
        link.symlink_to(os.path.relpath(blob, link.parent))
    if main:
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs" / "main").write_text(commit)
    return home


def names_of(row_name: str, root: Path | None = None) -> set[str]:
    found = missing_files(find(row_name), str(root) if root else None)
    return {f"{wanted.folder}/{wanted.file}" for wanted in found}


def test_a_built_in_model_misses_nothing() -> None:
    assert missing_files(find("cartoon-i2v"), None) == ()


def test_a_row_comes_with_what_it_needs() -> None:
    assert [row.name for row in with_needs(find("omniavatar-14b"))] == [
        "omniavatar-14b", "wan2.1-t2v-14b", "omniavatar-14b-adapter", "wav2vec2-base-960h"
    ]  # fmt: skip


def test_missing_files_name_folder_and_repository(tmp_path: Path) -> None:
    found = missing_files(find("omniavatar-1.3b"), str(tmp_path))
    assert {wanted.hub_id for wanted in found} == {
        "Wan-AI/Wan2.1-T2V-1.3B", "OmniAvatar/OmniAvatar-1.3B", "facebook/wav2vec2-base-960h"
    }  # fmt: skip
    folders = {wanted.hub_id: wanted.folder for wanted in found}
    assert folders["OmniAvatar/OmniAvatar-1.3B"] == str(tmp_path / "OmniAvatar-1.3B")
    assert "model.safetensors or pytorch_model.bin" in {wanted.file for wanted in found}


def test_what_is_there_is_not_missing(tmp_path: Path) -> None:
    folder = tmp_path / "wav2vec2-base-960h"
    before = names_of("wav2vec2-base-960h", tmp_path)
    assert len(before) == 3
    put(folder, "config.json")
    assert names_of("wav2vec2-base-960h", tmp_path) == before - {f"{folder}/config.json"}
    put(folder, *WAV2VEC)
    found = locate(find("wav2vec2-base-960h"), str(tmp_path))
    assert found.folder == folder and found.missing == ()
    assert found.files["model.safetensors|pytorch_model.bin"] == folder / "model.safetensors"


def test_either_of_two_names_will_do(tmp_path: Path) -> None:
    put(tmp_path / "wav2vec2-base-960h", "config.json", "pytorch_model.bin", "preprocessor_config.json")
    assert names_of("wav2vec2-base-960h", tmp_path) == set()


@pytest.mark.parametrize(
    ("row", "written"),
    [
        ("omniavatar-1.3b-adapter", ("config.json", "pytorch_model.safetensors")),
        ("omniavatar-14b-adapter", ("config.json", "pytorch_model.safetensors")),
        ("wan2.1-t2v-14b", (TRANSFORMER,)),
        ("wan2.1-t2v-1.3b", (f"{TRANSFORMER}.index.json",)),
    ],
)
def test_what_was_converted_stands_in_for_what_was_published(
    row: str, written: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / find(row).folder
    put(folder, *written, *_WAN_PARTS)
    found = locate(find(row), str(tmp_path))
    assert found.missing == () and found.folder == folder
    assert {folder / name for name in written} <= set(found.files.values())
    if row.startswith("wan"):
        assert _transformer_of(found) == folder / written[0]
    (folder / written[-1]).unlink()
    missing = locate(find(row), str(tmp_path)).missing
    assert missing and not any(" or " in wanted.file for wanted in missing), "the published name is asked for"


def test_an_empty_folder_or_a_folder_for_a_file_does_not_count(tmp_path: Path) -> None:
    base = tmp_path / "Wan2.1-T2V-1.3B"
    (base / "google/umt5-xxl").mkdir(parents=True)
    (base / "Wan2.1_VAE.pth").mkdir()
    put(base / "google/umt5-xxl", ".gitignore")
    missing = names_of("wan2.1-t2v-1.3b", tmp_path)
    assert {f"{base}/google/umt5-xxl/", f"{base}/Wan2.1_VAE.pth"} <= missing
    put(base / "google/umt5-xxl", "spiece.model")
    assert f"{base}/google/umt5-xxl/" not in names_of("wan2.1-t2v-1.3b", tmp_path)


@pytest.mark.parametrize("root", ["pretrained_models", "checkpoints", "ckpt"])
def test_usual_folders_of_the_current_directory(root: str, here: Path) -> None:
    assert names_of("wav2vec2-base-960h") == {
        "pretrained_models/wav2vec2-base-960h/" + name
        for name in ("config.json", "model.safetensors or pytorch_model.bin", "preprocessor_config.json")
    }
    put(here / root / "wav2vec2-base-960h", *WAV2VEC)
    assert names_of("wav2vec2-base-960h") == set()


def test_a_whole_repository_in_a_usual_folder(here: Path) -> None:
    """As `--local-dir checkpoints` of StableAvatar's instructions leaves it."""
    put(here / "checkpoints", "StableAvatar-1.3B/transformer3d-square.pt", "Kim_Vocal_2.onnx")
    assert locate(find("stableavatar-1.3b"), None).folder == Path("checkpoints")
    assert locate(find("kim-vocal-2"), None).files["Kim_Vocal_2.onnx"] == Path("checkpoints/Kim_Vocal_2.onnx")


def test_a_named_root_comes_first_and_the_others_after_it(tmp_path: Path, here: Path) -> None:
    put(here / "pretrained_models" / "Wan2.1-T2V-1.3B", TRANSFORMER, "Wan2.1_VAE.pth")
    root = tmp_path / "root"
    put(root / "Wan2.1-T2V-1.3B", "Wan2.1_VAE.pth")
    found = locate(find("wan2.1-t2v-1.3b"), str(root))
    assert found.folder is None, "two folders share the files"
    assert found.files["Wan2.1_VAE.pth"].is_relative_to(root)
    assert found.files[TRANSFORMER].parts[0] == "pretrained_models"


@pytest.mark.parametrize("row", ["wav2vec2-base-960h", "omniavatar-14b-adapter", "wan2.1-t2v-14b"])
def test_a_part_of_a_set_does_not_hide_a_whole_one(row: str, tmp_path: Path, here: Path) -> None:
    """An index finds its shards beside it, and the weights of a config are those beside it."""
    names = [names.split("|")[0] for names in files_together(find(row))]
    repo = find(row).hub_id
    home = cached(tmp_path, repo, *names)
    folder = Path(repo).name
    put(tmp_path / "root" / folder, *names[:-1])
    put(here / "checkpoints" / folder, names[-1])
    found = locate(find(row), str(tmp_path / "root"))
    assert {path.parent for path in found.files.values()} == {home / "snapshots" / COMMIT}
    assert len(found.files) == len(names)


def test_parts_in_several_places_are_not_added_up(tmp_path: Path, here: Path) -> None:
    put(tmp_path / "root" / "wav2vec2-base-960h", "config.json")
    folder = Path("checkpoints/wav2vec2-base-960h")
    put(folder, "pytorch_model.bin", "preprocessor_config.json")
    found = locate(find("wav2vec2-base-960h"), str(tmp_path / "root"))
    assert found.folder == folder and len(found.files) == 2
    assert [(wanted.file, wanted.folder) for wanted in found.missing] == [("config.json", str(folder))]


def test_a_root_may_be_the_folder_itself(tmp_path: Path) -> None:
    root = tmp_path / "my weights"
    put(root, "config.json", "pytorch_model.pt")
    assert locate(find("omniavatar-14b-adapter"), str(root)).folder == root
    # One file is not enough: `config.json` may be anybody's.
    assert len(names_of("wav2vec2-base-960h", root)) == 3


def test_a_root_named_for_another_row_is_not_mine(tmp_path: Path) -> None:
    root = tmp_path / "OmniAvatar-14B"
    put(root, "config.json", "pytorch_model.pt")
    assert names_of("omniavatar-14b-adapter", root) == set()
    assert len(names_of("omniavatar-1.3b-adapter", root)) == 2


def test_home_in_a_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path / "weights" / "wav2vec2-base-960h", *WAV2VEC)
    assert names_of("wav2vec2-base-960h", Path("~/weights")) == set()


def test_the_cache_of_the_hub_counts_file_by_file(tmp_path: Path) -> None:
    home = cached(tmp_path, "facebook/wav2vec2-base-960h", "config.json", "pytorch_model.bin")
    found = locate(find("wav2vec2-base-960h"), None)
    assert [wanted.file for wanted in found.missing] == ["preprocessor_config.json"]
    assert found.folder == home / "snapshots" / COMMIT
    cached(tmp_path, "facebook/wav2vec2-base-960h", "preprocessor_config.json")
    assert locate(find("wav2vec2-base-960h"), None).missing == ()


def test_folders_in_the_cache(tmp_path: Path) -> None:
    cached(tmp_path, "FrancisRing/StableAvatar", "Wan2.1-Fun-V1.1-1.3B-InP/google/umt5-xxl/spiece.model")
    found = locate(find("wan2.1-fun-1.3b-inp"), None)
    assert found.missing == () and found.files["Wan2.1-Fun-V1.1-1.3B-InP/"].is_dir()
    assert len(locate(find("kim-vocal-2"), None).missing) == 1, "the same repository, another file"


def test_a_link_whose_blob_is_gone_does_not_count(tmp_path: Path) -> None:
    home = cached(tmp_path, "Quark-Vision/Live-Avatar", "liveavatar.safetensors")
    assert names_of("liveavatar-adapter") == set()
    for blob in (home / "blobs").iterdir():
        blob.unlink()
    assert len(names_of("liveavatar-adapter")) == 1


@pytest.mark.parametrize(
    ("cache", "below"),
    [
        (None, "home/.cache/modelscope/hub/models"),
        (None, "home/.cache/modelscope/hub"),
        ("", "home/.cache/modelscope/models"),
        ("ms", "ms/models"),
        ("ms", "ms/hub/models"),
        ("ms", "ms"),
        ("ms", "here/models"),
    ],
)
@pytest.mark.parametrize("name", ["Wan2___1-T2V-1___3B", "Wan2.1-T2V-1.3B"])
def test_the_cache_of_modelscope(
    cache: str | None, below: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MODELSCOPE_CACHE", raising=False)
    if cache is not None:
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / cache) if cache else "")
    row = find("wan2.1-t2v-1.3b")
    put(tmp_path / below / "Wan-AI" / name, TRANSFORMER, *_WAN_PARTS)
    put(tmp_path / below / "other" / name, "config.json")
    found = locate(row, None)
    assert found.missing == () and found.folder is not None
    assert found.folder.resolve() == (tmp_path / below / "Wan-AI" / name).resolve()
    assert locate_hub_name(HubName("Wan-AI/Wan2.1-T2V-1.3B", TRANSFORMER), None) is not None
    cached(tmp_path, "Wan-AI/Wan2.1-T2V-1.3B", TRANSFORMER)
    (of_the_hub,) = (path for path in locate(row, None).files.values() if path.name == TRANSFORMER)
    assert of_the_hub.is_relative_to(tmp_path / "hub"), "the hub's comes first"


def test_an_older_commit_counts_and_main_comes_first(tmp_path: Path) -> None:
    cached(tmp_path, "facebook/wav2vec2-base-960h", *WAV2VEC, commit=OLDER, main=False)
    home = cached(tmp_path, "facebook/wav2vec2-base-960h", "config.json")
    found = locate(find("wav2vec2-base-960h"), None)
    assert found.folder == home / "snapshots" / OLDER and found.missing == (), "main has a part only"
    cached(tmp_path, "facebook/wav2vec2-base-960h", *WAV2VEC[1:])
    assert locate(find("wav2vec2-base-960h"), None).folder == home / "snapshots" / COMMIT


@pytest.mark.parametrize("text", ["../../../etc", "x" * 40, "", "\x1b[31m"])
def test_a_broken_reference_leads_nowhere(text: str, tmp_path: Path) -> None:
    home = cached(tmp_path, "facebook/wav2vec2-base-960h", *WAV2VEC)
    (home / "refs" / "main").write_text(text)
    assert locate(find("wav2vec2-base-960h"), None).folder == home / "snapshots" / COMMIT


def test_rows_without_a_repository_are_looked_up_in_folders_only(here: Path) -> None:
    assert len(names_of("videomae-v2-g")) == 1
    put(here / "ckpt" / "videomae-v2-g", "vit_g_hybrid_pt_1200e_ssv2_ft.pth")
    assert names_of("videomae-v2-g") == set()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName("org/name", "")),
        ("org/na.me-1/a b/c.safetensors", HubName("org/na.me-1", "a b/c.safetensors")),
        ("org", None),
        ("/abs/olute", None),
        ("./here/x", None),
        ("../up/x", None),
        ("org/name/../../x", None),
        ("org/name//x", None),
        ("org/name/", HubName("org/name", "")),
        ("C:\\x/y", None),
        ("org/name/a\x1bb", None),
        ("a--b/c", None),
    ],
)
def test_names_on_the_hub(text: str, name: HubName | None) -> None:
    assert read_hub_name(text) == name


def test_a_fetched_hub_name_is_found(tmp_path: Path) -> None:
    lora = HubName("org/loras", "a/b.safetensors")
    assert locate_hub_name(lora, None) is None
    cached(tmp_path, "org/loras", "a/b.safetensors")
    found = locate_hub_name(lora, None)
    assert found is not None and found.read_bytes() == b"x"
    assert locate_hub_name(HubName("org/loras", ""), None) == tmp_path / (
        f"hub/models--org--loras/snapshots/{COMMIT}"
    )
    put(tmp_path / "root" / "org--loras", "a/b.safetensors")
    assert locate_hub_name(lora, str(tmp_path / "root")) == tmp_path / "root/org--loras/a/b.safetensors"


def test_a_whole_repository_is_one_that_lacks_no_weights(tmp_path: Path) -> None:
    name = HubName("org/loras", "")
    cached(tmp_path, "org/loras", "README.md", "config.json")
    assert locate_hub_name(name, None) is None
    shards = [f"x-0000{number}-of-00002.safetensors" for number in (1, 2)]
    put(tmp_path / "root" / "org--loras", shards[0], "config.json")
    part = locate_hub_name(name, str(tmp_path / "root"))
    assert part == tmp_path / "root/org--loras", "who reads it says what is missing"
    home = cached(tmp_path, "org/loras", *shards, commit=OLDER, main=False)
    assert locate_hub_name(name, str(tmp_path / "root")) == home / "snapshots" / OLDER
    put(tmp_path / "root" / "org--loras", shards[1])
    assert locate_hub_name(name, str(tmp_path / "root")) == tmp_path / "root/org--loras"


def test_two_repositories_of_one_name_are_two(here: Path) -> None:
    put(here / "pretrained_models" / "wan-lora", "a.safetensors")
    put(here / "pretrained_models" / "alice--wan-lora", "a.safetensors")
    for path in ("", "a.safetensors"):
        assert locate_hub_name(HubName("bob/wan-lora", path), None) is None
        found = Path("pretrained_models/alice--wan-lora", path)
        assert locate_hub_name(HubName("alice/wan-lora", path), None) == found


def test_folders_below_a_root_differ_whenever_repositories_do() -> None:
    known = {row.hub_id: row.folder for row in ROWS.values() if row.hub_id}
    assert {repo: folder_name(repo) for repo in known} == known
    assert len(set(known.values())) == len(known)
    assert folder_name("bob/OmniAvatar-14B") == "bob--OmniAvatar-14B"


PROBE = """
import sys
from avatarctl.registry import find
from avatarctl.hub.locate import hub_cache, missing_files
missing_files(find("cartoon-i2v"), None)
print("huggingface_hub" in sys.modules)
missing_files(find("omniavatar-14b"), None)
print(hub_cache(), sorted({"httpx", "httpx2", "torch", "requests"} & sys.modules.keys()))
"""


def test_the_environment_of_the_hub_is_honoured_without_its_client(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment["HF_HOME"] = str(tmp_path / "hf")
    found = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.splitlines() == ["False", f"{tmp_path / 'hf' / 'hub'} []"]


def test_every_row_can_be_looked_up() -> None:
    for row in ROWS.values():
        found = locate(row, None)
        here, there = (
            (found.files, found.missing) if row.source == "package" else (found.missing, found.files)
        )
        assert len(here) == len(row.files) and not there, row.name
