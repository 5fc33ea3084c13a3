"""Fused windows in every order: the same bits, as many passes as the formulas say, and no frame or window
held that nobody needs.

F frames per window, o of them shared with the window before, M = ceil(F / (F - o)) - 1 later windows that
overlap one window, W windows, S steps. A last window that was moved back shares more than o frames.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from types import SimpleNamespace
from typing import Any, Literal, cast

import pytest
import torch
from torch import Tensor, nn

from avatarctl.conditioning.windows import WindowPlan, plan_windows
from avatarctl.config import LongVideo, RunConfig
from avatarctl.events import silent
from avatarctl.family import Condition, Decoder, Family, Guidance, Inputs, Modules, Prepared, Span, VideoPlan
from avatarctl.flow_matching import shifted_sigmas
from avatarctl.live_bytes import LiveBytes
from avatarctl.rng import latent_noise
from avatarctl.sampling import fused
from avatarctl.sampling.denoise import Denoiser
from avatarctl.sampling.fused import sample_fused
from avatarctl.sampling.window_order import last_overlapping, pass_order
from avatarctl.timeline import SAMPLES_PER_FRAME, pixel_frames

F = 5
SHAPE = (2, 1, 1)
Last = Literal["full", "short", "moved back"]
Schedule = Literal["auto", "step", "wavefront"]
NOISE = torch.randn(1, SHAPE[0], 140, *SHAPE[1:], generator=torch.Generator().manual_seed(0))


def cuts(count: int, length: int, overlap: int, last: Last) -> Sequence[int]:
    """By how many frames a last window can be short or moved back; a lone one has nowhere to move."""
    if last == "full":
        return (0,)
    return range(1, length - overlap) if count > 1 else range(1, length - 1) if last == "short" else ()


def planned(count: int, length: int, overlap: int, last: Last, cut: int) -> WindowPlan:
    """The plan of a video of `count` windows, the last of which has `cut` new frames less than it could."""
    published = last == "short"
    latents = length + (count - 1) * (length - overlap) - cut
    # Of the last latent frame all or some are shown.
    frames = pixel_frames(latents) - (0 if published else latents % 4)
    samples = frames * SAMPLES_PER_FRAME
    if overlap == 1:
        # Refused, as one frame cannot be cross-faded; but in which order windows go does not ask.
        return WindowPlan(samples, frames, latents, min(length, latents), overlap, count, published)
    shared = pixel_frames(overlap) if overlap else 0
    plan = plan_windows(samples, length=pixel_frames(length), overlap=shared, published=published)
    assert (plan.count, plan.latent_frames, plan.video_frames) == (count, latents, frames)
    return plan


def windows(count: int, overlap: int, last: Last, length: int = F) -> list[Span] | None:
    """The windows of such a video; None where there is no such last window."""
    possible = cuts(count, length, overlap, last)
    if not possible:
        return None
    return list(planned(count, length, overlap, last, possible[(len(possible) - 1) // 2]).spans())


class Keep:
    def push(self, latents: Tensor) -> Tensor:
        return latents


class Unrolled:
    """One pixel frame for the first latent frame and four for every other, which remember all before them:
    what is pushed twice, not at all or out of turn is seen."""

    def __init__(self) -> None:
        self.pushed: list[Tensor] = []
        self.memory = torch.zeros(1)

    def push(self, latents: Tensor) -> Tensor:
        seen = self.memory + latents.cumsum(2)
        self.memory = seen[:, :, -1:]
        self.pushed.append(latents)
        frames = torch.sin(3 * seen).repeat_interleave(4, dim=2)
        return frames if len(self.pushed) > 1 else frames[:, :, 3:]


class Mixing(nn.Module):
    """Every frame gets all frames of its window, and where the window is and how noisy; none adds up."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(F, F, generator=draws))

    def forward(self, x: Tensor, t: Tensor, start: int) -> Tensor:
        """[1, C, n, h, w] -> the same shape, within -1 and 1."""
        mixed = x.movedim(2, 4) @ self.weight[: x.shape[2], : x.shape[2]]
        return torch.sin(2 * mixed + (start + float(t) / 1000)).movedim(4, 2)


class Begun:
    """What is prepared for a window."""

    def __init__(self, window: int) -> None:
        self.window = window


