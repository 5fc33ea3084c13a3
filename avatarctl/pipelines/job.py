"""One job: what goes in, and what will be done with it, known before any weight is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

import numpy as np

from avatarctl.conditioning.geometry import distortion, nearest_shape
from avatarctl.conditioning.masking import mask_name, mouth_mask
from avatarctl.config import RunConfig, require_supported
from avatarctl.errors import DoesNotFit, EnvironmentMissing, UnusableAudio, UnusableImage, UsageError
from avatarctl.events import Emit, Notice, Stage
from avatarctl.families import family_named
from avatarctl.family import Family, VideoPlan
from avatarctl.loading.assemble import check_transformer
from avatarctl.loading.sources import Sources, asked_size, find_sources, weights_missing
from avatarctl.loading.weighed import weighed
from avatarctl.media import Audio, AudioSurvey, StillImage, Video, load_image, survey
from avatarctl.placement.host import host_memory
from avatarctl.placement.seats import Seating, seated, shown
from avatarctl.registry import Row, outside_training
from avatarctl.rng import stable_hash
from avatarctl.sampling.window_order import chosen_order
from avatarctl.timeline import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, pixel_frames
from avatarctl.weights.metadata import data_of
from avatarctl.weights.weight_file import WeightFile

__all__ = [
    "Job",
    "JobPlan",
    "check_job",
    "environment_problems",
    "missing_inputs",
    "require_inputs",
    "require_taken",
]

_STRETCHED = 2.0  # a face that is this much too wide or too narrow is worth a word
_WHOLE = 0.8  # of an image: a crop that keeps less is worth a word, as a head may be outside
_MORE = 0.05  # of an image: what another size must keep besides to be named


@dataclass(frozen=True)
class Job:
    """An image or a video, as the model takes it, a voice and two prompts."""

    image: StillImage | None
    audio: Audio
    prompt: str
    negative_prompt: str
    video: Video | None = None

    @property
    def visual(self) -> StillImage | Video:
        """The image or the video. Raises UsageError where there are both, or none."""
        given = [each for each in (self.image, self.video) if each is not None]
        if len(given) != 1:
            raise UsageError("a job needs an image or a video, and not both")
        return given[0]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what is given."""
        if self.video is not None:
            return self.video.height, self.video.width
        assert self.image is not None
        return self.image.pixels.shape[0], self.image.pixels.shape[1]

    @property
    def key(self) -> int:
        """Key of the job's random numbers: its own fields and the contents of its inputs, so that a result
        does not depend on file names, on other jobs or on their order."""
        visual = self.video.sha256() if self.video is not None else self.image.sha256 if self.image else ""
        return stable_hash(visual, self.audio.sha256(), self.prompt, self.negative_prompt)


@dataclass(frozen=True)
class JobPlan:
    """A checked job: all that a run needs to know, and nothing of it loaded.

    cfg:     with the output size filled in.
    sources: the files of the run, and those that are missing.
    transformer: what the headers of its files say; None where it is built in, or where files are missing.
    video:   the spans in which it is sampled.
    lead_samples: of silence in front of the audio.
    mean, variance: of silence and audio together, at 16 kHz.
    samples: at 16 kHz that drive the model; fewer than there are where the video ends with its source.
    mask:    uint8 [h, w] or [h, w, 3], white is kept; None for a model that takes an image.
    """

    cfg: RunConfig
    row: Row
    job: Job
    family: Family
    sources: Sources
    transformer: WeightFile | None
    video: VideoPlan
    survey: AudioSurvey
    lead_samples: int
    mean: float
    variance: float
    samples: int
    mask: np.ndarray | None = None

    def require_weights(self) -> None:
        """Raises WeightsMissing (exit 4), naming every file of the run that is not here."""
        if self.sources.missing:
            raise weights_missing(self.row, self.sources)

    @cached_property
    def seating(self) -> Seating:
        """What sits where and when. Raises UsageError where more blocks were to leave than there are."""
        parts, unknown = weighed(self.row, self.transformer, self.cfg)
        try:
            return seated(parts, self.cfg.memory, unknown)
        except ValueError as error:
            raise UsageError(str(error), where="memory.swap_blocks") from error

    def require_host(self) -> None:
        """Raises DoesNotFit (exit 5) where the host has no room for what leaves the device; nothing is said
        where the system tells no limit."""
        seating = self.seating
        memory = host_memory() if seating.host else None
        need = seating.host + seating.packing
        if memory is not None and memory.free is not None and need > memory.free:
            raise DoesNotFit(
                f"{shown(need)} of the host are needed for what waits there (with {shown(seating.packing)} "
                f"while it is packed), and {shown(memory.free)} are free: the limit of {memory.limit}",
                where=f"memory mode {seating.mode}",
                fix="a mode that leaves less there, or memory.base_precision=fp8",
            )

    @property
    def audio_delay(self) -> Fraction:
        """Seconds of silence before the user's audio in the finished file."""
        offset = self.family.conventions(self.cfg).audio_offset
        return Fraction(self.lead_samples, SAMPLE_RATE) + Fraction(offset, FPS)

    def summary(self) -> dict[str, Any]:
        """What `--dry-run` and `--json` show."""
        cfg = self.cfg
        order = {"schedule": self._order()} if self.video.kind == "fused" else {}
        return {
            "model": cfg.model.name,
            "width": cfg.output.width,
            "height": cfg.output.height,
            "fps": FPS,
            "frames": self.video.frames,
            "seconds_of_audio": round(self.survey.samples / SAMPLE_RATE, 3),
            **({} if self.job.video is None else self._about_source(self.job.video)),
            "strategy": self.video.kind,
            "spans": self.video.count,
            "latent_frames_per_span": next(self.video.spans()).frames,
            **order,
            "steps": cfg.sampling.steps,
            "branches": list(self.family.branches(self.family.guidance(cfg), 0)),
            "audio_offset": cfg.model.audio_offset,
            "audio_delay_seconds": float(self.audio_delay),
            "seed": cfg.runtime.seed,
        }

    def _about_source(self, video: Video) -> dict[str, Any]:
        return {
            "frames_of_source": video.frames,
            "length": self.cfg.output.length,
            "mask": self.cfg.data.mask or "mouth",
            "mask_rule": self.cfg.data.mask_rule,
        }

    def _order(self) -> str:
        steps = self.cfg.sampling.steps
        assert steps is not None
        return chosen_order(list(self.video.spans()), steps, self.cfg.long_video.schedule)


