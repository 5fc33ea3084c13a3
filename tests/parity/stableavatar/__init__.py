"""The stableavatar format: what is compared, and the two tables of what is not."""

from __future__ import annotations

from ..golden import Format, Listed
from . import long_pipeline, network, one_window, projector, schedule, settings, windows

_WAITS_FOR = (
    Listed("set5_loss.safetensors", "*", "training"),
    Listed("set5_loss_info.json", "*", "training"),
)

_PROBE = "spec/stableavatar.md e.3: no frames, or no end, where the audio fits into one window"
_DEFECTS = (
    Listed("set4_window_plan.json", "plans.*.probe", _PROBE),
    Listed("set4_window_plan.json", "plans.*.transformer_calls", _PROBE),
    Listed("set4_window_plan.json", "plans.*.output_all_zero", _PROBE),
)

_WORDS = (
    Listed("meta.json", "*.note", "a remark"),
    Listed("meta.json", "*.order", "the order of the scales in a pair: text, audio"),
    Listed("schedules.json", "diffusers", "whose schedule it is"),
    Listed("schedules.json", "note", "a remark"),
    Listed("set4_window_plan.json", "denoiser.formula", "the network that `fusion` runs, in words"),
)

STABLEAVATAR = Format(
    name="stableavatar",
    checks=(
        *settings.checks,
        *projector.checks,
        *network.checks,
        *one_window.checks,
        *windows.checks,
        *long_pipeline.checks,
        *schedule.checks,
    ),
    waits_for=_WAITS_FOR,
    defects=_DEFECTS,
    words=_WORDS,
)
