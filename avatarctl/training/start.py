"""Where training starts: a network drawn from the seed, a base that lacks channels and audio layers, or
weights that are complete (spec/omniavatar.md g.4)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from avatarctl.errors import UnusableWeights, UsageError
from avatarctl.events import Notice, Stage
from avatarctl.files.source import open_weights
from avatarctl.files.tensors import ArrayTensor, StoredTensor, read_whole, to_float32
from avatarctl.loading.assemble import SUM_DTYPE, built_in
from avatarctl.loading.parts import TRANSFORMERS, transformer
from avatarctl.loading.sources import Sources, check_base, check_packaged
from avatarctl.loading.trained import base_of
from avatarctl.media.files import file_sha256
from avatarctl.models.device import dtype_of
from avatarctl.models.precision import cast
from avatarctl.registry import Row
from avatarctl.rng import generator, stable_hash
from avatarctl.weights.layout import WeightLayout
from avatarctl.weights.layouts import LAYOUTS
from avatarctl.weights.merge import merge_adapter, with_base_config
from avatarctl.weights.recognise import open_model
from avatarctl.weights.sizes import variant_of
from avatarctl.weights.transforms import with_channels
from avatarctl.weights.weight_file import WeightFile

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.config.sections import Train
    from avatarctl.events import Emit

__all__ = ["Start", "StartPlan", "plan_start", "start_network"]

_PATCH: Final = "patch_embedding.weight"
_TRAINED_BYTES: Final = 4
_BLOCK: Final = re.compile(r"blocks\.(\d+)\.")
_GAIN: Final = 0.05
"""Of Xavier's uniform distribution, for what a base lacks."""


@dataclass(frozen=True)
class Start:
    """A network before its first step. base: what files of it say of the model that they change; pairs: LoRA
    matrices to begin with, by the names of `Trainables`, where an adapter is trained on; sha256: of the files
    of the model that a person named by its path, by name."""

    dit: nn.Module
    layout: WeightLayout
    base: Mapping[str, Any]
    pairs: Mapping[str, Tensor]
    sha256: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StartPlan:
    """What a run starts from, by the headers of its files: nothing of weight was read.

    held: every tensor of the network, None where all are drawn; shapes: of all, by original name; adapter:
    the one that is trained on; files: of a model that has no published name; on_full: they are a full model,
    and the run trains an adapter on it.
    """

    row: Row
    layout: WeightLayout
    base: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    held: WeightFile | None = None
    adapter: WeightFile | None = None
    files: tuple[Path, ...] = ()
    on_full: bool = False

    def trained(self, train: Train) -> int:
        """How many numbers the run will train."""
        if train.mode == "full":
            return sum(map(math.prod, self.shapes.values()))
        count = sum(math.prod(self.shapes[name]) for name in self.shapes if self.layout.is_replaced(name))
        for name, shape in self.shapes.items():
            module = f".{name.removesuffix('.weight')}"
            if name.endswith(".weight") and len(shape) == 2 and module.endswith(_ends(train)):
                count += train.lora_rank * sum(shape)
        return count

    def weights(self, cfg: RunConfig) -> int:
        """Bytes of weights that surely lie on the device of each process while a step is made: arithmetic
        from shapes. What is trained is float32; frozen blocks may wait on the host."""
        total = _TRAINED_BYTES * self.trained(cfg.train)
        if cfg.train.mode == "lora":
            plain = dtype_of(cfg.runtime).itemsize
            stored = 1 if cfg.memory.base_precision == "fp8" else plain
            blocks = {name: int(match[1]) for name in self.shapes if (match := _BLOCK.match(name))}
            stay = max(blocks.values(), default=-1) + 1 - cfg.memory.swap_blocks
            for name, shape in self.shapes.items():
                if not self.layout.is_replaced(name) and blocks.get(name, -1) < stay:
                    size = stored if name in blocks and len(shape) == 2 else plain
                    total += size * math.prod(shape)
        return total // (cfg.runtime.gpus if cfg.memory.shard != "none" else 1)