def missing_inputs(cfg: RunConfig, row: Row) -> tuple[str, ...]:
    """The keys of `input` that a job of `row` needs and `cfg` leaves open."""
    person = family_named(row.family).takes(cfg)
    return tuple(name for name in (person, "audio") if getattr(cfg.input, name) is None)


def require_taken(cfg: RunConfig, row: Row) -> Literal["image", "video"]:
    """Which of the two the model takes. Raises UsageError where the other was given."""
    takes = family_named(row.family).takes(cfg)
    if (cfg.input.video if takes == "image" else cfg.input.image) is not None:
        raise _takes_another(row, takes)
    return takes


def require_inputs(cfg: RunConfig, row: Row) -> None:
    """Raises UsageError where an input is missing; WeightsMissing where files of the model are missing as
    well, the larger obstacle first."""
    if missing := missing_inputs(cfg, row):
        sources = find_sources(row, cfg.model, asked_size(cfg))
        if sources.missing:
            raise weights_missing(row, sources)
        raise UsageError(f"{row.name} needs --{missing[0]}")


def check_job(cfg: RunConfig, row: Row, job: Job, emit: Emit) -> JobPlan:
    """Choose the size, find the files, read the audio once, plan the spans, read the headers of the weights.

    Weights that are not here are noted in `sources.missing`, not raised: the plan is good without them.

    Raises UsageError for impossible requests, NotYetSupported for settings without code, UnusableAudio for
    audio without usable samples or shorter than a frame, and what `find_sources` and `check_transformer`
    raise.
    """
    require_supported(cfg, "infer")
    if cfg.memory.swap_blocks and cfg.memory.mode in ("full", "group", "sequential"):
        raise UsageError(
            f"memory.mode {cfg.memory.mode} already says which blocks leave",
            where="memory.swap_blocks",
            fix="--memory model with it, or leave it out",
        )
    family = family_named(row.family)
    takes = family.takes(cfg)
    if getattr(job, takes) is not job.visual:
        raise _takes_another(row, takes)
    height, width = cfg.output.height, cfg.output.width
    if height is None or width is None:
        height, width = family.frame_size(job.size, cfg)
    cfg = replace(cfg, output=replace(cfg.output, width=width, height=height))
    sources = find_sources(row, cfg.model, (width, height))
    emit(Stage("reading the audio"))
    surveyed = survey(job.audio)
    mask = _mask(cfg) if job.video is not None else None
    for material, warnings in ((job.visual, job.visual.warnings), (job.audio, surveyed.warnings)):
        for warning in warnings:
            emit(Notice(f"{material.name}: {warning}", "warning"))
    stated = row.defaults.get("model.audio_offset")
    if row.audio_offset_stated and cfg.model.audio_offset != stated:
        asked = cfg.model.audio_offset
        emit(Notice(f"{row.name} was made with audio offset {stated}; {asked} moves the lips", "warning"))
    lead = round(cfg.output.lead_silence * SAMPLE_RATE)
    mean, variance = _with_silence(surveyed, lead)
    samples = lead + surveyed.samples
    _require_a_frame(samples, job.audio.name)
    if job.video is not None and cfg.output.length == "video":
        samples = min(samples, job.video.frames * SAMPLES_PER_FRAME)
    video = family.plan(samples, cfg)
    if doubt := _misfit(job.size, (height, width), cfg, row):
        emit(Notice(f"{job.visual.name}: {doubt}", "warning"))
    for notice in (*family.notices(cfg), *sources.notes):
        emit(Notice(notice))
    transformer = check_transformer(row, sources, cfg, emit)
    stated_data = (data_of(transformer) if transformer else {}) or row.trained_with
    for other in _other_data(stated_data, row.name, mask, cfg):
        emit(Notice(other, "warning"))
    assert cfg.sampling.shift is not None and cfg.sampling.guidance_scale is not None
    for notice in outside_training(
        row,
        width=width,
        height=height,
        num_frames=pixel_frames(next(video.spans()).frames),
        overlap_frames=None if video.count == 1 else cfg.long_video.overlap_frames,
        shift=cfg.sampling.shift,
        guidance_scale=cfg.sampling.guidance_scale,
    ):
        emit(Notice(notice, "warning"))
    plan = JobPlan(
        cfg=cfg,
        row=row,
        job=job,
        family=family,
        sources=sources,
        transformer=transformer,
        video=video,
        survey=surveyed,
        lead_samples=lead,
        mean=mean,
        variance=variance,
        samples=samples,
        mask=mask,
    )
    assert plan.seating  # refuses what cannot be, before anything is loaded
    return plan


