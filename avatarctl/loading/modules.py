"""Registry row and files -> networks on a device, all of a run's parts or some.

Rows with `source: package` and no trained weights are built with seeded random ones; all others come from
files (loading/parts.py), which were found and whose headers were read before (loading/assemble.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, TypeVar, get_args

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel, Wav2Vec2Config

from avatarctl.errors import UnusableWeights
from avatarctl.events import Notice, Stage, silent
from avatarctl.family import AudioEncoder, ImageEncoder, Modules, TextEncoder, VideoCodec
from avatarctl.files.tensors import ArrayTensor
from avatarctl.loading.assemble import built_in, with_loras
from avatarctl.loading.parts import (
    TRANSFORMERS,
    audio_encoder,
    image_encoder,
    text_encoder,
    transformer,
    video_codec,
)
from avatarctl.loading.sources import Sources
from avatarctl.models.attention import choose_attention, use_attention
from avatarctl.models.clip import ClipImageEncoder, clip_config
from avatarctl.models.device import dtype_of
from avatarctl.models.precision import cast
from avatarctl.models.text import PromptEncoder
from avatarctl.models.vae import WanVae
from avatarctl.models.wav2vec import FrameWav2Vec2
from avatarctl.rng import stable_hash
from avatarctl.weights.weight_file import WeightFile

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.events import Emit
    from avatarctl.registry import Row

__all__ = ["PARTS", "Part", "Parts", "build_random_modules", "load_parts"]

Built = TypeVar("Built", bound=nn.Module)

Part = Literal["text", "vae", "audio", "image", "dit"]
PARTS: tuple[Part, ...] = get_args(Part)
"""In loading order. The transformer comes last: it is the largest, and most refusals need not wait for it."""


class Parts(TypedDict, total=False):
    """Some networks of a job; the keys are the fields of `Modules`."""

    text: TextEncoder
    vae: VideoCodec
    audio: AudioEncoder
    image: ImageEncoder
    dit: nn.Module


def load_parts(
    row: Row,
    sources: Sources,
    held: WeightFile | None,
    cfg: RunConfig,
    wanted: Collection[Part],
    device: torch.device,
    emit: Emit,
) -> Parts:
    """The wanted networks of a run, in eval mode, frozen, on `device`; without "image" where the model has
    none.

    sources: with nothing missing; held: the transformer of its files, None where it is built in.

    Raises UnusableWeights for files that do not fit, ExtraMissing for an attention kernel that is not here.
    """
    dtype = dtype_of(cfg.runtime)
    if "dit" in wanted:  # before anything large is read
        head_width = held.sizes.width // held.heads if held else row.network["dit"]["attention_head_dim"]
        kernel = choose_attention(cfg.runtime.attention, device, dtype, head_width)
    if held is None:
        made = _built_in(row, sources, wanted, dtype, device, emit)
    else:
        made = _from_files(held, sources.encoders, wanted, dtype, device, emit)
    if "dit" in wanted:
        use_attention(made["dit"], kernel)
        emit(Notice(f"attention: {kernel}; {str(dtype).removeprefix('torch.')} on {device}"))
    return made


def _vae_dtype(dtype: torch.dtype, device: torch.device, emit: Emit) -> torch.dtype:
    if device.type == "cpu" and dtype != torch.float32:
        # PyTorch has no fast half-precision 3-D convolution on the CPU: measured 30 times slower.
        emit(Notice("the VAE computes in float32, as half precision is slow on a CPU"))
        return torch.float32
    return dtype


def _from_files(
    held: WeightFile,
    files: Mapping[str, Path],
    wanted: Collection[Part],
    dtype: torch.dtype,
    device: torch.device,
    emit: Emit,
) -> Parts:
    sizes, made = held.sizes, Parts()
    if "text" in wanted:
        emit(Stage("loading the text encoder"))
        text = made["text"] = text_encoder(files["text"], files["tokenizer"], dtype, device)
        _check_width(held, files["text"], "text", text.width, sizes.text_dim)
    if "vae" in wanted:
        emit(Stage("loading the VAE"))
        made["vae"] = video_codec(files["vae"], _vae_dtype(dtype, device, emit), device)
    if "audio" in wanted:
        emit(Stage("loading the audio encoder"))
        audio = made["audio"] = audio_encoder(files["audio"], device, emit)
        # Features on the grid of frames or tokens, as far as the transformer takes either.
        for given, taken in ((audio.width, sizes.audio_input_dim), (audio.token_width, sizes.vocal_dim)):
            _check_width(held, files["audio"], "audio", given, taken or given)
    if "image" in wanted and sizes.image_dim:
        emit(Stage("loading the image encoder"))
        image = made["image"] = image_encoder(files["clip"], device, emit)
        _check_width(held, files["clip"], "image", image.width, sizes.image_dim)
    if "dit" in wanted:
        emit(Stage("loading the transformer"))
        made["dit"] = transformer(held, dtype, device)
    return made


def _check_width(held: WeightFile, path: Path, what: str, given: int, taken: int) -> None:
    """What an encoder puts out is what the transformer takes in."""
    if given != taken:
        raise UnusableWeights(
            f"gives {what} features of width {given}, and {held.path} takes {taken}", where=path
        )


def _built_in(
    row: Row,
    sources: Sources,
    wanted: Collection[Part],
    dtype: torch.dtype,
    device: torch.device,
    emit: Emit,
) -> Parts:
    made = _random_parts(row, wanted)
    if sources.loras and "dit" in wanted:
        made["dit"] = _with_loras(row, made["dit"], sources)
    dtypes = {"dit": dtype, "text": dtype}
    if "vae" in wanted:
        dtypes["vae"] = _vae_dtype(dtype, device, emit)
    for part, module in made.items():  # audio and image encoders are always float32
        assert isinstance(module, nn.Module)
        cast(module, dtypes.get(part, torch.float32)).to(device)
    return made


def _with_loras(row: Row, dit: nn.Module, sources: Sources) -> nn.Module:
    """A built-in transformer with LoRAs merged in: the same road as files, from tensors in memory. What is to
    be said of them was said when they were checked."""
    state = built_in(row).layout.key_map.rename_to_original(dit.state_dict())
    held = built_in(row, {name: ArrayTensor(tensor.numpy(), "F32") for name, tensor in state.items()})
    return transformer(with_loras(held, sources.loras, silent), torch.float32, torch.device("cpu"))


def build_random_modules(row: Row) -> Modules:
    """Every network of a row with weights that depend on the row's name alone: frozen, in
    evaluation mode, float32 on the CPU."""
    return Modules(**_random_parts(row, PARTS), device=torch.device("cpu"))


def _random_parts(row: Row, wanted: Collection[Part]) -> Parts:
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

    made = Parts()
    if "text" in wanted:
        reader = ByT5Tokenizer(extra_ids=0)  # of bytes: 256 values, padding, end and unknown
        made["text"] = seeded(
            "text", lambda: PromptEncoder(UMT5EncoderModel(UMT5Config(**network["text"])), reader)
        )
    if "vae" in wanted:
        made["vae"] = seeded("vae", lambda: WanVae(AutoencoderKLWan(**network["vae"])))
    if "audio" in wanted:
        made["audio"] = seeded("audio", lambda: FrameWav2Vec2(Wav2Vec2Config(**network["audio"])))
    if "image" in wanted and "clip" in network:
        made["image"] = seeded("clip", lambda: ClipImageEncoder(clip_config(**network["clip"])))
    if "dit" in wanted:
        made["dit"] = seeded("dit", lambda: TRANSFORMERS[row.family](**network["dit"]))
    return made
