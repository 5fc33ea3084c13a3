"""LPIPS: how different two images look to a VGG-16 (spec/losses-and-eval.md 2.1 and 2.2).

The trunk is that of ImageNet, under torchvision's names, up to its last convolution; the heads are the
weights that LPIPS v0.1 learnt, under its own names. Neither package is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import torch
from einops import rearrange
from torch import Tensor, nn

__all__ = ["PUBLISHED_WIDTHS", "LpipsVgg", "random_heads"]

PUBLISHED_WIDTHS: Final = (64, 128, 256, 512, 512)
"""Channels of the five levels of VGG-16."""

_CONVOLUTIONS: Final = (2, 2, 3, 3, 3)
"""By level; a halving of both sides stands before every level but the first."""

# In this order red, green, blue: of images in -1 to 1 (spec/losses-and-eval.md 2.1).
_SHIFT: Final = (-0.030, -0.088, -0.188)
_SCALE: Final = (0.458, 0.448, 0.450)

_GUARD: Final = 1e-10


class LpipsVgg(nn.Module):
    """widths: channels of the levels of the trunk."""

    def __init__(self, widths: Sequence[int] = PUBLISHED_WIDTHS) -> None:
        super().__init__()
        self.features = nn.Sequential(*_trunk(widths))
        for level, width in enumerate(widths):
            head = nn.Module()
            # The published module has a dropout in front, which means nothing to a judge that does not learn.
            head.model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            setattr(self, f"lin{level}", head)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Both [N, 3, H, W] in [-1, 1], at least 16 pixels a side -> float [N], 0 for equal images."""
        return self.per_level(images, others).sum(0)

    def per_level(self, images: Tensor, others: Tensor) -> Tensor:
        """What each level adds: float [5, N]."""
        pairs = zip(self._levels(images), self._levels(others), strict=True)
        parts = []
        for level, (one, other) in enumerate(pairs):
            difference = (_unit(one) - _unit(other)).square()
            weighed: Tensor = getattr(self, f"lin{level}").model(difference)
            parts.append(weighed.mean(dim=(1, 2, 3)))
        return torch.stack(parts)

    def _levels(self, images: Tensor) -> Iterator[Tensor]:
        """Activations at the end of each level."""
        shift, scale = (rearrange(images.new_tensor(v), "c -> c 1 1") for v in (_SHIFT, _SCALE))
        x = (images - shift) / scale
        for place, layer in enumerate(self.features):
            if isinstance(layer, nn.MaxPool2d):
                yield x
            x = layer(x)
            if place == len(self.features) - 1:
                yield x


def _unit(features: Tensor) -> Tensor:
    """Channels divided by their length. Inside the root a guard too: where all are 0 its derivative would be
    infinite and the gradient NaN, which only the ReLU before it hides."""
    length = (features.square().sum(dim=1, keepdim=True) + _GUARD**2).sqrt()
    return features / (length + _GUARD)


def _trunk(widths: Sequence[int]) -> Iterator[nn.Module]:
    """Layers at the places that they have in torchvision's VGG-16."""
    before = 3
    for level, (width, count) in enumerate(zip(widths, _CONVOLUTIONS, strict=True)):
        if level:
            yield nn.MaxPool2d(2)
        for _ in range(count):
            yield nn.Conv2d(before, width, 3, padding=1)
            yield nn.ReLU()
            before = width


def random_heads(network: LpipsVgg) -> None:
    """Heads of a network with random weights become what published ones are: not negative."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith("lin"):
                parameter.abs_()
