"""Samples as training reads them: artifacts from their files, what is missing made on the way.

Everything is looked at before the first step. What a sample lacks is encoded when its turn comes, by the
function that preparation calls, and rounded as files are: a set trains alike, prepared or not. As much of it
as has room in memory is kept for the next turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from avatarctl.config import RunConfig
from avatarctl.data.artifacts import rounded
from avatarctl.data.checking import Checked, Checker, Todo, artifact_path, audio_of, constant_path, run_mask
from avatarctl.data.encoders import Encoders
from avatarctl.data.known import Known
from avatarctl.data.media import ReadFrames, read_sample, video_facts
from avatarctl.data.samples import Sample, find_samples, prompt_of
from avatarctl.data.workers import Outcome, encoding_threads, run_jobs
from avatarctl.errors import (
    AvatarctlError,
    Interrupted,
    UnusableAudio,
    UnusableFile,
    UnusableVideo,
    under_name,
)
from avatarctl.events import Emit, Notice, Stage
from avatarctl.family import Artifact, TrainableFamily
from avatarctl.files.named_path import expanded
from avatarctl.files.pickle_file import read_pickle
from avatarctl.files.safetensors_file import read_header
from avatarctl.files.tensors import read_whole, to_float32
from avatarctl.media import Waveform, fitted_matrix, open_audio
from avatarctl.registry import Row
from avatarctl.timeline import SAMPLES_PER_FRAME, frames_of_samples

if TYPE_CHECKING:
    from torch import Tensor

    from avatarctl.loading.modules import Part

__all__ = ["ToFace", "TrainingData", "TrainingSample", "TrainingSet", "require_going"]

_KEPT_BYTES: Final = 256 << 20
"""Of what was encoded while training, in memory: all of a small set, and of a large one its first samples."""
_NAMED: Final = 5
"""Samples that cannot be used and are named each; one setting may be wrong for ten thousand."""


def _never() -> bool:
    return False


def require_going(should_stop: Callable[[], bool]) -> None:
    """Raises Interrupted once somebody asked for an end; before training, when there is nothing to save."""
    if should_stop():
        fix = "the same command with --resume auto goes on"
        raise Interrupted("stopped before training began", fix=fix)


@dataclass(frozen=True)
class TrainingSample:
    """A sample that was read: artifacts by name, float32 without a batch; frames: pixel frames of its clip;
    waveform: its audio at 16 kHz for these frames, [640 frames], where it was asked for; to_face: how these
    frames become aligned faces, where that was asked for."""

    name: str
    tensors: Mapping[str, Tensor]
    frames: int
    waveform: Tensor | None = None
    to_face: ToFace | None = None


@dataclass(frozen=True)
class ToFace:
    """Frames of a clip, as large as training has them, to aligned faces. matrices: float32 [frames, 2, 3],
    see `perception.align`; resolution: of the aligned face."""

    matrices: Tensor
    resolution: int

    def __call__(self, frames: Tensor, first: int) -> Tensor:
        """[1, 3, n, H, W] in [-1, 1], the clip's frames from `first` on -> [1, 3, n, resolution, resolution],
        with a gradient; grey where a face reaches beyond the frame."""
        from avatarctl.perception.align import align

        matrices = self.matrices[first : first + frames.shape[2]]
        flat = align(frames[0].transpose(0, 1), matrices, self.resolution, fill=0.0)
        return flat.transpose(0, 1)[None]


class TrainingData(Protocol):
    """What a run learns from. names: of all samples, in order, whether they can be used or not: which has
    which turn must not depend on its health; bad: why some cannot; constants: what all share, float32, there
    after `prepare`; base: what messages call the whole."""

    names: list[str]
    bad: dict[str, AvatarctlError]
    constants: dict[str, Tensor]

    @property
    def base(self) -> Path: ...

    def prepare(self) -> None:
        """Makes ready what all samples share, before the first is read."""

    def read(self, places: Iterable[int]) -> Iterator[TrainingSample | AvatarctlError]:
        """The samples at `places`, in that order, or why one cannot be used after all."""

    def exact_vae(self) -> Any:
        """The VAE in float32, for losses on its frames."""


@dataclass(frozen=True)
class _Turn:
    """What is read of a sample: files of artifacts (path, entry in it), frames to be encoded, audio."""

    files: Mapping[str, tuple[Path, str]]
    live: tuple[Any, ...] | None
    audio: Path | None


@dataclass
class TrainingSet:
    """A data set as `check` found it; samples that cannot be used are named in `bad`.

    with_audio: samples are read with their audio, and one whose clip has none, or ends before it, is bad;
    with_faces: with what aligns their faces, and one without it is bad; shortest: pixel frames that a clip
    needs. constants: artifacts of the whole set, float32, and "mask" where the run has one.
    choose: which samples of the set are meant, all unless given; encoders: those of another set, to be
    shared; instead: what is said of a bad sample; called: what messages call them. should_stop: is asked
    between samples, and between texts, as long as training has not begun.
    """

    cfg: RunConfig
    row: Row
    family: TrainableFamily
    emit: Emit
    with_audio: bool = False
    with_faces: bool = False
    shortest: int = 0
    names: list[str] = field(default_factory=list)
    bad: dict[str, AvatarctlError] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    choose: Callable[[Sequence[Sample]], tuple[Sample, ...]] | None = None
    encoders: Encoders | None = None
    instead: str = "other samples take its turns"
    called: str = "samples"
    should_stop: Callable[[], bool] = _never

    def __post_init__(self) -> None:
        assert self.cfg.data.path is not None
        self._set = find_samples(expanded(self.cfg.data.path), self.cfg.data.audio_name, self.emit)
        if self.choose is not None:
            self._set = replace(self._set, samples=self.choose(self._set.samples))
        self._known = Known(self._set.own / "known", self._set.base, "training", keep=False)
        self._artifacts = self.family.artifacts(self.cfg)
        parts: tuple[Part, ...] = tuple(dict.fromkeys(each.part for each in self._artifacts))
        own = self.encoders or Encoders(
            self.row, self.cfg, parts, self._known, self.emit, check=False, aside=True
        )
        self.encoders = self._encoders = own
        self._checker = Checker(
            self.cfg, self.family, self._artifacts, self._encoders, self._known, self._set.own, self.emit
        )
        self._checked: list[Checked] = []
        self._prompts: dict[str, Tensor] = {}
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._kept_bytes = 0

    @property
    def base(self) -> Path:
        """What names of samples are relative to."""
        return self._set.base

    @property
    def samples(self) -> list[Sample]:
        """Those of `names`, in their order."""
        return [checked.sample for checked in self._checked]

    def check(self) -> None:
        """Looks at every sample. Raises UnusableFile where none can be used, Interrupted."""
        self.emit(Stage(f"looking at {self.called}"))
        for sample in self._set.samples:
            require_going(self.should_stop)
            checked = self._checker.check(sample)
            if checked.problem is None:
                try:
                    self._require_length(checked.frames)
                    self._require_audio(checked)
                    if checked.todo is not None:
                        self._checker.require_others(checked.todo)
                    if self.with_faces:
                        self._to_face(checked)
                except AvatarctlError as unfit:
                    checked = Checked(sample, problem=unfit)
            self.names.append(sample.name)
            self._checked.append(checked)
            if checked.problem is not None:
                self.lengths.append(0)
                self.bad[sample.name] = checked.problem
                if len(self.bad) <= _NAMED:
                    self.emit(
                        Notice(f"{under_name(sample.name, checked.problem)}; {self.instead}", "warning")
                    )
            else:
                self.lengths.append(self._length(checked.frames))
        if (more := len(self.bad) - _NAMED) > 0:
            self.emit(Notice(f"{more:,} more of the {len(self.names):,} cannot be used either", "warning"))
        if len(self.bad) == len(self.names):
            first = under_name(*next(iter(self.bad.items())))
            raise UnusableFile(f"no sample could be used; the first: {first}", where=self._set.base)

    def require_encoders(self) -> None:
        """Raises WeightsMissing where something has to be encoded and its encoder is not here."""
        if self.lacking:
            self._encoders.require()

    @property
    def lacking(self) -> dict[str, int]:
        """How many samples lack each artifact, and the constants that are not there."""
        count: dict[str, int] = dict.fromkeys(self._checker.missing_constants(), 1)
        for each in self._checked:
            for name in each.todo.names if each.todo else ():
                count[name] = count.get(name, 0) + 1
        return count

    def prepare(self) -> None:
        """Reads or makes what all samples share: constants and prompts. The text encoder is dropped then.

        Raises Interrupted.
        """
        import torch

        wanted = tuple(self._checker.missing_constants())
        for artifact in (each for each in self._artifacts if each.of == "data set"):
            if artifact.name not in wanted:
                path = constant_path(self._set.own, artifact)
                self.constants[artifact.name] = torch.from_numpy(_read(path, artifact.name))
        require_going(self.should_stop)
        if wanted:
            assert self.cfg.data.num_frames is not None
            frames = self.cfg.data.num_frames
            with encoding_threads():
                made = self.family.constants(self.modules, frames, wanted, self.cfg)
            self.constants |= {name: rounded(tensor, self.cfg).float().cpu() for name, tensor in made.items()}
        self._make_prompts()
        self._encoders.modules.drop("text")
        if (mask := run_mask(self.cfg)) is not None:
            from avatarctl.conditioning.masking import mask_tensor

            self.constants["mask"] = mask_tensor(mask)

    def read(self, places: Iterable[int]) -> Iterator[TrainingSample | AvatarctlError]:
        """The samples at `places`, in that order, or why one cannot be used after all. `data.workers`
        processes read ahead; encoders run here."""
        waiting: list[int] = []

        def jobs() -> Iterator[tuple[Any, tuple[Any, ...]]]:
            for place in places:
                waiting.append(place)
                if self._checked[place].problem is None:
                    yield _read_turn, (self._turn(place), self.lengths[place])
                else:
                    yield _nothing, ()

        for outcome in run_jobs(jobs(), self.cfg.data.workers):
            place = waiting.pop(0)
            try:
                yield self._finished(place, outcome)
            except AvatarctlError as problem:
                yield problem

    def _finished(self, place: int, outcome: Outcome) -> TrainingSample:
        import torch

        checked = self._checked[place]
        if (problem := checked.problem or outcome.problem) is not None:
            raise problem
        arrays, live, audio = outcome.value
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        todo, made = checked.todo, self._kept.get(place)
        if made is None and todo is not None and live is not None:
            made = self._encoded(todo, live)
            self._keep(place, made)
        if made is not None:
            tensors |= {name: tensor.float() for name, tensor in made.items()}
        for artifact in (each for each in self._artifacts if each.of == "prompt"):
            tensors[artifact.name] = self._prompts[self._prompt(checked.sample)]
        waveform = None if audio is None else torch.from_numpy(audio)
        to_face = self._to_face(checked) if self.with_faces else None
        return TrainingSample(self.names[place], tensors, self.lengths[place], waveform, to_face)

    def _encoded(self, todo: Todo, read: tuple[ReadFrames, dict[str, np.ndarray]]) -> dict[str, Tensor]:
        names = [name for name in todo.names if self._of(name).of == "sample"]
        with encoding_threads(), self._checker.clip(todo, *read) as clip:
            made = self.family.encode_clip(self.modules, clip, names, self.cfg)
        return {name: rounded(made[name], self.cfg).cpu() for name in names}

    def _keep(self, place: int, made: dict[str, Tensor]) -> None:
        """Keeps what was encoded of a sample, as it is rounded, where there is room for it."""
        size = sum(tensor.nbytes for tensor in made.values())
        if self._kept_bytes + size <= _KEPT_BYTES:
            # Cloned, as a part of a larger tensor would keep all of it.
            self._kept[place] = {name: tensor.clone() for name, tensor in made.items()}
            self._kept_bytes += size

    def exact_vae(self) -> Any:
        """The VAE in float32, for losses on its frames."""
        return self._encoders.exact_vae()

    @property
    def modules(self) -> Any:
        """The networks that encode, each loaded when it is first touched."""
        return self._encoders.modules

    def _of(self, name: str) -> Artifact:
        return next(each for each in self._artifacts if each.name == name)

    def _turn(self, place: int) -> _Turn:
        checked = self._checked[place]
        sample, todo = checked.sample, checked.todo
        lacks = set(todo.names) if todo else set()
        files = {}
        for artifact in (each for each in self._artifacts if each.of == "sample"):
            if artifact.name in lacks:
                continue
            path = artifact_path(self._set.own, artifact, sample, "")
            if path.is_file() or artifact.older is None:
                files[artifact.name] = (path, artifact.name)
            else:
                files[artifact.name] = (sample.folder / artifact.older[0], artifact.older[1])
        live = None
        prompts = {each.name for each in self._artifacts if each.of == "prompt"}
        if todo is not None and lacks - prompts and place not in self._kept:
            data = self.cfg.data
            assert data.height is not None and data.width is not None
            size = (data.height, data.width)
            live = (sample, todo.ranges, size, self.cfg.input.fit, todo.masks)
        return _Turn(files, live, audio_of(sample) if self.with_audio else None)

    def _make_prompts(self) -> None:
        """One encoding for each text, whoever says it."""
        import torch

        artifact = next((each for each in self._artifacts if each.of == "prompt"), None)
        if artifact is None:
            return
        missing: dict[str, Checked] = {}
        for checked in (each for each in self._checked if each.problem is None):
            prompt = self._prompt(checked.sample)
            if prompt in self._prompts or prompt in missing:
                continue
            if checked.todo is not None and artifact.name in checked.todo.names:
                missing[prompt] = checked
            else:
                path = artifact_path(self._set.own, artifact, checked.sample, prompt)
                self._prompts[prompt] = torch.from_numpy(_read(path, artifact.name))
        for prompt, checked in missing.items():
            require_going(self.should_stop)
            assert checked.todo is not None
            nothing: tuple[ReadFrames, dict[str, np.ndarray]] = (ReadFrames(0, ()), {})
            with encoding_threads(), self._checker.clip(checked.todo, *nothing) as clip:
                wanted = (artifact.name,)
                made = self.family.encode_clip(self.modules, clip, wanted, self.cfg)
            self._prompts[prompt] = rounded(made[artifact.name], self.cfg).float().cpu()

    def _prompt(self, sample: Sample) -> str:
        return prompt_of(sample, self.cfg.input.prompt or "")[0]

    def _require_audio(self, checked: Checked) -> None:
        """Silence is no audio to be in time with, nor are the zeros behind the end of a file: the judge would
        be asked for a mouth that fits nothing. Raises UnusableAudio."""
        if not self.with_audio:
            return
        place = audio_of(checked.sample)
        known, frames = self._known_audio(checked.sample), self._length(checked.frames)
        there = frames_of_samples(known["samples"])
        if there < frames:
            raise UnusableAudio(
                f"is too short for the sync loss: {there} of the {frames} frames of the clip", where=place
            )
        if not known["variance"]:
            raise UnusableAudio("is silent, and the sync loss needs speech", where=place)
        whole = frames * SAMPLES_PER_FRAME
        if known["samples"] > whole:  # else what is known of the file is known of the clip
            with Waveform(open_audio(place)) as waveform:
                constant = np.ptp(waveform.read(0, whole)) == 0
            if constant:
                raise UnusableAudio(
                    f"is silent in the {frames} frames of the clip, and the sync loss needs speech",
                    where=place,
                )

    def _require_length(self, frames: int) -> None:
        """Raises UnusableVideo for a clip that the auxiliary losses have no window in."""
        length = self._length(frames)
        if length < self.shortest:
            raise UnusableVideo(f"too short: its clip has {length} of {self.shortest} frames")

    def _length(self, frames: int) -> int:
        """Pixel frames of the clip of a video of `frames`."""
        (start, stop), *_ = self.family.frames_read(frames, (), self.cfg)
        return stop - start

    def _to_face(self, checked: Checked) -> ToFace:
        """Of the frames that training sees of a sample, which may be smaller than its video.

        Raises UnusableFile for a sample without a map to its face, or with one of another video.
        """
        import torch

        from avatarctl.perception.align import after, inverse
        from avatarctl.perception.face_file import FACE_FILE, Clip, read_face_file

        sample, data = checked.sample, self.cfg.data
        path = sample.folder / FACE_FILE
        if not path.is_file():
            raise UnusableFile(
                f"has no {FACE_FILE}, and the sync loss needs aligned faces", where=sample.name,
                fix="cut it out of its video again, or --faces none where the frame is the aligned face",
            )  # fmt: skip
        held = read_face_file(path)
        width, height = held.facts["width"], held.facts["height"]
        sha256 = self._known.facts(sample.video, "video", video_facts)["sha256"]
        held = read_face_file(path, Clip(sha256, checked.frames, width, height))
        assert data.width is not None and data.height is not None
        shown = fitted_matrix(height, width, (data.height, data.width), self.cfg.input.fit)
        (start, stop), *_ = self.family.frames_read(checked.frames, (), self.cfg)
        matrices = after(held.matrices[start:stop], inverse(shown))
        return ToFace(torch.from_numpy(matrices).float(), held.resolution)

    def _known_audio(self, sample: Sample) -> dict[str, Any]:
        from avatarctl.data.media import audio_facts

        return self._known.facts(audio_of(sample), "audio", audio_facts)


def _nothing() -> None:
    """What is read of a sample that cannot be used."""


def _read_turn(turn: _Turn, frames: int) -> tuple[dict[str, np.ndarray], Any, np.ndarray | None]:
    """What a sample has on the disk; runs in reading processes, without torch."""
    arrays = {name: _read(path, entry) for name, (path, entry) in turn.files.items()}
    live = None if turn.live is None else read_sample(*turn.live)
    audio = None
    if turn.audio is not None:
        with Waveform(open_audio(turn.audio)) as waveform:
            audio = waveform.read(0, frames * SAMPLES_PER_FRAME)
    return arrays, live, audio


def _read(path: Path, entry: str) -> np.ndarray:
    """A stored tensor as float32. Raises UnusableWeights, PathNotFound."""
    tensors = read_pickle(path).tensors if path.suffix == ".pt" else read_header(path).tensors
    stored = tensors[entry]
    return np.ascontiguousarray(to_float32(read_whole(stored), stored.info.dtype))
