"""What a validation gives to the loop of `infer` in place of networks of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from avatarctl.family import TextEncoder
from avatarctl.host import HOST, to_device, to_host
from avatarctl.training.network import Network

__all__ = ["KnownTexts", "Precise"]


class KnownTexts:
    """A text encoder that knows some prompts by heart, so that none need stay in memory. host: where they
    wait."""

    def __init__(
        self, encoder: TextEncoder, prompts: Sequence[str], device: torch.device, host: torch.device = HOST
    ) -> None:
        self.text_len = encoder.text_len
        self._tokens = {prompt: encoder.tokens(prompt) for prompt in prompts}
        self._states = {
            prompt: to_host(encoder.encode(prompt, device), host, "text embeddings")
            for prompt in self._tokens
        }

    def tokens(self, prompt: str) -> int:
        return self._tokens[prompt]

    def encode(self, prompt: str, device: torch.device) -> Tensor:
        return to_device(self._states[prompt], device)


class Precise(nn.Module):
    """The network in the precision of its training; the VAE and the rest of sampling keep theirs."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self._network = network  # no module: it registers nothing

    def forward(self, *arguments: Any, **named: Any) -> Any:
        with self._network.autocast():
            return self._network.dit(*arguments, **named)
