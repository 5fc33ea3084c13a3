"""Looking at a model while it trains: numbers on clips that it never learns from, and what it makes of them.

Training is left as it was, to the bit: every random number has a key of its own that no step is part of, so
curves compare; modes and weights are put back; nothing is drawn in secret. A clip's scores are a function of
the weights and its place among the items, whoever computes them.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor

from avatarctl.atomic import disk_errors, ensure_writable_folder, held_folder, remove_folder
from avatarctl.conditioning.masking import mask_tensor
from avatarctl.data.checking import run_mask
from avatarctl.data.windows import VIDEO_SUFFIXES
from avatarctl.errors import AvatarctlError, Interrupted, OutputRefused, UnusableWeights, WriteFailed
from avatarctl.events import Emit, Event, Notice, Stage
from avatarctl.family import Draw, Modules, TextEncoder, TrainableFamily
from avatarctl.loading.judges import Judges, LossName, find_judges, load_judges
from avatarctl.media import FittedFrames, Waveform, image_from_array, load_image, open_audio, survey
from avatarctl.media.image import StillImage
from avatarctl.media.video_reader import VideoReader, open_video
from avatarctl.models.text import clean_prompt
from avatarctl.parallel.sharded import gathered
from avatarctl.parallel.world import World
from avatarctl.pipelines.infer import write_video
from avatarctl.pipelines.job import Job, JobPlan
from avatarctl.rng import stable_hash
from avatarctl.timeline import SAMPLES_PER_FRAME
from avatarctl.training.best import keep_best
from avatarctl.training.curves import draw_curves
from avatarctl.training.network import Network
from avatarctl.training.objective import flow_step, training_noise
from avatarctl.training.run_folder import VALIDATION, RunFolder
from avatarctl.training.validation_networks import KnownTexts, Precise
from avatarctl.training.validation_scores import (
    as_tensor,
    best_offset,
    mouth_box,
    mouth_lpips,
    psnr,
    sync_curve,
)
from avatarctl.training.validation_sets import Item, ValidationSets
from avatarctl.training.validation_sheet import Strip, draw_sheet, times_of

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.loading.sources import Sources
    from avatarctl.registry import Row

__all__ = ["FOLDER", "Scored", "Validation", "lips_box", "made_with", "make_validation"]

FOLDER: Final = "validation"
SHEET: Final = "sheet.png"
_TURNS: Final = 4
"""Timesteps at which the loss of a clip is taken."""


@dataclass(frozen=True)
class Scored:
    """One clip: its scores by name, how they are when the audio is shifted, what the sheet shows of it; or
    why it could not be made."""

    item: Item
    numbers: Mapping[str, float] = field(default_factory=dict)
    curve: Sequence[float] = ()
    strip: Strip | None = None
    problem: str = ""


@dataclass
class Validation:
    """items: the clips; constants: artifacts that they share; modules: encoders, each loaded when it is
    touched; judges: whose networks are here; world: the processes that share the clips; held: those of the
    auxiliary losses, which are on the device already."""

    folder: RunFolder
    cfg: RunConfig
    row: Row
    family: TrainableFamily
    sources: Sources
    network: Network
    items: Sequence[Item]
    constants: Mapping[str, Tensor]
    modules: Any
    texts: TextEncoder
    judges: Sequence[LossName]
    emit: Emit
    world: World = field(default_factory=World)
    held: Judges = field(default_factory=Judges)

    def is_due(self, step: int) -> bool:
        """After every `validation.every` steps and the last one, unless the run has it already."""
        every, last = self.cfg.validation.every, self.cfg.train.max_steps
        if not step or (step % every and step != last):
            return False
        lacking = None
        if self.world.is_main:
            lacking = all(entry["step"] != step for entry in self.folder.entries_of(VALIDATION))
        return bool(self.world.from_main(lacking))

    def run(self, step: int, should_stop: Callable[[], bool]) -> None:
        """One validation, its line in the log, its folder, the best weights. Each process makes some of the
        clips; all have to call it.

        Raises Interrupted within one sampling step once `should_stop` says so, here or elsewhere; then it
        left nothing.
        """
        self.emit(Stage(f"validating step {step}"))
        final, world = self.folder.path / FOLDER / f"step-{step}", self.world
        with ExitStack() as held:
            made = None
            with world.together():
                if world.is_main:
                    ensure_writable_folder(final.parent)
                    held.enter_context(disk_errors(final))
                    made = held.enter_context(held_folder(final.parent))
            folder = world.from_main(made)
            assert folder is not None
            stop, mine = world.stops(should_stop), range(world.rank, len(self.items), world.size)
            # Of a sharded network each gets the whole: they make other clips, and some make more of them.
            whole = gathered(self.network.dit)
            with self.network.averaged(), whole, world.together(), self._aside() as judges:
                scored = {place: self.score(place, judges, folder, stop) for place in mine}
            scored = dict(sorted(pair for each in world.gather(scored) for pair in each.items()))
            states = self.network.states() if self.network.is_sharded else None
            with world.together():
                if world.is_main:
                    self._write(step, folder, final, list(scored.values()), states)

    def _write(
        self,
        step: int,
        folder: Path,
        final: Path,
        scored: Sequence[Scored],
        states: Sequence[Mapping[str, Tensor]] | None,
    ) -> None:
        """What a person looks at. folder: of the videos, until it is whole; states: `Network.states`, where
        the main process cannot make them alone."""
        for each in scored:
            if each.problem:
                self.emit(Notice(f"validation: {each.item.name}: {each.problem}", "warning"))
        entry = self._entry(step, scored)
        self._draw(folder / SHEET, step, entry, scored)
        if final.is_dir():
            remove_folder(final)
        folder.rename(final)
        self.folder.write(VALIDATION, entry)
        draw_curves(self.folder.path / "curves.png", self.folder.entries())
        better = keep_best(
            self.folder.path, step, entry, entry["measured_on"], lambda: self.network.files(step, states)
        )
        self._tell(step, entry, better, final)

    def score(self, place: int, judges: Judges, folder: Path, should_stop: Callable[[], bool]) -> Scored:
        """The clip at `place`, made into `folder`. What is wrong with it is told by the result."""
        item = self.items[place]
        try:
            numbers = {"flow": self.flow(item)} if self._wants("flow") and item.group == "recon" else {}
            path = folder / f"{place:02d}-{item.group}.mp4"
            return self._made(item, path, judges, numbers, should_stop)
        except (Interrupted, WriteFailed, OutputRefused):
            raise
        except AvatarctlError as problem:
            said = str(problem)
        except torch.OutOfMemoryError:
            said = "does not fit into memory"
        return Scored(item, problem=said)

    @torch.no_grad()
    def flow(self, item: Item) -> float:
        """The loss of training at fixed noise and timesteps, nothing dropped."""
        assert item.learnt is not None
        cfg = replace(
            self.cfg, train=replace(self.cfg.train, text_dropout=0.0, audio_dropout=0.0, prefix_noise=0.0)
        )
        device = self.network.device
        sample = {name: tensor.to(device) for name, tensor in item.learnt.tensors.items()}
        constants = {name: tensor.to(device) for name, tensor in self.constants.items()}
        total = 0.0
        for turn in range(_TURNS):
            draws = [Draw(stable_hash("validation", cfg.runtime.seed, item.name), turn, 0, 1)]
            condition = self.family.training_condition([sample], constants, draws, cfg)
            assert condition.clean is not None
            drawn = self.family.sample_timesteps(draws, condition.clean.shape[2], cfg)
            timesteps = type(drawn)(*(each.to(device) for each in vars(drawn).values()))
            noise = training_noise(draws, condition.clean.shape).to(device)
            with self.network.autocast():
                step = flow_step(self.family, self.network.dit, condition, timesteps, noise, cfg)
            total += float(step.loss.sum())
        if not np.isfinite(total):
            raise UnusableWeights("the loss is not finite")
        return total / _TURNS

    def _made(
        self, item: Item, path: Path, judges: Judges, numbers: dict[str, float],
        should_stop: Callable[[], bool],
    ) -> Scored:  # fmt: skip
        with ExitStack() as opened:
            job, video = _job(item, self.family.takes(self.cfg), self.cfg, opened)
            plan = self._plan(job)
            blocks: list[np.ndarray] = []
            modules = Modules(
                dit=Precise(self.network), vae=self.modules.vae, text=self.texts, audio=self.modules.audio,
                device=self.network.device,
            )  # fmt: skip
            write_video(
                plan, path, emit=self._only_warnings, should_stop=should_stop, watch=blocks.append,
                modules=modules,
            )  # fmt: skip
            made = np.concatenate(blocks)
            truth, reference = self._truth(item, video, job, plan, len(made))
            curve = self._judge(item, made, truth, job, judges, numbers)
        times = times_of(len(made))
        offset = self._offset
        shown = None
        if truth is not None:
            shown = truth[[min(max(time - offset, 0), len(truth) - 1) for time in times]]
        told = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers.items())
        title = "   ".join([item.group, item.name, *told])
        return Scored(item, numbers, curve, Strip(title, reference, times, made[times], shown))

    @property
    def _offset(self) -> int:
        """Made frames before the first that belongs to the audio: what a family's audio offset delays."""
        return self.family.conventions(self.cfg).audio_offset

    def _plan(self, job: Job) -> JobPlan:
        """One window as long as a training clip."""
        cfg, frames = made_with(self.cfg), self.cfg.data.num_frames
        assert frames is not None
        surveyed = survey(job.audio)
        samples = min(surveyed.samples, (frames - self._offset) * SAMPLES_PER_FRAME)
        return JobPlan(
            cfg=cfg,
            row=self.row,
            job=job,
            family=self.family,
            sources=replace(self.sources, missing=()),
            transformer=None,
            video=self.family.plan(samples, cfg),
            survey=surveyed,
            lead_samples=0,
            mean=surveyed.mean,
            variance=surveyed.variance,
            samples=samples,
            mask=run_mask(cfg) if job.video is not None else None,
        )

    def _truth(
        self, item: Item, video: VideoReader | None, job: Job, plan: JobPlan, made: int
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """Frames of the source as the network sees it, None where nobody knows them, and the reference."""
        if video is None:
            assert job.image is not None
            return None, job.image.pixels
        data = plan.cfg.data
        assert data.height is not None and data.width is not None
        fitted = FittedFrames(video, (data.height, data.width), plan.cfg.input.fit)
        frames = fitted.read(0, min(made - self._offset, video.frames))
        return (frames if item.group == "recon" else None), frames[0]

    def _judge(
        self,
        item: Item,
        made: np.ndarray,
        truth: np.ndarray | None,
        job: Job,
        judges: Judges,
        numbers: dict[str, float],
    ) -> Sequence[float]:
        """Fills `numbers`; the curve of the sync judge, empty without one."""
        made = made[self._offset :]
        device = self.network.device
        ours = as_tensor(torch.from_numpy(made).to(device))
        theirs = None if truth is None else as_tensor(torch.from_numpy(truth).to(device))
        if truth is not None:
            count = min(len(made), len(truth))
            if self._wants("psnr"):
                numbers["psnr"] = psnr(made[:count], truth[:count])
            if judges.lpips is not None and theirs is not None:
                pair = ours[:, :, :count], theirs[:, :, :count]
                numbers["lpips"] = float(mouth_lpips(judges.lpips, *pair, lips_box(self.family, self.cfg)))
        if judges.sync is None or len(made) < judges.sync.frames:
            return ()
        align = item.learnt.to_face if item.learnt else None
        if self._whole_frames and align is None:
            return ()
        judge, stride = judges.sync, self.cfg.aux.stride
        with Waveform(job.audio) as waveform:

            def audio(start: int, stop: int) -> Tensor:
                return torch.from_numpy(waveform.read(start, stop)).to(self.network.device)

            curve = sync_curve(judge, ours if align is None else align(ours, 0), audio, stride)
            numbers["sync"] = float(curve[len(curve) // 2])
            if theirs is not None and theirs.shape[2] >= judge.frames:
                real = sync_curve(judge, theirs if align is None else align(theirs, 0), audio, stride)
                numbers["sync_truth"] = float(real[len(real) // 2])
        return curve.tolist()

    @property
    def _whole_frames(self) -> bool:
        return self.family.takes(self.cfg) == "image" and self.cfg.data.faces not in (None, "none")

    def _wants(self, metric: str) -> bool:
        return metric in self.cfg.validation.metrics

    @contextmanager
    def _aside(self) -> Iterator[Judges]:
        """The network out of training, and the judges; afterwards all is as it was, and what was loaded for
        this alone is dropped."""
        modes = {module: module.training for module in self.network.dit.modules()}
        before = set(vars(self.modules))
        there: dict[LossName, Any] = {name: getattr(self.held, name) for name in self.judges}
        lacking = tuple(name for name, judge in there.items() if judge is None)
        backend = self.cfg.aux.lpips_backend
        found = find_judges(self.row, self.cfg.model, lacking, backend)
        loaded = load_judges(self.row, found, lacking, self.network.device, _nobody, backend)
        judges = Judges(**(there | {name: getattr(loaded, name) for name in lacking}))
        self.network.dit.eval()
        try:
            yield judges
        finally:
            for module, mode in modes.items():
                module.training = mode
            for part in set(vars(self.modules)) - before:
                self.modules.drop(part)
            del judges, loaded
            if self.network.device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()

    def _entry(self, step: int, scored: Sequence[Scored]) -> dict[str, Any]:
        """The line of a validation: means over clips, of the loss over those that have one."""
        entry: dict[str, Any] = {"step": step}
        for name in ("flow", "sync", "lpips", "psnr", "sync_truth"):
            _mean_into(entry, name, [each.numbers[name] for each in scored if name in each.numbers])
        curves = {}
        for group in ("recon", "mixed"):
            mine = [each for each in scored if each.item.group == group and each.curve]
            _mean_into(entry, f"sync_{group}", [each.numbers["sync"] for each in mine])
            if mine:
                curves[group] = torch.tensor([each.curve for each in mine]).mean(0)
        if curves:
            both = torch.tensor([each.curve for each in scored if each.curve]).mean(0)
            entry["sync_offset"] = best_offset(both)
            entry["sync_curves"] = {group: curve.tolist() for group, curve in curves.items()}
        entry["clips"] = [
            {"name": each.item.name, "group": each.item.group, **each.numbers}
            for each in scored
            if not each.problem
        ]
        if failed := {each.item.name: each.problem for each in scored if each.problem}:
            entry["failed"] = failed
        entry["measured_on"] = f"{stable_hash(*self._measured_on(), *sorted(failed)):016x}"
        return entry

    def _measured_on(self) -> Iterator[str]:
        """What two validations must share for their numbers to be compared."""
        cfg = self.cfg
        yield json.dumps([
            [cfg.validation.steps or cfg.sampling.steps, cfg.data.num_frames, cfg.data.width],
            [cfg.data.height, cfg.data.mask_rule, cfg.data.mask or "mouth", cfg.train.mouth_weight],
            [cfg.aux.stride, sorted(cfg.validation.metrics), cfg.runtime.seed, list(self.judges)],
            [[item.name, item.group] for item in self.items],
        ])  # fmt: skip

    def _draw(self, path: Path, step: int, entry: Mapping[str, Any], scored: Sequence[Scored]) -> None:
        failed = [f"{each.item.name}: {each.problem}" for each in scored if each.problem]
        found = find_judges(self.row, self.cfg.model, self.judges, self.cfg.aux.lpips_backend)
        failed += [
            f"{part} is an untrained miniature here: its numbers mean nothing" for part in found.random
        ]
        strips = [each.strip for each in scored if each.strip is not None]
        title = f"step {step}: {_said(entry)}"
        draw_sheet(path, title, strips, entry.get("sync_curves", {}), failed)

    def _tell(self, step: int, entry: Mapping[str, Any], better: Sequence[str], final: Path) -> None:
        best = f"; the best {', '.join(better)} so far" if better else ""
        self.emit(Notice(f"validation of step {step}: {_said(entry)}{best}: {final / SHEET}"))

    def _only_warnings(self, event: Event) -> None:
        if isinstance(event, Notice) and event.level == "warning":
            self.emit(event)


def made_with(cfg: RunConfig) -> RunConfig:
    """The settings of `infer` by which clips are made: one window as long as a training clip."""
    data = cfg.data
    return replace(
        cfg,
        output=replace(cfg.output, path=None, width=data.width, height=data.height),
        long_video=replace(cfg.long_video, strategy="off", num_frames=data.num_frames),
        sampling=replace(cfg.sampling, steps=cfg.validation.steps or cfg.sampling.steps),
    )


def lips_box(family: TrainableFamily, cfg: RunConfig) -> tuple[slice, slice] | None:
    """Rows and columns that LPIPS looks at; None for the lower halves of a model that knows no mask."""
    if family.takes(cfg) == "image" and cfg.data.mask is None:
        return None
    assert cfg.data.height is not None and cfg.data.width is not None
    return mouth_box(mask_tensor(run_mask(cfg)), (cfg.data.height, cfg.data.width))


def make_validation(
    folder: RunFolder,
    sets: ValidationSets,
    row: Row,
    family: TrainableFamily,
    sources: Sources,
    modules: Any,
    device: torch.device,
    emit: Emit,
    world: World,
) -> Callable[[Network, Judges], Validation]:
    """Reads what validations look at, before the first step: artifacts, texts, which judges are here. What
    comes back takes the network, once there is one, and the judges of the auxiliary losses.

    modules: encoders; that of texts is touched here alone. Raises what `ValidationSets.items` raises.
    """
    cfg = sets.cfg
    prompts = [clean_prompt(prompt) for prompt in (*sets.prompts, cfg.input.negative_prompt or "")]
    texts = KnownTexts(modules.text, prompts, device)
    items, constants = sets.items()
    modules.drop("text")
    judges = _judges_here(cfg, row, emit)

    def with_network(network: Network, held: Judges) -> Validation:
        return Validation(
            folder, cfg, row, family, sources, network, items, constants, modules, texts, judges, emit, world,
            held,
        )  # fmt: skip

    return with_network


def _judges_here(cfg: RunConfig, row: Row, emit: Emit) -> tuple[LossName, ...]:
    """Of the judges that are asked for those whose files are here; a line for each other one."""
    here: list[LossName] = []
    names: tuple[LossName, ...] = ("sync", "lpips")
    for name in (each for each in names if each in cfg.validation.metrics):
        found = find_judges(row, cfg.model, (name,), cfg.aux.lpips_backend)
        if found.missing:
            part = found.missing[0]
            emit(Notice(f"validation goes without {name}: model.weights.{part} is not here", "warning"))
            continue
        if found.random:
            emit(Notice(f"validation: the judge of {name} is an untrained miniature; it means nothing"))
        here.append(name)
    return tuple(here)


def _job(item: Item, takes: str, cfg: RunConfig, opened: ExitStack) -> tuple[Job, VideoReader | None]:
    """What is made of an item, and its video, which an image model sees the first frame of."""
    audio = open_audio(item.audio)
    image: StillImage | None = None
    video: VideoReader | None = None
    if takes == "image" and item.visual.suffix.lower() not in VIDEO_SUFFIXES:
        image = load_image(item.visual)
    else:
        video = opened.enter_context(open_video(item.visual))
        if takes == "image":
            image = image_from_array(video.read(0, 1)[0], item.name)
    shown = video if takes == "video" else None
    return Job(image, audio, item.prompt, cfg.input.negative_prompt or "", shown), video


def _mean_into(entry: dict[str, Any], name: str, values: Sequence[float]) -> None:
    if values:
        entry[name] = float(np.mean(values))


def _said(entry: Mapping[str, Any]) -> str:
    names = ("flow", "sync", "sync_recon", "sync_mixed", "sync_truth", "sync_offset", "lpips", "psnr")
    told = [f"{name.replace('_', ' ')} {entry[name]:.4g}" for name in names if name in entry]
    return ", ".join(told) or "nothing could be scored"


def _nobody(event: Event) -> None:
    """Judges are loaded anew each time; their notices were given once."""
