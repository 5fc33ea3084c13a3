"""A family of a test: other artifacts than any of the product's, two masks for each frame, tokens for each
clip. No file of the product knows it."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from avatarctl import registry
from avatarctl.config import RunConfig
from avatarctl.errors import UnusableVideo
from avatarctl.family import Artifact, Clip, Conventions, Modules

__all__ = ["FRAMES", "ROW", "ToyFamily"]

FRAMES = 5


class ToyFamily:
    """Takes the last five frames of a sample, each alone, through what its two masks show."""

    name = "toy"
    clip_masks = ("face", "lip")

    def conventions(self, cfg: RunConfig) -> Conventions:
        return Conventions(audio_offset=0, mask_keep=1, hole=0.0, fps=25, sigma_shift=1.0)

    def artifacts(self, cfg: RunConfig) -> tuple[Artifact, ...]:
        assert cfg.data.height is not None and cfg.data.width is not None
        plane = (cfg.data.height // 8, cfg.data.width // 8)
        keys = ("data.width", "data.height")
        return (
            Artifact("stills", "vae", "sample", ("video",), keys, (16, FRAMES, *plane)),
            Artifact("face_stills", "vae", "sample", ("video", "masks"), keys, (16, FRAMES, *plane)),
            Artifact("clip_tokens", "audio", "sample", ("audio",), (), (None, 48)),
            Artifact("words", "text", "prompt", ("prompt",), (), (None, None)),
            Artifact("hush", "audio", "data set", (), (), (None, 48)),
        )

    def frames_read(
        self, frames: int, wanted: Collection[str], cfg: RunConfig
    ) -> tuple[tuple[int, int], ...]:
        if frames < FRAMES:
            raise UnusableVideo(f"{frames} frames, and {FRAMES} are needed")
        return ((frames - FRAMES, frames),)

    def encode_clip(
        self, modules: Modules, clip: Clip, wanted: Collection[str], cfg: RunConfig
    ) -> dict[str, Tensor]:
        made = {}
        if {"stills", "face_stills"} & set(wanted):
            pixels = torch.from_numpy(clip.pixels.read(clip.pixels.frames - FRAMES, clip.pixels.frames))
            video = pixels.permute(3, 0, 1, 2)[None] / 127.5 - 1
            shown = {"stills": torch.ones(FRAMES, 1, 1)}
            if clip.masks:
                shown["face_stills"] = torch.from_numpy(clip.masks["face"]) / 255
            for name in shown.keys() & set(wanted):
                stills = (video * shown[name]).unbind(2)
                made[name] = torch.cat([modules.vae.encode(each.unsqueeze(2)) for each in stills], dim=2)[0]
        if "clip_tokens" in wanted:
            samples = torch.from_numpy(clip.waveform.reader.read(0, clip.waveform.samples))
            made["clip_tokens"] = modules.audio.tokens(samples[None])[0]
        if "words" in wanted:
            made["words"] = modules.text.encode(clip.prompt, modules.device)[0, :3]
        return made

    def constants(
        self, modules: Modules, frames: int, wanted: Collection[str], cfg: RunConfig
    ) -> dict[str, Tensor]:
        return {name: modules.audio.tokens(torch.zeros(1, frames * 640))[0] for name in wanted}


ROW = registry.Row(
    "toy-tiny", "model", "a family of a test", registry.WORKS, "package",
    family="toy",
    network=registry.ROWS["cartoon-i2v"].network,
    defaults={
        "model.audio_offset": 0,
        "input.prompt": "a toy",
        "data.num_frames": FRAMES,
        "data.width": 32,
        "data.height": 16,
        "runtime.dtype": "float32",
    },
    trained=False,
)  # fmt: skip
