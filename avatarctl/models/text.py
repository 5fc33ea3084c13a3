"""Prompts -> UMT5 states (spec/omniavatar.md d)."""

from __future__ import annotations

import html
import re
from typing import Any

import ftfy
import torch
from torch import Tensor, nn

__all__ = ["PromptEncoder", "clean_prompt"]


def clean_prompt(text: str) -> str:
    """Mended Unicode, HTML entities resolved twice, every run of white space one blank. Case is kept.

    For families whose published scripts do it: full-width commas become ASCII, which are other tokens.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


class PromptEncoder(nn.Module):
    """A tokenizer and `UMT5EncoderModel` behind the `TextEncoder` protocol; prompts are read as they are."""

    def __init__(self, encoder: nn.Module, tokenizer: Any, text_len: int = 512) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.text_len = text_len

    @property
    def width(self) -> int:
        """Of a row of the encoder's output."""
        width: int = self.encoder.get_input_embeddings().embedding_dim  # type: ignore[operator]
        return width

    def tokens(self, prompt: str) -> int:
        """Tokens of a prompt, end token included, before it is cut to text_len."""
        return len(self.tokenizer(prompt, add_special_tokens=True).input_ids)

    @torch.no_grad()
    def encode(self, prompt: str, device: torch.device) -> Tensor:
        """One prompt -> [1, text_len, width] on `device`, where the encoder computes; longer prompts are cut,
        rows behind the prompt are 0.

        The end token is real: the empty prompt keeps one row. Only real tokens are encoded, one prompt at a
        time: published scripts encode padding up to text_len, hide it from attention and zero it, and cut a
        batch to its shortest prompt (spec/omniavatar.md d).
        """
        ids = self.tokenizer(
            prompt, truncation=True, max_length=self.text_len, add_special_tokens=True, return_tensors="pt"
        ).input_ids.to(device)
        states: Tensor = self.encoder(input_ids=ids).last_hidden_state
        return nn.functional.pad(states, (0, 0, 0, self.text_len - ids.shape[1]))
