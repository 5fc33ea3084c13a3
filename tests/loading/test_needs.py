"""`models pull --for`: a command as text, to the rows that it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from avatarctl.cli.typed import read_typed
from avatarctl.errors import AvatarctlError, ConfigError, PathNotFound, UsageError
from avatarctl.hub.locate import HubName
from avatarctl.hub.pull import Wants
from avatarctl.loading.needs import needs, wanted_by_names
from tests.weights.release import write_release

BASE_14B = ["omniavatar-14b", "wan2.1-t2v-14b", "omniavatar-14b-adapter", "wav2vec2-base-960h"]
STABLE = ["stableavatar-1.3b", "wan2.1-fun-1.3b-inp-encoders", "wav2vec2-base-960h"]


def wanted(text: str) -> Wants:
    return needs(read_typed(text).resolved.cfg)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("infer --model omniavatar-14b", BASE_14B),
        ("avatarctl infer --model omniavatar-14b --chunked", BASE_14B),
        ("infer --model stableavatar-1.3b", STABLE),
        ("infer --model stableavatar-1.3b --size 512x512", STABLE),
        ("infer --model stableavatar-1.3b --size 832X480", [f"{STABLE[0]}-rec-vec", *STABLE[1:]]),
        ("infer --model stableavatar-1.3b -o output.width=832 -o output.height=480",
         [f"{STABLE[0]}-rec-vec", *STABLE[1:]]),
        ("infer", ["cartoon-i2v"]),
        ("infer --model cartoon-i2v", ["cartoon-i2v"]),
        ("infer --model liveavatar-14b", ["liveavatar-14b", "wan2.2-s2v-14b", "liveavatar-adapter"]),
        ("infer --model omniavatar-14b --image me.jpg --audio v.wav", BASE_14B),
        ("infer --image=me.jpg --overwrite -q --model omniavatar-14b --size 64x64", BASE_14B),
        ("infer -o sampling.steps=3 -o model.name=omniavatar-14b", BASE_14B),
        ("infer --config omniavatar-14b --steps 3", BASE_14B),
        ("infer --config omniavatar-14b --model cartoon-i2v", ["cartoon-i2v"]),
    ],
)  # fmt: skip
def test_a_command_as_typed(text: str, rows: list[str]) -> None:
    assert [row.name for row in wanted(text).rows] == rows


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("infre --model omniavatar-14b", UsageError, "did you mean infer?"),
        ("", UsageError, "names no command"),
        ("models", UsageError, "names no command"),
        ("convert-ckpt a.pt --inspect", UsageError, "convert-ckpt needs no model"),
        ("models list", UsageError, "models list needs no model"),
        ("infer --help", UsageError, "asks for help or the version"),
        ("avatarctl --version", UsageError, "asks for help or the version"),
        ("infer --modle omniavatar-14b", UsageError, "--model"),
        ("infer --aux sync", UsageError, "no such option.*--aux"),
        ("infer omniavatar-14b", UsageError, "unexpected extra argument"),
        ("infer --overwrite me.jpg", UsageError, "unexpected extra argument"),
        ("infer --model", UsageError, "requires an argument"),
        ("infer --overwrite --no-overwrite", UsageError, "given more than once"),
        ("infer --model omniavatar-14", ConfigError, "did you mean omniavatar-14b?"),
        ("infer --model wan2.1-t2v-14b", ConfigError, "kind base.*did you mean omniavatar-14b?"),
        ("infer --model stableavatar-1.3b --size 832", ConfigError, "expected WIDTHxHEIGHT"),
        ("infer --model 'omni", UsageError, "quotation mark is open"),
        ("infer --lora ./absent.safetensors", PathNotFound, "does not exist"),
        ("infer --config absent.yaml", PathNotFound, "no such configuration file"),
        ("infer -o model.nam=x", ConfigError, "did you mean"),
    ],
)
def test_mistakes_are_those_of_the_command_itself(text: str, error: type[AvatarctlError], says: str) -> None:
    with pytest.raises(error, match=says.replace("?", r"\?")) as caught:
        wanted(text)
    assert caught.value.exit_code == 2


def test_a_command_that_does_not_exist_is_said_to_be_that_of_for() -> None:
    with pytest.raises(UsageError, match="no such command 'serve'") as caught:
        read_typed("serve --model omniavatar-14b")
    assert caught.value.where == "--for"


def test_a_file_as_model_wants_what_stands_around_it(tmp_path: Path) -> None:
    folder = write_release(tmp_path / "mine")
    assert [row.name for row in wanted(f"infer --model '{folder}'").rows][1:] == [
        "wan2.1-t2v-1.3b", "wav2vec2-base-960h"
    ]  # fmt: skip


def test_lora_files(tmp_path: Path) -> None:
    assert wanted("infer --lora org/loras/a.safetensors:0.8 --lora org/b").hub_names == (
        HubName("org/loras", "a.safetensors"),
        HubName("org/b", ""),
    )
    here = tmp_path / "mine.safetensors"
    here.touch()
    assert wanted(f"infer --lora '{here}:.5'").hub_names == ()


def test_names_are_rows_or_names_on_the_hub() -> None:
    wants = wanted_by_names(["omniavatar-14b", "wav2vec2-base-960h", "org/x/y.bin", "org/x/y.bin"])
    assert [row.name for row in wants.rows] == BASE_14B, "each once"
    assert wants.hub_names == (HubName("org/x", "y.bin"),)
    with pytest.raises(ConfigError, match=r"did you mean omniavatar-14b\?"):
        wanted_by_names(["omniavatar14b"])
