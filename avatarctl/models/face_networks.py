"""BlazeFace (short range) and the 468-point face mesh, as published with MediaPipe (spec/face-models.md 2,
3).

Both compute in float32, whatever the run's dtype: scores reach 900, and points are needed to a tenth of a
pixel. Parameters have the names of the files in `assets/faces`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["DETECTOR_SIDE", "MESH_POINTS", "MESH_SIDE", "BlazeFace", "FaceMesh", "FaceNetworks", "anchors"]

DETECTOR_SIDE: Final = 128
MESH_SIDE: Final = 192
MESH_POINTS: Final = 468

_DETECTOR_WIDTHS: Final = (24, 24, 28, 32, 36, 42, 48, 56, 64, 72, 80, 88, 96, 96, 96, 96, 96)
"""Channels in front of block 0, then behind each block."""
_DETECTOR_HALVING: Final = (2, 5, 11)
_FINE_BLOCK: Final = 10
"""Its output feeds the heads of the finer grid."""

_MESH_WIDTHS: Final = (16, 16, 16, 32, 32, 32, 64, 64, 64, 128, 128, 128, 128, 128, 128, 128, 128)
_MESH_HALVING: Final = (2, 5, 8, 11, 14)
_SPLIT_BLOCK: Final = 13
"""Its output feeds both branches."""

_GRIDS: Final = ((16, 2), (8, 6))
"""Cells of a side, anchors of a cell."""


class _Conv(nn.Conv2d):
    """A convolution with TFLite's SAME padding: what is missing goes to the right and to the bottom first."""

    def forward(self, x: Tensor) -> Tensor:
        total = [
            max((-(-size // stride) - 1) * stride + kernel - size, 0)
            for size, stride, kernel in zip(x.shape[-2:], self.stride, self.kernel_size, strict=True)
        ]
        top, left = (each // 2 for each in total)
        bottom, right = total[0] - top, total[1] - left
        if (top, left) != (bottom, right):
            x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        # Where both sides are alike the convolution itself pads, which costs no copy.
        return F.conv2d(x, self.weight, self.bias, self.stride, (top, left), 1, self.groups)


class _Activated(_Conv):
    """A convolution and PReLU, one slope for each channel."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__(c_in, c_out, kernel, stride)
        self.slope = nn.Parameter(torch.empty(c_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.prelu(super().forward(x), self.slope)


class _Block(nn.Module):
    """Depthwise 3x3, 1x1, the input added, activation. Of a halved input the maximum of four is added; new
    channels of it are zero, behind the others."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1, *, slopes: bool = False) -> None:
        super().__init__()
        self.dw = _Conv(c_in, c_in, 3, stride, groups=c_in)
        self.pw = nn.Conv2d(c_in, c_out, 1)
        self.slope = nn.Parameter(torch.empty(c_out)) if slopes else None

    def forward(self, x: Tensor) -> Tensor:
        made = self.pw(self.dw(x))
        kept = F.max_pool2d(x, 2) if self.dw.stride[0] == 2 else x
        if extra := made.shape[1] - kept.shape[1]:
            kept = F.pad(kept, (0, 0, 0, 0, 0, extra))
        made = made + kept
        return F.relu(made) if self.slope is None else F.prelu(made, self.slope)


def _blocks(widths: tuple[int, ...], halving: tuple[int, ...], *, slopes: bool) -> nn.ModuleList:
    return nn.ModuleList(
        _Block(widths[i], widths[i + 1], 2 if i in halving else 1, slopes=slopes)
        for i in range(len(widths) - 1)
    )


class BlazeFace(nn.Module):
    """The detector: an image of 128 x 128 to 896 boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Conv(3, _DETECTOR_WIDTHS[0], 5, 2)
        self.blocks = _blocks(_DETECTOR_WIDTHS, _DETECTOR_HALVING, slopes=False)
        fine, coarse = _DETECTOR_WIDTHS[_FINE_BLOCK + 1], _DETECTOR_WIDTHS[-1]
        self.score_s8, self.box_s8 = nn.Conv2d(fine, 2, 1), nn.Conv2d(fine, 32, 1)
        self.score_s16, self.box_s16 = nn.Conv2d(coarse, 6, 1), nn.Conv2d(coarse, 96, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [B, 3, 128, 128], RGB in [-1, 1] -> logits [B, 896] and boxes [B, 896, 16] in units of the
        square's 128 pixels, relative to `anchors()`: x and y of the centre, width, height, six points."""
        x = F.relu(self.stem(images))
        fine = x
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == _FINE_BLOCK:
                fine = x
        scores = [_rows(head, 1) for head in (self.score_s8(fine), self.score_s16(x))]
        boxes = [_rows(head, 16) for head in (self.box_s8(fine), self.box_s16(x))]
        return torch.cat(scores, 1)[..., 0], torch.cat(boxes, 1)


def _rows(grid: Tensor, width: int) -> Tensor:
    """[B, anchors * width, h, w] -> [B, h * w * anchors, width]."""
    return grid.permute(0, 2, 3, 1).reshape(grid.shape[0], -1, width)


def anchors() -> Tensor:
    """float32 [896, 2]: the centres (x, y) of all anchors, in units of the square's side."""
    grids = []
    for cells, count in _GRIDS:
        middles = (torch.arange(cells) + 0.5) / cells
        y, x = torch.meshgrid(middles, middles, indexing="ij")
        grids.append(torch.stack([x, y], -1).reshape(-1, 2).repeat_interleave(count, 0))
    return torch.cat(grids)


class _Branch(nn.Module):
    """What stands behind the shared part of the mesh network: [B, 128, h, w] -> [B, width]."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.block = _Block(128, 128, stride, slopes=True)
        self.reduce = _Activated(128, 32, 1)
        self.tail = _Block(32, 32, slopes=True)
        self.out = nn.Conv2d(32, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(self.tail(self.reduce(self.block(x))))
        return made.flatten(1)


class FaceMesh(nn.Module):
    """A face that fills an image of 192 x 192 to 468 points, and whether it is one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _Activated(3, _MESH_WIDTHS[0], 3, 2)
        self.blocks = _blocks(_MESH_WIDTHS, _MESH_HALVING, slopes=True)
        self.mesh = _Branch(MESH_POINTS * 3, 1)
        self.flag = _Branch(1, 2)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [B, 3, 192, 192], RGB in [0, 1] -> points [B, 468, 3], x and y in pixels of the input, z
        in the same unit and smaller nearer to the camera; logits [B] of presence."""
        x = shared = self.stem(images)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == _SPLIT_BLOCK:
                shared = x
        return self.mesh(x).reshape(-1, MESH_POINTS, 3), self.flag(shared)[:, 0]


@dataclass(frozen=True)
class FaceNetworks:
    """Both networks, frozen, in evaluation mode and on one device. identity: of their weights, for
    records."""

    detector: BlazeFace
    mesh: FaceMesh
    identity: str

    @property
    def device(self) -> torch.device:
        return self.detector.stem.weight.device

    @torch.no_grad()
    def detect(self, squares: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 or float [B, 3, 128, 128] in [0, 255] -> what `BlazeFace` gives, on the CPU."""
        with torch.autocast(self.device.type, enabled=False):
            scores, boxes = self.detector(_on(squares, self.device) / 127.5 - 1)
        return scores.cpu(), boxes.cpu()

    @torch.no_grad()
    def landmarks(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 or float [B, 3, 192, 192] in [0, 255] -> what `FaceMesh` gives, on the CPU."""
        with torch.autocast(self.device.type, enabled=False):
            points, flags = self.mesh(_on(crops, self.device) / 255)
        return points.cpu(), flags.cpu()


def _on(images: Tensor, device: torch.device) -> Tensor:
    """float32 on `device`, in the order of memory that depthwise convolutions are fastest in."""
    return images.to(device, torch.float32, memory_format=torch.channels_last)
