"""The steps of a conversion: merge or extract, input channels, dtype. Each makes another weight file of one.

No step reads a tensor, except an extraction, which computes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from avatarctl.errors import UnusableWeights, UsageError
from avatarctl.events import Emit, Notice
from avatarctl.weights.export import Target, require_place
from avatarctl.weights.extract import extract_adapter
from avatarctl.weights.lineage import check_lineage
from avatarctl.weights.merge import merge_adapter, refuse_other_conventions
from avatarctl.weights.sizes import variant_of
from avatarctl.weights.transforms import cast, with_channels
from avatarctl.weights.weight_file import WeightFile

__all__ = [
    "DTYPE_NAMES",
    "Step",
    "change_channels",
    "change_dtype",
    "extract",
    "merge",
    "plain_name",
    "state_audio_offset",
]

DTYPE_NAMES: Final[Mapping[str, str]] = {
    "float32": "F32", "bfloat16": "BF16", "float16": "F16", "fp32": "F32", "bf16": "BF16", "fp16": "F16",
}  # fmt: skip
"""What a person calls a dtype -> what safetensors does."""

_CHANNELS: Final = (16, 33, 49, 65)
"""Input channels that extend each other: noise; reference and mask; masked video; reference sequence."""

_PATCH: Final = "patch_embedding.weight"


@dataclass(frozen=True)
class Step:
    """What became of a weight file; line: for people; operation: for the metadata, empty if none."""

    weight_file: WeightFile
    line: str
    operation: Mapping[str, Any]


def plain_name(weight_file: WeightFile) -> str:
    """Name of the file or folder that was read, without the folders above it."""
    return weight_file.path.name or weight_file.path.resolve().name


def state_audio_offset(weight_file: WeightFile, offset: int) -> Step:
    """A person's word for what no tensor tells: which frame a frame of audio drives.

    Raises UsageError for a network without audio layers.
    """
    if weight_file.audio_offset is None:
        raise UsageError(f"{weight_file.variant} has no audio layers", where="--audio-offset")
    stated = replace(
        weight_file, audio_offset=offset, audio_offset_rule="--audio-offset", audio_offset_assumed=False
    )
    was = f" (it was {weight_file.audio_offset}: {weight_file.audio_offset_rule})"
    line = f"audio offset {offset}, as stated{was}"
    return Step(stated, line, {"operation": "audio offset", "offset": offset})


def merge(adapter: WeightFile, base: WeightFile, strength: float, dtype: str | None, emit: Emit) -> Step:
    """`adapter` merged into `base`. dtype: as `merge_adapter` takes it.

    Raises UnusableWeights where the two do not belong together, or are together already.
    """
    merged = merge_adapter(base, adapter, strength, dtype)
    if warning := check_lineage(base, adapter):
        emit(Notice(warning, "warning"))
    operation = {
        "operation": "merge",
        "base": plain_name(base),
        "adapter": plain_name(adapter),
        "strength": strength,
        "scale": adapter.scale_rule,
    }
    parts = (
        (len(adapter.lora_pairs), "LoRA targets"),
        (len(adapter.differences), "differences"),
        (len(adapter.tensors), "tensors replaced"),
    )
    changes = ", ".join(f"{count} {what}" for count, what in parts if count)
    factor = "" if strength == 1 else f", strength {strength:g}"
    return Step(merged, f"merged into {plain_name(base)} ({base.variant}): {changes}{factor}", operation)


def extract(model: WeightFile, base: WeightFile, rank: int | None, to: Target, emit: Emit) -> Step:
    """The adapter that makes `model` of `base`, for a file that `to` can hold; see `extract_adapter`."""
    if model.kind == "model":
        refuse_other_conventions(model, base)

    def require(differences: Sequence[str]) -> None:
        require_place(differences, to, model.path, fix="--to comfyui holds them")

    adapter = extract_adapter(model, base, rank=rank, emit=emit, on_differences=require)
    adapter = replace(adapter, variant=variant_of("adapter", adapter.layout, adapter.sizes))
    operation = {"operation": "extract", "model": plain_name(model), "base": plain_name(base)}
    return Step(adapter, f"extracted: the difference from {plain_name(base)} ({base.variant})", operation)


def change_channels(weight_file: WeightFile, wanted: int, *, drop: bool) -> Step:
    """More input channels, new ones zero as trainers make them, or with `drop` fewer.

    Raises UnusableWeights for a file whose channels are none of ours, UsageError for a loss not asked for.
    """
    patch = weight_file.tensors.get(_PATCH)
    if patch is None:
        raise UnusableWeights(
            f"is {weight_file.variant} without a patch embedding: it has no channels to change",
            where=weight_file.path,
        )
    held = patch.info.shape[1]
    if held not in _CHANNELS:
        raise UnusableWeights(
            f"is {weight_file.variant}: its {held} input channels mean other things than 16, 33, 49 or 65",
            where=weight_file.path,
        )
    if wanted == held:
        return Step(weight_file, f"channels: {held} already", {})
    if wanted < held and not drop:
        raise UsageError(
            f"{plain_name(weight_file)} has {held} input channels, and {wanted} would lose some",
            where="--channels",
            fix="--drop-channels does so",
        )
    how = "the new ones are zero" if wanted > held else f"the last {held - wanted} are dropped"
    sizes = replace(weight_file.sizes, in_channels=wanted)
    changed = replace(
        weight_file,
        tensors={**weight_file.tensors, _PATCH: with_channels(patch, wanted)},
        sizes=sizes,
        variant=variant_of(weight_file.kind, weight_file.layout, sizes),
    )
    audio = "; it still has no audio layers" if weight_file.layout.family == "wan" else ""
    operation = {"operation": "channels", "from": held, "to": wanted}
    return Step(changed, f"channels: {held} to {wanted}, {how}{audio}", operation)


def change_dtype(weight_file: WeightFile, dtype: str, *files: WeightFile | None) -> Step:
    """Every tensor in one dtype, but those that a file has in float32 and the network needs so.

    files: what was read, as a sum in `weight_file` is float32 until it is cast.
    """
    held = {
        name: tensor.info.dtype for file in files if file is not None for name, tensor in file.tensors.items()
    }

    def target(name: str) -> str:
        return "F32" if held[name] == "F32" and weight_file.layout.stays_float32(name) else dtype

    tensors = {name: cast(tensor, target(name)) for name, tensor in weight_file.tensors.items()}
    changed = replace(
        weight_file,
        tensors=tensors,
        lora_pairs={
            module: replace(pair, down=cast(pair.down, dtype), up=cast(pair.up, dtype))
            for module, pair in weight_file.lora_pairs.items()
        },
        differences={name: cast(tensor, dtype) for name, tensor in weight_file.differences.items()},
    )
    word = next(name for name, code in DTYPE_NAMES.items() if code == dtype)
    kept = sum(target(name) != dtype for name in tensors)
    islands = f"; {kept} tensors stay float32" if kept else ""
    return Step(changed, f"dtype: {word}{islands}", {"operation": "cast", "dtype": word})
