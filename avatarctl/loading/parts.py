"""Published files -> networks, one function per part. Sizes come from the tensors, not from a table.

Every network is built on the meta device and filled by streaming (loading/fill.py), so that a file of another
size than the published one works, and one that lacks a tensor is refused.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel, Wav2Vec2Config

from avatarctl.errors import UnusableWeights, printable
from avatarctl.events import Emit, Notice
from avatarctl.files.strict_json import read_object, reading
from avatarctl.files.tensors import StoredTensor
from avatarctl.hub.locate import found_in
from avatarctl.loading.fill import fill, on_meta
from avatarctl.loading.tokenizer import read_tokenizer
from avatarctl.loading.wan_clip import CLIP_VISION, internal_tensors, read_clip_sizes
from avatarctl.loading.wan_vae import read_vae_sizes, vae_key_map
from avatarctl.models.clip import ClipImageEncoder, clip_config
from avatarctl.models.fp8 import is_float8_layer, store_layer
from avatarctl.models.omniavatar import OmniAvatarTransformer
from avatarctl.models.precision import is_float32_island
from avatarctl.models.stableavatar import StableAvatarTransformer
from avatarctl.models.text import PromptEncoder
from avatarctl.models.vae import WanVae, fast_on_cpu
from avatarctl.models.wav2vec import FrameWav2Vec2
from avatarctl.timeline import SAMPLE_RATE, SAMPLES_PER_FRAME
from avatarctl.weights.key_map import KeyMap
from avatarctl.weights.metadata import network_of
from avatarctl.weights.recognise import read_weight_file
from avatarctl.weights.wan import UMT5_ENCODER
from avatarctl.weights.weight_file import WeightFile

__all__ = [
    "TRANSFORMERS",
    "UNUSED_IN_EVALUATION",
    "audio_encoder",
    "image_encoder",
    "text_encoder",
    "transformer",
    "video_codec",
]

TRANSFORMERS: Final[Mapping[str, type[nn.Module]]] = {
    "omniavatar": OmniAvatarTransformer,
    "stableavatar": StableAvatarTransformer,
}
"""Transformer class of a family; a family adds its own line. Which arguments it takes is data of its files'
layout (weights/layouts.py)."""

_LATENT_CHANNELS: Final = 16
_DOWN: Final = (False, True, True)
"""Steps of the Wan 2.1 VAE: 8 times smaller in space, 4 times in time (spec/omniavatar.md c)."""


def transformer(
    held: WeightFile,
    dtype: torch.dtype,
    device: torch.device,
    whole: Callable[[str], bool] = lambda name: False,
    *,
    in_float8: bool = False,
) -> nn.Module:
    """The diffusion transformer of a full model, float32 where `models/precision.py` says so, and where
    `whole` does of an original name.

    in_float8: the weights that `models/fp8.py` allows are stored so, each as soon as it is read, in the full
    precision of `dtype`: never is more than one of them held wider.
    """
    with on_meta():
        network = TRANSFORMERS[held.layout.family](
            num_attention_heads=held.heads,
            attention_head_dim=held.sizes.width // held.heads,
            eps=network_of(held)["eps"],
            **held.layout.constructor(held.sizes),
        )
    tensors = held.layout.key_map.rename_to_internal(held.tensors)

    def dtype_of(name: str) -> torch.dtype:
        stays = is_float32_island(network, name) or whole(told_as(name) or name)
        return torch.float32 if stays else dtype

    def store(name: str) -> None:
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and is_float8_layer(network, layer):
            store_layer(network.get_submodule(layer))  # type: ignore[arg-type]

    told_as = held.layout.key_map.to_original
    done: Any = {"done": store} if in_float8 else {}
    fill(network, tensors, dtype_of=dtype_of, device=device, where=held.path, told_as=told_as, **done)
    return network.eval()


def video_codec(path: Path, dtype: torch.dtype, device: torch.device) -> WanVae:
    """The VAE of `Wan2.1_VAE.pth`."""
    held = _component(path, "Wan VAE")
    with reading(path):
        sizes = read_vae_sizes({name: tensor.info.shape for name, tensor in held.tensors.items()})
    if sizes.z_dim != _LATENT_CHANNELS or sizes.temporal != _DOWN:
        raise UnusableWeights(
            f"is a VAE with {sizes.z_dim} channels, halving time in steps {sizes.temporal}; Wan 2.1 has "
            f"{_LATENT_CHANNELS} and {_DOWN}",
            where=path,
        )
    with on_meta():
        network = AutoencoderKLWan(
            base_dim=sizes.base_dim,
            z_dim=sizes.z_dim,
            dim_mult=list(sizes.dim_mult),
            num_res_blocks=sizes.num_res_blocks,
            temperal_downsample=list(sizes.temporal),  # diffusers' spelling
        )
    _fill_renamed(network, held, vae_key_map(sizes), dtype, device)
    return fast_on_cpu(WanVae(network.eval()))


def text_encoder(path: Path, tokenizer: Path, dtype: torch.dtype, device: torch.device) -> PromptEncoder:
    """The UMT5 encoder of `models_t5_umt5-xxl-enc-bf16.pth` and the tokenizer of `google/umt5-xxl`."""
    held = _component(path, "UMT5 text encoder")
    # Before the encoder is read: a tokenizer of another model would index outside its table.
    vocabulary, width = _matrix(held, "token_embedding.weight")
    words = read_tokenizer(tokenizer, vocabulary)
    inner, _ = _matrix(held, "blocks.0.attn.q.weight")
    buckets, heads = _matrix(held, "blocks.0.pos_embedding.embedding.weight")
    if heads < 1 or inner % heads:
        raise UnusableWeights(f"{heads} heads do not divide an attention of width {inner}", where=path)
    config = UMT5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=inner // heads,
        d_ff=_matrix(held, "blocks.0.ffn.gate.0.weight")[0],
        num_layers=sum(name.endswith(".norm1.weight") for name in held.tensors),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu",
    )
    with on_meta():
        network = UMT5EncoderModel(config)
    _fill_renamed(network, held, UMT5_ENCODER, dtype, device)
    return PromptEncoder(network.eval(), words)


def image_encoder(path: Path, device: torch.device, emit: Emit) -> ClipImageEncoder:
    """The image tower of `models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth`; always float32, as
    published (spec/stableavatar.md f)."""
    held = _component(path, "CLIP vision encoder")
    if any(name.startswith("textual.") for name in held.tensors):
        emit(Notice(f"{path.name}: its text tower is not read"))
    with reading(path):
        sizes = read_clip_sizes(held.tensors)
        tensors = internal_tensors(held.tensors, sizes)
    with on_meta():
        network = ClipImageEncoder(clip_config(**dataclasses.asdict(sizes)))
    fill(network, tensors, dtype_of=_float32, device=device, where=path, told_as=CLIP_VISION.to_original)
    return network.eval()


def audio_encoder(folder: Path, device: torch.device, emit: Emit) -> FrameWav2Vec2:
    """The wav2vec 2.0 encoder of a folder; always float32 (spec/omniavatar.md b.8)."""
    config = _wav2vec_config(folder)
    _read_preprocessor(folder, emit)
    file = found_in(folder, "model.safetensors|pytorch_model.bin")
    if file is None:
        raise UnusableWeights("has neither model.safetensors nor pytorch_model.bin", where=folder)
    held = _component(file, "wav2vec 2.0 encoder")
    _warn_of_pretraining(folder / "config.json", held, emit)
    in_file = {_wav2vec_name(name): name for name in held.tensors if not name.startswith(_HEADS)}
    tensors = {internal: held.tensors[name] for internal, name in in_file.items()}
    if config["num_hidden_layers"] > len(tensors):
        raise UnusableWeights(
            f"{config['num_hidden_layers']} layers are stated, and there are {len(tensors)} tensors",
            where=folder / "config.json",
        )
    try:
        with on_meta():
            network = FrameWav2Vec2(Wav2Vec2Config(**config))
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise UnusableWeights(
            f"describes no encoder: {str(error)[:200]}", where=folder / "config.json"
        ) from error
    fill(
        network,
        tensors,
        dtype_of=_float32,
        device=device,
        where=file,
        likely=lambda: "config.json and the weights are of two models",
        unused=UNUSED_IN_EVALUATION,
        told_as=in_file.get,
    )
    return network.eval()


_PRETRAINING: Final = ("quantizer.", "project_q.", "project_hid.")
_HEADS: Final = ("lm_head.", *_PRETRAINING)
"""What stands behind the encoder in published files: the recogniser's head and what pretraining needed."""

