"""Registry row and files -> networks on a device, all of a run's parts or some.

Rows that come with the program are built by loading/built_in.py; all others come from files
(loading/parts.py), which were found and whose headers were read before (loading/assemble.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import torch
from torch import nn

from avatarctl.errors import UnusableWeights
from avatarctl.events import Notice, Stage
from avatarctl.family import AudioEncoder, ImageEncoder, TextEncoder, VideoCodec
from avatarctl.loading.built_in import built_in_part
from avatarctl.loading.parts import (
    audio_encoder,
    image_encoder,
    text_encoder,
    transformer,
    video_codec,
)
from avatarctl.loading.sources import Sources
from avatarctl.models.attention import choose_attention, use_attention
from avatarctl.models.device import dtype_of
from avatarctl.weights.weight_file import WeightFile

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.events import Emit
    from avatarctl.registry import Row

__all__ = ["PARTS", "Part", "Parts", "SomeModules", "load_parts"]

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


class SomeModules:
    """Stands for `Modules` in a job that needs a few of them: each is built once, when it is first touched.

    wanted: those that may be touched; any other part raises AttributeError. build: makes one, None where the
    model has none.
    """

    def __init__(self, wanted: Collection[Part], build: Callable[[Part], Any], device: torch.device) -> None:
        self._wanted, self._build, self.device = wanted, build, device

    def __getattr__(self, name: str) -> Any:  # called for what is no attribute yet
        if name not in self.__dict__.get("_wanted", ()):
            raise AttributeError(f"{name} is no part that was asked for")
        part = self._build(name)  # type: ignore[arg-type]
        setattr(self, name, part)
        for told in self.__dict__.get("_told", ()):
            told(name, part)
        return part

    def tell(self, told: Callable[[Part, Any], None]) -> None:
        """Calls it with every part that is built from now on."""
        self._told = (*self.__dict__.get("_told", ()), told)

    def around(self, wrap: Callable[[Callable[[Part], Any]], Callable[[Part], Any]]) -> None:
        """Builds from now on by what `wrap` makes of the way that parts are built."""
        self._build = wrap(self._build)

    def drop(self, part: Part) -> None:
        """Forgets a network that nobody needs any more; if it is touched again, it is built again."""
        self.__dict__.pop(part, None)


def load_parts(
    row: Row,
    sources: Sources,
    held: WeightFile | None,
    cfg: RunConfig,
    wanted: Collection[Part],
    device: torch.device,
    emit: Emit,
    *,
    computes: torch.device | None = None,
) -> Parts:
    """The wanted networks of a run, in eval mode, frozen, on `device`; without "image" where the model has
    none. computes: where they will compute, if that is not where they are read to.

    sources: with nothing missing of what is wanted; held: the transformer of its files, None where that is
    random, or not wanted: encoders are then not compared with it.

    Raises UnusableWeights for files that do not fit, ExtraMissing for an attention kernel that is not here.
    """
    dtype, there = dtype_of(cfg.runtime), computes or device
    in_float8 = cfg.memory.base_precision == "fp8"
    if "dit" in wanted:  # before anything large is read
        head_width = held.sizes.width // held.heads if held else row.network["dit"]["attention_head_dim"]
        kernel = choose_attention(cfg.runtime.attention, there, dtype, head_width)
    if row.source == "package":
        made = _built_in(row, sources, held, wanted, dtype, device, emit, in_float8)
    else:
        made = _from_files(held, sources.encoders, wanted, dtype, device, emit, in_float8)
    if "dit" in wanted:
        use_attention(made["dit"], kernel)
        stored = ", the weights of its blocks in float8" if in_float8 else ""
        emit(Notice(f"attention: {kernel}; {str(dtype).removeprefix('torch.')} on {there}{stored}"))
    return made


def _vae_dtype(dtype: torch.dtype, device: torch.device, emit: Emit) -> torch.dtype:
    if device.type == "cpu" and dtype != torch.float32:
        # Without instructions for it bfloat16 takes 100 times as long as float32 by oneDNN (models/vae.py),
        # measured here (docs/benchmarks.md); with them it was measured slower as well, 8.8 ms a frame against
        # 6.2 (spec/cartoon-world.md 9).
        emit(Notice("the VAE computes in float32: half precision is slower on a CPU"))
        return torch.float32
    return dtype


def _built_in(
    row: Row,
    sources: Sources,
    held: WeightFile | None,
    wanted: Collection[Part],
    dtype: torch.dtype,
    device: torch.device,
    emit: Emit,
    in_float8: bool,
) -> Parts:
    dtypes = {"dit": dtype, "text": dtype}  # audio and image encoders are always float32
    if "vae" in wanted:
        dtypes["vae"] = _vae_dtype(dtype, device, emit)
    made: dict[str, Any] = {
        part: built_in_part(
            row, sources, held, part, dtypes.get(part, torch.float32), device, in_float8=in_float8
        )
        for part in PARTS
        if part in wanted
    }
    return Parts(**{part: module for part, module in made.items() if module is not None})  # type: ignore[typeddict-item]


def _from_files(
    held: WeightFile | None,
    files: Mapping[str, Path],
    wanted: Collection[Part],
    dtype: torch.dtype,
    device: torch.device,
    emit: Emit,
    in_float8: bool,
) -> Parts:
    made = Parts()
    if "text" in wanted:
        emit(Stage("loading the text encoder"))
        text = made["text"] = text_encoder(files["text"], files["tokenizer"], dtype, device)
        _check_width(held, files["text"], "text", {"text_dim": text.width})
    if "vae" in wanted:
        emit(Stage("loading the VAE"))
        made["vae"] = video_codec(files["vae"], _vae_dtype(dtype, device, emit), device)
    if "audio" in wanted:
        emit(Stage("loading the audio encoder"))
        audio = made["audio"] = audio_encoder(files["audio"], device, emit)
        # Features on the grid of frames or tokens, as far as the transformer takes either.
        widths = {"audio_input_dim": audio.width, "vocal_dim": audio.token_width}
        _check_width(held, files["audio"], "audio", widths)
    if "image" in wanted and (held is None or held.sizes.image_dim):
        emit(Stage("loading the image encoder"))
        image = made["image"] = image_encoder(files["clip"], device, emit)
        _check_width(held, files["clip"], "image", {"image_dim": image.width})
    if "dit" in wanted:
        assert held is not None
        emit(Stage("loading the transformer"))
        made["dit"] = transformer(held, dtype, device, in_float8=in_float8)
    return made


def _check_width(held: WeightFile | None, path: Path, what: str, widths: Mapping[str, int]) -> None:
    """What an encoder puts out is what the transformer takes in. widths: by the size that states it."""
    for size, given in widths.items():
        taken = getattr(held.sizes, size) if held else None
        if held and taken and given != taken:
            raise UnusableWeights(
                f"gives {what} features of width {given}, and {held.path} takes {taken}", where=path
            )
