"""The seam between model families and everything else.

A family is one stateless object. Loops, pipelines, the profiler and the commands call it and nothing
else; whatever differs between families lives in it and in its network. Networks are passed in, because
others wrap, offload, shard and fake them.

Inference calls, once per job: `plan`, `open`, `sigmas`, `decoder`; once per span: `encode`,
`build_condition`, `noise_key`, `prepare`, `advance`; once per step: `branches`, `predict`, `combine`.
Training adds the calls of `TrainableFamily`.

What is called before networks are loaded (`takes`, `frame_size`, `guidance`, `conventions`, `notices`,
`plan`, `branches`) is arithmetic. A family's module imports torch and networks only inside the methods that
compute, so that a plan costs no such import.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from avatarctl.rng import stable_hash

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from avatarctl.config import RunConfig
    from avatarctl.events import Emit

__all__ = [
    "Artifact",
    "AudioEncoder",
    "Carry",
    "Clip",
    "Condition",
    "Conventions",
    "Decoder",
    "Draw",
    "Family",
    "FrameReader",
    "FusedFamily",
    "Guidance",
    "ImageEncoder",
    "Inputs",
    "Modules",
    "Prepared",
    "Recording",
    "Source",
    "Span",
    "TextEncoder",
    "Timesteps",
    "TrainableFamily",
    "VideoCodec",
    "VideoPlan",
    "WaveformReader",
]


@dataclass(frozen=True)
class Span:
    """One unit of sampling: a chunk, a window or a block.

    start, frames: absolute latent frames; windows of a fused plan overlap. audio: samples at 16 kHz that
    drive it; may reach outside the recording, `Family.encode` pads. fixed: clean latent frames in front.
    keep_from: first pixel frame to keep, counted within the span.
    """

    index: int
    start: int
    frames: int
    audio: tuple[int, int]
    fixed: int
    keep_from: int


@dataclass(frozen=True)
class VideoPlan:
    """How a video is sampled, span by span. spans() can be walked again; count is its length; frames counts
    pixel frames of the finished video; shape is [C, h, w] of the latents."""

    kind: Literal["chunks", "fused", "causal"]
    spans: Callable[[], Iterator[Span]]
    count: int
    frames: int
    shape: tuple[int, int, int]


@dataclass
class Condition:
    """Everything a network is conditioned on: tensors only, batched, the same in training and inference.

    channels: [B, C_y, T, h, w] appended to the noisy latents; clean: [B, C, T, h, w] given latents (all of
    them in training); fixed_mask: bool [B, 1, T, 1, 1], true where `clean` replaces what is sampled.
    """

    channels: Tensor | None
    clean: Tensor | None
    fixed_mask: Tensor | None
    audio: Mapping[str, Tensor]
    text: Mapping[str, Tensor]
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class Prepared:
    """What a network needs in every step of one span and that no step changes; dropped after the last.

    branch: per guidance branch.
    """

    shared: Any
    branch: dict[str, Any]


@dataclass(frozen=True)
class Guidance:
    """Guidance scales: text follows the prompt, audio the audio. audio None means the same as text.
    rule: `sampling.guidance_rule`."""

    text: float
    audio: float | None = None
    rule: Literal["cfg", "native"] = "cfg"


@dataclass(frozen=True)
class Timesteps:
    """Training draw: id in the grid, network time t, sigma, loss weight.

    Each is [B], one for a sample, or [B, T], one for every latent frame of latents [B, C, T, h, w]; all four
    have the same shape. `flow_matching` takes sigma in either.
    """

    id: Tensor
    t: Tensor
    sigma: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Conventions:
    """Facts that do silent damage when two files disagree; written into every file we make.

    audio_offset: pixel frames by which a frame lags its audio. mask_keep: value of the mask channel where
    pixels are given. hole: value of erased pixels in [-1, 1].
    """

    audio_offset: int
    mask_keep: int
    hole: float
    fps: int
    sigma_shift: float


Carry = Any  # What one span hands to the next; only its family looks inside.


class Decoder(Protocol):
    """Latents in, pixels out, in order."""

    def push(self, latents: Tensor) -> Tensor:
        """[B, C, t, h, w] normalised latents -> [B, 3, n, H, W] pixels in [-1, 1]."""


class VideoCodec(Protocol):
    """The VAE as families see it: latents are normalised on both sides."""

    def encode(self, video: Tensor) -> Tensor:
        """[B, 3, 4T - 3, H, W] pixels in [-1, 1] -> [B, C, T, H/8, W/8]."""

    def decoder(self) -> Decoder:
        """A fresh decoder; the first latent pushed is the first of a clip."""


class TextEncoder(Protocol):
    text_len: int  # tokens that the model reads

    def tokens(self, prompt: str) -> int:
        """Tokens of a prompt before it is cut to `text_len`."""

    def encode(self, prompt: str, device: torch.device) -> Tensor:
        """One prompt -> [1, text_len, width] on `device`, rows behind the prompt exactly zero."""


class AudioEncoder(Protocol):
    @property
    def width(self) -> int:
        """Features per frame, as `features` gives them."""

    @property
    def token_width(self) -> int:
        """Features per token, as `tokens` gives them."""

    def tokens(self, waveform: Tensor) -> Tensor:
        """Normalised mono audio [B, n] -> the last hidden state, about 50 tokens a second,
        [B, L, token_width]."""

    def features(self, waveform: Tensor, frames: int, moments: Any = None) -> Tensor:
        """Normalised mono audio [B, 640 * frames] -> [B, frames, width]; moments: of the recording that
        it is a piece of."""

    def recording_moments(self, read: Callable[[int, int], Tensor], samples: int, block: int) -> Any:
        """What the encoder normalises over a whole recording, read as [1, n]; None if nothing."""


class ImageEncoder(Protocol):
    def encode(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> image tokens [B, 257, width]."""


