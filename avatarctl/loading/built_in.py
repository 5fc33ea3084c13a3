"""Networks of rows that come with the program: from the files of the package, or with seeded random weights
where a row has none.

Their sizes are the row's own (`Row.network`). The files go through the same reader and the same checks as any
other; that their bytes are those of the release was checked before (`loading.sources.check_packaged`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel, Wav2Vec2Config

from avatarctl.events import silent
from avatarctl.family import Modules
from avatarctl.files.source import open_weights
from avatarctl.files.strict_json import read_object
from avatarctl.files.tensors import ArrayTensor
from avatarctl.loading.assemble import built_in, with_loras
from avatarctl.loading.fill import fill, on_meta
from avatarctl.loading.parts import TRANSFORMERS, UNUSED_IN_EVALUATION, transformer
from avatarctl.models.clip import ClipImageEncoder, clip_config
from avatarctl.models.fp8 import store_in_float8
from avatarctl.models.precision import cast
from avatarctl.models.text import PromptEncoder
from avatarctl.models.vae import WanVae, fast_on_cpu
from avatarctl.models.wav2vec import FrameWav2Vec2
from avatarctl.rng import stable_hash
from avatarctl.weights.weight_file import WeightFile

if TYPE_CHECKING:
    from avatarctl.loading.sources import Sources
    from avatarctl.registry import Row

__all__ = ["build_on_meta", "build_random_modules", "built_in_part"]

_LONGEST_CONFIG: Final = 1 << 16

_NETWORK_OF: Final = {"image": "clip"}
"""Parts of `Modules` whose sizes have another name in `Row.network`."""


def built_in_part(
    row: Row,
    sources: Sources,
    held: WeightFile | None,
    part: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    in_float8: bool = False,
) -> nn.Module | None:
    """One part of a run, frozen and in evaluation mode; None where the model has no such part.

    held: the transformer of the row's file, None where that is random. in_float8: of the transformer, see
    `models/fp8.py`.
    """
    if part == "dit" and held is not None:
        return transformer(held, dtype, device, in_float8=in_float8)
    if path := sources.encoders.get(part):
        return _from_file(row, part, path, sources.encoders, dtype, device)
    module = _random(row, part)
    if module is not None and part == "dit" and sources.loras:
        module = _with_loras(row, module, sources)
    if module is None:
        return None
    module = cast(module, dtype).to(device)
    return store_in_float8(module) if part == "dit" and in_float8 else module


def build_random_modules(row: Row) -> Modules:
    """Every network of a row with weights that depend on the row's name alone: frozen, in
    evaluation mode, float32 on the CPU."""
    made: dict[str, Any] = {part: _random(row, part) for part in _WRAPPED}
    return Modules(**{part: module for part, module in made.items() if module}, device=torch.device("cpu"))


def build_on_meta(row: Row, channels: int | None = None) -> dict[str, nn.Module]:
    """Every network of a row by its part, with shapes and no numbers: for whoever only counts.

    channels: input channels of the transformer, where they are not the row's.
    """
    stated = {} if channels is None else {"in_channels": channels}
    parts = (part for part in _WRAPPED if _NETWORK_OF.get(part, part) in row.network)
    with on_meta():
        bare = {part: _network(row, part, stated if part == "dit" else {}) for part in parts}
    return {part: _WRAPPED[part](network.eval().requires_grad_(False)) for part, network in bare.items()}


def _from_file(
    row: Row,
    part: str,
    path: Path,
    files: Mapping[str, Path],
    dtype: torch.dtype,
    device: torch.device,
) -> nn.Module:
    """The network's own names are those of the file."""
    stated = read_object(files["config"], _LONGEST_CONFIG) if part == "vae" else {}
    with on_meta():
        network = _network(row, part, stated)
    fill(
        network,
        open_weights(path).tensors,
        dtype_of=lambda name: dtype,
        device=device,
        where=path,
        unused=UNUSED_IN_EVALUATION,
    )
    return _WRAPPED[part](network.eval())


def _random(row: Row, part: str) -> nn.Module | None:
    if _NETWORK_OF.get(part, part) not in row.network:
        return None
    # The classes initialise themselves from the global generator; it is borrowed and given back.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stable_hash("untrained", row.name, _NETWORK_OF.get(part, part)))
        # Evaluation mode from the start: layer drop would even change the number of audio features.
        return _WRAPPED[part](_network(row, part, {})).eval().requires_grad_(False)


def _network(row: Row, part: str, stated: Mapping[str, Any]) -> nn.Module:
    """The bare network of a part. stated: arguments of its file, in place of the row's."""
    # Rows are immutable and hold tuples; the libraries' constructors add lists to lists.
    sizes = row.network[_NETWORK_OF.get(part, part)]
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()}
    make: Callable[..., nn.Module] = {
        "text": lambda **sizes: UMT5EncoderModel(UMT5Config(**sizes)),
        "vae": AutoencoderKLWan,
        "audio": lambda **sizes: FrameWav2Vec2(Wav2Vec2Config(**sizes)),
        "image": lambda **sizes: ClipImageEncoder(clip_config(**sizes)),
        "dit": TRANSFORMERS.get(row.family),
    }[part]
    return make(**{**arguments, **stated})


def _itself(network: nn.Module) -> nn.Module:
    return network


_WRAPPED: Final[Mapping[str, Callable[[nn.Module], nn.Module]]] = {
    # A tokenizer of bytes: 256 values, padding, end and unknown.
    "text": lambda network: PromptEncoder(network, ByT5Tokenizer(extra_ids=0)),
    "vae": lambda network: fast_on_cpu(WanVae(network)),
    "audio": _itself,
    "image": _itself,
    "dit": _itself,
}


def _with_loras(row: Row, dit: nn.Module, sources: Sources) -> nn.Module:
    """A random transformer with LoRAs merged in: the same road as files, from tensors in memory. What is to
    be said of them was said when they were checked."""
    state = built_in(row).layout.key_map.rename_to_original(dit.state_dict())
    held = built_in(row, {name: ArrayTensor(tensor.numpy(), "F32") for name, tensor in state.items()})
    return transformer(with_loras(held, sources.loras, silent), torch.float32, torch.device("cpu"))
