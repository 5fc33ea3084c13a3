"""Preparation: videos become samples, and of every sample each artifact is made once.

One clip goes through a network at a time and the number of threads is fixed, so neither shards, nor reading
processes, nor where a run was interrupted can change a bit. One sample that fails does not end a run: what it
was is said at once, in the report, and by the exit code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from avatarctl.atomic import ensure_writable_folder, remove_left_behind
from avatarctl.config import RunConfig
from avatarctl.config.rules import FACE_WORDS
from avatarctl.data.aligned import AlignedFaces
from avatarctl.data.checking import Checked, Checker, Todo, run_mask
from avatarctl.data.encoders import Encoders
from avatarctl.data.known import Known
from avatarctl.data.media import bytes_facts, cut_source, read_sample, stated_size
from avatarctl.data.report import Done, write_index, write_report
from avatarctl.data.samples import OWN, Sample, find_samples
from avatarctl.data.storing import Store
from avatarctl.data.windows import (
    VIDEO_SUFFIXES,
    Cutting,
    RawVideo,
    find_videos,
    fingerprints,
    has_record,
    recorded,
    samples_of,
)
from avatarctl.data.workers import Outcome, encoding_threads, run_jobs
from avatarctl.errors import (
    AvatarctlError,
    Interrupted,
    OutputRefused,
    PartlyFailed,
    UnusableFile,
    UsageError,
    WriteFailed,
    under_name,
)
from avatarctl.events import Emit, Notice, SampleFinished, Stage
from avatarctl.family import TrainableFamily
from avatarctl.files.named_path import expanded
from avatarctl.registry import Row

if TYPE_CHECKING:
    from avatarctl.data.faces import FacePlan
    from avatarctl.loading.modules import Part

__all__ = ["Command", "Preparation", "Summary"]

Command = Literal["precompute-audio", "precompute-latents"]


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Summary:
    """What a run did: numbers of samples, the report's path, seconds."""

    done: int
    skipped: int
    failed: int
    sources: int
    report: Path
    seconds: float


