"""Paths that are not usable files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from avatarctl.errors import PathNotFound, UnusableAudio, UnusableImage
from avatarctl.media import check_regular_file


def test_a_regular_file_passes_under_any_name(tmp_path: Path) -> None:
    path = tmp_path / "ein süßer Name.wav"
    path.write_bytes(b"x")
    assert check_regular_file(str(path), UnusableAudio) == path


def test_a_link_to_a_file_passes(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert check_regular_file(tmp_path / "link", UnusableImage) == tmp_path / "link"


def test_what_is_absent(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_bytes(b"x")
    for name in ("absent.wav", "dangling", "loop", "file/below.wav", "n" * 300, "nul\0.wav"):
        with pytest.raises(PathNotFound) as caught:
            check_regular_file(tmp_path / name, UnusableAudio)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
    with pytest.raises(PathNotFound, match="leads nowhere"):
        check_regular_file(tmp_path / "dangling", UnusableAudio)


def test_addresses_are_named_as_such() -> None:
    with pytest.raises(PathNotFound, match="address"):
        check_regular_file("https://example.org/voice.wav", UnusableAudio)


@pytest.mark.parametrize("kind_error", [UnusableAudio, UnusableImage])
def test_what_is_there_but_no_file(tmp_path: Path, kind_error: type) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    cases = {tmp_path: "directory", tmp_path / "empty": "0 bytes", tmp_path / "pipe": "pipe or socket"}
    for path, cause in (cases | {Path("/dev/zero"): "device"}).items():
        with pytest.raises(kind_error, match=cause) as caught:
            check_regular_file(path, kind_error)
        assert caught.value.exit_code == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission(tmp_path: Path) -> None:
    path = tmp_path / "secret.wav"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(UnusableAudio, match="permission"):
        check_regular_file(path, UnusableAudio)
