"""Registry row -> networks on a device.

Rows with `source: package` and no trained weights are built with seeded random ones. Published files are
not read yet; asking for them raises WeightsMissing before anything is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel, Wav2Vec2Config

from avatarctl.errors import EnvironmentMissing, WeightsMissing
from avatarctl.events import Notice
from avatarctl.family import Modules
from avatarctl.models.attention import choose_attention, use_attention
from avatarctl.models.omniavatar import OmniAvatarTransformer
from avatarctl.models.precision import cast
from avatarctl.models.text import PromptEncoder
from avatarctl.models.vae import WanVae
from avatarctl.models.wav2vec import FrameWav2Vec2
from avatarctl.rng import stable_hash

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.events import Emit
    from avatarctl.registry import Row

__all__ = ["build_random_modules", "load_modules", "resolve_device"]

Built = TypeVar("Built", bound=nn.Module)
Dims = Mapping[str, Any]

# Transformer class of a family; a family adds its own line.
TRANSFORMERS: dict[str, type[nn.Module]] = {"omniavatar": OmniAvatarTransformer}


def resolve_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, else the CPU. Raises EnvironmentMissing for one that is absent."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentMissing(
            f"{name} is not there; this PyTorch sees {torch.cuda.device_count()} CUDA devices",
            where="runtime.device",
            fix="use --device cpu, or install a CUDA build of torch",
        )
    return device


def load_modules(row: Row, cfg: RunConfig, device: torch.device, emit: Emit) -> Modules:
    """The networks of a model row, in eval mode, frozen, on the device.

    Raises WeightsMissing (exit 4) for rows whose files cannot be loaded.
    """
    if row.source != "package":
        raise WeightsMissing(
            f"loading the published files of {row.name} is not part of this version",
            where=row.name,
            fix="--dry-run checks everything else; the built-in model is cartoon-i2v",
        )
    modules = build_random_modules(row)
    dtype = getattr(torch, cfg.runtime.dtype or "float32")
    dtypes = {"dit": dtype, "text": dtype, "vae": dtype, "audio": torch.float32}  # audio: spec b.8
    if device.type == "cpu" and dtype != torch.float32:
        # PyTorch has no fast half-precision 3-D convolution on the CPU: measured 30 times slower.
        dtypes["vae"] = torch.float32
        emit(Notice("the VAE computes in float32, as half precision is slow on a CPU"))
    for part, part_dtype in dtypes.items():
        module = getattr(modules, part)
        assert isinstance(module, nn.Module)
        cast(module, part_dtype).to(device)
    head_width = row.network["dit"]["attention_head_dim"]
    kernel = choose_attention(cfg.runtime.attention, device, dtype, head_width)
    use_attention(modules.dit, kernel)
    emit(Notice(f"attention: {kernel}; {str(dtype).removeprefix('torch.')} on {device}"))
    return modules


def build_random_modules(row: Row) -> Modules:
    """Every network of a row with weights that depend on the row's name alone: frozen, in
    evaluation mode, float32 on the CPU."""
    # Rows are immutable and hold tuples; the libraries' constructors add lists to lists.
    network = {
        part: {name: list(value) if isinstance(value, tuple) else value for name, value in dims.items()}
        for part, dims in row.network.items()
    }

    def seeded(part: str, make: Callable[[], Built]) -> Built:
        # The classes initialise themselves from the global generator; it is borrowed and given back.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stable_hash("untrained", row.name, part))
            # Evaluation mode from the start: layer drop would even change the number of audio features.
            return make().eval().requires_grad_(False)

    return Modules(
        dit=seeded("dit", lambda: TRANSFORMERS[row.family](**network["dit"])),
        vae=seeded("vae", lambda: WanVae(AutoencoderKLWan(**network["vae"]))),
        text=seeded("text", lambda: _text_encoder(network["text"])),
        audio=seeded("audio", lambda: FrameWav2Vec2(Wav2Vec2Config(**network["audio"]))),
    )


def _text_encoder(dims: Dims) -> PromptEncoder:
    """A UMT5 encoder that reads bytes: vocabulary of 256 values, padding, end and unknown."""
    encoder = UMT5EncoderModel(UMT5Config(**dims))
    return PromptEncoder(encoder, ByT5Tokenizer(extra_ids=0))
