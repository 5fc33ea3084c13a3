"""What we say that `load_lora_weights` of diffusers does with a LoRA, against all that it changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from avatarctl.weights.recognise import read_weight_file
from tests.weights.test_loaders import (
    ALPHA,
    FFN,
    MODULES,
    RANK,
    WIDTH,
    State,
    by_adapter,
    by_pipeline,
    comfyui,
    internal,
    kohya,
    network,
    verdict,
)

OUTSIDE = {
    "head.head": ("proj_out", 64, WIDTH),
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1", WIDTH, 7),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2", WIDTH, WIDTH),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2", WIDTH, WIDTH),
    "time_projection.1": ("condition_embedder.time_proj", 6 * WIDTH, WIDTH),
}
DRAWS = torch.Generator().manual_seed(3)
HALF = float(ALPHA) / RANK


def sizes(module: str) -> tuple[int, int]:
    """Outputs and inputs."""
    if module in OUTSIDE:
        return OUTSIDE[module][1:]
    return FFN if module.endswith("ffn.0") else WIDTH, FFN if module.endswith("ffn.2") else WIDTH


def theirs(module: str) -> str:
    return OUTSIDE[module][0] if module in OUTSIDE else internal(module)


class Lora:
    """A LoRA file in parts, and what each of them ought to add to a tensor of the network."""

    def __init__(self, name: Callable[[str], str], words: tuple[str, str] = ("lora_A", "lora_B")) -> None:
        self.name, self.words = name, words
        self.state: State = {}
        self.changes: dict[str, Tensor] = {}

    def pairs(self, *modules: str, alpha: bool = True) -> Lora:
        for module in modules:
            outputs, inputs = sizes(module)
            down = torch.randn(RANK, inputs, generator=DRAWS)
            up = torch.randn(outputs, RANK, generator=DRAWS)
            for word, tensor in zip(self.words, (down, up), strict=True):
                self.state[f"{self.name(module)}.{word}.weight"] = tensor
            if alpha:
                self.state[f"{self.name(module)}.alpha"] = ALPHA.clone()
            self.changes[f"{theirs(module)}.weight"] = (HALF if alpha else 1) * up @ down
        return self

    def adds(self, name: str, to: str, *shape: int) -> Lora:
        """A difference: its name in the file, the tensor of the network that it changes."""
        self.state[name] = torch.randn(shape, generator=DRAWS)
        self.changes[to] = self.state[name]
        return self

    def biases(self, *modules: str) -> Lora:
        for module in modules:
            self.adds(f"{self.name(module)}.diff_b", f"{theirs(module)}.bias", sizes(module)[0])
        return self

    def norm(self, name: str) -> Lora:
        return self.adds(f"{name}.diff", "blocks.0.norm2.weight", WIDTH)


def in_comfyui() -> Lora:
    return Lora(comfyui)


def in_kohya() -> Lora:
    return Lora(kohya, ("lora_down", "lora_up"))


def wrapped(module: str) -> str:
    return module.replace(".self_attn", "._orig_mod.self_attn").replace(".attn1", "._orig_mod.attn1")


def with_patch(lora: Lora, module: str) -> Lora:
    """A pair of the convolution that embeds patches."""
    down = torch.randn(RANK, 16, 1, 2, 2, generator=DRAWS)
    up = torch.randn(WIDTH, RANK, 1, 1, 1, generator=DRAWS)
    lora.state |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    product = up.flatten(1) @ down.flatten(1)
    lora.changes["patch_embedding.weight"] = product.reshape(WIDTH, 16, 1, 2, 2)
    return lora


def in_diffusers() -> Lora:
    return Lora(lambda module: f"transformer.{theirs(module)}")


ATTENTION = [module for module in MODULES if "attn" in module]
LATER = [module for module in MODULES if not module.startswith("blocks.0")]
LORAS: dict[str, Callable[[], Lora]] = {
    "kohya": lambda: in_kohya().pairs(*MODULES),
    "kohya without alpha": lambda: in_kohya().pairs(*MODULES, alpha=False),
    "kohya without one alpha": lambda: in_kohya().pairs(*MODULES[1:]).pairs(MODULES[0], alpha=False),
    "kohya of attention only": lambda: in_kohya().pairs(*ATTENTION),
    "kohya without the first block": lambda: in_kohya().pairs(*LATER),
    "kohya with the head": lambda: in_kohya().pairs(*MODULES, "head.head"),
    "kohya with differences": lambda: in_kohya().pairs(*MODULES).biases(*MODULES[:1]),
    "kohya with two underscores": lambda: Lora(
        lambda module: kohya(module).replace("unet_", "unet__"), ("lora_down", "lora_up")
    ).pairs(*MODULES),
    "compiled": lambda: Lora(lambda module: comfyui(wrapped(module))).pairs(*MODULES),
    "kohya of a compiled network": lambda: Lora(
        lambda module: kohya(wrapped(module)), ("lora_down", "lora_up")
    ).pairs(*MODULES),
    "diffusers, compiled": lambda: Lora(lambda module: f"transformer.{wrapped(theirs(module))}").pairs(
        *MODULES, alpha=False
    ),
    "diffusers, compiled as a whole": lambda: Lora(
        lambda module: f"transformer._orig_mod.{theirs(module)}"
    ).pairs(*MODULES, alpha=False),
    "a difference of a modulation": lambda: (
        in_comfyui()
        .pairs(*MODULES, alpha=False)
        .adds("diffusion_model.blocks.0.diff_m", "blocks.0.scale_shift_table", 1, 6, WIDTH)
    ),
    "a difference of the head's modulation": lambda: (
        in_comfyui()
        .pairs(*MODULES, alpha=False)
        .adds("diffusion_model.head.diff_m", "scale_shift_table", 1, 2, WIDTH)
    ),
    "the patch embedding": lambda: with_patch(
        in_comfyui().pairs(*MODULES, alpha=False), "diffusion_model.patch_embedding"
    ),
    "diffusers with the patch embedding": lambda: with_patch(
        in_diffusers().pairs(*MODULES, alpha=False), "transformer.patch_embedding"
    ),
    "attention only": lambda: in_comfyui().pairs(*ATTENTION),
    "without the first block": lambda: in_comfyui().pairs(*LATER),
    "alpha of half of the targets": lambda: (
        in_comfyui().pairs(*MODULES[::2]).pairs(*MODULES[1::2], alpha=False)
    ),
    "all that is converted": lambda: in_comfyui().pairs(*MODULES, *OUTSIDE, alpha=False),
    "nothing for the blocks": lambda: in_comfyui().pairs(*OUTSIDE, alpha=False),
    "biases": lambda: in_comfyui().pairs(*MODULES).biases(*MODULES, "head.head"),
    "biases of embedders beside their pairs": lambda: (
        in_comfyui().pairs(*MODULES, *OUTSIDE, alpha=False).biases(*OUTSIDE)
    ),
    "a bias of the time alone": lambda: in_comfyui().pairs(*MODULES).biases("time_projection.1"),
    "a bias of an embedder alone": lambda: in_comfyui().pairs(*MODULES).biases("text_embedding.2"),
    "a norm": lambda: in_comfyui().pairs(*MODULES).norm("diffusion_model.blocks.0.norm3"),
    "the weight of the head alone": lambda: (
        in_comfyui()
        .pairs(*MODULES, alpha=False)
        .adds("diffusion_model.head.head.diff", "proj_out.weight", 64, WIDTH)
    ),
    "weight and bias of the head": lambda: (
        in_comfyui()
        .pairs(*MODULES, alpha=False)
        .adds("diffusion_model.head.head.diff", "proj_out.weight", 64, WIDTH)
        .biases("head.head")
    ),
    "diffusers before names of the release": lambda: Lora(lambda module: f"transformer.{module}").pairs(
        *MODULES, alpha=False
    ),
    "diffusers": lambda: in_diffusers().pairs(*MODULES, alpha=False),
    "diffusers with differences": lambda: (
        in_diffusers().pairs(*MODULES, alpha=False).norm("transformer.blocks.0.norm2")
    ),
    "diffusers with differences of biases": lambda: (
        in_diffusers().pairs(*MODULES, alpha=False).biases(*MODULES)
    ),
}


def answer(file: Path, lora: Lora, load: Callable[[Path], torch.nn.Module]) -> str:
    """By what becomes of every tensor of the network."""
    before = network().state_dict()
    try:
        model = load(file)
    except (ValueError, IndexError, KeyError):
        return "no"
    if not getattr(model, "peft_config", None):
        return "no"  # no name was known, and no error said so
    model.fuse_lora()
    model.unload_lora()
    after = model.state_dict()
    right = all(
        torch.allclose(after[name], tensor + lora.changes.get(name, 0), atol=1e-4)
        for name, tensor in before.items()
    )
    return "yes" if right else "wrong"


@pytest.mark.parametrize("name", LORAS)
def test_what_diffusers_makes_of_it(name: str, tmp_path: Path) -> None:
    lora = LORAS[name]()
    path = tmp_path / f"{name}.safetensors"
    save_file(lora.state, path)
    weight_file = read_weight_file(path)
    for loader, load in (("load_lora_weights", by_pipeline), ("load_lora_adapter", by_adapter)):
        said = verdict(weight_file, f"diffusers {loader}")
        assert said.answer == answer(path, lora, load), (loader, said.reason)
