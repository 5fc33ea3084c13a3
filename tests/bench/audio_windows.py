"""What does encoding long audio in windows change?

    python tests/bench/audio_windows.py

The audio encoder attends to a whole recording at once, so beyond `long_video.audio_window` (30 s) the audio
is encoded in windows that overlap by 2 s and are cut in the middle of what they share. This compares
their features with those of one piece, by the distance of a frame from the nearest cut.

The encoder is the built-in one, whose weights are random: the published wav2vec2 weights were not available.
How far a trained encoder looks, and so what its windows change, this cannot say.

The encoder's first layer is normalised by the moments of the whole recording in both cases, so what is
left is attention that ends at a window's edges.
"""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from reporting import print_table, write_voice

from avatarctl.family import AudioEncoder
from avatarctl.loading.built_in import build_random_modules
from avatarctl.media import Waveform, open_audio, survey, write_audio
from avatarctl.models.encode import PIECE_OVERLAP_SECONDS, AudioFeatures, pieces
from avatarctl.registry import find_model
from avatarctl.timeline import FPS, SAMPLE_RATE, frames_of_samples

SECONDS = 120
WINDOWS = (30, 10)
EDGES = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0, float("inf"))  # distance from the nearest cut, s
MEDIA = Path(__file__).resolve().parents[3] / "shared" / "media"


def speeches(folder: Path) -> Path | None:
    """The recordings beside the checkout, one after another and over again until SECONDS are full."""
    files = sorted(MEDIA.glob("speech_*.wav"))
    if not files:
        return None
    parts = []
    for file in files:
        with Waveform(open_audio(file)) as waveform:
            parts.append(waveform.read(0, survey(open_audio(file)).samples))
    joined = np.resize(np.concatenate(parts), SECONDS * SAMPLE_RATE)
    write_audio(folder / "speeches.wav", joined, SAMPLE_RATE)
    return folder / "speeches.wav"


def features(encoder: AudioEncoder, path: Path, window: float | None) -> torch.Tensor:
    """[frames, width] as a run computes them."""
    audio = open_audio(path)
    surveyed = survey(audio)
    frames = frames_of_samples(surveyed.samples)
    with Waveform(audio) as waveform:
        source = AudioFeatures(
            encoder,
            waveform,
            samples=surveyed.samples,
            mean=surveyed.mean,
            variance=surveyed.variance,
            frames=frames,
            window_seconds=window,
            device=torch.device("cpu"),
        )
        return source.rows(0, frames)[0]


def distance_from_cuts(frames: int, window: int) -> torch.Tensor:
    """[frames]: seconds from the middle of a frame to the nearest cut."""
    cut = pieces(frames, window * FPS, int(PIECE_OVERLAP_SECONDS * FPS))
    positions = torch.tensor([float(piece.keep) for piece in cut[1:]])
    middles = torch.arange(frames) + 0.5
    return (middles[:, None] - positions).abs().amin(dim=1) / FPS


def relative(difference: torch.Tensor, whole: torch.Tensor) -> float:
    return (difference.norm() / whole.norm()).item()


def compare(name: str, path: Path, encoder: AudioEncoder) -> None:
    whole = features(encoder, path, None)
    columns, differences = [], []
    for window in WINDOWS:
        differences.append(features(encoder, path, window) - whole)
        columns.append(distance_from_cuts(len(whole), window))

    def cells(chosen: list[torch.Tensor]) -> list[str]:
        found = []
        for rows, difference in zip(chosen, differences, strict=True):
            if not rows.any():
                found += ["no frames", ""]
                continue
            largest = difference[rows].abs().max().item()
            found += [f"{relative(difference[rows], whole[rows]):.2%}", f"{largest:.3f}"]
        return found

    header = ["seconds from the nearest cut"]
    for window in WINDOWS:
        header += [f"{window} s windows: relative L2", "largest difference"]
    rows = []
    for low, high in pairwise(EDGES):
        label = f"{low:g} to {high:g}" if high < float("inf") else f"more than {low:g}"
        rows.append((label, *cells([(column >= low) & (column < high) for column in columns])))
    rows.append(("all frames", *cells([torch.ones_like(column, dtype=torch.bool) for column in columns])))
    print_table(
        f"audio_windows: {name}, {len(whole) / FPS:g} s, windows that overlap by {PIECE_OVERLAP_SECONDS:g} s",
        header,
        rows,
        f"Features: root mean square {whole.square().mean().sqrt().item():.3f}, largest magnitude "
        f"{whole.abs().max().item():.2f}. Random weights; the published ones were not available here.",
    )


def main() -> None:
    encoder = build_random_modules(find_model("cartoon-i2v")).audio
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compare("built-in voice", write_voice(folder / "voice.wav", SECONDS), encoder)
        real = speeches(folder)
        if real is None:
            print("audio_windows: no recordings beside the checkout; only the built-in voice was measured")
        else:
            compare("three recordings, repeated", real, encoder)


if __name__ == "__main__":
    main()
