"""`avatarctl convert-ckpt`: what it says, what it refuses, and how it runs as a process."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from safetensors.torch import load_file

from tests.weights import published_tables, release

Run = Callable[..., Result]
Refused = Callable[..., str]


@pytest.fixture
def omni(here: Path) -> str:
    release.write_release(here / "omni")
    return "omni"


@pytest.fixture
def base(here: Path) -> str:
    release.write_base(here / "wan" / "diffusion_pytorch_model.safetensors")
    return "wan"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(flag: str, run: Run) -> None:
    text = run("convert-ckpt", flag).stdout
    assert text.startswith("Usage: avatarctl convert-ckpt [OPTIONS] SRC")
    for option in ("--merge-lora", "--base", "--channels", "--to", "--dtype", "--inspect", "--shard-size"):
        assert f"  {option}" in text
    assert "convert-ckpt" in run("--help").stdout


def test_a_conversion_prints_its_path_and_tells_the_steps(omni: str, base: str, run: Run) -> None:
    words = ("--merge-lora", "--base", base, "--channels", "49", "--dtype", "bf16")
    result = run("convert-ckpt", omni, "--out", "merged", *words)
    assert result.exit_code == 0 and result.stdout == "merged\n"
    for part in ("read: adapter of OmniAvatar", "merged into wan", "33 to 49", "dtype: bfloat16"):
        assert part in result.stderr
    state = load_file("merged/diffusion_pytorch_model.safetensors")
    assert state["patch_embedding.weight"].shape[1] == 49
    quiet = run("convert-ckpt", omni, "--out", "again", *words, "-q")
    assert quiet.stdout == "again\n" and quiet.stderr == ""


def test_paths_in_the_home_folder(
    omni: str, base: str, here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell leaves the ~ of `--base=~/wan` as it is."""
    monkeypatch.setenv("HOME", str(here))
    result = run("convert-ckpt", f"~/{omni}", "--out=~/merged", "--merge-lora", f"--base=~/{base}")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{here}/merged\n"
    assert "adapter of OmniAvatar" in run("convert-ckpt", f"~/{omni}", "--inspect").stdout
    assert sorted(path.name for path in here.iterdir()) == ["merged", "omni", "wan"]


def test_json_of_a_conversion(omni: str, run: Run) -> None:
    document = json.loads(
        run("convert-ckpt", omni, "--out", "l.safetensors", "--to", "comfyui", "--json").stdout
    )
    assert document.keys() == {"command", "path", "files", "tensors", "bytes", "seconds", "did"}
    assert document["path"] == "l.safetensors" and document["tensors"] == 128
    assert document["files"] == ["l.patch.safetensors", "l.safetensors"]


def test_a_dry_run_touches_nothing(omni: str, base: str, here: Path, run: Run) -> None:
    result = run("convert-ckpt", omni, "--out", "peft", "--to", "peft", "--dry-run")
    assert "file: peft/adapter_model.safetensors\nfile: peft/adapter_config.json\n" in result.stdout
    assert "step: read: adapter of OmniAvatar" in result.stdout and "the release's names" in result.stdout
    assert re.search(r"^size: \d+ kB$", result.stdout, re.MULTILINE)
    words = ("--merge-lora", "--base", base, "--dry-run", "--json")
    document = json.loads(run("convert-ckpt", omni, "--out", "whole", *words).stdout)
    assert document["dry_run"] and document["tensors"] == 129 and document["path"] == "whole"
    assert sorted(path.name for path in here.iterdir()) == ["omni", "wan"]


def test_inspect(omni: str, run: Run) -> None:
    result = run("convert-ckpt", omni, "--inspect")
    assert result.exit_code == 0 and result.stderr == ""
    assert "adapter of OmniAvatar" in result.stdout and "rank 4" in result.stdout
    document = json.loads(run("convert-ckpt", omni, "--inspect", "--json").stdout)
    assert (document["family"], document["kind"], document["channels"]) == ("omniavatar", "adapter", 33)


def test_extract_with_a_rank(omni: str, base: str, run: Run) -> None:
    run("convert-ckpt", omni, "--out", "whole", "--merge-lora", "--base", base)
    result = run("convert-ckpt", "whole", "--out", "lora", "--extract", "lora", "--base", base, "--rank", "2")
    assert result.exit_code == 0, result.stderr
    assert json.loads(Path("lora/config.json").read_text())["lora_rank"] == 2


