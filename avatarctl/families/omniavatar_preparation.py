"""What OmniAvatar learns from: artifacts of a sample, made by the functions that inference calls.

Specification: spec/omniavatar.md g.3, h. Latents are normalised; nothing here has a batch.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Final

from avatarctl.conditioning.masking import reference_range
from avatarctl.config import RunConfig
from avatarctl.errors import UnusableVideo
from avatarctl.events import silent
from avatarctl.family import Artifact, Clip, Modules
from avatarctl.timeline import SAMPLES_PER_FRAME, frames_of_samples, latent_frames

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Preparation"]

_CHANNELS: Final = 16
_PIXELS: Final = 8
_OLDER_TEXT: Final = ("text_emb.pt", 512)  # spec/omniavatar.md h.1
_SHORTEST_CLIP: Final = 5  # the public trainer skips less (spec/omniavatar.md g.2)
_VIDEO_KEYS: Final = ("data.width", "data.height", "data.num_frames", "input.fit", "runtime.dtype")


class Preparation:
    """The preparing half of `TrainableFamily`; holds nothing."""

    clip_masks: tuple[str, ...] = ()

    def artifacts(self, cfg: RunConfig) -> tuple[Artifact, ...]:
        """Latents of the clip; what masks, reference sequence and references add; audio, text, constants."""
        data, channels = cfg.data, cfg.model.channels
        assert data.num_frames is not None and data.height is not None and data.width is not None
        plane = (data.height // _PIXELS, data.width // _PIXELS)
        shape = (_CHANNELS, latent_frames(data.num_frames), *plane)
        # A two-step file has the name of one that is masked in one step (spec/omniavatar.md h.1, h.5).
        file = "vae_latents.pt" if data.mask_rule == "first_keep" else "vae_latents_mask_all.pt"
        made = [Artifact("latents", "vae", "sample", ("video",), _VIDEO_KEYS, shape, (file, "input_latents"))]
        if channels in (49, 65):
            masked = (*_VIDEO_KEYS, "data.mask_rule")
            older = (file, "masked_latents")
            made.append(Artifact("masked_latents", "vae", "sample", ("video", "mask"), masked, shape, older))
        if channels == 65 or data.reference_sequence:
            keys = (*_VIDEO_KEYS, "data.reference_frames")
            older = ("ref_latents.pt", "ref_sequence_latents")
            made.append(Artifact("reference_sequence", "vae", "sample", ("video",), keys, shape, older))
        if data.references:
            drawn = (*_VIDEO_KEYS, "data.references", "runtime.seed")
            several = (_CHANNELS, data.references, *plane)
            made.append(Artifact("references", "vae", "sample", ("others",), drawn, several))
        features, text, empty = (data.num_frames, None), (None, None), ("runtime.dtype",)
        audio = ("audio_emb_omniavatar.pt", "audio_emb")
        window = ("long_video.audio_window",)
        return (
            *made,
            Artifact("audio_features", "audio", "sample", ("audio", "frames"), window, features, audio),
            Artifact("silence", "audio", "data set", (), ("data.num_frames",), features),
            Artifact("text", "text", "prompt", ("prompt",), empty, text, padded=_OLDER_TEXT),
            Artifact("empty_prompt", "text", "data set", (), empty, text),
            Artifact("negative_prompt", "text", "data set", (), ("input.negative_prompt", *empty), text),
        )

    def frames_read(
        self, frames: int, wanted: Collection[str], cfg: RunConfig
    ) -> tuple[tuple[int, int], ...]:
        """The clip, from the first frame on; then its reference sequence by the rule of inference."""
        clip = _clip_frames(frames, cfg)
        if "reference_sequence" not in wanted:
            return ((0, clip),)
        return (0, clip), _sequence_range(frames, clip, cfg)

    def encode_clip(
        self, modules: Modules, clip: Clip, wanted: Collection[str], cfg: RunConfig
    ) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        if {"latents", "masked_latents", "reference_sequence"} & set(wanted):
            made |= _video(modules, clip, wanted, cfg)
        if "references" in wanted:
            made["references"] = _references(modules, clip)
        if "audio_features" in wanted:
            made["audio_features"] = _audio(modules, clip, cfg)
        if "text" in wanted:
            made["text"] = _text(modules, clip.prompt)
        return made

    def constants(
        self, modules: Modules, frames: int, wanted: Collection[str], cfg: RunConfig
    ) -> dict[str, Tensor]:
        """Dropped audio is the features of silence, not zeros (spec/omniavatar.md g.1)."""
        import torch

        made = {}
        prompts = {"empty_prompt": "", "negative_prompt": cfg.input.negative_prompt or ""}
        for name in prompts.keys() & set(wanted):
            made[name] = _text(modules, prompts[name])
        if "silence" in wanted:
            silence = torch.zeros(1, frames * SAMPLES_PER_FRAME, device=modules.device)
            made["silence"] = modules.audio.features(silence, frames)[0]
        return made


def _clip_frames(frames: int, cfg: RunConfig) -> int:
    """4n + 1 of a sample's frames, `data.num_frames` of them at most."""
    assert cfg.data.num_frames is not None
    clip = (min(frames, cfg.data.num_frames) - 1) // 4 * 4 + 1
    if clip < _SHORTEST_CLIP:
        raise UnusableVideo(f"too short: {frames} of {_SHORTEST_CLIP} frames at 25 a second")
    return clip