class Preparation:
    """One command on one data set.

    Raises UsageError for settings without sense, PathNotFound and UnusableFile for the data set,
    WeightsMissing unless `check` is false.
    """

    def __init__(
        self,
        command: Command,
        cfg: RunConfig,
        row: Row,
        family: TrainableFamily,
        emit: Emit,
        *,
        dry_run: bool = False,
    ) -> None:
        self.command, self.cfg, self.row, self.family, self._emit = command, cfg, row, family, emit
        if cfg.data.path is None:
            raise UsageError("which data set?", where="data.path", fix="give it by --data")
        self.path = expanded(cfg.data.path)
        part, parts = _shard(cfg.data.shard)
        self._part, self._parts = part, parts
        self.raws = self._find_videos()
        own = self.path / OWN if self.raws is not None else None
        self.data = None if own else find_samples(self.path, cfg.data.audio_name, emit)
        self.own = own or self.data.own  # type: ignore[union-attr]
        self.base = self.path if own else self.data.base  # type: ignore[union-attr]
        stem = command if cfg.data.shard is None else f"{command}-{part}-of-{parts}"
        self._stem = stem
        self.known = Known(self.own / "known", self.base, stem, keep=not dry_run)
        of_audio = command == "precompute-audio"
        self.artifacts = tuple(each for each in family.artifacts(cfg) if (each.part == "audio") == of_audio)
        self._faces = self._face_plan()
        self._cut_as: set[str] = set()  # fingerprints of the sources that samples are of
        self._doubts: dict[str, tuple[float, ...]] = {}  # about the faces of samples, see `draw_face_sheet`
        needed: tuple[Part, ...] = tuple(dict.fromkeys(each.part for each in self.artifacts))
        self.encoders = Encoders(row, cfg, needed, self.known, emit, check=not dry_run)

    def run(self, should_stop: Callable[[], bool] = _never) -> Summary:
        """Does it. Raises Interrupted, WriteFailed and OutputRefused at once; when all is done PartlyFailed
        or UnusableFile, where samples failed or all of them did."""
        started = time.monotonic()
        ensure_writable_folder(self.own)
        for folder in (self.base, self.own, self.own / "prompts", self.own / "constants"):
            for line in remove_left_behind(folder):
                self._emit(Notice(line))
        results: list[Done] = []
        try:
            with encoding_threads(), self.known:
                samples = self._samples(results, should_stop)
                results += self._prepare(samples, should_stop)
        except BaseException:
            if results:
                write_report(self.own, self._stem, results)
            raise
        whole = self.raws is None and self._parts == 1
        write_index(self.own, results, {each.name for each in self.artifacts}, whole=whole)
        report = write_report(self.own, self._stem, results)
        return _summary(results, report, time.monotonic() - started)

    def plan(self) -> tuple[list[RawVideo], list[Checked]]:
        """What `--dry-run` counts: sources to cut, and samples with what they lack."""
        checker = self._checker(tidy=False)
        if self.raws is None:
            assert self.data is not None
            return [], [checker.check(sample) for sample in self.data.samples[self._part :: self._parts]]
        waiting, checked = [], []
        for raw in self.raws:
            record = None if self.cfg.data.force else self._finished(raw)
            if record is None:
                waiting.append(raw)
            else:
                samples = samples_of(self.path, raw, record, self.cfg.data.audio_name)
                checked += [checker.check(sample) for sample in samples]
        return waiting, checked

    def doubt_world(self) -> None:
        """Says once that a model of a drawn world is of no use for people: where a video has another size
        than that world's clips have, which are taken without a word."""
        if not self.row.world or self.command != "precompute-latents":
            return
        of_data = self.data.samples if self.data is not None else ()
        sizes = (stated_size(each.video) for each in (*(self.raws or ()), *of_data) if each.problem is None)
        if any(size is not None and size not in self.row.trained_for.sizes for size in sizes):
            use = "latents that it makes of people are of no use to other models (--model names one)"
            self._emit(Notice(f"{self.row.scope}; {use}", "warning"))

    def _finished(self, raw: RawVideo) -> dict[str, Any] | None:
        """The record of a source that is cut already; what is wrong with one comes to light when it is read.
        A source that nobody has cut is not hashed for this: it may be large."""
        try:
            return recorded(self.path, raw, self._prints(raw)[0]) if has_record(self.path, raw) else None
        except AvatarctlError:
            return None

    @property
    def cutting(self) -> Cutting:
        """How sources are cut. Windows follow each other unless a stride is given."""
        data = self.cfg.data
        assert data.num_frames is not None and data.height is not None and data.width is not None
        window = data.window or data.num_frames
        return Cutting(
            window=window,
            stride=data.stride or window,
            max_windows=data.max_windows,
            size=(data.height, data.width),
            fit=self.cfg.input.fit,
            audio_name=data.audio_name,
            references=data.references > 0,
            faces=self._faces,
        )

    def _face_plan(self) -> FacePlan | None:
        """Samples that are cut already are taken as they are; who named a table is told so."""
        faces = self.cfg.data.faces
        if self.raws is None and faces is not None and faces not in FACE_WORDS:
            line = "data.faces is read where videos are cut (--from-videos); samples are taken as they are"
            self._emit(Notice(line, "warning"))
        if self.raws is None or faces in (None, "none"):
            return None
        from avatarctl.data.faces import face_plan

        return face_plan(self.cfg, self.family)

    def _find_videos(self) -> list[RawVideo] | None:
        if self.cfg.data.videos is None:
            return None
        if self.path.exists() and not self.path.is_dir():
            raise UsageError("is not a folder, and samples become folders", where=self.path)
        source = expanded(self.cfg.data.videos)
        if source.suffix.lower() in VIDEO_SUFFIXES and source.is_file():
            raise UsageError("is one video", where=source, fix="name its folder, or a list of videos")
        home = source if source.is_dir() else source.parent
        if home.resolve() == self.path.resolve():
            raise UsageError(
                "samples cannot lie among their videos", where="--data", fix="name another folder"
            )
        found = find_videos(source, self.cfg.input.prompt or "")
        return found[self._part :: self._parts]

    def _checker(self, *, tidy: bool = True) -> Checker:
        shared = (self.artifacts, self.encoders, self.known, self.own, self._emit)
        return Checker(self.cfg, self.family, *shared, tidy=tidy)

    def _samples(self, results: list[Done], should_stop: Callable[[], bool]) -> list[Sample]:
        if self.raws is None:
            assert self.data is not None
            return list(self.data.samples[self._part :: self._parts])
        self._emit(Stage("cutting samples out of videos"))
        samples: list[Sample] = []
        for done, found in self._cut(should_stop):
            results.append(done)
            samples += found
        if self._faces is not None and samples:
            self._show_faces(samples)
        return samples

    def _show_faces(self, samples: list[Sample]) -> None:
        """The contact sheet; `_cut` has removed one that shows less than there is, should this be stopped."""
        from avatarctl.data.face_sheet import draw_face_sheet

        draw_face_sheet(self._sheet, samples, run_mask(self.cfg), sorted(self._cut_as), self._doubts)
        self._emit(Notice(f"faces: {self._sheet}"))

    @property
    def _sheet(self) -> Path:
        return self.own / f"{self._stem.replace(self.command, 'faces')}.png"

    def _cut(self, should_stop: Callable[[], bool]) -> Iterator[tuple[Done, list[Sample]]]:
        assert self.raws is not None
        waiting: list[tuple[RawVideo, str, str]] = []
        for raw in self.raws:
            try:
                whole, each = self._prints(raw)
                record = recorded(self.path, raw, whole)
            except AvatarctlError as problem:
                yield self._failed(Done(raw.name, "failed", kind="source"), problem), []
                continue
            if record is not None and not self.cfg.data.force:
                yield self._source(raw, record, "skipped", 0.0)
            else:
                waiting.append((raw, whole, each))
        if waiting:
            self._sheet.unlink(missing_ok=True)
        jobs = ((cut_source, (self.path, *each, self.cutting)) for each in waiting)
        clock = _Clock(len(waiting), self._emit, "video")
        outcomes = run_jobs(jobs, self.cfg.data.workers)
        for (raw, _, _), outcome in self._stopping(zip(waiting, outcomes, strict=True), should_stop):
            seconds = clock.lap()
            if isinstance(outcome.problem, (WriteFailed, OutputRefused)):
                raise outcome.problem  # of the disk, not of the video: the others would meet it too
            if outcome.problem is None:
                done, samples = self._source(raw, outcome.value, "done", seconds)
            else:
                failed = Done(raw.name, "failed", seconds=seconds, kind="source")
                done, samples = self._failed(failed, outcome.problem), []
            clock.tell(raw.name, failed=done.state == "failed")
            yield done, samples

    def _prints(self, raw: RawVideo) -> tuple[str, str]:
        from avatarctl.errors import UnusableAudio, UnusableVideo
        from avatarctl.media.files import check_regular_file

        if raw.problem is not None:
            raise raw.problem
        check_regular_file(raw.video, UnusableVideo)
        files = [raw.video]
        if raw.audio is not None:
            files.append(check_regular_file(raw.audio, UnusableAudio))
        hashes = [self.known.facts(path, "bytes", bytes_facts)["sha256"] for path in files]
        return fingerprints(raw, hashes[0], hashes[1] if len(hashes) > 1 else "", self.cutting)

    def _source(
        self, raw: RawVideo, record: dict[str, Any], state: Literal["done", "skipped"], seconds: float
    ) -> tuple[Done, list[Sample]]:
        for warning in record["warnings"] if state == "done" else ():
            self._emit(Notice(f"{raw.name}: {warning}", "warning"))
        self._cut_as.add(record["fingerprint"])
        facts = {"windows": record["windows"], "cuts": record["cuts"]}
        if "faces" in record:
            facts |= {"face_share": record["faces"]["share"], "faces": record["faces"]}
        done = Done(raw.name, state, "", record["frames"], seconds, "source", facts=facts)
        samples = list(samples_of(self.path, raw, record, self.cfg.data.audio_name))
        doubts = record.get("faces", {}).get("doubts", [])
        self._doubts |= {each.name: tuple(doubt) for each, doubt in zip(samples, doubts, strict=False)}
        return done, samples

    def _prepare(self, samples: list[Sample], should_stop: Callable[[], bool]) -> Iterator[Done]:
        checker = self._checker()
        store = Store(self.cfg, self.artifacts, self.known, self.own)
        self._emit(Stage("looking at samples"))
        waiting: list[Todo] = []
        failed: set[str] = set()
        prompts: list[tuple[Sample, str]] = []
        aligned = AlignedFaces(self.cfg, self.family, self.known, self._emit)
        for sample in self._stopping(samples, should_stop):
            checked = checker.check(sample)
            prompts.append((sample, checked.prompt))
            if checked.problem is not None:
                failed.add(sample.name)
                yield self._failed(Done(sample.name, "failed"), checked.problem)
            elif checked.todo is None:
                yield Done(sample.name, "skipped", "", checked.frames, artifacts=checked.makings())
            elif (problem := self._unaligned(aligned, sample)) is not None:
                failed.add(sample.name)
                yield self._failed(Done(sample.name, "failed"), problem)
            else:
                waiting.append(checked.todo)
        aligned.conclude()
        if len(failed) == len(samples):
            return
        self._constants(checker, store)
        clock = _Clock(len(waiting), self._emit, "sample")
        read = run_jobs((self._reading(todo) for todo in waiting), self.cfg.data.workers)
        for todo, outcome in self._stopping(zip(waiting, read, strict=True), should_stop):
            done = self._encode(todo, outcome, checker, store)
            done = replace(done, seconds=clock.lap())
            clock.tell(todo.sample.name, failed=done.state == "failed")
            if done.state == "failed":
                failed.add(todo.sample.name)
            yield done
        if failed:
            yield from self._shared_prompts([each for each in samples if each.name not in failed], store)
        for sample, prompt in prompts:
            if sample.name not in failed:
                store.show_prompt(sample, prompt)

    def _unaligned(self, aligned: AlignedFaces, sample: Sample) -> AvatarctlError | None:
        """What audio is made of needs no face."""
        return aligned.problem(sample) if self.command == "precompute-latents" else None

    def _shared_prompts(self, samples: list[Sample], store: Store) -> Iterator[Done]:
        """Encodes prompts that a sample was to have encoded which then failed, for others that have them."""
        checker = self._checker()
        prompts = {each.name for each in self.artifacts if each.of == "prompt"}
        for sample in samples if prompts else ():
            todo = checker.check(sample).todo
            names = () if todo is None else tuple(name for name in todo.names if name in prompts)
            if todo is None or not names:
                continue
            todo = replace(todo, names=names, ranges=((0, 0),), masks=())
            (read,) = run_jobs([self._reading(todo)], 0)
            done = self._encode(todo, read, checker, store)
            if done.state == "failed":
                yield done

    def _reading(self, todo: Todo) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return read_sample, (todo.sample, todo.ranges, self.cutting.size, self.cfg.input.fit, todo.masks)

    def _encode(self, todo: Todo, read: Outcome, checker: Checker, store: Store) -> Done:
        try:
            if read.problem is not None:
                raise read.problem
            with checker.clip(todo, *read.value) as clip:
                modules: Any = self.encoders.modules
                made = self.family.encode_clip(modules, clip, todo.names, self.cfg)
            store.write(todo, made)
        except (WriteFailed, OutputRefused):
            raise  # of the disk, not of the sample: the others would meet it too
        except AvatarctlError as problem:
            return self._failed(Done(todo.sample.name, "failed", frames=todo.frames), problem)
        return Done(todo.sample.name, "done", "", todo.frames, artifacts=checker.makings_of(todo))

    def _constants(self, checker: Checker, store: Store) -> None:
        wanted = checker.missing_constants()
        if not wanted:
            return
        assert self.cfg.data.num_frames is not None
        names = tuple(wanted)
        modules: Any = self.encoders.modules
        made = self.family.constants(modules, self.cfg.data.num_frames, names, self.cfg)
        store.write_constants(wanted, made)

    def _failed(self, done: Done, problem: AvatarctlError) -> Done:
        self._emit(Notice(under_name(done.name, problem), "warning"))
        return replace(done, state="failed", reason=str(problem))

    def _stopping(self, items: Any, should_stop: Callable[[], bool]) -> Iterator[Any]:
        for item in items:
            if should_stop():
                raise Interrupted("stopped", fix="the same command goes on where it was")
            yield item


