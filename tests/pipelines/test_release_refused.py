"""Releases that are not what they should be: one line, the right exit code, both sides named."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from avatarctl.demo.sample import sample_audio, sample_image
from avatarctl.errors import AvatarctlError, ConfigError, PathNotFound, UnusableWeights, WeightsMissing
from avatarctl.events import Event, Notice
from avatarctl.loading.model_row import row_named
from avatarctl.pipelines import infer
from avatarctl.pipelines.job import Job, check_job
from avatarctl.registry import ROWS, configure
from tests.pipelines import tiny_release as tiny
from tests.weights import release as other

NAN = float("nan")


@pytest.fixture
def release() -> tiny.Release:
    return tiny.tiny_release()


def load(root: Path, model: str = "omniavatar-14b", *assignments: str) -> list[Event]:
    events: list[Event] = []
    cfg = configure(
        f"model.name={model}", f"model.weights_root={root}", "runtime.dtype=float32", *assignments,
        row_named=row_named,
    )  # fmt: skip
    job = Job(sample_image(), sample_audio(seconds=0.2), "a person.", "")
    infer.load(check_job(cfg, row_named(model), job, events.append), emit=events.append)
    return events


def refused(kind: type[AvatarctlError], *arguments: str | Path) -> str:
    with pytest.raises(kind) as error:
        load(*arguments)  # type: ignore[arg-type]
    line = str(error.value)
    assert line.isprintable() and len(line) < 1500
    return line


def drop(state: tiny.State, name: str) -> None:
    del state[name]


def spoil(state: tiny.State, name: str, value: float = NAN) -> None:
    state[name].view(-1)[-1] = value


def reshape(state: tiny.State, name: str) -> None:
    state[name] = torch.cat([state[name], state[name]])


Damage = Callable[[tiny.Release], object]

DAMAGES: dict[str, tuple[Damage, tuple[str, ...]]] = {
    "base lacks one": (lambda r: drop(r.base, "blocks.3.ffn.0.bias"), ("blocks.3.ffn.0.bias", "missing")),
    "base has one more": (
        lambda r: r.base.update({"blocks.0.self_attn.extra": torch.ones(2)}), ("blocks.0.self_attn.extra",),
    ),
    "base has another shape": (lambda r: reshape(r.base, "head.head.bias"), ("head.head.bias", "[128]")),
    "base holds NaN": (
        lambda r: spoil(r.base, "text_embedding.0.bias"),
        ("Wan2.1-T2V-14B/diffusion", "text_embedding.0.bias holds NaN"),
    ),
    "base holds infinity in a merged weight": (
        lambda r: spoil(r.base, "blocks.2.ffn.2.weight", float("inf")),
        ("Wan2.1-T2V-14B/diffusion", "blocks.2.ffn.2.weight holds NaN or infinity"),
    ),
    "adapter lacks audio": (
        lambda r: drop(r.adapter, "audio_cond_projs.1.weight"), ("audio_cond_projs.1.weight", "missing"),
    ),
    "adapter lacks the patch": (
        lambda r: drop(r.adapter, "patch_embedding.bias"), ("patch_embedding.bias", "missing"),
    ),
    "adapter lacks half a pair": (
        lambda r: drop(r.adapter, "blocks.0.ffn.0.lora_A.default.weight"), ("blocks.0.ffn.0",),
    ),
    "adapter holds NaN": (
        lambda r: spoil(r.adapter, "audio_proj.proj.weight"),
        ("OmniAvatar-14B/pytorch_model.pt", "audio_proj.proj.weight holds NaN"),
    ),
    "adapter holds NaN in a pair": (
        lambda r: spoil(r.adapter, "blocks.1.ffn.0.lora_B.default.weight"),
        ("OmniAvatar-14B/pytorch_model.pt", "blocks.1.ffn.0.weight holds NaN"),
    ),
    "adapter states no alpha": (lambda r: r.config.pop("lora_alpha"), ("alpha",)),
    "text lacks one": (
        lambda r: drop(r.text, "blocks.1.attn.k.weight"), ("1 tensor is missing: blocks.1.attn.k.weight",),
    ),
    "text has one more": (lambda r: r.text.update(x=torch.ones(2)), ("x", "no place")),
    "text has another shape": (
        lambda r: reshape(r.text, "blocks.1.ffn.fc1.weight"),
        ("blocks.1.ffn.fc1.weight has shape [128, 32]",),
    ),
    "text holds NaN": (lambda r: spoil(r.text, "norm.weight"), (": norm.weight holds NaN",)),
    "vae lacks one": (lambda r: drop(r.vae, "conv2.bias"), ("1 tensor is missing: conv2.bias",)),
    "vae has one more": (lambda r: r.vae.update(odd=torch.ones(2)), ("odd", "no place")),
    "vae holds NaN": (lambda r: spoil(r.vae, "decoder.head.2.bias"), ("decoder.head.2.bias holds NaN",)),
    "audio lacks one": (
        lambda r: drop(r.audio, "wav2vec2.encoder.layer_norm.bias"), ("encoder.layer_norm.bias", "missing"),
    ),
    "audio has one more": (
        lambda r: r.audio.update({"wav2vec2.adapter.x": torch.ones(2)}), ("adapter.x", "no place"),
    ),
    "audio has another shape": (
        lambda r: reshape(r.audio, "wav2vec2.encoder.layers.0.layer_norm.weight"),
        (
            "wav2vec2.encoder.layers.0.layer_norm.weight has shape [32]",
            "config.json and the weights are of two models",
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_file(what: str, release: tiny.Release, tmp_path: Path) -> None:
    damage, says = DAMAGES[what]
    damage(release)
    release.write(tmp_path)
    line = refused(UnusableWeights, tmp_path)
    for part in says:
        assert part in line, line
    assert str(tmp_path) in line, "the file is named"


def test_masked_spec_embed_may_be_absent(release: tiny.Release, tmp_path: Path) -> None:
    del release.audio["wav2vec2.masked_spec_embed"]
    release.write(tmp_path)
    load(tmp_path)


def test_all_missing_files_in_one_line_before_any_is_read(release: tiny.Release, tmp_path: Path) -> None:
    release.write(tmp_path)
    gone = ("Wan2.1-T2V-14B/diffusion_pytorch_model-00002-of-00006.safetensors",
            "Wan2.1-T2V-14B/Wan2.1_VAE.pth", "OmniAvatar-14B/config.json",
            "wav2vec2-base-960h/preprocessor_config.json")  # fmt: skip
    for name in gone:
        (tmp_path / name).unlink()
    (tmp_path / "Wan2.1-T2V-14B" / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"not read yet")
    line = refused(WeightsMissing, tmp_path)
    for name in gone:
        assert name.rpartition("/")[2] in line
    assert "models_t5" not in line


def test_encoders_of_the_other_release_will_do(release: tiny.Release, tmp_path: Path) -> None:
    """They are the same files: 11 GB that nobody has to fetch twice."""
    release.write(tmp_path)
    here, there = tmp_path / "Wan2.1-T2V-14B", tmp_path / "Wan2.1-T2V-1.3B"
    there.mkdir()
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google"):
        (here / name).rename(there / name)
    load(tmp_path)


def sparse_file(path: Path, shapes: tiny.Shapes) -> None:
    """A safetensors file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def test_weights_of_another_size_than_the_model_that_was_named(release: tiny.Release, tmp_path: Path) -> None:
    """The tensors of a 1.3B model in the folders of the 14B one."""
    dims = tiny.Dims(width=1536, heads=12, layers=4)
    release.adapter = {name: torch.zeros(shape) for name, shape in tiny.adapter_shapes(dims).items()}
    release.write(tmp_path)
    base = tmp_path / "Wan2.1-T2V-14B"
    sparse_file(base / "x.safetensors", tiny.wan_shapes(dims))
    line = refused(UnusableWeights, tmp_path, "omniavatar-14b", f"model.weights.dit={base / 'x.safetensors'}")
    assert "omniavatar-1.3b (width 1536)" in line and "omniavatar-14b was asked for (width 5120)" in line
    assert "use --model omniavatar-1.3b" in line


