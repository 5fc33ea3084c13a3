"""The losses format: what is compared, and the two tables of what is not."""

from __future__ import annotations

from ..golden import Format, Listed
from . import alignment, frames, sync

_WAITS_FOR = (
    Listed("mouth_mask_256.png", "*", "a comparison with our own drawing of the mask"),
    Listed("syncnet_eval.safetensors", "*", "scores"),
    Listed("metrics.safetensors", "*", "scores"),
    Listed("expected.json", "syncnet.*", "scores"),
    Listed("expected.json", "metrics.*", "scores"),
    Listed("state_dict_keys.json", "syncnet_v2.*", "scores"),
)

_WORDS = (
    Listed("expected.json", "seed", "read by tests/parity/losses/building.py"),
    Listed("expected.json", "*.config.*", "read by tests/parity/losses/building.py"),
    Listed("mel.safetensors", "overlap_count", "of a helper for looking at spectrograms"),
    Listed("expected.json", "videomae_tiny.*", "read by tests/parity/losses/building.py"),
    Listed("expected.json", "trepa_t*", "stands in trepa_tiny.safetensors"),
    Listed("expected.json", "mel.*", "stands in mel.safetensors"),
    Listed("expected.json", "stable_syncnet_tiny.cosine", "stands in sync_loss.safetensors"),
    Listed("expected.json", "stable_syncnet_tiny.loss_*", "stands in sync_loss.safetensors"),
)

LOSSES = Format(
    name="losses",
    checks=(*sync.checks, *frames.checks, *alignment.checks),
    waits_for=_WAITS_FOR,
    defects=(),
    words=_WORDS,
)
