"""The accounting itself: what must turn red does, what may be absent skips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from .formats import FORMATS, folders, recognise
from .golden import Checks, Comparison, Folder, Format, Listed, Reader, Run, comparisons, unaccounted
from .make_subset import SUBSETS

Skipped = pytest.skip.Exception
Failed = (AssertionError, pytest.fail.Exception)


def _double(reader: Reader) -> None:
    reader.compare("out", 2 * reader.take("in"), atol=1e-6)


def _reads_nothing(reader: Reader) -> None:
    """A loop over keys that are spelt differently ends like this."""


def _compares_half(reader: Reader) -> None:
    reader.compare("out", reader.take("out"))


def _folder(
    path: Path,
    run: Run = _double,
    needs: tuple[str, ...] = ("in",),
    listed: tuple[Listed, ...] = (),
    **tensors: Tensor,
) -> Folder:
    checks = Checks()
    checks("file.safetensors", compares=("out",), needs=needs)(run)
    save_file({"in": torch.ones(2), "out": torch.full((2,), 2.0)} | tensors, path / "file.safetensors")
    return Folder(path, "here", Format("toy", tuple(checks), listed, ()))


def _only(folder: Folder) -> Comparison:
    (comparison,) = comparisons(folder)
    return comparison


def test_a_right_file_passes(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    _only(folder).run()
    assert unaccounted(folder) == []


@pytest.mark.parametrize("wrong", [2.1, float("nan")])
def test_a_wrong_number_fails(tmp_path: Path, wrong: float) -> None:
    with pytest.raises(AssertionError, match="1 of 2 values differ"):
        _only(_folder(tmp_path, out=torch.tensor([2.0, wrong]))).run()


def test_a_wrong_shape_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"\[2\], not \[1, 2\]"):
        _only(_folder(tmp_path, out=torch.full((1, 2), 2.0))).run()


@pytest.mark.parametrize("run", [_reads_nothing, _compares_half])
def test_a_check_that_leaves_a_claimed_key_unused_fails(tmp_path: Path, run: Run) -> None:
    with pytest.raises(AssertionError, match="did not use"):
        _only(_folder(tmp_path, run=run)).run()


def test_unknown_files_and_keys_are_reported(tmp_path: Path) -> None:
    folder = _folder(tmp_path, extra=torch.ones(1))
    (tmp_path / "stranger.safetensors").write_bytes(b"")
    (tmp_path / "README.md").write_text("not data")
    report = unaccounted(folder)
    assert len(report) == 2
    assert report[0].startswith("file.safetensors: extra:")
    assert report[1].startswith("stranger.safetensors:")


def test_a_listed_key_needs_no_check_but_must_not_have_one(tmp_path: Path) -> None:
    listed = (Listed("file.safetensors", "later.*", "work to come"), Listed("*", "out", "a stale row"))
    report = unaccounted(_folder(tmp_path, listed=listed, **{"later.a": torch.ones(1)}))
    assert report == ["file.safetensors: out: compared, and listed as not compared (a stale row)"]


def test_an_absent_file_or_key_skips(tmp_path: Path) -> None:
    folder = _folder(tmp_path, needs=("in", "more.*"))
    with pytest.raises(Skipped, match=r"file\.safetensors has no more\.\*"):
        _only(folder).run()
    (tmp_path / "file.safetensors").unlink()
    with pytest.raises(Skipped, match=r"file\.safetensors is not in here"):
        _only(Folder(tmp_path, "here", folder.format)).run()


def test_in_a_stated_subset_only_stated_keys_may_be_absent(tmp_path: Path) -> None:
    folder = _folder(tmp_path, needs=("in", "more.*"))
    stated = tmp_path / "subset.json"
    stated.write_text(json.dumps({"left_out": {"file.safetensors": ["more.*"]}}))
    with pytest.raises(Skipped):
        _only(folder).run()
    stated.write_text(json.dumps({"left_out": {}}))
    with pytest.raises(Failed, match=r"subset\.json does not say so"):
        _only(Folder(tmp_path, "here", folder.format)).run()


def test_json_is_compared_by_path(tmp_path: Path) -> None:
    (tmp_path / "cases.json").write_text('[{"a": [1, 2], "parts": [{"b": 3}]}]')
    reader = Reader(Folder(tmp_path, "here", FORMATS[0]), "cases.json")
    assert reader.keys("*") == ["0.a", "0.parts.0.b"]
    reader.compare("0.a", [1, 2])
    with pytest.raises(AssertionError, match="is 4, recorded 3"):
        reader.compare("0.parts.0.b", 4)


def test_a_folder_without_known_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file of a known format"):
        recognise(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        folders(str(tmp_path / "absent"))


def test_a_chosen_folder_is_the_only_one(tmp_path: Path) -> None:
    (tmp_path / "chunk_plans.json").write_text("[]")
    (chosen,) = folders(str(tmp_path))
    assert (chosen.format.name, chosen.label) == ("omniavatar", tmp_path.name)


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_the_shipped_subset_has_what_it_does_not_say_it_lacks(known: Format) -> None:
    shipped = Path(__file__).resolve().parent.parent / "golden" / known.name
    folder = Folder(shipped, "shipped", known)
    assert folder.left_out is not None
    for check in known.checks:
        for file in check.files:
            assert (file in folder.files) != ("*" in folder.left_out.get(file, ())), file
    for file in folder.files:
        for pattern in folder.left_out.get(file, ()):
            assert not Reader(folder, file).keys(pattern), f"{file} has {pattern} and says it is left out"
    assert sum(item.stat().st_size for item in shipped.iterdir()) <= SUBSETS[known.name].limit
