"""What the streaming writer writes, refuses and leaves behind."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from avatarctl.errors import OutputRefused, UnusableWeights, WriteFailed
from avatarctl.files.staging import staged_folder
from avatarctl.files.tensors import DTYPES, ArrayTensor, FileTensor, StoredTensor, TensorInfo
from avatarctl.files.writer import SOURCES_KEY, write_safetensors, write_sharded

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX links, limits or users")


@dataclass(frozen=True)
class Made:
    """A tensor of any size that exists only while it is read; `on_read` is told the first element."""

    info: TensorInfo
    on_read: Callable[[int], object] = lambda start: None

    def read(self, start: int, stop: int) -> np.ndarray:
        self.on_read(start)
        return np.arange(start, stop).astype(DTYPES[self.info.dtype].storage)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def one_of_each() -> dict[str, StoredTensor]:
    """Every dtype, odd sizes, an empty tensor and a scalar, names that need escaping."""
    rng = np.random.default_rng(0)
    tensors: dict[str, StoredTensor] = {}
    for index, (name, dtype) in enumerate(DTYPES.items()):
        values = rng.integers(0, 2 if name == "BOOL" else 100, (3, 2 * index + 1)).astype(dtype.storage)
        tensors[f"z{9 - index}.{name}"] = ArrayTensor(values, name)
    tensors["scalar"] = ArrayTensor(np.array(2.5, np.float32), "F32")
    tensors["empty"] = ArrayTensor(np.zeros((0, 4), np.float16), "F16")
    tensors['né "視頻" 🎬\n'] = ArrayTensor(np.arange(3, dtype=np.float32), "F32")
    return tensors


def tiny(value: float = 1.0) -> dict[str, StoredTensor]:
    return {"a": ArrayTensor(np.full((4, 3), value, np.float32), "F32")}


# ---------------------------------------------------------------- content


def test_an_independent_reader_finds_every_bit(tmp_path: Path) -> None:
    tensors = one_of_each()
    write_safetensors(tmp_path / "a.safetensors", tensors, {"format": "pt", "naïve": "ü\n{}"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "naïve": "ü\n{}"}
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = file.get_tensor(name)
            assert tuple(found.shape) == tensor.info.shape
            expected = tensor.read(0, tensor.info.numel).tobytes()
            assert found.reshape(-1).view(torch.uint8).numpy().tobytes() == expected, name
    assert names(tmp_path) == ["a.safetensors"]


def test_the_layout_is_aligned_ordered_and_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_safetensors(tmp_path / name, one_of_each(), {"k": "v"}, sources=[Path(__file__)])
    raw = (tmp_path / "a").read_bytes()
    assert raw == (tmp_path / "b").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    assert list(header) == ["__metadata__", *one_of_each()]
    end = 0
    for entry in list(header.values())[1:]:
        assert entry["data_offsets"][0] == end
        end = entry["data_offsets"][1]
    assert end == len(raw) - 8 - length


def test_a_tensor_of_many_blocks_is_read_in_order_and_progress_counts_its_bytes(tmp_path: Path) -> None:
    starts: list[int] = []
    seen: list[int] = []
    info = TensorInfo("F32", (3000, 3001))
    tensors = {"big": Made(info, starts.append), "after": Made(TensorInfo("BF16", (7,)))}
    write_safetensors(tmp_path / "a", tensors, {}, progress=seen.append)
    assert len(starts) > 3 and starts == sorted(starts) and starts[0] == 0
    assert len(seen) == len(starts) + 1 and seen == sorted(seen) and seen[-1] == info.nbytes + 14
    found = load_file(tmp_path / "a")
    assert torch.equal(found["big"].view(-1), torch.arange(info.numel).to(torch.float32))


def test_a_file_is_streamed_from_another_file_system_bit_for_bit(tmp_path: Path) -> None:
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    source = elsewhere / f"avatarctl-test-{os.getpid()}.safetensors"
    try:
        save_file({"w": torch.randn(500, 40)}, source)
        with source.open("rb") as file:
            data = 8 + int.from_bytes(file.read(8), "little")
        tensor = FileTensor(source, data, TensorInfo("F32", (500, 40)))
        write_safetensors(tmp_path / "a", {"w": tensor}, {}, sources=[source])
        assert torch.equal(load_file(tmp_path / "a")["w"], load_file(source)["w"])
    finally:
        source.unlink(missing_ok=True)


# ---------------------------------------------------------------- sources


def test_sources_are_named_with_the_hashes_of_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "big.pt").write_bytes(os.urandom(9_000_001))
    (tmp_path / 'é"\\.bin').write_bytes(b"")
    sources = [tmp_path / "big.pt", tmp_path / 'é"\\.bin']
    write_safetensors(tmp_path / "a", tiny(), {"format": "pt"}, sources=sources)
    with safe_open(tmp_path / "a", "np") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", SOURCES_KEY} and SOURCES_KEY == "avatarctl.sources"
    assert json.loads(metadata[SOURCES_KEY]) == [
        {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in sources
    ]


def test_a_source_that_cannot_be_hashed_stops_the_writing_early(tmp_path: Path) -> None:
    blocks: list[int] = []

    def wait_a_little(start: int) -> None:
        blocks.append(start)
        threading.Event().wait(0.02)

    tensors = {f"t{i}": Made(TensorInfo("F32", (10,)), wait_a_little) for i in range(200)}
    with pytest.raises(UnusableWeights, match=r"gone\.pt: cannot be read"):
        write_safetensors(tmp_path / "a", tensors, {}, sources=[tmp_path / "gone.pt"])
    assert len(blocks) < 20 and names(tmp_path) == []


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("dtype", [name for name, kind in DTYPES.items() if kind.floating])
@pytest.mark.parametrize("place", [0, -1])
def test_what_is_not_finite_is_refused_by_name_and_nothing_stays(
    tmp_path: Path, dtype: str, place: int
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    storage = DTYPES[dtype].storage
    values = np.zeros(20 << 20 if dtype == "BF16" else 100, storage)
    values.view("u1").reshape(-1, storage.itemsize)[place] = 0xFF  # NaN in every dtype
    tensors = {**tiny(), "blocks.3.x\x1b[2J" + "y" * 300: ArrayTensor(values, dtype), **tiny()}
    with pytest.raises(UnusableWeights) as caught:
        write_safetensors(tmp_path / "a", tensors, {})
    text = str(caught.value)
    assert "blocks.3.x\\x1b[2Jyyy" in text and dtype in text and "NaN or infinity" in text
    assert "--allow-nonfinite" in text and len(text) - len(str(tmp_path)) < 300
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"
    write_safetensors(tmp_path / "a", tensors, {}, allow_nonfinite=True)
    with safe_open(tmp_path / "a", "pt") as file:
        assert len(file.keys()) == 2


def test_names_that_the_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(UnusableWeights, match="__metadata__"):
        write_safetensors(tmp_path / "a", {"__metadata__": tiny()["a"]}, {})
    with pytest.raises(UnusableWeights, match=r"not valid Unicode: .*blocks\.\\ud800\.w"):
        write_safetensors(tmp_path / "a", {"blocks.\ud800.w": tiny()["a"]}, {})
    assert names(tmp_path) == []


def test_places_that_cannot_be_written_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    before = names(tmp_path)

    def never(start: int) -> None:
        raise AssertionError("was read")

    tensors = {"a": Made(TensorInfo("F32", (4,)), never)}
    for place, cause in (
        (tmp_path / "absent" / "a", "does not exist"),
        (tmp_path / "file" / "a", "not a folder"),
    ):
        with pytest.raises(OutputRefused, match=cause):
            write_safetensors(place, tensors, {})
    for folder, cause in ((tmp_path / "absent", "does not exist"), (tmp_path / "file", "not a folder")):
        with pytest.raises(OutputRefused, match=cause):
            write_sharded(folder, "model", tensors, {}, 100)
    with pytest.raises(OutputRefused, match="too long"):
        write_sharded(tmp_path / "folder", "n" * 240, {**tensors, "b": tensors["a"]}, {}, 1)
    assert names(tmp_path) == before and names(tmp_path / "folder") == []


READ_ONLY = """
    import os, sys
    from pathlib import Path
    import numpy as np
    from avatarctl.errors import AvatarctlError
    from avatarctl.files.tensors import ArrayTensor
    from avatarctl.files.staging import staged_folder
    from avatarctl.files.writer import write_safetensors, write_sharded

    def staged(folder):
        with staged_folder(folder / "new", overwrite=False):
            pass

    folder = Path(sys.argv[1])
    tensors = {name: ArrayTensor(np.zeros(9, np.float32), "F32") for name in "ab"}
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    for attempt in (
        lambda: write_safetensors(folder / "a", tensors, {}),
        lambda: write_sharded(folder, "model", tensors, {}, 36),
        lambda: staged(folder),
    ):
        try:
            attempt()
            print("allowed")
        except AvatarctlError as error:
            print(error.exit_code, error)