class Blended:
    """Windows that are blended by sums that hide no rounding; without an overlap the later one owns what a
    last window that was moved back shares."""

    def __init__(self, spans: Sequence[Span], overlap: int, codec: Decoder) -> None:
        self.spans, self.overlap, self.codec = spans, overlap, codec
        self.begun: weakref.WeakSet[Begun] = weakref.WeakSet()
        self.passes: Counter[tuple[int, int]] = Counter()
        self.most_alive = 0

    def open(self, modules: Modules, inputs: Inputs, cfg: RunConfig) -> None:
        return None

    def encode(self, modules: Modules, inputs: Inputs, span: Span, state: None, carry: None) -> Tensor:
        return torch.tensor(span.index)

    def build_condition(self, encoded: Tensor) -> Condition:
        return Condition(None, None, None, {}, {}, {"window": encoded})

    def noise_key(self, span: Span, inputs: Inputs) -> tuple[tuple[int, ...], int]:
        return (inputs.job,), span.start

    def branches(self, guidance: Guidance, step: int) -> tuple[str, ...]:
        return ("full",)

    def prepare(self, dit: nn.Module, condition: Condition, branches: Sequence[str], state: None) -> Prepared:
        begun = Begun(int(condition.extra["window"]))
        self.begun.add(begun)
        return Prepared(begun, {})

    def predict(
        self, dit: nn.Module, x: Tensor, t: Tensor, prepared: Prepared, branches: Sequence[str],
        *, span: Span, step: int, state: None,
    ) -> dict[str, Tensor]:  # fmt: skip
        assert prepared.shared.window == span.index
        self.passes[span.index, step] += 1
        self.most_alive = max(self.most_alive, len(self.begun))
        return {"full": dit(x, t, span.start)}

    def combine(self, velocities: Mapping[str, Tensor], guidance: Guidance, step: int) -> Tensor:
        return velocities["full"]

    def fuse(self, new: Tensor, written: Tensor, span: Span, step: int, state: None) -> Tensor:
        before = self.spans[span.index - 1] if span.index else span
        shared = written.shape[2]
        assert shared == (before.start + before.frames - span.start if span.index else 0)
        if step == 0 or shared == 0 or self.overlap == 0:
            return new
        return torch.cat([written.lerp(new[:, :, :shared], LATER[shared]), new[:, :, shared:]], dim=2)

    def decoder(self, modules: Modules, state: None) -> Decoder:
        return self.codec


def stored(seed: int, key: Any, first: int, frames: int, shape: Any) -> Tensor:
    return NOISE[:, :, first : first + frames]


NETWORK = Mixing()
LATER = [torch.linspace(0, 1, shared + 2)[1:-1].view(-1, 1, 1) for shared in range(F)]


