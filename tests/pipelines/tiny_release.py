"""A complete OmniAvatar release with tiny random tensors, in the published layouts and names.

Written from the tables of spec/omniavatar.md (a.2, c, d, i), spec/building-blocks.md 3 and
spec/weight-sources.md, by PyTorch's and safetensors' own writers: nothing here asks the product for a name.

    ROOT/Wan2.1-T2V-14B/        six shards and their index, config.json, the .pth encoders, google/umt5-xxl/
    ROOT/OmniAvatar-14B/        pytorch_model.pt with `.default` names, config.json
    ROOT/wav2vec2-base-960h/    model.safetensors with the recogniser's head and `weight_g`, `weight_v`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Dims:
    """Sizes of a release (spec/omniavatar.md a.1, b, c, d); tiny unless given."""

    width: int = 48
    heads: int = 2
    ffn: int = 96
    layers: int = 6
    text_width: int = 32
    text_ffn: int = 64
    frequencies: int = 64
    audio_hidden: int = 8
    rank: int = 4
    alpha: int = 2
    wav2vec_width: int = 16
    wav2vec_layers: int = 2
    vae_base: int = 4

    @property
    def audio_width(self) -> int:
        """Of a feature frame: the last layer, the encoder's input, every layer (spec/omniavatar.md b.7)."""
        return self.wav2vec_width * (self.wav2vec_layers + 2)


TINY = Dims()
OMNIAVATAR_1_3B = Dims(
    width=1536, heads=12, ffn=8960, layers=30, text_width=4096, frequencies=256, audio_hidden=32, rank=128,
    alpha=64, wav2vec_width=768, wav2vec_layers=12, vae_base=96,
)  # fmt: skip
"""As published, except for the text encoder: two layers and a small table."""

LETTERS = "abcdefghijklmnopqrstuvwxyz,.'"
VOCABULARY = 48
TARGETS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k",
           "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2")  # fmt: skip


@dataclass
class Release:
    """The tensors, by the names in the files; `write` puts them on the disk."""

    base: State
    adapter: State
    text: State
    vae: State
    audio: State
    dims: Dims = TINY
    config: dict[str, object] = field(default_factory=dict)

    def write(self, root: Path, size: str = "14B") -> None:
        base = root / f"Wan2.1-T2V-{size}"
        base.mkdir(parents=True)
        if size == "14B":
            write_shards(base, self.base, 6)
        else:
            save_file(self.base, base / "diffusion_pytorch_model.safetensors")
        write_json(base / "config.json", base_config(self.dims))
        torch.save(self.text, base / "models_t5_umt5-xxl-enc-bf16.pth")
        torch.save({"model_state": self.vae}, base / "Wan2.1_VAE.pth")
        write_tokenizer(base / "google" / "umt5-xxl")
        adapter = root / f"OmniAvatar-{size}"
        adapter.mkdir()
        torch.save(self.adapter, adapter / "pytorch_model.pt")
        write_json(adapter / "config.json", self.config)
        audio = root / "wav2vec2-base-960h"
        audio.mkdir()
        save_file(self.audio, audio / "model.safetensors", {"format": "pt"})
        write_json(audio / "config.json", audio_config(self.dims))
        write_json(audio / "preprocessor_config.json", {"do_normalize": True, "sampling_rate": 16000})


def tiny_release(dims: Dims = TINY, dtype: torch.dtype = torch.float32) -> Release:
    """Random tensors, the same in every call; dtype: of the transformer's files."""
    generator = torch.Generator().manual_seed(0)

    def random(shapes: Shapes, dtype: torch.dtype = torch.float32) -> State:
        return random_state(shapes, generator, dtype)

    return Release(
        base=random(wan_shapes(dims), dtype),
        adapter=random(adapter_shapes(dims), dtype),
        text=random(text_shapes(dims), torch.bfloat16),
        vae=random(vae_shapes(dims.vae_base)),
        audio=random(wav2vec_shapes(dims)),
        dims=dims,
        config={
            "model_config": {"in_dim": 33, "audio_hidden_size": dims.audio_hidden},
            "train_architecture": "lora",
            "lora_rank": dims.rank,
            "lora_alpha": dims.alpha,
            "lora_target_modules": "q,k,v,o,ffn.0,ffn.2",
            "use_audio": True,
            "i2v": True,
            "random_prefix_frames": True,
        },
    )


