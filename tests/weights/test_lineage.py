"""An adapter that is in the base already: its changes would count twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from avatarctl.errors import UnusableWeights
from avatarctl.events import Event, Notice
from avatarctl.loading.assemble import with_loras
from avatarctl.loading.loras import Lora
from avatarctl.pipelines.convert import ConvertRequest, plan_conversion, write
from avatarctl.weights.recognise import read_weight_file
from tests.weights import release

TWICE = "already: merged once more, its changes would count twice"


@pytest.fixture
def omni(tmp_path: Path) -> Path:
    return release.write_release(tmp_path / "omni")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return release.write_base(tmp_path / "base.safetensors")


def convert(source: Path, out: Path, to: str = "original", **asked: object) -> list[str]:
    """The warnings of a conversion."""
    events: list[Event] = []
    request = ConvertRequest(source, out, to, **asked)  # type: ignore[arg-type]
    write(plan_conversion(request, events.append), events.append)
    return [event.text for event in events if isinstance(event, Notice) and event.level == "warning"]


def test_a_merge_is_not_repeated(omni: Path, base: Path, tmp_path: Path) -> None:
    merged, renamed = tmp_path / "merged", tmp_path / "renamed"
    assert not convert(omni, merged, base=base, merge=True)
    omni.rename(renamed)
    convert(renamed, tmp_path / "peft", "peft")
    for again in (renamed, tmp_path / "peft"):
        with pytest.raises(UnusableWeights, match=rf"{again.name}: is in the base .*merged {TWICE}"):
            convert(again, tmp_path / "out", base=merged, merge=True)
        with pytest.raises(UnusableWeights, match=TWICE):
            with_loras(read_weight_file(merged), (Lora(again, 1.0),), lambda event: None)


def test_nor_within_one_run(omni: Path, base: Path) -> None:
    loras = (Lora(omni, 1.0), Lora(omni, 1.0))
    with pytest.raises(UnusableWeights, match=TWICE):
        with_loras(read_weight_file(base), loras, lambda event: None)


def test_a_plain_lora_may_be_given_twice_but_is_not_merged_twice(base: Path, tmp_path: Path) -> None:
    lora, merged = tmp_path / "lora.safetensors", tmp_path / "merged.safetensors"
    save_file({name: tensor for name, tensor in release.adapter_state().items() if "lora" in name}, lora)
    with_loras(read_weight_file(base), (Lora(lora, 0.5), Lora(lora, 0.5)), lambda event: None)
    convert(lora, merged, base=base, merge=True)
    with pytest.raises(UnusableWeights, match=TWICE):
        convert(lora, tmp_path / "out", base=merged, merge=True)
    other = tmp_path / "other.safetensors"
    save_file({"blocks.0.ffn.0.diff_b": torch.ones(release.FFN)}, other)
    assert not convert(other, tmp_path / "both.safetensors", base=merged, merge=True)
    # The hashes of a merged model are those of the last conversion; its history still has the names.
    warnings = convert(lora, tmp_path / "out.safetensors", base=tmp_path / "both.safetensors", merge=True)
    assert len(warnings) == 1 and "lora.safetensors was merged into" in warnings[0]


def test_the_record_of_a_base_outlives_a_merge_into_it(omni: Path, base: Path, tmp_path: Path) -> None:
    merged, other = tmp_path / "merged", tmp_path / "other.safetensors"
    convert(omni, merged, base=base, merge=True)
    save_file({"blocks.0.ffn.0.diff_b": torch.ones(release.FFN)}, tmp_path / "raw.safetensors")
    convert(tmp_path / "raw.safetensors", other, "comfyui")  # has a history of its own
    with pytest.raises(UnusableWeights, match=TWICE):
        with_loras(read_weight_file(merged), (Lora(other, 1.0), Lora(omni, 1.0)), lambda event: None)


def test_an_avatars_adapter_on_an_avatar_is_doubted(omni: Path, tmp_path: Path) -> None:
    full = release.write_model(tmp_path / "full.safetensors")
    warnings = convert(omni, tmp_path / "out", base=full, merge=True)
    assert (
        len(warnings) == 1 and "is OmniAvatar" in warnings[0] and "replaces its audio layers" in warnings[0]
    )


def test_an_extracted_adapter_goes_onto_its_base(omni: Path, base: Path, tmp_path: Path) -> None:
    """Its file was made from the base as well, and from another model with that base."""
    merged, cast = tmp_path / "merged", tmp_path / "cast.safetensors"
    convert(omni, merged, base=base, merge=True)
    convert(merged, tmp_path / "lora", base=base, extract=True)
    assert not convert(tmp_path / "lora", tmp_path / "again", base=base, merge=True)
    convert(base, cast, dtype="BF16")
    assert not convert(omni, tmp_path / "onto", base=cast, merge=True)


def test_a_damaged_record_is_told(omni: Path, tmp_path: Path) -> None:
    file = tmp_path / "base.safetensors"
    for text in ("{}", "[1]", json.dumps([{"name": "x"}]), "["):
        save_file(release.base_state(), file, {"avatarctl.sources": text})
        with pytest.raises(UnusableWeights, match=r"base\.safetensors: the metadata avatarctl\.sources"):
            convert(omni, tmp_path / "out", base=file, merge=True)
