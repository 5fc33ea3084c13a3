"""`models pull --for`: a command as text, to the rows that it needs."""

from __future__ import annotations

from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from avatarctl.cli.options import words_of
from avatarctl.config.sections import section_types
from avatarctl.errors import AvatarctlError, ConfigError, PathNotFound, UsageError
from avatarctl.hub.locate import HubName
from avatarctl.loading.needs import AUX_ROWS, wanted_by_names, wanted_for
from avatarctl.registry import ROWS
from tests.weights.release import write_release

BASE_14B = ["omniavatar-14b", "wan2.1-t2v-14b", "omniavatar-14b-adapter", "wav2vec2-base-960h"]
STABLE = ["stableavatar-1.3b", "wan2.1-fun-1.3b-inp-encoders", "wav2vec2-base-960h"]


def names(text: str) -> list[str]:
    return [row.name for row in wanted_for(text).rows]


def test_every_loss_of_the_configuration_has_a_row() -> None:
    losses = get_type_hints(section_types()["aux"])["losses"]
    assert set(get_args(get_args(losses)[0])) == AUX_ROWS.keys()
    assert set(AUX_ROWS.values()) <= ROWS.keys()


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("train v2v --model omniavatar-14b --aux sync,lpips", [*BASE_14B, "stable-syncnet", "lpips-vgg16"]),
        ("avatarctl train i2v --aux=trepa --model=omniavatar-14b", ["videomae-v2-g", *BASE_14B]),
        ("train v2v --aux sync", ["stable-syncnet"]),
        ("infer --model omniavatar-14b", BASE_14B),
        ("infer --model stableavatar-1.3b", STABLE),
        ("infer --model stableavatar-1.3b --size 512x512", STABLE),
        ("infer --model stableavatar-1.3b --size 832X480", [f"{STABLE[0]}-rec-vec", *STABLE[1:]]),
        ("infer", []),
        ("infer --model cartoon-i2v", ["cartoon-i2v"]),
        ("vram-profile", []),
        ("vram-profile train v2v --model omniavatar-14b --aux sync --size 512x512", []),
        ("infer --model liveavatar-14b", ["liveavatar-14b", "wan2.2-s2v-14b", "liveavatar-adapter"]),
    ],
)
def test_commands(text: str, rows: list[str]) -> None:
    assert names(text) == rows


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("train v2w --model omniavatar-14b", UsageError, "did you mean train v2v?"),
        ("train", UsageError, "did you mean train"),
        ("", UsageError, "it knows infer"),
        ("infer --modle omniavatar-14b", UsageError, "did you mean --model?"),
        ("infer --aux sync", UsageError, "'--aux' says nothing about weights"),
        ("infer omniavatar-14b", UsageError, "'omniavatar-14b' says nothing"),
        ("infer --model", UsageError, "--model needs a value"),
        ("infer --model omniavatar-14", ConfigError, "did you mean omniavatar-14b?"),
        ("infer --model wan2.1-t2v-14b", ConfigError, "kind base.*did you mean omniavatar-14b?"),
        ("train v2v --aux synk", UsageError, "did you mean sync?"),
        ("infer --model stableavatar-1.3b --size 832", UsageError, "expected WIDTHxHEIGHT"),
        ("infer --model 'omni", UsageError, "quotation mark is open"),
        ("infer --lora ./absent.safetensors", PathNotFound, "does not exist"),
    ],
)
def test_mistakes_name_the_nearest(text: str, error: type[AvatarctlError], says: str) -> None:
    with pytest.raises(error, match=says.replace("?", r"\?")) as caught:
        wanted_for(text)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("infer --model omniavatar-14b --image me.jpg --audio v.wav", BASE_14B),
        ("infer --image=me.jpg --overwrite -q --no-overwrite --model omniavatar-14b --size 64x64", BASE_14B),
        ("infer -o sampling.steps=3 -o model.name=omniavatar-14b", BASE_14B),
        ("infer --config omniavatar-14b --steps 3", BASE_14B),
        ("infer --config omniavatar-14b --model cartoon-i2v", ["cartoon-i2v"]),
        ("train v2v --model omniavatar-14b --num-frames 81 --aux sync", [*BASE_14B, "stable-syncnet"]),
    ],
)
def test_a_command_as_typed(text: str, rows: list[str]) -> None:
    assert [row.name for row in wanted_for(text, words_of).rows] == rows


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("infer --imge me.jpg", "did you mean --image?"),
        ("infer --model omniavatar-14b me.jpg", "'me.jpg' says nothing"),
        ("infer --overwrite me.jpg", "'me.jpg' says nothing"),
        ("infer --image", "--image needs a value"),
        ("infer --aux sync", "'--aux' says nothing"),
        ("infer --config absent.yaml", "no such configuration file"),
        ("infer -o model.nam=x", "did you mean"),
    ],
)
def test_a_word_of_no_option_is_refused(text: str, says: str) -> None:
    with pytest.raises(AvatarctlError, match=says.replace("?", r"\?")) as caught:
        wanted_for(text, words_of)
    assert caught.value.exit_code == 2


def test_a_file_as_model_wants_what_stands_around_it(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "mine")
    assert [row.name for row in wanted_for(f"infer --model '{folder}'", words_of).rows][1:] == [
        "wan2.1-t2v-1.3b", "wav2vec2-base-960h"
    ]  # fmt: skip


def test_lora_files(tmp_path: Path) -> None:
    assert wanted_for("infer --lora org/loras/a.safetensors:0.8 --lora org/b").hub_names == (
        HubName("org/loras", "a.safetensors"),
        HubName("org/b", ""),
    )
    here = tmp_path / "mine.safetensors"
    here.touch()
    assert wanted_for(f"infer --lora '{here}:.5'").hub_names == ()


def test_names_are_rows_or_names_on_the_hub() -> None:
    wants = wanted_by_names(["omniavatar-14b", "wav2vec2-base-960h", "org/x/y.bin", "org/x/y.bin"])
    assert [row.name for row in wants.rows] == BASE_14B, "each once"
    assert wants.hub_names == (HubName("org/x", "y.bin"),)
    with pytest.raises(ConfigError, match=r"did you mean omniavatar-14b\?"):
        wanted_by_names(["omniavatar14b"])
