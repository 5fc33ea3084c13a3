"""The omniavatar format: what is compared, and the two tables of what is not."""

from __future__ import annotations

from ..golden import Format, Listed
from . import adapters, chunks, denoising, encoders, network, schedule, training, video

_WAITS_FOR = (
    Listed("denoise.safetensors", "teacache.2pass.*", "TeaCache"),
    Listed("denoise.safetensors", "teacache.rel_l1_distances", "TeaCache"),
    Listed("vae.safetensors", "*_tiled_*", "the tiled VAE"),
)

_DEFECTS = (
    Listed(
        "train_v2v_in*.safetensors",
        "*.logged_unweighted_mse_reference",
        "spec/omniavatar.md j.37: an error that is called unweighted after it was weighted",
    ),
    Listed("scheduler.safetensors", "train1000.timesteps_bf16", "spec/omniavatar.md j.7: timesteps in bf16"),
    Listed(
        "scheduler.safetensors",
        "train1000.index_after_bf16_rounding",
        "spec/omniavatar.md j.7: the index looked up again from a rounded timestep",
    ),
    Listed(
        "denoise.safetensors",
        "teacache.*reference_bug*",
        "spec/omniavatar.md j.15: the middle cache of three branches made anew in every step",
    ),
)

OMNIAVATAR = Format(
    name="omniavatar",
    checks=(
        *network.checks,
        *denoising.checks,
        *schedule.checks,
        *chunks.checks,
        *encoders.checks,
        *adapters.checks,
        *video.checks,
        *training.checks,
    ),
    waits_for=_WAITS_FOR,
    defects=_DEFECTS,
)
