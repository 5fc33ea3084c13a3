"""What a file is, by its names and shapes. The tables here are typed from spec/omniavatar.md a.2 and i and
spec/field.md 4a, not taken from the product's maps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avatarctl.errors import UnusableWeights
from avatarctl.files.source import RawWeights
from avatarctl.files.tensors import ArrayTensor
from avatarctl.weights.recognise import recognise, require_complete
from avatarctl.weights.weight_file import WeightFile

LAYERS, D, FFN, RANK, HIDDEN, AUDIO = 6, 48, 80, 4, 3, 5

Shapes = dict[str, tuple[int, ...]]

LINEARS = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k",
    "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2",
)  # fmt: skip
DIFFUSERS = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0", "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}  # fmt: skip


def ends(linear: str) -> tuple[int, int]:
    """Outputs and inputs of a linear layer of a block."""
    return {"ffn.0": (FFN, D), "ffn.2": (D, FFN)}.get(linear, (D, D))


def base(channels: int = 16) -> Shapes:
    """A plain text-to-video transformer."""
    shapes: Shapes = {
        "patch_embedding.weight": (D, channels, 1, 2, 2),
        "patch_embedding.bias": (D,),
        "text_embedding.0.weight": (D, 7),
        "text_embedding.0.bias": (D,),
        "text_embedding.2.weight": (D, D),
        "text_embedding.2.bias": (D,),
        "time_embedding.0.weight": (D, 10),
        "time_embedding.0.bias": (D,),
        "time_embedding.2.weight": (D, D),
        "time_embedding.2.bias": (D,),
        "time_projection.1.weight": (6 * D, D),
        "time_projection.1.bias": (6 * D,),
        "head.head.weight": (64, D),
        "head.head.bias": (64,),
        "head.modulation": (1, 2, D),
    }
    for i in range(LAYERS):
        for linear in LINEARS:
            outputs, inputs = ends(linear)
            shapes[f"blocks.{i}.{linear}.weight"] = (outputs, inputs)
            shapes[f"blocks.{i}.{linear}.bias"] = (outputs,)
        for norm in ("self_attn.norm_q", "self_attn.norm_k", "cross_attn.norm_q", "cross_attn.norm_k"):
            shapes[f"blocks.{i}.{norm}.weight"] = (D,)
        shapes[f"blocks.{i}.norm3.weight"] = shapes[f"blocks.{i}.norm3.bias"] = (D,)
        shapes[f"blocks.{i}.modulation"] = (1, 6, D)
    return shapes


def avatar_parts(channels: int = 33) -> Shapes:
    """What an adapter of OmniAvatar carries whole."""
    shapes: Shapes = {
        "patch_embedding.weight": (D, channels, 1, 2, 2),
        "patch_embedding.bias": (D,),
        "audio_proj.proj.weight": (HIDDEN, 4 * AUDIO),
        "audio_proj.proj.bias": (HIDDEN,),
        "audio_proj.norm_out.weight": (HIDDEN,),
        "audio_proj.norm_out.bias": (HIDDEN,),
    }
    for i in range(LAYERS // 2 - 1):
        shapes[f"audio_cond_projs.{i}.weight"] = (D, HIDDEN)
        shapes[f"audio_cond_projs.{i}.bias"] = (D,)
    return shapes


def pairs(
    name: str = "blocks.{i}.{linear}.lora_{ab}.default.weight", down: str = "A", up: str = "B"
) -> Shapes:
    """A LoRA pair for every target."""
    shapes: Shapes = {}
    for i in range(LAYERS):
        for linear in LINEARS:
            outputs, inputs = ends(linear)
            words = {
                "i": i,
                "linear": linear,
                "diffusers": DIFFUSERS[linear],
                "flat": linear.replace(".", "_"),
            }
            shapes[name.format(**words, ab=down)] = (RANK, inputs)
            shapes[name.format(**words, ab=up)] = (outputs, RANK)
    return shapes


def read(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    dtype: str = "F32",
    values: Mapping[str, ArrayTensor] | None = None,
    file: str = "model.safetensors",
) -> WeightFile:
    storage = {"F32": np.float32, "BF16": np.uint16, "I8": np.int8, "U8": np.uint8}[dtype]
    tensors = {name: ArrayTensor(np.zeros(shape, storage), dtype) for name, shape in shapes.items()}
    path = Path(file)
    raw = RawWeights(
        path=path,
        files=(path,),
        format="safetensors",
        tensors=tensors | dict(values or {}),
        metadata=metadata or {},
        config=config or {},
        notes=(),
    )
    return recognise(raw)


NAMINGS = {
    "original": "blocks.{i}.{linear}.lora_{ab}.default.weight",
    "without default": "blocks.{i}.{linear}.lora_{ab}.weight",
    "trainer's prefix": "pipe.dit.blocks.{i}.{linear}.lora_{ab}.default.weight",
    "diffusers": "transformer.blocks.{i}.{diffusers}.lora_{ab}.weight",
    "diffusers, bare": "blocks.{i}.{diffusers}.lora_{ab}.weight",
    "peft, original": "base_model.model.blocks.{i}.{linear}.lora_{ab}.weight",
    "peft, diffusers": "base_model.model.blocks.{i}.{diffusers}.lora_{ab}.weight",
    "comfyui": "diffusion_model.blocks.{i}.{linear}.lora_{ab}.weight",
    "kohya": "lora_unet_blocks_{i}_{flat}.lora_{ab}.weight",
    "kohya, two underscores": "lora_transformer__blocks_{i}_{flat}.lora_{ab}.weight",
    "kohya, another root": "lora_transformer_blocks_{i}_{flat}.lora_{ab}.weight",
    "kohya, another root, two underscores": "lora_unet__blocks_{i}_{flat}.lora_{ab}.weight",
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_lora_means_the_same_in_every_naming(naming: str) -> None:
    flat = "kohya" in naming
    weight_file = read(pairs(NAMINGS[naming], *(("down", "up") if flat else ("A", "B"))))
    require_complete(weight_file)
    assert weight_file.kind == "adapter"
    assert weight_file.layout.family == "wan"
    assert set(weight_file.lora_pairs) == {
        f"blocks.{i}.{linear}" for i in range(LAYERS) for linear in LINEARS
    }
    assert all(pair.shape == ends(module.split(".", 2)[2]) for module, pair in weight_file.lora_pairs.items())
    assert weight_file.scale_of(weight_file.lora_pairs["blocks.0.ffn.0"]) == 1
    assert "no alpha is stated: 1" in weight_file.scale_rule


def test_an_adapter_of_omniavatar_is_recognised_with_its_sizes() -> None:
    config = {
        "train_architecture": "lora", "lora_rank": RANK, "lora_alpha": 3,
        "lora_target_modules": "q,k,v,o,ffn.0,ffn.2",
        "model_config": {"in_dim": 33, "num_heads": 6},
    }  # fmt: skip
    weight_file = read(pairs() | avatar_parts(), config=config, file="pytorch_model.pt")
    require_complete(weight_file)
    sizes = weight_file.sizes
    assert (weight_file.layout.family, weight_file.kind, weight_file.heads) == ("omniavatar", "adapter", 6)
    assert (sizes.width, sizes.ffn, sizes.layers, sizes.in_channels) == (D, FFN, LAYERS, 33)
    assert (sizes.audio_hidden_size, sizes.audio_input_dim) == (HIDDEN, AUDIO)
    assert weight_file.scale_of(weight_file.lora_pairs["blocks.5.cross_attn.o"]) == 3 / RANK
    assert weight_file.audio_offset == 1


@pytest.mark.parametrize(
    ("channels", "file", "offset"),
    [
        (33, "pytorch_model.pt", 1), (33, "step-2000.pt", 0), (33, "step-final-40.pt", 0),
        (33, "trainable_weights.pt", 0), (49, "pytorch_model.pt", 0), (65, "any.safetensors", 0),
    ],
)  # fmt: skip
def test_the_audio_offset_follows_who_trained_it(channels: int, file: str, offset: int) -> None:
    assert read(pairs() | avatar_parts(channels), file=file).audio_offset == offset


def test_a_files_own_metadata_wins_over_the_rules() -> None:
    metadata = {
        "avatarctl.conventions": '{"audio_offset": 0}',
        "avatarctl.network": '{"num_attention_heads": 4, "attention_head_dim": 12}',
    }
    weight_file = read(base(33) | avatar_parts(), metadata=metadata)
    assert (weight_file.kind, weight_file.audio_offset, weight_file.heads) == ("model", 0, 4)


@pytest.mark.parametrize(
    "lost",
    [
        "patch_embedding.weight",
        "patch_embedding.bias",
        "audio_proj.norm_out.weight",
        "audio_cond_projs.1.bias",
    ],
)
def test_an_adapter_with_a_part_of_the_avatars_tensors_is_incomplete(lost: str) -> None:
    shapes = pairs() | avatar_parts()
    del shapes[lost]
    weight_file = read(shapes)
    assert weight_file.missing == (lost,)
    with pytest.raises(UnusableWeights, match=lost):
        require_complete(weight_file)


def test_an_adapter_without_any_audio_but_with_a_patch_embedding_is_incomplete() -> None:
    shapes = pairs() | {name: shape for name, shape in avatar_parts().items() if name.startswith("patch")}
    assert any(name.startswith("audio_proj.") for name in read(shapes).missing)


def test_a_pair_that_is_missing_in_one_block_is_noticed() -> None:
    shapes = pairs() | avatar_parts()
    for ab in "AB":
        del shapes[f"blocks.5.ffn.2.lora_{ab}.default.weight"]
    assert read(shapes).missing == ("blocks.5.ffn.2.lora",)
    whole_block = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.5.")}
    assert len(read(whole_block).missing) == len(LINEARS), (
        "the audio projections tell how many blocks there are"
    )


def test_a_plain_lora_may_change_as_little_as_it_likes() -> None:
    shapes = {name: shape for name, shape in pairs().items() if ".self_attn.q." in name and ".3." in name}
    require_complete(read(shapes))


def test_half_a_pair_and_ranks_that_disagree_are_refused() -> None:
    shapes = pairs()
    del shapes["blocks.2.cross_attn.v.lora_B.default.weight"]
    with pytest.raises(UnusableWeights, match=r"blocks\.2\.cross_attn\.v lacks its lora_B"):
        read(shapes)
    with pytest.raises(UnusableWeights, match="ranks disagree"):
        read(pairs() | {"blocks.0.self_attn.q.lora_A.default.weight": (RANK + 1, D)})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"train_architecture": "lora", "lora_rank": RANK}, "lora_alpha"),
        ({"train_architecture": "lora", "lora_rank": 9, "lora_alpha": 1}, "rank 4.*says 9"),
        ({"train_architecture": "lora", "lora_alpha": "much"}, "not a finite number"),
        ({"train_architecture": "lora", "lora_alpha": float("inf")}, "not a finite number"),
        ({"model_config": {"in_dim": 49}}, "in_dim 49.*33"),
        ({"peft_type": "LORA", "r": RANK}, "lora_alpha"),
        ({"peft_type": "LOHA", "lora_alpha": 1}, "only plain LoRA"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UnusableWeights, match=words):
        read(pairs() | avatar_parts(), config=config)


def test_a_config_tells_that_a_part_is_missing() -> None:
    config = {"train_architecture": "lora", "lora_rank": RANK, "lora_alpha": 1}
    with pytest.raises(UnusableWeights, match="no LoRA tensors"):
        read(avatar_parts(), config=config)
    with pytest.raises(UnusableWeights, match="no LoRA tensors"):
        read(base(), config=config)
    with pytest.raises(UnusableWeights, match=f"num_layers {LAYERS + 1}.* {LAYERS}"):
        read(base(), config={"num_layers": LAYERS + 1})
    with pytest.raises(UnusableWeights, match="in_channels 36"):
        read(base(), config={"in_channels": 36})
    without_ffn = {name: shape for name, shape in pairs().items() if ".ffn." not in name} | avatar_parts()
    for targets in ("q,k,v,o,ffn.0,ffn.2", ["q", "k", "v", "o", "ffn.0", "ffn.2"]):
        weight_file = read(without_ffn, config={**config, "lora_target_modules": targets})
        assert len(weight_file.missing) == 2 * LAYERS and "blocks.0.ffn.0.lora" in weight_file.missing


def test_pefts_biases_replace_the_bases() -> None:
    bias = {"base_model.model.blocks.0.attn1.to_q.base_layer.bias": (D,)}
    weight_file = read(pairs(NAMINGS["peft, diffusers"]) | bias)
    require_complete(weight_file)
    assert set(weight_file.tensors) == {"blocks.0.self_attn.q.bias"}


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "model.", "dit.", "module._orig_mod.", "model.diffusion_model.", "_fsdp_wrapped_module."],
)
def test_what_wrappers_put_in_front_is_taken_off_and_said(prefix: str) -> None:
    weight_file = read({f"{prefix}{name}": shape for name, shape in base().items()})
    require_complete(weight_file)
    assert any(prefix in note for note in weight_file.notes)


def test_wrappers_inside_a_name_are_taken_off_and_said() -> None:
    """FSDP and activation checkpointing wrap the network, each block and each part of one."""
    wrapped = {
        "_fsdp_wrapped_module."
        + name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module.").replace(
            ".ffn.", ".ffn._orig_mod."
        ): shape
        for name, shape in base().items()
    }
    weight_file = read(wrapped)
    require_complete(weight_file)
    assert set(weight_file.tensors) == set(base())
    for word in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."):
        assert any(word in note for note in weight_file.notes)


@pytest.mark.parametrize("name", ["norm3.set_weight", "norm3.bias.set_weight", "modulation.set_weight"])
def test_a_file_that_only_replaces_tensors_is_an_adapter(name: str) -> None:
    shape = (1, 6, D) if "modulation" in name else (D,)
    weight_file = read({f"diffusion_model.blocks.0.{name}": shape})
    require_complete(weight_file)
    assert weight_file.kind == "adapter" and weight_file.missing == ()
    plain = name.removesuffix(".set_weight")
    assert set(weight_file.tensors) == {"blocks.0.norm3.weight" if plain == "norm3" else f"blocks.0.{plain}"}
    assert "width 0" not in weight_file.variant


def test_vace_is_no_plain_model() -> None:
    weight_file = read(base() | {"vace_blocks.0.self_attn.q.weight": (D, D)})
    assert weight_file.variant.startswith("Wan VACE") and not weight_file.layout.supported


def test_a_config_without_alpha_is_refused_with_what_to_write() -> None:
    with pytest.raises(UnusableWeights) as caught:
        read(pairs() | avatar_parts(), config={"train_architecture": "lora", "lora_rank": RANK})
    assert 'add "lora_alpha"' in (caught.value.fix or "")


def test_alpha_of_a_target_wins_over_everything_else() -> None:
    alpha = {"blocks.1.ffn.0.alpha": ArrayTensor(np.array(6.0, np.float32), "F32")}
    weight_file = read(pairs(), values=alpha, config={"train_architecture": "lora", "lora_alpha": 2})
    assert weight_file.scale_of(weight_file.lora_pairs["blocks.1.ffn.0"]) == 6 / RANK
    assert weight_file.scale_of(weight_file.lora_pairs["blocks.1.ffn.2"]) == 2 / RANK
    assert "1 of 60" in weight_file.scale_rule


def test_pefts_patterns_and_root_of_rank_are_obeyed() -> None:
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "alpha_pattern": {"blocks.0.attn1.to_q": 2}}
    naming = NAMINGS["peft, diffusers"]
    weight_file = read(pairs(naming), config=config)
    assert weight_file.scale_of(weight_file.lora_pairs["blocks.0.self_attn.q"]) == 2 / RANK
    assert weight_file.scale_of(weight_file.lora_pairs["blocks.1.self_attn.q"]) == 8 / RANK
    rooted = read(pairs(naming), config={"peft_type": "LORA", "lora_alpha": 8, "use_rslora": True})
    assert rooted.scale_of(rooted.lora_pairs["blocks.1.self_attn.q"]) == 8 / RANK**0.5


def test_differences_and_whole_weights_of_comfyui_are_read() -> None:
    weight_file = read(
        {
            "diffusion_model.blocks.0.ffn.0.diff": (FFN, D),
            "diffusion_model.blocks.0.ffn.0.diff_b": (FFN,),
            "diffusion_model.blocks.1.ffn.2.set_weight": (D, FFN),
            "diffusion_model.blocks.0.norm3.diff_b": (D,),
        }
    )
    require_complete(weight_file)
    assert set(weight_file.differences) == {
        "blocks.0.ffn.0.weight",
        "blocks.0.ffn.0.bias",
        "blocks.0.norm3.bias",
    }
    assert set(weight_file.tensors) == {"blocks.1.ffn.2.weight"}
    assert (weight_file.naming, weight_file.kind) == ("comfyui", "adapter")


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.self_attn.q.dora_scale",
        "blocks.0.ffn.0.hada_w1_a",
        "lora_unet_blocks_0_ffn_0.lokr_w1",
        "scaled_fp8",
    ],
)
def test_what_cannot_be_read_as_what_it_is_is_refused(name: str) -> None:
    with pytest.raises(UnusableWeights, match=name):
        read(pairs() | {name: (4, 4)})


def test_integers_are_no_weights() -> None:
    with pytest.raises(UnusableWeights, match="dtype U8"):
        read(base(), dtype="U8")


def test_every_model_is_called_what_it_is() -> None:
    assert read(base()).variant == "Wan 2.1 T2V of width 48, 6 layers"
    assert "33 channels" in read(base(33) | avatar_parts()).variant
    image = base(36) | {
        "img_emb.proj.0.weight": (20,), "img_emb.proj.0.bias": (20,), "img_emb.proj.1.weight": (20, 20),
        "img_emb.proj.1.bias": (20,), "img_emb.proj.3.weight": (D, 20), "img_emb.proj.3.bias": (D,),
        "img_emb.proj.4.weight": (D,), "img_emb.proj.4.bias": (D,),
    }  # fmt: skip
    for i in range(LAYERS):
        for name in ("k_img", "v_img"):
            image[f"blocks.{i}.cross_attn.{name}.weight"] = (D, D)
            image[f"blocks.{i}.cross_attn.{name}.bias"] = (D,)
        image[f"blocks.{i}.cross_attn.norm_k_img.weight"] = (D,)
    for shapes, name in (
        (image, "Wan 2.1 I2V of width"),
        (base(36), "Wan 2.2 I2V of width"),
        (base(48) | {"head.head.weight": (192, D), "head.head.bias": (192,)}, "Wan 2.2 TI2V of width"),
        (base(49), "with 49 input channels, no audio layers"),
    ):
        weight_file = read(shapes)
        require_complete(weight_file)
        assert name in weight_file.variant
    stable = read(image | {"vocal_projector.proj_in.weight": (4, 4)})
    assert stable.layout.family == "stableavatar" and "StableAvatar of width" in stable.variant
    live = read({"base_model.model.audio_injector.injector.0.q.lora_A.default.weight": (4, D)} | {
        "base_model.model.audio_injector.injector.0.q.lora_B.default.weight": (D, 4)} | pairs())  # fmt: skip
    assert live.layout.family == "liveavatar"


def test_encoders_are_named_and_strangers_refused() -> None:
    assert (
        read({"token_embedding.weight": (9, 4), "blocks.0.attn.q.weight": (4, 4)}).variant
        == "UMT5 text encoder"
    )
    assert (
        read({"encoder.conv1.weight": (4, 3, 3, 3, 3), "conv1.weight": (8, 8, 1, 1, 1)}).variant == "Wan VAE"
    )
    name = "wav2vec2.feature_extractor.conv_layers.0.conv.weight"
    assert read({name: (4, 1, 10)}).variant == "wav2vec 2.0 encoder"
    with pytest.raises(UnusableWeights, match="unknown tensors"):
        read({"layer1.0.conv.weight": (4, 4)})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"patch_embedding.weight": (D, 34, 1, 2, 2)}, "34 input channels"),
        ({"blocks.0.ffn.2.weight": (D, FFN + 1)}, r"blocks\.0\.ffn\.2\.weight has shape"),
        ({"blocks.900000000000.ffn.2.weight": (D, FFN)}, "no model has that many"),
        ({"blocks.99999.ffn.2.weight": (D, FFN)}, "no model has that many"),
        ({"head.head.weight": (0, D)}, "empty"),
        ({"patch_embedding.weight": (D,)}, "patch_embedding.weight has shape"),
    ],
)
def test_absurd_shapes_are_refused(changed: Shapes, words: str) -> None:
    with pytest.raises(UnusableWeights, match=words):
        read(base(33) | avatar_parts() | changed)


def test_two_names_of_one_tensor_are_refused() -> None:
    with pytest.raises(UnusableWeights, match="two names of one tensor"):
        read(base() | {"model.diffusion_model.head.modulation": (1, 2, D)})


def test_names_without_a_place_are_listed_not_lost() -> None:
    weight_file = read(base() | {"blocks.0.self_attn.extra_gate.weight": (D,), "optimizer_step": (1,)})
    assert weight_file.unknown == ("blocks.0.self_attn.extra_gate.weight", "optimizer_step")
    with pytest.raises(UnusableWeights, match="extra_gate"):
        require_complete(weight_file)
