"""Which weights of a folder are meant, sharded sets, configurations and second files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from avatarctl.errors import PathNotFound, UnusableWeights
from avatarctl.files.source import RawWeights, open_weights
from avatarctl.files.tensors import read_whole


def write_safetensors(path: Path, *names: str, **metadata: str) -> Path:
    """Tensors of two elements, each its own value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.full(2, sum(name.encode()), np.float32) for name in names or ("w",)}
    path.write_bytes(save(arrays, metadata or None))
    return path


def write_pt(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: torch.full((2,), float(sum(name.encode()))) for name in names or ("w",)}, path)
    return path


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def sharded(folder: Path, stem: str = "model", suffix: str = ".safetensors", **placed: str) -> Path:
    """Two shards and their index; `placed` overrides where the index says a tensor is."""
    write = write_safetensors if suffix == ".safetensors" else write_pt
    names = [f"{stem}-{number:05}-of-00002{suffix}" for number in (1, 2)]
    write(folder / names[0], "a", "b")
    write(folder / names[1], "c")
    places = {"a": names[0], "b": names[0], "c": names[1], **placed}
    return write_json(folder / f"{stem}{suffix}.index.json", {"metadata": {}, "weight_map": places})


def refusal(path: Path) -> str:
    with pytest.raises(UnusableWeights) as caught:
        open_weights(path)
    assert str(caught.value).isprintable()
    return str(caught.value)


def check_values(raw: RawWeights) -> None:
    for name, tensor in raw.tensors.items():
        assert read_whole(tensor).tolist() == [sum(name.encode())] * 2


# --- sharded sets --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_sharded_set_is_one_model(tmp_path: Path, suffix: str) -> None:
    index = sharded(tmp_path, suffix=suffix)
    write_json(tmp_path / "config.json", {"dim": 4})
    for named in (tmp_path, index):
        raw = open_weights(named)
        assert raw.path == named
        assert list(raw.tensors) == ["a", "b", "c"]
        assert [file.name[:11] for file in raw.files] == ["model-00001", "model-00002"]
        assert raw.config == {"dim": 4}
        check_values(raw)


