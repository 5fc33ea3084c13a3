"""One weight file or folder to another: read, merge or extract, channels, dtype, names, write.

Headers decide everything first; then one block of one tensor at a time is read, changed and written. An
extraction is the exception: it computes one pair of matrices after another and holds the adapter.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from avatarctl.atomic import atomic_path, atomic_write_text, disk_errors, ensure_writable_folder
from avatarctl.errors import AvatarctlError, OutputRefused, UnusableWeights, UsageError
from avatarctl.events import BytesMoved, Emit, Notice, Stage
from avatarctl.pipelines.convert_steps import (
    Step,
    change_channels,
    change_dtype,
    extract,
    merge,
    plain_name,
    state_audio_offset,
)
from avatarctl.weights.assemble import require_whole
from avatarctl.weights.checkpoint import Checkpoint
from avatarctl.weights.describe import NAMINGS
from avatarctl.weights.export import Export, Target, export, with_release_config
from avatarctl.weights.files.safetensors_file import read_header
from avatarctl.weights.files.source import COMPANION_OF
from avatarctl.weights.files.staging import refuse_folder
from avatarctl.weights.files.writer import (
    require_space,
    shard_names,
    staged_folder,
    write_safetensors,
    write_sharded,
)
from avatarctl.weights.metadata import config_of, file_metadata, read_own
from avatarctl.weights.recognise import read_checkpoint
from avatarctl.weights.tensors import Tensor

__all__ = [
    "ConvertPlan",
    "ConvertRequest",
    "Converted",
    "plan_conversion",
    "preview_conversion",
    "write",
]

_SUFFIX: Final = ".safetensors"
_OTHER_SUFFIXES: Final = (".pt", ".pth", ".bin", ".ckpt", ".gguf", ".json", ".zip")


@dataclass(frozen=True)
class ConvertRequest:
    """What is asked.

    out: a name that ends in .safetensors is a file, any other a folder. base: for merge or extract. rank: of
    an extraction, None for what the difference needs. shard_bytes, dtype ("BF16"): None keeps what is
    there. audio_offset: states what no tensor tells. allow_nonfinite: write NaN and infinity instead of
    refusing them.
    """

    source: Path
    out: Path
    to: Target = "original"
    channels: int | None = None
    drop_channels: bool = False
    base: Path | None = None
    merge: bool = False
    strength: float = 1.0
    extract: bool = False
    rank: int | None = None
    shard_bytes: int | None = None
    dtype: str | None = None
    audio_offset: int | None = None
    allow_nonfinite: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class ConvertPlan:
    """What will be written. did: one line for each step; operations: the same for the metadata."""

    request: ConvertRequest
    checkpoint: Checkpoint
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

    def _tensors(self) -> list[Tensor]:
        return [*self.export.tensors.values(), *self.export.companion.values()]

    @property
    def companion(self) -> str:
        """Plain name of the second file, empty if there is none."""
        stem = self.main.removesuffix(_SUFFIX)
        return f"{stem}.patch{_SUFFIX}" if self.export.companion else ""

    @property
    def main(self) -> str:
        """Plain name of the main file."""
        return self.request.out.name if _is_file(self.request.out) else self.export.name


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
    checkpoint = source
    steps: list[Step] = []
    if base is not None:
        operations = [*read_own(base.metadata).operations, *operations]
        steps.append(
            merge(source, base, request.strength, "F32" if request.dtype else None, emit)
            if request.merge
            else extract(source, base, request.rank, request.to, emit)
        )
        checkpoint = steps[-1].checkpoint
    if request.channels is not None:
        steps.append(change_channels(checkpoint, request.channels, drop=request.drop_channels))
        checkpoint = steps[-1].checkpoint
    if request.dtype is not None:
        steps.append(change_dtype(checkpoint, request.dtype, base, source))
        checkpoint = steps[-1].checkpoint
    if request.audio_offset is not None:
        steps.append(state_audio_offset(checkpoint, request.audio_offset))
        checkpoint = steps[-1].checkpoint
    did += [step.line for step in steps]
    if checkpoint.audio_offset_assumed:
        did.append(
            f"audio offset {checkpoint.audio_offset} is assumed, not written: {checkpoint.audio_offset_rule} "
            "(--audio-offset states it)"
        )
    operations += [step.operation for step in steps if step.operation]
    operations.append({"operation": "write", "to": request.to, "source": plain_name(source)})
    checkpoint = with_release_config(checkpoint)
    exported = export(checkpoint, request.to)
    _check_layout(request, checkpoint, exported)
    plan = ConvertPlan(request, checkpoint, exported, sources, (*did, *exported.notes), tuple(operations))
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
            stem = plan.main.removesuffix(_SUFFIX)
            main = shard_names(stem, plan.export.tensors, request.shard_bytes)
        documents = [] if _is_file(request.out) else plan.export.documents
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


def _open(request: ConvertRequest) -> tuple[Checkpoint, Checkpoint | None, tuple[Path, ...]]:
    """Source, base, and every file that is read, after all checks that need no tensor."""
    _check_names(request)
    _check_place(request)
    source = _read(request.source)
    base = _read(request.base) if request.base is not None else None
    sources = tuple(dict.fromkeys((*source.files, *(base.files if base else ()))))
    _check_overlap(request, sources)
    if request.extract and base and request.to == "comfyui" and source.layout.family != base.layout.family:
        _check_companion(request)  # the audio layers will be in it: known before hours of computation
    return source, base, sources


def _read(path: Path) -> Checkpoint:
    """A transformer or an adapter of one, complete."""
    checkpoint = read_checkpoint(path)
    if checkpoint.kind == "component" or not checkpoint.layout.supported:
        raise UnusableWeights(
            f"is {checkpoint.variant}: only Wan and OmniAvatar transformers are converted",
            where=path,
            fix="--inspect shows what it holds",
        )
    try:
        require_whole(checkpoint)
        return replace(checkpoint, config=config_of(checkpoint))
    except UnusableWeights as error:  # damaged metadata of our own
        if error.where is None:
            error.where = path
        raise


def _described(checkpoint: Checkpoint) -> str:
    scale = f"; scale: {checkpoint.scale_rule}" if checkpoint.low_rank else ""
    return f"{checkpoint.variant}, {NAMINGS[checkpoint.naming]}{scale}"


# What is asked


def _is_file(out: Path) -> bool:
    return out.suffix == _SUFFIX


def _check_names(request: ConvertRequest) -> None:
    out = request.out
    if out.suffix.lower() in _OTHER_SUFFIXES:
        raise UsageError(
            f"{out.suffix} files are not written",
            where="--out",
            fix="name a .safetensors file or a folder",
        )
    if out.suffix.lower() == _SUFFIX and not _is_file(out):
        raise UsageError(f"the suffix is {_SUFFIX}, in lower case", where="--out")
    if _is_file(out) and request.shard_bytes is not None:
        raise UsageError(
            "shards need a folder", where="--shard-size", fix=f"--out {out.with_suffix('').name}"
        )
    if _is_file(out) and request.to in ("diffusers", "peft"):
        raise UsageError(
            f"{request.to} reads a folder, not one file",
            where="--out",
            fix=f"--out {out.with_suffix('').name}",
        )
    if request.to == "comfyui" and request.shard_bytes is not None:
        raise UsageError("ComfyUI reads one file, not shards", where="--shard-size")


def _outputs(request: ConvertRequest) -> list[Path]:
    """Where something may come to stand."""
    out = request.out
    return [out, out.with_name(f"{out.stem}.patch{_SUFFIX}")] if _is_file(out) else [out]


def _check_place(request: ConvertRequest) -> None:
    """Before anything is read, and leaving nothing behind; the writer looks again."""
    out = request.out
    folder = out.absolute().parent
    with disk_errors(out):
        there = folder.is_dir()
    if not there:
        raise OutputRefused(f"the folder {folder} does not exist", where=out, fix="make it first")
    if _same(out, request.source):
        raise OutputRefused("is what is read", where=out, fix="choose another --out")
    if _is_file(out):
        for path in _outputs(request):
            _refuse_file(path, overwrite=request.overwrite or path != out)  # perhaps there is no second file
    else:
        refuse_folder(out, overwrite=request.overwrite)
        if out.is_dir():
            ensure_writable_folder(out)  # what is in it will have to go
    ensure_writable_folder(folder)


def _refuse_file(path: Path, *, overwrite: bool) -> None:
    with disk_errors(path), suppress(FileNotFoundError):  # nothing there, or a link that leads nowhere
        mode = path.stat().st_mode  # a loop of links is refused here
        if not stat.S_ISREG(mode):
            what = "is a folder, not a file" if stat.S_ISDIR(mode) else "is not a regular file"
            raise OutputRefused(what, where=path, fix="choose another --out")
    if not overwrite and os.path.lexists(path):
        raise OutputRefused("exists", where=path, fix="add --overwrite or choose another --out")


def _check_overlap(request: ConvertRequest, sources: Sequence[Path]) -> None:
    """Nothing that is read is replaced, and nothing is added to a folder that is read."""
    for path in _outputs(request):
        if any(_same(path, file) for file in sources):
            raise OutputRefused("is one of the files that are read", where=path, fix="choose another --out")
    out = _real(request.out)
    if not _is_file(request.out) and any(_real(file).is_relative_to(out) for file in sources):
        raise OutputRefused("holds files that are read", where=request.out, fix="choose another --out")
    for read in (request.source, request.base):
        if read is not None and read.is_dir() and out.is_relative_to(_real(read)):
            raise OutputRefused(
                f"lies inside {read}, which is read", where=request.out, fix="choose another --out"
            )


def _same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file, links included."""
    try:
        return one.samefile(other)
    except OSError:  # one is not there, or no name at all: for the reader or writer to tell
        return _real(one) == _real(other)


