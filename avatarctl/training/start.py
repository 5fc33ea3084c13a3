"""Where training starts: a network drawn from the seed, a base that lacks channels and audio layers, or
weights that are complete (spec/omniavatar.md g.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from avatarctl.errors import UnusableWeights, UsageError
from avatarctl.events import Notice, Stage
from avatarctl.files.tensors import ArrayTensor, StoredTensor, read_whole, to_float32
from avatarctl.loading.assemble import SUM_DTYPE, built_in
from avatarctl.loading.parts import TRANSFORMERS, transformer
from avatarctl.loading.sources import Sources, check_packaged, weights_missing
from avatarctl.models.precision import cast
from avatarctl.registry import Row
from avatarctl.rng import generator, stable_hash
from avatarctl.weights.layout import WeightLayout
from avatarctl.weights.layouts import LAYOUTS
from avatarctl.weights.merge import merge_adapter
from avatarctl.weights.recognise import open_model
from avatarctl.weights.sizes import variant_of
from avatarctl.weights.transforms import with_channels
from avatarctl.weights.weight_file import WeightFile

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.events import Emit

__all__ = ["Start", "start_network"]

_PATCH: Final = "patch_embedding.weight"
_GAIN: Final = 0.05
"""Of Xavier's uniform distribution, for what a base lacks."""


@dataclass(frozen=True)
class Start:
    """A network before its first step. base: what files of it say of the model that they change; pairs: LoRA
    matrices to begin with, by the names of `Trainables`, where an adapter is trained on."""

    dit: nn.Module
    layout: WeightLayout
    base: Mapping[str, Any]
    pairs: Mapping[str, Tensor]


def start_network(
    row: Row, sources: Sources, cfg: RunConfig, dtype: torch.dtype, device: torch.device, emit: Emit
) -> Start:
    """The transformer of a run, frozen weights in `dtype`.

    Raises WeightsMissing, UnusableWeights for files that do not fit, UsageError for a start that makes no
    sense.
    """
    layout = next(each for each in LAYOUTS if each.family == row.family)
    emit(Stage("loading the transformer"))
    if cfg.train.init == "random":
        return Start(_random(row, cfg, dtype, device, emit), layout, {"model": row.name}, {})
    if sources.missing or not sources.dit:
        raise weights_missing(row, sources)
    if row.source == "package":
        check_packaged(row, sources)
    held, pairs = _held(row, layout, sources, cfg, emit)
    base = {"model": row.name, "files": [path.name for path in sources.dit]}
    return Start(transformer(held, dtype, device), layout, base, pairs)


def _random(row: Row, cfg: RunConfig, dtype: torch.dtype, device: torch.device, emit: Emit) -> nn.Module:
    """As its class initialises itself, by the seed of the run."""
    if cfg.train.mode == "lora":
        raise UsageError(
            "a network of random weights has nothing that an adapter could change",
            where="train.mode",
            fix="--mode full",
        )
    sizes = {name: _mutable(value) for name, value in row.network["dit"].items()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stable_hash("start", cfg.runtime.seed))
        dit = TRANSFORMERS[row.family](**{**sizes, "in_channels": cfg.model.channels})
    emit(Notice(f"start: random weights from seed {cfg.runtime.seed}"))
    return cast(dit.eval(), dtype).to(device)


def _mutable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _held(
    row: Row, layout: WeightLayout, sources: Sources, cfg: RunConfig, emit: Emit
) -> tuple[WeightFile, dict[str, Tensor]]:
    """Every tensor of the network, and the pairs of the adapter that is trained on."""
    base, *adapters = sources.dit
    if row.source == "package":
        from avatarctl.files.source import open_weights

        held = built_in(row, open_weights(base).tensors)
    else:
        held = open_model(base)
    pairs: dict[str, Tensor] = {}
    tensors = dict(held.tensors)
    for path in adapters:
        part = open_model(path)
        if cfg.train.mode == "full":
            held = merge_adapter(held, part, 1.0, SUM_DTYPE)
            tensors = dict(held.tensors)
            emit(Notice(f"start: {path} is merged in"))
        else:
            tensors |= part.tensors
            pairs |= _pairs(part, cfg)
            emit(Notice(f"start: {path}, its {len(part.lora_pairs)} LoRA targets are trained on"))
    assert cfg.model.channels is not None
    sizes = replace(held.sizes, in_channels=cfg.model.channels, **_audio_sizes(row, layout, tensors))
    shapes = layout.shapes(sizes)
    _widen(tensors, shapes, cfg, emit)
    lacking = [name for name in shapes if name not in tensors]
    for name in lacking:
        tensors[name] = _drawn(name, shapes[name], cfg)
    if lacking:
        emit(Notice(f"start: {len(lacking)} tensors that {base.name} lacks are drawn from the seed"))
    unknown = sorted(tensors.keys() - shapes.keys())
    if unknown:
        raise UnusableWeights(f"{unknown[0]} has no place in {layout.title}", where=base)
    complete = replace(
        held,
        kind="model",
        layout=layout,
        variant=variant_of("model", layout, sizes),
        sizes=sizes,
        tensors=tensors,
        audio_offset=cfg.model.audio_offset,
    )
    return complete, pairs


