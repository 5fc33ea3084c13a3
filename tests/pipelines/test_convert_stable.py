"""Adapters of a family that is published as full models: its trainer's LoRA, and what `--extract lora` makes
of a fine-tuned file, through every format; and whether `--inspect` tells the truth of each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from avatarctl.cli import app
from avatarctl.loading.parts import transformer
from avatarctl.models.stableavatar import StableAvatarTransformer
from avatarctl.weights.recognise import open_model
from tests.pipelines import tiny_stable_release as stable
from tests.pipelines.converting import close, loaded
from tests.pipelines.tiny_release import State

TARGETS = ["original", "diffusers", "peft", "comfyui"]
RANK, ALPHA = 4, 2.0
OTHERS = ("diffusers load_lora_adapter", "diffusers load_lora_weights")


def cli(*words: str | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(map(str, words)), prog_name="avatarctl")
    assert result.exit_code == code, result.stderr
    return result


@dataclass(frozen=True)
class Files:
    """base: the published file; lora: as the trainer writes it, on every linear layer that takes no audio;
    tuned: a full model whose audio layers are others; with what each is in tensors."""

    base: Path
    lora: Path
    tuned: Path
    base_state: State
    summed: State
    tuned_state: State


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tuned")
    base, generator = stable.tiny_stable_release().square, torch.Generator().manual_seed(4)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.05

    pairs: State = {}
    summed, tuned = dict(base), dict(base)
    for name, weight in base.items():
        if weight.ndim != 2:
            continue
        down, up = random(RANK, weight.shape[1]), random(weight.shape[0], RANK)
        if "vocal" in name:
            tuned[name] = weight + up @ down
            continue
        summed[name] = weight + ALPHA / RANK * up @ down
        module = f"lora_transformer__{name.removesuffix('.weight').replace('.', '_')}"
        pairs |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        pairs[f"{module}.alpha"] = torch.tensor(ALPHA)
    paths = {name: folder / f"{name}.pt" for name in ("transformer3d-square", "lora-checkpoint-100", "tuned")}
    for path, held in zip(paths.values(), (base, pairs, tuned), strict=True):
        torch.save(held, path)
    return Files(*paths.values(), base, summed, tuned)


def merged(adapter: Path, files: Files, tmp_path: Path) -> State:
    out = tmp_path / "merged.safetensors"
    cli("convert-ckpt", adapter, "--merge-lora", "--base", files.base, "--out", out)
    return loaded(out)


def verdicts(path: Path) -> dict[str, tuple[str, str]]:
    facts = json.loads(cli("convert-ckpt", path, "--inspect", "--json").stdout)
    return {each["loader"]: (each["answer"], each["reason"]) for each in facts["loaders"]}


def test_the_trainers_lora_is_merged_with_its_alpha(files: Files, tmp_path: Path) -> None:
    close(merged(files.lora, files, tmp_path), files.summed)


@pytest.mark.parametrize("target", TARGETS)
def test_the_trainers_lora_through_every_format(target: str, files: Files, tmp_path: Path) -> None:
    cli("convert-ckpt", files.lora, "--out", tmp_path / "lora", "--to", target)
    close(merged(tmp_path / "lora", files, tmp_path), files.summed)
    shown = cli("convert-ckpt", tmp_path / "lora", "--inspect").stdout
    assert "LoRA for Wan I2V of width 128, 2 layers" in shown and "as StableAvatar has" in shown
    assert "wan2.1-i2v/lora" in shown, "it changes what only image-to-video models have"


def test_which_programs_know_the_trainers_names(files: Files) -> None:
    """Two underscores behind `lora_transformer` are nobody else's."""
    answers = verdicts(files.lora)
    assert answers["avatarctl infer --lora"][0] == "yes"
    for program in (*OTHERS, "avatarctl infer --model"):
        assert answers[program][0] == "no", program


