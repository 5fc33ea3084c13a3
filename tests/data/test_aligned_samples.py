"""Samples that were cut elsewhere, for a model that learns from aligned faces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from avatarctl.data import aligned
from avatarctl.data.aligned import AlignedFaces
from avatarctl.data.known import Known
from avatarctl.data.samples import Sample
from avatarctl.events import Notice
from avatarctl.families import family_named
from avatarctl.media import write_audio, write_clip
from avatarctl.media.files import file_sha256
from avatarctl.perception.align import Aligner, align
from avatarctl.perception.face_file import Clip, FaceFileWriter
from avatarctl.perception.mesh import alignment_points
from avatarctl.registry import configure
from tests.data.conftest import run
from tests.perception.conftest import background, landscape, portrait
from tests.perception.test_face_file import face

SCENE = np.asarray(portrait("crop").put(background(384, 216), 250, 108, 90))


def aligned_frame(side: int) -> np.ndarray:
    """The face of SCENE as alignment shows it."""
    true = portrait("crop").points(alignment_points(portrait("crop").face.landmarks), 250, 108, 90)
    image = torch.from_numpy(SCENE.copy()).permute(2, 0, 1)[None].float() / 255
    made = align(image, torch.from_numpy(Aligner(side).fit(true))[None], side)[0]
    return (made * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


SHOWN = {"aligned": aligned_frame(128), "elsewhere": SCENE, "drawn": landscape(384, 216)}


def sample(home: Path, name: str) -> Sample:
    folder = home / name
    folder.mkdir(parents=True)
    write_clip(folder / "sub_clip.mp4", iter([np.stack([SHOWN[name]] * 9)]))
    write_audio(folder / "audio.wav", 0.1 * np.sin(np.arange(9 * 640) / 20).astype(np.float32), 16_000)
    (folder / "prompt.txt").write_text("a person is talking")
    return Sample(name, folder, folder / "sub_clip.mp4", None, None)


def looked_at(home: Path, *words: str) -> tuple[dict[str, Any], list[str]]:
    """What is wrong with each of the three, and the lines about them."""
    family: Any = family_named("omniavatar")
    said: list[Any] = []
    cfg = configure("model.name=cartoon-v2v", "data.num_frames=9", *words)
    faces = AlignedFaces(cfg, family, Known(home / "known", home, "test"), said.append)
    problems = {name: faces.problem(sample(home, name)) for name in SHOWN}
    faces.conclude()
    return problems, [each.text for each in said if isinstance(each, Notice)]


def test_a_face_is_there_or_not_and_aligned_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problems, lines = looked_at(tmp_path / "auto", "data.faces=auto")
    assert problems["aligned"] is None and problems["elsewhere"] is None
    assert problems["drawn"] is not None and problems["drawn"].exit_code == 3
    (line,) = lines
    assert line.startswith("elsewhere: the face is not where it is in an aligned sample")
    monkeypatch.setattr(aligned, "cpu_networks", None)  # whoever looked would fail
    assert looked_at(tmp_path / "none", "data.faces=none") == (dict.fromkeys(SHOWN), [])
    assert looked_at(tmp_path / "i2v", "model.name=cartoon-i2v", "data.faces=auto")[0]["drawn"] is None


def test_what_was_found_is_known_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family: Any = family_named("omniavatar")
    cfg = configure("model.name=cartoon-v2v", "data.num_frames=9", "data.faces=all")
    drawn = sample(tmp_path, "drawn")
    for network in (aligned.cpu_networks, None):
        monkeypatch.setattr(aligned, "cpu_networks", network)
        faces = AlignedFaces(cfg, family, Known(tmp_path / "known", tmp_path, "test"), lambda event: None)
        assert faces.problem(drawn) is not None


def test_a_sample_with_a_map_to_its_face_is_taken_and_none_with_another_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aligned, "cpu_networks", None)
    family: Any = family_named("omniavatar")
    cfg = configure("model.name=cartoon-v2v", "data.faces=auto")
    mapped = sample(tmp_path, "drawn")
    path = mapped.folder / "face.safetensors"
    height, width = SHOWN["drawn"].shape[:2]
    own = Clip(file_sha256(mapped.video), 9, width, height)
    for clip in (own, replace(own, sha256="ab" * 32)):
        path.unlink(missing_ok=True)
        with FaceFileWriter(path, clip, 256, "test-detector") as writer:
            for number in range(9):
                writer.add(face(0), starts_scene=number == 0)
            writer.close()
        faces = AlignedFaces(cfg, family, Known(tmp_path / "known", tmp_path, "test"), lambda event: None)
        problem = faces.problem(mapped)
        assert problem is None if clip == own else "belongs to another clip" in str(problem)
    path.write_bytes(b"")
    broken = AlignedFaces(cfg, family, Known(tmp_path / "known", tmp_path, "test"), lambda event: None)
    assert broken.problem(mapped) is not None


def test_a_folder_without_faces_ends_with_3_and_says_what_takes_it(tmp_path: Path) -> None:
    sample(tmp_path, "drawn")
    words = ("--data", tmp_path, "--model", "cartoon-v2v", "--size", "32x32", "--frames", "9")
    made = run("precompute-latents", *words, "--faces", "auto")
    assert made.exit_code == 3, made.output
    assert "shows no face" in made.stderr and "--faces none takes samples that are aligned" in made.stderr
    assert not list(tmp_path.rglob("latents.safetensors"))
