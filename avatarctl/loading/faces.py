"""The face networks that come with the package, from their files."""

from __future__ import annotations

import hashlib
from typing import Final

import torch
from torch import nn

from avatarctl.errors import WeightsMissing
from avatarctl.files.source import open_weights
from avatarctl.hub.locate import locate
from avatarctl.loading.fill import fill, on_meta
from avatarctl.loading.sources import Sources, check_packaged
from avatarctl.models.face_networks import BlazeFace, FaceMesh, FaceNetworks
from avatarctl.registry import Row, find

__all__ = ["face_networks", "networks_identity"]

_ROWS: Final = ("blazeface", "face-mesh")


def face_networks(device: torch.device) -> FaceNetworks:
    """The detector and the mesh, frozen, in float32 on `device`.

    Raises WeightsMissing for a file of the package that is missing or has other bytes than the release.
    """
    rows = [find(name) for name in _ROWS]
    detector, mesh = BlazeFace, FaceMesh
    with on_meta():
        made = detector(), mesh()
    for row, network in zip(rows, made, strict=True):
        _fill(row, network, device)
    return FaceNetworks(*made, networks_identity())


def networks_identity() -> str:
    """Names both networks by the bytes that their rows state."""
    stated = "".join(digest for name in _ROWS for digest in find(name).sha256.values())
    return "mediapipe-" + hashlib.sha256(stated.encode()).hexdigest()[:12]


def _fill(row: Row, network: nn.Module, device: torch.device) -> None:
    found = locate(row, None)
    if found.missing:
        raise WeightsMissing("is missing", where=found.missing[0].file, fix="install avatarctl again")
    (path,) = found.files.values()
    check_packaged(row, Sources(encoders={"face": path}))
    tensors = open_weights(path).tensors
    fill(network, tensors, dtype_of=lambda name: torch.float32, device=device, where=path)
    # Depthwise convolutions are faster with the channels last, see docs/benchmarks.md.
    network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