def plan_start(row: Row, sources: Sources, cfg: RunConfig, emit: Emit) -> StartPlan:
    """Looks at the files of a start, all of which must be here.

    Raises UnusableWeights for files that do not fit, UsageError for a start that makes no sense.
    """
    layout = next(each for each in LAYOUTS if each.family == row.family)
    assert cfg.model.channels is not None
    if cfg.train.init == "random":
        if cfg.train.mode == "lora":
            raise UsageError(
                "a network of random weights has nothing that an adapter could change",
                where="train.mode",
                fix="--mode full",
            )
        sizes = replace(built_in(row).sizes, in_channels=cfg.model.channels)
        return StartPlan(row, layout, _base(row), layout.shapes(sizes))
    if row.source == "package":
        check_packaged(row, sources)
    check_base(row, sources)
    # The adapter of a built-in model that was trained here stands where `infer` has LoRAs.
    first, *others = (*sources.dit, *(lora.path for lora in sources.loras))
    held, adapters = _opened(row, sources, first), [open_model(path) for path in others]
    if not adapters:
        beside = "" if cfg.train.mode == "full" else ", which stay as they are, and a new adapter"
        emit(Notice(f"start: the weights of {held.path if row.path else row.name}{beside}"))
    whole = held
    for part in adapters:
        whole = merge_adapter(whole, part, 1.0, SUM_DTYPE)  # refuses what does not fit
    if cfg.train.mode == "full":
        for part in adapters:
            emit(Notice(f"start: {part.path} is merged in"))
        complete = _complete(row, layout, whole, cfg, emit)
        files = (adapters[-1] if adapters else held).files if row.path else ()
        return StartPlan(
            row, layout, _base(row, held.files, full=True), complete[1], complete[0], None, files
        )
    tensors = dict(held.tensors)
    for part in adapters:
        _require_trained_on(part, cfg.train)
        tensors |= part.tensors
        emit(Notice(f"start: {part.path}, its {len(part.lora_pairs)} LoRA targets are trained on"))
    complete = _complete(row, layout, replace(whole, tensors=tensors), cfg, emit)
    base, last = _base(row, held.files), adapters[-1] if adapters else None
    on_full = last is None and _is_of_nobody(row, held, layout)
    files = held.files if on_full else last.files if last is not None and row.path else ()
    return StartPlan(row, layout, base, complete[1], complete[0], last, files, on_full)


def start_network(
    plan: StartPlan, cfg: RunConfig, dtype: torch.dtype, device: torch.device, emit: Emit
) -> Start:
    """The transformer of a run, frozen weights in `dtype`. Raises UnusableWeights for damaged tensors."""
    emit(Stage("loading the transformer"))
    if plan.held is None:
        return Start(_random(plan.row, cfg, dtype, device, emit), plan.layout, plan.base, {})
    sha256 = {path.name: file_sha256(path) for path in plan.files}
    base = dict(plan.base)
    if plan.on_full:
        assert plan.held is not None
        base |= {"path": str(plan.held.path.absolute()), "sha256": sha256}
    pairs = {} if plan.adapter is None else _pairs(plan.adapter, cfg.train)
    # What an adapter carries whole is trained: rounded to bfloat16 first, it would lose what a run learnt.
    dit = transformer(plan.held, dtype, device, plan.layout.is_replaced)
    return Start(dit, plan.layout, base, pairs, sha256)


def _ends(train: Train) -> tuple[str, ...]:
    return tuple(f".{target}" for target in train.lora_targets)


def _base(row: Row, files: Sequence[Path] = (), *, full: bool = False) -> dict[str, Any]:
    """What the file of a run says of its base: for weights of another run what that one said. full: the run
    trains a full model, which lies on no other."""
    if row.path and row.path.endswith(".safetensors") and (stated := base_of(Path(row.path))):
        return {key: value for key, value in stated.items() if not (full and key in ("path", "sha256"))}
    return {"model": row.name, **({"files": [path.name for path in files]} if files else {})}


def _is_of_nobody(row: Row, held: WeightFile, layout: WeightLayout) -> bool:
    """Whether `held` is a complete model that no registry name stands for: an adapter on it has to say which
    it is, since `infer` would take the published one of its size."""
    return any(map(layout.owns, held.tensors)) and (row.source != "package" or bool(row.path))


def _random(row: Row, cfg: RunConfig, dtype: torch.dtype, device: torch.device, emit: Emit) -> nn.Module:
    """As its class initialises itself, by the seed of the run."""
    sizes = {name: _mutable(value) for name, value in row.network["dit"].items()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stable_hash("start", cfg.runtime.seed))
        dit = TRANSFORMERS[row.family](**{**sizes, "in_channels": cfg.model.channels})
    emit(Notice(f"start: random weights from seed {cfg.runtime.seed}"))
    return cast(dit.eval(), dtype).to(device)


