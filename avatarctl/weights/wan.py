"""Key maps of the Wan networks: original release names -> names of diffusers and transformers.

Sources: spec/building-blocks.md 1 and 3. norm1 and norm2 of a block have no parameters in the release; its
norm3 stands before the cross attention and is `norm2` in diffusers.
"""

from __future__ import annotations

from avatarctl.weights.key_map import KeyMap

__all__ = ["UMT5_ENCODER", "WAN_IMAGE", "WAN_TRANSFORMER"]


def _attention(original: str, internal: str) -> tuple[tuple[str, str], ...]:
    names = (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    same = (("norm_q", "norm_q"), ("norm_k", "norm_k"))
    return tuple(
        (f"blocks.{{n}}.{original}.{a}.{{rest}}", f"blocks.{{n}}.{internal}.{b}.{{rest}}")
        for a, b in names + same
    )


WAN_TRANSFORMER = KeyMap(
    (
        ("patch_embedding.{rest}", "patch_embedding.{rest}"),
        ("time_embedding.0.{rest}", "condition_embedder.time_embedder.linear_1.{rest}"),
        ("time_embedding.2.{rest}", "condition_embedder.time_embedder.linear_2.{rest}"),
        ("time_projection.1.{rest}", "condition_embedder.time_proj.{rest}"),
        ("text_embedding.0.{rest}", "condition_embedder.text_embedder.linear_1.{rest}"),
        ("text_embedding.2.{rest}", "condition_embedder.text_embedder.linear_2.{rest}"),
        *_attention("self_attn", "attn1"),
        *_attention("cross_attn", "attn2"),
        ("blocks.{n}.norm3.{rest}", "blocks.{n}.norm2.{rest}"),
        ("blocks.{n}.ffn.0.{rest}", "blocks.{n}.ffn.net.0.proj.{rest}"),
        ("blocks.{n}.ffn.2.{rest}", "blocks.{n}.ffn.net.2.{rest}"),
        ("blocks.{n}.modulation", "blocks.{n}.scale_shift_table"),
        ("head.head.{rest}", "proj_out.{rest}"),
        ("head.modulation", "scale_shift_table"),
    )
)

WAN_IMAGE = KeyMap(
    (
        ("img_emb.proj.0.{rest}", "condition_embedder.image_embedder.norm1.{rest}"),
        ("img_emb.proj.1.{rest}", "condition_embedder.image_embedder.ff.net.0.proj.{rest}"),
        ("img_emb.proj.3.{rest}", "condition_embedder.image_embedder.ff.net.2.{rest}"),
        ("img_emb.proj.4.{rest}", "condition_embedder.image_embedder.norm2.{rest}"),
        ("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"),
        ("blocks.{n}.cross_attn.k_img.{rest}", "blocks.{n}.attn2.add_k_proj.{rest}"),
        ("blocks.{n}.cross_attn.v_img.{rest}", "blocks.{n}.attn2.add_v_proj.{rest}"),
        ("blocks.{n}.cross_attn.norm_k_img.{rest}", "blocks.{n}.attn2.norm_added_k.{rest}"),
    )
)
"""What image-to-video models have besides `WAN_TRANSFORMER`: CLIP tokens."""

_LAYER = "encoder.block.{n}.layer"
UMT5_ENCODER = KeyMap(
    (
        ("token_embedding.weight", "shared.weight"),
        ("norm.weight", "encoder.final_layer_norm.weight"),
        ("blocks.{n}.norm1.weight", f"{_LAYER}.0.layer_norm.weight"),
        ("blocks.{n}.norm2.weight", f"{_LAYER}.1.layer_norm.weight"),
        *(
            (f"blocks.{{n}}.attn.{p}.weight", f"{_LAYER}.0.SelfAttention.{p}.weight")
            for p in ("q", "k", "v", "o")
        ),
        (
            "blocks.{n}.pos_embedding.embedding.weight",
            f"{_LAYER}.0.SelfAttention.relative_attention_bias.weight",
        ),
        ("blocks.{n}.ffn.gate.0.weight", f"{_LAYER}.1.DenseReluDense.wi_0.weight"),
        ("blocks.{n}.ffn.fc1.weight", f"{_LAYER}.1.DenseReluDense.wi_1.weight"),
        ("blocks.{n}.ffn.fc2.weight", f"{_LAYER}.1.DenseReluDense.wo.weight"),
    )
)