class WaveformReader(Protocol):
    """Audio at 16 kHz mono, read in slices."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32 [stop - start]; zeros outside the recording."""


class FrameReader(Protocol):
    """A video of the network's size at 25 frames a second, read in ranges; it never holds the whole."""

    @property
    def frames(self) -> int:
        """Its length."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Frames [start, stop): uint8 [stop - start, H, W, 3] RGB."""


@dataclass(frozen=True)
class Source:
    """A video that is given a new mouth.

    frames:    what the finished video shows, frame by frame; may be read behind its end, where it goes on as
               `output.length` says.
    keep:      the mask as an image, float [1, 1, h, w] of any size, 1 = kept;
               `conditioning.masking.keep_map` makes the maps of a size from it.
    reference: the same video at its own length, from which a reference sequence is taken. None: `frames`.
    """

    frames: FrameReader
    keep: Tensor
    reference: FrameReader | None = None


@dataclass
class Modules:
    """The networks of one job. image: for families that look at the image through an encoder.

    device: where the networks compute, so where everything that they are given must lie. It is stated, as
    nothing tells it: parameters may lie elsewhere between two calls, and a stand-in may have none.
    """

    dit: nn.Module
    vae: VideoCodec
    text: TextEncoder
    audio: AudioEncoder
    image: ImageEncoder | None = None
    device: torch.device = field(kw_only=True)


@dataclass(frozen=True)
class Inputs:
    """One job: image [1, 3, H, W] in [-1, 1] or source, as `Family.takes` says; audio as a reader with its
    length and moments (of the samples at 16 kHz, lead silence included); job: key of its random numbers."""

    image: Tensor | None
    waveform: WaveformReader
    samples: int
    mean: float
    variance: float
    prompt: str
    negative_prompt: str
    job: int
    emit: Emit
    source: Source | None = None