UNUSED_IN_EVALUATION: Final = ("masked_spec_embed",)
"""Replaces masked steps in training; in evaluation mode nothing is masked (spec/omniavatar.md b.8)."""

# Weight normalisation as torch wrote it before 2.0, and as its parametrisation is called now.
_RENAMED: Final = {
    "encoder.pos_conv_embed.conv.weight_g": "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
    "encoder.pos_conv_embed.conv.weight_v": "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
}


def _warn_of_pretraining(config: Path, held: WeightFile, emit: Emit) -> None:
    """The published models were trained on features of an encoder that was tuned to recognise speech
    (wav2vec2-base-960h, spec/omniavatar.md b.8). One that was only pretrained has the same shapes and other
    features."""
    head = next((name for name in held.tensors if name.startswith(_PRETRAINING)), "")
    stated = read_object(config, _LONGEST_CONFIG).get("architectures")
    if head or (isinstance(stated, list) and "Wav2Vec2ForPreTraining" in stated):
        why = f"it holds {printable(head)[:100]}" if head else "config.json says Wav2Vec2ForPreTraining"
        best = "published models use wav2vec2-base-960h, and lips may not follow the audio"
        emit(Notice(f"{held.path} was only pretrained ({why}); {best}", "warning"))


def _wav2vec_name(name: str) -> str:
    name = name.removeprefix("wav2vec2.")
    return _RENAMED.get(name, name)


