"""Blended windows in every order: the same bits, as many passes as the formulas say, and no frame or window
held that nobody needs.

F frames per window, o of them shared with the window before, M = ceil(F / (F - o)) - 1 later windows that
overlap one window, W windows, S steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor, nn

from avatarctl.config import LongVideo, RunConfig
from avatarctl.events import Event, StepFinished, silent
from avatarctl.family import Condition, Family, Guidance, Inputs, Modules, Plan, Prepared, Span
from avatarctl.flow_matching import shifted_sigmas
from avatarctl.live_bytes import LiveBytes
from avatarctl.rng import latent_noise
from avatarctl.sampling.denoise import Denoiser
from avatarctl.sampling.fused import sample_fused
from avatarctl.sampling.window_order import last_overlapping, pass_order

F = 5
SHAPE = (2, 1, 1)
Last = Literal["full", "short", "moved back"]
Schedule = Literal["auto", "step", "wavefront"]
NOISE = torch.randn(1, SHAPE[0], 140, *SHAPE[1:], generator=torch.Generator().manual_seed(0))


def windows(count: int, overlap: int, last: Last, length: int = F) -> list[Span] | None:
    """The windows of a video; None where there is no such last window."""
    hop = length - overlap
    frames = length + (count - 1) * hop
    if last != "full":
        if hop == 1 or count == 1:
            return None
        frames -= hop // 2
    spans = []
    for index in range(count):
        start = index * hop
        if last == "moved back":
            start = min(start, frames - length)
        spans.append(Span(index, start, min(length, frames - start), (0, 0), 0, 0))
    return spans


class Keep:
    def push(self, latents: Tensor) -> Tensor:
        return latents


class Blended:
    """Every frame depends on its whole window, on the window's place and on the step; the head is blended by
    sums that hide no rounding."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans
        self.prepared: list[weakref.ref[Prepared]] = []
        self.most_alive = 0

    def open(self, modules: Modules, inputs: Inputs, cfg: RunConfig) -> None:
        return None

    def encode(self, modules: Modules, inputs: Inputs, span: Span, state: None, carry: None) -> None:
        return None

    def build_condition(self, encoded: None) -> Condition:
        return Condition(None, None, None, {}, {})

    def noise_key(self, span: Span, inputs: Inputs) -> tuple[tuple[int, ...], int]:
        return (inputs.job,), span.start

    def branches(self, guidance: Guidance, step: int) -> tuple[str, ...]:
        return ("full",)

    def prepare(self, dit: nn.Module, condition: Condition, branches: Sequence[str], state: None) -> Prepared:
        prepared = Prepared(None, {})
        self.prepared.append(weakref.ref(prepared))
        return prepared

    def predict(
        self, dit: nn.Module, x: Tensor, t: Tensor, prepared: Prepared, branches: Sequence[str],
        *, span: Span, step: int, state: None,
    ) -> dict[str, Tensor]:  # fmt: skip
        self.prepared = [each for each in self.prepared if each() is not None]
        self.most_alive = max(self.most_alive, len(self.prepared))
        return {"full": torch.sin(3 * x.cumsum(2) + span.start) + t / 1000 * x.mean(2, keepdim=True)}

    def combine(self, velocities: Mapping[str, Tensor], guidance: Guidance, step: int) -> Tensor:
        return velocities["full"]

    def fuse(self, new: Tensor, written: Tensor, span: Span, step: int, state: None) -> Tensor:
        before = self.spans[span.index - 1] if span.index else span
        shared = written.shape[2]
        assert shared == (before.start + before.frames - span.start if span.index else 0)
        if step == 0 or shared == 0:
            return new
        later = (torch.arange(shared) + 1).view(1, 1, -1, 1, 1) / (shared + 1)
        blended = later * new[:, :, :shared] + (1 - later) * written
        return torch.cat([blended, new[:, :, shared:]], dim=2)

    def decoder(self, modules: Modules, state: None) -> Keep:
        return Keep()


def stored(seed: int, key: Any, first: int, frames: int, shape: Any) -> Tensor:
    return NOISE[:, :, first : first + frames]


def run(
    family: Blended, steps: int, schedule: Schedule, noise: Any = stored, shape: tuple[int, int, int] = SHAPE,
    emit: Callable[[Event], None] = silent,
) -> Iterator[Tensor]:  # fmt: skip
    """Frames [C, n, h, w] as they are finished."""
    spans = family.spans
    plan = Plan("fused", lambda: iter(spans), len(spans), spans[-1].start + spans[-1].frames, shape)
    denoise = Denoiser(
        cast(Family, family), nn.Identity(), Guidance(1.0), shifted_sigmas(steps, 5.0), noise, emit
    )
    inputs = Inputs(torch.zeros(1), cast(Any, None), 0, 0.0, 1.0, "", "", 7, silent)
    cfg = replace(RunConfig(), long_video=LongVideo(schedule=schedule))
    for block in sample_fused(denoise, cast(Any, None), inputs, plan, cfg):
        yield block.pixels