def test_an_adapter_of_another_size_than_the_base(release: tiny.Release, tmp_path: Path) -> None:
    release.write(tmp_path)
    folder = other.write_release(tmp_path / "other")
    base = f"model.weights.dit={tmp_path / 'Wan2.1-T2V-14B'}"
    line = refused(UnusableWeights, tmp_path, str(folder), base)
    assert "width 128" in line and "width 48" in line


def test_a_base_with_other_layers_than_the_adapter(release: tiny.Release, tmp_path: Path) -> None:
    other_layers = tiny.Dims(layers=4)
    release.base = tiny.tiny_release(other_layers).base
    release.write(tmp_path)
    tiny.write_json(tmp_path / "Wan2.1-T2V-14B" / "config.json", tiny.base_config(other_layers))
    line = refused(UnusableWeights, tmp_path)
    assert "6 layers" in line and "4 layers" in line


def test_a_lora_of_another_size(release: tiny.Release, tmp_path: Path) -> None:
    release.write(tmp_path)
    file = tmp_path / "lora.safetensors"
    a, b = torch.randn(2, 96), torch.randn(96, 2)
    save_file({"blocks.0.self_attn.q.lora_A.weight": a, "blocks.0.self_attn.q.lora_B.weight": b}, file)
    line = refused(UnusableWeights, tmp_path, "omniavatar-14b", f"model.lora={file}")
    assert "[96, 96]" in line and "[48, 48]" in line and "blocks.0.self_attn.q" in line


