"""What does our order of work save against the published one, at equal output?

    python tests/bench/stableavatar_work.py [SIDE]

The published order, written out here as a plain loop over our own networks (spec/stableavatar.md a.4, c, d,
e, f, h): every step visits every window; each visit encodes the window's audio, makes the keys and values of
text and image for all branches, and runs the three branches as one batch in which a context of zeros stands
for silence; all latents are decoded in one call. Ours is `pipelines.infer.generate` with `compat reference`,
which has the same numbers: both videos are compared before anything is printed. Target: 1.5 times as fast.

Windows this small run their branches as one batch in both, which is our default for them
(`tests/bench/batched_branches.py`); branches one after another are shown beside.

Every cause is switched off alone in the plain loop. The padding of the short last window is none of them: it
changes the numbers, so that only the fixed mode, shown beside, does without it.

Networks are those of the registry's tiny row, with a VAE of a quarter of its width, so that decoding, the
same work in both orders, does not hide the rest; windows of 81 frames as published, SIDE pixels square (32).
**No tiny network has the shares of the published one**, whose transformer looks at 21504 tokens in 30 layers.
The work of the published networks is therefore counted too, in operations on tensors without data.

One thread; CPU seconds, which depend less than wall seconds on what else the machine does.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from reporting import print_table, verdict, write_voice
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from avatarctl.conditioning.channels import first_frame_channels
from avatarctl.conditioning.windows import blend_weights
from avatarctl.demo.sample import sample_image
from avatarctl.events import silent
from avatarctl.family import Modules, Span
from avatarctl.flow_matching import double_shifted_sigmas, euler_step, timesteps_of
from avatarctl.loading.built_in import build_random_modules
from avatarctl.media import Waveform, open_audio
from avatarctl.models.encode import image_tensor
from avatarctl.models.stableavatar import PreparedStable, StableAvatarTransformer
from avatarctl.models.wav2vec import normalise_waveform
from avatarctl.pipelines.infer import generate
from avatarctl.pipelines.job import Job, JobPlan, check_job
from avatarctl.registry import Row, configure, find_model
from avatarctl.rng import latent_noise

SECONDS = 13
STEPS = 30
SCALES = (5.0, 4.0)  # text, audio: those of the published command
EQUAL = 4.0  # both scales: one branch has no weight, and the published order runs it all the same
RUNS = 3
TARGET = 1.5
CLOSE = 1e-4
WINDOW, OVERLAP = 21, 10  # latent frames, as published


@dataclass(frozen=True)
class Causes:
    """What the published order repeats, and how it decodes."""

    encode_every_step: bool = True
    read_every_step: bool = True
    three_in_a_batch: bool = True
    decode_whole: bool = True


WHAT = {
    "encode_every_step": "audio is encoded for every window and step",
    "read_every_step": "keys and values of text and image are made in every step",
    "three_in_a_batch": "three branches as one batch, with attention to a context of zeros",
    "decode_whole": "all latents are decoded in one call",
}


@dataclass
class PublishedOrder:
    """The plain loop. Samples, windows and noise are those of the plan that it is given."""

    plan: JobPlan
    modules: Modules
    causes: Causes = Causes()
    audios: dict[int, Tensor] = field(default_factory=dict)
    ready: list[PreparedStable] = field(default_factory=list)
    rotary: dict[int, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """Frames [3, n, H, W] in [-1, 1]."""
        cfg, spans = self.plan.cfg, list(self.plan.video.spans())
        shape, total = self.plan.video.shape, spans[-1].start + spans[-1].frames
        self._encode_inputs()
        sigmas = double_shifted_sigmas(STEPS, 5.0)
        x = latent_noise(cfg.runtime.seed, (self.plan.job.key,), 0, total, shape)
        with Waveform(self.plan.job.audio, lead_samples=0) as waveform:
            for step in range(STEPS):
                written = torch.zeros_like(x)
                for span in spans:
                    old = x[:, :, span.start : span.start + span.frames]
                    velocity = self._guided(old, timesteps_of(sigmas)[step], span, waveform)
                    new = euler_step(old, velocity, float(sigmas[step]), float(sigmas[step + 1]))
                    if span.start and step:
                        fade = torch.tensor(blend_weights(OVERLAP, "uniform")).view(1, 1, -1, 1, 1)
                        before = written[:, :, span.start : span.start + OVERLAP]
                        new[:, :, :OVERLAP] = fade * new[:, :, :OVERLAP] + (1 - fade) * before
                    written[:, :, span.start : span.start + span.frames] = new
                x = written
        decoder = self.modules.vae.decoder()
        if self.causes.decode_whole:
            return decoder.push(x)[0]
        return torch.cat([decoder.push(frame)[0] for frame in x.split(1, dim=2)], dim=1)

    def _encode_inputs(self) -> None:
        height, width = self.plan.cfg.output.height, self.plan.cfg.output.width
        assert height is not None and width is not None and self.modules.image is not None
        image = image_tensor(self.plan.job.image.pixels, (height, width), self.plan.cfg.input.fit)
        video = torch.zeros(1, 3, 4 * WINDOW - 3, height, width)
        video[:, :, 0] = image
        self.channels = first_frame_channels(self.modules.vae.encode(video))
        self.image = self.modules.image.encode(image)
        prompts = [self.plan.job.negative_prompt, self.plan.job.negative_prompt, self.plan.job.prompt]
        self.text = torch.cat([self.modules.text.encode(prompt, self.modules.device) for prompt in prompts])

    def _guided(self, old: Tensor, t: Tensor, span: Span, waveform: Waveform) -> Tensor:
        hidden = torch.cat([old, self.channels[:, :, : span.frames]], dim=1)
        audio = self._audio(span, waveform)
        ready = self._text_and_image()
        if span.frames not in self.rotary:
            self.rotary[span.frames] = self.dit(mode="prepare", grid=tuple(hidden.shape[2:])).rotary
        rotary = self.rotary[span.frames]
        three = self._batch if self.causes.three_in_a_batch else self._one_by_one
        silent_negative, negative, full = three(hidden, t.expand(1), audio, ready, rotary)
        text, audio = self.scales
        return silent_negative + audio * (negative - silent_negative) + text * (full - negative)

    @property
    def dit(self) -> StableAvatarTransformer:
        assert isinstance(self.modules.dit, StableAvatarTransformer)
        return self.modules.dit

    @property
    def scales(self) -> tuple[float, float]:
        sampling = self.plan.cfg.sampling
        assert sampling.guidance_scale is not None and sampling.audio_guidance_scale is not None
        return sampling.guidance_scale, sampling.audio_guidance_scale

    def _audio(self, span: Span, waveform: Waveform) -> Tensor:
        """Windows of projected audio [1, F, n, D]."""
        if span.index in self.audios:
            return self.audios[span.index]
        samples = torch.from_numpy(waveform.read(*span.audio))
        variance, mean = torch.var_mean(samples.double(), correction=0)
        tokens = self.modules.audio.tokens(normalise_waveform(samples, float(mean), float(variance))[None])
        audio: Tensor = self.dit(mode="prepare", vocal=tokens, frames=4 * WINDOW - 3).vocal
        if not self.causes.encode_every_step:
            self.audios[span.index] = audio
        return audio

    def _text_and_image(self) -> list[PreparedStable]:
        """Keys and values of the three branches, each made for itself."""
        if self.ready:
            return self.ready
        ready = [self.dit(mode="prepare", text=text[None], image=self.image) for text in self.text]
        if not self.causes.read_every_step:
            self.ready = ready
        return ready

    def _batch(
        self, hidden: Tensor, t: Tensor, audio: Tensor, ready: list[PreparedStable], rotary: Tensor
    ) -> tuple[Tensor, ...]:
        """One batch: latents are embedded three times, the projector runs once, the first branch attends to
        a context of zeros."""
        dit = self.dit
        embedded = padded(dit._embed(hidden.expand(3, -1, -1, -1, -1), t.expand(3)))
        one = replace(
            embedded,
            tokens=embedded.tokens[2:],
            time=embedded.time[2:],
            modulation=embedded.modulation[2:],
        )
        context = dit._project(one, audio)
        context = torch.cat([torch.zeros_like(context), context, context])
        return dit._run(embedded, rotary, context, readies=ready).split(1)

    def _one_by_one(
        self, hidden: Tensor, t: Tensor, audio: Tensor, ready: list[PreparedStable], rotary: Tensor
    ) -> tuple[Tensor, ...]:
        """As ours: embedded once, silence is a bias."""
        vocal = (None, audio, audio)
        branches = {
            str(index): replace(ready[index], vocal=vocal[index], rotary=rotary) for index in range(3)
        }
        velocities = self.dit(hidden, t, branches, mode="denoise", padded_frames=WINDOW)
        return tuple(velocities.values())


def padded(embedded: Any) -> Any:
    """Zero tokens up to a whole window."""
    frames, rows, columns = embedded.grid
    missing = (WINDOW - frames) * rows * columns
    return replace(embedded, tokens=torch.nn.functional.pad(embedded.tokens, (0, 0, 0, missing)))


def small_row() -> Row:
    row = find_model("stableavatar-tiny")
    vae = {**row.network["vae"], "base_dim": 4}
    return replace(row, network={**row.network, "vae": vae})


def planned(row: Row, job: Job, side: int, *settings: str) -> JobPlan:
    common = (
        f"model.name={row.name}", f"output.width={side}", f"output.height={side}",
        f"sampling.steps={STEPS}", "long_video.num_frames=81", "long_video.overlap_frames=37",
    )  # fmt: skip
    return check_job(configure(*common, *settings), row, job, silent)


@dataclass
class Measured:
    """CPU seconds of each run, and the frames of the last."""

    call: Callable[[], Tensor]
    seconds: list[float] = field(default_factory=list)
    frames: Tensor | None = None

    def run(self) -> None:
        started = time.process_time()
        self.frames = self.call()
        self.seconds.append(time.process_time() - started)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(folder: Path, side: int) -> tuple[dict[str, Measured], JobPlan]:
    row = small_row()
    modules = build_random_modules(row)
    job = Job(sample_image(), open_audio(write_voice(folder / "voice.wav", SECONDS)), "a", "b")

    def plan_of(compat: str, scales: tuple[float, float] = SCALES, *settings: str) -> JobPlan:
        text, audio = scales
        return planned(
            row, job, side, f"model.compat={compat}", f"sampling.guidance_scale={text}",
            f"sampling.audio_guidance_scale={audio}", *settings,
        )  # fmt: skip

    def ours(plan: JobPlan) -> Measured:
        return Measured(lambda: torch.cat([block.pixels for block in generate(plan, modules=modules)], dim=1))

    def published(plan: JobPlan, **off: bool) -> Measured:
        return Measured(lambda: PublishedOrder(plan, modules, Causes(**off))())

    same, equal = plan_of("reference"), plan_of("reference", (EQUAL, EQUAL))
    ways = {
        "published": published(same),
        **{cause: published(same, **{cause: False}) for cause in WHAT},
        "ours": ours(same),
        "ours, one by one": ours(plan_of("reference", SCALES, "sampling.batch_branches=false")),
        "fixed": ours(plan_of("none")),
        "published, equal scales": published(equal),
        "ours, equal scales": ours(equal),
    }
    ways["ours"].call()  # warms caches; not counted
    for _ in range(RUNS):
        for way in ways.values():
            way.run()
    return ways, same


def check_equal(ways: dict[str, Measured]) -> float:
    """The largest difference of a frame's value. Ends the benchmark where it is too large."""
    pairs = [(name, "published") for name in (*WHAT, "ours", "ours, one by one")]
    pairs.append(("ours, equal scales", "published, equal scales"))
    largest = 0.0
    for name, expected in pairs:
        a, b = ways[name].frames, ways[expected].frames
        assert a is not None and b is not None and a.shape == b.shape, name
        largest = max(largest, (a - b).abs().max().item())
    if not largest <= CLOSE:
        raise SystemExit(f"the orders of work differ by {largest:.2g}; nothing was compared")
    return largest


