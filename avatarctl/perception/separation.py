"""Speech out of a mix: the three ways to it, behind one small interface."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, Literal, Protocol

from avatarctl.media.audio_readers import Audio, Samples
from avatarctl.media.files import file_sha256
from avatarctl.media.waveform import to_mono
from avatarctl.perception.mdx_net import COMPENSATE, RATE, MdxNetwork, overlapped, stereo_signal
from avatarctl.perception.spectral_gate import gate

__all__ = ["BACKENDS", "PUBLISHED", "Backend", "MdxOnnx", "Separator", "SpectralGate", "Unchanged"]

Backend = Literal["mdx-onnx", "dsp", "none"]
BACKENDS: Final[tuple[Backend, ...]] = ("mdx-onnx", "dsp", "none")

PUBLISHED: Final = "ce74ef3b6a6024ce44211a07be9cf8bc6d87728cc852a68ab34eb8e58cde9c8b"
"""SHA-256 of Kim_Vocal_2.onnx, 66,759,214 bytes, in the release `all_public_uvr_models` of TRvlvr/model_repo,
as programs that fetch it state; it has not been fetched here."""

_ANOTHER: Final = "is not the published Kim_Vocal_2.onnx by its SHA-256; it is run with that one's constants"


class Separator(Protocol):
    """One way of separating; it holds nothing of one audio for the next.

    method:     its name in files and for programs
    warning:    what a person should know of it, empty for nothing
    identity:   what else decides the numbers that come out, the weights' SHA-256
    compensate: how much louder speech is in the mix than it comes out; None if there is no rest
    """

    method: str
    warning: str
    identity: str
    compensate: float | None

    def rate(self, audio: Audio) -> int:
        """Samples per second of `mix` and `speech`."""
        ...

    def mix(self, audio: Audio) -> Iterator[Samples]:
        """The audio as it is separated: float32 [n, channels] in blocks."""
        ...

    def speech(self, mix: Iterable[Samples], rate: int, peak: float) -> Iterator[Samples]:
        """The speech in the blocks of `mix`, as long and with as many channels. peak: the mix's largest
        magnitude."""
        ...


class Unchanged:
    """All of the audio, at its own rate and with its own channels."""

    method = "none"
    warning = identity = ""
    compensate: float | None = None

    def rate(self, audio: Audio) -> int:
        return audio.rate

    def mix(self, audio: Audio) -> Iterator[Samples]:
        return audio.blocks()

    def speech(self, mix: Iterable[Samples], rate: int, peak: float) -> Iterator[Samples]:
        return iter(mix)


class SpectralGate:
    """`spectral_gate.gate` at the audio's own rate; more than two channels are mixed to one."""

    method = "dsp-gate"
    warning = "dsp is a demo-quality spectral gate, not a neural separator"
    identity = ""
    compensate: float | None = 1.0

    def rate(self, audio: Audio) -> int:
        return audio.rate

    def mix(self, audio: Audio) -> Iterator[Samples]:
        return _at_most_stereo(audio.blocks())

    def speech(self, mix: Iterable[Samples], rate: int, peak: float) -> Iterator[Samples]:
        return gate(mix, rate)


class MdxOnnx:
    """Kim_Vocal_2 by onnxruntime at 44.1 kHz. Raises as `MdxNetwork`."""

    method = "mdx-onnx"
    compensate: float | None = COMPENSATE

    def __init__(self, path: Path) -> None:
        self._network = MdxNetwork(path)
        self.identity = file_sha256(path)
        self.warning = "" if self.identity == PUBLISHED else f"{path}: {_ANOTHER}"

    def rate(self, audio: Audio) -> int:
        return RATE

    def mix(self, audio: Audio) -> Iterator[Samples]:
        return stereo_signal(audio.blocks(), audio.rate)

    def speech(self, mix: Iterable[Samples], rate: int, peak: float) -> Iterator[Samples]:
        return overlapped(mix, self._network, peak)


def _at_most_stereo(blocks: Iterable[Samples]) -> Iterator[Samples]:
    for block in blocks:
        yield block if block.shape[1] <= 2 else to_mono(block)[:, None]
