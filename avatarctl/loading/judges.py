"""The networks of auxiliary losses: which files they are, and from these to frozen networks in float32.

Rows with tiny judges of their own (`Row.network`) get them unless a file is named: the judge of sync with the
weights that come with the program, the others with random ones. What these say means nothing, and every
command runs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch import nn

from avatarctl.errors import PathNotFound, UnusableWeights, WeightsMissing
from avatarctl.events import Emit, Notice, Stage
from avatarctl.files.named_path import expanded
from avatarctl.files.source import open_weights
from avatarctl.files.tensors import StoredTensor
from avatarctl.hub.locate import locate
from avatarctl.loading.fill import fill, on_meta
from avatarctl.loading.sources import Sources, check_packaged
from avatarctl.models.lpips_package import PackageLpips, require_lpips
from avatarctl.models.lpips_vgg import LpipsVgg, random_heads
from avatarctl.models.stable_syncnet import PUBLISHED_SYNCNET, StableSyncNet
from avatarctl.models.videomae import PUBLISHED_VIDEOMAE, VideoMae
from avatarctl.registry import ASSETS, JUDGES, Row
from avatarctl.rng import stable_hash

if TYPE_CHECKING:
    from avatarctl.config import Model

__all__ = ["PART_OF", "JudgeFiles", "Judges", "LossName", "find_judges", "judges_missing", "load_judges"]

LossName = Literal["sync", "lpips", "trepa"]
Backend = Literal["builtin", "package"]

PART_OF: Final[Mapping[LossName, str]] = {"sync": "syncnet", "lpips": "lpips_vgg", "trepa": "videomae"}
"""The part of `model.weights` that each loss is judged by."""

_HEADS: Final = ASSETS / "lpips" / "heads.safetensors"
_SLICE: Final = re.compile(r"net\.slice\d\.(?P<layer>\d+\.(?:weight|bias))", re.ASCII)
_FORMATS: Final = {
    "syncnet": "a torch file, bare or with a state_dict, or safetensors, under the published names",
    "lpips_vgg": "torchvision's VGG-16 or its features.*, a torch file or safetensors",
    "videomae": "a torch file, bare or below model or module, or safetensors, under the published names",
}


@dataclass(frozen=True)
class JudgeFiles:
    """files: of a part, as far as found; random: parts that are made up; missing: parts without a file."""

    files: Mapping[str, Path] = field(default_factory=dict)
    random: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judges:
    """The networks of the losses that were asked for, on their device, frozen, in evaluation mode."""

    sync: StableSyncNet | None = None
    lpips: LpipsVgg | PackageLpips | None = None
    trepa: VideoMae | None = None


def find_judges(
    row: Row, model: Model, losses: Collection[LossName], backend: Backend = "builtin"
) -> JudgeFiles:
    """Where the networks of `losses` come from; nothing large is read.

    Raises PathNotFound for a path in `model.weights` that is not there.
    """
    files: dict[str, Path] = {}
    random: list[str] = []
    missing: list[str] = []
    for part in (part for loss, part in PART_OF.items() if loss in losses):
        if part in model.weights:
            files[part] = path = expanded(model.weights[part])
            if not path.exists():
                raise PathNotFound(f"no such file or folder: {path}", where=f"model.weights.{part}")
        elif own := _packaged(row, part):
            files[part] = own
        elif part in row.network and not (part == "lpips_vgg" and backend == "package"):
            random.append(part)
        elif found := locate(JUDGES[part], model.weights_root).files:
            files[part] = next(iter(found.values()))
        else:
            missing.append(part)
    return JudgeFiles(files, tuple(random), tuple(missing))


def judges_missing(found: JudgeFiles) -> WeightsMissing:
    """The error of a run without `found.missing`: file, format, and the command that leads to it."""
    told = (
        f"{', '.join(JUDGES[part].files)} for model.weights.{part} ({_FORMATS[part]})"
        for part in found.missing
    )
    pulls = " ".join(JUDGES[part].name for part in found.missing)
    return WeightsMissing(
        f"weights of auxiliary losses are missing: {'; '.join(told)}",
        where="aux.losses",
        fix=f"`avatarctl models pull {pulls}` fetches them, or says from where",
    )


def load_judges(
    row: Row,
    found: JudgeFiles,
    losses: Collection[LossName],
    device: torch.device,
    emit: Emit,
    backend: Backend = "builtin",
) -> Judges:
    """The networks of `losses`, float32 whatever the run computes in.

    Raises WeightsMissing (exit 4) for files that were not found, ExtraMissing for a package that does not
    import, UnusableWeights (exit 3) for files that do not fit.
    """
    if found.missing:
        raise judges_missing(found)
    if backend == "package" and "lpips" in losses:
        require_lpips()  # before anything large is read
    if found.random:
        names = ", ".join(loss for loss, part in PART_OF.items() if part in found.random)
        emit(Notice(f"auxiliary losses ({names}): untrained miniature judges, whose numbers mean nothing"))
    made: dict[str, Any] = {}
    for loss, part in PART_OF.items():
        if loss not in losses:
            continue
        if part in found.random:
            judge = _random(row, part)
        else:
            emit(Stage(f"loading the judge of {loss}"))
            path = found.files[part]
            judge = _own(row, part, path) if path == _packaged(row, part) else _from_file(part, path)
        if backend == "package" and isinstance(judge, LpipsVgg):
            judge = PackageLpips(judge)
        made[loss] = judge.to(device).eval().requires_grad_(False)
    return Judges(**made)


def _packaged(row: Row, part: str) -> Path | None:
    """The file of a judge that a row of the package has of its own."""
    names = (name for name in row.files if Path(name).stem == part) if part in row.network else ()
    return next((row.assets / name for name in names), None)


def _own(row: Row, part: str, path: Path) -> nn.Module:
    """A trained judge of the row's own sizes. Raises WeightsMissing for other bytes than the release's."""
    check_packaged(row, Sources(encoders={part: path}))
    with on_meta():
        network: nn.Module = _CLASSES[part](**row.network[part])
    tensors = open_weights(path).tensors
    fill(network, tensors, dtype_of=lambda name: torch.float32, device=torch.device("cpu"), where=path)
    return network


_CLASSES: Final[Mapping[str, Any]] = {
    "syncnet": StableSyncNet, "lpips_vgg": LpipsVgg, "videomae": VideoMae,
}  # fmt: skip


def _random(row: Row, part: str) -> nn.Module:
    """Weights depend on the row's name and the part alone; the global generator is given back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stable_hash("untrained", row.name, part))
        network: nn.Module = _CLASSES[part](**row.network[part])
    if isinstance(network, LpipsVgg):
        random_heads(network)
    return network


