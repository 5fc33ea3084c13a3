"""What a sample lacks: its files are looked at, its artifacts compared with what would make them now."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avatarctl.atomic import remove_left_behind
from avatarctl.config import RunConfig
from avatarctl.data.artifacts import Making, Stale, check_artifact, check_older, made_by
from avatarctl.data.encoders import Encoders
from avatarctl.data.known import Known
from avatarctl.data.media import ReadFrames, audio_facts, bytes_facts, video_facts
from avatarctl.data.samples import VIDEO, Sample, prompt_of
from avatarctl.data.windows import others_of, rows_outside, sample_source
from avatarctl.errors import (
    AvatarctlError,
    PathNotFound,
    UnusableAudio,
    UnusableFile,
    UnusableImage,
    UnusableVideo,
)
from avatarctl.events import Emit, Notice
from avatarctl.family import Artifact, Clip, Recording, TrainableFamily
from avatarctl.media import Waveform, open_audio
from avatarctl.media.files import check_regular_file
from avatarctl.timeline import frames_of_samples, latent_frames

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Checked",
    "Checker",
    "Todo",
    "artifact_path",
    "audio_of",
    "constant_path",
    "prompt_path",
    "run_mask",
]


@dataclass(frozen=True)
class Todo:
    """A sample that lacks artifacts. ranges: frames to be read; masks: of `clip_masks`, where they are read.
    made: the makings of all that this command makes of the sample, those that it has included."""

    sample: Sample
    names: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]
    masks: tuple[str, ...]
    frames: int
    prompt: str
    audio: dict[str, Any]
    made: dict[str, Making]


@dataclass(frozen=True)
class Checked:
    """A sample that was looked at: what it lacks, or why it cannot be used."""

    sample: Sample
    frames: int = 0
    todo: Todo | None = None
    problem: AvatarctlError | None = None
    made: dict[str, Making] = field(default_factory=dict)
    prompt: str = ""

    def makings(self) -> dict[str, str]:
        return {name: making.fingerprint for name, making in self.made.items()}


@dataclass(frozen=True)
class _Facts:
    """What a sample is: facts of its files, and its prompt."""

    video: dict[str, Any]
    audio: dict[str, Any]
    prompt: str


class Checker:
    """Looks at samples of one data set for one command. tidy: whether what dead runs left is removed."""

    def __init__(
        self,
        cfg: RunConfig,
        family: TrainableFamily,
        artifacts: tuple[Artifact, ...],
        encoders: Encoders,
        known: Known,
        own: Path,
        emit: Emit,
        *,
        tidy: bool = True,
    ) -> None:
        self._tidy = tidy
        self._cfg, self._family, self._artifacts = cfg, family, artifacts
        self._known, self._own, self._emit = known, own, emit
        self._conventions = family.conventions(cfg)
        self._mask = run_mask(cfg)
        self._networks = encoders
        self._encoders = {part: encoders.identity(part) for part in {each.part for each in artifacts}}
        self._taken: set[str] = set()  # prompts that a sample before will have encoded
        self._older = [each for each in family.artifacts(cfg) if each.older]

    def check(self, sample: Sample) -> Checked:
        """Never raises for what is wrong with the sample."""
        try:
            if sample.problem is not None:
                raise sample.problem
            return self._check(sample)
        except AvatarctlError as problem:
            return Checked(sample, problem=problem)
        except OSError as error:  # it vanished, or may not be read
            what = f"cannot be read: {error.strerror}"
            return Checked(sample, problem=UnusableFile(what, where=error.filename or sample.name))

    def makings_of(self, todo: Todo) -> dict[str, str]:
        """Fingerprints of a sample's artifacts, once it is finished."""
        return {name: making.fingerprint for name, making in todo.made.items()}

    def missing_constants(self) -> dict[str, Making]:
        """What all samples share and is not here, or is of another making."""
        missing = {}
        for artifact in (each for each in self._artifacts if each.of == "data set"):
            making = self._making(artifact, {})
            if self._cfg.data.force or not self._stands(constant_path(self._own, artifact), artifact, making):
                missing[artifact.name] = making
        return missing

    @contextmanager
    def clip(self, todo: Todo, pixels: ReadFrames, masks: dict[str, np.ndarray]) -> Iterator[Clip]:
        """A sample as its family reads it; the audio is open as long as the block lasts."""
        audio = todo.audio
        with Waveform(open_audio(audio_of(todo.sample))) as waveform:
            recording = Recording(waveform, audio["samples"], audio["mean"], audio["variance"])
            others = self._others(todo)
            yield Clip(pixels, recording, todo.prompt, self._keep(), masks, others)

    def _check(self, sample: Sample) -> Checked:
        facts = self._facts(sample)
        if self._tidy and sample.folder.is_dir():
            for line in remove_left_behind(sample.folder):
                self._emit(Notice(line))
        frames = facts.video["frames"]
        everything = tuple(each.name for each in self._artifacts)
        clip = self._family.frames_read(frames, everything, self._cfg)[0]
        rows = max(frames, frames_of_samples(facts.audio["samples"]))
        older = self._check_older(sample, rows, clip[1] - clip[0])
        made, lacking = {}, []
        for artifact in (each for each in self._artifacts if each.of != "data set"):
            making = self._making(artifact, self._inputs(artifact, sample, facts))
            made[artifact.name] = making
            if self._lacks(artifact, sample, facts, making, older):
                lacking.append(artifact)
        if not lacking:
            return Checked(sample, frames, made=made, prompt=facts.prompt)
        self._warn(sample, facts)
        lacking = self._with_file_mates(lacking)
        names = tuple(each.name for each in lacking)
        shown = {each for artifact in lacking for each in artifact.reads} & {"video", "masks"}
        ranges = self._family.frames_read(frames, names, self._cfg) if shown else ((0, 0),)
        masks = self._family.clip_masks if "masks" in shown else ()
        todo = Todo(sample, names, ranges, masks, frames, facts.prompt, facts.audio, made)
        return Checked(sample, frames, todo, made=made, prompt=facts.prompt)

    def _facts(self, sample: Sample) -> _Facts:
        if not sample.folder.is_dir() and sample.video.name == VIDEO and sample.video.parent == sample.folder:
            raise PathNotFound("not found: no such folder", where=sample.folder)
        video = self._known.facts(_there(sample.video, UnusableVideo, "video"), "video", video_facts)
        audio = self._known.facts(_there(audio_of(sample), UnusableAudio, "audio"), "audio", audio_facts)
        default = self._cfg.input.prompt or ""
        prompt, doubt = prompt_of(sample, default)
        if doubt:
            self._emit(Notice(doubt, "warning"))
        return _Facts(video, audio, prompt)

    def _warn(self, sample: Sample, facts: _Facts) -> None:
        """What is odd about its files; once, as a sample that is finished is not looked at again."""
        for about in (facts.video, facts.audio):
            for line in about["warnings"]:
                self._emit(Notice(f"{sample.name}: {line}", "warning"))

    def _inputs(self, artifact: Artifact, sample: Sample, facts: _Facts) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        for name in artifact.reads:
            match name:
                case "video":
                    inputs[name] = facts.video["sha256"]
                case "audio":
                    inputs[name] = facts.audio["sha256"]
                case "frames":
                    inputs[name] = facts.video["frames"]
                case "prompt":
                    inputs[name] = facts.prompt
                case "mask":
                    inputs[name] = hashlib.sha256(self._mask.tobytes()).hexdigest()
                case "masks":
                    inputs[name] = [self._masks_hash(sample.folder / f"{each}_masks") for each in self._masks]
                case "others":
                    inputs[name] = [list(sample_source(sample.folder) or ()), facts.video["sha256"]]
        return inputs

    @property
    def _masks(self) -> tuple[str, ...]:
        return self._family.clip_masks

    def _masks_hash(self, folder: Path) -> str:
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        hashes = [
            f"{path.name} {self._known.facts(path, 'bytes', bytes_facts)['sha256']}"
            for path in files
            if path.is_file()
        ]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def _making(self, artifact: Artifact, inputs: dict[str, Any]) -> Making:
        encoder = self._encoders[artifact.part]
        return made_by(artifact, self._family.name, self._conventions, encoder, inputs, self._cfg)

    def _lacks(
        self, artifact: Artifact, sample: Sample, facts: _Facts, making: Making, older: dict[str, str]
    ) -> bool:
        path = artifact_path(self._own, artifact, sample, facts.prompt)
        if artifact.of == "prompt":
            if str(path) in self._taken:
                return False
            self._taken.add(str(path))
        if self._cfg.data.force:
            return True
        if self._cfg.data.format == "pt" and artifact.older is not None:
            return older.get(artifact.name) != making.fingerprint
        if artifact.name in older and not path.exists() and older[artifact.name] in ("", making.fingerprint):
            return False
        return not self._stands(path, artifact, making)

    def _stands(self, path: Path, artifact: Artifact, making: Making) -> bool:
        """Whether a file is there and of this making; it is read once through when it is first met.

        Raises UnusableWeights for a damaged one.
        """
        try:
            facts = self._known.recall(path, "artifact")
        except (FileNotFoundError, NotADirectoryError):
            return False
        if facts is None:
            try:
                check_artifact(path, artifact, making)
            except Stale:
                return False
            except AvatarctlError as problem:
                problem.fix = "--force makes it again"
                raise
            self._known.note(path, "artifact", {"fingerprint": making.fingerprint})
            return True
        return bool(facts.get("fingerprint") == making.fingerprint)

    def _with_file_mates(self, lacking: list[Artifact]) -> list[Artifact]:
        """What stands in one .pt file is written together."""
        if self._cfg.data.format != "pt":
            return lacking
        files = {each.older[0] for each in lacking if each.older}
        return [
            each for each in self._artifacts if each in lacking or (each.older and each.older[0] in files)
        ]

    def _check_older(self, sample: Sample, rows: int, clip: int) -> dict[str, str]:
        """Artifacts in .pt files of published trainers, as far as they fit: name to fingerprint, "" for files
        that state none. All of them are looked at, whatever is wanted: a sample with a file that could run
        something, or is damaged, is not used."""
        if self._cfg.data.force:
            return {}
        found: dict[str, str] = {}
        for file in dict.fromkeys(each.older[0] for each in self._older if each.older):
            path = sample.folder / file
            entries = {each.older[1]: each for each in self._older if each.older and each.older[0] == file}
            if not path.is_file() or self._replaced(sample, entries.values()):
                continue
            shapes = {entry: self._shape(each, rows, clip) for entry, each in entries.items()}
            try:
                stated = self._known.recall(path, "older")
                if stated is None or stated.get("shapes") != _listed(shapes):
                    stated = {"entries": check_older(path, shapes), "shapes": _listed(shapes)}
                    self._known.note(path, "older", stated)
            except Stale as stale:
                self._emit(Notice(f"{sample.name}: {stale}; it is made again", "warning"))
                continue
            except AvatarctlError as problem:
                problem.fix = "--force makes it again"
                raise
            found |= {
                entries[entry].name: made for entry, made in stated["entries"].items() if entry in entries
            }
        return found

    def _shape(self, artifact: Artifact, rows: int, clip: int) -> tuple[int | None, ...]:
        """The shape that an artifact of a clip of so many frames has, with `rows` of audio; it is stated for
        `data.num_frames`. How wide audio is only its encoder knows, which this command may not load."""
        assert self._cfg.data.num_frames is not None
        if artifact.part == "audio":
            width = self._networks.modules.audio.width if "audio" in self._encoders else None
            return tuple(width if size is None else rows for size in artifact.shape)
        whole, own = latent_frames(self._cfg.data.num_frames), latent_frames(clip)
        sides = enumerate(artifact.shape)
        return tuple(own if place == 1 and size == whole else size for place, size in sides)

    def _replaced(self, sample: Sample, artifacts: Iterable[Artifact]) -> bool:
        """Whether ours stand beside a file, so that nobody will read it."""
        ours = (sample.folder / f"{each.name}.safetensors" for each in artifacts)
        return self._cfg.data.format != "pt" and all(path.is_file() for path in ours)

    def require_others(self, todo: Todo) -> None:
        """Raises UnusableVideo where frames elsewhere are wanted of a sample that has none."""
        if (cut := self._cut(todo)) is not None:
            rows_outside(self._own.parent, *cut)

    def _others(self, todo: Todo) -> np.ndarray | None:
        cut = self._cut(todo)
        seed, count = self._cfg.runtime.seed, self._cfg.data.references
        return None if cut is None else others_of(self._own.parent, *cut, count, seed)

    def _cut(self, todo: Todo) -> tuple[str, int, int] | None:
        """Where a sample was cut out, if frames elsewhere are wanted of it."""
        if not any("others" in each.reads and each.name in todo.names for each in self._artifacts):
            return None
        cut = sample_source(todo.sample.folder)
        if cut is None:
            raise UnusableVideo(
                "was not cut from a longer video, so there are no other frames for data.references",
                where=todo.sample.name,
                fix="data.references 0, typed as --references 0, shows the first frame of the clip instead",
            )
        return cut

    def _keep(self) -> Tensor:
        from avatarctl.conditioning.masking import mask_tensor

        return mask_tensor(self._mask)


