"""A folder of talking videos becomes training samples by two commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner
from torch import Tensor

from avatarctl.cli import app
from avatarctl.conditioning.masking import keep_map, mask_tensor, mouth_mask
from avatarctl.config import Model
from avatarctl.data import media as data_media
from avatarctl.data import windows
from avatarctl.data.artifacts import read_artifact
from avatarctl.loading.built_in import built_in_part
from avatarctl.loading.sources import find_sources
from avatarctl.media import open_audio, open_video, write_audio
from avatarctl.models.encode import frames_tensor
from avatarctl.models.vae import WanVae
from avatarctl.pipelines import infer
from avatarctl.registry import ROWS
from tests.data.conftest import SMALL, contents, joined, run, talking

V2V = ROWS["cartoon-v2v"]


def index(out: Path) -> list[dict[str, Any]]:
    lines = (out / "_dataset/index.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_samples_are_windows_named_for_their_videos(prepared: Path) -> None:
    names = [entry["sample"] for entry in index(prepared)]
    starts = {"a/talk.mp4": (0, 9, 18), "b/talk.mp4": (0, 9), "last.mp4": (0,)}
    assert names == [f"{name}/{start:06d}" for name, own in starts.items() for start in own]
    for entry in index(prepared):
        assert entry["frames"] == 9
        assert set(entry["artifacts"]) == {"latents", "masked_latents", "text", "audio_features"}
    assert (prepared / "a/talk.mp4/000009/prompt.txt").read_text() == "a woman is talking\n"
    assert (prepared / "last.mp4/000000/prompt.txt").read_text() == "a person is talking\n"


def test_audio_is_cut_at_640_samples_a_frame(prepared: Path, talks: Path) -> None:
    whole = np.concatenate(list(open_audio(talks / "a/talk.mp4").blocks()))[:, 0]
    for start in (0, 9, 18):
        cut, rate = soundfile.read(prepared / f"a/talk.mp4/{start:06d}/audio.wav", dtype="float32")
        assert rate == 16_000 and len(cut) == 9 * 640
        np.testing.assert_allclose(cut, whole[640 * start : 640 * (start + 9)], atol=1e-4)


def test_clips_show_the_frames_of_their_time(tmp_path: Path) -> None:
    """Frame k of the source has the grey level 6k."""
    levels = np.arange(40, dtype=np.uint8) * 6
    (tmp_path / "in").mkdir()
    joined(tmp_path / "in/grey.mp4", np.tile(levels[:, None, None, None], (1, 48, 64, 3)))
    words = ("--from-videos", tmp_path / "in", "--data", tmp_path / "out", *SMALL, "--stride", "14")
    assert run("precompute-latents", *words).exit_code == 0
    for start in (0, 14, 28):
        with open_video(tmp_path / f"out/grey.mp4/{start:06d}/sub_clip.mp4") as cut:
            assert (cut.frames, cut.height, cut.width) == (9, 32, 32)
            shown = cut.read(0, 9).mean(axis=(1, 2, 3))
            np.testing.assert_allclose(shown, levels[start : start + 9], atol=2)


def test_artifacts_are_made_from_the_written_clip(prepared: Path) -> None:
    """By the VAE itself, without any of our preparing."""
    vae = built_in_part(V2V, find_sources(V2V, Model()), None, "vae", torch.float32, torch.device("cpu"))
    assert isinstance(vae, WanVae)
    folder = prepared / "b/talk.mp4/000009"
    with open_video(folder / "sub_clip.mp4") as reader:
        pixels = frames_tensor(reader.read(0, 9))
    keep = keep_map(mask_tensor(mouth_mask()), (32, 32))
    for name, video in (("latents", pixels), ("masked_latents", pixels * keep)):
        made = read_artifact(folder / f"{name}.safetensors", name)
        torch.testing.assert_close(made, vae.encode(video)[0], rtol=0, atol=1e-5)


def test_features_have_a_row_for_each_frame_and_text_no_padding(prepared: Path) -> None:
    features = read_artifact(prepared / "last.mp4/000000/audio_features.safetensors", "audio_features")
    silence = read_artifact(prepared / "_dataset/constants/silence.safetensors", "silence")
    assert features.shape == silence.shape and len(features) == 9
    (text,) = (
        read_artifact(path, "text")
        for path in (prepared / "_dataset/prompts").iterdir()
        if len(read_artifact(path, "text")) == len("a woman is talking") + 1
    )
    assert text.abs().sum(1).min() > 0
    assert (
        read_artifact(prepared / "_dataset/constants/empty_prompt.safetensors", "empty_prompt").shape[0] == 1
    )


def test_infer_shows_the_network_what_training_reads(
    talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prepared clip through `infer --video`: every condition channel bit for bit, with 65 channels, which
    those of 49 are the first of."""
    row = "cartoon-v2v"
    network = {**V2V.network, "dit": {**V2V.network["dit"], "in_channels": 65}}
    files = tuple(name for name in V2V.files if "/dit_" not in name)  # that one has 49 channels
    values = {**V2V.defaults, "model.channels": 65}
    changed = replace(V2V, network=network, files=files, trained=False, defaults=values)
    monkeypatch.setitem(ROWS, row, changed)  # type: ignore[index]
    out = tmp_path / "samples"
    made = run(
        "precompute-latents", "--from-videos", talks, "--data", out, *SMALL, "--window", 21,
        "--artifact-dtype", "float32", "--max-windows", 1,
    )  # fmt: skip
    assert made.exit_code == 7 and "shorter than a window" in made.output  # the other two videos
    folder = out / "a/talk.mp4/000000"
    seen: list[Tensor] = []
    real = infer._LOOPS["chunks"]

    def watch(denoise: Any, modules: Any, inputs: Any, video: Any, cfg: Any) -> Iterator[Any]:
        family = denoise.family
        build = family.build_condition
        monkeypatch.setattr(
            type(family), "build_condition",
            lambda self, encoded: seen.append((made := build(encoded)).channels) or made,
        )  # fmt: skip
        yield from real(denoise, modules, inputs, video, cfg)

    monkeypatch.setitem(infer._LOOPS, "chunks", watch)
    dubbed = CliRunner().invoke(
        app,
        [
            *("infer", "--model", row, "--video", str(folder / "sub_clip.mp4")),
            *("--audio", str(folder / "audio.wav"), "--out", str(tmp_path / "x.mp4"), "--steps", "1"),
            *("--size", "32x32", "-o", "long_video.num_frames=9"),
        ],
    )
    assert dubbed.exit_code == 0, dubbed.output
    channels_seen = seen[0][0]
    latents, masked = (read_artifact(folder / f"{n}.safetensors", n) for n in ("latents", "masked_latents"))
    assert torch.equal(channels_seen[:16], latents[:, :1].expand(-1, 3, -1, -1))
    assert torch.equal(
        channels_seen[16], 1 - keep_map(mask_tensor(mouth_mask()), (4, 4))[0].expand(3, -1, -1)
    )
    assert torch.equal(channels_seen[17:33], masked)
    sequence = read_artifact(folder / "reference_sequence.safetensors", "reference_sequence")
    assert torch.equal(channels_seen[33:], sequence)
    assert not torch.equal(sequence, latents)


