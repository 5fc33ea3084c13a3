"""LPIPS by the `lpips` package, in place of `models/lpips_vgg.py`.

Unverified: the package needs torchvision, which beside a CPU build of torch does not import
(spec/losses-and-eval.md 2.3). The call is tested with a stand-in of the same names.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from torch import Tensor, nn

from avatarctl.errors import ExtraMissing
from avatarctl.models.lpips_vgg import LpipsVgg

__all__ = ["PackageLpips", "require_lpips"]

_SLICE = re.compile(r"net\.slice\d\.(?P<layer>\d+\.(?:weight|bias))")


def require_lpips() -> Any:
    """The package. Raises ExtraMissing (exit 4) where it does not import, with the reason."""
    try:
        return importlib.import_module("lpips")
    except (ImportError, RuntimeError, OSError) as error:  # torchvision beside another torch: RuntimeError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ExtraMissing(
            f"the lpips package does not import here: {reason[:200]}",
            where="aux.lpips_backend",
            fix="install avatarctl[aux], or use aux.lpips_backend builtin, which needs no package",
        ) from error


class PackageLpips(nn.Module):
    """trunk: whose convolutions are copied; the heads are those that come with the package."""

    def __init__(self, trunk: LpipsVgg) -> None:
        super().__init__()
        package = require_lpips()
        # pnet_rand: otherwise torchvision would fetch its weights now.
        self.judge = package.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        state = trunk.features.state_dict()
        with torch.no_grad():
            for name, parameter in self.judge.named_parameters():
                if match := _SLICE.fullmatch(name):
                    parameter.copy_(state.pop(match["layer"]))
        if state:
            raise ExtraMissing(
                f"this lpips package has no place for {len(state)} tensors of VGG-16: {next(iter(state))}",
                where="aux.lpips_backend",
                fix="use aux.lpips_backend builtin",
            )
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Both [N, 3, H, W] in [-1, 1] -> float [N]."""
        distances: Tensor = self.judge(images, others)
        return distances.flatten()
