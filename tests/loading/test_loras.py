"""`--lora PATH[:SCALE]`: what is a scale, what is a path, what is a name on the hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from avatarctl.errors import ConfigError, PathNotFound, WeightsMissing
from avatarctl.loading.loras import Lora, absolute_lora, find_lora, split_scale


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("x.safetensors", "x.safetensors", 1.0),
        ("x.safetensors:0.5", "x.safetensors", 0.5),
        ("x.safetensors:1", "x.safetensors", 1.0),
        ("x.safetensors:-.25", "x.safetensors", -0.25),
        ("x.safetensors:+1e-1", "x.safetensors", 0.1),
        (r"C:\x.safetensors", r"C:\x.safetensors", 1.0),
        (r"C:\x.safetensors:2", r"C:\x.safetensors", 2.0),
        ("a:b/c", "a:b/c", 1.0),
        ("a:b/c:0.5", "a:b/c", 0.5),
        ("x:1:2", "x:1", 2.0),
        ("x:nan", "x:nan", 1.0),
        ("x:0x10", "x:0x10", 1.0),
        ("x:1,5", "x:1,5", 1.0),
        ("x:", "x:", 1.0),
        (":0.5", ":0.5", 1.0),
        ("x:١", "x:١", 1.0),
        ("org/repo/file.safetensors:0.7", "org/repo/file.safetensors", 0.7),
    ],
)
def test_only_a_trailing_number_is_a_scale(text: str, path: str, scale: float) -> None:
    assert split_scale(text) == (path, scale)


def test_a_scale_without_bounds_is_refused() -> None:
    with pytest.raises(ConfigError, match="no finite number"):
        split_scale("x:1e999")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The snapshot of org/repo in the hub's cache, empty; the current folder is another."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--org--repo" / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    return folder


def test_a_path_wins_over_a_name_on_the_hub(cache: Path) -> None:
    (cache / "f.safetensors").write_bytes(b"x")
    assert find_lora("org/repo/f.safetensors:2", None).path == cache / "f.safetensors"
    local = Path("org/repo/f.safetensors")
    local.parent.mkdir(parents=True)
    local.write_bytes(b"x")
    found = find_lora("org/repo/f.safetensors:2", None)
    assert (found.path, found.strength) == (local, 2.0)


def test_a_file_whose_name_ends_in_a_number(cache: Path) -> None:
    Path("a:2").write_bytes(b"x")
    assert find_lora("a:2", None) == Lora(Path("a:2"), 1.0)
    assert find_lora("a:2:0.5", None) == Lora(Path("a:2"), 0.5)
    assert find_lora(absolute_lora("a:2"), None) == Lora(Path.cwd() / "a:2", 1.0)


def test_a_whole_repository(cache: Path) -> None:
    (cache / "pytorch_lora_weights.safetensors").write_bytes(b"x")
    assert find_lora("org/repo", None).path == cache


@pytest.mark.parametrize("name", ["org/repo/absent.safetensors", "org/other", "org/other/sub/f.safetensors"])
def test_what_was_not_fetched_is_never_fetched_here(name: str, cache: Path) -> None:
    with pytest.raises(WeightsMissing) as missing:
        find_lora(f"{name}:0.5", None)
    assert f"`avatarctl models pull {name}`" in str(missing.value) and missing.value.exit_code == 4


@pytest.mark.parametrize(
    "name", ["absent.safetensors", "loras/absent.safetensors", "./org/repo", "/org/repo", "a:b/c", "x" * 5000]
)
def test_a_path_that_is_not_there(name: str, cache: Path) -> None:
    with pytest.raises(PathNotFound):
        find_lora(name, None)


def test_what_a_run_file_holds(cache: Path) -> None:
    Path("x.safetensors").write_bytes(b"x")
    here = Path.cwd()
    assert absolute_lora("x.safetensors:0.5") == f"{here}/x.safetensors:0.5"
    assert absolute_lora("x.safetensors") == f"{here}/x.safetensors"
    assert absolute_lora("org/repo/f.safetensors:0.5") == "org/repo/f.safetensors:0.5"
