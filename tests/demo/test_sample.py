"""The built-in sample: a face and a sentence of seeds that nothing was trained on, as the loaders would give
them; and the page that is made of a video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avatarctl.demo import sample
from avatarctl.demo.clips import HELD_OUT, clip
from avatarctl.demo.contact_sheet import ContactSheet
from avatarctl.demo.sample import face_pixels, sample_audio, sample_image, sentence


def test_the_sample_is_of_seeds_that_are_never_trained_on() -> None:
    assert min(sample._FACE, sample._VOICE) >= HELD_OUT


def test_image_and_audio_are_what_the_loaders_would_give() -> None:
    image, audio = sample_image(), sample_audio()
    assert np.array_equal(image.pixels, face_pixels()) and image.pixels.shape == (64, 64, 3)
    assert (audio.rate, audio.channels) == (16_000, 1)
    assert np.array_equal(np.concatenate(list(audio.blocks()))[:, 0], sentence(100).audio)
    assert (image.sha256, audio.sha256()) == (sample_image().sha256, sample_audio().sha256())


@pytest.mark.parametrize("seconds", [0.0, 1 / 16_000, 0.2, 1.0, 4.0])
def test_the_audio_has_the_length_that_was_asked(seconds: float) -> None:
    assert sum(map(len, sample_audio(seconds).blocks())) == round(seconds * 16_000)


def test_a_contact_sheet_shows_eight_times_and_both_curves(tmp_path: Path) -> None:
    made = clip(HELD_OUT + 3, 50)
    sheet = ContactSheet(50, made.speech.opening)
    for start in range(0, 50, 17):
        sheet.add(made.frames[start : start + 17])
    agreement = sheet.agreement()
    assert agreement is not None and agreement > 0.99
    sheet.save(tmp_path / "sheet.png", "a title")
    page = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    first = np.asarray(Image.fromarray(made.frames[0]).resize((128, 128), Image.Resampling.BICUBIC))
    assert np.abs(page[36 : 36 + 128, 8 : 8 + 128] - first).max() <= 1, "the first tile is the first frame"
    assert page.shape[0] > 350, "curves below"


def test_a_contact_sheet_without_a_known_opening_measures_nothing(tmp_path: Path) -> None:
    sheet = ContactSheet(3)
    sheet.add(np.zeros((3, 40, 60, 3), np.uint8))
    assert sheet.agreement() is None
    sheet.save(tmp_path / "sheet.png", "short")
    assert Image.open(tmp_path / "sheet.png").height < 200
