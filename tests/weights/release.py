"""Tiny weight files in the published layouts, typed from the tables of the specification.

Names and shapes: spec/omniavatar.md a.2 and i. Names of other programs: spec/building-blocks.md 1
(diffusers), spec/field.md 4a (peft, ComfyUI, kohya). Nothing here asks the product for a name.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

WIDTH, FFN, LAYERS, HEADS = 128, 64, 4, 1
TEXT, FREQ, OUT = 16, 32, 16
AUDIO_HIDDEN, AUDIO_INPUT = 8, 6
RANK, ALPHA = 4, 2

State = dict[str, torch.Tensor]

DIFFUSERS_TOP = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "audio_proj.proj": "audio_proj.proj",
    "audio_proj.norm_out": "audio_proj.norm_out",
}
DIFFUSERS_BLOCK = {
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}
TARGETS = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
    "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2",
)  # fmt: skip


def diffusers_module(module: str) -> str:
    """The name of an original module in diffusers."""
    words = module.split(".")
    if words[0] == "blocks":
        return f"blocks.{words[1]}.{DIFFUSERS_BLOCK['.'.join(words[2:])]}"
    if words[0] == "audio_cond_projs":
        return module
    return DIFFUSERS_TOP[module]


def diffusers_name(name: str) -> str:
    """The name of an original tensor in diffusers."""
    if name == "head.modulation":
        return "scale_shift_table"
    if name.endswith(".modulation"):
        return name.replace(".modulation", ".scale_shift_table")
    module, _, kind = name.rpartition(".")
    return f"{diffusers_module(module)}.{kind}"


def _draw(shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.05).to(dtype) for name, shape in shapes.items()
    }


def _linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def base_state(channels: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0) -> State:
    """Wan 2.1 text to video."""
    d = WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (d, channels, 1, 2, 2),
        "patch_embedding.bias": (d,),
        **_linear("text_embedding.0", d, TEXT),
        **_linear("text_embedding.2", d, d),
        **_linear("time_embedding.0", d, FREQ),
        **_linear("time_embedding.2", d, d),
        **_linear("time_projection.1", 6 * d, d),
        **_linear("head.head", OUT * 4, d),
        "head.modulation": (1, 2, d),
    }
    for i in range(LAYERS):
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                shapes |= _linear(f"blocks.{i}.{attention}.{part}", d, d)
            shapes |= {f"blocks.{i}.{attention}.norm_{part}.weight": (d,) for part in "qk"}
        shapes |= {f"blocks.{i}.norm3.weight": (d,), f"blocks.{i}.norm3.bias": (d,)}
        shapes |= _linear(f"blocks.{i}.ffn.0", FFN, d) | _linear(f"blocks.{i}.ffn.2", d, FFN)
        shapes[f"blocks.{i}.modulation"] = (1, 6, d)
    return _draw(shapes, seed, dtype)


def audio_state(dtype: torch.dtype = torch.float32, seed: int = 1) -> State:
    """The modules that take audio."""
    shapes = _linear("audio_proj.proj", AUDIO_HIDDEN, 4 * AUDIO_INPUT)
    shapes |= {"audio_proj.norm_out.weight": (AUDIO_HIDDEN,), "audio_proj.norm_out.bias": (AUDIO_HIDDEN,)}
    for j in range(LAYERS // 2 - 1):
        shapes |= _linear(f"audio_cond_projs.{j}", WIDTH, AUDIO_HIDDEN)
    return _draw(shapes, seed, dtype)


def omniavatar_state(channels: int = 33, dtype: torch.dtype = torch.float32, seed: int = 5) -> State:
    """A full OmniAvatar model."""
    return base_state(channels, dtype, seed) | audio_state(dtype, seed + 1)


def lora_pairs(rank: int = RANK, dtype: torch.dtype = torch.float32, seed: int = 2) -> dict[str, State]:
    """{module: {"A": [rank, inputs], "B": [outputs, rank]}} for the ten linear layers of every block."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for i in range(LAYERS):
        for target in TARGETS:
            outputs = FFN if target == "ffn.0" else WIDTH
            inputs = FFN if target == "ffn.2" else WIDTH
            a = torch.randn(rank, inputs, generator=generator) * 0.1
            b = torch.randn(outputs, rank, generator=generator) * 0.1
            pairs[f"blocks.{i}.{target}"] = {"A": a.to(dtype), "B": b.to(dtype)}
    return pairs


def patch_state(channels: int = 33, dtype: torch.dtype = torch.float32, seed: int = 3) -> State:
    """The widened patch embedding of an adapter."""
    shapes = {"patch_embedding.weight": (WIDTH, channels, 1, 2, 2), "patch_embedding.bias": (WIDTH,)}
    return _draw(shapes, seed, dtype)


def release_config(channels: int = 33, rank: int = RANK, alpha: float = ALPHA) -> dict[str, object]:
    """config.json of a release (spec/omniavatar.md g.6)."""
    return {
        "model_config": {"in_dim": channels, "audio_hidden_size": AUDIO_HIDDEN},
        "train_architecture": "lora",
        "lora_rank": rank,
        "lora_alpha": alpha,
        "lora_target_modules": "q,k,v,o,ffn.0,ffn.2",
        "init_lora_weights": "kaiming",
        "use_audio": True,
        "i2v": True,
        "v2v": False,
        "random_prefix_frames": True,
    }


def adapter_state(
    channels: int = 33, rank: int = RANK, dtype: torch.dtype = torch.float32, seed: int = 2
) -> State:
    """pytorch_model.pt of a release."""
    state: State = {}
    for module, pair in lora_pairs(rank, dtype, seed).items():
        state[f"{module}.lora_A.default.weight"] = pair["A"]
        state[f"{module}.lora_B.default.weight"] = pair["B"]
    return state | audio_state(dtype) | patch_state(channels, dtype)


def write_base(path: Path, dtype: torch.dtype = torch.float32, channels: int = 16) -> Path:
    """diffusion_pytorch_model.safetensors as Wan publishes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(base_state(channels, dtype), path)
    return path


def write_release(folder: Path, channels: int = 33, dtype: torch.dtype = torch.float32) -> Path:
    """The folder of an OmniAvatar release: pytorch_model.pt and config.json."""
    folder.mkdir(parents=True)
    torch.save(adapter_state(channels, dtype=dtype), folder / "pytorch_model.pt")
    (folder / "config.json").write_text(json.dumps(release_config(channels)))
    return folder


def write_model(path: Path, dtype: torch.dtype = torch.float32, channels: int = 33) -> Path:
    """A full OmniAvatar model in one file."""
    save_file(omniavatar_state(channels, dtype), path)
    return path


def merged(base: State, pairs: dict[str, State], scale: float, replaced: State | None = None) -> State:
    """W + scale * B @ A in float32, then the dtype of W; whole tensors replace (spec/omniavatar.md i)."""
    state = dict(base)
    for module, pair in pairs.items():
        weight = state[f"{module}.weight"]
        update = scale * (pair["B"].float() @ pair["A"].float())
        state[f"{module}.weight"] = (weight.float() + update).to(weight.dtype)
    return state | (replaced or {})