def test_a_lora_is_not_blamed_for_the_model(release: tiny.Release, tmp_path: Path) -> None:
    spoil(release.base, "blocks.0.self_attn.q.weight")
    release.write(tmp_path)
    file = tmp_path / "lora.safetensors"
    a, b = torch.randn(2, 48), torch.randn(48, 2)
    save_file({"blocks.0.self_attn.q.lora_A.weight": a, "blocks.0.self_attn.q.lora_B.weight": b}, file)
    line = refused(UnusableWeights, tmp_path, "omniavatar-14b", f"model.lora={file}")
    assert "Wan2.1-T2V-14B/diffusion" in line and "blocks.0.self_attn.q.weight holds NaN" in line


def test_what_is_no_model_is_named_as_what_it_is(release: tiny.Release, tmp_path: Path) -> None:
    release.write(tmp_path)
    base = tmp_path / "Wan2.1-T2V-14B"
    lora = tmp_path / "lora.safetensors"
    pair = {"lora_A": torch.randn(2, 48), "lora_B": torch.randn(48, 2)}
    save_file({f"diffusion_model.blocks.0.self_attn.q.{k}.weight": v for k, v in pair.items()}, lora)
    stable = tmp_path / "stable.safetensors"
    save_file({"vocal_projector.proj.weight": torch.ones(2, 2)} | release.base, stable)
    for path, says in (
        (base, ("Wan 2.1 T2V", "no audio layers", "--weights dit=")),
        (base / "Wan2.1_VAE.pth", ("Wan VAE",)),
        (base / "models_t5_umt5-xxl-enc-bf16.pth", ("UMT5 text encoder",)),
        (tmp_path / "wav2vec2-base-960h", ("wav2vec 2.0 encoder",)),
        (lora, ("LoRA for Wan", "--lora")),
        (stable, ("StableAvatar",)),
    ):
        line = refused(UnusableWeights, tmp_path, str(path))
        for part in says:
            assert part in line, line


def test_names_that_mean_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"did you mean omniavatar-1\.3b"):
        row_named("omniavatar-1.3")
    for name in ("absent/model.safetensors", "absent.safetensors", "./omniavatar-14b"):
        with pytest.raises(PathNotFound):
            row_named(name)
    with pytest.raises(ConfigError, match="did you mean omniavatar-14b"):
        row_named("OmniAvatar/OmniAvatar-14B")
    (tmp_path / "omniavatar-14b").mkdir()
    assert row_named("omniavatar-14b") is ROWS["omniavatar-14b"], "a registry name is never a folder"


