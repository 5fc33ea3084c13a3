"""One weight file or folder to another: read, merge or extract, channels, dtype, names, write.

Headers decide everything first; then one block of one tensor at a time is read, changed and written. An
extraction is the exception: it computes one pair of matrices after another and holds the adapter.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from avatarctl.atomic import atomic_path, atomic_write_text, disk_errors, removed_after_failure
from avatarctl.errors import AvatarctlError, UnusableWeights, UsageError
from avatarctl.events import BytesMoved, Emit, Notice, Stage
from avatarctl.files.hashes import FileHashes
from avatarctl.files.safetensors_file import read_header
from avatarctl.files.source import COMPANION_OF
from avatarctl.files.staging import staged_folder
from avatarctl.files.tensors import StoredTensor
from avatarctl.files.writer import require_space, shard_names, write_safetensors, write_sharded
from avatarctl.pipelines.convert_request import (
    SUFFIX,
    ConvertRequest,
    check_companion,
    check_names,
    check_overlap,
    check_place,
    is_file,
)
from avatarctl.pipelines.convert_steps import (
    Step,
    change_channels,
    change_dtype,
    extract,
    merge,
    plain_name,
    state_audio_offset,
)
from avatarctl.weights.describe import NAMINGS
from avatarctl.weights.export import Export, export, with_release_config
from avatarctl.weights.layouts import LAYOUTS
from avatarctl.weights.metadata import config_of, file_metadata, read_own
from avatarctl.weights.recognise import read_weight_file, require_whole
from avatarctl.weights.weight_file import WeightFile

__all__ = [
    "ConvertPlan",
    "ConvertRequest",
    "Converted",
    "plan_conversion",
    "preview_conversion",
    "write",
]


@dataclass(frozen=True)
class ConvertPlan:
    """What will be written. did: one line for each step; operations: the same for the metadata."""

    request: ConvertRequest
    weight_file: WeightFile
    export: Export
    sources: tuple[Path, ...]
    did: tuple[str, ...]
    operations: tuple[Mapping[str, Any], ...]

    @cached_property
    def bytes(self) -> int:
        """Of all tensors; asked for with every block that is written."""
        return sum(tensor.info.nbytes for tensor in self._tensors())

    @property
    def count(self) -> int:
        """Of all tensors."""
        return len(self._tensors())

    def _tensors(self) -> list[StoredTensor]:
        return [*self.export.tensors.values(), *self.export.companion.values()]

    @property
    def companion(self) -> str:
        """Plain name of the second file, empty if there is none."""
        stem = self.main.removesuffix(SUFFIX)
        return f"{stem}.patch{SUFFIX}" if self.export.companion else ""

    @property
    def main(self) -> str:
        """Plain name of the main file."""
        return self.request.out.name if is_file(self.request.out) else self.export.name


@dataclass(frozen=True)
class Converted:
    """files: relative to the folder of the output."""

    path: Path
    files: tuple[str, ...]
    tensors: int
    bytes: int
    seconds: float
    did: tuple[str, ...] = field(default=())


def plan_conversion(request: ConvertRequest, emit: Emit) -> ConvertPlan:
    """Everything up to the first byte, an extraction's computation included.

    Raises UsageError and OutputRefused for what is asked, WriteFailed for a full disk, UnusableWeights for
    what the files hold.
    """
    source, base, sources = _open(request)
    did = [f"read: {_described(source)}"]
    operations: list[Mapping[str, Any]] = list(read_own(source.metadata).operations)
    weight_file = source
    steps: list[Step] = []
    if base is not None:
        operations = [*read_own(base.metadata).operations, *operations]
        steps.append(
            merge(source, base, request.strength, "F32" if request.dtype else None, emit)
            if request.merge
            else extract(source, base, request.rank, request.to, emit)
        )
        weight_file = steps[-1].weight_file
    if request.channels is not None:
        steps.append(change_channels(weight_file, request.channels, drop=request.drop_channels))
        weight_file = steps[-1].weight_file
    if request.dtype is not None:
        steps.append(change_dtype(weight_file, request.dtype, base, source))
        weight_file = steps[-1].weight_file
    if request.audio_offset is not None:
        steps.append(state_audio_offset(weight_file, request.audio_offset))
        weight_file = steps[-1].weight_file
    did += [step.line for step in steps]
    if weight_file.audio_offset_assumed:
        did.append(
            f"audio offset {weight_file.audio_offset} is assumed, not written: "
            f"{weight_file.audio_offset_rule} (--audio-offset states it)"
        )
    operations += [step.operation for step in steps if step.operation]
    operations.append({"operation": "write", "to": request.to, "source": plain_name(source)})
    weight_file = with_release_config(weight_file)
    exported = export(weight_file, request.to)
    _check_layout(request, weight_file, exported)
    plan = ConvertPlan(request, weight_file, exported, sources, (*did, *exported.notes), tuple(operations))
    if plan.companion:
        count, names = len(exported.companion), (plan.companion, plan.main)
        line = f"{count} whole tensors (patch embedding, audio) go to {names[0]}, beside {names[1]}"
        plan = replace(plan, did=(*plan.did, line))
    require_space(request.out, plan.bytes)
    return plan


def preview_conversion(request: ConvertRequest, emit: Emit) -> dict[str, Any]:
    """What a conversion would write, for `--dry-run`: path, files, tensors, bytes, did.

    An extraction is not computed: what it would write is then unknown (None). Raises as `plan_conversion`.
    """
    if not request.extract:
        plan = plan_conversion(request, emit)
        main = [plan.main]
        if request.shard_bytes is not None:
            stem = plan.main.removesuffix(SUFFIX)
            main = shard_names(stem, plan.export.tensors, request.shard_bytes)
        documents = [] if is_file(request.out) else plan.export.documents
        files = [name for name in (plan.companion, *main, *documents) if name]
        return _summary(request, files, plan.count, plan.bytes, plan.did)
    source, base, _ = _open(request)
    assert base is not None
    did = (
        f"read: {_described(source)}",
        f"would extract the difference from {plain_name(base)} ({base.variant})",
    )
    return _summary(request, None, None, None, did)


def _summary(
    request: ConvertRequest,
    files: list[str] | None,
    tensors: int | None,
    size: int | None,
    did: Sequence[str],
) -> dict[str, Any]:
    return {"path": str(request.out), "files": files, "tensors": tensors, "bytes": size, "did": list(did)}


def _open(request: ConvertRequest) -> tuple[WeightFile, WeightFile | None, tuple[Path, ...]]:
    """Source, base, and every file that is read, after all checks that need no tensor."""
    check_names(request)
    check_place(request)
    source = _read(request.source)
    base = _read(request.base) if request.base is not None else None
    sources = tuple(dict.fromkeys((*source.files, *(base.files if base else ()))))
    check_overlap(request, sources)
    if request.extract and base and request.to == "comfyui" and source.layout.family != base.layout.family:
        check_companion(request)  # the audio layers will be in it: known before hours of computation
    return source, base, sources


_CONVERTED = ", ".join(layout.title for layout in LAYOUTS if layout.supported)


def _read(path: Path) -> WeightFile:
    """A transformer or an adapter of one, complete."""
    weight_file = read_weight_file(path)
    if weight_file.kind == "component" or not weight_file.layout.supported:
        raise UnusableWeights(
            f"is {weight_file.variant}: only transformers of {_CONVERTED} are converted",
            where=path,
            fix="--inspect shows what it holds",
        )
    require_whole(weight_file)
    return replace(weight_file, config=config_of(weight_file))


def _described(weight_file: WeightFile) -> str:
    scale = f"; scale: {weight_file.scale_rule}" if weight_file.lora_pairs else ""
    return f"{weight_file.variant}, {NAMINGS[weight_file.naming]}{scale}"


def _check_layout(request: ConvertRequest, weight_file: WeightFile, exported: Export) -> None:
    if request.shard_bytes is not None and weight_file.kind == "adapter":
        raise UsageError("adapters are one file, never shards", where="--shard-size")
    if exported.companion:
        check_companion(request)


# Writing


def write(plan: ConvertPlan, emit: Emit) -> Converted:
    """Writes the files of a plan, all of them or none.

    Raises OutputRefused, WriteFailed, and UnusableWeights for NaN, infinity and files that end early.
    """
    started = time.monotonic()
    request = plan.request
    emit(Stage("writing"))
    with FileHashes(whole=request.sha256) as hashes:
        files = _write(plan, hashes, emit)
    return Converted(request.out, tuple(files), plan.count, plan.bytes, time.monotonic() - started, plan.did)


def _write(plan: ConvertPlan, hashes: FileHashes, emit: Emit) -> list[str]:
    request = plan.request
    if is_file(request.out):
        left = _left_half(plan)
        files = _write_file(plan, hashes, emit)
        if left is not None:
            with disk_errors(left):
                left.unlink()
            emit(Notice(f"removed {left}, the second half of the file that was replaced"))
        return files
    staged = staged_folder(request.out, overwrite=request.overwrite, sources=plan.sources)
    with staged as folder, _told_as(request.out, folder):
        return _write_folder(plan, folder, hashes, emit)


def _left_half(plan: ConvertPlan) -> Path | None:
    """The second file of an adapter that is replaced by a file without one: alone it is of no use."""
    main = plan.request.out
    half = main.with_name(f"{main.stem}.patch{SUFFIX}")
    if plan.companion or not main.exists() or not half.is_file():
        return None
    try:
        first = read_header(half).metadata.get(COMPANION_OF)
    except UnusableWeights:
        return None  # none of ours
    return half if first == main.name else None


def _write_file(plan: ConvertPlan, hashes: FileHashes, emit: Emit) -> list[str]:
    """The main file and, if it has one, its companion, which gets its name first: a file that names a
    companion always has it. A new companion goes again where the main file cannot get its name."""
    main, names = plan.request.out, [name for name in (plan.companion, plan.main) if name]
    replaces = plan.request.overwrite
    named: list[Path] = []
    with ExitStack() as stack:
        # The stack unwinds backwards: what is entered last is renamed first.
        stack.enter_context(removed_after_failure(named))
        places = [stack.enter_context(atomic_path(main, replace=replaces))]
        if plan.companion:
            half = main.with_name(plan.companion)
            if not replaces:
                stack.push(lambda kind, *_: named.append(half) if kind is None else None)
            places.append(stack.enter_context(atomic_path(half, replace=replaces)))
        for name, place in zip(names, reversed(places), strict=True):
            with _told_as(main.with_name(name), place):
                _write_tensors(plan, place, name == plan.companion, hashes, emit)
    return names


@contextmanager
def _told_as(final: Path, temporary: Path) -> Iterator[None]:
    """Errors about a temporary file, or what lies in a temporary folder, speak of the final one."""
    try:
        yield
    except AvatarctlError as error:
        if isinstance(error.where, Path) and error.where.is_relative_to(temporary):
            error.where = final / error.where.relative_to(temporary)
        raise
    except OSError as error:
        if isinstance(error.filename, str | Path) and Path(error.filename).is_relative_to(temporary):
            error.filename = str(final)
        raise


def _write_folder(plan: ConvertPlan, folder: Path, hashes: FileHashes, emit: Emit) -> list[str]:
    names = []
    if plan.companion:
        _write_tensors(plan, folder / plan.companion, True, hashes, emit)
        names.append(plan.companion)
    if plan.request.shard_bytes is None:
        _write_tensors(plan, folder / plan.main, False, hashes, emit)
        names.append(plan.main)
    else:
        written = write_sharded(
            folder,
            plan.main.removesuffix(SUFFIX),
            plan.export.tensors,
            _metadata(plan, companion=False),
            plan.request.shard_bytes,
            allow_nonfinite=plan.request.allow_nonfinite,
            sources=plan.sources,
            hashes=hashes,
            progress=lambda done: emit(BytesMoved(plan.request.out.name, done, plan.bytes)),
        )
        names += [path.name for path in written]
    for name, document in plan.export.documents.items():
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        atomic_write_text(folder / name, text + "\n")
        names.append(name)
    return names


def _write_tensors(plan: ConvertPlan, path: Path, companion: bool, hashes: FileHashes, emit: Emit) -> None:
    tensors = plan.export.companion if companion else plan.export.tensors
    before = 0
    if not companion:
        before = sum(tensor.info.nbytes for tensor in plan.export.companion.values())
    write_safetensors(
        path,
        tensors,
        _metadata(plan, companion=companion),
        allow_nonfinite=plan.request.allow_nonfinite,
        sources=plan.sources,
        hashes=hashes,
        progress=lambda done: emit(BytesMoved(plan.request.out.name, before + done, plan.bytes)),
    )


def _metadata(plan: ConvertPlan, *, companion: bool) -> dict[str, str]:
    extra = {} if companion else dict(plan.export.metadata)
    if plan.companion:
        extra |= (
            {"avatarctl.companion_of": plan.main} if companion else {"avatarctl.companion": plan.companion}
        )
    return file_metadata(plan.weight_file, plan.operations, extra)
