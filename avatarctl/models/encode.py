"""Audio, images, video and text -> tensors: the one place that inference and preparation share."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image
import torch
from einops import rearrange
from torch import Tensor

from avatarctl.conditioning.geometry import fit_image
from avatarctl.conditioning.masking import MaskRule, masked_video
from avatarctl.events import Notice
from avatarctl.models.wav2vec import normalise_waveform
from avatarctl.timeline import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME

if TYPE_CHECKING:
    from avatarctl.events import Emit
    from avatarctl.family import AudioEncoder, TextEncoder, VideoCodec, WaveformReader

__all__ = [
    "PIECE_OVERLAP_SECONDS",
    "AudioFeatures",
    "Piece",
    "encode_prompt",
    "frames_tensor",
    "image_tensor",
    "pieces",
    "reference_latents",
    "source_latents",
    "window_tokens",
]

PIECE_OVERLAP_SECONDS = 2.0
_MOMENTS_BLOCK_SECONDS = 10.0  # bounds the first layer's output: 512 channels at 3200 Hz are 65 MB


def image_tensor(
    pixels: np.ndarray, size: tuple[int, int], fit: Literal["crop", "stretch"] = "crop"
) -> Tensor:
    """uint8 [h, w, 3] -> float32 [1, 3, H, W] in [-1, 1].

    crop: scaled to cover `size` (H, W), and cropped. stretch: each direction scaled by itself, bicubic on
    bytes as PIL does it.
    """
    if fit == "stretch":
        bicubic = PIL.Image.Resampling.BICUBIC
        pixels = np.array(PIL.Image.fromarray(pixels).resize((size[1], size[0]), bicubic))
    image = rearrange(torch.from_numpy(pixels).to(torch.float32) / 255, "h w c -> 1 c h w")
    return (fit_image(image, size) if fit == "crop" else image) * 2 - 1


def frames_tensor(frames: np.ndarray, device: torch.device | None = None) -> Tensor:
    """uint8 [n, H, W, 3] -> float32 [1, 3, n, H, W] in [-1, 1], as `image_tensor` maps an image of this
    size."""
    video = torch.from_numpy(frames).to(device)
    return rearrange(video.to(torch.float32) / 255, "n h w c -> 1 c n h w") * 2 - 1


def source_latents(
    vae: VideoCodec,
    frames: np.ndarray | Tensor,
    keep: Tensor,
    rule: MaskRule,
    *,
    wanted: Collection[str] = ("latents", "masked"),
    given: Tensor | None = None,
) -> dict[str, Tensor]:
    """Latents of a stretch of source video, each [1, C, T, h, w]; what inference and preparation both call.

    latents: of the frames as they are. masked: of the frames without what is made anew. all: the hole is in
    every frame. first_keep: in every frame but the first. legacy_two_step: as first_keep, then the first
    latent is that of the first frame with its hole, so that the later ones still know the whole frame: the
    data on which published trainers' checkpoints were trained (spec/omniavatar.md h.5).

    frames: uint8 [n, H, W, 3], or pixels [1, 3, n, H, W] in [-1, 1]; n is 4T - 3. keep: [1, 1, H, W] of
    `keep_map`. given: pixels [1, 3, k, H, W] that the stretch starts with, if any: the frame that a rule
    keeps is then theirs, as the source's own would show the mouth that is to be replaced.
    """
    pixels = frames if isinstance(frames, Tensor) else frames_tensor(frames, keep.device)
    made = {"latents": vae.encode(pixels)} if "latents" in wanted else {}
    if "masked" not in wanted:
        return made
    if given is not None and rule != "all":
        pixels = torch.cat([given[:, :, :1].to(pixels.dtype), pixels[:, :, 1:]], dim=2)
    masked = vae.encode(masked_video(pixels, keep, first_whole=rule != "all"))
    if rule == "legacy_two_step":
        first = vae.encode(masked_video(pixels[:, :, :1], keep))
        masked = torch.cat([first, masked[:, :, 1:]], dim=2)
    return {**made, "masked": masked}


def reference_latents(vae: VideoCodec, frames: np.ndarray, length: int, device: torch.device) -> Tensor:
    """Latents of a reference sequence, [1, C, length, h, w]: a shorter one is padded with its last latent.

    frames: uint8 [4n + 1, H, W, 3] of `conditioning.masking.reference_range`.
    """
    latents = vae.encode(frames_tensor(frames, device))[:, :, :length]
    missing = length - latents.shape[2]
    return torch.cat([latents, latents[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2)


def window_tokens(
    encoder: AudioEncoder,
    waveform: WaveformReader,
    window: tuple[int, int],
    *,
    samples: int,
    device: torch.device,
) -> Tensor:
    """Tokens of the audio of one window, a range of the recording's `samples`: [1, L, token_width].

    Normalised by the window's own moments; what lies behind the recording is silence after that.
    """
    start, stop = window
    recording = waveform.read(start, min(stop, samples))
    # Measured before the samples become a tensor: a fake tensor has no number to give.
    mean, variance = (float(moment(recording, dtype=np.float64)) for moment in (np.mean, np.var))
    piece = normalise_waveform(torch.from_numpy(recording), mean, variance)
    padded = torch.nn.functional.pad(piece, (0, stop - start - len(piece)))
    return encoder.tokens(padded.unsqueeze(0).to(device))


def encode_prompt(encoder: TextEncoder, prompt: str, device: torch.device, emit: Emit) -> Tensor:
    """One prompt -> [1, text_len, width] on `device`; says so when the prompt is longer than the model
    reads."""
    tokens = encoder.tokens(prompt)
    if tokens > encoder.text_len:
        emit(
            Notice(f"the prompt has {tokens} tokens; the model reads the first {encoder.text_len}", "warning")
        )
    return encoder.encode(prompt, device)


@dataclass(frozen=True)
class Piece:
    """Frames [start, stop) go through the encoder together; frames [keep, keep_stop) of it are used."""

    start: int
    stop: int
    keep: int
    keep_stop: int


def pieces(frames: int, window: int | None, overlap: int) -> list[Piece]:
    """Cut `frames` into pieces of `window` frames that overlap by `overlap`.

    window None, or one that holds everything: a single exact piece. Otherwise neighbours share `overlap`
    frames and are cut in their middle; the last piece is as long as what is left.
    """
    if window is None or frames <= window:
        return [Piece(0, frames, 0, frames)]
    hop = window - overlap
    starts = [k * hop for k in range(1 + -(-(frames - window) // hop))]
    cuts = [0, *(start + overlap // 2 for start in starts[1:]), frames]
    return [
        Piece(start, min(start + window, frames), keep, keep_stop)
        for start, (keep, keep_stop) in zip(starts, pairwise(cuts), strict=True)
    ]


class AudioFeatures:
    """Features of a recording by pixel frame, computed when asked for and dropped behind the reader.

    The recording is normalised by the moments of the whole, then padded with zeros to `frames` frames, as
    the reference does (spec/omniavatar.md b). Up to `window_seconds` it is encoded in one piece and equals
    the reference; beyond, in overlapping pieces, because the encoder attends to everything at once and its
    memory would grow with the recording. What the encoder's first layer normalises over the recording is
    then measured by a pass of its own, so that only attention across a piece's edge is lost;
    docs/benchmarks.md states how much that is.
    """

    def __init__(
        self,
        encoder: AudioEncoder,
        waveform: WaveformReader,
        *,
        samples: int,
        mean: float,
        variance: float,
        frames: int,
        window_seconds: float | None,
        device: torch.device,
    ) -> None:
        self._encoder, self._waveform, self._device = encoder, waveform, device
        self._samples, self._mean, self._variance = samples, mean, variance
        window = None if window_seconds is None else int(window_seconds * FPS)
        self._waiting = pieces(frames, window, int(PIECE_OVERLAP_SECONDS * FPS))
        self._ready: list[tuple[Piece, Tensor]] = []
        self._in_pieces = len(self._waiting) > 1
        self._moments: Any = None
        self._moments_known = not self._in_pieces
        self.frames = frames

    @property
    def width(self) -> int:
        """Features per frame."""
        return self._encoder.width

    def rows(self, start: int, stop: int) -> Tensor:
        """Features of frames [start, stop): float32 [1, stop - start, width].

        Frames before 0 are all-zero rows (no audio). Calls must not go back in time by more than
        they overlap: what lies before `start` is dropped. Raises ValueError outside the padded recording.
        """
        if stop > self.frames:
            raise ValueError(f"frames up to {stop} asked for, the recording is padded to {self.frames}")
        parts = []
        if start < 0:
            parts.append(torch.zeros(1, min(stop, 0) - start, self.width, device=self._device))
        parts.extend(self._encoded(max(start, 0), stop))
        self._ready = [item for item in self._ready if item[0].keep_stop > start]
        return torch.cat(parts, dim=1)

    def _encoded(self, start: int, stop: int) -> Iterator[Tensor]:
        while self._waiting and self._waiting[0].keep < stop:
            piece = self._waiting.pop(0)
            if piece.keep_stop > start:
                kept = slice(piece.keep - piece.start, piece.keep_stop - piece.start)
                self._ready.append((piece, self._encode(piece)[:, kept].clone()))
        if stop > start and (not self._ready or self._ready[0][0].keep > start):
            raise ValueError(f"frame {start} has already been dropped")
        for piece, features in self._ready:
            first, last = max(start, piece.keep), min(stop, piece.keep_stop)
            if first < last:
                yield features[:, first - piece.keep : last - piece.keep]

    def _encode(self, piece: Piece) -> Tensor:
        frames = piece.stop - piece.start
        if not self._in_pieces:
            return self._encoder.features(self._normalised(0, frames * SAMPLES_PER_FRAME), frames)
        if not self._moments_known:
            self._moments_known = True
            self._moments = self._encoder.recording_moments(
                self._normalised, self.frames * SAMPLES_PER_FRAME, int(_MOMENTS_BLOCK_SECONDS * SAMPLE_RATE)
            )
        waveform = self._normalised(piece.start * SAMPLES_PER_FRAME, piece.stop * SAMPLES_PER_FRAME)
        return self._encoder.features(waveform, frames, self._moments)

    def _normalised(self, start: int, stop: int) -> Tensor:
        """Samples [start, stop) of the normalised, padded recording: float32 [1, stop - start]."""
        waveform = torch.from_numpy(self._waveform.read(start, stop)).to(torch.float32)
        waveform = normalise_waveform(waveform, self._mean, self._variance)
        waveform[max(0, self._samples - start) :] = 0  # padding is silence after normalisation
        return waveform.unsqueeze(0).to(self._device)