def report(ways: dict[str, Measured], plan: JobPlan) -> None:
    side = plan.cfg.output.width
    largest, spans = check_equal(ways), list(plan.video.spans())
    whole, equal = ways["published"].median, ways["published, equal scales"].median

    def row(what: str, name: str, against: float = whole) -> tuple[str, ...]:
        return what, f"{ways[name].median:.2f}", f"{against / ways[name].median:.2f}"

    met = verdict(-whole / ways["ours"].median, -TARGET)
    print_table(
        f"stableavatar_work: {SECONDS} s of audio, {len(spans)} windows of {WINDOW} latent frames, {STEPS} "
        f"steps, {side}x{side}, medians of {RUNS} runs that take turns",
        ("", "CPU s", "published / this"),
        [
            row("the published order", "published"),
            *(row(f"without: {what}", cause) for cause, what in WHAT.items()),
            row(f"**ours, numbers of compat reference** (target {TARGET}: {met})", "ours"),
            row("ours, the same, branches one after another, as windows of usual size", "ours, one by one"),
            row("ours, fixed mode", "fixed"),
            row(f"the published order, both scales {EQUAL:g}", "published, equal scales", equal),
            row(f"ours, numbers of compat reference, both scales {EQUAL:g}", "ours, equal scales", equal),
        ],
        f"The last of the windows has {spans[-1].frames} latent frames. Largest difference between frames of "
        f"the two orders: {largest:.1g} (limit {CLOSE:g}).",
    )  # fmt: skip


