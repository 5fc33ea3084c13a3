"""Recorded networks of other layouts than that of the folders here are built from what the folder states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from avatarctl.models.stableavatar import StableAvatarTransformer
from avatarctl.weights.layouts import STABLEAVATAR

from .golden import Folder, comparisons
from .stableavatar import STABLEAVATAR as FORMAT
from .stableavatar.building import CONFIG, STATE


@pytest.mark.parametrize("hidden", [None, 10])
def test_a_recorded_network_of_one_or_two_projections_of_audio(hidden: int | None, tmp_path: Path) -> None:
    """Two: the 14B layout. Its names and tensors go through the network and come out as recorded."""
    model = StableAvatarTransformer(
        num_attention_heads=2, attention_head_dim=12, text_dim=8, freq_dim=8, ffn_dim=16, num_layers=1,
        image_dim=6, vocal_dim=7, vocal_hidden_dim=hidden, vocal_heads=4, vocal_layers=3, vocal_ffn_dim=20,
    )  # fmt: skip
    state = STABLEAVATAR.key_map.rename_to_original(model.state_dict())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / STATE)
    stated = {
        "model_type": "i2v", "patch_size": [1, 2, 2], "in_dim": 36, "dim": 24, "ffn_dim": 16, "freq_dim": 8,
        "text_dim": 8, "out_dim": 16, "num_heads": 2, "num_layers": 1, "eps": 1e-6, "qk_norm": True,
        "cross_attn_norm": True, "audio_in_dim": 7, "audio_proj_dim": 24, "vocal_num_heads": 4,
        "vocal_num_layers": 3, "vocal_ffn_dim": 20, "clip_image_dim": 6,
    }  # fmt: skip
    (tmp_path / CONFIG).write_text(json.dumps(stated), encoding="utf-8")
    names = [name for name in state if ".proj_model.proj" in name]
    assert len(names) == (1 if hidden is None else 2)
    cases = {case.check.name: case for case in comparisons(Folder(tmp_path, "other", FORMAT))}
    cases["sizes_of_the_network"].run()
    cases["names_round_trip"].run()
