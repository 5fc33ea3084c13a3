"""What we say that diffusers does with a file, compared with what it really does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from avatarctl.weights.loaders import Verdict, verdicts
from avatarctl.weights.recognise import read_weight_file
from avatarctl.weights.weight_file import WeightFile
from tests.weights.published_tables import LINEARS, Shapes, audio, lora, wan

WIDTH, FFN, LAYERS, RANK = 32, 48, 4, 4
TARGET = "blocks.0.self_attn.q"
INSIDE = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0", "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0", "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}  # fmt: skip

State = dict[str, Tensor]
MODULES = [f"blocks.{i}.{name}" for i in range(LAYERS) for name in LINEARS]
ALPHA = torch.tensor(float(RANK) / 2)


def random(shapes: Shapes) -> State:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


LORA = random(lora(WIDTH, FFN, LAYERS, RANK))


def internal(module: str) -> str:
    block, number, name = module.split(".", 2)
    return f"{block}.{number}.{INSIDE[name]}"


def named(module: Callable[[str], str], down: str = "lora_A", up: str = "lora_B") -> State:
    """The LoRA with other names of modules and matrices."""
    parts = ((down, "lora_A"), (up, "lora_B"))
    return {
        f"{module(name)}.{part}.weight": LORA[f"{name}.{original}.default.weight"].clone()
        for name in MODULES
        for part, original in parts
    }


def alphas(module: Callable[[str], str]) -> State:
    return {f"{module(name)}.alpha": ALPHA.clone() for name in MODULES}


def transformer_name(module: str) -> str:
    return f"transformer.{internal(module)}"


def comfyui(module: str) -> str:
    return f"diffusion_model.{module}"


def kohya(module: str) -> str:
    return f"lora_unet_{module.replace('.', '_')}"


HEADER = {
    "lora_adapter_metadata": json.dumps(
        {
            "transformer.r": RANK,
            "transformer.lora_alpha": float(ALPHA),
            "transformer.target_modules": [internal(module) for module in MODULES],
        }
    )
}
HEAD = {
    "diffusion_model.head.head.lora_A.weight": torch.zeros(RANK, WIDTH),
    "diffusion_model.head.head.lora_B.weight": torch.zeros(64, RANK),
}
FILES: dict[str, tuple[State, dict[str, str]]] = {
    "release": (LORA, {}),
    "diffusers": (named(transformer_name), {}),
    "diffusers with alpha in the header": (named(transformer_name), HEADER),
    "diffusers with .alpha": (named(transformer_name) | alphas(transformer_name), {}),
    "comfyui": (named(comfyui), {}),
    "comfyui with .alpha": (named(comfyui) | alphas(comfyui), {}),
    "comfyui with a patch embedding": (
        named(comfyui) | {"diffusion_model.patch_embedding.weight": torch.zeros(WIDTH, 33, 1, 2, 2)},
        {},
    ),
    "comfyui with the head": (named(comfyui) | HEAD, {}),
    "comfyui with the head and .alpha": (
        named(comfyui) | alphas(comfyui) | HEAD | {"diffusion_model.head.head.alpha": ALPHA},
        {},
    ),
    "kohya": (named(kohya, "lora_down", "lora_up") | alphas(kohya), {}),
}


def network() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=16, text_dim=7, freq_dim=10, ffn_dim=FFN,
        num_layers=LAYERS,
    )  # fmt: skip


def by_adapter(path: Path) -> nn.Module:
    model = network()
    prefix = "transformer" if path.stem.startswith("diffusers") else None
    model.load_lora_adapter(path.parent, weight_name=path.name, prefix=prefix, use_safetensors=True)
    return model


def by_pipeline(path: Path, use_safetensors: bool = True) -> nn.Module:
    """What `WanPipeline.load_lora_weights` does, without a pipeline around the network."""
    model = network()
    state, metadata = WanPipeline.lora_state_dict(
        path.parent, weight_name=path.name, use_safetensors=use_safetensors, return_lora_metadata=True
    )
    if not all("lora" in name for name in state):
        raise ValueError("Invalid LoRA checkpoint.")
    WanPipeline.load_lora_into_transformer(state, model, adapter_name="it", metadata=metadata)
    return model


def applied_scale(model: nn.Module) -> float | None:
    """Factor of the update of one weight, None where nothing was loaded."""
    layer = model.get_submodule(internal(TARGET))
    if not getattr(layer, "scaling", None):
        return None
    name = next(iter(layer.scaling))
    update = layer.scaling[name] * (layer.lora_B[name].weight @ layer.lora_A[name].weight)
    product = LORA[f"{TARGET}.lora_B.default.weight"] @ LORA[f"{TARGET}.lora_A.default.weight"]
    return float((update * product).sum().detach() / product.square().sum())


def verdict(weight_file: WeightFile, loader: str) -> Verdict:
    return next(each for each in verdicts(weight_file) if each.loader == loader)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("loader", "load"),
    [("diffusers load_lora_adapter", by_adapter), ("diffusers load_lora_weights", by_pipeline)],
)
def test_loras_in_diffusers(
    file: str, loader: str, load: Callable[[Path], nn.Module], tmp_path: Path
) -> None:
    state, metadata = FILES[file]
    path = tmp_path / f"{file}.safetensors"
    save_file(state, path, metadata=metadata or None)
    weight_file = read_weight_file(path)
    ours = weight_file.scale_of(weight_file.lora_pairs[TARGET])
    said = verdict(weight_file, loader)
    try:
        theirs = applied_scale(load(path))
    except (ValueError, IndexError):
        theirs = None
    if said.answer == "no":
        assert theirs is None
    elif said.answer == "yes":
        assert theirs == pytest.approx(ours)
    else:
        assert said.answer == "wrong"
        assert theirs is not None and theirs != pytest.approx(ours)
        assert f"scale {theirs:g} instead of {ours:g}" in said.reason


@pytest.mark.parametrize(
    ("parts", "answer"),
    [({}, "yes"), (audio(WIDTH, LAYERS, 3, 5), "wrong")],
    ids=["plain Wan", "with audio layers"],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "pipe.dit."])
def test_models_in_diffusers(prefix: str, parts: Shapes, answer: str, tmp_path: Path) -> None:
    channels = 33 if parts else 16
    state = random(wan(WIDTH, FFN, LAYERS, channels, text=7, freq=10) | parts)
    path = tmp_path / "model.safetensors"
    save_file({f"{prefix}{name}": tensor for name, tensor in state.items()}, path)
    said = verdict(read_weight_file(path), "diffusers from_single_file")
    (tmp_path / "config.json").write_text(json.dumps({**network().config, "in_channels": channels}))
    try:
        model = WanTransformer3DModel.from_single_file(path, config=str(tmp_path))
    except (ValueError, KeyError, RuntimeError, OSError):
        model = None
    assert said.answer == ("no" if prefix == "pipe.dit." else answer)
    if said.answer == "no":
        assert model is None or not torch.equal(model.patch_embedding.bias, state["patch_embedding.bias"])
        return
    assert model is not None
    assert torch.equal(model.patch_embedding.bias, state["patch_embedding.bias"])
    assert torch.equal(model.blocks[1].attn2.to_out[0].weight, state["blocks.1.cross_attn.o.weight"])
    assert not any("audio" in name for name in model.state_dict())


WRAPPED: dict[str, tuple[Callable[[State], object], str]] = {
    # What is saved, and what diffusers does with it.
    "bare": (lambda state: state, "yes"),
    "state_dict": (lambda state: {"state_dict": state, "epoch": 3}, "yes"),
    "model": (lambda state: {"model": state, "epoch": 3}, "no"),
    "module in state_dict": (lambda state: {"state_dict": {"module": state}}, "no"),
    "twice": (lambda state: {"state_dict": {"state_dict": state}}, "yes"),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("zipped", [True, False])
def test_dictionaries_around_the_tensors(name: str, zipped: bool, tmp_path: Path) -> None:
    around, diffusers = WRAPPED[name]
    state = random(wan(WIDTH, FFN, LAYERS, 16, text=7, freq=10))
    path = tmp_path / "model.pt"
    torch.save(around(state), path, _use_new_zipfile_serialization=zipped)
    weight_file = read_weight_file(path)
    assert verdict(weight_file, "diffusers from_single_file").answer == diffusers
    (tmp_path / "config.json").write_text(json.dumps(dict(network().config)))
    try:
        model = WanTransformer3DModel.from_single_file(path, config=str(tmp_path))
    except NotImplementedError:  # it found no tensor
        assert diffusers == "no"
    else:
        assert diffusers == "yes" and torch.equal(model.proj_out.bias, state["head.head.bias"])


def test_a_dictionary_around_a_lora(tmp_path: Path) -> None:
    lora = {f"diffusion_model.{name.replace('.default', '')}": tensor for name, tensor in LORA.items()}
    torch.save({"state_dict": lora}, tmp_path / "lora.pt")
    assert verdict(read_weight_file(tmp_path / "lora.pt"), "diffusers load_lora_weights").answer == "no"
    with pytest.raises(ValueError, match="Invalid LoRA"):
        by_pipeline(tmp_path / "lora.pt", use_safetensors=False)