def test_a_run_that_has_nothing_to_do_makes_nothing(
    prepared: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "samples"
    shutil.copytree(prepared, out)
    before = contents(out)
    encoded: list[object] = []
    monkeypatch.setattr(WanVae, "encode", lambda *arguments: encoded.append(arguments))
    for _ in range(2):  # the second knows all files by their times
        again = run(
            "precompute-latents", "--from-videos", talks, "--data", out, *SMALL, "--artifact-dtype", "float32"
        )
        assert again.exit_code == 0, again.output
    assert not encoded and contents(out) == before
    report = (out / "_dataset/precompute-latents.report.jsonl").read_text().splitlines()
    assert {json.loads(line)["state"] for line in report} == {"skipped"}


def test_work_is_done_once(talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source is decoded once for its folders, a clip once for all its artifacts; each is encoded once. The
    screen and the last line say how much."""
    opened: list[str] = []
    encoded: list[int] = []
    read: list[str] = []
    encode = WanVae.encode

    def watch_read(sample: Any, *rest: Any) -> Any:
        read.append(sample.name)
        return data_media.read_sample(sample, *rest)

    def watch_open(path: Path) -> Any:
        opened.append(path.name)
        return open_video(path)

    def watch_encode(self: WanVae, video: Tensor) -> Tensor:
        encoded.append(video.shape[2])
        return encode(self, video)

    monkeypatch.setattr("avatarctl.data.prepare.read_sample", watch_read)
    monkeypatch.setattr(windows, "open_video", watch_open)
    monkeypatch.setattr(WanVae, "encode", watch_encode)
    made = run("precompute-latents", "--from-videos", talks, "--data", tmp_path / "out", *SMALL, "--json")
    assert made.exit_code == 0, made.output
    told = json.loads(made.stdout)
    assert (told["done"], told["skipped"], told["failed"], told["sources"]) == (6, 0, 0, 3)
    assert "video 1 of 3, " in made.stderr and "sample 5 of 6, " in made.stderr
    assert (tmp_path / "out/_dataset/precompute-latents.run.yaml").is_file()
    assert sorted(opened) == ["last.mp4", "talk.mp4", "talk.mp4"]
    assert len(read) == len(set(read)) == 6
    assert encoded == [9, 9] * 6  # latents and masked latents


def test_no_network_is_loaded_that_is_not_needed(
    talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def watch(row: Any, sources: Any, held: Any, part: str, *rest: Any, **more: Any) -> Any:
        built.append(part)
        return built_in_part(row, sources, held, part, *rest, **more)

    monkeypatch.setattr("avatarctl.loading.modules.built_in_part", watch)
    words = ("--from-videos", talks, "--data", tmp_path / "o", *SMALL, "--max-windows", 1)
    assert run("precompute-latents", *words).exit_code == 0
    assert sorted(built) == ["text", "vae"]
    built.clear()
    assert run("precompute-audio", "--data", tmp_path / "o", *SMALL).exit_code == 0
    assert built == ["audio"]


def test_windows_never_cross_a_cut_and_a_flash_is_none(tmp_path: Path) -> None:
    """Two scenes of 16 frames; in the second one frame is white."""
    from avatarctl.demo.clips import clip

    first, second = clip(5, 16).frames, 255 - clip(6, 16).frames
    second[7] = 255
    (tmp_path / "in").mkdir()
    joined(tmp_path / "in/two.mp4", first, second)
    words = ("--from-videos", tmp_path / "in", "--data", tmp_path / "out", *SMALL, "--stride", "5")
    assert run("precompute-latents", *words).exit_code == 0
    record = json.loads((tmp_path / "out/_dataset/sources/two.mp4.json").read_text())
    assert record["cuts"] == [16] and record["windows"] == [0, 5, 16, 21]


def test_reading_processes_change_no_byte(prepared: Path, talks: Path, out: Path) -> None:
    """Two, where a video is to be cut and three samples are to be read; and one."""
    shutil.rmtree(out / "last.mp4")
    (out / "_dataset/sources/last.mp4.json").unlink()
    for name in ("latents", "masked_latents", "audio_features"):
        for path in (out / "b").glob(f"talk.mp4/*/{name}.safetensors"):
            path.unlink()
    common = ("--data", out, *SMALL, "--artifact-dtype", "float32", "--workers")
    assert run("precompute-latents", "--from-videos", talks, *common, "2").exit_code == 0
    assert run("precompute-audio", *common, "1").exit_code == 0
    assert contents(out) == contents(prepared)


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return {name for name in names if not name.endswith("index.jsonl")}


def test_a_changed_input_rebuilds_what_depends_on_it(few: Path, prepared: Path) -> None:
    out = few
    common = ("--data", out, *SMALL, "--artifact-dtype", "float32")

    def both(*words: str) -> set[str]:
        before = contents(out)
        for command in ("precompute-latents", "precompute-audio"):
            made = run(command, *common, *words)
            assert made.exit_code == 0, made.output
        return changed(before, contents(out))

    assert both() == set()
    masked = {f"{entry['sample']}/masked_latents.safetensors" for entry in index(out)}
    assert both("--mask-rule", "first_keep") == masked
    assert both() == masked
    assert both("--negative-prompt", "blurred") == {"_dataset/constants/negative_prompt.safetensors"}
    assert both() == {"_dataset/constants/negative_prompt.safetensors"}

    one = out / "b/talk.mp4/000000"
    write_audio(one / "audio.wav", np.linspace(-0.5, 0.5, 9 * 640, dtype=np.float32), 16_000)
    names = {f"b/talk.mp4/000000/{name}" for name in ("audio_features.safetensors",)}
    assert both() == names
    shutil.copy(prepared / "a/talk.mp4/000000/sub_clip.mp4", one / "sub_clip.mp4")
    assert both() == {f"b/talk.mp4/000000/{name}.safetensors" for name in ("latents", "masked_latents")}
    (one / "prompt.txt").write_text("nobody is talking")
    (new,) = both()
    assert new.startswith("_dataset/prompts/")


def test_another_window_takes_the_old_samples_away(talks: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    words = ("--from-videos", talks / "a", "--data", out, "--size", "16x16", "--frames", "5")
    assert run("precompute-latents", *words, "--stride", "10").exit_code == 0
    clip = out / "talk.mp4/000010/sub_clip.mp4"
    age = clip.stat().st_mtime_ns
    assert run("precompute-latents", *words, "--stride", "5").exit_code == 0
    assert clip.stat().st_mtime_ns == age  # equal samples stay
    assert run("precompute-latents", *words, "--window", "9").exit_code == 0
    assert sorted(path.name for path in (out / "talk.mp4").iterdir()) == ["000000", "000009", "000018"]
    assert names(out) == {"talk.mp4/000000", "talk.mp4/000009", "talk.mp4/000018"}


def names(out: Path) -> set[str]:
    return {entry["sample"] for entry in index(out)}


def test_a_sample_that_is_removed_leaves_the_index(prepared: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(prepared, tmp_path / "out"))
    before = names(out)
    shutil.rmtree(out / "last.mp4")
    words = ("--data", out, *SMALL, "--artifact-dtype", "float32")
    assert run("precompute-audio", *words, "--shard", "0/2").exit_code == 0
    assert names(out) == before  # a shard does not know what the other one has
    assert run("precompute-audio", *words).exit_code == 0
    assert names(out) == before - {"last.mp4/000000"}


def test_samples_below_their_videos_are_no_videos(talks: Path, tmp_path: Path) -> None:
    """The same command again, and what other systems hide beside a video."""
    (tmp_path / "in").mkdir()
    shutil.copy(talks / "last.mp4", tmp_path / "in")
    (tmp_path / "in/._last.mp4").write_bytes(b"\x00\x05\x16\x07")
    words = ("--from-videos", tmp_path / "in", "--data", tmp_path / "in/samples", *SMALL, "--json")
    for done, skipped in ((1, 0), (0, 1)):
        made = run("precompute-latents", *words)
        assert made.exit_code == 0, made.output
        told = json.loads(made.stdout)
        assert (told["done"], told["skipped"], told["sources"]) == (done, skipped, 1)


def test_references_are_frames_outside_the_sample(talks: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    words = ("--data", out, *SMALL, "--references", "3", "--artifact-dtype", "float32")
    made = run("precompute-latents", "--from-videos", talks / "a", *words)
    assert made.exit_code == 0, made.output
    record = json.loads((out / "_dataset/sources/talk.mp4.json").read_text())
    kept = read_artifact(out / "talk.mp4/000000/references.safetensors", "references")
    assert kept.shape == (16, 3, 4, 4)
    assert set(record["others"]) <= set(range(30)) and max(record["others"]) > 9
    alone = {tuple(kept[:, n].flatten().tolist()) for n in range(3)}
    inside = read_artifact(out / "talk.mp4/000000/latents.safetensors", "latents")[:, 0]
    assert tuple(inside.flatten().tolist()) not in alone


def test_the_plan_counts_and_touches_nothing(talks: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    words = ("--data", out, *SMALL, "--dry-run", "--json")
    planned = run("precompute-latents", "--from-videos", talks, *words)
    assert planned.exit_code == 0 and not out.exists(), planned.output
    told = json.loads(planned.stdout)
    assert (told["videos"], told["samples"], told["to_do"], told["seconds"]) == (3, 6, 6, None)
    shown = run("precompute-latents", "--from-videos", talks, *words[:-1])
    assert "seconds: not known yet\n" in shown.stdout and "None" not in shown.stdout
    assert told["bytes_at_least"] == 6 * 2 * (16 * 3 * 4 * 4) * 2
    before = contents(prepared)
    done = run(
        "precompute-latents", "--data", prepared, *SMALL, "--artifact-dtype", "float32", "--dry-run", "--json"
    )
    told = json.loads(done.stdout)
    assert (told["samples"], told["to_do"], told["up_to_date"]) == (6, 0, 6)
    assert contents(prepared) == before


def test_the_plan_of_a_run_that_was_stopped_counts_what_is_left(
    talks: Path, prepared: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(prepared, tmp_path / "out"))
    (out / "a/talk.mp4/000009/latents.safetensors").unlink()
    (out / "_dataset/sources/b/talk.mp4.json").unlink()
    left = out / "last.mp4/000000/.tmp-0123456789abcdef"
    left.write_bytes(b"")
    words = ("--from-videos", talks, "--data", out, *SMALL, "--artifact-dtype", "float32")
    told = json.loads(run("precompute-latents", *words, "--dry-run", "--json").stdout)
    assert (told["videos"], told["samples"], told["to_do"], told["up_to_date"]) == (3, 6, 3, 3)
    assert told["artifacts"] == {"latents": 3, "masked_latents": 2}
    assert left.exists()


def test_pt_files_are_those_of_published_trainers(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    shutil.copytree(prepared, out)
    words = ("--data", out, *SMALL, "--artifact-dtype", "float32", "--format", "pt")
    for command in ("precompute-latents", "precompute-audio"):
        assert run(command, *words).exit_code == 0
    folder = out / "last.mp4/000000"
    latents = torch.load(folder / "vae_latents_mask_all.pt", weights_only=True)
    audio = torch.load(folder / "audio_emb_omniavatar.pt", weights_only=True)
    for entry, name in (("input_latents", "latents"), ("masked_latents", "masked_latents")):
        assert torch.equal(latents[entry], read_artifact(folder / f"{name}.safetensors", name))
    assert audio["audio_emb"].shape[0] == 9
    text = folder / "text_emb.pt"
    assert text.is_symlink() and text.resolve() == (out / "b/talk.mp4/000000/text_emb.pt").resolve()
    padded, ours = torch.load(text, weights_only=True), text.resolve().name.replace("text_emb.pt", "text")
    alone = read_artifact(out / f"_dataset/prompts/{ours}.safetensors", "text")
    assert padded.shape == (1, 512, 32) and torch.equal(padded[0, : len(alone)], alone)
    assert len(alone) == len("a person is talking") + 1 and not padded[0, len(alone) :].any()
    (out / "b/talk.mp4/000000/text_emb.pt").unlink()
    torch.save(torch.zeros(1, 512, 32), out / "b/talk.mp4/000000/text_emb.pt")  # of somebody else
    assert run("precompute-latents", *words).exit_code == 0
    assert (out / "b/talk.mp4/000000/text_emb.pt").resolve() == text.resolve()
    before = contents(out)
    assert run("precompute-latents", *words).exit_code == 0
    assert contents(out) == before


def test_a_sample_of_a_list_keeps_its_artifacts_beside_the_list(talks: Path, tmp_path: Path) -> None:
    """Each way of writing a list; with paths relative to it."""
    talking(tmp_path / "clips/x.mp4", 8, 9)
    talking(tmp_path / "clips/y.mp4", 9, 9, audio=False)
    soundfile.write(tmp_path / "clips/y.wav", np.random.default_rng(0).standard_normal(9 * 640) / 9, 16_000)
    (tmp_path / "l.txt").write_text("a prompt@@clips/x.mp4\n\na prompt@@clips/y.mp4@@clips/y.wav\n")
    (tmp_path / "c.csv").write_text(
        "video,prompt,audio,other\nclips/x.mp4,a prompt,,1\nclips/y.mp4,a prompt,clips/y.wav,2\n"
    )
    rows = [
        {"video": "clips/x.mp4", "prompt": "a prompt"},
        {"video": "clips/y.mp4", "audio": "clips/y.wav", "prompt": "a prompt"},
    ]
    (tmp_path / "j.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hashes = []
    for name in ("l.txt", "c.csv", "j.jsonl"):
        for command in ("precompute-latents", "precompute-audio"):
            made = run(command, "--data", tmp_path / name, "--size", "16x16", "--frames", "5")
            assert made.exit_code == 0, made.output
        own = tmp_path / f"{Path(name).stem}_dataset"
        assert (own / "samples/clips/x.mp4/latents.safetensors").is_file()
        hashes.append(contents(own))
    assert hashes[0] == hashes[1] == hashes[2] and len(hashes[0]) == 11
    assert sorted(path.name for path in (tmp_path / "clips").iterdir()) == ["x.mp4", "y.mp4", "y.wav"]


def test_the_model_of_drawn_faces_says_that_people_are_outside(talks: Path, tmp_path: Path) -> None:
    """Once, of a folder with a video of another size than drawn clips have, and of their latents alone."""

    def doubts(folder: Path, *words: str, command: str = "precompute-latents") -> int:
        words = ("--from-videos", str(folder), "--data", str(tmp_path / "out"), "--dry-run", *words)
        told = run(command, *words)
        assert told.exit_code == 0, told.output
        return told.stderr.count("warning: cartoon-v2v knows only the drawn faces of the cartoon world; ")

    assert doubts(talks) == 0
    mixed = Path(shutil.copytree(talks, tmp_path / "talks"))
    for name in ("filmed.mp4", "other.mp4"):
        joined(mixed / name, np.zeros((9, 96, 128, 3), np.uint8))
    assert doubts(mixed) == 1
    assert doubts(mixed, command="precompute-audio") == 0
    assert doubts(mixed, "--model", "omniavatar-14b", "--faces", "none") == 0