def test_shards_and_their_index(base: str, run: Run) -> None:
    run("convert-ckpt", base, "--out", "parts", "--shard-size", "1MB")
    names = {path.name for path in Path("parts").glob("*")}
    assert "diffusion_pytorch_model.safetensors.index.json" in names
    assert "diffusion_pytorch_model-00001-of-00004.safetensors" in names
    dry = run("convert-ckpt", base, "--out", "dry", "--shard-size", "1MB", "--dry-run").stdout
    assert {line.removeprefix("file: dry/") for line in dry.splitlines() if "file: " in line} == names
    back = run("convert-ckpt", "parts", "--out", "one.safetensors")
    assert back.exit_code == 0
    held, expected = load_file("one.safetensors"), release.base_state()
    assert held.keys() == expected.keys() and all(held[name].equal(expected[name]) for name in held)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "where to write is missing"),
        (("--out", ""), "--out: is empty"),
        (("--out", "x", "--merge-lora"), "--merge-lora: needs the full model"),
        (("--out", "x", "--extract", "lora"), "--extract: needs the full model"),
        (("--out", "x", "--extract", "lora", "--merge-lora", "--base", "b"), "opposites"),
        (("--out", "x", "--base", "b"), "--base: has no meaning without --merge-lora"),
        (("--out", "x", "--lora-scale", "0.5"), "--lora-scale: has no meaning without --merge-lora"),
        (("--out", "x", "--lora-scale", "0", "--extract", "lora", "--base", "b"), "--lora-scale: has no"),
        (("--out", "x", "--merge-lora", "--base", "b", "--lora-scale", "nan"), "no finite number"),
        (("--out", "x", "--rank", "4"), "--rank: has no meaning without --extract lora"),
        (("--out", "x", "--rank", "0", "--extract", "lora", "--base", "b"), "--rank"),
        (("--out", "x", "--drop-channels"), "--drop-channels: has no meaning without --channels"),
        (("--out", "x", "--channels", "48"), "'48' is not one of"),
        (("--out", "x", "--to", "onnx"), "'onnx' is not one of"),
        (("--out", "x", "--dtype", "int8"), "'int8' is not one of"),
        (("--out", "x", "--shard-size", "big"), "expected a size such as 5GB"),
        (("--out", "x", "--shard-size", "12"), "no useful size"),
        (("--out", "x.pt"), ".pt files are not written"),
        (("--out", "x.safetensors", "--to", "diffusers"), "reads a folder, not one file"),
        (("--inspect", "--out", "x"), "--out has no meaning beside --inspect"),
        (("--inspect", "--overwrite"), "--overwrite has no meaning beside --inspect"),
        (("--inspect", "--dry-run"), "--dry-run has no meaning beside --inspect"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(
    words: tuple[str, ...], told: str, omni: str, refused: Refused
) -> None:
    assert told in refused(2, "convert-ckpt", omni, *words)
    assert [path.name for path in Path.cwd().iterdir()] == ["omni"]


def test_paths_that_are_not_there(omni: str, refused: Refused) -> None:
    assert "nowhere.pt" in refused(2, "convert-ckpt", "nowhere.pt", "--out", "x")
    assert "nowhere" in refused(2, "convert-ckpt", "nowhere", "--inspect")
    assert "nobase" in refused(2, "convert-ckpt", omni, "--out", "x", "--merge-lora", "--base", "nobase")
    assert "does not exist" in refused(2, "convert-ckpt", omni, "--out", "deep/er/x.safetensors")


def test_a_file_that_is_no_weights(here: Path, refused: Refused) -> None:
    (here / "notes.safetensors").write_text("hello")
    assert "notes.safetensors" in refused(3, "convert-ckpt", "notes.safetensors", "--out", "x")
    assert "notes.safetensors" in refused(3, "convert-ckpt", "notes.safetensors", "--inspect")


# As a process

SCRIPT = """
import json, pathlib, re, resource, sys
from avatarctl.cli import app
try:
    app.main(sys.argv[1:], prog_name="avatarctl")
except SystemExit as ended:
    code = ended.code
used = resource.getrusage(resource.RUSAGE_SELF)
heavy = [name for name in ("torch", "diffusers", "transformers", "peft") if name in sys.modules]
# Not ru_maxrss, which a child inherits from the process that started it.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]
told = {"code": code, "peak": int(peak) * 1024, "cpu": used.ru_utime + used.ru_stime, "heavy": heavy}
print(json.dumps(told), file=sys.stderr)
"""
LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
POSIX = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A safetensors file of zeros in bfloat16 that takes no room on the disk; its length."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return path.stat().st_size


def process(*words: str) -> tuple[str, dict[str, Any]]:
    """Standard output, and what the process used."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "convert-ckpt", *words], capture_output=True, text=True, timeout=120
    )
    used = json.loads(done.stderr.splitlines()[-1])
    assert used["code"] == 0, done.stderr
    return done.stdout, used


@LINUX
def test_28_gb_are_inspected_like_a_small_file_and_without_torch(here: Path) -> None:
    """As many tensors in both: what they weigh costs nothing, whatever else the machine does meanwhile."""
    length = sparse(here / "model.safetensors", published_tables.wan(5120, 13_824, 40))
    sparse(here / "small.safetensors", published_tables.wan(128, 256, 40))
    assert length > 28e9
    least = {"model": math.inf, "small": math.inf}
    for _ in range(4):  # other programs slow this one down, and nothing makes it faster than it is
        for name in least:
            stdout, used = process(f"{name}.safetensors", "--inspect", "--json")
            least[name] = min(least[name], used["cpu"])
            if name == "model":
                assert json.loads(stdout)["published_as"] == "Wan2.1-T2V-14B"
                assert used["heavy"] == [] and used["peak"] < 150e6
        if least["model"] <= 1.3 * least["small"]:
            return
    pytest.fail(f"CPU seconds: {least}")


@LINUX
def test_a_conversion_holds_a_few_blocks_and_no_torch(here: Path) -> None:
    """Widened, renamed and cast: 420 MB in, 840 MB out."""
    length = sparse(here / "model.safetensors", published_tables.wan(2048, 8192, 3))
    assert length > 400e6
    _, looked = process("model.safetensors", "--inspect")
    words = ("--to", "diffusers", "--channels", "33", "--dtype", "fp32", "--shard-size", "500MB")
    stdout, used = process("model.safetensors", "--out", "out", *words)
    assert stdout == "out\n" and used["heavy"] == []
    assert used["peak"] - looked["peak"] < 150e6
    assert sum(path.stat().st_size for path in Path("out").iterdir()) > 1.9 * length


STOPPED = """
import os, sys
from avatarctl.cli import main
from avatarctl.files.output_file import OutputFile
write, blocks, number = OutputFile.write, [], int(sys.argv.pop(1))

def stopping(self, data):
    blocks.append(write(self, data))
    if len(blocks) == 5:
        os.kill(os.getpid(), number)

OutputFile.write = stopping
main()
"""


@POSIX
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 6), (signal.SIGKILL, -9)], ids=["term", "kill"]
)
def test_a_conversion_that_is_stopped_leaves_no_output(number: int, code: int, here: Path, run: Run) -> None:
    """The signal comes behind the fifth block of many, on every machine."""
    sparse(here / "model.safetensors", published_tables.wan(2048, 8192, 4))
    words = ["convert-ckpt", "model.safetensors", "--out", "half.safetensors", "--dtype", "fp32"]
    command = [sys.executable, "-c", STOPPED, str(int(number)), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == code and done.stdout == "" and "Traceback" not in done.stderr
    assert not (here / "half.safetensors").exists()
    if number == signal.SIGTERM:
        assert done.stderr.endswith("error: interrupted\n")
        assert [path.name for path in here.iterdir()] == ["model.safetensors"]
    else:
        (left,) = here.glob(".tmp-*")  # or the kill came outside the writing
        again = run("convert-ckpt", "model.safetensors", "--out", "whole.safetensors")
        assert again.exit_code == 0 and f"removed {left.name}, which a run left" in again.stderr
        assert sorted(path.name for path in here.iterdir()) == ["model.safetensors", "whole.safetensors"]