class Family(Protocol):
    """Inference. `cfg` is always a resolved RunConfig; `state` is the family's own, made by `open`."""

    name: str

    def takes(self, cfg: RunConfig) -> Literal["image", "video"]:
        """What a run starts from beside the audio."""

    def frame_size(self, image: tuple[int, int], cfg: RunConfig) -> tuple[int, int]:
        """Height and width of the video for an image or a source of (height, width), where neither is asked
        for."""

    def guidance(self, cfg: RunConfig) -> Guidance:
        """The guidance scales of a run."""

    def conventions(self, cfg: RunConfig) -> Conventions:
        """What two files of this family must agree on."""

    def notices(self, cfg: RunConfig) -> tuple[str, ...]:
        """Lines that a person should read before this run."""

    def plan(self, samples: int, cfg: RunConfig) -> VideoPlan:
        """Spans for audio of `samples` at 16 kHz, at least one frame. Raises UsageError for impossible
        requests."""

    def open(self, modules: Modules, inputs: Inputs, cfg: RunConfig) -> Any:
        """Once per job: text, reference, KV caches, prefill."""

    def encode(self, modules: Modules, inputs: Inputs, span: Span, state: Any, carry: Carry) -> Any:
        """Inputs of one span as tensors."""

    def build_condition(self, encoded: Any) -> Condition:
        """Pure: no network, no random number."""

    def noise_key(self, span: Span, inputs: Inputs) -> tuple[tuple[int, ...], int]:
        """Key of the span's noise and its first latent frame under that key (rng.latent_noise)."""

    def branches(self, guidance: Guidance, step: int) -> tuple[str, ...]:
        """Branches to run in this step; one without weight is not run."""

    def prepare(self, dit: nn.Module, condition: Condition, branches: Sequence[str], state: Any) -> Prepared:
        """What is constant over the steps of a span; branches: the union over its steps."""

    def predict(
        self,
        dit: nn.Module,
        x: Tensor,
        t: Tensor,
        prepared: Prepared,
        branches: Sequence[str],
        *,
        span: Span,
        step: int,
        state: Any,
    ) -> dict[str, Tensor]:
        """Velocity per branch, float32; x [B, C, T, h, w], t [B] in 0..1000."""

    def combine(self, velocities: Mapping[str, Tensor], guidance: Guidance, step: int) -> Tensor:
        """The guided velocity."""

    def advance(self, modules: Modules, state: Any, span: Span, latents: Tensor, pixels: Tensor) -> Carry:
        """What the next span starts from (chunks, causal)."""

    def decoder(self, modules: Modules, state: Any) -> Decoder:
        """chunks: one per chunk; fused, causal: one per job."""

    def sigmas(self, steps: int, shift: float) -> Tensor:
        """Sigmas, float32 [steps + 1], the last 0."""


class FusedFamily(Family, Protocol):
    """A family whose overlapping windows are fused in every step."""

    def fuse(self, new: Tensor, written: Tensor, span: Span, step: int, state: Any) -> Tensor:
        """Blend a window's new latents with what earlier windows of this step wrote into its head; both
        float32, written [B, C, overlap, h, w] may be empty. Returns as many frames as `new` has."""


@dataclass(frozen=True)
class Recording:
    """Audio of one sample: a reader of 16 kHz mono, its length, and the moments of the whole."""

    reader: WaveformReader
    samples: int
    mean: float
    variance: float


@dataclass(frozen=True)
class Clip:
    """One training sample as media, before any network has seen it.

    pixels:   its video in the network's size; only what `TrainableFamily.frames_read` asked for can be read.
    waveform: its audio.
    keep:     the mask as an image, float [1, 1, h, w], 1 = kept; `conditioning.masking.keep_map` fits it.
    masks:    uint8 [n, h, w] by name, one image for each frame of the clip: those of `clip_masks`.
    others:   uint8 [N, H, W, 3], frames elsewhere in the source that the sample was cut from.
    """

    pixels: FrameReader
    waveform: Recording
    prompt: str
    keep: Tensor
    masks: Mapping[str, np.ndarray] = field(default_factory=dict)
    others: np.ndarray | None = None