def published_work() -> dict[str, float]:
    """Floating-point operations (1e12) of the published networks at 512x512, by what is done once."""
    with torch.device("meta"), torch.no_grad():
        modules = build_random_modules(find_model("stableavatar-1.3b"))
        dit, dims = modules.dit, find_model("stableavatar-1.3b").network
        hidden, t = torch.zeros(1, 36, WINDOW, 64, 64), torch.zeros(1)
        text, image = torch.zeros(1, 512, dims["dit"]["text_dim"]), torch.zeros(1, 257, 1280)
        tokens = torch.zeros(1, 167, 768)
        decoder, latent = modules.vae.decoder(), hidden[:, :16, :1]
        decoder.push(latent)
        return {
            "pass": operations(lambda: dit(hidden, t, text, image, tokens)),
            "mix": operations(lambda: dit.blocks[0](*first_block(dit), only="mixed")),
            "read": operations(lambda: dit(mode="prepare", text=text, image=image)),
            "encode": operations(lambda: modules.audio.tokens(torch.zeros(1, 53_760))),
            "decode": operations(lambda: decoder.push(latent)),
        }


def first_block(dit: torch.nn.Module) -> tuple[Tensor | None, ...]:
    """Tokens, text (none), modulation and rotary table of one window, without data."""
    assert isinstance(dit, StableAvatarTransformer)
    rotary = dit(mode="prepare", grid=(WINDOW, 64, 64)).rotary
    width = dit.config.num_attention_heads * dit.config.attention_head_dim
    return torch.zeros(1, rotary.shape[1], width), None, torch.zeros(1, 6, width), rotary