def later(overlap: int, length: int = F) -> int:
    return -(-length // (length - overlap)) - 1


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So that two runs sum in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("last", ["full", "short", "moved back"])
@pytest.mark.parametrize("overlap", range(F))
def test_wavefront_is_step_order_bit_for_bit(overlap: int, last: Last) -> None:
    for count in range(1, 13):
        spans = windows(count, overlap, last)
        if spans is None:
            continue
        steps = 1 + (count + overlap) % 6
        frames = {}
        for schedule in ("step", "wavefront"):
            blocks = list(run(Blended(spans), steps, schedule))
            frames[schedule] = torch.cat(blocks, dim=1)
        assert frames["step"].shape[1] == spans[-1].start + spans[-1].frames
        assert torch.equal(frames["step"], frames["wavefront"]), (count, steps)


@pytest.mark.parametrize("overlap", range(F))
def test_passes_before_the_first_frames_and_windows_alive(overlap: int) -> None:
    m = later(overlap)
    for count, steps in ((count, 1 + count % 6) for count in (*range(1, 13), 22, 26)):
        spans = windows(count, overlap, "full")
        assert spans is not None
        # A video may have fewer windows than overlap.
        wavefront = sum(min(m * step + 1, count) for step in range(steps))
        if count > m * (steps - 1):
            assert wavefront == steps + m * steps * (steps - 1) // 2
        alive = {"step": count if steps > 1 else 1, "wavefront": min(m * (steps - 1) + 1, count)}
        for schedule, passes in {"step": (steps - 1) * count + 1, "wavefront": wavefront}.items():
            finished: list[Event] = []
            family = Blended(spans)
            frames = run(family, steps, cast(Schedule, schedule), emit=finished.append)
            assert next(frames).shape[1] == (F - overlap if count > 1 else F)
            assert sum(isinstance(event, StepFinished) for event in finished) == passes, (count, steps)
            for _ in frames:
                pass
            assert family.most_alive <= alive[schedule]
            if count > m * (steps - 1) or schedule == "step":
                assert family.most_alive == alive[schedule]


@pytest.mark.parametrize("last", ["full", "short", "moved back"])
@pytest.mark.parametrize("overlap", range(F))
def test_auto_takes_wavefront_where_it_keeps_fewer_windows_alive(overlap: int, last: Last) -> None:
    """Wherever the last window falls: one that was moved back overlaps more, and only at the end."""
    for count in range(1, 25):
        for steps in range(1, 7):
            spans = windows(count, overlap, last)
            if spans is None:
                continue
            wanted: Schedule = "wavefront" if count > later(overlap) * (steps - 1) + 1 else "step"
            assert list(pass_order(spans, steps, "auto")) == list(pass_order(spans, steps, wanted))


@pytest.mark.parametrize("last", ["full", "short", "moved back"])
@pytest.mark.parametrize("overlap", [0, 5, 10, 20])
def test_no_pass_runs_before_what_it_reads(overlap: int, last: Last) -> None:
    spans = windows(30, overlap, last, 21)
    if spans is None:
        return
    needs = last_overlapping(spans)
    for schedule in ("step", "wavefront"):
        done: set[tuple[int, int]] = set()
        for window, step in pass_order(spans, 7, schedule):
            assert step == 0 or {(each, step - 1) for each in range(needs[window] + 1)} <= done
            assert window == 0 or (window - 1, step) in done
            done.add((window, step))
        assert len(done) == 30 * 7


@pytest.mark.parametrize("overlap", [0, 2, 5, 10])
def test_a_last_window_that_was_moved_back_keeps_at_most_one_more_alive(overlap: int) -> None:
    m = later(overlap, 21)
    for steps in (1, 2, 6):
        count = m * (steps - 1) + 4
        spans = windows(count, overlap, "moved back", 21)
        assert spans is not None
        finished: list[Event] = []
        family = Blended(spans)
        frames = run(family, steps, "auto", latent_noise, emit=finished.append)
        next(frames)
        passes = sum(isinstance(event, StepFinished) for event in finished)
        assert passes == steps + m * steps * (steps - 1) // 2
        for _ in frames:
            pass
        assert family.most_alive <= m * (steps - 1) + 2


def test_overlap_of_a_last_window_that_was_moved_back() -> None:
    """It shares frames even where no others do, and is waited for."""
    spans = windows(4, 0, "moved back")
    assert spans is not None
    assert [span.start for span in spans] == [0, 5, 10, 13]
    assert last_overlapping(spans) == [0, 1, 3, 3]


@pytest.mark.parametrize("overlap", [0, 2, 4])
def test_live_latents_do_not_grow_with_the_length(overlap: int) -> None:
    """Noise is made again, a level keeps what will still be read, and a finished frame goes."""
    steps, shape = 3, (4, 16, 16)
    m, hop, frame = later(overlap), F - overlap, 4 * 4 * 16 * 16
    peaks = []
    for count in (12, 30):
        spans = windows(count, overlap, "full")
        assert spans is not None
        resting = []
        with LiveBytes() as live:
            for pixels in run(Blended(spans), steps, "wavefront", latent_noise, shape):
                resting.append((live.current - pixels.numel() * 4) / frame)
        peaks.append(live.peak)
        # Per step all that the overlapping windows span, less in the last; small change for step numbers.
        assert max(resting) <= (steps - 1) * (F + m * hop) + overlap + 0.5
        assert max(resting[-1:]) < 0.5, "something is left when all frames are out"
    assert peaks[0] == peaks[1]