def run(
    family: Blended, steps: int, schedule: Schedule, noise: Any = stored, shape: tuple[int, int, int] = SHAPE,
    *, frames: int | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Frames [C, n, h, w] as they are finished; frames: of the video, where the last are cut off."""
    spans = family.spans
    if frames is None:
        frames = pixel_frames(spans[-1].start + spans[-1].frames)
    plan = VideoPlan("fused", lambda: iter(spans), len(spans), frames, shape)
    denoise = Denoiser(
        cast(Family, family), NETWORK, Guidance(1.0), shifted_sigmas(steps, 5.0).tolist(), noise
    )
    inputs = Inputs(torch.zeros(1), cast(Any, None), 0, 0.0, 1.0, "", "", 7, silent)
    cfg = replace(RunConfig(), long_video=LongVideo(schedule=schedule))
    modules = cast(Modules, SimpleNamespace(device=torch.device("cpu")))
    for block in sample_fused(denoise, modules, inputs, plan, cfg):
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


def reach(spans: Sequence[Span]) -> list[int]:
    """For each window the last that shares a frame with it, counted frame by frame."""
    frames = [set(range(span.start, span.start + span.frames)) for span in spans]
    return [max(late for late, theirs in enumerate(frames) if own & theirs) for own in frames]


def counted(spans: Sequence[Span], steps: int) -> tuple[int, int]:
    """Wavefront: passes before the first frames, and most windows alive. A window can make a step when all
    that share frames with it have made the step before, and so on down to the first."""
    last = reach(spans)
    needed = [[window] for window in range(len(spans))]  # for its last step, for the one before, ...
    for chain in needed:
        for _ in range(steps - 1):
            chain.append(last[chain[-1]])
    return sum(window + 1 for window in needed[0]), max(chain[-1] - chain[0] + 1 for chain in needed)


def check_formulas(passes: int, alive: int, spans: Sequence[Span], steps: int, m: int, moved: bool) -> None:
    """What `counted` counts is what the closed forms say; of windows moved back, M is of their own frames."""
    count = len(spans)
    if count > m * (steps - 1) + (2 if moved else 0):  # the first frames wait for no window moved back
        assert passes == steps + m * steps * (steps - 1) // 2
    if not moved:
        assert passes == sum(min(m * step + 1, count) for step in range(steps))
        assert alive == min(m * (steps - 1) + 1, count)
        return
    own = max(last - window for window, last in enumerate(reach(spans)))
    assert own <= m + 1 and passes <= steps + own * steps * (steps - 1) // 2
    assert alive <= min(own * (steps - 1) + 1, m * (steps - 1) + 2, count)


@pytest.mark.parametrize("last", ["full", "short", "moved back"])
@pytest.mark.parametrize(("length", "overlap"), [(3, 0), (3, 2), *((F, o) for o in range(F))])
@torch.inference_mode()
def test_wavefront_is_step_order_bit_for_bit(length: int, overlap: int, last: Last) -> None:
    """Latents and frames, for every number of windows and steps; and both orders make as many passes and keep
    as many windows alive as the formulas say."""
    m = later(overlap, length)
    many = (22,) if m > 2 else ()  # more windows than the wavefront keeps alive
    for count, steps in product((*range(1, 13), *many), range(1, 7)):
        possible = cuts(count, length, overlap, last)
        if not possible:
            continue
        plan = planned(count, length, overlap, last, possible[(count + steps) % len(possible)])
        spans = list(plan.spans())
        assert len(spans) == count and (spans[-1].frames < length) == (last == "short")
        formulas = {
            "step": ((steps - 1) * count + 1, count if steps > 1 else 1), "wavefront": counted(spans, steps)
        }  # fmt: skip
        check_formulas(*formulas["wavefront"], spans, steps, m, last == "moved back")
        latents, frames = {}, {}
        for schedule, (passes, alive) in formulas.items():
            where = (count, steps, schedule)
            codec = Unrolled()
            family = Blended(spans, overlap, codec)
            blocks = run(family, steps, cast(Schedule, schedule), frames=plan.video_frames)
            first = next(blocks)
            assert family.passes.total() == passes, where
            frames[schedule] = torch.cat([first, *blocks], dim=1)
            latents[schedule] = torch.cat(codec.pushed, dim=2)
            assert family.passes == Counter(product(range(count), range(steps))), where
            assert family.most_alive == alive, where
            starts = [span.start for span in spans] + [plan.latent_frames]
            finished = [stop - start for start, stop in pairwise(starts)]
            assert [pushed.shape[2] for pushed in codec.pushed] == finished, where
        assert frames["step"].shape[1] == plan.video_frames
        assert torch.equal(latents["step"], latents["wavefront"]), (count, steps)
        assert torch.equal(frames["step"], frames["wavefront"]), (count, steps)


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
        family = Blended(spans, overlap, Keep())
        with LiveBytes() as live:
            for pixels in run(family, steps, "wavefront", latent_noise, shape):
                resting.append((live.current - pixels.numel() * 4) / frame)
        peaks.append(live.peak)
        # Per step all that the fused windows span, less in the last; small change for step numbers.
        assert max(resting) <= (steps - 1) * (F + m * hop) + overlap + 0.5
        assert max(resting[-1:]) < 0.5, "something is left when all frames are out"
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("schedule", ["step", "wavefront"])
@torch.inference_mode()
def test_a_frame_is_decoded_once_with_what_the_last_window_made_of_it(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the last step: what any window writes there later would be missing from the video."""
    written: dict[int, dict[int, Tensor]] = {}
    write = fused._Level.write

    def noted(self: Any, span: Span, values: Tensor) -> None:
        write(self, span, values)
        frames = range(span.start, span.start + span.frames)
        written.setdefault(id(self), {}).update({frame: self.frames[frame] for frame in frames})

    monkeypatch.setattr(fused._Level, "write", noted)
    spans, codec = windows(4, 2, "short"), Unrolled()
    assert spans is not None
    list(run(Blended(spans, 2, codec), 3, schedule))
    final = list(written.values())[-1]  # levels are written first in the order of their steps
    expected = torch.stack([final[frame] for frame in sorted(final)], dim=2)
    assert torch.equal(torch.cat(codec.pushed, dim=2), expected)