def operations(call: Callable[[], object]) -> float:
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops() / 1e12


def report_published() -> None:
    work = published_work()
    bare = work["pass"] - work["read"]
    before, after = 3 * work["pass"] + work["encode"], 3 * bare - 2 * work["mix"]
    print_table(
        "stableavatar_work: the published networks, one window of 81 frames at 512x512, counted",
        ("", "1e12 operations", "of the published order"),
        [
            ("the published order, one window and step", f"{before:.1f}", "100 %"),
            ("audio", f"{work['encode']:.3f}", f"{work['encode'] / before:.3%}"),
            ("keys and values of text and image, three branches", f"{3 * work['read']:.3f}",
             f"{3 * work['read'] / before:.2%}"),
            ("the first self-attention of two branches", f"{2 * work['mix']:.2f}",
             f"{2 * work['mix'] / before:.2%}"),
            ("**published / ours**", "", f"{before / after:.4f}"),
            ("**published / ours, equal scales**", "", f"{before / (2 * bare - work['mix']):.3f}"),
            ("decoding one latent frame, once per video", f"{work['decode']:.2f}", ""),
        ],
    )  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        ways, plan = measure(Path(name), int(sys.argv[1]) if len(sys.argv) > 1 else 32)
    report(ways, plan)
    report_published()


if __name__ == "__main__":
    main()