def random_state(shapes: Shapes, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> State:
    """Values of a size that keeps activations in bounds."""
    return {name: _value(name, shape, generator).to(dtype) for name, shape in shapes.items()}


def _value(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    noise = torch.randn(shape, generator=generator)
    if name.endswith("gamma") or (len(shape) == 1 and "norm" in name and name.endswith("weight")):
        return 1 + 0.1 * noise
    fan_in = noise[0].numel() if len(shape) > 1 else 1
    return noise * (fan_in**-0.5 if len(shape) > 1 else 0.05)


def base_config(dims: Dims) -> dict[str, object]:
    """config.json of a Wan release."""
    return {
        "dim": dims.width,
        "eps": 1e-6,
        "ffn_dim": dims.ffn,
        "freq_dim": dims.frequencies,
        "in_dim": 16,
        "model_type": "t2v",
        "num_heads": dims.heads,
        "num_layers": dims.layers,
        "out_dim": 16,
        "text_len": 512,
    }


def audio_config(dims: Dims) -> dict[str, object]:
    """config.json of wav2vec2-base-960h, with a smaller convolution stack."""
    return {
        "architectures": ["Wav2Vec2ForCTC"],
        "model_type": "wav2vec2",
        "hidden_size": dims.wav2vec_width,
        "num_hidden_layers": dims.wav2vec_layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "conv_dim": [8] * 7,
        "conv_kernel": [10, 3, 3, 3, 3, 2, 2],
        "conv_stride": [5, 2, 2, 2, 2, 2, 2],
        "conv_bias": False,
        "feat_extract_norm": "group",
        "feat_extract_activation": "gelu",
        "hidden_act": "gelu",
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "do_stable_layer_norm": False,
        "layer_norm_eps": 1e-5,
        "vocab_size": 32,
        "mask_time_prob": 0.05,
        "layerdrop": 0.1,
    }


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def wan_shapes(dims: Dims, channels: int = 16) -> Shapes:
    """spec/omniavatar.md a.2."""
    d = dims.width
    shapes: Shapes = {"patch_embedding.weight": (d, channels, 1, 2, 2), "patch_embedding.bias": (d,)}
    shapes |= linear("text_embedding.0", d, dims.text_width) | linear("text_embedding.2", d, d)
    shapes |= linear("time_embedding.0", d, dims.frequencies) | linear("time_embedding.2", d, d)
    shapes |= linear("time_projection.1", 6 * d, d)
    for i in range(dims.layers):
        for attention in ("self_attn", "cross_attn"):
            for letter in "qkvo":
                shapes |= linear(f"blocks.{i}.{attention}.{letter}", d, d)
            shapes |= {f"blocks.{i}.{attention}.norm_{letter}.weight": (d,) for letter in "qk"}
        shapes |= norm(f"blocks.{i}.norm3", d)
        shapes |= linear(f"blocks.{i}.ffn.0", dims.ffn, d) | linear(f"blocks.{i}.ffn.2", d, dims.ffn)
        shapes[f"blocks.{i}.modulation"] = (1, 6, d)
    return shapes | linear("head.head", 16 * 4, d) | {"head.modulation": (1, 2, d)}


def audio_shapes(dims: Dims) -> Shapes:
    """spec/omniavatar.md a.2, a.4."""
    shapes = linear("audio_proj.proj", dims.audio_hidden, 4 * dims.audio_width)
    shapes |= norm("audio_proj.norm_out", dims.audio_hidden)
    for j in range(dims.layers // 2 - 1):
        shapes |= linear(f"audio_cond_projs.{j}", dims.width, dims.audio_hidden)
    return shapes


def adapter_shapes(dims: Dims, channels: int = 33) -> Shapes:
    """spec/omniavatar.md i: LoRA pairs on ten linear layers a block, patch embedding, audio."""
    shapes: Shapes = {}
    for i in range(dims.layers):
        for target in TARGETS:
            inputs = dims.ffn if target == "ffn.2" else dims.width
            outputs = dims.ffn if target == "ffn.0" else dims.width
            shapes[f"blocks.{i}.{target}.lora_A.default.weight"] = (dims.rank, inputs)
            shapes[f"blocks.{i}.{target}.lora_B.default.weight"] = (outputs, dims.rank)
    shapes |= {
        "patch_embedding.weight": (dims.width, channels, 1, 2, 2),
        "patch_embedding.bias": (dims.width,),
    }
    return shapes | audio_shapes(dims)


def text_shapes(dims: Dims, layers: int = 2, heads: int = 4) -> Shapes:
    """spec/omniavatar.md d."""
    d, ffn = dims.text_width, dims.text_ffn
    shapes: Shapes = {"token_embedding.weight": (VOCABULARY, d), "norm.weight": (d,)}
    for i in range(layers):
        shapes |= {f"blocks.{i}.norm1.weight": (d,), f"blocks.{i}.norm2.weight": (d,)}
        shapes |= {f"blocks.{i}.attn.{letter}.weight": (d, d) for letter in "qkvo"}
        shapes |= {f"blocks.{i}.ffn.gate.0.weight": (ffn, d), f"blocks.{i}.ffn.fc1.weight": (ffn, d)}
        shapes |= {f"blocks.{i}.ffn.fc2.weight": (d, ffn)}
        shapes |= {f"blocks.{i}.pos_embedding.embedding.weight": (32, heads)}
    return shapes


def vae_shapes(base: int, blocks: int = 2, channels: int = 16) -> Shapes:
    """The names of the release as in tests/golden/omniavatar/vae.safetensors; a test holds them together."""
    widths = [base, 2 * base, 4 * base, 4 * base]
    top = widths[-1]
    shapes = _conv("conv1", 2 * channels, 2 * channels, 1, 1, 1) | _conv("conv2", channels, channels, 1, 1, 1)
    shapes |= _conv("encoder.conv1", base, 3, 3, 3, 3)
    place, before = 0, base
    for level, width in enumerate(widths):
        for _ in range(blocks):
            shapes |= _residual(f"encoder.downsamples.{place}", width, before)
            place, before = place + 1, width
        if level < 3:
            shapes |= _conv(f"encoder.downsamples.{place}.resample.1", width, width, 3, 3)
            if level > 0:
                shapes |= _conv(f"encoder.downsamples.{place}.time_conv", width, width, 3, 1, 1)
            place += 1
    shapes |= _middle("encoder", top) | {"encoder.head.0.gamma": (top, 1, 1, 1)}
    shapes |= _conv("encoder.head.2", 2 * channels, top, 3, 3, 3)
    shapes |= _conv("decoder.conv1", top, channels, 3, 3, 3) | _middle("decoder", top)
    place, before = 0, top
    for level, width in enumerate(reversed(widths)):
        for _ in range(blocks + 1):
            shapes |= _residual(f"decoder.upsamples.{place}", width, before)
            place, before = place + 1, width
        if level < 3:
            shapes |= _conv(f"decoder.upsamples.{place}.resample.1", width // 2, width, 3, 3)
            if level < 2:
                shapes |= _conv(f"decoder.upsamples.{place}.time_conv", 2 * width, width, 3, 1, 1)
            place, before = place + 1, width // 2
    return shapes | {"decoder.head.0.gamma": (base, 1, 1, 1)} | _conv("decoder.head.2", 3, base, 3, 3, 3)


def _conv(name: str, outputs: int, inputs: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def _residual(name: str, width: int, before: int) -> Shapes:
    shapes: Shapes = {
        f"{name}.residual.0.gamma": (before, 1, 1, 1),
        f"{name}.residual.3.gamma": (width, 1, 1, 1),
    }
    shapes |= _conv(f"{name}.residual.2", width, before, 3, 3, 3)
    shapes |= _conv(f"{name}.residual.6", width, width, 3, 3, 3)
    return shapes | (_conv(f"{name}.shortcut", width, before, 1, 1, 1) if width != before else {})


def _middle(coder: str, width: int) -> Shapes:
    name = f"{coder}.middle"
    shapes = _residual(f"{name}.0", width, width) | _residual(f"{name}.2", width, width)
    shapes |= {f"{name}.1.norm.gamma": (width, 1, 1)}
    return (
        shapes
        | _conv(f"{name}.1.to_qkv", 3 * width, width, 1, 1)
        | _conv(f"{name}.1.proj", width, width, 1, 1)
    )


def wav2vec_shapes(dims: Dims) -> Shapes:
    """wav2vec2-base-960h as published: prefix, old names of weight normalisation, the recogniser's head."""
    d, ffn, head = dims.wav2vec_width, 32, "wav2vec2."
    shapes: Shapes = {f"{head}masked_spec_embed": (d,), **linear("lm_head", 32, d)}
    for i, kernel in enumerate((10, 3, 3, 3, 3, 2, 2)):
        shapes[f"{head}feature_extractor.conv_layers.{i}.conv.weight"] = (8, 1 if i == 0 else 8, kernel)
    shapes |= norm(f"{head}feature_extractor.conv_layers.0.layer_norm", 8)
    shapes |= norm(f"{head}feature_projection.layer_norm", 8)
    shapes |= linear(f"{head}feature_projection.projection", d, 8)
    shapes |= {
        f"{head}encoder.pos_conv_embed.conv.bias": (d,),
        f"{head}encoder.pos_conv_embed.conv.weight_g": (1, 1, 16),
        f"{head}encoder.pos_conv_embed.conv.weight_v": (d, d // 2, 16),
    }
    shapes |= norm(f"{head}encoder.layer_norm", d)
    for i in range(dims.wav2vec_layers):
        layer = f"{head}encoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.attention.{projection}", d, d)
        shapes |= norm(f"{layer}.layer_norm", d) | norm(f"{layer}.final_layer_norm", d)
        shapes |= linear(f"{layer}.feed_forward.intermediate_dense", ffn, d)
        shapes |= linear(f"{layer}.feed_forward.output_dense", d, ffn)
    return shapes


def write_shards(folder: Path, state: Mapping[str, Tensor], count: int) -> None:
    names = list(state)
    places: dict[str, str] = {}
    for number in range(count):
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-{count:05d}.safetensors"
        own = {name: state[name] for name in names[number::count]}
        save_file(own, folder / file, {"format": "pt"})
        places |= dict.fromkeys(own, file)
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index)


def write_tokenizer(folder: Path, letters: str = LETTERS) -> None:
    """A tokenizer.json like UMT5's: pad 0, end 1, begin 2, unknown 3, one end token behind every prompt."""
    folder.mkdir(parents=True)
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    pieces = [(token, 0.0) for token in special] + [("▁", -2.0), *((letter, -3.0) for letter in letters)]
    pieces += [("▁a", -2.5), ("▁person", -4.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, 3, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "extra_ids": 0},
    )


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