def test_a_model_with_more_channels_is_read_and_not_run_yet(release: tiny.Release, tmp_path: Path) -> None:
    release.adapter["patch_embedding.weight"] = torch.randn(tiny.TINY.width, 49, 1, 2, 2)
    release.config["model_config"] = {"in_dim": 49}
    release.write(tmp_path)
    row = row_named(str(tmp_path / "OmniAvatar-14B"))
    assert (row.defaults["model.channels"], row.defaults["model.audio_offset"]) == (49, 0)
    line = refused(UnusableWeights, tmp_path)
    assert "49 input channels" in line and "33 were asked for" in line


def test_a_full_model_without_a_config_of_its_heads(release: tiny.Release, tmp_path: Path) -> None:
    release.write(tmp_path)
    full = release.base | {n: t for n, t in release.adapter.items() if "lora" not in n}
    save_file(full, tmp_path / "full.safetensors")
    (tmp_path / "Wan2.1-T2V-14B" / "config.json").unlink()  # its word would count
    assert "num_heads" in refused(UnusableWeights, tmp_path, str(tmp_path / "full.safetensors"))


def test_the_second_file_of_an_adapter_alone(release: tiny.Release, tmp_path: Path) -> None:
    release.write(tmp_path)
    whole = {name: tensor for name, tensor in release.adapter.items() if "lora" not in name}
    save_file(whole, tmp_path / "extra.safetensors", {"avatarctl.companion_of": "first.safetensors"})
    line = refused(UnusableWeights, tmp_path, str(tmp_path / "extra.safetensors"))
    assert "second half" in line and "name first.safetensors" in line


def test_parts_that_do_not_fit_each_other(release: tiny.Release, tmp_path: Path) -> None:
    release.text = {
        name: tensor[..., :16] if tensor.shape[-1] == tiny.TINY.text_width else tensor
        for name, tensor in release.text.items()
        if not name.endswith(("attn.o.weight", "fc2.weight"))
    } | {
        name: tensor[:16]
        for name, tensor in release.text.items()
        if name.endswith(("attn.o.weight", "fc2.weight"))
    }
    release.write(tmp_path)
    line = refused(UnusableWeights, tmp_path)
    assert "text features of width 16" in line and "takes 32" in line


TOKENIZERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "absent": (lambda path: (path.unlink(), (path.parent / "x").touch()), ("tokenizer.json is not there",)),
    "no JSON": (lambda path: path.write_text("{"), ("tokenizer.json is not valid JSON",)),
    "another file": (lambda path: path.write_text('{"model": {"type": "Unknown"}}'), ("is no tokenizer",)),
    "larger than the encoder": (
        lambda path: _more_words(path), ("knows token", "the text encoder has 48 tokens")),
    "without an end": (lambda path: _without_end(path), ("does not end a prompt",)),
}  # fmt: skip


def _more_words(path: Path) -> None:
    text = json.loads(path.read_text())
    text["model"]["vocab"] += [[f"w{i}", -9.0] for i in range(40)]
    path.write_text(json.dumps(text))


def _without_end(path: Path) -> None:
    text = json.loads(path.read_text())
    text["post_processor"] = None
    path.write_text(json.dumps(text))


@pytest.mark.parametrize("what", TOKENIZERS)
def test_tokenizers(what: str, release: tiny.Release, tmp_path: Path) -> None:
    release.write(tmp_path)
    damage, says = TOKENIZERS[what]
    damage(tmp_path / "Wan2.1-T2V-14B" / "google" / "umt5-xxl" / "tokenizer.json")
    line = refused(UnusableWeights, tmp_path)
    for part in says:
        assert part in line, line


