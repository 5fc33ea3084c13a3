"""How much of a run is spent outside the networks?

    python tests/bench/outside_networks.py

cartoon-i2v at its own settings (64x64, 4 steps, one branch) with 60 s of sound, from reading the sound to the
renamed MP4; imports and loading excluded. Once with the built-in voice as it is (16 kHz mono), once as
44.1 kHz stereo, which has five times the samples to resample and to encode. Clocks stand around the
forward calls of the transformer, the text and audio encoders and the VAE's coders and convolutions, nowhere
else. Target: at most 5 % of the wall time outside them.

The cartoon networks are tiny: with published ones the same work around them is a far smaller share.
"""

from __future__ import annotations

import statistics
import tempfile
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

from avatarctl.demo.sample import sample_picture
from avatarctl.events import silent
from avatarctl.media import Waveform, open_sound
from avatarctl.media.video import VideoWriter
from avatarctl.pipelines import infer, job
from avatarctl.registry import configure, find_model
from avatarctl.sampling import chunks

SECONDS = 60
SOUNDS = {"16 kHz mono": (16_000, 1), "44.1 kHz stereo": (44_100, 2)}
RUNS = 3
LIMIT = 0.05
WHOLE, OTHER = "whole run", "other (conditions, guidance, Euler steps, Python)"


@dataclass
class Clock:
    """Seconds by label, wall and CPU of all threads. The outermost open label gets the time."""

    wall: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    open: bool = False

    def timed(self, label: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.open:
                return call(*args, **kwargs)
            self.open = True
            cpu, wall = time.process_time(), time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.wall[label] += time.perf_counter() - wall
                self.cpu[label] += time.process_time() - cpu
                self.open = False

        return run


# The built-in classes, of which the protocols in avatarctl.family say less.
NETWORKS: dict[str, Callable[[Any], tuple[nn.Module, ...]]] = {
    "transformer": lambda modules: (modules.dit,),
    "VAE decode": lambda modules: (modules.vae.vae.post_quant_conv, modules.vae.vae.decoder),
    "VAE encode": lambda modules: (modules.vae.vae.encoder, modules.vae.vae.quant_conv),
    "audio encoder": lambda modules: (modules.audio,),
    "text encoder": lambda modules: (modules.text.encoder,),
}

AROUND: dict[str, tuple[tuple[Any, str], ...]] = {
    "H.264: colours, encoding, writing": ((VideoWriter, "_write_frame"), (VideoWriter, "finish")),
    "AAC: reading the soundtrack, encoding, writing": ((VideoWriter, "_write_sound"),),
    "first pass over the sound": ((job, "survey"),),
    "decoding and resampling the sound": ((Waveform, "read"),),
    "noise": ((chunks, "latent_noise"),),
    "pixels to bytes": ((infer, "_to_bytes"),),
}


def one_run(sound: Path, out: Path, seconds: int) -> Clock:
    row, clock = find_model("cartoon-i2v"), Clock()
    work = job.Job(sample_picture(), open_sound(sound), "a person is talking", "")
    plan = job.check_job(configure(), row, work, silent)
    assert plan.plan.frames == seconds * 25
    modules = infer.load(row, plan)
    for label, parts_of in NETWORKS.items():
        for part in parts_of(modules):
            part.forward = clock.timed(label, part.forward)
    with ExitStack() as stack:
        stack.enter_context(patch.object(infer, "load", lambda *_, **__: modules))
        for label, calls in AROUND.items():
            for owner, name in calls:
                stack.enter_context(patch.object(owner, name, clock.timed(label, getattr(owner, name))))
        cpu, wall = time.process_time(), time.perf_counter()
        infer.write_video(row, work, job.check_job(configure(), row, work, silent), out)
        whole = time.perf_counter() - wall, time.process_time() - cpu
    for seconds_of, total in zip((clock.wall, clock.cpu), whole, strict=True):
        seconds_of[OTHER] = total - sum(seconds_of.values())
        seconds_of[WHOLE] = total
    return clock


def median_of(runs: list[Clock], kind: str, labels: list[str], share: bool) -> float:
    """Median over the runs of the seconds of all labels together, or of their share of the whole run."""
    figures = [getattr(run, kind) for run in runs]
    return statistics.median(
        sum(seconds[label] for label in labels) / (seconds[WHOLE] if share else 1) for seconds in figures
    )


def report(name: str, runs: list[Clock]) -> None:
    outside = [*AROUND, OTHER]

    def row(what: str, labels: list[str], judged: str = "") -> tuple[str, ...]:
        cells = []
        for kind in ("wall", "cpu"):
            cells += [
                f"{median_of(runs, kind, labels, share=False):.2f}",
                f"{median_of(runs, kind, labels, share=True):.2%}",
            ]
        return (what, *cells, judged)

    met = verdict(median_of(runs, "wall", outside, share=True), LIMIT)
    print_table(
        f"outside_networks: cartoon-i2v, {SECONDS} s of {name}, medians of {len(runs)} runs",
        ("", "wall s", "of wall", "CPU s", "of CPU", f"≤ {LIMIT:.0%} of wall"),
        [
            row("whole run", [WHOLE]),
            *(row(f"network: {label}", [label]) for label in NETWORKS),
            *(row(f"outside: {label}", [label]) for label in outside),
            row("**outside the networks**", outside, met),
        ],
        f"torch threads: {torch.get_num_threads()}. CPU time is that of all threads of the process, whoever "
        "caused it: x264's threads may still work while a network runs.",
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one_run(write_voice(folder / "warm.wav", 2), folder / "warm.mp4", 2)
        for title, (rate, channels) in SOUNDS.items():
            sound = write_voice(folder / f"{rate}.wav", SECONDS, rate, channels)
            report(title, [one_run(sound, folder / f"{rate}-{run}.mp4", SECONDS) for run in range(RUNS)])


if __name__ == "__main__":
    main()
