"""Whole runs of `infer` in this process: what is written, what is printed, and that a run file repeats it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from click.testing import Result

from avatarctl.atomic import _mark

TINY = ("-o", "output.width=16", "-o", "output.height=16", "--steps", "1", "--num-frames", "9")
Run = Callable[..., Result]


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray() for frame in container.decode(video=0)])


def audio_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_run_file_repeats_the_run_to_the_bit(run: Run, voice: Path, face: Path, here: Path) -> None:
    first = run("infer", *TINY, "--image", str(face), "--audio", str(voice), "--seed", "5", "--out", "a.mp4")
    assert first.exit_code == 0, first.stderr
    assert first.stdout == f"{here / 'a.mp4'}\n"
    assert files(here) == ["a.mp4", "a.run.yaml", "a.sheet.png"]
    record = yaml.safe_load((here / "a.run.yaml").read_text(encoding="utf-8"))
    assert record["command"] == "infer"
    assert record["asked"]["runtime"] == {"seed": 5}
    assert record["asked"]["output"]["path"] == str(here / "a.mp4")
    assert record["sampling"]["steps"] == 1 and record["long_video"]["overlap_frames"] == 5

    again = run("infer", "--config", "a.run.yaml")
    assert again.exit_code == 2 and "a.mp4: exists" in again.stderr  # the name was asked for
    again = run("infer", "--config", "a.run.yaml", "--out", "b.mp4")
    assert again.exit_code == 0, again.stderr
    assert frames_of(here / "a.mp4").shape == (13, 24, 16)
    np.testing.assert_array_equal(frames_of(here / "b.mp4"), frames_of(here / "a.mp4"))
    np.testing.assert_array_equal(audio_of(here / "b.mp4"), audio_of(here / "a.mp4"))

    other = run("infer", "--config", "a.run.yaml", "--out", "c.mp4", "--seed", "6")
    assert other.exit_code == 0
    assert (frames_of(here / "c.mp4") != frames_of(here / "a.mp4")).any()


def test_without_a_name_every_run_gets_a_fresh_folder(
    run: Run, voice: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamps = iter(["20260101-000000", "20260101-000001"])
    monkeypatch.setattr("avatarctl.cli.video_output.time.strftime", lambda form: next(stamps))
    first = run("infer", *TINY, "--audio", str(voice))
    assert first.exit_code == 0, first.stderr
    folder = Path("runs/infer-cartoon-i2v/20260101-000000")
    assert first.stdout == f"{here / folder / 'video.mp4'}\n"
    record = yaml.safe_load((here / folder / "video.run.yaml").read_text(encoding="utf-8"))
    assert "path" not in record["output"] and "path" not in record["asked"]["output"]
    second = run("infer", "--config", str(folder / "video.run.yaml"))
    assert second.exit_code == 0, second.stderr
    assert "20260101-000001" in second.stdout
    assert len(files(here)) == 6


def test_what_sits_where_is_said_before_a_run_in_which_something_leaves(run: Run, voice: Path) -> None:
    said = run("infer", *TINY, "--audio", str(voice), "--memory", "group", "--out", "a.mp4").stderr
    table, _, work = said.partition("loading the model")
    assert "memory: group" in table and "2 groups, one and the next" in table and "chunk 2 of 2" in work


def test_json_is_one_document_that_names_the_video(run: Run, voice: Path, here: Path) -> None:
    result = run("infer", *TINY, "--audio", str(voice), "--out", "ä b.mp4", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["command"] == "infer" and document["path"] == str(here / "ä b.mp4")
    assert document["frames"] == 13 and document["seconds_to_first_frame"] > 0
    assert document["seconds_to_first_frame"] == round(document["seconds_to_first_frame"], 3)


def test_run_file_repeats_from_any_folder(
    run: Run, voice: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "voice.wav").write_bytes(voice.read_bytes())
    assert run("infer", *TINY, "--audio", "voice.wav", "--out", "a.mp4").exit_code == 0
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    again = run("infer", "--config", "../a.run.yaml", "--out", "b.mp4")
    assert again.exit_code == 0, again.stderr
    np.testing.assert_array_equal(frames_of(Path("b.mp4")), frames_of(here / "a.mp4"))


def test_what_a_dead_run_left_is_removed_and_a_playable_part_is_not(
    run: Run, voice: Path, here: Path
) -> None:
    mark = _mark(here)
    if not mark:
        pytest.skip("no locks, or no number of this boot")
    left = here / f".tmp-{mark}-0123456789abcdef"
    left.mkdir()
    (here / "b.partial.mp4").write_bytes(b"playable")
    dry = run("infer", *TINY, "--audio", str(voice), "--out", "a.mp4", "--dry-run")
    assert left.exists() and ".tmp-" not in dry.stderr
    done = run("infer", *TINY, "--audio", str(voice), "--out", "a.mp4")
    assert done.exit_code == 0 and done.stderr.count(f"removed {left.name}, which a run left") == 1
    assert files(here) == ["a.mp4", "a.run.yaml", "a.sheet.png", "b.partial.mp4"] and not left.exists()


def test_a_run_file_that_is_there_is_not_replaced(run: Run, voice: Path, here: Path) -> None:
    (here / "a.run.yaml").write_text("runtime: {seed: 7}\n", encoding="utf-8")
    words = ("infer", *TINY, "--config", "a.run.yaml", "--audio", str(voice), "--out", "a.mp4")
    result = run(*words)
    assert result.exit_code == 2 and "a.run.yaml: exists" in result.stderr
    assert files(here) == ["a.run.yaml"]
    assert run(*words, "--overwrite").exit_code == 0
    record = yaml.safe_load((here / "a.run.yaml").read_text(encoding="utf-8"))
    assert record["runtime"]["seed"] == 7 and record["asked"]["runtime"] == {"seed": 7}


def test_overwrite_replaces_and_without_it_nothing_changes(run: Run, voice: Path, here: Path) -> None:
    (here / "a.mp4").write_bytes(b"mine")
    words = ("infer", *TINY, "--audio", str(voice), "--out", "a.mp4")
    assert run(*words).exit_code == 2
    assert (here / "a.mp4").read_bytes() == b"mine" and files(here) == ["a.mp4"]
    assert run(*words, "--overwrite").exit_code == 0
    assert len(frames_of(here / "a.mp4")) == 13


def test_a_failed_run_leaves_no_empty_folder(
    run: Run, voice: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from avatarctl.errors import Interrupted
    from avatarctl.pipelines import infer

    def stopped(*args: object, **kwargs: object) -> None:
        raise Interrupted("stopped while loading")

    monkeypatch.setattr(infer, "load", stopped)
    (here / "mine").mkdir()
    result = run("infer", *TINY, "--audio", str(voice), "--out", "mine/new/deep/a.mp4")
    assert result.exit_code == 6
    assert [path.name for path in here.rglob("*")] == ["mine"]
    assert run("infer", *TINY, "--audio", str(voice)).exit_code == 6
    assert [path.name for path in here.rglob("*")] == ["mine"]


def test_a_missing_kernel_or_device_is_named(run: Run, voice: Path, here: Path) -> None:
    import torch

    words = ("infer", *TINY, "--audio", str(voice), "--out", "a.mp4")
    absent = run(*words, "--device", f"cuda:{torch.cuda.device_count()}")
    assert absent.exit_code == 4 and "runtime.device" in absent.stderr and "--device cpu" in absent.stderr
    planned = run(*words, "--device", f"cuda:{torch.cuda.device_count()}", "--dry-run")
    assert planned.exit_code == 0 and "warning: a run would end with exit 4: runtime.device" in planned.stderr
    assert not list(here.iterdir())