def _sequence_range(frames: int, clip: int, cfg: RunConfig) -> tuple[int, int]:
    start, stop = reference_range(frames, 0, clip)
    return start, min(stop, start + (cfg.data.reference_frames or clip))


def _video(modules: Modules, clip: Clip, wanted: Collection[str], cfg: RunConfig) -> dict[str, Tensor]:
    from avatarctl.conditioning.masking import keep_map
    from avatarctl.models.encode import reference_latents, source_latents

    length = _clip_frames(clip.pixels.frames, cfg)
    made = {}
    names = {"latents": "latents", "masked_latents": "masked"}
    if asked := [name for name in names if name in wanted]:
        frames = clip.pixels.read(0, length)
        keep = keep_map(clip.keep.to(modules.device), (frames.shape[1], frames.shape[2]))
        parts = [names[name] for name in asked]
        latents = source_latents(modules.vae, frames, keep, cfg.data.mask_rule, wanted=parts)
        made = {name: latents[names[name]][0] for name in asked}
    if "reference_sequence" in wanted:
        frames = clip.pixels.read(*_sequence_range(clip.pixels.frames, length, cfg))
        made["reference_sequence"] = reference_latents(
            modules.vae, frames, latent_frames(length), modules.device
        )[0]
    return made


def _references(modules: Modules, clip: Clip) -> Tensor:
    """Each frame coded alone, as the reference of a chunk is: [16, N, h, w]."""
    import torch

    from avatarctl.models.encode import frames_tensor

    assert clip.others is not None
    alone = [modules.vae.encode(frames_tensor(frame[None], modules.device))[0] for frame in clip.others]
    return torch.cat(alone, dim=1)


def _audio(modules: Modules, clip: Clip, cfg: RunConfig) -> Tensor:
    """One row per pixel frame of the audio or of the video, whichever is longer (spec/omniavatar.md h.4, v2):
    [frames, width]."""
    from avatarctl.models.encode import AudioFeatures

    recording = clip.waveform
    features = AudioFeatures(
        modules.audio,
        recording.reader,
        samples=recording.samples,
        mean=recording.mean,
        variance=recording.variance,
        frames=max(frames_of_samples(recording.samples), clip.pixels.frames),
        window_seconds=cfg.long_video.audio_window,
        device=modules.device,
    )
    return features.rows(0, features.frames)[0]


def _text(modules: Modules, prompt: str) -> Tensor:
    """States of the prompt without the rows behind it, which are zero: [tokens, width]."""
    from avatarctl.models.encode import encode_prompt
    from avatarctl.models.text import clean_prompt

    cleaned = clean_prompt(prompt)
    states: Any = encode_prompt(modules.text, cleaned, modules.device, silent)
    return states[0, : min(modules.text.tokens(cleaned), modules.text.text_len)].float()