def _takes_another(row: Row, takes: Literal["image", "video"]) -> UsageError:
    says = {"image": "an image, not a video", "video": "a video, not an image"}[takes]
    return UsageError(f"{row.name} takes {says}", fix=f"give it by --{takes}")


def _mask(cfg: RunConfig) -> np.ndarray:
    """The mask of a run: the file of `data.mask`, else the drawn mouth. Raises UnusableImage for one that
    keeps everything, which leaves nothing to be made."""
    if cfg.data.mask is None:
        return mouth_mask()
    mask = load_image(cfg.data.mask).pixels[..., 0]
    if mask.min() > 127:
        raise UnusableImage(
            "keeps the whole frame: nothing of it is black", where=cfg.data.mask, fix="paint the mouth black"
        )
    return mask


def _other_data(
    stated: Mapping[str, str], name: str, mask: np.ndarray | None, cfg: RunConfig
) -> Iterator[str]:
    """Where a video is masked otherwise than the weights say that they learnt it."""
    if mask is None:
        return
    rule, learnt = stated.get("mask_rule"), stated.get("mask")
    if rule and rule != cfg.data.mask_rule:
        yield f"{name} was trained with mask rule {rule}; this run has {cfg.data.mask_rule}"
    if learnt and learnt != mask_name(mask):
        fix = "leave out --mask" if learnt == "mouth" else "name the one it was trained with by --mask"
        yield f"{name} was trained with another mask: {fix}"


def environment_problems(plan: JobPlan) -> tuple[str, ...]:
    """What this machine lacks for a run, one line each: device, attention kernel. Loads no weight.

    `auto`, the CPU and native attention are there wherever the program runs. Only what was asked for beyond
    them is tried, which takes seconds of imports.
    """
    runtime = plan.cfg.runtime
    if runtime.device in ("auto", "cpu") and runtime.attention in ("auto", "native"):
        return ()
    from avatarctl.models.device import dtype_of, resolve_device

    try:
        device = resolve_device(runtime.device)
        if runtime.attention not in ("auto", "native"):
            from avatarctl.models.attention import choose_attention

            head_width = plan.row.network["dit"]["attention_head_dim"]
            choose_attention(runtime.attention, device, dtype_of(runtime), head_width)
    except EnvironmentMissing as missing:
        return (str(missing),)
    return ()


def _misfit(image: tuple[int, int], frame: tuple[int, int], cfg: RunConfig, row: Row) -> str:
    """What a person should know of an image in a frame, both (height, width); empty for nothing."""
    factor = distortion(image, frame)
    if cfg.input.fit == "stretch":
        return f"is stretched {factor:.1f} times out of shape" if factor > _STRETCHED else ""
    if (kept := 1 / factor) >= _WHOLE:
        return ""
    cut = f"{1 - kept:.0%} of the image is cut off to fill {frame[1]}x{frame[0]}"
    height, width = nearest_shape(image, (frame, *((high, wide) for wide, high in row.trained_for.sizes)))
    better = 1 / distortion(image, (height, width))
    return f"{cut} (--size {width}x{height} keeps {better:.0%})" if better > kept + _MORE else cut


def _require_a_frame(samples: int, name: str) -> None:
    if samples < SAMPLES_PER_FRAME:
        milliseconds = 1000 / SAMPLE_RATE
        raise UnusableAudio(
            f"too short: {samples} of {SAMPLES_PER_FRAME} samples at 16 kHz, {samples * milliseconds:.3g} of "
            f"the {SAMPLES_PER_FRAME * milliseconds:g} ms that one frame of video lasts",
            where=name,
            fix="give longer audio",
        )


def _with_silence(surveyed: AudioSurvey, lead: int) -> tuple[float, float]:
    """Mean and population variance of `lead` zeros followed by the audio."""
    if lead == 0:
        return surveyed.mean, surveyed.variance
    share = surveyed.samples / (surveyed.samples + lead)
    mean = surveyed.mean * share
    return mean, (surveyed.variance + surveyed.mean**2) * share - mean**2
