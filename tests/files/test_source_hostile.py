"""The checkpoint rows of the hostile corpus that are broken as files, whatever they would mean."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from avatarctl.errors import UnusableWeights
from avatarctl.files.source import open_weights
from avatarctl.files.tensors import read_whole

resource = pytest.importorskip("resource")

MEANING = (
    "nan_weight", "inf_weight", "in_dim_34", "missing_audio", "extra_keys", "key_terminal_escape",
    "lora_alpha_missing", "missing_one_lora_b", "rank_mismatch",
)  # fmt: skip
"""Well-formed files whose names, shapes or values are wrong: tested where those are understood."""

CORPUS = Path(__file__).resolve().parents[3] / "shared" / "hostile"


def rows() -> list[Any]:
    """Collected at import time for the names of the cases; without the corpus one case, which skips."""
    manifest = CORPUS / "manifest.json"
    if not manifest.is_file():
        return [pytest.param(None, id="no corpus")]
    listed = [row for row in json.loads(manifest.read_text()) if row["kind"] == "checkpoint"]
    return [pytest.param(row, id=row["file"].removeprefix("checkpoints/")) for row in listed]


@pytest.mark.parametrize("row", rows())
def test_a_row_ends_as_the_corpus_wants(
    shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AVATARCTL_CANARY", str(tmp_path / "executed"))
    path = shared_dir / "hostile" / row["file"]
    start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if row["expected"] == "accept" or any(name in row["file"] for name in MEANING):
        raw = open_weights(path)
        assert raw.tensors
        for tensor in raw.tensors.values():
            read_whole(tensor)
    else:
        with pytest.raises(UnusableWeights) as caught:
            open_weights(path)
        message = str(caught.value)
        assert message.isprintable()
        assert str(path) in message
        cause = message.removeprefix(str(path))
        assert any(re.search(wanted, cause, re.IGNORECASE) for wanted in row["message_should_mention"]), (
            message
        )
    assert time.process_time() - start < 10, "of work: waiting for other programs does not count"
    assert not list(tmp_path.iterdir()), "something was executed or left behind"
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown * (1 if sys.platform == "darwin" else 1024) < 400e6  # torch itself takes 230 MB


def test_most_rows_are_tested_here(shared_dir: Path) -> None:
    listed = [row for row in json.loads((shared_dir / "hostile/manifest.json").read_text())
              if row["kind"] == "checkpoint" and row["expected"] == "reject"]  # fmt: skip
    assert len(listed) - len(MEANING) >= 40
    assert all(any(name in row["file"] for row in listed) for name in MEANING)
