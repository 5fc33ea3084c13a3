"""Samples around a face: the same videos with the face where it is known to be, prepared as a user would."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from avatarctl.cli import app
from avatarctl.conditioning.masking import keep_map, mask_tensor, mouth_mask
from avatarctl.data.artifacts import read_artifact
from avatarctl.data.face_windows import walk_faces
from avatarctl.data.faces import FacePlan
from avatarctl.data.training_set import TrainingSet
from avatarctl.data.windows import Cutting, RawVideo
from avatarctl.families import family_named
from avatarctl.media import open_video
from avatarctl.perception.align import Aligner, align, crop_size, template
from avatarctl.perception.face_file import FaceFile, read_face_file
from avatarctl.perception.mesh import alignment_points
from avatarctl.pipelines import infer
from avatarctl.registry import configure, find_model
from tests.data.conftest import contents, joined, run
from tests.perception.conftest import background, landscape, portrait
from tests.repeats import repeats

ALIGNED = ("--model", "cartoon-v2v", "--size", "64x64", "--frames", "9")
WHOLE = ("--model", "cartoon-i2v", "--size", "64x64", "--frames", "9")
SIZE, SIDE = (384, 216), 90.0

Place = tuple[float, float] | None


def scene(*places: Place, name: str = "crop", seed: int = 0) -> np.ndarray:
    """A frame of 384 x 216 with the same face in these places, where there are any."""
    image = background(*SIZE, seed=seed)
    for place in places:
        image = image if place is None else portrait(name).put(image, *place, SIDE)
    return np.asarray(image)


def path_of(first: float, frames: int) -> list[tuple[float, float]]:
    return [(first + 2.0 * i, 108.0) for i in range(frames)]


def prepare(videos: Path, out: Path, *words: object, kind: Sequence[str] = ALIGNED) -> Any:
    return run("precompute-latents", "--from-videos", videos, "--data", out, *kind, *words)


def record_of(out: Path, name: str) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((out / f"_dataset/sources/{name}.json").read_text())
    return held


def clip_of(folder: Path) -> np.ndarray:
    with open_video(folder / "sub_clip.mp4") as reader:
        return reader.read(0, reader.frames)


def source_of(video: Path, start: int, stop: int) -> np.ndarray:
    with open_video(video) as reader:
        return reader.read(start, stop)


# 20 frames with a face, 16 without, 15 with it elsewhere, and behind a cut 9 with somebody in another place.
THERE, AWAY, BACK, AFTER = path_of(120, 20), 16, path_of(250, 15), [(130.0, 104.0)] * 9
CUT = len(THERE) + AWAY + len(BACK)


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces") / "talks"
    folder.mkdir()
    first = [scene(place) for place in (*THERE, *[None] * AWAY, *BACK)]
    joined(folder / "one.mp4", np.stack([*first, *[scene(place, seed=3) for place in AFTER]]))
    return folder


@pytest.fixture(scope="module")
def aligned(talks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples that show the aligned face; nobody changes them."""
    out = tmp_path_factory.mktemp("aligned") / "samples"
    made = prepare(talks, out, "--faces", "auto", "--references", 1, "--artifact-dtype", "float32")
    assert made.exit_code == 0, made.output
    assert re.search(r"no face in 1\d of 60 frames \(20 to .*no sample is cut there", made.stderr)
    return out


