"""Which keys each command reads. The others are checked as well, and have no effect."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Final

from avatarctl.config.keys import KeySpec
from avatarctl.config.sections import keys

__all__ = ["COMMANDS", "CommandKeys", "keys_of", "unread"]


@dataclass(frozen=True)
class CommandKeys:
    """What one command reads, key by key: a new key of a section is read by nobody until it stands here.

    main: the sections that the command is about. A flag that keys of several sections could have belongs to
          these; the other keys are set by `-o`.
    read: names of keys by section, separated by spaces.
    """

    main: tuple[str, ...]
    read: Mapping[str, str]


_PREPARE: Final = CommandKeys(
    main=("data",),
    read={
        "model": "name channels audio_offset weights_root weights compat",
        "input": "fit prompt negative_prompt",
        "long_video": "audio_window",
        "data": "path videos num_frames width height window stride max_windows faces face_look "
        "audio_name mask mask_rule reference_sequence reference_frames references artifact_dtype format "
        "shard workers force",
        "runtime": "seed device dtype log_level",
    },
)
"""Both commands read the same keys, so that one configuration serves both."""

_TRAIN: Final = CommandKeys(
    main=("train", "data", "checkpoint"),
    read={
        "model": "name channels audio_offset weights_root weights compat",
        "input": "fit prompt negative_prompt",
        "sampling": "shift",
        "long_video": "audio_window",
        "output": "path",
        "memory": "vae_gradient activation_checkpointing base_precision optimizer_device swap_blocks shard",
        "data": "path num_frames width height faces audio_name mask mask_rule reference_sequence "
        "reference_frames references artifact_dtype workers",
        "train": "mode init optimizer learning_rate final_learning_rate schedule hold betas weight_decay "
        "warmup_steps max_steps batch_size gradient_accumulation lora_rank lora_alpha lora_targets "
        "text_dropout audio_dropout prefix_frames prefix_dropout prefix_noise timestep_weight mouth_weight "
        "clip_norm ema",
        "aux": "losses sync_weight lpips_weight trepa_weight recon_weight sync_mode lpips_backend window "
        "stride frames trepa_mode mouth_crop max_sigma",
        "checkpoint": "every keep_last resume accept_schedule",
        "validation": "every sets samples steps metrics holdout",
        "runtime": "seed device dtype attention compile gpus trackers log_level",
    },
)

COMMANDS: Final[dict[str, CommandKeys]] = {
    "precompute-audio": _PREPARE,
    "precompute-latents": _PREPARE,
    "train i2v": _TRAIN,
    "train v2v": _TRAIN,
    "infer": CommandKeys(
        main=("sampling", "long_video", "output"),
        read={
            "model": "name channels audio_offset weights_root weights lora compat",
            "input": "image fit video audio prompt negative_prompt jobs latents face face_detector",
            "sampling": "steps guidance_scale audio_guidance_scale guidance_rule null_audio batch_branches "
            "latents_dtype guidance_interval shift solver cache cache_threshold preset",
            "long_video": "strategy num_frames overlap_frames schedule blend carry max_tokens max_size "
            "audio_window",
            "output": "path fps width height lead_silence length soundtrack paste crf preview save_latents "
            "overwrite",
            "memory": "mode group_blocks base_precision swap_blocks",  # the others are about training
            "data": "width height mask mask_rule",  # what a video-to-video model learnt from
            "runtime": "seed device dtype attention compile gpus log_level",
        },
    ),
}
"""By the words of the command: "infer"; of a command inside a group all of them."""


def keys_of(command: str) -> Mapping[str, KeySpec]:
    """The keys that `command` reads, by dotted name, in the order of `RunConfig`."""
    read = {section: names.split() for section, names in COMMANDS[command].read.items()}
    return {dotted: spec for dotted, spec in keys().items() if spec.name in read.get(spec.section, ())}


def unread(asked: Container[str], command: str) -> tuple[str, ...]:
    """The keys of `asked` that `command` does not read, in the order of `RunConfig`."""
    read = keys_of(command)
    return tuple(dotted for dotted in keys() if dotted in asked and dotted not in read)
