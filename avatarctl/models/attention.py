"""Choice of the attention kernel, by running it.

Kernels come through diffusers' dispatch. A package that imports may still not run on this card or dtype, so
a candidate must reproduce PyTorch's own attention on a small input first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    attention_backend,
    dispatch_attention_fn,
)
from torch import Tensor, nn

from avatarctl.errors import ExtraMissing
from avatarctl.models.wan_blocks import AvatarAttnProcessor

__all__ = ["DISPATCH_NAMES", "choose_attention", "probe", "use_attention"]

# Our names -> names of diffusers' dispatch.
DISPATCH_NAMES = {"native": "native", "flash": "flash", "flash3": "_flash_3", "sage": "sage"}
# `auto` takes the first that runs. Sage quantises, which changes results, so it must be asked for.
_AUTO = ("flash3", "flash")
_TOLERANCE = {"sage": 5e-2}
_DEFAULT_TOLERANCE = 2e-2  # half precision against float32


def probe(name: str, device: torch.device, dtype: torch.dtype, head_width: int) -> str | None:
    """None when the kernel reproduces PyTorch's attention here, else the reason in a few words."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 64, 2, head_width)  # batch, tokens, heads, width
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    expected = _reference(q, k, v)
    try:
        with attention_backend(DISPATCH_NAMES[name]):
            got = dispatch_attention_fn(q, k, v)
    except (RuntimeError, ImportError, ValueError, TypeError, AttributeError, AssertionError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    worst = (got.float() - expected).abs().max().item()
    limit = _TOLERANCE.get(name, _DEFAULT_TOLERANCE)
    return None if worst <= limit else f"differs from PyTorch's attention by {worst:.2g}"


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.float().transpose(1, 2) for x in (q, k, v))  # heads first
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def choose_attention(asked: str, device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """The kernel to use. Raises ExtraMissing (exit 4) for one that was named and does not run here."""
    if asked == "auto":
        if device.type == "cuda" and dtype != torch.float32:
            for name in _AUTO:
                if probe(name, device, dtype, head_width) is None:
                    return name
        return "native"
    if asked != "native" and (reason := probe(asked, device, dtype, head_width)) is not None:
        raise ExtraMissing(
            f"{asked} attention does not run here: {reason}",
            where="runtime.attention",
            fix="use --attention native",
        )
    return asked


def use_attention(network: nn.Module, name: str) -> None:
    """Let every attention of a network run on a kernel that `choose_attention` returned.

    Set even for "native": without it the dispatch would follow an environment variable of its own.
    """
    for module in network.modules():
        processor = getattr(module, "processor", None)
        if isinstance(processor, AvatarAttnProcessor):
            processor.backend = AttentionBackendName(DISPATCH_NAMES[name])
