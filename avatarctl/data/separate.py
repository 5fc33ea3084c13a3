"""Speech out of mixes, one after another: `vocal.wav` as the models read audio, and stems at full rate.

Audio is read twice: for its level and whether it can be used, then to be separated, block by block. What is
written says in its comment what made it, so that the same command passes over what is done, and nothing else
is replaced unless asked.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from avatarctl.atomic import (
    disk_errors,
    ensure_writable_folder,
    flush_file,
    flush_folder,
    held_folder,
    remove_left_behind,
)
from avatarctl.data.mixes import Mix
from avatarctl.errors import (
    AvatarctlError,
    Interrupted,
    OutputRefused,
    PartlyFailed,
    UnusableFile,
    UnusableWeights,
    WriteFailed,
    under_name,
)
from avatarctl.events import Emit, Notice, PartDone
from avatarctl.media.audio import comment_of, frames_of, open_audio, stated_seconds, write_audio
from avatarctl.media.audio_readers import Audio, Samples
from avatarctl.media.audio_survey import AudioSurvey, survey
from avatarctl.media.waveform import MODEL_RATE, model_signal
from avatarctl.perception.separation import Separator

__all__ = ["Separated", "Separation", "conclude"]

_MADE_BY: Final = "avatarctl separate"
_VERSION: Final = 2  # of what a method computes; another makes everything anew
_HARDLY_ANY: Final = 0.01  # -20 dB of the mix's energy
_A_BYTE: Final = 1 / 32_000  # s of audio in 16 bits at 16 kHz, where no header states a length
_OFTEN: Final = 0.2  # s between two words of progress


@dataclass(frozen=True)
class Separated:
    """What became of one mix. files: `vocal.wav` first. seconds: of audio. error: of a failed one."""

    name: str
    state: Literal["done", "skipped", "failed"]
    files: tuple[Path, ...] = ()
    seconds: float = 0.0
    error: AvatarctlError | None = None


class Separation:
    """One way of separating, over any number of mixes.

    stems:     write speech and the rest at the separator's rate, as 32-bit float WAV; without a rest
               (`none`) speech alone.
    overwrite: replace what this program did not write, and make again what is done.
    """

    def __init__(
        self,
        separator: Separator,
        emit: Emit,
        should_stop: Callable[[], bool],
        *,
        stems: bool = False,
        overwrite: bool = False,
    ) -> None:
        self._separator, self._emit, self._should_stop = separator, emit, should_stop
        self._overwrite = overwrite
        self._unsaid = separator.warning  # said with the first mix that is separated
        self._stems = () if not stems else ("speech",) if separator.compensate is None else ("speech", "rest")

    def run(self, mixes: Sequence[Mix]) -> list[Separated]:
        """All of them; one that cannot be used is named and left out.

        Raises Interrupted, WriteFailed for a full disk, and UnusableWeights, which would fail them all.
        """
        clock = _Clock(self._lengths(mixes), self._emit)
        results: list[Separated] = []
        for number, mix in enumerate(mixes):
            clock.begin(number, mix.name)
            try:
                self._stop_if_asked()
                results.append(self._separate(mix, clock))
            except (WriteFailed, UnusableWeights, Interrupted):
                raise
            except AvatarctlError as error:
                clock.passed_over()
                if len(mixes) > 1:
                    self._emit(Notice(under_name(mix.name, error), "warning"))
                results.append(Separated(mix.name, "failed", error=error))
        return results

    def state_of(self, mix: Mix) -> Literal["done", "skipped"]:
        """Whether it has to be done. Raises what stands against it, as far as no audio is read."""
        if mix.problem is not None:
            raise mix.problem
        return "skipped" if self._stands(mix, self._making(open_audio(mix.path))) else "done"

    def _separate(self, mix: Mix, clock: _Clock) -> Separated:
        if mix.problem is not None:
            raise mix.problem
        audio = open_audio(mix.path)
        making = self._making(audio)
        if self._stands(mix, making):
            seconds = frames_of(mix.vocal) / MODEL_RATE
            clock.passed_over()
            return Separated(mix.name, "skipped", self._files(mix), seconds)
        found = survey(audio)
        for warning in found.warnings:
            self._emit(Notice(f"{mix.name}: {warning}", "warning"))
        home = mix.vocal.parent
        ensure_writable_folder(home)
        for line in remove_left_behind(home):
            self._emit(Notice(line))
        if self._unsaid:
            self._emit(Notice(self._unsaid, "warning"))
            self._unsaid = ""
        with disk_errors(mix.vocal), held_folder(home) as hidden:
            made = self._write(mix.name, audio, found, hidden, making, clock)
            for path in made:
                flush_file(path)
            # The one that says that all is done comes last.
            for path, final in reversed(list(zip(made, self._files(mix), strict=True))):
                path.replace(final)
            flush_folder(home)
        clock.made()
        return Separated(mix.name, "done", self._files(mix), found.samples / MODEL_RATE)

    def _files(self, mix: Mix) -> tuple[Path, ...]:
        return (mix.vocal, *(mix.stem(which) for which in self._stems))

    def _making(self, audio: Audio) -> str:
        """What decides the bytes of a result."""
        return json.dumps({**self._way, "source": audio.sha256()})

    @property
    def _way(self) -> dict[str, Any]:
        """The part of `_making` that all mixes share."""
        return {
            "made by": _MADE_BY,
            "version": _VERSION,
            "method": self._separator.method,
            "weights": self._separator.identity,
        }

    def _lengths(self, mixes: Sequence[Mix]) -> list[float]:
        """Seconds of audio that are to be separated of each, by what headers state; where one states nothing,
        by the bytes that a second takes in the others."""
        stated: list[float | None] = []
        for mix in mixes:
            self._stop_if_asked()
            passed = mix.problem is not None or self._seems_done(mix)
            stated.append(0.0 if passed else stated_seconds(mix.path))
        known = [(each, _size(mix.path)) for mix, each in zip(mixes, stated, strict=True) if each]
        a_byte = sum(each for each, _ in known) / max(1, sum(size for _, size in known)) or _A_BYTE
        return [
            _size(mix.path) * a_byte if each is None else each
            for mix, each in zip(mixes, stated, strict=True)
        ]

    def _seems_done(self, mix: Mix) -> bool:
        """By its results alone: whether they are of the present source is known once that is read."""
        begins = json.dumps(self._way)[:-1]
        return not self._overwrite and all(comment_of(path).startswith(begins) for path in self._files(mix))

    def _stands(self, mix: Mix, making: str) -> bool:
        """Whether all is there as it would be made. Raises OutputRefused for files that others wrote."""
        if self._overwrite:
            return False
        comments = {path: comment_of(path) for path in self._files(mix) if path.exists() or path.is_symlink()}
        for path, comment in comments.items():
            if not comment.startswith(f'{{"made by": "{_MADE_BY}"'):
                raise OutputRefused(
                    "exists, and this command did not write it",
                    where=path,
                    fix="add --overwrite or choose another --out",
                )
        return all(comments.get(path) == making for path in self._files(mix))

    def _write(
        self, name: str, audio: Audio, found: AudioSurvey, hidden: Path, making: str, clock: _Clock
    ) -> list[Path]:
        """`vocal`, and `speech` and `rest` where asked for. With stems, speech is separated once, into its
        file, and the others are made of that: their numbers are the same as without."""
        rate = self._separator.rate(audio)
        total = found.native_samples * rate / audio.rate
        clock.separating(found.native_samples / audio.rate)
        peak = found.peak if audio.channels <= 2 else found.mono_peak  # of what `mix` gives
        left = _Left(self._separator.compensate)
        separated = self._separator.speech(left.of_mix(self._separator.mix(audio)), rate, peak)
        speech = self._watched(left.of_speech(separated), total, clock)
        vocal = hidden / "vocal.wav"
        made = [vocal]
        if self._stems:
            made.append(hidden / "speech.wav")
            write_audio(made[1], speech, rate, "FLOAT", making)
            speech = open_audio(made[1]).blocks()
        if "rest" in self._stems:
            made.append(hidden / "rest.wav")
            write_audio(made[2], self._rest(audio, made[1]), rate, "FLOAT", making)
        write_audio(vocal, _exactly(model_signal(speech, rate), found.samples), MODEL_RATE, comment=making)
        if left.is_hardly_any:
            self._emit(Notice(f"{name}: hardly any music: --backend none leaves it as it is"))
        return made

    def _rest(self, audio: Audio, speech: Path) -> Iterator[Samples]:
        factor = np.float32(self._separator.compensate or 0.0)
        kept = open_audio(speech)
        spoken, ahead = kept.blocks(), np.zeros((0, kept.channels), np.float32)
        for block in self._separator.mix(audio):
            self._stop_if_asked()
            while len(ahead) < len(block):
                ahead = np.concatenate([ahead, next(spoken)])
            yield block - factor * ahead[: len(block)]
            ahead = ahead[len(block) :]

    def _watched(self, blocks: Iterable[Samples], total: float, clock: _Clock) -> Iterator[Samples]:
        done = 0
        for block in blocks:
            self._stop_if_asked()
            done += len(block)
            clock.tell(done / total)
            yield block

    def _stop_if_asked(self) -> None:
        if self._should_stop():
            raise Interrupted("stopped", fix="the same command makes what is still to be made")


def conclude(results: Sequence[Separated]) -> None:
    """Raises what went wrong: the error itself of a single one, PartlyFailed, or UnusableFile if nothing was
    of use."""
    failed = [each for each in results if each.error is not None]
    if not failed:
        return
    first = failed[0].error
    assert first is not None
    if len(results) == 1:
        raise first
    words = f"the first: {under_name(failed[0].name, first)}"
    if len(failed) == len(results):
        raise UnusableFile(f"no audio could be used: {words}")
    raise PartlyFailed(f"{len(failed)} of {len(results)} files failed; {words}")


class _Clock:
    """Progress over all mixes, weighed by their seconds of audio, and the seconds of time that are left.

    lengths: of each mix in seconds, 0 for one that is passed over.
    """

    def __init__(self, lengths: list[float], emit: Emit) -> None:
        self._lengths, self._emit = lengths, emit
        self._begun = self._separating = self._said = time.monotonic()
        self._worked = 0.0  # s that the finished mixes took, without those that were passed over
        self._separated = 0.0  # s of these that were not spent on looking at them
        self._shown = 0.0
        self._number, self._name = 0, ""

    def begin(self, number: int, name: str) -> None:
        self._number, self._name = number, name
        self._begun = time.monotonic()

    def separating(self, seconds: float) -> None:
        """The present one was looked at, has so many seconds, and is separated from now on."""
        self._lengths[self._number] = seconds
        # Its first block says little of its pace: `tell` waits for a few.
        self._separating = self._said = time.monotonic()

    def made(self) -> None:
        now = time.monotonic()
        self._worked += now - self._begun
        self._separated += now - self._separating

    def passed_over(self) -> None:
        """The present one is done already, or cannot be used."""
        self._lengths[self._number] = 0.0

    def tell(self, share: float) -> None:
        """`share` of the present one is separated."""
        now = time.monotonic()
        if now - self._said < _OFTEN or share <= 0:
            return
        self._said = now
        share, length, total = min(1.0, share), self._lengths[self._number], sum(self._lengths)
        before = sum(self._lengths[: self._number])
        rest = length * (1 - share)
        rest *= (self._separated + now - self._separating) / (before + length * share)
        a_second = (self._worked + now - self._begun + rest) / (before + length)
        left = rest + a_second * (total - before - length)
        count = len(self._lengths)
        what = self._name if count == 1 else f"{self._number + 1} of {count}: {self._name}"
        # A header that stated too little or too much never lets it go back.
        self._shown = max(self._shown, (before + length * share) / total)
        self._emit(PartDone(what, self._shown, left))


class _Left:
    """How much of a mix is left without its speech, counted while both pass. The speech is late by no more
    than a separator holds.

    factor: `Separator.compensate`; None counts nothing.
    """

    def __init__(self, factor: float | None) -> None:
        self._factor = factor
        self._waiting: deque[Samples] = deque()
        self._mix = self._rest = 0.0

    def of_mix(self, blocks: Iterable[Samples]) -> Iterator[Samples]:
        for block in blocks:
            if self._factor is not None:
                self._waiting.append(block)
            yield block

    def of_speech(self, blocks: Iterable[Samples]) -> Iterator[Samples]:
        for block in blocks:
            self._count(block)
            yield block

    def _count(self, speech: Samples) -> None:
        while self._waiting and len(speech):
            mix = self._waiting.popleft()
            here = min(len(mix), len(speech))
            if here < len(mix):
                self._waiting.appendleft(mix[here:])
            rest = mix[:here] - np.float32(self._factor or 0.0) * speech[:here]
            self._mix += _energy(mix[:here])
            self._rest += _energy(rest)
            speech = speech[here:]

    @property
    def is_hardly_any(self) -> bool:
        return self._rest < _HARDLY_ANY * self._mix


def _energy(block: Samples) -> float:
    flat = np.ascontiguousarray(block).reshape(-1)
    return float(np.dot(flat, flat))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # whoever opens it says what is wrong
        return 0


def _exactly(blocks: Iterable[Samples], samples: int) -> Iterator[Samples]:
    """Blocks [n] as so many samples in all: resampled twice, a length may differ by one."""
    for block in blocks:
        if len(block := block[:samples]):
            yield block
        samples -= len(block)
    if samples:
        yield np.zeros(samples, np.float32)
