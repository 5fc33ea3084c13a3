"""The networks of tiny releases put together without the product's reader, map or merge."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel, Wav2Vec2Config

from avatarctl.family import Modules
from avatarctl.models.clip import ClipImageEncoder, clip_config
from avatarctl.models.omniavatar import OmniAvatarTransformer
from avatarctl.models.stableavatar import StableAvatarTransformer
from avatarctl.models.text import PromptEncoder
from avatarctl.models.vae import WanVae
from avatarctl.models.wav2vec import FrameWav2Vec2
from tests.pipelines import tiny_release as tiny
from tests.pipelines import tiny_stable_release as stable
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
    encoders = _encoders(release.text, release.vae, release.audio, root / "Wan2.1-T2V-14B")
    return Modules(transformer(merged(release)), *encoders, device=torch.device("cpu"))


def stable_modules(release: stable.StableRelease, root: Path) -> Modules:
    """The same of the release with an image encoder."""
    encoders = _encoders(release.text, release.vae, release.audio, root / stable.BASE)
    image = _image_encoder(release.clip)
    return Modules(_stable_transformer(release.square), *encoders, image=image, device=torch.device("cpu"))


def _stable_transformer(state: State) -> StableAvatarTransformer:
    dims = stable.DIMS
    network = StableAvatarTransformer(
        num_attention_heads=dims.heads,
        attention_head_dim=dims.width // dims.heads,
        in_channels=36,
        out_channels=16,
        text_dim=dims.text_width,
        freq_dim=dims.frequencies,
        ffn_dim=dims.ffn,
        num_layers=dims.layers,
        image_dim=stable.CLIP_WIDTH,
        vocal_dim=dims.wav2vec_width,
        vocal_heads=stable.VOCAL_HEADS,
        vocal_layers=stable.VOCAL_LAYERS,
    )
    network.load_state_dict({stable_name(name): tensor for name, tensor in state.items()})
    return network.eval().requires_grad_(False)


STABLE_TOP = {
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}
STABLE_BLOCK = {
    "k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k", "k_vocal": "vocal_k",
    "v_vocal": "vocal_v",
}  # fmt: skip


def stable_name(name: str) -> str:
    """The network's name of an original one (spec/stableavatar.md o)."""
    if name.startswith("vocal_projector."):
        return name
    module, _, kind = name.rpartition(".")
    if module in STABLE_TOP:
        return f"{STABLE_TOP[module]}.{kind}"
    block, _, last = module.rpartition(".")
    if last in STABLE_BLOCK:
        return f"{block.replace('cross_attn', 'attn2')}.{STABLE_BLOCK[last]}.{kind}"
    return diffusers_name(name)


def _image_encoder(state: State) -> ClipImageEncoder:
    network = ClipImageEncoder(
        clip_config(
            hidden_size=stable.CLIP_WIDTH,
            intermediate_size=stable.CLIP_FFN,
            num_hidden_layers=stable.CLIP_LAYERS - 1,
        )
    )
    named = {
        "embeddings.patch_embedding.weight": state["visual.patch_embedding.weight"],
        "embeddings.class_embedding": state["visual.cls_embedding"].flatten(),
        "embeddings.position_embedding.weight": state["visual.pos_embedding"][0],
    }
    for kind in ("weight", "bias"):
        named[f"pre_layrnorm.{kind}"] = state[f"visual.pre_norm.{kind}"]
        for i in range(stable.CLIP_LAYERS - 1):
            theirs, ours = f"visual.transformer.{i}", f"encoder.layers.{i}"
            for letter, part in zip("qkv", state[f"{theirs}.attn.to_qkv.{kind}"].chunk(3), strict=True):
                named[f"{ours}.self_attn.{letter}_proj.{kind}"] = part
            for source, target in (
                ("attn.proj", "self_attn.out_proj"), ("norm1", "layer_norm1"), ("norm2", "layer_norm2"),
                ("mlp.0", "mlp.fc1"), ("mlp.2", "mlp.fc2"),
            ):  # fmt: skip
                named[f"{ours}.{target}.{kind}"] = state[f"{theirs}.{source}.{kind}"]
    network.load_state_dict(named)
    return network.float().eval().requires_grad_(False)


def _encoders(
    text_state: State, vae_state: State, audio_state: State, folder: Path
) -> tuple[WanVae, PromptEncoder, FrameWav2Vec2]:
    """VAE, text and audio; `folder` has the tokenizer."""
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
    text.load_state_dict(_text_names(text_state), strict=False)  # embed_tokens is tied to shared
    words = PreTrainedTokenizerFast.from_pretrained(folder / "google" / "umt5-xxl")
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2)
    vae.load_state_dict(convert_wan_vae_to_diffusers(dict(vae_state)))
    audio = FrameWav2Vec2(Wav2Vec2Config(**tiny.audio_config(tiny.TINY)))
    audio.load_state_dict(_audio_names(audio_state))
    for network in (text, vae, audio):
        network.eval().requires_grad_(False)
    return WanVae(vae), PromptEncoder(text.float(), words), audio


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


def _audio_names(state: State) -> State:
    weight = "encoder.pos_conv_embed.conv.parametrizations.weight.original"
    renamed = {}
    for name, tensor in state.items():
        if not name.startswith("lm_head."):
            name = name.removeprefix("wav2vec2.")
            name = name.replace("encoder.pos_conv_embed.conv.weight_g", f"{weight}0")
            renamed[name.replace("encoder.pos_conv_embed.conv.weight_v", f"{weight}1")] = tensor
    return renamed
