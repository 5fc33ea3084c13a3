"""The networks of a tiny release put together without the product's reader, map or merge."""

from __future__ import annotations

from pathlib import Path

from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel, Wav2Vec2Config

from avatarctl.family import Modules
from avatarctl.models.omniavatar import OmniAvatarTransformer
from avatarctl.models.text import PromptEncoder
from avatarctl.models.vae import WanVae
from avatarctl.models.wav2vec import FrameWav2Vec2
from tests.pipelines import tiny_release as tiny
from tests.weights.release import diffusers_name

State = dict[str, Tensor]


def merged(release: tiny.Release) -> State:
    """W + alpha / rank * B @ A, whole tensors in place of the base's; original names."""
    state, scale = dict(release.base), tiny.TINY.alpha / tiny.TINY.rank
    for name, tensor in release.adapter.items():
        if name.endswith("lora_A.default.weight"):
            module = name.removesuffix(".lora_A.default.weight")
            up = release.adapter[f"{module}.lora_B.default.weight"]
            state[f"{module}.weight"] = state[f"{module}.weight"] + scale * (up @ tensor)
        elif "lora" not in name:
            state[name] = tensor
    return state


def transformer(state: State) -> OmniAvatarTransformer:
    network = OmniAvatarTransformer(
        num_attention_heads=tiny.TINY.heads,
        attention_head_dim=tiny.TINY.width // tiny.TINY.heads,
        in_channels=33,
        out_channels=16,
        text_dim=tiny.TINY.text_width,
        freq_dim=tiny.TINY.frequencies,
        ffn_dim=tiny.TINY.ffn,
        num_layers=tiny.TINY.layers,
        audio_input_dim=tiny.TINY.audio_width,
        audio_hidden_size=tiny.TINY.audio_hidden,
    )
    network.load_state_dict({diffusers_name(name): tensor for name, tensor in state.items()})
    return network.eval().requires_grad_(False)


def modules(release: tiny.Release, root: Path) -> Modules:
    """Everything in float32 on the CPU; `root` is where the tokenizer was written."""
    text = UMT5EncoderModel(
        UMT5Config(
            vocab_size=tiny.VOCABULARY,
            d_model=tiny.TINY.text_width,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )
    text.load_state_dict(_text_names(release.text), strict=False)  # embed_tokens is tied to shared
    words = PreTrainedTokenizerFast.from_pretrained(root / "Wan2.1-T2V-14B" / "google" / "umt5-xxl")
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2)
    vae.load_state_dict(convert_wan_vae_to_diffusers(dict(release.vae)))
    sound = FrameWav2Vec2(Wav2Vec2Config(**tiny.sound_config(tiny.TINY)))
    sound.load_state_dict(_sound_names(release.sound))
    for network in (text, vae, sound):
        network.eval().requires_grad_(False)
    return Modules(transformer(merged(release)), WanVae(vae), PromptEncoder(text.float(), words), sound)


def _text_names(state: State) -> State:
    """spec/building-blocks.md 3."""
    names = {
        "token_embedding.weight": "shared.weight",
        "norm.weight": "encoder.final_layer_norm.weight",
    }
    for i in range(2):
        block = f"encoder.block.{i}.layer"
        names |= {
            f"blocks.{i}.norm1.weight": f"{block}.0.layer_norm.weight",
            f"blocks.{i}.norm2.weight": f"{block}.1.layer_norm.weight",
            f"blocks.{i}.ffn.gate.0.weight": f"{block}.1.DenseReluDense.wi_0.weight",
            f"blocks.{i}.ffn.fc1.weight": f"{block}.1.DenseReluDense.wi_1.weight",
            f"blocks.{i}.ffn.fc2.weight": f"{block}.1.DenseReluDense.wo.weight",
            f"blocks.{i}.pos_embedding.embedding.weight": (
                f"{block}.0.SelfAttention.relative_attention_bias.weight"
            ),
        }
        names |= {
            f"blocks.{i}.attn.{letter}.weight": f"{block}.0.SelfAttention.{letter}.weight"
            for letter in "qkvo"
        }
    return {names[name]: tensor for name, tensor in state.items()}


def _sound_names(state: State) -> State:
    weight = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
    renamed = {}
    for name, tensor in state.items():
        if not name.startswith("lm_head."):
            name = name.removeprefix("wav2vec2.")
            name = name.replace("encoder.pos_conv_embed.conv.weight_g", f"{weight}0")
            renamed[name.replace("encoder.pos_conv_embed.conv.weight_v", f"{weight}1")] = tensor
    return renamed
