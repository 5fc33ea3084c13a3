"""How well the built-in models do what they are for, on faces and voices that nothing was trained on.

What makes the frames is given an image or a video and audio, as `infer` is. What the world knows of the mouth
is compared with the result, and with nothing before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import torch

from avatarctl.demo.clips import HELD_OUT, Clip, clip
from avatarctl.demo.faces import SIZE
from avatarctl.demo.loudness import loudness
from avatarctl.demo.mouth_meter import correlation, measure_mouth
from avatarctl.demo.sample import face_pixels
from avatarctl.errors import UsageError, printable
from avatarctl.events import Emit, PartDone, silent
from avatarctl.media import Audio, StillImage, Video, audio_from_array, image_from_array, video_from_array
from avatarctl.models.encode import frames_tensor
from avatarctl.pipelines.infer import generate, load
from avatarctl.pipelines.job import Job, JobPlan, check_job
from avatarctl.registry import Row, configure
from avatarctl.timeline import SAMPLE_RATE

if TYPE_CHECKING:
    from avatarctl.family import Modules, VideoCodec, VideoPlan

__all__ = ["PARTS", "Part", "Score", "benchmark", "best_lag", "colour_change", "spoken"]

Part = Literal["vae", "i2v", "v2v", "sync"]
PARTS: Final[tuple[Part, ...]] = ("vae", "i2v", "v2v", "sync")

_PROMPT: Final = "a person is talking"
_FRAMES: Final[Mapping[Part, int]] = {"vae": 81, "i2v": 100, "v2v": 100, "sync": 40}
_SHORT: Final = 33
_LAST: Final = 10
_UPPER: Final = slice(0, 32)
"""Rows that show no mouth."""


@dataclass
class Score:
    """Numbers of clips by name; told as their mean and its standard error."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **numbers: float) -> None:
        for name, value in numbers.items():
            self.values.setdefault(name, []).append(float(value))

    def told(self) -> dict[str, dict[str, float]]:
        return {name: _mean(values) for name, values in self.values.items()}


