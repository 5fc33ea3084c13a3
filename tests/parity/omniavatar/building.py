"""Networks from recorded weights: sizes come from tensor shapes, the rest from metadata."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from torch import Tensor, nn

from avatarctl.models.omniavatar import OmniAvatarTransformer
from avatarctl.weights.layouts import OMNIAVATAR

from ..golden import Reader, shown

HEAD_WIDTH_SOURCE = "dit_in49.safetensors"


def settings(reader: Reader) -> dict[str, Any]:
    """The metadata of a file with its `config` unfolded."""
    return {**reader.metadata, **json.loads(reader.metadata.get("config", "{}"))}


def transformer(reader: Reader) -> OmniAvatarTransformer:
    """The network of the `state.*` keys of a file. Where the metadata lacks num_heads, the head width is that
    of dit_in49 in the same folder, as the format says."""
    state = reader.group("state.")
    patch = state["patch_embedding.weight"]
    width, channels = patch.shape[:2]
    head_width = width_of_head(reader, width)
    hidden, packed = state["audio_proj.proj.weight"].shape
    model = OmniAvatarTransformer(
        patch_size=tuple(patch.shape[2:]),
        num_attention_heads=width // head_width,
        attention_head_dim=head_width,
        in_channels=channels,
        out_channels=state["head.head.weight"].shape[0] // patch[0, 0].numel(),
        text_dim=state["text_embedding.0.weight"].shape[1],
        freq_dim=state["time_embedding.0.weight"].shape[1],
        ffn_dim=state["blocks.0.ffn.0.weight"].shape[0],
        num_layers=1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks.")),
        eps=float(settings(reader).get("eps", 1e-6)),
        audio_input_dim=packed // 4,
        audio_hidden_size=hidden,
    )
    load(model, OMNIAVATAR.key_map.rename_to_internal(state), reader, OMNIAVATAR.key_map.to_original)
    return model


def width_of_head(reader: Reader, width: int) -> int:
    if heads := settings(reader).get("num_heads"):
        return width // int(heads)
    if HEAD_WIDTH_SOURCE not in reader.folder.files:
        pytest.skip(f"{reader.file} does not state num_heads and {HEAD_WIDTH_SOURCE} is not there to tell")
    stated = settings(reader.folder.open(HEAD_WIDTH_SOURCE))
    return int(stated["dim"]) // int(stated["num_heads"])


def load(
    model: nn.Module,
    state: Mapping[str, Tensor],
    reader: Reader,
    to_original: Callable[[str], str | None] = lambda key: key,
) -> None:
    """Strict loading. A weight that the file lacks skips the test where the folder may lack it; a weight that
    our network lacks, or that the original never had, fails."""
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = [key for key in missing if key.endswith("embed_tokens.weight")]  # one tensor under two names
    missing = [key for key in missing if key not in tied]
    assert not unexpected, f"{reader.file}: our network has no place for {shown(unexpected)}"
    invented = [key for key in missing if to_original(key) is None]
    assert not invented, f"our network has weights that the original does not: {shown(invented)}"
    for key in missing:
        reader.take(f"state.{to_original(key)}")
