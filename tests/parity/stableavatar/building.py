"""The recorded network and settings: sizes from tensors, heads and eps from config.json."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from avatarctl.models.stableavatar import StableAvatarTransformer
from avatarctl.weights.layouts import STABLEAVATAR

from ..golden import Folder, Reader

STATE = "transformer_state.safetensors"
CONFIG = "config.json"
META = "meta.json"


@functools.cache
def state_of(folder: Folder) -> Mapping[str, Tensor]:
    """The recorded weights under their original names. Skips the running test where there are none."""
    return folder.open(STATE).group("")


def setting(reader: Reader, name: str) -> Any:
    """A value of config.json beside the file."""
    return reader.folder.open(CONFIG).take(name)


def run_setting(reader: Reader, name: str) -> Any:
    """A value that meta.json states for the file."""
    return reader.folder.open(META).take(f"{reader.file}.{name}")


def transformer(reader: Reader) -> StableAvatarTransformer:
    """The recorded network."""
    state = state_of(reader.folder)
    patch = state["patch_embedding.weight"]
    width, channels = patch.shape[:2]
    heads = setting(reader, "num_heads")
    projector = {key: value for key, value in state.items() if key.startswith("vocal_projector.")}
    # One projection of audio, or two with a width between them (spec/stableavatar.md b.3).
    entries = [projector[key] for key in sorted(projector) if ".proj_model.proj" in key]
    model = StableAvatarTransformer(
        patch_size=tuple(patch.shape[2:]),
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=channels,
        out_channels=state["head.head.weight"].shape[0] // patch[0, 0].numel(),
        text_dim=state["text_embedding.0.weight"].shape[1],
        freq_dim=state["time_embedding.0.weight"].shape[1],
        ffn_dim=state["blocks.0.ffn.0.weight"].shape[0],
        num_layers=_count(state, "blocks."),
        cross_attn_norm=setting(reader, "cross_attn_norm"),
        qk_norm="rms_norm_across_heads" if setting(reader, "qk_norm") else None,
        eps=setting(reader, "eps"),
        image_dim=state["img_emb.proj.0.weight"].shape[0],
        vocal_dim=entries[0].shape[1],
        vocal_hidden_dim=None if len(entries) == 1 else entries[0].shape[0],
        vocal_heads=setting(reader, "vocal_num_heads"),
        vocal_layers=_count(projector, "vocal_projector.blocks."),
        vocal_ffn_dim=projector["vocal_projector.blocks.0.ffn.0.weight"].shape[0],
    )
    # Strictly: every weight has a place, and every place a weight.
    model.load_state_dict(STABLEAVATAR.key_map.rename_to_internal(state))
    return model.eval()


def compare_output(reader: Reader, key: str, actual: Tensor) -> None:
    """A result of one forward: 1e-5 absolute on values up to 8, in proportion on larger ones."""
    largest = float(reader.take(key).abs().max())
    reader.compare(key, actual, atol=1e-5 * max(1.0, largest / 8))


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Blocks under a prefix."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def padded_text(reader: Reader, key: str) -> Tensor:
    """A recorded context [n, width] as text encoders give it: [1, text_len, width], zeros behind."""
    context = reader.take(key)
    return F.pad(context, (0, 0, 0, setting(reader, "text_len") - len(context)))[None]


def latents_and_condition(reader: Reader) -> Tensor:
    """x with y behind it."""
    return torch.cat([reader.take("x"), reader.take("y")], dim=1)