_INTEGERS: Final = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "num_conv_pos_embeddings",
    "num_conv_pos_embedding_groups",
)  # fmt: skip
_LISTS: Final = ("conv_dim", "conv_kernel", "conv_stride")
_WORDS: Final[Mapping[str, tuple[Any, ...]]] = {
    "feat_extract_norm": ("group", "layer"),
    "feat_extract_activation": ("gelu",),
    "hidden_act": ("gelu",),
    "conv_bias": (False, True),
    "do_stable_layer_norm": (False, True),
}
_LARGEST: Final = 65_536
_LONGEST_CONFIG: Final = 1 << 20
_MOST_CONVOLUTIONS: Final = 32
_AUDIO_STEP: Final = SAMPLES_PER_FRAME // 2
"""About 50 vectors a second, from which those of the pixel frames are interpolated (models/wav2vec.py)."""


def _wav2vec_config(folder: Path) -> dict[str, Any]:
    """The fields of config.json that shape the encoder, each checked; all others are left alone."""
    path = folder / "config.json"
    fields = read_object(path, _LONGEST_CONFIG)
    if fields.get("model_type") != "wav2vec2":
        raise UnusableWeights(
            f"describes a model of type {printable(fields.get('model_type'))[:60]}, not wav2vec2", where=path
        )
    if fields.get("add_adapter") is True:
        raise UnusableWeights("describes an encoder with an adapter, which changes its output", where=path)
    chosen: dict[str, Any] = {name: _size(path, name, fields.get(name)) for name in _INTEGERS}
    for name in _LISTS:
        values = fields.get(name)
        if not isinstance(values, list) or not 1 <= len(values) <= _MOST_CONVOLUTIONS:
            raise UnusableWeights(f"{name} is no list of sizes", where=path)
        chosen[name] = tuple(_size(path, name, value) for value in values)
    if len({len(chosen[name]) for name in _LISTS}) > 1:
        raise UnusableWeights(f"{', '.join(_LISTS)} differ in length", where=path)
    if (step := math.prod(chosen["conv_stride"])) != _AUDIO_STEP:
        raise UnusableWeights(
            f"conv_stride gives one vector for {step} samples, and published models need {_AUDIO_STEP}",
            where=path,
        )
    for name, allowed in _WORDS.items():
        if name in fields:
            if fields[name] not in allowed:
                raise UnusableWeights(
                    f"{name} is {printable(fields[name])[:60]}; known are {', '.join(map(str, allowed))}",
                    where=path,
                )
            chosen[name] = fields[name]
    eps = fields.get("layer_norm_eps", 1e-5)
    if isinstance(eps, bool) or not isinstance(eps, float) or not 0 < eps < 1:
        raise UnusableWeights("layer_norm_eps is no small number", where=path)
    return {**chosen, "layer_norm_eps": eps}


def _size(path: Path, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
        raise UnusableWeights(f"{name} is {printable(value)[:60]}, not a size", where=path)
    return value


def _read_preprocessor(folder: Path, emit: Emit) -> None:
    path = folder / "preprocessor_config.json"
    fields = read_object(path, _LONGEST_CONFIG) if os.path.lexists(path) else {}
    if fields.get("sampling_rate", SAMPLE_RATE) != SAMPLE_RATE:
        raise UnusableWeights(
            f"is for {printable(fields['sampling_rate'])[:60]} samples a second, not {SAMPLE_RATE}",
            where=path,
        )
    if fields.get("do_normalize", True) is not True:
        # The published features are of normalised audio (spec/omniavatar.md b.2), and so is ours, always.
        emit(Notice(f"{path} says do_normalize false; the audio is normalised all the same", "warning"))


def _component(path: Path, title: str) -> WeightFile:
    """The tensors of a file that must be of one kind."""
    held = read_weight_file(path)
    if held.layout.title != title:
        raise UnusableWeights(f"is {held.variant}, and the {title} was looked for", where=path)
    return held


def _matrix(held: WeightFile, name: str) -> tuple[int, int]:
    """Both sides of a matrix that sizes are read from."""
    tensor: StoredTensor | None = held.tensors.get(name)
    if tensor is None or len(tensor.info.shape) != 2:
        raise UnusableWeights(
            f"{name} is missing or no matrix",
            where=held.path,
            fix="only the release's own file is read: models_t5_umt5-xxl-enc-bf16.pth",
        )
    rows, columns = tensor.info.shape
    return rows, columns


def _float32(name: str) -> torch.dtype:
    return torch.float32


def _fill_renamed(
    network: nn.Module, held: WeightFile, names: KeyMap, dtype: torch.dtype, device: torch.device
) -> None:
    tensors = {names.to_internal(name) or name: tensor for name, tensor in held.tensors.items()}
    told_as = names.to_original
    fill(network, tensors, dtype_of=lambda name: dtype, device=device, where=held.path, told_as=told_as)