def _from_file(part: str, path: Path) -> nn.Module:
    tensors = open_weights(path).tensors
    with on_meta():
        network, named, told_as = _BUILDERS[part](tensors, path)
    fill(
        network,
        named,
        dtype_of=lambda name: torch.float32,
        device=torch.device("cpu"),
        where=path,
        likely=lambda: f"expected {_FORMATS[part]}",
        told_as=told_as.get,
    )
    return network


Named = tuple[nn.Module, Mapping[str, StoredTensor], Mapping[str, str]]
"""A network, its tensors by its own names, and these names as they are in the file."""


def _syncnet(tensors: Mapping[str, StoredTensor], path: Path) -> Named:
    return StableSyncNet(**PUBLISHED_SYNCNET), tensors, {name: name for name in tensors}


def _videomae(tensors: Mapping[str, StoredTensor], path: Path) -> Named:
    """Its head has as many classes as it was tuned for, and is not used."""
    head = tensors.get("head.weight")
    classes = head.info.shape[0] if head is not None and len(head.info.shape) == 2 else 1
    if not 1 <= classes <= _MOST_CLASSES:
        raise UnusableWeights(f"head.weight has {classes} classes", where=path)
    return VideoMae(**PUBLISHED_VIDEOMAE, classes=classes), tensors, {name: name for name in tensors}


_MOST_CLASSES: Final = 65_536


def _lpips(tensors: Mapping[str, StoredTensor], path: Path) -> Named:
    """The trunk by torchvision's names or LPIPS' own, and the heads that come with the program. What stands
    behind the convolutions, or beside the trunk in a file of LPIPS, is not read."""
    told_as: dict[str, str] = {}
    for name in tensors:
        if match := _SLICE.fullmatch(name):
            told_as[f"features.{match['layer']}"] = name
        elif name.startswith("features."):
            told_as[name] = name
    named = {ours: tensors[theirs] for ours, theirs in told_as.items()}
    heads = open_weights(_HEADS).tensors
    return LpipsVgg(), {**named, **heads}, told_as


_BUILDERS: Final = {"syncnet": _syncnet, "lpips_vgg": _lpips, "videomae": _videomae}
