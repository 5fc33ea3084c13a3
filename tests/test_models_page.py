"""docs/models.md names every row with its source and files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from avatarctl.registry import ROWS, Row

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
LINES = {line.split("`")[1]: line for line in PAGE.splitlines() if line.startswith("| `")}
SHARD = re.compile(r"diffusion_pytorch_model(-\d+-of-\d+\.safetensors|\.safetensors\.index\.json)")


@pytest.mark.parametrize(
    "row", [row for row in ROWS.values() if row.source != "package"], ids=lambda r: r.name
)
def test_every_row_has_its_line(row: Row) -> None:
    line = LINES[row.name]
    assert f"| {row.kind} |" in line
    assert row.license in line and row.obtained in line
    assert all(f"`{name}`" in line for name in row.needs)
    assert f"`{row.hub_id}`" in line if row.hub_id else "by hand" in line or not row.files
    encoders = "the same encoders" in line
    for name in (name for names in row.files for name in names.split("|")):
        shared = encoders and f"`{name}`" in LINES["wan2.1-t2v-14b"]
        assert f"`{name}`" in line or SHARD.fullmatch(name) or shared, name


def test_no_line_without_a_row() -> None:
    assert {name for name, line in LINES.items() if line.count("|") == 5 and "HF_" not in name} <= ROWS.keys()
