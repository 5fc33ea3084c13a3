"""Registry row -> networks on a device.

Rows with `source: package` and no trained weights are built with seeded random ones; all others come from
files (loading/parts.py), every one of which is found before the first is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel, Wav2Vec2Config

from avatarctl.errors import EnvironmentMissing, UnusableWeights
from avatarctl.events import Notice, Stage
from avatarctl.family import Modules
from avatarctl.files.tensors import ArrayTensor
from avatarctl.loading.assemble import assemble, built_in, with_loras
from avatarctl.loading.parts import (
    TRANSFORMERS,
    audio_encoder,
    image_encoder,
    text_encoder,
    transformer,
    video_codec,
)
from avatarctl.loading.sources import Sources, asked_size, find_sources, weights_missing
from avatarctl.models.attention import choose_attention, use_attention
from avatarctl.models.clip import ClipImageEncoder, clip_config
from avatarctl.models.precision import cast
from avatarctl.models.text import PromptEncoder
from avatarctl.models.vae import WanVae
from avatarctl.models.wav2vec import FrameWav2Vec2
from avatarctl.rng import stable_hash
from avatarctl.weights.made_for import made_for_others
from avatarctl.weights.weight_file import WeightFile

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.events import Emit
    from avatarctl.registry import Row

__all__ = ["build_random_modules", "load_modules", "resolve_device"]

Built = TypeVar("Built", bound=nn.Module)
Dims = Mapping[str, Any]


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

    Raises WeightsMissing (exit 4) naming every file that is not here, before any is read; UnusableWeights for
    files that do not fit; ExtraMissing for an attention kernel that does not run here.
    """
    size = asked_size(cfg)
    sources = find_sources(row, cfg.model, size)
    if sources.missing:
        raise weights_missing(row, sources)
    for note in sources.notes:
        emit(Notice(note))
    dtype = getattr(torch, cfg.runtime.dtype or "float32")
    if row.source == "package":
        head_width = row.network["dit"]["attention_head_dim"]
        kernel = choose_attention(cfg.runtime.attention, device, dtype, head_width)
        modules = _built_in(row, sources, dtype, device, emit)
    else:
        held = assemble(row, sources, cfg.model, emit)
        if size and (line := made_for_others(held, size)):
            emit(Notice(line, "warning"))
        kernel = choose_attention(cfg.runtime.attention, device, dtype, held.sizes.width // held.heads)
        modules = _from_files(held, sources.encoders, dtype, device, emit)
    use_attention(modules.dit, kernel)
    emit(Notice(f"attention: {kernel}; {str(dtype).removeprefix('torch.')} on {device}"))
    return modules


def _vae_dtype(dtype: torch.dtype, device: torch.device, emit: Emit) -> torch.dtype:
    if device.type == "cpu" and dtype != torch.float32:
        # PyTorch has no fast half-precision 3-D convolution on the CPU: measured 30 times slower.
        emit(Notice("the VAE computes in float32, as half precision is slow on a CPU"))
        return torch.float32
    return dtype


def _from_files(
    held: WeightFile, files: Mapping[str, Path], dtype: torch.dtype, device: torch.device, emit: Emit
) -> Modules:
    """The transformer comes last: it is the largest, and most refusals need not wait for it."""
    emit(Stage("loading the text encoder"))
    text = text_encoder(files["text"], files["tokenizer"], dtype, device)
    emit(Stage("loading the VAE"))
    vae = video_codec(files["vae"], _vae_dtype(dtype, device, emit), device)
    emit(Stage("loading the audio encoder"))
    audio = audio_encoder(files["audio"], device, emit)
    image = None
    if held.sizes.image_dim:
        emit(Stage("loading the image encoder"))
        image = image_encoder(files["clip"], device, emit)
    _check_widths(held, files, text, audio, image)
    emit(Stage("loading the transformer"))
    return Modules(dit=transformer(held, dtype, device), vae=vae, text=text, audio=audio, image=image)


def _check_widths(
    held: WeightFile,
    files: Mapping[str, Path],
    text: PromptEncoder,
    audio: FrameWav2Vec2,
    image: ClipImageEncoder | None,
) -> None:
    """What the encoders put out is what the transformer takes in: of the audio its features on the grid of
    frames or its tokens, as far as it takes either."""
    sizes = held.sizes
    for what, part, given, taken in (
        ("text", "text", text.width, sizes.text_dim),
        ("audio", "audio", audio.width, sizes.audio_input_dim or audio.width),
        ("audio", "audio", audio.token_width, sizes.vocal_dim or audio.token_width),
        ("image", "clip", image.width if image else 0, sizes.image_dim),
    ):
        path = files.get(part)
        if given != taken:
            raise UnusableWeights(
                f"gives {what} features of width {given}, and {held.path} takes {taken}", where=path
            )


def _built_in(row: Row, sources: Sources, dtype: torch.dtype, device: torch.device, emit: Emit) -> Modules:
    modules = build_random_modules(row)
    if sources.loras:
        modules.dit = _with_loras(row, modules.dit, sources, emit)
    dtypes = {"dit": dtype, "text": dtype, "vae": _vae_dtype(dtype, device, emit)}
    for part in ("dit", "text", "vae", "audio", "image"):  # audio and image encoders are always float32
        module = getattr(modules, part)
        if isinstance(module, nn.Module):
            cast(module, dtypes.get(part, torch.float32)).to(device)
    return modules


def _with_loras(row: Row, dit: nn.Module, sources: Sources, emit: Emit) -> nn.Module:
    """A built-in transformer with LoRAs merged in: the same road as files, from tensors in memory."""
    state = built_in(row).layout.key_map.rename_to_original(dit.state_dict())
    held = built_in(row, {name: ArrayTensor(tensor.numpy(), "F32") for name, tensor in state.items()})
    return transformer(with_loras(held, sources.loras, emit), torch.float32, torch.device("cpu"))


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

    sees = "clip" in network
    return Modules(
        dit=seeded("dit", lambda: TRANSFORMERS[row.family](**network["dit"])),
        vae=seeded("vae", lambda: WanVae(AutoencoderKLWan(**network["vae"]))),
        text=seeded("text", lambda: _text_encoder(network["text"])),
        audio=seeded("audio", lambda: FrameWav2Vec2(Wav2Vec2Config(**network["audio"]))),
        image=seeded("clip", lambda: ClipImageEncoder(clip_config(**network["clip"]))) if sees else None,
    )


def _text_encoder(dims: Dims) -> PromptEncoder:
    """A UMT5 encoder that reads bytes: vocabulary of 256 values, padding, end and unknown."""
    encoder = UMT5EncoderModel(UMT5Config(**dims))
    return PromptEncoder(encoder, ByT5Tokenizer(extra_ids=0))