CONFIGS: dict[str, tuple[dict[str, object], str]] = {
    "another model": ({"model_type": "hubert"}, "type hubert"),
    "text for a number": ({"hidden_size": "16"}, "hidden_size is 16, not a size"),
    "absurd": ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
    "more layers than tensors": ({"num_hidden_layers": 60_000}, "60000 layers are stated"),
    "a list too long": ({"conv_dim": [8] * 99}, "conv_dim"),
    "lists of two lengths": ({"conv_dim": [8] * 6}, "differ in length"),
    "another pace": ({"conv_stride": [5, 2, 2, 2, 2, 2, 1]}, "one vector for 160 samples"),
    "an unknown word": ({"hidden_act": "os.system"}, "hidden_act is os.system"),
    "heads that do not divide": ({"num_attention_heads": 3}, "describes no encoder"),
    "an adapter": ({"add_adapter": True}, "with an adapter"),
    "another width": ({"intermediate_size": 40}, "two models"),
}


@pytest.mark.parametrize("what", CONFIGS)
def test_audio_configs(what: str, release: tiny.Release, tmp_path: Path) -> None:
    fields, says = CONFIGS[what]
    release.write(tmp_path)
    path = tmp_path / "wav2vec2-base-960h" / "config.json"
    tiny.write_json(path, tiny.audio_config(tiny.TINY) | fields)
    assert says in refused(UnusableWeights, tmp_path)


def test_a_preprocessor_that_does_not_normalise(release: tiny.Release, tmp_path: Path) -> None:
    release.write(tmp_path)
    path = tmp_path / "wav2vec2-base-960h" / "preprocessor_config.json"
    path.write_text('{"do_normalize": false}')
    notices = [event.text for event in load(tmp_path) if isinstance(event, Notice)]
    assert any("do_normalize false" in text for text in notices)
    path.write_text('{"sampling_rate": 8000}')
    assert "8000 samples a second" in refused(UnusableWeights, tmp_path)


@pytest.mark.parametrize("told_by", ["tensors", "config", "nothing"])
def test_a_audio_encoder_that_was_only_pretrained(
    told_by: str, release: tiny.Release, tmp_path: Path
) -> None:
    """Of the same shapes as the recogniser's, and of other features: nothing else would say so."""
    config = tiny.audio_config(tiny.TINY)
    if told_by == "tensors":
        release.audio |= {"quantizer.codevectors": torch.ones(1, 4, 2), "project_q.bias": torch.ones(2)}
    if told_by == "config":
        config["architectures"] = ["Wav2Vec2ForPreTraining"]
    release.write(tmp_path)
    tiny.write_json(tmp_path / "wav2vec2-base-960h" / "config.json", config)
    said = [each.level for each in load(tmp_path) if isinstance(each, Notice) and "pretrained" in each.text]
    assert said == ([] if told_by == "nothing" else ["warning"])


def test_a_bin_file_of_the_audio_encoder(release: tiny.Release, tmp_path: Path) -> None:
    release.write(tmp_path)
    folder = tmp_path / "wav2vec2-base-960h"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    load(tmp_path)


def test_a_base_for_a_full_model_and_parts_for_a_built_in_one(release: tiny.Release, tmp_path: Path) -> None:
    release.write(tmp_path)
    full = tmp_path / "mine"
    full.mkdir()
    save_file(
        release.base | {n: t for n, t in release.adapter.items() if "lora" not in n}, full / "m.safetensors"
    )
    tiny.write_json(full / "config.json", {"num_heads": 2})
    base = f"model.weights.dit={tmp_path / 'Wan2.1-T2V-14B'}"
    assert "has no base" in refused(ConfigError, tmp_path, str(full), base)
    assert "built in" in refused(ConfigError, tmp_path, "cartoon-i2v", base)
    assert "neither a base nor" in refused(
        UnusableWeights, tmp_path, "omniavatar-14b", f"model.weights.dit={tmp_path / 'OmniAvatar-14B'}"
    )
    assert "no such file" in refused(PathNotFound, tmp_path, "omniavatar-14b", "model.weights.vae=absent.pth")
