"""Clips of the cartoon world as training reads them: drawn from seeds, encoded once, kept in memory.

A drawn clip goes straight to the family's `encode_clip`. An MP4 in between would blur the colours that the
meter of mouths reads, and every artifact with them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from avatarctl.atomic import atomic_write_bytes
from avatarctl.conditioning.masking import mask_tensor, mouth_mask
from avatarctl.data.media import ReadFrames
from avatarctl.data.training_set import TrainingSample
from avatarctl.demo.clips import HELD_OUT
from avatarctl.demo.faces import Motion, draw_face, draw_motion, render
from avatarctl.demo.voices import speech
from avatarctl.errors import AvatarctlError, Interrupted, UnusableWeights
from avatarctl.events import Emit, PartDone
from avatarctl.family import Clip, Modules, Recording
from avatarctl.timeline import SAMPLES_PER_FRAME

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.family import TrainableFamily

__all__ = ["DrawnSet", "Window", "draw_window"]

UTTERANCE: Final = 97
"""Frames of audio that the encoder is given; a clip is a window of it, as a chunk is of a recording."""

_PACK: Final = 40
_PROMPT: Final = "a person is talking"
_OTHER_PROMPTS: Final = (
    "a woman speaks", "a man is talking to the camera", "a cartoon face", "someone sings", "hello", "",
    "talking head, close-up", "the speaker smiles and talks in a bright room", "portrait video",
)  # fmt: skip
_OTHERS_SHARE: Final = 0.25


@dataclass(frozen=True)
class Window:
    """frames uint8 [F, 64, 64, 3], the window from frame `first` of an utterance; elsewhere [2, 64, 64, 3]:
    its own first frame, and one of another moment; audio float32 [640 UTTERANCE]."""

    frames: np.ndarray
    elsewhere: np.ndarray
    audio: np.ndarray
    first: int
    prompt: str


def draw_window(seed: int, frames: int) -> Window:
    """The window of one seed: face, voice, motion, place and prompt all come from it."""
    if seed >= HELD_OUT:
        raise ValueError(f"seeds from {HELD_OUT} on are held out: {seed}")
    rng = np.random.default_rng([seed, 30])
    spoken, moved = speech(seed, UTTERANCE), draw_motion(seed, 0, UTTERANCE)
    first, other = int(rng.integers(0, UTTERANCE - frames + 1)), int(rng.integers(0, UTTERANCE))
    at = np.array([first, other, *range(first, first + frames)])
    motion = Motion(**{name: track[at] for name, track in vars(moved).items()})
    drawn = render(draw_face(seed), motion, spoken.opening[at], spoken.spread[at])
    return Window(drawn[2:], drawn[:2], spoken.audio, first, _prompt_of(seed))


@dataclass(frozen=True)
class _Drawn:
    """A recording in memory."""

    audio: np.ndarray

    def read(self, start: int, stop: int) -> np.ndarray:
        window = np.zeros(stop - start, np.float32)
        low, high = max(start, 0), min(stop, len(self.audio))
        if low < high:
            window[low - start : high - start] = self.audio[low:high]
        return window


@dataclass
class DrawnSet:
    """A `TrainingData`. folder: of what is encoded; seeds: one for each clip; encode: the settings that name
    everything that is encoded, of which a run may want less; modules: makes the encoders, when they are
    needed; made_by: names them."""

    folder: Path
    seeds: range
    family: TrainableFamily
    cfg: RunConfig
    encode: RunConfig
    modules: Callable[[], Modules]
    made_by: str
    emit: Emit
    bad: dict[str, AvatarctlError] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    _rows: dict[str, Tensor] = field(default_factory=dict)
    _texts: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = [f"{seed:06d}" for seed in self.seeds]

    @property
    def base(self) -> Path:
        return self.folder

    @property
    def frames(self) -> int:
        """Pixel frames of a clip."""
        assert self.encode.data.num_frames is not None
        return self.encode.data.num_frames

    def make(self, should_stop: Callable[[], bool]) -> None:
        """Encodes what is not there. Raises Interrupted, behind what is saved."""
        self.folder.mkdir(parents=True, exist_ok=True)
        packs = self._packs()
        lacking = [number for number in range(len(packs)) if not self._path(number).is_file()]
        if not lacking:
            return
        modules, started = self.modules(), time.monotonic()
        for count, number in enumerate(lacking, 1):
            self._write(self._path(number), self._encoded(modules, packs[number]))
            left = (time.monotonic() - started) / count * (len(lacking) - count)
            done = len(packs) - len(lacking) + count
            self.emit(PartDone("clips", done / len(packs), left))
            if should_stop() and count < len(lacking):
                fix = "the same command goes on"
                raise Interrupted(f"stopped behind {done * _PACK} clips, which are saved", fix=fix)

    def prepare(self) -> None:
        packs = [self._read(self._path(number)) for number, _ in enumerate(self._packs())]
        wanted = {each.name for each in self.family.artifacts(self.cfg) if each.of == "sample"}
        self._rows = {name: torch.cat([pack[name] for pack in packs]) for name in wanted}
        modules = self.modules()
        names = tuple(each.name for each in self.family.artifacts(self.cfg) if each.of == "data set")
        made = self.family.constants(modules, self.frames, names, self.cfg)
        self.constants = {name: tensor.float() for name, tensor in made.items()}
        self.constants["mask"] = mask_tensor(mouth_mask())
        for prompt in (_PROMPT, *_OTHER_PROMPTS):
            clip = self._clip(draw_window(self.seeds[0], self.frames), prompt)
            self._texts[prompt] = self.family.encode_clip(modules, clip, ("text",), self.cfg)["text"]

    def read(self, places: Iterable[int]) -> Iterator[TrainingSample | AvatarctlError]:
        for place in places:
            tensors = {name: rows[place] for name, rows in self._rows.items()}
            tensors["text"] = self._texts[_prompt_of(self.seeds[place])]
            yield TrainingSample(self.names[place], tensors, self.frames)

    def exact_vae(self) -> Any:
        return self.modules().vae

    def _packs(self) -> list[range]:
        return [self.seeds[start : start + _PACK] for start in range(0, len(self.seeds), _PACK)]

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:04d}.safetensors"

    def _encoded(self, modules: Modules, seeds: range) -> dict[str, Tensor]:
        """Each artifact of these clips, stacked."""
        wanted = [each.name for each in self.family.artifacts(self.encode) if each.of == "sample"]
        parts: dict[str, list[Tensor]] = {name: [] for name in wanted}
        for seed in seeds:
            window = draw_window(seed, self.frames)
            made = self.family.encode_clip(modules, self._clip(window, window.prompt), wanted, self.encode)
            made["audio_features"] = made["audio_features"][window.first : window.first + self.frames]
            for name in wanted:
                parts[name].append(made[name].float())
        return {name: torch.stack(tensors) for name, tensors in parts.items()}

    def _clip(self, window: Window, prompt: str) -> Clip:
        frames = ReadFrames(len(window.frames), ((0, window.frames),))
        audio = window.audio
        recording = Recording(_Drawn(audio), len(audio), float(audio.mean()), float(audio.var()))
        assert len(audio) == UTTERANCE * SAMPLES_PER_FRAME
        return Clip(frames, recording, prompt, mask_tensor(mouth_mask()), others=window.elsewhere)

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        facts = json.dumps({"made_by": self.made_by})
        atomic_write_bytes(path, save(dict(tensors), {"facts": facts}))

    def _read(self, path: Path) -> dict[str, Tensor]:
        fix = f"delete {self.folder.name}/ and it is made again"
        try:
            with safe_open(path, "pt") as file:
                if json.loads(file.metadata()["facts"])["made_by"] != self.made_by:
                    raise UnusableWeights("was made by another recipe or other encoders", where=path, fix=fix)
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UnusableWeights("is damaged", where=path, fix=fix) from error


def _prompt_of(seed: int) -> str:
    rng = np.random.default_rng([seed, 31])
    others = rng.random() < _OTHERS_SHARE
    return _OTHER_PROMPTS[int(rng.integers(len(_OTHER_PROMPTS)))] if others else _PROMPT