def _real(path: Path) -> Path:
    """`Path.resolve` raises RuntimeError for a loop of links, which is for the reader or writer to tell."""
    return Path(os.path.realpath(path))


def _check_layout(request: ConvertRequest, checkpoint: Checkpoint, exported: Export) -> None:
    if request.shard_bytes is not None and checkpoint.kind == "adapter":
        raise UsageError("adapters are one file, never shards", where="--shard-size")
    if exported.companion:
        _check_companion(request)


def _check_companion(request: ConvertRequest) -> None:
    """Where it is known that there will be a second file."""
    if _is_file(request.out):
        _refuse_file(_outputs(request)[1], overwrite=request.overwrite)


# Writing


def write(plan: ConvertPlan, emit: Emit) -> Converted:
    """Writes the files of a plan, all of them or none.

    Raises OutputRefused, WriteFailed, and UnusableWeights for NaN, infinity and files that end early.
    """
    started = time.monotonic()
    request = plan.request
    emit(Stage("writing"))
    if _is_file(request.out):
        left = _left_half(plan)
        files = _write_file(plan, emit)
        if left is not None:
            with disk_errors(left):
                left.unlink()
            emit(Notice(f"removed {left}, the second half of the file that was replaced"))
    else:
        staged = staged_folder(request.out, overwrite=request.overwrite, sources=plan.sources)
        with staged as folder, _told_as(request.out, folder):
            files = _write_folder(plan, folder, emit)
    return Converted(request.out, tuple(files), plan.count, plan.bytes, time.monotonic() - started, plan.did)