class _Clock:
    """Progress of one stage: seconds of each, and those that are left."""

    def __init__(self, total: int, emit: Emit, what: Literal["sample", "video"]) -> None:
        self._total, self._emit, self._what = total, emit, what
        self._begun = self._last = time.monotonic()
        self._done = self._failed = 0

    def lap(self) -> float:
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        return round(seconds, 3)

    def tell(self, name: str, *, failed: bool) -> None:
        self._done += 1
        self._failed += failed
        left = (self._last - self._begun) / self._done * (self._total - self._done)
        self._emit(SampleFinished(name, self._what, self._done, self._total, self._failed, left))


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    part, _, parts = text.partition("/")
    return int(part), int(parts)


def _summary(results: list[Done], report: Path, seconds: float) -> Summary:
    count = {
        state: sum(each.state == state for each in results if each.kind == "sample") for state in _STATES
    }
    sources = sum(each.kind == "source" for each in results)
    failed_sources = sum(each.kind == "source" and each.state == "failed" for each in results)
    failed = count["failed"] + failed_sources
    good = count["done"] + count["skipped"]
    if failed:
        first = next(each for each in results if each.state == "failed")
        named = first.name in first.reason.partition(": ")[0]  # a path that ends so
        where = f"the first: {first.reason if named else f'{first.name}: {first.reason}'}"
        if not good:
            raise UnusableFile(f"no samples could be used: {where}", fix=f"all are in {report}")
        numbers = (failed_sources, sources, "video"), (count["failed"], count["failed"] + good, "sample")
        parts = [f"{bad} of {of} {what}{'' if of == 1 else 's'}" for bad, of, what in numbers if bad]
        raise PartlyFailed(f"{' and '.join(parts)} failed; {where}", fix=f"all are in {report}")
    return Summary(count["done"], count["skipped"], failed, sources, report, seconds)


_STATES: Final = ("done", "skipped", "failed")
