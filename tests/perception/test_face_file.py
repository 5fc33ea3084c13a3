"""`face.safetensors`, and tables of other detectors: what comes back, and what is refused in which words."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from avatarctl.errors import AvatarctlError, UnusableFile, UnusableVideo
from avatarctl.perception.align import Aligner
from avatarctl.perception.face_file import Clip, FaceFile, FaceFileWriter, read_face_file
from avatarctl.perception.given import read_given_faces
from avatarctl.perception.mesh import alignment_points
from avatarctl.perception.smooth import TrackedFace

from .conftest import GOLDEN

CLIP = Clip("ab" * 32, 6, 768, 576)
LANDMARKS = load_file(GOLDEN / "final.safetensors")["a.landmarks_refined"]


def face(shift: float, *, seen: bool = True, mesh: bool = True) -> TrackedFace:
    landmarks = LANDMARKS + np.array([shift, 0, 0], np.float32)
    flat = landmarks[:, :2].astype(np.float64)
    box = np.concatenate([flat.min(0), flat.max(0)])
    return TrackedFace(0, box, alignment_points(landmarks), landmarks if mesh else None, 0.9, seen)


def write(path: Path, *, mesh: bool = True) -> FaceFile:
    """Six frames: none, two faces, none, one that was filled, and one behind a cut."""
    faces = (
        None,
        face(0, mesh=mesh),
        face(3, mesh=mesh),
        None,
        face(9, seen=False, mesh=mesh),
        face(50, mesh=mesh),
    )
    with FaceFileWriter(path, CLIP, 256, "test-detector") as writer:
        for number, each in enumerate(faces):
            matrix = writer.add(each, starts_scene=number in (0, 5))
            assert (matrix is None) == (each is None)
        assert writer.share == pytest.approx(4 / 6)
        return writer.close()


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    held = write(tmp_path / "face.safetensors")
    assert held.found.tolist() == [False, True, True, False, True, True]
    assert held.seen.tolist() == [False, True, True, False, False, True]
    assert held.starts.tolist() == [True, False, False, False, False, True]
    assert held.resolution == 256 and held.share == pytest.approx(4 / 6)
    assert held.facts["detector"] == "test-detector" and held.facts["crop"] == [280, 210]
    assert np.array_equal(held.landmarks(1, 3)[1], face(3).landmarks) and not held.landmarks(0, 1).any()
    assert held.boxes[5] == pytest.approx(face(50).box) and held.presence[4] == pytest.approx(0.9)
    # Behind a gap and behind a cut a fit begins anew; frames without a face have the nearest one's.
    for frame, shift in ((1, 0), (4, 9), (5, 50)):
        assert np.array_equal(held.matrices[frame], Aligner(256).fit(face(shift).points)), frame
    assert np.array_equal(held.matrices[0], held.matrices[1])
    assert np.array_equal(held.matrices[3], held.matrices[2])
    assert list(tmp_path.iterdir()) == [tmp_path / "face.safetensors"]


def test_the_same_faces_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_faces_without_a_mesh_have_no_landmarks(tmp_path: Path) -> None:
    held = write(tmp_path / "face.safetensors", mesh=False)
    with pytest.raises(UnusableFile, match="without a mesh"):
        held.landmarks(0, 1)


def test_nothing_is_written_where_nothing_is_to_say(tmp_path: Path) -> None:
    with FaceFileWriter(tmp_path / "f", CLIP, 256, "x") as writer:
        for _ in range(6):
            writer.add(None)
        with pytest.raises(UnusableVideo, match="shows no face"):
            writer.close()
    with (
        FaceFileWriter(tmp_path / "f", CLIP, 256, "x") as writer,
        pytest.raises(ValueError, match="1 frames"),
    ):
        writer.add(face(0))
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_clip_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "face.safetensors").path
    read_face_file(path, CLIP)
    for clip, says in (
        (Clip("cd" * 32, 6, 768, 576), "another clip"),
        (Clip("ab" * 32, 6, 700, 576), "another clip"),
        (Clip("ab" * 32, 81, 768, 576), "has 6 frames, the clip has 81"),
    ):
        with pytest.raises(UnusableFile, match=says) as caught:
            read_face_file(path, clip)
        assert caught.value.exit_code == 3 and str(path) in str(caught.value)


def spoil(path: Path, change: Callable[[dict[str, np.ndarray], dict], None]) -> None:
    tensors = load_file(path)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    metadata = json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"]
    facts = json.loads(metadata["avatarctl.faces"])
    change(tensors, facts)
    save_file(tensors, path, metadata={"avatarctl.faces": json.dumps(facts)})


SPOILT: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "nan": (lambda t, f: t["matrices"].__setitem__((2, 0, 0), np.nan), "matrices holds numbers"),
    "nan in the mesh": (lambda t, f: t["landmarks"].__setitem__((5, 467, 2), np.inf), "landmarks holds"),
    "flat": (lambda t, f: t["matrices"].__setitem__((1, 0), 0), "maps a face to nothing"),
    "short": (lambda t, f: t.update(points=t["points"][:5]), r"points is F32 \[5, 3, 2\], F32 \[6, 3, 2\]"),
    "lacking": (lambda t, f: t.pop("found"), r"found is missing, U8 \[6\] is needed"),
    "dtype": (lambda t, f: t.update(boxes=t["boxes"].astype(np.float16)), "boxes is F16"),
    "version": (lambda t, f: f.update(version=9), "version 9, 2 is read here"),
    "facts": (lambda t, f: f.update(frames="6"), "says nothing of the clip"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_spoilt_file_is_refused(case: str, tmp_path: Path) -> None:
    path = write(tmp_path / "face.safetensors").path
    change, says = SPOILT[case]
    spoil(path, change)
    with pytest.raises(AvatarctlError, match=says) as caught:
        read_face_file(path)
    assert caught.value.exit_code == 3


def test_what_is_no_such_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("frame,x0\n")
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "other")
    for name in ("text", "other"):
        with pytest.raises(AvatarctlError) as caught:
            read_face_file(tmp_path / name)
        assert caught.value.exit_code == 3


BOX = "frame,x0,y0,x1,y1"
THREE = "left_brow_x,left_brow_y,right_brow_x,right_brow_y,nose_x,nose_y"
FIVE = ",".join(
    f"{name}_{axis}"
    for name in ("left_eye", "right_eye", "nose", "left_mouth", "right_mouth")
    for axis in "xy"
)


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_table_of_three_points(tmp_path: Path) -> None:
    rows = [f"talk.mp4,{n},{10 + n},20,50,70,{15 + n},30,40,31,28,45" for n in (0, 1, 4, 20)]
    held = read_given_faces(table(tmp_path / "faces.csv", f"video,{BOX},{THREE}", *rows))
    assert held.people("talk.mp4") == [0]
    faces = list(held.follow("talk.mp4", 21))
    assert [face is not None for face in faces] == [True] * 5 + [False] * 15 + [True]
    assert [face.seen for face in faces[:5] if face] == [True, True, False, False, True]
    filled = faces[2]
    assert filled is not None and filled.box[0] == pytest.approx(12) and filled.landmarks is None
    assert filled.points == pytest.approx(np.array([[17, 30], [40, 31], [28, 45]]))


def test_five_points_stand_for_the_three(tmp_path: Path) -> None:
    """On the recorded faces: within 6 % of the distance of the eyes of what the mesh gives."""
    left = [33, 7, 163, 144, 145, 153, 154, 155, 133, 173, 157, 158, 159, 160, 161, 246]
    right = [263, 249, 390, 373, 374, 380, 381, 382, 362, 398, 384, 385, 386, 387, 388, 466]
    recorded = load_file(GOLDEN / "final.safetensors")
    for name in ("a", "b", "c", "d", "two.0", "two.1"):
        flat = recorded[f"{name}.landmarks_refined"][:, :2].astype(np.float64)
        five = np.stack([flat[left].mean(0), flat[right].mean(0), flat[4], flat[61], flat[291]])
        row = ",".join(str(value) for value in five.reshape(-1))
        path = table(tmp_path / "f.csv", f"{BOX},{FIVE}", f"0,0,0,9,9,{row}")
        (found,) = read_given_faces(path).follow("any.mp4", 1)
        assert found is not None
        eyes = np.linalg.norm(five[1] - five[0])
        assert np.abs(found.points - alignment_points(flat)).max() <= 0.06 * eyes, name


def test_the_largest_person_is_followed_unless_one_is_named(tmp_path: Path) -> None:
    points = "1,1,2,1,1,2"
    rows = [
        f"0,0,0,9,9,{points},7",
        f"0,0,0,30,30,{points},3",
        f"1,0,0,8,8,{points},7",
        f"1,0,0,30,30,{points},3",
    ]
    held = read_given_faces(table(tmp_path / "f.csv", f"{BOX},{THREE},person", *rows))
    assert held.people("x") == [3, 7]
    assert [f.person for f in held.follow("x", 2) if f] == [3, 3]
    assert [f.box[2] for f in held.follow("x", 2, person=7) if f] == [9, 8]


GOOD = "0,0,0,9,9,1,1,2,1,1,2"
REFUSED = {
    "no columns": (["frame,x0,y0,x1", "0,1,2,3"], "no column y1"),
    "a box alone": ([BOX, "0,1,2,3,4"], "neither brows and nose"),
    "nan": ([f"{BOX},{THREE}", GOOD, "1,0,0,9,9,nan,1,2,1,1,2"], "f.csv:3: left_brow_x is 'nan'"),
    "words": ([f"{BOX},{THREE}", "0,a,0,9,9,1,1,2,1,1,2"], "x0 is 'a'"),
    "short line": ([f"{BOX},{THREE}", "0,0,0,9,9,1"], "left_brow_y is ''"),
    "empty box": ([f"{BOX},{THREE}", "0,9,0,9,9,1,1,2,1,1,2"], "the box is empty"),
    "one place": ([f"{BOX},{THREE}", "0,0,0,9,9,1,1,1,1,1,1"], "in one place"),
    "twice": ([f"{BOX},{THREE}", GOOD, GOOD], "frame 0 has this face twice"),
    "negative": ([f"{BOX},{THREE}", "-1" + GOOD[1:]], "frame is '-1'"),
    "nothing": ([f"{BOX},{THREE}"], "holds no faces"),
    "empty": ([""], "no column frame"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_table_is_refused_with_its_line(case: str, tmp_path: Path) -> None:
    lines, says = REFUSED[case]
    with pytest.raises(UnusableFile) as caught:
        read_given_faces(table(tmp_path / "f.csv", *lines))
    assert says in str(caught.value) and caught.value.exit_code == 3


def test_a_table_of_another_clip_is_refused(tmp_path: Path) -> None:
    held = read_given_faces(table(tmp_path / "f.csv", f"video,{BOX},{THREE}", f"one.mp4,{GOOD}"))
    with pytest.raises(UnusableFile, match=r"names no face of two\.mp4, but of one\.mp4"):
        list(held.follow("two.mp4", 9))
    long = read_given_faces(table(tmp_path / "g.csv", f"{BOX},{THREE}", "80" + GOOD[1:]))
    with pytest.raises(UnusableFile, match="a face in frame 80 of clip, which has 80 frames"):
        list(long.follow("clip", 80))
    (tmp_path / "h.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UnusableFile, match="not UTF-8"):
        read_given_faces(tmp_path / "h.csv")