def _left_half(plan: ConvertPlan) -> Path | None:
    """The second file of an adapter that is replaced by a file without one: alone it is of no use."""
    main = plan.request.out
    half = main.with_name(f"{main.stem}.patch{_SUFFIX}")
    if plan.companion or not main.exists() or not half.is_file():
        return None
    try:
        first = read_header(half).metadata.get(COMPANION_OF)
    except UnusableWeights:
        return None  # none of ours
    return half if first == main.name else None


def _write_file(plan: ConvertPlan, emit: Emit) -> list[str]:
    """The main file and, if it has one, its companion, which gets its name first: a file that names a
    companion always has it. A new companion goes again where the main file cannot get its name."""
    main, names = plan.request.out, [name for name in (plan.companion, plan.main) if name]
    replaces = plan.request.overwrite
    named: list[Path] = []
    with ExitStack() as stack:
        # The stack unwinds backwards: what is entered last is renamed first.
        stack.enter_context(_removed_after_failure(named))
        places = [stack.enter_context(atomic_path(main, replace=replaces))]
        if plan.companion:
            half = main.with_name(plan.companion)
            if not replaces:
                stack.push(lambda kind, *_: named.append(half) if kind is None else None)
            places.append(stack.enter_context(atomic_path(half, replace=replaces)))
        for name, place in zip(names, reversed(places), strict=True):
            with _told_as(main.with_name(name), place):
                _write_tensors(plan, place, name == plan.companion, emit)
    return names


@contextmanager
def _removed_after_failure(files: Sequence[Path]) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for path in files:
            with suppress(OSError):  # the first error is the one to tell
                path.unlink(missing_ok=True)
        raise


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


def _write_folder(plan: ConvertPlan, folder: Path, emit: Emit) -> list[str]:
    names = []
    if plan.companion:
        _write_tensors(plan, folder / plan.companion, True, emit)
        names.append(plan.companion)
    if plan.request.shard_bytes is None:
        _write_tensors(plan, folder / plan.main, False, emit)
        names.append(plan.main)
    else:
        written = write_sharded(
            folder,
            plan.main.removesuffix(_SUFFIX),
            plan.export.tensors,
            _metadata(plan, companion=False),
            plan.request.shard_bytes,
            allow_nonfinite=plan.request.allow_nonfinite,
            sources=plan.sources,
            progress=lambda done: emit(BytesMoved(plan.request.out.name, done, plan.bytes)),
        )
        names += [path.name for path in written]
    for name, document in plan.export.documents.items():
        text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
        atomic_write_text(folder / name, text + "\n")
        names.append(name)
    return names


def _write_tensors(plan: ConvertPlan, path: Path, companion: bool, emit: Emit) -> None:
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
        progress=lambda done: emit(BytesMoved(plan.request.out.name, before + done, plan.bytes)),
    )


def _metadata(plan: ConvertPlan, *, companion: bool) -> dict[str, str]:
    extra = {} if companion else dict(plan.export.metadata)
    if plan.companion:
        extra |= (
            {"avatarctl.companion_of": plan.main} if companion else {"avatarctl.companion": plan.companion}
        )
    return file_metadata(plan.checkpoint, plan.operations, extra)
