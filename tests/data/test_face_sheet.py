"""The page of aligned faces is that of the present mask and samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avatarctl.data import face_sheet
from avatarctl.data.face_sheet import draw_face_sheet
from avatarctl.data.samples import Sample


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the samples that were looked at for a page, and a frame of each without its video."""
    names: list[str] = []

    def faces_of(sample: Sample) -> tuple[list[np.ndarray], str]:
        names.append(sample.name)
        return [np.full((64, 64, 3), 90, np.uint8)], "64 px"

    monkeypatch.setattr(face_sheet, "_faces_of", faces_of)
    return names


def sample(name: str) -> Sample:
    return Sample(name, Path(name), Path(name), None, None)


def test_another_mask_or_other_samples_draw_the_page_anew(tmp_path: Path, drawn: list[str]) -> None:
    page, samples = tmp_path / "faces.png", [sample("a"), sample("b")]
    upper, lower = np.full((64, 64), 255, np.uint8), np.full((64, 64), 255, np.uint8)
    upper[:32], lower[32:] = 0, 0

    def draw(mask: np.ndarray = upper, of: list[Sample] = samples, making: tuple[str, ...] = ("x",)) -> int:
        drawn.clear()
        draw_face_sheet(page, of, mask, making)
        return len(drawn)

    assert draw() == 2 and draw() == 0
    first = np.asarray(Image.open(page).convert("RGB"))
    assert draw(mask=lower) == 2 and draw(mask=lower) == 0
    assert (np.asarray(Image.open(page).convert("RGB")) != first).any()
    assert draw() == 2, "the mask before"
    assert draw(of=[*samples, sample("c")]) == 3
    assert draw() == 2 and draw(making=("y",)) == 2, "the same samples, cut otherwise"
    page.write_bytes(page.read_bytes()[:40])
    assert draw(making=("y",)) == 2, "what is no page is drawn over"


def test_half_of_a_page_is_of_doubtful_samples(tmp_path: Path, drawn: list[str]) -> None:
    """With the worst of each of three: presence, filled frames, steps."""
    samples = [sample(f"{number:03d}") for number in range(200)]
    doubts = {each.name: (0.999, 0.0, 0.01) for each in samples}
    doubts |= {f"{n:03d}": (0.5 + n / 100, 0.0, 0.01) for n in range(11, 15)}
    doubts |= {f"{n:03d}": (0.999, 40.0 - n, 0.01) for n in range(21, 25)}
    doubts |= {f"{n:03d}": (0.999, 0.0, n / 100) for n in range(31, 35)}
    mask = np.full((64, 64), 255, np.uint8)
    draw_face_sheet(tmp_path / "faces.png", samples, mask, (), doubts)
    assert drawn[:3] == ["011", "021", "034"], "the worst of each"
    assert set(drawn[:12]) == {f"{n:03d}" for first in (11, 21, 31) for n in range(first, first + 4)}
    assert len(set(drawn)) == 24 and drawn[12] == "000" and drawn[-1] == "199"
    drawn.clear()
    draw_face_sheet(tmp_path / "few.png", samples[:24], mask, (), doubts)
    assert drawn == [each.name for each in samples[:24]]