@pytest.mark.parametrize("target", TARGETS)
def test_audio_layers_are_extracted_and_merged_again(target: str, files: Files, tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    cli("convert-ckpt", files.tuned, "--extract", "lora", "--base", files.base, "--out", lora, "--to", target)
    close(merged(lora, files, tmp_path), files.tuned_state)
    assert "adapter of StableAvatar of width 128, 2 layers" in cli("convert-ckpt", lora, "--inspect").stdout
    answers = verdicts(lora)
    assert answers["avatarctl infer --lora"][0] == "yes" and answers["avatarctl infer --model"][0] == "no"
    takers = OTHERS if target == "diffusers" else ()
    for program in OTHERS:
        assert answers[program][0] == ("wrong" if program in takers else "no")
    for program in takers:
        assert "18 of 18 targets are audio layers" in answers[program][1]
    refused = cli("infer", "--model", lora, code=3).stderr
    assert "is an adapter of StableAvatar" in refused and "by --lora" in refused


def test_diffusers_loads_both_into_the_network_that_has_the_layers(files: Files, tmp_path: Path) -> None:
    """As `--inspect` says: class of avatarctl.models, folder of `--to diffusers`."""
    cli("convert-ckpt", files.base, "--out", tmp_path / "base", "--to", "diffusers")
    words = ("--extract", "lora", "--base", files.base, "--to", "diffusers")
    cli("convert-ckpt", files.tuned, "--out", tmp_path / "lora", *words)
    network = StableAvatarTransformer.from_pretrained(tmp_path / "base")
    file = "pytorch_lora_weights.safetensors"
    network.load_lora_adapter(tmp_path / "lora", weight_name=file, use_safetensors=True)
    network.fuse_lora()
    network.unload_lora()
    held = network.state_dict()["blocks.1.attn2.vocal_v.weight"]
    torch.testing.assert_close(held, files.tuned_state["blocks.1.cross_attn.v_vocal.weight"])


def test_a_full_model_brings_no_config_that_its_release_has_not(files: Files, tmp_path: Path) -> None:
    """`train_architecture` and the like are words of another family's release."""
    cli("convert-ckpt", files.base, "--out", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["diffusion_pytorch_model.safetensors"]
    shown = cli("convert-ckpt", tmp_path / "out", "--inspect").stdout
    assert "trained as" not in shown
    assert "trained for   square videos (by its name, or that of its source)" in shown


def test_heads_that_a_config_states_are_those_that_are_built_and_stay(files: Files, tmp_path: Path) -> None:
    """No tensor tells them; a network of other heads is another network without an error."""
    folder, again = tmp_path / "folder", tmp_path / "again.safetensors"
    cli("convert-ckpt", files.base, "--out", folder, "--to", "diffusers")
    config = json.loads((folder / "config.json").read_text())
    assert config["vocal_heads"] == 8
    (folder / "config.json").write_text(json.dumps(config | {"vocal_heads": 4, "eps": 1e-5}))
    cli("convert-ckpt", folder, "--out", again)
    for path, heads, eps in ((files.base, 8, 1e-6), (folder, 4, 1e-5), (again, 4, 1e-5)):
        network = transformer(open_model(path), torch.float32, torch.device("cpu"))
        assert [block.cross_attn.heads for block in network.vocal_projector.blocks] == [heads, heads], path
        assert network.config.eps == eps, path
        assert f"its heads {heads}" in cli("convert-ckpt", path, "--inspect").stdout


def test_a_conversion_stands_in_for_the_published_file(files: Files, tmp_path: Path) -> None:
    root = tmp_path / "weights"
    folder = root / stable.TRANSFORMERS
    folder.mkdir(parents=True)
    cli("convert-ckpt", files.base, "--out", folder / "transformer3d-square.safetensors", "--dtype", "bf16")
    shown = cli("models", "show", "stableavatar-1.3b", "--weights-root", root).stdout
    assert f"found      {folder}/transformer3d-square.safetensors" in shown
    assert "missing    StableAvatar-1.3B" not in shown