def _mutable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _opened(row: Row, sources: Sources, path: Path) -> WeightFile:
    """The full model that is trained, or the base of an adapter."""
    if row.source == "package":
        # A wider network than the file's is what its adapter makes of it.
        made = built_in(row, open_weights(path).tensors)
        channels = made.tensors[_PATCH].info.shape[1]
        return replace(made, path=path, files=(path,), sizes=replace(made.sizes, in_channels=channels))
    held = open_model(path)
    for config in sources.base_configs:
        held = with_base_config(held, config)
    return held


def _complete(
    row: Row, layout: WeightLayout, whole: WeightFile, cfg: RunConfig, emit: Emit
) -> tuple[WeightFile, Mapping[str, tuple[int, ...]]]:
    """`whole` as the network of the run: with its channels, and what a plain base lacks."""
    tensors = dict(whole.tensors)
    plain = not any(layout.owns(name) for name in tensors)
    bases = layout.bases
    if plain and (bases is None or not bases.allow(whole.sizes, whole.config)):
        kind = f" {bases.title} model" if bases else "thing"
        raise UnusableWeights(
            f"is {whole.variant}; {layout.title} starts from no{kind} like it", where=whole.path
        )
    if not whole.heads:
        raise UnusableWeights(
            f"the number of attention heads is unknown for a width of {whole.sizes.width}",
            where=whole.path,
            fix='its config.json needs "num_heads"',
        )
    assert cfg.model.channels is not None
    sizes = replace(whole.sizes, in_channels=cfg.model.channels)
    if plain:
        sizes = replace(sizes, **_audio_sizes(row))
    shapes = layout.shapes(sizes)
    _widen(tensors, shapes, cfg, emit, plain)
    lacking = [name for name in shapes if name not in tensors]
    for name in lacking:
        tensors[name] = _drawn(name, shapes[name], cfg)
    if lacking:
        how = "small, from the seed" if cfg.train.init != "published" else "as the public trainer draws them"
        emit(Notice(f"start: {len(lacking)} tensors that {whole.path.name} lacks are drawn, {how}"))
    unknown = sorted(tensors.keys() - shapes.keys())
    if unknown:
        raise UnusableWeights(f"{unknown[0]} has no place in {layout.title}", where=whole.path)
    variant = variant_of("model", layout, sizes)
    made = replace(whole, kind="model", layout=layout, variant=variant, sizes=sizes, tensors=tensors)
    return replace(made, audio_offset=cfg.model.audio_offset), shapes


def _audio_sizes(row: Row) -> dict[str, int]:
    """Sizes of layers that a base lacks, from the row of the published model."""
    network = row.network.get("dit") or {}
    fields = ("audio_input_dim", "audio_hidden_size")
    return {field: network[field] for field in fields if field in network}


def _require_trained_on(part: WeightFile, train: Train) -> None:
    """Raises UsageError for an adapter that this run cannot train on: of another rank, with other targets."""
    ranks = {pair.rank for pair in part.lora_pairs.values()}
    if ranks - {train.lora_rank}:
        rank = max(ranks)
        raise UsageError(
            f"the adapter has rank {rank}, and rank {train.lora_rank} was asked for",
            where=part.path,
            fix=f"--lora-rank {rank} trains it on, --mode full merges it",
        )
    strange = [module for module in part.lora_pairs if not f".{module}".endswith(_ends(train))]
    if strange or part.differences:
        what = strange[0] if strange else next(iter(part.differences))
        raise UsageError(
            f"changes {what[:100]}, which train.lora_targets does not name",
            where=part.path,
            fix="name all of its targets by --lora-targets, or merge it by --mode full",
        )


def _pairs(part: WeightFile, train: Train) -> dict[str, Tensor]:
    """The matrices of an adapter; its own scale goes into B, so that the sum is what it was."""
    found = {}
    for module, pair in part.lora_pairs.items():
        factor = part.scale_of(pair) / (train.lora_alpha / train.lora_rank)
        found[f"{module}.lora_A.weight"] = _tensor(pair.down)
        found[f"{module}.lora_B.weight"] = _tensor(pair.up) * factor
    return found


def _widen(
    tensors: dict[str, StoredTensor],
    shapes: Mapping[str, tuple[int, ...]],
    cfg: RunConfig,
    emit: Emit,
    plain: bool,
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
    if plain and cfg.train.init == "published":
        drawn = read_whole(_drawn(_PATCH, shapes[_PATCH], cfg)).copy()
        drawn[:, :has] = to_float32(read_whole(patch), patch.info.dtype)
        tensors[_PATCH], how = ArrayTensor(drawn, "F32"), "drawn"
    else:
        tensors[_PATCH], how = with_channels(patch, wanted), "zero"
    emit(Notice(f"start: {wanted - has} new input channels beside {has}, {how}"))


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
