"""What a conversion refuses, and that nothing is lost, left or half written when it does."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from avatarctl.errors import AvatarctlError, OutputRefused, UnusableWeights, UsageError, WriteFailed
from avatarctl.events import silent
from avatarctl.pipelines.convert import (
    ConvertRequest,
    plan_conversion,
    preview_conversion,
    write,
)
from avatarctl.weights.metadata import read_own
from avatarctl.weights.recognise import read_weight_file
from tests.pipelines.converting import convert, loaded
from tests.weights import release

# What is refused


def test_incomplete_and_unknown_tensors_are_named(tmp_path: Path) -> None:
    state = release.omniavatar_state()
    del state["blocks.2.ffn.0.bias"], state["audio_proj.proj.weight"]
    save_file(state, tmp_path / "torn.safetensors")
    with pytest.raises(UnusableWeights, match=r"2 tensors are missing.*(ffn\.0\.bias|audio_proj)"):
        convert(tmp_path / "torn.safetensors", tmp_path / "out")
    save_file(release.omniavatar_state() | {"blocks.0.extra": torch.ones(3)}, tmp_path / "more.safetensors")
    with pytest.raises(UnusableWeights, match=r"blocks\.0\.extra"):
        convert(tmp_path / "more.safetensors", tmp_path / "out")


def test_the_second_half_of_an_adapter_is_no_adapter(omni: Path, base: Path, tmp_path: Path) -> None:
    """Its LoRA is in the other file: alone it would be converted and merged without."""
    convert(omni, tmp_path / "c.safetensors", "comfyui")
    half, whole = tmp_path / "c.patch.safetensors", release.write_model(tmp_path / "whole.safetensors")
    for source, asked in (
        (half, {}),
        (half, {"base": base, "merge": True}),
        (whole, {"base": half, "extract": True}),
    ):
        with pytest.raises(UnusableWeights, match=r"c\.patch\.safetensors: is the second half.*name c\.safe"):
            convert(source, tmp_path / "out", **asked)  # type: ignore[arg-type]


def test_damaged_metadata_is_told_with_the_file(tmp_path: Path) -> None:
    source = tmp_path / "edited.safetensors"
    save_file(release.omniavatar_state(), source, {"avatarctl.operations": "{"})
    with pytest.raises(UnusableWeights, match=r"edited\.safetensors: .*avatarctl\.operations"):
        convert(source, tmp_path / "out")


def test_a_source_called_by_a_dot_has_a_name(
    omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(omni)
    convert(Path(), tmp_path / "out")
    assert read_own(read_weight_file(tmp_path / "out").metadata).operations[-1]["source"] == "omni"


def test_encoders_are_named_and_not_converted(tmp_path: Path) -> None:
    save_file({"encoder.conv1.weight": torch.ones(2, 2)}, tmp_path / "vae.safetensors")
    with pytest.raises(UnusableWeights, match="is Wan VAE: only"):
        convert(tmp_path / "vae.safetensors", tmp_path / "out")


@pytest.mark.parametrize("target", ["original", "diffusers", "comfyui"])
def test_nothing_that_is_read_is_written_over(target: str, omni: Path, base: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    places = [omni, omni / "new", base, base / "deeper", tmp_path]
    if target != "diffusers":
        places += [base / "diffusion_pytorch_model.safetensors", omni / "new.safetensors"]
    for out in places:
        with pytest.raises(OutputRefused):
            convert(omni, out, target, base=base, merge=True, overwrite=True)
    link = tmp_path / "link.safetensors"
    link.hardlink_to(base / "diffusion_pytorch_model.safetensors")
    if target != "diffusers":
        with pytest.raises(OutputRefused, match="one of the files that are read"):
            convert(omni, link, target, base=base, merge=True, overwrite=True)
    link.unlink()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_existing_output_is_kept_unless_told(omni: Path, tmp_path: Path) -> None:
    for name in ("there", "there.safetensors"):
        convert(omni, tmp_path / name)
        with pytest.raises(OutputRefused, match="exists"):
            convert(tmp_path / "missing", tmp_path / name)  # before anything is read
        convert(omni, tmp_path / name, channels=49, overwrite=True)
        assert loaded(tmp_path / name)["patch_embedding.weight"].shape[1] == 49
    (tmp_path / "lora.patch.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputRefused, match=r"lora\.patch\.safetensors: exists"):
        convert(omni, tmp_path / "lora.safetensors", "comfyui")
    assert (tmp_path / "lora.patch.safetensors").read_bytes() == b"mine"


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("taken", ["lora.safetensors", "lora.patch.safetensors"])
def test_a_file_that_appears_meanwhile_stays(
    taken: str, links: bool, omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # what FAT says

    if not links:
        monkeypatch.setattr("os.link", no_links)
    plan = plan_conversion(ConvertRequest(omni, tmp_path / "lora.safetensors", "comfyui"), silent)
    (tmp_path / taken).write_bytes(b"mine")
    with pytest.raises(OutputRefused, match=f"{taken}: exists"):
        write(plan, silent)
    assert (tmp_path / taken).read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [taken, "omni"]


def test_halves_of_two_conversions_are_not_read_as_one(omni: Path, tmp_path: Path) -> None:
    convert(omni, tmp_path / "x.safetensors", "comfyui")
    convert(omni, tmp_path / "wide.safetensors", "comfyui", channels=49)
    (tmp_path / "wide.patch.safetensors").replace(tmp_path / "x.patch.safetensors")
    with pytest.raises(UnusableWeights, match=r"x\.patch\.safetensors is of another conversion"):
        read_weight_file(tmp_path / "x.safetensors")


def test_no_second_half_stays_behind_what_replaced_its_first(omni: Path, tmp_path: Path) -> None:
    out, half = tmp_path / "lora.safetensors", tmp_path / "lora.patch.safetensors"
    convert(omni, out, "comfyui")
    convert(omni, out, overwrite=True)
    assert not half.exists()
    convert(omni, tmp_path / "other.safetensors", "comfyui")
    (tmp_path / "other.patch.safetensors").rename(half)  # of another file: not ours to remove
    convert(omni, out, overwrite=True)
    assert half.exists()


def test_a_failure_in_the_second_file_leaves_no_first_one(tmp_path: Path) -> None:
    state = release.adapter_state()
    state["blocks.3.ffn.2.lora_B.default.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(UnusableWeights, match=r"^.*/nan\.safetensors: tensor .*lora_B.* holds NaN"):
        convert(tmp_path / "nan.safetensors", tmp_path / "lora.safetensors", "comfyui")
    assert [path.name for path in tmp_path.iterdir()] == ["nan.safetensors"]


@pytest.mark.parametrize("spoilt", ["base", "adapter"])
def test_the_file_that_holds_nan_is_named(spoilt: str, tmp_path: Path) -> None:
    """Not the output, and not the other file."""
    states = {"base": release.base_state(), "adapter": release.adapter_state()}
    name = {"base": "blocks.3.ffn.2.weight", "adapter": "blocks.3.ffn.2.lora_B.default.weight"}[spoilt]
    states[spoilt][name][-1, -1] = torch.nan
    base, adapter = (tmp_path / f"{each}.safetensors" for each in states)
    for each, state in states.items():
        save_file(state, tmp_path / f"{each}.safetensors")
    with pytest.raises(
        UnusableWeights, match=rf"/{spoilt}\.safetensors: tensor blocks\.3\.ffn\.2\.weight .* NaN"
    ):
        convert(adapter, tmp_path / "out", base=base, merge=True)


def test_a_sum_that_overflows_is_told_of_the_output_and_no_temporary_folder(
    omni: Path, tmp_path: Path
) -> None:
    state = release.base_state()
    state["blocks.0.ffn.0.weight"][0, 0] = 1e6
    save_file(state, tmp_path / "large.safetensors")
    with pytest.raises(UnusableWeights, match="NaN or infinity") as caught:
        convert(omni, tmp_path / "out", base=tmp_path / "large.safetensors", merge=True, dtype="F16")
    assert caught.value.where == tmp_path / "out" / "diffusion_pytorch_model.safetensors"


def test_an_error_of_the_system_names_no_temporary_file(
    omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: Path, *_: object, **__: object) -> None:
        raise OSError(116, "Stale file handle", str(path))

    monkeypatch.setattr("avatarctl.pipelines.convert.write_safetensors", stale)
    with pytest.raises(OSError, match="Stale") as caught:
        convert(omni, tmp_path / "out")
    assert caught.value.filename == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("out", "asked", "words"),
    [
        ("x.safetensors", {"to": "diffusers"}, "reads a folder"),
        ("x.safetensors", {"to": "peft"}, "reads a folder"),
        ("x.safetensors", {"shard_bytes": 10**6}, "shards need a folder"),
        ("x", {"to": "comfyui", "shard_bytes": 10**6}, "ComfyUI reads one file"),
        ("x", {"shard_bytes": 10**6}, "adapters are one file"),
        ("x.pt", {}, r"\.pt files are not written"),
        ("x.gguf", {}, r"\.gguf files are not written"),
        ("x.SafeTensors", {}, "in lower case"),
    ],
)
def test_combinations_that_nobody_could_read(
    out: str, asked: dict[str, object], words: str, omni: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        convert(omni, tmp_path / out, **asked)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["omni"]


# Refused before anything is read or computed


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX links and pipes")
@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("out", "overwrite", "words"),
    [
        ("foreign", True, "holds thesis.txt"),
        ("link", True, "is a symbolic link"),
        ("loop", True, "is a symbolic link"),
        ("loop.safetensors", True, "loop of symbolic links"),
        ("n" * 300, False, "too long"),
        ("n" * 300 + ".safetensors", False, "too long"),
        ("pipe.safetensors", True, "not a regular file"),
    ],
)
def test_a_place_is_refused_before_anything_is_read(
    out: str, overwrite: bool, words: str, dry: bool, tmp_path: Path
) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").touch()
    (tmp_path / "link").symlink_to("foreign")
    for name in ("loop", "loop.safetensors"):
        (tmp_path / name).symlink_to(name)
    os.mkfifo(tmp_path / "pipe.safetensors")
    before = sorted(tmp_path.rglob("*"))
    request = ConvertRequest(tmp_path / "missing", tmp_path / out, overwrite=overwrite)
    with pytest.raises(OutputRefused, match=words):
        (preview_conversion if dry else plan_conversion)(request, silent)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("dry", [True, False])
def test_a_place_that_takes_no_file_is_refused_before_anything_is_read(
    dry: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", read_only)
    request = ConvertRequest(tmp_path / "missing", tmp_path / "out")
    with pytest.raises(OutputRefused, match="read-only"):
        (preview_conversion if dry else plan_conversion)(request, silent)


def test_a_full_disk_is_told_by_the_plan(omni: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    request = ConvertRequest(omni, tmp_path / "out")
    with pytest.raises(WriteFailed, match=r"/out: needs [0-9.]+ [kM]B, 100 bytes free"):
        preview_conversion(request, silent)


def test_a_second_file_in_the_way_is_told_before_an_extraction(
    omni: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(omni, tmp_path / "whole", base=base, merge=True)
    monkeypatch.setattr("avatarctl.pipelines.convert_steps.extract_adapter", None)
    (tmp_path / "lora.patch.safetensors").touch()
    request = ConvertRequest(
        tmp_path / "whole", tmp_path / "lora.safetensors", "comfyui", base=base, extract=True
    )
    with pytest.raises(OutputRefused, match=r"lora\.patch\.safetensors: exists"):
        plan_conversion(request, silent)


def test_a_loop_of_links_is_no_source(base: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(AvatarctlError, match=os.strerror(errno.ELOOP)):
        convert(tmp_path / "loop", tmp_path / "out")
    with pytest.raises(AvatarctlError, match=os.strerror(errno.ELOOP)):
        convert(base, tmp_path / "out", base=tmp_path / "loop", merge=True)
