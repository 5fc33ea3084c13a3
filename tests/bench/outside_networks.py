"""How much of a run is spent outside the networks?

    python tests/bench/outside_networks.py

cartoon-i2v at its own settings (64x64, 4 steps, one branch) with 60 s of audio, from reading the audio to the
renamed MP4; imports and loading excluded. Once with the built-in voice as it is (16 kHz mono), once as
44.1 kHz stereo, which has five times the samples to resample and to encode. Clocks stand around the
forward calls of the transformer, the text and audio encoders and the VAE's coders and convolutions, nowhere
else. Target: at most 5 % of the wall time outside them.

The cartoon networks are tiny: with published ones the same work around them is a far smaller share.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from reporting import print_table, verdict, write_voice
from torch import nn

from avatarctl.demo.sample import sample_image
from avatarctl.events import silent
from avatarctl.media import BackgroundWriter, Waveform, open_audio
from avatarctl.media.video import VideoWriter
from avatarctl.pipelines import infer, job
from avatarctl.registry import configure, find_model
from avatarctl.rng import latent_noise

SECONDS = 60
AUDIOS = {"16 kHz mono": (16_000, 1), "44.1 kHz stereo": (44_100, 2)}
RUNS = 3
LIMIT = 0.05
WHOLE, OTHER = "whole run", "other (conditions, guidance, Euler steps, Python)"


@dataclass
class Clock:
    """Wall seconds by label. The outermost open label of a thread gets the time."""

    wall: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    here: threading.local = field(default_factory=threading.local)

    def timed(self, label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if getattr(self.here, "open", False):
                return call(*args, **kwargs)
            self.here.open = True
            wall = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.wall[label] += time.perf_counter() - wall
                self.here.open = False

        return run


# The built-in classes, of which the protocols in avatarctl.family say less.
NETWORKS: dict[str, Callable[[Any], tuple[nn.Module, ...]]] = {
    "transformer": lambda modules: (modules.dit,),
    "VAE decode": lambda modules: (modules.vae.vae.post_quant_conv, modules.vae.vae.decoder),
    "VAE encode": lambda modules: (modules.vae.vae.encoder, modules.vae.vae.quant_conv),
    "audio encoder": lambda modules: (modules.audio,),
    "text encoder": lambda modules: (modules.text.encoder,),
}

# On the writer's own thread: it runs beside the networks, so its time is not the run's.
BESIDE: dict[str, tuple[tuple[Any, str], ...]] = {
    "H.264: colours, encoding, writing": ((VideoWriter, "_write_frame"),),
    "AAC: reading the soundtrack, encoding, writing": ((VideoWriter, "_write_audio"),),
}

AROUND: dict[str, tuple[tuple[Any, str], ...]] = {
    "waiting for the writer, finishing the file": (
        (BackgroundWriter, "write"),
        (BackgroundWriter, "finish"),
    ),
    "first pass over the audio": ((job, "survey"),),
    "decoding and resampling the audio": ((Waveform, "read"),),
    "pixels to bytes": ((infer, "_to_bytes"),),
}


def one_run(audio: Path, out: Path, seconds: int) -> Clock:
    row, clock = find_model("cartoon-i2v"), Clock()
    work = job.Job(sample_image(), open_audio(audio), "a person is talking", "")
    plan = job.check_job(configure(), row, work, silent)
    assert plan.video.frames == seconds * 25
    modules = infer.load(plan)
    for label, parts_of in NETWORKS.items():
        for part in parts_of(modules):
            part.forward = clock.timed(label, part.forward)
    with ExitStack() as stack:
        stack.enter_context(patch.object(infer, "load", lambda *_, **__: modules))
        for label, calls in (AROUND | BESIDE).items():
            for owner, name in calls:
                stack.enter_context(patch.object(owner, name, clock.timed(label, getattr(owner, name))))
        noise = {"noise": clock.timed("noise", latent_noise)}
        stack.enter_context(patch.dict(infer.generate.__kwdefaults__, noise))
        wall = time.perf_counter()
        infer.write_video(job.check_job(configure(), row, work, silent), out)
        whole = time.perf_counter() - wall
    beside = sum(clock.wall[label] for label in BESIDE)
    clock.wall[OTHER] = whole - (sum(clock.wall.values()) - beside)
    clock.wall[WHOLE] = whole
    return clock


def median_of(runs: list[Clock], labels: list[str], share: bool) -> float:
    """Median over the runs of the seconds of all labels together, or of their share of the whole run."""
    return statistics.median(
        sum(run.wall[label] for label in labels) / (run.wall[WHOLE] if share else 1) for run in runs
    )


def report(name: str, runs: list[Clock]) -> None:
    outside = [*AROUND, "noise", OTHER]

    def row(what: str, labels: list[str], judged: str = "") -> tuple[str, ...]:
        seconds, share = median_of(runs, labels, share=False), median_of(runs, labels, share=True)
        return (what, f"{seconds:.2f}", f"{share:.2%}", judged)

    met = verdict(median_of(runs, outside, share=True), LIMIT)
    print_table(
        f"outside_networks: cartoon-i2v, {SECONDS} s of {name}, medians of {len(runs)} runs",
        ("", "wall s", "of wall", f"≤ {LIMIT:.0%} of wall"),
        [
            row("whole run", [WHOLE]),
            *(row(f"network: {label}", [label]) for label in NETWORKS),
            *(row(f"outside: {label}", [label]) for label in outside),
            row("**outside the networks**", outside, met),
            *(row(f"beside, on the writer's thread: {label}", [label]) for label in BESIDE),
        ],
        f"torch threads: {torch.get_num_threads()}",
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one_run(write_voice(folder / "warm.wav", 2), folder / "warm.mp4", 2)
        for title, (rate, channels) in AUDIOS.items():
            audio = write_voice(folder / f"{rate}.wav", SECONDS, rate, channels)
            report(title, [one_run(audio, folder / f"{rate}-{run}.mp4", SECONDS) for run in range(RUNS)])


if __name__ == "__main__":
    main()