def artifact_path(own: Path, artifact: Artifact, sample: Sample, prompt: str) -> Path:
    if artifact.of == "prompt":
        return prompt_path(own, artifact, prompt)
    return sample.folder / f"{artifact.name}.safetensors"


def prompt_path(own: Path, artifact: Artifact, prompt: str) -> Path:
    """Of a prompt's artifact, which all samples with this prompt share."""
    digest = hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return own / "prompts" / f"{digest}.{artifact.name}.safetensors"


def constant_path(own: Path, artifact: Artifact) -> Path:
    return own / "constants" / f"{artifact.name}.safetensors"


def _listed(shapes: dict[str, tuple[int | None, ...]]) -> dict[str, list[int | None]]:
    return {entry: list(shape) for entry, shape in shapes.items()}


def audio_of(sample: Sample) -> Path:
    """The file that holds its audio."""
    return sample.audio or sample.video


def _there(path: Path, kind: type[UnusableFile], what: str) -> Path:
    try:
        return check_regular_file(path, kind)
    except PathNotFound as missing:
        raise kind(f"the {what} is missing: {path.name}: {missing.what}", where=path.parent) from missing


def run_mask(cfg: RunConfig) -> np.ndarray:
    """As `infer` reads it: the file of `data.mask`, else the drawn mouth."""
    from avatarctl.conditioning.masking import mouth_mask
    from avatarctl.media import load_image

    if cfg.data.mask is None:
        return mouth_mask()
    mask = load_image(cfg.data.mask).pixels[..., 0]
    if mask.min() > 127:
        raise UnusableImage("keeps the whole frame: nothing of it is black", where=cfg.data.mask)
    return mask
