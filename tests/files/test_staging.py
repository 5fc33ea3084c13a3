"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from avatarctl.errors import OutputRefused, WriteFailed
from avatarctl.files.staging import staged_folder

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX links")


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def older_model(folder: Path) -> Path:
    (folder / "out").mkdir()
    (folder / "out" / "config.json").write_text("old")
    (folder / "out" / "model.safetensors").write_text("old")
    return folder / "out"


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out", overwrite=False) as folder:
        assert folder.parent == tmp_path and folder.name.startswith(".tmp-")
        (folder / "transformer").mkdir()
        (folder / "transformer" / "a.safetensors").write_bytes(b"a")
        assert not (tmp_path / "out").exists()
    assert tree(tmp_path) == ["out", "out/transformer", "out/transformer/a.safetensors"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("older", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path: Path, failure: type[BaseException], older: bool) -> None:
    if older:
        older_model(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(failure), staged_folder(tmp_path / "out", overwrite=older) as folder:
        (folder / "half.safetensors").write_bytes(b"half")
        raise failure
    assert tree(tmp_path) == before


def test_an_existing_folder_is_refused_or_replaced(tmp_path: Path) -> None:
    final = older_model(tmp_path)
    with pytest.raises(OutputRefused, match="out: exists"), staged_folder(final, overwrite=False):
        raise AssertionError("was entered")
    with staged_folder(final, overwrite=True) as folder:
        (folder / "new.safetensors").write_bytes(b"new")
        assert (final / "config.json").read_text() == "old"
    assert tree(tmp_path) == ["out", "out/new.safetensors"]


@pytest.mark.parametrize("failing", [1, 2])
def test_the_older_folder_comes_back_when_the_exchange_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    final = older_model(tmp_path)
    before = tree(tmp_path)
    rename, calls = Path.rename, []

    def watched(self: Path, target: Path) -> Path:
        calls.append(self.name)
        if len(calls) == failing:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    with pytest.raises(WriteFailed, match="no space left"), staged_folder(final, overwrite=True) as folder:
        (folder / "new.safetensors").write_bytes(b"new")
    assert tree(tmp_path) == before and (final / "config.json").read_text() == "old"


def test_bytes_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell files from folders")
    flushed: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def watched_fsync(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").resolve().name)
        fsync(descriptor)

    def watched_rename(self: Path, target: Path) -> Path:
        flushed.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    with staged_folder(tmp_path / "out", overwrite=False) as folder:
        (folder / "deep").mkdir()
        for name in ("a", "deep/b"):
            (folder / name).write_bytes(b"x")
    renamed = flushed.index("rename")
    assert {"a", "b", "deep", folder.name} <= set(flushed[:renamed])
    assert flushed[renamed + 1 :] == [tmp_path.name]


@pytest.mark.parametrize(
    "stranger",
    [
        "thesis.txt",
        "generation_config.json",
        "mine.safetensors",
        "pytorch_model.pt",
        "diffusion_pytorch_model.fp16.safetensors",
        "model.safetensors/",
        "vae/",
        "vae/config.json",
    ],
)
def test_a_folder_that_holds_other_things_is_not_removed(stranger: str, tmp_path: Path) -> None:
    final = older_model(tmp_path)
    (final / "model.safetensors").unlink()
    if stranger.endswith("/"):
        (final / stranger).mkdir()
    else:
        (final / stranger).parent.mkdir(exist_ok=True)
        (final / stranger).write_text("mine")
    before = tree(tmp_path)
    with (
        pytest.raises(OutputRefused, match=f"holds {stranger.split('/')[0]}, which no conversion writes"),
        staged_folder(final, overwrite=True),
    ):
        raise AssertionError("was entered")
    assert tree(tmp_path) == before


def test_links_to_weights_are_not_ours_to_remove(tmp_path: Path) -> None:
    """A snapshot folder of the hub's cache."""
    final = older_model(tmp_path)
    (final / "pytorch_model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(OutputRefused, match="holds pytorch_model"), staged_folder(final, overwrite=True):
        raise AssertionError("was entered")


def test_what_any_conversion_wrote_is_replaced(tmp_path: Path) -> None:
    final = older_model(tmp_path)
    for name in (
        "adapter_config.json",
        "adapter_model.safetensors",
        "pytorch_lora_weights.patch.safetensors",
        "diffusion_pytorch_model-00001-of-00002.safetensors",
        "diffusion_pytorch_model.safetensors.index.json",
        "pytorch_model.safetensors",
    ):
        (final / name).write_text("old")
    with staged_folder(final, overwrite=True) as folder:
        (folder / "model.safetensors").write_bytes(b"new")
    assert tree(tmp_path) == ["out", "out/model.safetensors"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_appears_meanwhile_stays(overwrite: bool, tmp_path: Path) -> None:
    final = tmp_path / "out"
    with (
        pytest.raises(OutputRefused, match="holds mine" if overwrite else "out: exists"),
        staged_folder(final, overwrite=overwrite) as folder,
    ):
        (folder / "model.safetensors").write_bytes(b"new")
        final.mkdir()
        (final / "mine.safetensors").write_text("mine")
    assert tree(tmp_path) == ["out", "out/mine.safetensors"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_appears_after_the_last_look_stays(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = older_model(tmp_path) if overwrite else tmp_path / "out"
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        final.mkdir(exist_ok=True)
        (final / "mine.safetensors").write_text("mine")
        monkeypatch.undo()
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with (
        pytest.raises(OutputRefused, match="holds mine" if overwrite else "out: exists"),
        staged_folder(final, overwrite=overwrite) as folder,
    ):
        (folder / "model.safetensors").write_bytes(b"new")
    assert (final / "mine.safetensors").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_links_files_sources_and_nameless_places_are_refused(tmp_path: Path) -> None:
    final = older_model(tmp_path)
    (tmp_path / "link").symlink_to(final)
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    (tmp_path / "file").touch()
    before = tree(tmp_path)
    source = tmp_path / "link" / "model.safetensors"
    for place, cause in (
        (tmp_path / "link", "is a symbolic link"),
        (tmp_path / "dangling", "is a symbolic link"),
        (tmp_path / "file", "is a file, not a folder"),
        (final, "holds a file that is read"),
        (Path("/"), "names no folder"),
        (Path(), "names no folder"),
        (tmp_path / "..", "names no folder"),
        (tmp_path / "absent" / "out", "does not exist"),
        (tmp_path / ("n" * 256), "too long"),
    ):
        with (
            pytest.raises(OutputRefused, match=cause),
            staged_folder(place, overwrite=True, sources=[source]),
        ):
            raise AssertionError("was entered")
    assert tree(tmp_path) == before
