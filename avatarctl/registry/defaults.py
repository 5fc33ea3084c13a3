"""What a run of a model starts from: values of RunConfig by dotted key, see `Row.defaults` and `Row.compat`.

Sources: spec/omniavatar.md d; spec/stableavatar.md d, e, f, k; spec/cartoon-world.md 3 to 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

__all__ = [
    "CARTOON",
    "CARTOON_V2V",
    "COMPAT",
    "OMNIAVATAR",
    "STABLEAVATAR",
    "STABLEAVATAR_COMPAT",
    "STABLEAVATAR_OBLONG",
    "STABLEAVATAR_TINY",
]

Defaults = Mapping[str, Any]

COMPAT: Final[Mapping[str, Defaults]] = {
    "reference": {"output.lead_silence": 0.3, "model.audio_offset": 1},
    "fork": {"model.audio_offset": 0, "aux.sync_mode": "logits"},
}
"""What each `model.compat` sets, above the model row and below everything that a person sets."""

_PROMPT: Final = "a person is talking"
_NEGATIVE_PROMPT: Final = (
    "Vivid color tones, background/camera moving quickly, screen switching, subtitles and special effects, "
    "mutation, overexposed, static, blurred details, subtitles, style, work, painting, image, still, "
    "overall grayish, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, "
    "poorly drawn hands, poorly drawn face, deformed, disfigured, malformed limbs, fingers merging, "
    "motionless image, chaotic background, three legs, crowded background with many people, walking backward"
)

_WAN_NEGATIVE_PROMPT: Final = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Wan 2.1's own, with which its image-to-video models are used."""

CARTOON: Final[Defaults] = {
    "model.channels": 33,
    "model.audio_offset": 0,
    "input.prompt": _PROMPT,
    "input.negative_prompt": "",
    "sampling.steps": 4,
    "sampling.guidance_scale": 1.0,
    "sampling.shift": 5.0,
    "long_video.num_frames": 33,
    "long_video.overlap_frames": 5,  # r of I2V 0.943 for 0.939 with 1, and real speech follows better
    "output.width": 64,
    "output.height": 64,
    "data.num_frames": 33,
    "data.width": 64,
    "data.height": 64,
    "data.faces": "none",  # detectors of people's faces do not know drawn ones
    "train.init": "zero_channels",
    "memory.vae_gradient": "full",
    "train.max_steps": 24,
    "train.batch_size": 2,
    "train.mode": "full",
    "runtime.dtype": "float32",
}

CARTOON_V2V: Final[Defaults] = {**CARTOON, "model.channels": 49}

OMNIAVATAR: Final[Defaults] = {
    "model.channels": 33,
    "model.audio_offset": 1,
    "input.prompt": _PROMPT,
    "input.negative_prompt": _NEGATIVE_PROMPT,
    "sampling.steps": 50,
    "sampling.guidance_scale": 4.5,
    "sampling.shift": 5.0,
    "long_video.overlap_frames": 13,
    "long_video.max_tokens": 30_000,
    "long_video.max_size": 720,
    "data.num_frames": 81,
    "data.width": 512,
    "data.height": 512,
    "data.faces": "auto",
    "train.init": "zero_channels",
    "runtime.dtype": "bfloat16",
}

STABLEAVATAR_COMPAT: Final[Mapping[str, Defaults]] = {"reference": {"input.fit": "stretch"}}
"""All other differences are in numbers. The rounding of latents is a setting of its own."""

STABLEAVATAR: Final[Defaults] = {
    "model.channels": 36,
    "model.audio_offset": 0,
    "input.prompt": "The protagonist is talking",
    "input.negative_prompt": _WAN_NEGATIVE_PROMPT,
    "sampling.steps": 50,
    "sampling.guidance_scale": 5.0,
    "sampling.audio_guidance_scale": 4.0,
    "sampling.shift": 5.0,
    "long_video.strategy": "fused",
    "long_video.num_frames": 81,
    "long_video.overlap_frames": 37,
    "output.width": 512,
    "output.height": 512,
    "data.num_frames": 81,
    "data.width": 512,
    "data.height": 512,
    "data.faces": "auto",
    "train.init": "zero_channels",
    "runtime.dtype": "bfloat16",
}

STABLEAVATAR_OBLONG: Final[Defaults] = {
    **{key: value for key, value in STABLEAVATAR.items() if not key.startswith("output.")},
    "data.width": 832,
    "data.height": 480,
}
"""Without a size of the video: landscape or portrait, the image decides."""

STABLEAVATAR_TINY: Final[Defaults] = {
    **STABLEAVATAR,
    "sampling.steps": 4,
    "long_video.num_frames": 17,
    "long_video.overlap_frames": 5,
    "output.width": 64,
    "output.height": 64,
    "data.num_frames": 17,
    "data.width": 64,
    "data.height": 64,
    "runtime.dtype": "float32",
}
