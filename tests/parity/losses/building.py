"""Networks of the recorded losses: sizes and seed from expected.json, weights by the formula."""

from __future__ import annotations

import functools
import json
from typing import Any

from torch import Tensor, nn

from avatarctl.models.stable_syncnet import StableSyncNet

from ..golden import Reader
from .formula import formula_state


def expected(reader: Reader) -> dict[str, Any]:
    """expected.json of the folder. Skips the running test where it is absent."""
    reader.folder.open("expected.json")
    return json.loads((reader.folder.path / "expected.json").read_text(encoding="utf-8"))


def filled(network: Any, reader: Reader, gain: float = 1.0) -> Any:
    """The network with formula weights of the folder's seed, frozen, in evaluation mode."""
    network.load_state_dict(formula_state(network, expected(reader)["seed"], gain))
    return network.eval().requires_grad_(False)


@functools.cache
def formula_weights(network: type[nn.Module], seed: int) -> dict[str, Tensor]:
    """Of a network of its default sizes. They take a second, so that they are made once."""
    return formula_state(network(), seed)


def tiny_syncnet(reader: Reader) -> StableSyncNet:
    return filled(StableSyncNet(**expected(reader)["stable_syncnet_tiny"]["config"]), reader)
