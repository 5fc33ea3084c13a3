"""Names and shapes of published files and of small ones like them, from spec/omniavatar.md a.2, d, i."""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]

LINEARS = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k",
    "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2",
)  # fmt: skip
"""What an adapter changes, in every block."""


def linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def wan(
    width: int, ffn: int, layers: int, channels: int = 16, *, out: int = 16, text: int = 4096,
    freq: int = 256, image: int = 0,
) -> Shapes:  # fmt: skip
    """A Wan transformer; image: width of CLIP features."""
    shapes: Shapes = {
        "patch_embedding.weight": (width, channels, 1, 2, 2),
        "patch_embedding.bias": (width,),
        **linear("text_embedding.0", width, text),
        **linear("text_embedding.2", width, width),
        **linear("time_embedding.0", width, freq),
        **linear("time_embedding.2", width, width),
        **linear("time_projection.1", 6 * width, width),
        **linear("head.head", 4 * out, width),
        "head.modulation": (1, 2, width),
    }
    for i in range(layers):
        for name in LINEARS:
            shapes |= linear(f"blocks.{i}.{name}", *ends(name, width, ffn))
        for attention in ("self_attn", "cross_attn"):
            shapes[f"blocks.{i}.{attention}.norm_q.weight"] = (width,)
            shapes[f"blocks.{i}.{attention}.norm_k.weight"] = (width,)
        shapes[f"blocks.{i}.norm3.weight"] = shapes[f"blocks.{i}.norm3.bias"] = (width,)
        shapes[f"blocks.{i}.modulation"] = (1, 6, width)
        if image:
            shapes |= linear(f"blocks.{i}.cross_attn.k_img", width, width)
            shapes |= linear(f"blocks.{i}.cross_attn.v_img", width, width)
            shapes[f"blocks.{i}.cross_attn.norm_k_img.weight"] = (width,)
    if image:
        shapes |= linear("img_emb.proj.1", image, image) | linear("img_emb.proj.3", width, image)
        for name, size in (("img_emb.proj.0", image), ("img_emb.proj.4", width)):
            shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (size,)
    return shapes


def ends(name: str, width: int, ffn: int) -> tuple[int, int]:
    """Outputs and inputs of a linear layer of a block."""
    return {"ffn.0": (ffn, width), "ffn.2": (width, ffn)}.get(name, (width, width))


def audio(width: int, layers: int, hidden: int = 32, features: int = 10_752) -> Shapes:
    """The audio layers of OmniAvatar."""
    shapes = linear("audio_proj.proj", hidden, 4 * features)
    shapes |= {"audio_proj.norm_out.weight": (hidden,), "audio_proj.norm_out.bias": (hidden,)}
    for i in range(layers // 2 - 1):
        shapes |= linear(f"audio_cond_projs.{i}", width, hidden)
    return shapes


def lora(width: int, ffn: int, layers: int, rank: int = 128) -> Shapes:
    """LoRA tensors under the names of the release."""
    shapes: Shapes = {}
    for i in range(layers):
        for name in LINEARS:
            outputs, inputs = ends(name, width, ffn)
            shapes[f"blocks.{i}.{name}.lora_A.default.weight"] = (rank, inputs)
            shapes[f"blocks.{i}.{name}.lora_B.default.weight"] = (outputs, rank)
    return shapes


def umt5() -> Shapes:
    """models_t5_umt5-xxl-enc-bf16.pth."""
    shapes: Shapes = {"token_embedding.weight": (256_384, 4096), "norm.weight": (4096,)}
    for i in range(24):
        block = f"blocks.{i}"
        shapes |= {f"{block}.attn.{name}.weight": (4096, 4096) for name in "qkvo"}
        shapes |= {f"{block}.{norm}.weight": (4096,) for norm in ("norm1", "norm2")}
        shapes |= {f"{block}.ffn.{name}.weight": (10_240, 4096) for name in ("gate.0", "fc1")}
        shapes[f"{block}.ffn.fc2.weight"] = (4096, 10_240)
        shapes[f"{block}.pos_embedding.embedding.weight"] = (32, 64)
    return shapes


def vocal(width: int, layers: int, hidden: int = 0) -> Shapes:
    """What the family adds; hidden: between the two layers of the 14B projection."""
    shapes: Shapes = {}
    for i in range(layers):
        for name in ("k_vocal", "v_vocal"):
            shapes |= linear(f"blocks.{i}.cross_attn.{name}", width, width)
    projector = "vocal_projector.proj_model"
    steps = (("proj_1", "norm_1", hidden, 768), ("proj_2", "norm_2", width, hidden))
    for proj, norm, outputs, inputs in steps if hidden else (("proj", "norm", width, 768),):
        shapes[f"{projector}.{proj}.weight"] = (outputs, inputs)
        shapes[f"{projector}.{norm}.weight"] = shapes[f"{projector}.{norm}.bias"] = (outputs,)
    for j in range(2):
        block = f"vocal_projector.blocks.{j}"
        shapes[f"{block}.modulation"] = (1, 6, width)
        shapes[f"{block}.norm3.weight"] = shapes[f"{block}.norm3.bias"] = (width,)
        for letter in "qkvo":
            shapes |= linear(f"{block}.cross_attn.{letter}", width, width)
        for letter in "qk":
            shapes[f"{block}.cross_attn.norm_{letter}.weight"] = (width,)
        shapes |= linear(f"{block}.ffn.0", 2 * width, width) | linear(f"{block}.ffn.2", width, 2 * width)
    shapes["vocal_projector.final_head.modulation"] = (1, 2, width)
    return shapes | linear("vocal_projector.final_head.final_proj", width, width)


def stableavatar() -> Shapes:
    """transformer3d-square.pt and its twin."""
    return wan(1536, 8960, 30, 36, image=1280) | vocal(1536, 30)
