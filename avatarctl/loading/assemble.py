"""The transformer of a run out of its files: base, adapters, LoRAs. Headers are read, no weight is.

What comes out is a full model whose tensors are merged while somebody reads them, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import replace
from pathlib import Path

import numpy as np

from avatarctl.config import Model, RunConfig
from avatarctl.errors import ConfigError, UnusableWeights
from avatarctl.events import Emit, Notice, silent
from avatarctl.files.source import open_weights
from avatarctl.files.tensors import ArrayTensor, StoredTensor
from avatarctl.loading.loras import Lora
from avatarctl.loading.sources import Sources, asked_size, check_base, check_packaged
from avatarctl.registry import ROWS, Row
from avatarctl.weights.layout import Sizes
from avatarctl.weights.layouts import LAYOUTS
from avatarctl.weights.lineage import check_lineage
from avatarctl.weights.made_for import made_for_others
from avatarctl.weights.merge import merge_adapter, with_base_config
from avatarctl.weights.recognise import open_model
from avatarctl.weights.weight_file import WeightFile

__all__ = ["assemble", "built_in", "check_transformer", "with_loras"]

SUM_DTYPE = "F32"
"""Of merged tensors: whoever loads them casts them once."""


def check_transformer(row: Row, sources: Sources, cfg: RunConfig, emit: Emit) -> WeightFile | None:
    """The transformer of a run, with all that a person should know of its files said.

    None where its weights are random or files are missing; then the LoRAs alone are checked, as far as that
    goes.
    Raises what `assemble` raises.
    """
    if row.source == "package":
        check_packaged(row, sources)
        _check_channels_of(row, cfg.model)
    check_base(row, sources)
    if sources.dit and not sources.missing:
        held = assemble(row, sources, cfg.model, emit)
        if (size := asked_size(cfg)) and (line := made_for_others(held, size)):
            emit(Notice(line, "warning"))
        return held
    if row.source == "package" and sources.loras:
        with_loras(built_in(row), sources.loras, emit)
    else:
        for lora in sources.loras:
            open_model(lora.path)
    return None


def assemble(row: Row, sources: Sources, model: Model, emit: Emit) -> WeightFile:
    """The full transformer that a run asks for: every tensor, complete, under original names.

    Raises UnusableWeights, naming both sides, where files do not belong together or are not what was asked.
    """
    base, *adapters = sources.dit
    if row.source == "package":
        return with_loras(built_in(row, open_weights(base).tensors), sources.loras, emit)
    held = open_model(base)
    for config in sources.base_configs:
        told = with_base_config(held, config)
        if told.heads != held.heads:
            emit(Notice(f"{base} has {told.heads} attention heads, as {config} states"))
        held = told
    for path in adapters:
        part = open_model(path)
        # That a full model lies below it is then as it should be.
        held = _merged(held, part, 1.0, silent if row.base_path else emit)
        emit(Notice(f"adapter {_line(Lora(path, 1.0), part)}"))
    if not adapters and not row.path and any(ROWS[name].kind == "adapter" for name in row.needs):
        emit(Notice(f"{base} is {held.variant}, complete: the adapter of {row.name} is not added to it"))
    if row.path and held.audio_offset is not None:
        emit(Notice(f"audio offset {held.audio_offset}: {held.audio_offset_rule}"))
    _check_asked(row, model, held, emit)
    held = with_loras(held, sources.loras, emit)
    _check_channels(row, model, held)
    return held


def built_in(row: Row, tensors: Mapping[str, StoredTensor] | None = None) -> WeightFile:
    """The transformer of a built-in row. Without `tensors`, under original names, zeros that take no memory
    stand for them: they tell as well what fits it."""
    network = row.network["dit"]
    layout = next(each for each in LAYOUTS if each.family == row.family)
    stated = {field: network[name] for name, field in layout.arguments.items() if network.get(name)}
    sizes = Sizes(width=network["num_attention_heads"] * network["attention_head_dim"], **stated)
    if tensors is None:
        zero = np.zeros((), np.float32)
        tensors = {
            name: ArrayTensor(np.broadcast_to(zero, shape), "F32")
            for name, shape in layout.shapes(sizes).items()
        }
    return WeightFile(
        path=Path(row.name),
        kind="model",
        naming="original",
        layout=layout,
        variant=row.title,
        sizes=sizes,
        tensors=tensors,
        heads=network["num_attention_heads"],
        heads_stated=True,
        audio_offset=row.defaults["model.audio_offset"],
    )


def with_loras(held: WeightFile, loras: tuple[Lora, ...], emit: Emit) -> WeightFile:
    """`held` with each LoRA merged in order; one line says what each is and where its scale comes from."""
    for lora in loras:
        for note in lora.notes:
            emit(Notice(note, "warning"))
        part = open_model(lora.path)
        # What is said of the sum later is said of the model, not of the last LoRA.
        held = replace(_merged(held, part, lora.strength, emit), path=held.path)
        emit(Notice(f"lora {_line(lora, part)}"))
    return held


def _merged(held: WeightFile, part: WeightFile, strength: float, emit: Emit) -> WeightFile:
    merged = merge_adapter(held, part, strength, SUM_DTYPE)
    if warning := check_lineage(held, part):
        emit(Notice(warning, "warning"))
    return merged


def _line(lora: Lora, part: WeightFile) -> str:
    changes = []
    if part.lora_pairs:
        changes.append(f"{_counted(part.lora_pairs, 'target')} at {_scale(lora, part)}")
    if part.differences:
        changes.append(f"{_counted(part.differences, 'difference')} times {lora.strength:g}")
    if part.tensors:
        changes.append(f"{_counted(part.tensors, 'tensor')} replaced")
    return f"{part.path}: {', '.join(changes)}"


def _counted(items: Sized, what: str) -> str:
    return f"{len(items)} {what}{'' if len(items) == 1 else 's'}"


def _scale(lora: Lora, part: WeightFile) -> str:
    factors = {part.scale_of(pair) for pair in part.lora_pairs.values()}
    rule = f" ({part.scale_rule})" if part.scale_rule else ""
    if len(factors) > 1:
        return f"{lora.strength:g} times a factor of their own, {min(factors):g} to {max(factors):g}{rule}"
    factor = factors.pop()
    product = "" if lora.strength == 1 else f"{lora.strength:g} x "
    return f"scale {product}{factor:g}{rule}"


def _check_asked(row: Row, model: Model, held: WeightFile, emit: Emit) -> None:
    """Whether the files are the model that was named. A width that nobody published runs, with a notice."""
    if held.layout.family != row.family:
        raise UnusableWeights(f"is {held.variant}, not a model of family {row.family}", where=held.path)
    if not row.path and held.sizes.width != row.width:
        others = [each.name for each in ROWS.values() if each.family == row.family and each is not row]
        like = [name for name in others if ROWS[name].width == held.sizes.width]
        if like:
            raise UnusableWeights(
                f"holds the weights of {like[0]} (width {held.sizes.width}), and {row.name} was asked for "
                f"(width {row.width})",
                where=held.path,
                fix=f"use --model {like[0]}",
            )
        these = f"these weights have {held.sizes.width}: {held.path}"
        emit(Notice(f"{row.name} is published with width {row.width}; {these}", "warning"))
    if not row.path and held.audio_offset not in (None, model.audio_offset):
        stated = f"{held.path} has audio offset {held.audio_offset} ({held.audio_offset_rule})"
        emit(Notice(f"{stated}; {model.audio_offset} moves the lips", "warning"))


def _check_channels_of(row: Row, model: Model) -> None:
    """A built-in network has the channels that its row states, if it states any."""
    if (has := row.network["dit"].get("in_channels")) not in (None, model.channels):
        raise ConfigError(
            f"{row.name} has {has} input channels, and {model.channels} were asked for",
            where="model.channels",
            fix="leave it out",
        )


def _check_channels(row: Row, model: Model, held: WeightFile) -> None:
    if model.channels is not None and held.sizes.in_channels != model.channels:
        raise UnusableWeights(
            f"has {held.sizes.in_channels} input channels, and {model.channels} were asked for",
            where=held.path,
            fix=f"leave out --channels, or name another file; this run is of {row.name}",
        )
    if not held.heads:
        raise UnusableWeights(
            f"the number of attention heads is unknown for a width of {held.sizes.width}",
            where=held.path,
            fix='its config.json needs "num_heads"',
        )