def _audio_sizes(row: Row, layout: WeightLayout, tensors: Mapping[str, StoredTensor]) -> dict[str, int]:
    """Sizes of layers that a base lacks, from the row of the published model."""
    if any(layout.owns(name) for name in tensors):
        return {}
    network = row.network.get("dit") or {}
    fields = ("audio_input_dim", "audio_hidden_size")
    return {field: network[field] for field in fields if field in network}


def _pairs(part: WeightFile, cfg: RunConfig) -> dict[str, Tensor]:
    """Raises UsageError for an adapter of another rank, whose pairs this run cannot train on."""
    ranks = {pair.rank for pair in part.lora_pairs.values()}
    if ranks - {cfg.train.lora_rank}:
        rank = max(ranks)
        raise UsageError(
            f"the adapter has rank {rank}, and rank {cfg.train.lora_rank} was asked for",
            where=part.path,
            fix=f"--lora-rank {rank} trains it on",
        )
    found = {}
    for module, pair in part.lora_pairs.items():
        # Its own scale goes into B, so that the sum is what it was.
        factor = part.scale_of(pair) / (cfg.train.lora_alpha / cfg.train.lora_rank)
        found[f"{module}.lora_A.weight"] = _tensor(pair.down)
        found[f"{module}.lora_B.weight"] = _tensor(pair.up) * factor
    return found


def _widen(
    tensors: dict[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]], cfg: RunConfig, emit: Emit
) -> None:
    """More input channels than the base has: zero, or for a plain base under `published` drawn."""
    patch = tensors[_PATCH]
    has, wanted = patch.info.shape[1], shapes[_PATCH][1]
    if has > wanted:
        raise UsageError(
            f"the weights have {has} input channels, and {wanted} were asked for", where="model.channels"
        )
    if has == wanted:
        return
    plain = not any(name.startswith("audio_proj.") for name in tensors)
    if plain and cfg.train.init == "published":
        drawn = read_whole(_drawn(_PATCH, shapes[_PATCH], cfg)).copy()
        drawn[:, :has] = to_float32(read_whole(patch), patch.info.dtype)
        tensors[_PATCH] = ArrayTensor(drawn, "F32")
    else:
        tensors[_PATCH] = with_channels(patch, wanted)
    emit(Notice(f"start: {wanted - has} new input channels beside {has}"))


def _drawn(name: str, shape: tuple[int, ...], cfg: RunConfig) -> StoredTensor:
    """A tensor that a base lacks. Matrices: Xavier's uniform distribution with gain 0.05. The public trainer
    makes everything else zero, norms included, so that audio starts with no effect and no gradient but the
    norm's; unless `published` is asked for, a norm starts as one."""
    if len(shape) > 1:
        fan = shape[0] * math.prod(shape[2:]) + math.prod(shape[1:])
        bound = _GAIN * math.sqrt(6 / fan)
        values = torch.empty(shape).uniform_(
            -bound, bound, generator=generator(cfg.runtime.seed, "start", name)
        )
    else:
        is_norm = name.endswith("norm_out.weight") and cfg.train.init != "published"
        values = torch.ones(shape) if is_norm else torch.zeros(shape)
    return ArrayTensor(values.numpy(), "F32")


def _tensor(stored: StoredTensor) -> Tensor:
    return torch.from_numpy(to_float32(read_whole(stored), stored.info.dtype).copy())