def test_a_shard_alone_is_not_a_model(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    shard = tmp_path / "model-00001-of-00002.safetensors"
    assert "one of 2 files" in refusal(shard)
    assert f"name {index.name} or the folder" in refusal(shard)
    index.unlink()
    assert "model.safetensors.index.json is missing" in refusal(shard)
    assert "model.safetensors.index.json is missing" in refusal(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "shard model-00002-of-00002.safetensors is missing" in refusal(index)


@pytest.mark.parametrize(
    "name",
    [
        "../bait.safetensors",
        "/etc/hostname",
        "sub/x.safetensors",
        "..",
        "",
        "a\\b.safetensors",
        "C:x",
        "\x1b[2J",
    ],
)
def test_a_shard_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    write_safetensors(tmp_path / "bait.safetensors", "c")
    write_safetensors(tmp_path / "in" / "sub" / "x.safetensors", "c")
    assert "unsafe path outside the folder" in refusal(sharded(tmp_path / "in", c=name))


def test_the_index_must_be_right(tmp_path: Path) -> None:
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    index = sharded(tmp_path / "1", b=second)
    assert re.search("-00001-.* holds 'b', but the index puts it into .*-00002-", refusal(index))
    index = sharded(tmp_path / "2", d=first)
    assert re.search("'d' is missing from shard .*-00001-", refusal(index))
    index = sharded(tmp_path / "3")
    write_safetensors(tmp_path / "3" / second, "c", "extra")
    assert re.search("holds 'extra', but the index does not name it", refusal(index))
    write_safetensors(tmp_path / "3" / second, "c", "a")
    assert re.search("holds 'a', but the index puts it into .*-00001-", refusal(index))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"weight_map": {"a": "x", "a": "y"}}', "duplicate key 'a'"),
        ('{"weight_map": {}}', "names no tensors"),
        ('{"weight_map": {"a": 1}}', "weight_map must map"),
        ('{"weight_map": ["a"]}', "weight_map must map"),
        ("{}", "weight_map must map"),
        ("[]", "a JSON object is expected"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_an_index_that_is_no_index(tmp_path: Path, text: str, says: str) -> None:
    assert says in refusal(write_json(tmp_path / "model.safetensors.index.json", text))


@pytest.mark.skipif(not hasattr(os, "symlink") or os.name == "nt", reason="needs symbolic links")
def test_links_in_place_are_what_the_hub_cache_has(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    sharded(blobs)
    write_json(blobs / "config.json", {"dim": 4})
    snapshot.mkdir(parents=True)
    for at, blob in enumerate(sorted(blobs.iterdir())):
        link = snapshot / blob.name
        blob.rename(blobs / f"{at:064x}")
        link.symlink_to(f"../../blobs/{at:064x}")
    raw = open_weights(snapshot)
    assert raw.config == {"dim": 4}
    assert all(file.parent == snapshot for file in raw.files)
    check_values(raw)


# --- choosing in a folder ------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["config.json", None])
def test_a_release_folder(tmp_path: Path, config: str | None) -> None:
    weights = write_pt(tmp_path / "pytorch_model.pt")
    if config:
        write_json(tmp_path / config, {"lora_rank": 128})
    for named in (tmp_path, weights):
        raw = open_weights(named)
        assert raw.files == (weights,)
        assert raw.config == ({"lora_rank": 128} if config else {})


def test_a_training_run(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"lora_rank": 4})
    first = write_pt(tmp_path / "checkpoint-100" / "trainable_weights.pt")
    (tmp_path / "checkpoint-100" / "optimizer.pt").write_bytes(b"not weights")
    (tmp_path / "checkpoint-100" / "random_states_0.pkl").write_bytes(b"not weights")
    for named in (first, first.parent, tmp_path):
        raw = open_weights(named)
        assert raw.files == (first,)
        assert raw.config == {"lora_rank": 4}
    write_pt(tmp_path / "checkpoint-200" / "trainable_weights.pt")
    assert "several checkpoints: checkpoint-100, checkpoint-200" in refusal(tmp_path)
    step = write_pt(tmp_path / "step-100.pt")
    assert open_weights(tmp_path).files == (step,)
    assert open_weights(step).config == {"lora_rank": 4}
    for number in (*range(200, 700, 100), "final-700"):
        write_pt(tmp_path / f"step-{number}.pt")
    message = refusal(tmp_path)
    assert "several weight files: step-100.pt, step-200.pt" in message
    assert "and 2 more" in message


def test_a_base_model_between_its_encoders(tmp_path: Path) -> None:
    """The published Wan 2.1 folder: the transformer is meant, and the others are named."""
    index = sharded(tmp_path, "diffusion_pytorch_model")
    write_json(tmp_path / "config.json", {"dim": 5120})
    write_pt(tmp_path / "Wan2.1_VAE.pth")
    write_pt(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    raw = open_weights(tmp_path)
    assert list(raw.tensors) == ["a", "b", "c"]
    assert raw.notes == (
        f"read {index.name}; beside it, not read: Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth",
    )


def test_one_model_in_two_formats_is_read_from_safetensors(tmp_path: Path) -> None:
    write_pt(tmp_path / "pytorch_model.bin")
    raw = open_weights(tmp_path)
    assert raw.format == "zip"
    write_safetensors(tmp_path / "model.safetensors")
    raw = open_weights(tmp_path)
    assert raw.format == "safetensors"
    assert raw.notes == ("read model.safetensors; beside it, not read: pytorch_model.bin",)


@pytest.mark.parametrize(
    "names",
    [
        ("transformer3d-square.pt", "transformer3d-rec-vec.pt"),
        ("pytorch_model.pt", "diffusion_pytorch_model.safetensors"),
        ("pytorch_model.pt", "pytorch_model.bin"),
        ("pytorch_model.pt", "model.safetensors"),
        ("a.safetensors", "b.safetensors"),
    ],
)
def test_where_two_could_be_meant_the_user_is_asked(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (write_safetensors if name.endswith("safetensors") else write_pt)(tmp_path / name)
    message = refusal(tmp_path)
    assert all(name in message for name in names)
    assert "name the one you mean" in message


def test_a_stale_index_beside_a_whole_file_is_not_guessed_about(tmp_path: Path) -> None:
    sharded(tmp_path)
    write_safetensors(tmp_path / "model.safetensors")
    assert "several weight files" in refusal(tmp_path)


def test_a_diffusers_pipeline(tmp_path: Path) -> None:
    write_json(tmp_path / "model_index.json", {})
    write_safetensors(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    write_json(tmp_path / "transformer" / "config.json", {"num_layers": 2})
    write_safetensors(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "transformer_2").mkdir()
    raw = open_weights(tmp_path)
    assert raw.config == {"num_layers": 2}
    assert raw.notes == ("a diffusers pipeline: read its folder transformer; not transformer_2",)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_peft_folder(tmp_path: Path, name: str) -> None:
    weights = (write_pt if name.endswith("bin") else write_safetensors)(tmp_path / name)
    write_json(tmp_path / "adapter_config.json", {"r": 4})
    write_json(tmp_path / "config.json", {"of": "something else"})
    for named in (tmp_path, weights):
        assert open_weights(named).config == {"r": 4}


def test_a_lora_of_diffusers_and_any_only_file(tmp_path: Path) -> None:
    lora = write_safetensors(tmp_path / "a" / "pytorch_lora_weights.safetensors")
    assert open_weights(tmp_path / "a").files == (lora,)
    only = write_safetensors(tmp_path / "b" / "anything at all.safetensors")
    write_safetensors(tmp_path / "b" / "._anything at all.safetensors", "c")
    (tmp_path / "b" / "README.md").write_text("x")
    assert open_weights(tmp_path / "b").files == (only,)


def test_no_config_of_a_release_belongs_to_a_lora_of_diffusers(tmp_path: Path) -> None:
    lora = write_safetensors(tmp_path / "pytorch_lora_weights.safetensors")
    write_json(tmp_path / "config.json", {"train_architecture": "lora", "lora_alpha": 64})
    assert all(open_weights(named).config == {} for named in (tmp_path, lora))


def test_a_stray_config_does_not_belong_to_a_file_of_another_name(tmp_path: Path) -> None:
    weights = write_safetensors(tmp_path / "downloaded.safetensors")
    write_json(tmp_path / "config.json", {"dim": 4})
    assert open_weights(weights).config == {}
    assert open_weights(tmp_path).config == {"dim": 4}


def test_a_folder_without_weights(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    assert "holds no weight file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"lora_alpha": 1, "lora_alpha": 64}', "config.json is invalid: duplicate key 'lora_alpha'"),
        ("[1]", "a JSON object is expected"),
        ("{'a': 1}", "config.json is not valid JSON"),
        ('{"a": "' + "x" * (1 << 20) + '"}', "too large"),
        ("", "not valid JSON"),
    ],
)
def test_a_config_is_read_strictly(tmp_path: Path, text: str, says: str) -> None:
    write_pt(tmp_path / "pytorch_model.pt")
    write_json(tmp_path / "config.json", text)
    assert says in refusal(tmp_path)


# --- our second files ----------------------------------------------------------------------------


def test_a_second_file_is_read_with_the_first(tmp_path: Path) -> None:
    first = write_safetensors(
        tmp_path / "lora.safetensors", "a", **{"avatarctl.companion": "rest.safetensors", "x": "y"}
    )
    assert "its second file rest.safetensors is missing" in refusal(first)
    second = write_safetensors(
        tmp_path / "rest.safetensors", "b", **{"avatarctl.companion_of": "lora.safetensors"}
    )
    for named in (first, tmp_path):
        raw = open_weights(named)
        assert raw.files == (first, second)
        assert list(raw.tensors) == ["a", "b"]
        assert raw.metadata["x"] == "y"
        check_values(raw)
    assert open_weights(second).notes == ("this is the second file of lora.safetensors",)
    write_safetensors(second, "a", "b", **{"avatarctl.companion_of": "lora.safetensors"})
    assert "'a' is in both lora.safetensors and rest.safetensors" in refusal(first)


def test_a_second_file_of_another_conversion_is_refused(tmp_path: Path) -> None:
    """Channels and audio of one adapter under the LoRA of another would load without a word."""
    made = {
        "avatarctl.sources": "[1]", "avatarctl.channels": "33", "avatarctl.conventions": "{}",
        "avatarctl.operations": "[]",
    }  # fmt: skip
    first = tmp_path / "lora.safetensors"
    write_safetensors(first, "a", **made, **{"avatarctl.companion": "lora.patch.safetensors"})
    second = tmp_path / "lora.patch.safetensors"
    for key in made:
        other = made | {key: "49", "avatarctl.companion_of": "lora.safetensors"}
        write_safetensors(second, "b", **other)
        assert f"lora.patch.safetensors is of another conversion: {key} differs" in refusal(first)
    write_safetensors(second, "b", **made)
    assert "is no second half of an adapter" in refusal(first)
    write_safetensors(second, "b", **made, **{"avatarctl.companion_of": "lora.safetensors"})
    first.rename(tmp_path / "renamed.safetensors")
    assert list(open_weights(tmp_path / "renamed.safetensors").tensors) == ["a", "b"]


def test_without_hashes_a_second_file_belongs_to_the_name_that_it_says(tmp_path: Path) -> None:
    first = write_safetensors(tmp_path / "a.safetensors", "a", **{"avatarctl.companion": "rest.safetensors"})
    write_safetensors(tmp_path / "rest.safetensors", "b", **{"avatarctl.companion_of": "other.safetensors"})
    assert "avatarctl.companion_of differs" in refusal(first)


@pytest.mark.parametrize("only_the_first", [False, True])
def test_a_pair_that_was_renamed_is_still_a_pair(tmp_path: Path, only_the_first: bool) -> None:
    made = {"avatarctl.sources": "[1]", "avatarctl.operations": "[2]"}
    old = {"avatarctl.companion": "old.patch.safetensors"}
    first = write_safetensors(tmp_path / "new.safetensors", "a", **old, **made)
    name = "old.patch.safetensors" if only_the_first else "new.patch.safetensors"
    of = {"avatarctl.companion_of": "old.safetensors"}
    second = write_safetensors(tmp_path / name, "b", **of, **made)
    assert open_weights(first).files == (first, second)
    if not only_the_first:
        assert open_weights(tmp_path).files == (first, second)
        write_safetensors(second, "b", **of, **made | {"avatarctl.operations": "[3]"})
        said = refusal(first)
        assert "old.patch.safetensors is missing; new.patch.safetensors is of another conversion" in said


def test_safetensors_count_before_a_pickle_of_the_same_name(tmp_path: Path) -> None:
    """The published scripts need a pickle beside what we write (docs/weights.md)."""
    chosen = write_safetensors(tmp_path / "pytorch_model.safetensors")
    write_pt(tmp_path / "pytorch_model.pt")
    raw = open_weights(tmp_path)
    assert raw.files == (chosen,)
    assert raw.notes == ("read pytorch_model.safetensors; beside it, not read: pytorch_model.pt",)
    write_safetensors(tmp_path / "model.safetensors")
    assert "holds several weight files: model.safetensors, pytorch_model.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["../bait.safetensors", "/etc/hostname", "", "."])
def test_a_second_file_lies_beside_the_first(tmp_path: Path, name: str) -> None:
    write_safetensors(tmp_path / "bait.safetensors", "b")
    first = write_safetensors(tmp_path / "in" / "a.safetensors", "a", **{"avatarctl.companion": name})
    assert "unsafe path" in refusal(first)


# --- things that are no files --------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="needs devices and pipes")
def test_devices_and_pipes_are_not_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "a.safetensors"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/zero"), Path("/dev/stdin")):
        if path.resolve().is_file():
            continue
        assert "device or pipe" in refusal(path)
    link = tmp_path / "b.pt"
    link.symlink_to(link.name)
    with pytest.raises((UnusableWeights, PathNotFound)):
        open_weights(link)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_safetensors(tmp_path / "a.safetensors")

    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "cannot be read: Permission denied" in refusal(path)


def test_a_suffix_is_not_believed(tmp_path: Path) -> None:
    as_pt = write_safetensors(tmp_path / "a.pt")
    assert "it is a safetensors file, not a pickle" in refusal(as_pt)
    as_safetensors = write_pt(tmp_path / "b.safetensors")
    assert "it is a pickle" in refusal(as_safetensors)
    no_suffix = write_safetensors(tmp_path / "blob")
    assert open_weights(no_suffix).format == "safetensors"


@pytest.mark.parametrize("kind", ["dangling link", "link to itself", "folder", "pipe"])
def test_a_configuration_that_cannot_be_read_is_not_absent(tmp_path: Path, kind: str) -> None:
    """It may state lora_alpha: without it the scale would be a guess."""
    write_safetensors(tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    if kind == "folder":
        config.mkdir()
    elif kind == "pipe":
        os.mkfifo(config)
    else:
        config.symlink_to(config if kind == "link to itself" else tmp_path / "nowhere.json")
    for named in (tmp_path, tmp_path / "model.safetensors"):
        assert "config.json" in refusal(named)