@pytest.fixture(scope="module")
def whole(talks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples that show the whole frame; nobody changes them."""
    out = tmp_path_factory.mktemp("whole") / "samples"
    made = prepare(talks, out, "--faces", "auto", kind=WHOLE)
    assert made.exit_code == 0, made.output
    return out


def true_places(start: int) -> list[Place]:
    places: list[Place] = [*THERE, *[None] * AWAY, *BACK, *AFTER]
    return places[start : start + 9]


def test_windows_have_a_face_in_every_frame_and_cross_no_cut(aligned: Path, whole: Path) -> None:
    for out in (aligned, whole):
        record = record_of(out, "one.mp4")
        assert record["cuts"][-1] == CUT  # a face that pops up is one as well
        assert record["windows"][:2] == [0, 9] and CUT in record["windows"]
        # Of the second stretch the search needs some frames; one window fits before the cut.
        (third,) = (start for start in record["windows"] if 18 <= start < CUT)
        assert 36 <= third <= 41
        for start in record["windows"]:
            assert all(place is not None for place in true_places(start))
            assert not start < CUT < start + 9
        ((gone, back),) = record["faces"]["without"]
        assert 20 <= gone <= 22 and back == third
        share = 1 - (back - gone) / (CUT + len(AFTER))
        assert record["faces"]["share"] == pytest.approx(share, abs=1e-4)
        report = (out / "_dataset/precompute-latents.report.txt").read_text().splitlines()
        assert report[0].split()[5] == "faces" and report[1].split()[5] == f"{share:.0%}"
        told = json.loads((out / "_dataset/precompute-latents.report.jsonl").read_text().splitlines()[0])
        assert told["facts"]["face_share"] == record["faces"]["share"]


def held_face(folder: Path) -> FaceFile:
    held = read_face_file(folder / "face.safetensors")
    assert held.facts["detector"].startswith("mediapipe-") and held.found.all()
    assert held.starts.tolist() == [True] + [False] * 8
    return held


def test_a_sample_of_a_video_model_shows_the_aligned_face(aligned: Path, talks: Path) -> None:
    """Its pixels are those of the source around the true points of the face, turned and shrunk by Pillow."""
    own = alignment_points(portrait("crop").face.landmarks)
    height, width = crop_size(64)
    grow = np.diag([width / 64, height / 64])
    for start in record_of(aligned, "one.mp4")["windows"]:
        folder = aligned / f"one.mp4/{start:06d}"
        held, frames = held_face(folder), clip_of(folder)
        assert frames.shape == (9, 64, 64, 3) and held.resolution == 64
        sources = source_of(talks / "one.mp4", start, start + 9)
        for number, place in enumerate(true_places(start)):
            assert place is not None
            true = portrait("crop").points(own, *place, SIDE)
            matrix = Aligner(64).fit(true).astype(float)
            back = np.linalg.inv(matrix[:, :2])
            # Pillow counts from a pixel's edge, the matrix from its middle.
            corner = back @ (-0.5 - matrix[:, 2]) + 0.5
            affine = np.hstack([back @ grow, corner[:, None]]).reshape(-1)
            plain = Image.fromarray(sources[number]).transform(
                (64, 64), Image.Transform.AFFINE, tuple(affine), Image.Resampling.BILINEAR
            )
            shown = np.asarray(plain, float)
            off, shifted = (np.abs(each - frames[number]).mean() for each in (shown, np.roll(shown, 2, 1)))
            assert off < 6 and off < 0.5 * shifted, (start, number, off, shifted)
            # The map from the sample to the crop is the growing back alone, so points are where they belong.
            there = (matrix[:, :2] @ (true - 0.5).T).T + matrix[:, 2] + 0.5
            assert held.points[number] == pytest.approx(there @ np.linalg.inv(grow), abs=1.2)
            assert held.matrices[number][:, :2] == pytest.approx(grow)


def test_a_sample_of_an_image_model_shows_the_frame_and_maps_to_the_face(
    whole: Path, talks: Path, tmp_path: Path
) -> None:
    """The frames are those without looking for faces; the map is that of the true points, in a frame of
    which the middle 216 x 216 pixels became 64 x 64."""
    plain = tmp_path / "plain"
    assert prepare(talks, plain, "--faces", "none", "--max-windows", 2, kind=WHOLE).exit_code == 0
    assert not (plain / "_dataset/faces.png").exists() and not list(plain.rglob("face.safetensors"))
    own = alignment_points(portrait("crop").face.landmarks)
    for start in (0, 9):
        folder = whole / f"one.mp4/{start:06d}"
        name = "sub_clip.mp4"
        assert (folder / name).read_bytes() == (plain / f"one.mp4/{start:06d}" / name).read_bytes()
        held = held_face(folder)
        for matrix, place in zip(held.matrices, true_places(start), strict=True):
            assert place is not None
            true = (portrait("crop").points(own, *place, SIDE) - (84, 0)) * (64 / 216) - 0.5
            there = true @ matrix[:, :2].T + matrix[:, 2]
            assert there.mean(0) == pytest.approx(template(256).mean(0), abs=2.5)


def training_set(path: Path, side: int) -> TrainingSet:
    words = ("data.faces=auto", f"data.path={path}", f"data.width={side}", f"data.height={side}")
    cfg = configure("model.name=cartoon-i2v", "data.num_frames=9", *words)
    family: Any = family_named("omniavatar")
    return TrainingSet(cfg, find_model("cartoon-i2v"), family, lambda event: None, with_faces=True)


def test_training_maps_frames_to_the_face_with_a_gradient(whole: Path) -> None:
    """Also frames that are smaller than those of the sample: what is seen is the same, blurred."""
    shown = {}
    for side in (64, 32):
        data = training_set(whole, side)
        data.check()
        assert not data.bad
        to_face = data._to_face(data._checked[1])
        frames = (
            clip_of(whole / "one.mp4/000009").reshape(9, side, 64 // side, side, 64 // side, 3).mean((2, 4))
        )
        tensor = torch.from_numpy(frames).float().permute(3, 0, 1, 2)[None] / 127.5 - 1
        tensor.requires_grad_()
        shown[side] = to_face(tensor[:, :, 3:7], 3)
        assert shown[side].shape == (1, 3, 4, 256, 256)
        (gradient,) = torch.autograd.grad(shown[side].sum(), tensor)
        assert gradient[:, :, 3:7].any() and not gradient[:, :, :3].any() and not gradient[:, :, 7:].any()
    off = (shown[64] - shown[32]).abs().mean()
    assert off < 0.5 * (shown[64] - shown[32].roll(24, 4)).abs().mean()
    held = held_face(whole / "one.mp4/000009")
    direct = align(tensor_of(whole / "one.mp4/000009"), torch.from_numpy(held.matrices), 256, fill=0)
    assert torch.allclose(shown[64][0].transpose(0, 1), direct[3:7], atol=1e-3)


def tensor_of(folder: Path) -> Tensor:
    return torch.from_numpy(clip_of(folder)).float().permute(0, 3, 1, 2) / 127.5 - 1


def test_training_without_a_map_or_with_another_clips(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    shutil.copytree(whole, out)
    first, second, third = sorted(path for path in (out / "one.mp4").iterdir())[:3]
    (first / "face.safetensors").unlink()
    shutil.copy(third / "face.safetensors", second)
    data = training_set(out, 64)
    data.check()
    says = {name: str(problem) for name, problem in data.bad.items()}
    assert "has no face.safetensors, and the sync loss needs aligned faces" in says[f"one.mp4/{first.name}"]
    assert "belongs to another clip" in says[f"one.mp4/{second.name}"] and len(says) == 2


def test_references_are_aligned_frames_elsewhere(aligned: Path) -> None:
    record = record_of(aligned, "one.mp4")
    ((gone, back),) = record["faces"]["without"]
    assert record["others"] and not set(record["others"]) & set(range(gone, back))
    with open_video(aligned / "_dataset/sources/one.mp4.others.mp4") as reader:
        assert (reader.height, reader.width, reader.frames) == (64, 64, len(record["others"]))
    assert (aligned / "one.mp4/000000/references.safetensors").is_file()


def test_what_was_interrupted_is_made_again_by_another_process(
    aligned: Path, talks: Path, tmp_path: Path
) -> None:
    """As a kill leaves it: some folders whole, no record, no page."""
    out = tmp_path / "samples"
    shutil.copytree(aligned, out)
    shutil.rmtree(out / "one.mp4/000009")
    for name in ("sources/one.mp4.json", "faces.png", "index.jsonl"):
        (out / "_dataset" / name).unlink()
    words = ("--faces", "auto", "--references", 1, "--artifact-dtype", "float32", "--workers", 1)
    age = (out / "one.mp4/000000/sub_clip.mp4").stat().st_mtime_ns
    assert prepare(talks, out, *words).exit_code == 0
    assert contents(out) == contents(aligned)
    assert (out / "one.mp4/000000/sub_clip.mp4").stat().st_mtime_ns == age


def test_the_page_shows_aligned_faces_under_the_mask(aligned: Path) -> None:
    """Outside the mask a tile is the sample's own frame; inside it is 35 % of the way to red."""
    page = np.asarray(Image.open(aligned / "_dataset/faces.png").convert("RGB"), float)
    tile, frame = page[38 : 38 + 112, 10 : 10 + 112], Image.fromarray(clip_of(aligned / "one.mp4/000000")[0])
    plain = np.asarray(frame.resize((112, 112), Image.Resampling.BICUBIC), float)
    keep = np.asarray(Image.fromarray(mouth_mask()).resize((112, 112), Image.Resampling.NEAREST)) > 0
    inside = ~keep & (np.roll(keep, 4, 0) == keep) & (np.roll(keep, -4, 1) == keep)
    outside = keep & (np.arange(112)[:, None] < 35)
    assert np.abs(tile - plain)[outside].mean() < 4
    red = plain + 0.35 * (np.array([255, 40, 40]) - plain)
    assert np.abs(tile - red)[inside].mean() < 4 < np.abs(tile - plain)[inside].mean()


def test_everybody_has_samples_of_their_own(tmp_path: Path) -> None:
    """Two people beside each other: the same frames, each mapped to one of them."""
    (tmp_path / "in").mkdir()
    joined(tmp_path / "in/two.mp4", np.stack([scene((130 + i, 108), (240 + i, 108)) for i in range(10)]))
    made = prepare(tmp_path / "in", tmp_path / "out", "--faces", "all", kind=WHOLE)
    assert made.exit_code == 0, made.output
    folders = sorted(path.name for path in (tmp_path / "out/two.mp4").iterdir())
    assert folders == ["000000-0", "000000-1"]
    middles = [
        held_face(tmp_path / "out/two.mp4" / name).boxes[0].reshape(2, 2).mean(0)[0] for name in folders
    ]
    assert sorted(middles) == pytest.approx([(130 - 84) * 64 / 216, (240 - 84) * 64 / 216], abs=2)
    again = prepare(tmp_path / "in", tmp_path / "out", "--faces", "all", kind=WHOLE)
    assert again.exit_code == 0 and "video 1" not in again.stderr


def table(path: Path, places: Sequence[Place], first: int = 0, name: str = "one.mp4") -> Path:
    """What another detector would say: a box and the three points, of the frames from `first` on."""
    own = alignment_points(portrait("crop").face.landmarks)
    points = [f"{name}_{axis}" for name in ("left_brow", "right_brow", "nose") for axis in "xy"]
    lines = [",".join(["video", "frame", "x0", "y0", "x1", "y1", *points])]
    for number, place in enumerate(places, first):
        if place is not None:
            true = portrait("crop").points(own, *place, SIDE)
            box = [place[0] - 45, place[1] - 45, place[0] + 45, place[1] + 45]
            lines.append(",".join([name, str(number), *(f"{x:.3f}" for x in (*box, *true.reshape(-1)))]))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_faces_of_another_detector(talks: Path, aligned: Path, tmp_path: Path) -> None:
    """The table lists what is true; the crops are those of our own detector, to a pixel or so. A line about
    another video makes nothing again, one about this video does."""
    out = tmp_path / "samples"
    faces = table(tmp_path / "faces.csv", [*THERE, *[None] * AWAY, *BACK, *AFTER])
    made = prepare(talks, out, "--faces", faces, "--references", 1, "--artifact-dtype", "float32")
    assert made.exit_code == 0, made.output
    assert record_of(out, "one.mp4")["windows"] == [0, 9, 36, CUT]
    held = read_face_file(out / "one.mp4/000009/face.safetensors")
    assert held.facts["detector"].startswith("table-") and held.stored_landmarks is None
    ours, theirs = (clip_of(each / "one.mp4/000009").astype(float) for each in (aligned, out))
    assert np.abs(ours - theirs).mean() < 0.5 * np.abs(np.roll(ours, 3, 2) - ours).mean()
    said = faces.read_text()
    faces.write_text(said + table(tmp_path / "b.csv", THERE[:1], name="b.mp4").read_text().split("\n")[1])
    words = ("--references", 1, "--artifact-dtype", "float32")
    assert "video 1" not in prepare(talks, out, "--faces", faces, *words).stderr
    faces.write_text(said.replace("one.mp4,0,", "one.mp4,60,", 1))
    assert "has a face in frame 60 of one.mp4" in prepare(talks, out, "--faces", faces, *words).stderr


def good(path: Path) -> Path:
    return table(path, THERE)


BAD_TABLES = {
    "another clip": (
        lambda p: table(p, THERE, name="two.mp4"),
        3,
        "names no face of one.mp4, but of two.mp4",
    ),
    "another length": (lambda p: table(p, THERE, 50), 3, "frame 69 of one.mp4, which has 60 frames"),
    "too short": (lambda p: table(p, THERE[:5]), 3, "to be seen for 5 frames at most, and a window has 9"),
    "nan": (lambda p: p.write_text(good(p).read_text().replace("mp4,3,", "mp4,3,nan,")), 3, "x0 is 'nan'"),
    "a folder": (lambda p: p.mkdir(), 3, "is a folder"),
    "nothing": (lambda p: None, 2, "does not exist"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_a_wrong_table_is_refused_and_nothing_is_made(case: str, talks: Path, tmp_path: Path) -> None:
    make, code, says = BAD_TABLES[case]
    make(tmp_path / "faces.csv")
    made = prepare(talks, tmp_path / "out", "--faces", tmp_path / "faces.csv")
    assert made.exit_code == code and says in made.stderr, made.output
    assert "Traceback" not in made.output and not list(tmp_path.glob("out/one.mp4/0*"))


def test_nobody_is_found(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    joined(tmp_path / "in/drawn.mp4", np.stack([landscape(*SIZE)] * 10))
    made = prepare(tmp_path / "in", tmp_path / "out", "--faces", "auto")
    assert made.exit_code == 3 and "shows no face (--faces none takes videos as they are" in made.stderr
    assert not list((tmp_path / "out").glob("drawn.mp4*"))


def test_a_face_at_the_edge_is_filled_with_grey(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    joined(tmp_path / "in/edge.mp4", np.stack([scene((32 + i, 108)) for i in range(10)]))
    made = prepare(tmp_path / "in", tmp_path / "out", "--faces", "auto", "--max-windows", 1)
    assert made.exit_code == 0, made.output
    frame = clip_of(tmp_path / "out/edge.mp4/000000")[0].astype(int)
    assert np.abs(frame[:, :4] - 127).max() < 12 and np.abs(frame[:, 32:36] - 127).mean() > 12


class LongVideo:
    """Grey frames, and how many pieces of them were alive at once."""

    name, width, height, warnings = "long", 96, 54, ()

    def __init__(self, frames: int) -> None:
        self.frames, self.most = frames, 0
        self._pieces: list[weakref.ref[Any]] = []

    def read(self, start: int, stop: int) -> np.ndarray:
        piece = np.full((stop - start, 54, 96, 3), 90, np.uint8)
        self._pieces.append(weakref.ref(piece))
        self.most = max(self.most, sum(each() is not None for each in self._pieces))
        return piece


class Written:
    """Stands for what writes samples: first frames of windows."""

    def __init__(self) -> None:
        self.starts: list[int] = []

    def look(self, *arguments: object) -> None: ...

    def write(self, start: int, *arguments: object) -> None:
        self.starts.append(start)


@pytest.mark.parametrize("aligned_faces", [True, False])
def test_what_is_held_does_not_grow_with_the_video(aligned_faces: bool, tmp_path: Path) -> None:
    most = []
    for frames in (60, 240):
        faces = table(tmp_path / f"{frames}.csv", [(50.0, 25.0)] * frames)
        plan = FacePlan("largest", aligned_faces, 32, (faces, str(frames)))
        work, video = Written(), LongVideo(frames)
        cutting = Cutting(9, 9, None, (32, 32), "crop", "audio.wav", False, plan)
        walk_faces(video, work, cutting, plan, RAW)  # type: ignore[arg-type]
        assert work.starts == list(range(0, frames - 8, 9))
        most.append(video.most)
    assert most[0] == most[1] <= 4


RAW = RawVideo("one.mp4", Path("one.mp4"), None, "")


def test_a_table_without_videos_to_cut_is_said(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "samples")
    words = ("--data", tmp_path / "samples", *WHOLE, "--faces", tmp_path / "faces.csv", "--dry-run")
    made = run("precompute-latents", *words)
    assert made.exit_code == 0 and "read where videos are cut (--from-videos)" in made.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--height", "32", "--faces", "auto"), "are aligned faces, which are square, and not 64x32"),
        (("--faces", "all", "--references", "2"), "may show other people"),
    ],
)
def test_settings_without_sense(words: tuple[str, ...], says: str, talks: Path, tmp_path: Path) -> None:
    kind = ("--width", "64", *(() if "--height" in words else ("--height", "64")), "--frames", "9")
    made = prepare(talks, tmp_path / "out", *words, kind=kind)
    assert made.exit_code == 2 and says in made.stderr and not (tmp_path / "out").exists()


def test_rows_of_people_look_for_faces_and_drawn_ones_do_not() -> None:
    for name, faces in (("omniavatar-14b", "auto"), ("stableavatar-1.3b", "auto"), ("cartoon-v2v", "none")):
        assert configure(f"model.name={name}").data.faces == faces


@pytest.mark.parametrize("name", repeats(["crop"], ["a"]))
def test_infer_shows_the_network_what_training_reads(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A portrait moved over a background, prepared, and the clip given to `infer --video`: every condition
    channel bit for bit."""
    (tmp_path / "in").mkdir()
    frames = np.stack([scene((150 + 3 * i, 108), name=name, seed=1) for i in range(9)])
    joined(tmp_path / "in/moved.mp4", frames)
    made = prepare(tmp_path / "in", tmp_path / "out", "--faces", "auto", "--artifact-dtype", "float32")
    assert made.exit_code == 0, made.output
    folder, seen = tmp_path / "out/moved.mp4/000000", list[Tensor]()
    real = infer._LOOPS["chunks"]

    def watch(denoise: Any, *rest: Any) -> Iterator[Any]:
        kind = type(denoise.family)
        build = kind.build_condition
        monkeypatch.setattr(
            kind, "build_condition",
            lambda self, encoded: seen.append((made := build(self, encoded)).channels) or made,
        )  # fmt: skip
        yield from real(denoise, *rest)

    monkeypatch.setitem(infer._LOOPS, "chunks", watch)
    words = ["infer", "--model", "cartoon-v2v", "--video", folder / "sub_clip.mp4", "--audio"]
    words += [folder / "audio.wav", "--out", tmp_path / "x.mp4", "--steps", "1", "--size", "64x64"]
    dubbed = CliRunner().invoke(app, [*map(str, words), "-o", "long_video.num_frames=9"])
    assert dubbed.exit_code == 0, dubbed.output
    latents, masked = (read_artifact(folder / f"{n}.safetensors", n) for n in ("latents", "masked_latents"))
    assert torch.equal(seen[0][0][:16], latents[:, :1].expand(-1, 3, -1, -1))
    keep = keep_map(mask_tensor(mouth_mask()), (8, 8))[0]
    assert torch.equal(seen[0][0][16], 1 - keep.expand(3, -1, -1))
    assert torch.equal(seen[0][0][17:], masked)
