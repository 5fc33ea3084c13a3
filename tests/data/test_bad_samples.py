"""What cannot be used: named, left out, and never a reason to lose the rest."""

from __future__ import annotations

import json
import os
import pkgutil
from fractions import Fraction
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from avatarctl.data.artifacts import read_artifact
from avatarctl.data.media import read_sample
from avatarctl.data.samples import Sample
from avatarctl.data.workers import run_jobs
from avatarctl.errors import UnusableFile, UnusableVideo, WriteFailed
from avatarctl.models.vae import WanVae
from tests.data.conftest import SMALL, contents, run, talking
from tests.media.videos import numbered, steady, write_video

WORDS = (*SMALL, "--artifact-dtype", "float32")
ONE = "b/talk.mp4/000000"


def spoil(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset, 2 if offset < 0 else 0)
        file.write(data)


DAMAGE = (
    (lambda path: path.write_bytes(path.read_bytes()[:-7]), "latents.safetensors"),
    (lambda path: spoil(path, -4, b"\x00\x00\xc0\x7f"), "not finite"),
    (lambda path: path.write_bytes(b""), "is empty"),
    (lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n."), "latents.safetensors"),
)
NO_LATENTS: tuple[tuple[Any, str], ...] = (
    (torch.zeros(16, 3, 4, 4), "bare tensor"),
    ({"input_latents": torch.zeros(3, 4, 4)}, "rank 4 is expected"),
    ({"input_latents": torch.full((16, 3, 4, 4), torch.nan)}, "not finite"),
    ({"input_latents": torch.zeros(16, 3, 4, 4), "path": Path("x")}, "latents_mask_all.pt"),
)
FOUR = ("a/talk.mp4/000000", "a/talk.mp4/000009", "a/talk.mp4/000018", "b/talk.mp4/000000")


def one_warning(said: str, name: str) -> str:
    """The line that says what is wrong with the sample or video of this name."""
    lines = [line for line in said.splitlines() if line.startswith("warning: ")]
    (found,) = [line for line in lines if f"/{name}" in line or line.startswith(f"warning: {name}: ")]
    return found


def fails_each(out: Path, says: list[str]) -> str:
    """One command over four spoiled samples and two good ones: a line for each of the four."""
    made = run("precompute-latents", "--data", out, *WORDS)
    assert made.exit_code == 7, made.output
    for name, words in zip(FOUR, says, strict=True):
        line = one_warning(made.stderr, name)
        assert words in line and line.count(name) == 1
    assert "4 of 6 samples failed" in made.stderr
    return made.stderr


def test_a_damaged_artifact_fails_its_sample_until_forced(out: Path) -> None:
    before = contents(out)
    for name, (damage, _) in zip(FOUR, DAMAGE, strict=True):
        damage(out / name / "latents.safetensors")
    said = fails_each(out, [says for _, says in DAMAGE])
    assert said.count("--force makes it again") >= 4
    assert run("precompute-latents", "--data", out, *WORDS, "--force").exit_code == 0
    assert contents(out) == before


def test_a_pt_file_that_is_none_fails_its_sample(out: Path) -> None:
    for folder, (held, _) in zip(FOUR, NO_LATENTS, strict=True):
        for name in ("latents", "masked_latents"):
            (out / folder / f"{name}.safetensors").unlink()
        torch.save(held, out / folder / "vae_latents_mask_all.pt")
    fails_each(out, [says for _, says in NO_LATENTS])
    assert run("precompute-latents", "--data", out, *WORDS, "--force").exit_code == 0
    again = run("precompute-latents", "--data", out, *WORDS, "--json")
    assert again.exit_code == 0 and json.loads(again.stdout)["skipped"] == 6


def test_a_pt_file_of_another_clip_is_made_again_and_a_fitting_one_is_taken(out: Path) -> None:
    for name in ("latents", "masked_latents"):
        (out / ONE / f"{name}.safetensors").unlink()
    path = out / ONE / "vae_latents_mask_all.pt"
    fitting = {"input_latents": torch.zeros(16, 3, 4, 4), "masked_latents": torch.zeros(16, 3, 4, 4)}
    torch.save(fitting, path)
    assert run("precompute-latents", "--data", out, *WORDS).exit_code == 0
    assert not (out / ONE / "latents.safetensors").exists()
    torch.save({"input_latents": torch.zeros(16, 5, 4, 4)}, path)
    made = run("precompute-latents", "--data", out, *WORDS)
    assert made.exit_code == 0 and "is stale: input_latents has shape [16, 5, 4, 4]" in made.stderr
    assert (out / ONE / "latents.safetensors").exists()


def test_numbers_that_are_not_finite_are_never_written(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(few)
    encode = WanVae.encode
    monkeypatch.setattr(WanVae, "encode", lambda self, video: encode(self, video) * torch.nan)
    made = run("precompute-latents", "--data", few, *WORDS, "--force")
    assert made.exit_code == 3 and "not finite" in made.stderr
    assert contents(few) == {
        **before,
        **{k: v for k, v in contents(few).items() if k.endswith("index.jsonl")},
    }


def test_a_full_disk_ends_a_run_and_tears_nothing(
    talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Path
) -> None:
    """While a source is cut, and again while artifacts are written: at the third of them."""
    out = tmp_path / "out"
    words = ("--from-videos", talks, "--data", out, *WORDS)
    for place in ("avatarctl.data.windows.write_clip", "avatarctl.data.storing.Store.write"):
        module, _, name = place.rpartition(".")
        write, calls = pkgutil.resolve_name(place), count(1)

        def full(*arguments: Any, write: Any = write, calls: Any = calls, **more: Any) -> Any:
            if next(calls) == 3:
                raise WriteFailed("no space left on the device", where=out)
            return write(*arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(pkgutil.resolve_name(module), name, full)
            made = run("precompute-latents", *words)
        assert made.exit_code == 3 and "no space left" in made.stderr
        assert not list(out.rglob(".tmp-*"))
    assert run("precompute-latents", *words).exit_code == 0
    assert run("precompute-audio", "--data", out, *WORDS).exit_code == 0
    assert contents(out) == contents(prepared)


def test_bad_videos_are_named_and_the_others_are_cut(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    talking(folder / "good.mp4", 7, 12)
    talking(folder / "mute.mp4", 7, 12, audio=False)
    talking(folder / "one.mp4", 7, 1)
    (folder / "torn.mp4").write_bytes((folder / "good.mp4").read_bytes()[:900])
    (folder / "empty.mp4").write_bytes(b"")
    for number, side in enumerate((64, 96)):  # two recordings of a broadcast, one behind the other
        times = [number + time for time in steady(25, 25)]
        draw = partial(numbered, width=side, height=side)
        hum = [(np.zeros(48_000, np.float32), Fraction(number))]
        write_video(tmp_path / "p.ts", times, options={"bf": "0"}, draw=draw, audio=hum)
        with (folder / "grows.ts").open("ab") as both:
            both.write((tmp_path / "p.ts").read_bytes())
    (folder / "list.mkv").write_text("#EXTM3U\nfile:///etc/passwd\n")
    with av.open(str(folder / "voice.mov"), "w") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    made = run("precompute-latents", "--from-videos", folder, "--data", tmp_path / "out", *SMALL)
    assert made.exit_code == 7, made.output
    report = (tmp_path / "out/_dataset/precompute-latents.report.jsonl").read_text().splitlines()
    states = {entry["name"]: entry["state"] for entry in map(json.loads, report)}
    bad = dict.fromkeys(
        ("mute.mp4", "one.mp4", "torn.mp4", "empty.mp4", "list.mkv", "voice.mov", "grows.ts"), "failed"
    )
    assert states == {**bad, "good.mp4": "done", "good.mp4/000000": "done"}
    for name in bad:
        assert one_warning(made.stderr, name).count(name) == 1
    assert "shorter than a window of 9 frames" in made.stderr
    assert "changes its resolution from 64x64 to 96x96" in made.stderr
    (tmp_path / "l.txt").write_text("a prompt@@in/one.mp4\n")
    made = run("precompute-latents", "--data", tmp_path / "l.txt", *SMALL)
    assert made.exit_code == 3 and "too short: 1 of 5 frames" in made.stderr


def test_a_sample_that_fails_keeps_no_prompt_from_the_others(
    talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Path
) -> None:
    """Damage comes to light behind the first sample of a prompt that three have."""

    def damaged(sample: Sample, *rest: Any) -> Any:
        if sample.name == ONE:
            raise UnusableVideo("damaged at about 0.10 s", where=sample.video)
        return read_sample(sample, *rest)

    monkeypatch.setattr("avatarctl.data.prepare.read_sample", damaged)
    made = run("precompute-latents", "--from-videos", talks, "--data", tmp_path / "out", *WORDS)
    assert made.exit_code == 7 and made.stderr.count("damaged at about") == 2, (
        made.output
    )  # and in the summary
    text = {name: made for name, made in contents(prepared).items() if name.endswith(".text.safetensors")}
    assert len(text) == 2
    assert {name: made for name, made in contents(tmp_path / "out").items() if name in text} == text


def test_two_lines_with_one_target(talks: Path, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text(f"video\n{talks}/last.mp4\n{talks}/last.mp4\n")
    made = run("precompute-latents", "--data", tmp_path / "l.csv", *SMALL)
    assert made.exit_code == 7 and "is the same sample as" in made.stderr
    made = run("precompute-latents", "--from-videos", tmp_path / "l.csv", "--data", tmp_path / "o", *SMALL)
    assert made.exit_code == 7 and "is listed twice" in made.stderr


def test_links_that_lead_back_are_passed_over(out: Path) -> None:
    (out / "back").symlink_to(out)
    (out / "round").symlink_to(out / "round")
    (out / "again").symlink_to(out / "b")
    made = run("precompute-latents", "--data", out, *WORDS, "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["skipped"] == 6
    assert made.stderr.count("passed over") == 3


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((), 2, "which data set?"),
        (("--data", "nothing"), 2, "no such file"),
        (("--data", "empty"), 3, "holds no samples"),
        (("--data", "bad.csv"), 3, "has no column `video`"),
        (("--data", "bad.jsonl"), 3, "bad.jsonl:1: the line is not valid JSON"),
        (("--data", "o", "--from-videos", "empty"), 3, "holds no videos"),
        (("--data", "o", "--from-videos", "nothing"), 2, "no such file"),
        (("--data", "empty", "--from-videos", "empty"), 2, "cannot lie among their videos"),
        (("--data", "o", "--from-videos", "v.mp4"), 2, "is one video (name its folder"),
        (("--data", "o", "--shard", "2/2"), 2, "i/n"),
        (("--data", "o", "--frames", "8"), 2, "4k + 1"),
        (("--data", "o", "--model", "stableavatar-tiny"), 2, "nothing is prepared"),
    ],
)
def test_requests_without_sense_are_one_line(
    words: tuple[str, ...], code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.csv").write_text("film,prompt\nx,y\n")
    (tmp_path / "bad.jsonl").write_text("{video\n")
    (tmp_path / "v.mp4").touch()
    made = run("precompute-latents", *words)
    assert made.exit_code == code and says in made.stderr.splitlines()[-1], made.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.csv", "bad.jsonl", "empty", "v.mp4"]


def test_a_reading_process_that_dies_costs_its_own_sample() -> None:
    outcomes = list(run_jobs([(abs, (0,)), (os._exit, (9,)), (abs, (-2,)), (abs, (3,))], 2))
    assert [outcome.value for outcome in outcomes] == [0, None, 2, 3]
    assert isinstance(outcomes[1].problem, UnusableFile) and "code 9" in str(outcomes[1].problem)


def test_what_is_odd_about_a_sample_is_said_once(out: Path) -> None:
    audio = out / ONE / "audio.wav"
    audio.write_bytes(audio.read_bytes()[:-200])
    for said in (1, 0):  # then it is finished
        made = run("precompute-audio", "--data", out, *WORDS)
        assert made.exit_code == 0, made.output
        assert made.stderr.count(f"warning: {ONE}: is cut short") == said, made.stderr


def test_features_of_another_width_are_made_again(out: Path) -> None:
    own = out / ONE / "audio_features.safetensors"
    width = read_artifact(own, "audio_features").shape[1]
    own.unlink()
    for wide in (width, width + 1):
        torch.save({"audio_emb": torch.zeros(9, wide)}, out / ONE / "audio_emb_omniavatar.pt")
        made = run("precompute-audio", "--data", out, *WORDS)
        assert made.exit_code == 0, made.output
        assert own.exists() == ("is stale" in made.stderr) == (wide != width)
