"""A preparation that is killed goes on with the same command, to the same bytes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.forks import PATIENCE, Forks
from tests.data.conftest import SMALL, contents, run, talking

if sys.platform == "win32":
    pytest.skip("forks", allow_module_level=True)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as server:
        yield server


@pytest.fixture(scope="module")
def long_talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    talking(folder / "one.mp4", 11, 100)
    talking(folder / "two.mp4", 12, 60)
    return folder


@pytest.fixture(scope="module")
def whole(long_talks: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a run makes that nobody disturbs."""
    out = tmp_path_factory.mktemp("whole") / "out"
    made = run("precompute-latents", "--from-videos", long_talks, "--data", out, *SMALL)
    assert made.exit_code == 0, made.output
    return contents(out)


@pytest.mark.parametrize("appears", ["one.mp4/*/sample.json", "one.mp4/*/latents.safetensors"])
def test_killed_in_the_middle_and_typed_again(
    appears: str, forks: Forks, long_talks: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["precompute-latents", "--from-videos", str(long_talks), "--data", str(out), *SMALL]
    started = forks.start(*words, folder=tmp_path)
    until = time.monotonic() + PATIENCE
    while len(list(out.glob(appears))) < 3 and time.monotonic() < until:
        time.sleep(0.002)
    started.kill()
    _, said = started.communicate()
    assert started.returncode == -9, said
    assert not (out / "_dataset/index.jsonl").exists() and len(contents(out)) < len(whole)

    again = run(*words)
    assert again.exit_code == 0, again.output
    assert contents(out) == whole
    assert not list(out.rglob(".tmp-*"))


def test_two_shards_at_once(forks: Forks, long_talks: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """They share prompts, constants and the index."""
    out = tmp_path / "out"
    words = ["precompute-latents", "--from-videos", str(long_talks), "--data", str(out), *SMALL]
    both = [forks.start(*words, "--shard", shard, folder=tmp_path) for shard in ("0/2", "1/2")]
    for started in both:
        _, said = started.communicate()
        assert started.returncode == 0, said
    assert contents(out) == whole
    assert not list(out.rglob(".tmp-*"))