def benchmark(
    part: Part,
    row: Row,
    seeds: Sequence[int],
    emit: Emit = silent,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """The scores of one part, on clips of these seeds. row: whose files are looked at.

    Raises UsageError for seeds that something was trained on, and what loading raises.
    """
    if min(seeds) < HELD_OUT:
        raise UsageError(f"clips below seed {HELD_OUT} may have been trained on", where="--seed")
    if part != "sync" and len(seeds) < 2:
        raise UsageError("audio is exchanged between clips: two at least", where="--clips")
    return _PARTS[part](row, seeds, emit)


def _vae(row: Row, seeds: Sequence[int], emit: Emit) -> dict[str, Any]:
    """psnr, r_opening of clips of 33 frames; psnr_81, psnr_last of 81 and their last ten."""
    vae = _modules(row, clip(seeds[0], _SHORT)).vae
    score = Score()
    for frames in (_SHORT, _FRAMES["vae"]):
        for each in _told(seeds, frames, emit, f"vae, {frames} frames"):
            made = _coded(vae, each.frames)
            error = ((made - frames_tensor(each.frames)) / 2).square().mean((0, 1, 3, 4))
            if frames == _SHORT:
                heights = measure_mouth(_bytes(made[0]))[0]
                score.add(psnr=_decibels(error), r_opening=correlation(heights, each.speech.opening))
            else:
                score.add(psnr_81=_decibels(error), psnr_last=_decibels(error[-_LAST:]))
    return score.told()


def _i2v(row: Row, seeds: Sequence[int], emit: Emit) -> dict[str, Any]:
    def more(made: np.ndarray, each: Clip) -> dict[str, float]:
        return {"colour_change": colour_change(made, each.frames[0])}

    return _spoken(row, seeds, emit, "i2v", more)


def _v2v(row: Row, seeds: Sequence[int], emit: Emit) -> dict[str, Any]:
    from avatarctl.conditioning.masking import keep_map, mask_tensor, mouth_mask

    vae = _modules(row, clip(seeds[0], _SHORT)).vae
    kept = keep_map(mask_tensor(mouth_mask()), (SIZE, SIZE))[0, 0].numpy() > 0

    def more(made: np.ndarray, each: Clip) -> dict[str, float]:
        plan = _plan(row, each, each.speech.audio).video
        coded = _coded_in_chunks(vae, each.frames, plan)
        differs = np.abs(made[: len(coded)].astype(float) - coded)[:, kept]
        return {"outside_box": float(differs.mean() / 255)}

    return _spoken(row, seeds, emit, "v2v", more)


def _spoken(
    row: Row,
    seeds: Sequence[int],
    emit: Emit,
    part: Part,
    more: Callable[[np.ndarray, Clip], Mapping[str, float]],
) -> dict[str, Any]:
    """r_opening: of the mouth that was made and the one that the audio calls for, behind the first frame;
    r_shuffled: made with the audio of another clip, compared with its own; slope: of a straight line from
    true heights to measured ones."""
    modules = _modules(row, clip(seeds[0], _FRAMES[part]))
    clips = [clip(seed, _FRAMES[part]) for seed in seeds]
    score = Score()
    for index, each in enumerate(_told(seeds, _FRAMES[part], emit, part)):
        made = _made(row, each, each.speech.audio, modules)
        heights, true = measure_mouth(made)[0][1:], measure_mouth(each.frames)[0][1:]
        exchanged = _made(row, each, clips[index - 1].speech.audio, modules)
        opening = each.speech.opening[1:]
        score.add(
            r_opening=correlation(heights, opening),
            r_shuffled=correlation(measure_mouth(exchanged)[0][1:], opening),
            slope=float(np.polyfit(true, heights, 1)[0]),
            **more(made, each),
        )
    return score.told()


def _sync(row: Row, seeds: Sequence[int], emit: Emit) -> dict[str, Any]:
    """accuracy: share of pairs in which a window's own audio has the higher cosine."""
    from avatarctl.demo.making.judge_learner import right_cosines
    from avatarctl.loading.judges import find_judges, load_judges

    cfg = configure(f"model.name={row.name}")
    judge = load_judges(row, find_judges(row, cfg.model, ["sync"]), ["sync"], torch.device("cpu"), emit).sync
    assert judge is not None
    score = Score()
    for seed, each in zip(seeds, _told(seeds, _FRAMES["sync"], emit, "sync"), strict=True):
        score.add(accuracy=right_cosines(judge, [each], np.random.default_rng(seed), times=8))
    return score.told()


def spoken(row: Row, audio: Audio, seeds: Sequence[int], emit: Emit) -> dict[str, Any]:
    """A recording, of which nothing is known but how loud it is, said by these faces at rest.

    r_loudness: of the mouth that was made and `loudness`, behind the first frame, over the faces; best_lag:
    frames that the mouth of all of them together is late where it fits best. Raises what loading raises, and
    UnusableAudio.
    """
    score, all_heights, modules = Score(), [], None
    for seed in _timed(seeds, emit, printable(audio.name)):
        plan = _said(row, image_from_array(face_pixels(seed=seed), "face"), audio)
        modules = modules or load(plan)
        heights = measure_mouth(_generated(plan, modules))[0]
        level = loudness(audio, len(heights))
        score.add(r_loudness=correlation(heights[1:], level[1:]))
        all_heights.append(heights[1:])
    return {**score.told(), "best_lag": best_lag(np.mean(all_heights, 0), level[1:])}


def best_lag(late: np.ndarray, early: np.ndarray, most: int = 5) -> int:
    """Frames by which `late` [F] follows `early` [F] where they fit best, of -most to most."""

    def fit(lag: int) -> float:
        first, second = (late[lag:], early[: len(early) - lag]) if lag >= 0 else (late[:lag], early[-lag:])
        return correlation(first, second)

    return max(range(-most, most + 1), key=fit)


_PARTS: Final[Mapping[Part, Callable[[Row, Sequence[int], Emit], dict[str, Any]]]] = {
    "vae": _vae, "i2v": _i2v, "v2v": _v2v, "sync": _sync,
}  # fmt: skip


def colour_change(frames: np.ndarray, image: np.ndarray) -> float:
    """Mean absolute difference of the upper half of the last ten frames [F, 64, 64, 3] to the image, with
    pixels in [0, 1]."""
    last = frames[-_LAST:, _UPPER].astype(float)
    return float(np.abs(last - image[_UPPER]).mean() / 255)


def _plan(row: Row, each: Clip, audio: np.ndarray) -> JobPlan:
    """What `infer` would make of an image or video and this audio: it is told nothing else."""
    voice = audio_from_array(audio, SAMPLE_RATE, "voice")
    if configure(f"model.name={row.name}", row_named=lambda name: row).model.channels == 33:
        return _said(row, image_from_array(each.frames[0], "face"), voice)
    return _said(row, video_from_array(each.frames, "clip"), voice)


def _said(row: Row, seen: StillImage | Video, audio: Audio) -> JobPlan:
    cfg = configure(f"model.name={row.name}", "long_video.strategy=chunks", row_named=lambda name: row)
    image, video = (seen, None) if isinstance(seen, StillImage) else (None, seen)
    return check_job(cfg, row, Job(image, audio, _PROMPT, "", video), silent)


def _modules(row: Row, each: Clip) -> Modules:
    return load(_plan(row, each, each.speech.audio))


def _made(row: Row, each: Clip, audio: np.ndarray, modules: Modules) -> np.ndarray:
    """uint8 [F, 64, 64, 3]."""
    return _generated(_plan(row, each, audio), modules)


def _generated(plan: JobPlan, modules: Modules) -> np.ndarray:
    return _bytes(torch.cat([block.pixels for block in generate(plan, modules=modules)], dim=1))


def _coded(vae: VideoCodec, frames: np.ndarray) -> torch.Tensor:
    """Frames [F, 64, 64, 3] and what the VAE makes of them: [1, 3, F, 64, 64]."""
    return vae.decoder().push(vae.encode(frames_tensor(frames)))


def _coded_in_chunks(vae: VideoCodec, frames: np.ndarray, plan: VideoPlan) -> np.ndarray:
    """What the VAE makes of true frames cut as `infer` cuts them, so that nothing differs but what was
    generated. Ends with the last chunk that is whole."""
    pieces = []
    for span in plan.spans():
        piece = frames[4 * span.start :][: 4 * span.frames - 3]
        if len(piece) == 4 * span.frames - 3:
            pieces.append(_bytes(_coded(vae, piece)[0])[span.keep_from :])
    return np.concatenate(pieces)


def _bytes(pixels: torch.Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] -> uint8 [F, H, W, 3], as a video has them."""
    scaled = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(1, 2, 3, 0).contiguous().numpy()


def _told(seeds: Sequence[int], frames: int, emit: Emit, what: str) -> Iterator[Clip]:
    return (clip(seed, frames) for seed in _timed(seeds, emit, what))


def _timed(seeds: Sequence[int], emit: Emit, what: str) -> Iterator[int]:
    started = time.monotonic()
    for done, seed in enumerate(seeds, 1):
        yield seed
        left = (time.monotonic() - started) / done * (len(seeds) - done)
        emit(PartDone(what, done / len(seeds), left))


def _decibels(error: torch.Tensor) -> float:
    return float(-10 * torch.log10(error.mean()))


def _mean(values: Sequence[float]) -> dict[str, float]:
    """Mean over clips and its standard error."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": round(float(np.mean(values)), 4), "standard_error": round(float(error), 4)}