@dataclass(frozen=True)
class Artifact:
    """A tensor that preparation makes once and training reads.

    part:  of a run that makes it: the only network that is loaded for it.
    of:    what there is one of: a sample, a prompt, a data set (`TrainableFamily.constants`).
    reads: what of a sample it is made from; "frames" is the number of them, "mask" the mask of the run,
           "masks" those of `clip_masks`.
    keys:  settings that change its numbers, as `section.key`.
    shape: for a clip of `data.num_frames`; None where only the network or the sample knows.
    older: (file, entry) under which published trainers keep it, as a .pt file in the sample's folder.
    padded: (file, rows) of a prompt's, where they read a bare tensor [1, rows, width] from each sample's
            folder, with zero rows behind the prompt.
    """

    name: str
    part: Literal["text", "vae", "audio", "image"]
    of: Literal["sample", "prompt", "data set"]
    reads: tuple[Literal["video", "audio", "frames", "prompt", "mask", "masks", "others"], ...]
    keys: tuple[str, ...]
    shape: tuple[int | None, ...]
    older: tuple[str, str] | None = None
    padded: tuple[str, int] | None = None


@dataclass(frozen=True)
class Draw:
    """One sample of an optimizer step; the key of all its random numbers.

    step: optimizer steps before it; slot: its place among the `slots` samples of the step, counted over all
    processes and forward passes. How a step is cut into passes, processes and workers is no part of the key,
    so it changes no number.
    """

    seed: int
    step: int
    slot: int
    slots: int

    def uniform(self, purpose: str) -> float:
        """A number in [0, 1)."""
        return stable_hash(self.seed, purpose, self.step, self.slot) / (1 << 63)

    def integer(self, purpose: str, below: int) -> int:
        """A whole number in [0, below)."""
        return stable_hash(self.seed, purpose, self.step, self.slot) % below


class TrainableFamily(Family, Protocol):
    """Training. Random numbers come by key, one `Draw` per sample of the batch."""

    clip_masks: tuple[str, ...]
    """Masks that a sample has for each frame, in the folder `NAME_masks`; all white where it has none."""

    def artifacts(self, cfg: RunConfig) -> tuple[Artifact, ...]:
        """What preparation makes for a run. Arithmetic."""

    def frames_read(
        self, frames: int, wanted: Collection[str], cfg: RunConfig
    ) -> tuple[tuple[int, int], ...]:
        """Ranges of a sample's `frames` that `encode_clip` will read for the artifacts `wanted`; the first
        is the clip. Raises UnusableVideo for too few. Arithmetic."""

    def encode_clip(
        self, modules: Modules, clip: Clip, wanted: Collection[str], cfg: RunConfig
    ) -> dict[str, Tensor]:
        """The artifacts `wanted` of a sample or of its prompt, float32 without a batch; prepared and live."""

    def constants(
        self, modules: Modules, frames: int, wanted: Collection[str], cfg: RunConfig
    ) -> dict[str, Tensor]:
        """The artifacts `wanted` that a whole data set shares; frames: pixel frames of a clip."""

    def training_condition(
        self,
        samples: Sequence[Mapping[str, Tensor]],
        constants: Mapping[str, Tensor],
        draws: Sequence[Draw],
        cfg: RunConfig,
    ) -> Condition:
        """The condition of a batch, by `build_condition`; what the random numbers of a sample decide is
        decided before: given frames, reference, dropouts.

        samples: artifacts by name, each without a batch, all of one length; constants: those of the data set,
        and "mask", the mask as an image, float [1, 1, h, w], where the run has one. `Condition.clean` are all
        latents of the clips.
        """

    def sample_timesteps(self, draws: Sequence[Draw], frames: int, cfg: RunConfig) -> Timesteps:
        """Sigmas to train at; frames: latent frames of the clips."""

    def training_forward(self, dit: nn.Module, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Exactly one `dit.forward` from the raw condition: the velocity [B, C, T, h, w]."""

    def loss(
        self,
        velocity: Tensor,
        target: Tensor,
        condition: Condition,
        timesteps: Timesteps,
        cfg: RunConfig,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of each sample, float32 [B], and what is shown beside it, each [B]; the trainer averages over
        the step."""