"""


@posix
def test_a_read_only_folder_is_refused() -> None:
    """In a folder that anyone may enter: pytest's own are closed to the user we become."""
    import tempfile

    with tempfile.TemporaryDirectory() as base:
        folder = Path(base) / "read only é"
        folder.mkdir()
        Path(base).chmod(0o755)
        folder.chmod(0o555)
        command = [sys.executable, "-c", textwrap.dedent(READ_ONLY), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
        if done.returncode and "setuid" in done.stderr:
            pytest.skip("runs as root and cannot drop privileges")
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert len(lines) == 3
        for line in lines:
            assert line.startswith("2 ") and "no permission to write" in line and str(folder) in line
        assert names(folder) == []
        folder.chmod(0o755)


def test_space_that_is_not_there_is_missed_before_anything_is_read(tmp_path: Path) -> None:
    def never(start: int) -> None:
        raise AssertionError("was read")

    vast = {name: Made(TensorInfo("BF16", (1 << 26, 1 << 24)), never) for name in "ab"}
    for attempt in (
        lambda: write_safetensors(tmp_path / "a", vast, {}),
        lambda: write_sharded(tmp_path, "model", vast, {}, 1 << 40),
    ):
        with pytest.raises(WriteFailed, match=r"needs 4\.5 PB, [0-9.]+ ([kMGTP]B|bytes) free"):
            attempt()
    assert names(tmp_path) == []


@posix
def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path: Path) -> None:
    import resource

    (tmp_path / "a").write_bytes(b"old")
    tensors = {"a": Made(TensorInfo("F32", (10_000_000,)))}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    threads = set(threading.enumerate())
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000_000, before[1]))
    try:
        with pytest.raises(WriteFailed, match="no space left"):
            write_safetensors(tmp_path / "a", tensors, {}, sources=[Path(__file__)])
        with (
            pytest.raises(WriteFailed, match=r"model-00002-of-00003\.safetensors: no space left"),
            staged_folder(tmp_path / "set", overwrite=False) as folder,
        ):
            write_sharded(folder, "model", {**tiny(), "b": tensors["a"], "c": tensors["a"]}, {}, 9_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_bytes() == b"old"
    assert set(threading.enumerate()) <= threads, "one goes on"


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt, SystemExit, UnusableWeights])
@pytest.mark.parametrize("where", ["read", "progress"])
def test_any_failure_ends_the_threads_and_leaves_the_old_file(
    tmp_path: Path, failure: type[BaseException], where: str
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(300_000_000)  # sparse; far from hashed when the failure comes

    def fail_later(at: int) -> None:
        if at > 3_000_000:
            raise failure("now")

    tensors = {"a": Made(TensorInfo("F32", (8_000_000,)), fail_later if where == "read" else lambda at: None)}
    threads = set(threading.enumerate())
    with pytest.raises(failure):
        write_safetensors(
            tmp_path / "a", tensors, {}, sources=[source],
            progress=fail_later if where == "progress" else None,
        )  # fmt: skip
    assert set(threading.enumerate()) <= threads, "one goes on"
    assert names(tmp_path) == ["a", "source"] and (tmp_path / "a").read_bytes() == b"old"


def test_a_reader_that_gives_too_little_is_a_bug_not_a_file(tmp_path: Path) -> None:
    class Short(ArrayTensor):
        def read(self, start: int, stop: int) -> np.ndarray:
            return super().read(start, stop - 1)

    with pytest.raises(RuntimeError, match=r"was read as float32 \(8,\)"):
        write_safetensors(tmp_path / "a", {"x": Short(np.zeros(9, np.float32), "F32")}, {})
    assert names(tmp_path) == []


# ---------------------------------------------------------------- shards


def test_shards_are_packed_in_order_and_found_through_the_index(tmp_path: Path) -> None:
    sizes = {"a": 10, "b": 30, "c": 90, "d": 5, "e": 35, "f": 1}
    tensors = {name: Made(TensorInfo("F32", (size,))) for name, size in sizes.items()}
    seen: list[int] = []
    source = Path(__file__)
    written = write_sharded(
        tmp_path, "model", tensors, {"k": "v"}, 160, sources=[source], progress=seen.append
    )
    assert [path.name for path in written] == [
        *(f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)),
        "model.safetensors.index.json",
    ]
    assert names(tmp_path) == sorted(path.name for path in written)
    index = json.loads(written[-1].read_text())
    assert index["metadata"] == {"total_size": 4 * sum(sizes.values())}
    places = {"a": 1, "b": 1, "c": 2, "d": 3, "e": 3, "f": 4}
    assert index["weight_map"] == {
        name: f"model-0000{shard}-of-00004.safetensors" for name, shard in places.items()
    }
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    for path in written[:-1]:
        with safe_open(path, "np") as file:
            assert json.loads(file.metadata()[SOURCES_KEY]) == [{"name": source.name, "sha256": digest}]
            for name in file.keys():  # noqa: SIM118
                assert index["weight_map"][name] == path.name
                np.testing.assert_array_equal(file.get_tensor(name), np.arange(sizes[name]))
    assert seen[-1] == 4 * sum(sizes.values()) and len(seen) == 6


