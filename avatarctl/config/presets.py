"""The configurations that ship with avatarctl, found by name."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from avatarctl.config.suggest import nearest
from avatarctl.errors import PathNotFound

__all__ = ["find_config", "is_shipped", "preset_folder", "preset_names"]


_OTHERS: Final = "accelerate"
"""Folder of files that another program reads."""
_JOBS: Final = {"precompute-audio": "data", "precompute-latents": "data"}
"""Folders of commands that are not called as theirs is."""


def preset_folder() -> Path:
    """`avatarctl/configs` in an installed wheel, the top-level `configs` in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def preset_names(folder: Path | None = None) -> tuple[str, ...]:
    """All names, such as "infer/NAME" for `configs/infer/NAME.yaml`; folder: in place of the shipped one."""
    folder = folder or preset_folder()
    ours = (path for path in folder.glob("*/*.yaml") if path.parent.name != _OTHERS)
    return tuple(sorted(path.relative_to(folder).with_suffix("").as_posix() for path in ours))


def is_shipped(path: Path) -> bool:
    """Whether this file is one of the shipped configurations, by whatever path it was named."""
    return preset_folder().resolve() in path.resolve().parents


def find_config(name: str, command: str) -> Path:
    """The file that `--config NAME` means.

    A path wins; a folder means its run.yaml; otherwise a shipped name, with or without the job folder
    ("NAME" for `infer` is "infer/NAME", for both commands that prepare "data/NAME"). Raises PathNotFound.
    """
    path = Path(name)
    if "\0" in name:
        raise PathNotFound("a path cannot hold a NUL character", where="--config")
    if path.is_dir() and (path / "run.yaml").exists():
        return path / "run.yaml"
    if path.exists():
        return path
    shipped = name.removesuffix(".yaml")
    for candidate in (shipped, f"{_JOBS.get(command, command.split()[0])}/{shipped}"):
        if candidate in preset_names():
            return preset_folder() / f"{candidate}.yaml"
    job = _JOBS.get(command, command)
    like = nearest(name, preset_names()) or nearest(f"{job}/{name}", preset_names())
    fix = f"did you mean {like}?" if like else f"shipped are {', '.join(preset_names())}"
    raise PathNotFound("no such configuration file, and no shipped one of this name", where=name, fix=fix)