def test_what_fits_into_one_shard_needs_no_index(tmp_path: Path) -> None:
    assert write_sharded(tmp_path, "model", tiny(), {}, 48) == [tmp_path / "model.safetensors"]
    write_safetensors(tmp_path / "same", tiny(), {})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "same").read_bytes()


@pytest.mark.parametrize("shard", range(3))
def test_a_failure_in_any_shard_leaves_no_set(tmp_path: Path, shard: int) -> None:
    def fail(_: int) -> None:
        assert [path.name for path in tmp_path.glob("*/*")], "nothing was begun"
        raise KeyboardInterrupt

    tensors: dict[str, StoredTensor] = {name: tiny()["a"] for name in "abc"}
    tensors["abc"[shard]] = Made(TensorInfo("F32", (4, 3)), fail)
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "set", overwrite=False) as folder:
        write_sharded(folder, "model", tensors, {}, 48)
    assert names(tmp_path) == []


# ---------------------------------------------------------------- kill

CHILD = """
    import sys, time
    from pathlib import Path
    import numpy as np
    from avatarctl.files.tensors import TensorInfo
    from avatarctl.files.staging import staged_folder
    from avatarctl.files.writer import write_safetensors, write_sharded

    class Slow:
        def __init__(self, stop): self.info, self.stop = TensorInfo("F32", (6_000_000,)), stop
        def read(self, start, stop):
            if self.stop and start: pause()
            return np.zeros(stop - start, np.float32)

    def pause():
        print("now", flush=True)
        time.sleep(600)

    case, place = sys.argv[1], Path(sys.argv[2])
    if case == "file":
        write_safetensors(place / "a", {"x": Slow(True)}, {})
    elif case == "folder":
        with staged_folder(place / "a", overwrite=True) as folder:
            write_sharded(folder, "a", {"x": Slow(False), "y": Slow(True)}, {}, 1)
"""


@posix
@pytest.mark.parametrize("case", ["file", "folder"])
def test_a_kill_leaves_the_older_output_and_no_torn_one(tmp_path: Path, case: str) -> None:
    if case == "file":
        write_safetensors(tmp_path / "a", tiny(), {})
    elif case == "folder":
        (tmp_path / "a").mkdir()
        write_safetensors(tmp_path / "a" / "model.safetensors", tiny(), {})
    command = [sys.executable, "-c", textwrap.dedent(CHILD), case, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "now\n"
        child.kill()
    finals = [name for name in names(tmp_path) if not name.startswith(".tmp-")]
    assert len(finals) < len(names(tmp_path)), "the kill came after the writing"
    if case == "file":
        assert finals == ["a"] and torch.equal(load_file(tmp_path / "a")["a"], torch.ones(4, 3))
    else:
        assert finals == ["a"] and names(tmp_path / "a") == ["model.safetensors"]
        assert torch.equal(load_file(tmp_path / "a" / "model.safetensors")["a"], torch.ones(4, 3))
