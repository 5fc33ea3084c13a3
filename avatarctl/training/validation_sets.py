"""What a validation looks at: clips that training never sees, each with its own audio and with another's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from avatarctl.data.checking import audio_of
from avatarctl.data.holdout import clip_of, held_out
from avatarctl.data.samples import Sample, prompt_of, read_entries
from avatarctl.data.training_set import TrainingSample, TrainingSet, require_going
from avatarctl.errors import AvatarctlError, UnusableFile, UsageError, under_name
from avatarctl.events import Emit, Notice
from avatarctl.files.named_path import expanded

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.data.encoders import Encoders
    from avatarctl.family import TrainableFamily
    from avatarctl.registry import Row

__all__ = ["Group", "Item", "ValidationSets", "open_sets"]

Group = Literal["recon", "mixed"]


@dataclass(frozen=True)
class Item:
    """One clip to be made. recon: with its own audio, so the truth is known; mixed: with another's.

    visual: its video, or an image. learnt: its artifacts; None for a line of a list.
    """

    name: str
    group: Group
    visual: Path
    audio: Path
    prompt: str
    learnt: TrainingSample | None = None


@dataclass
class ValidationSets:
    """sets: of samples, each checked; pairs: of what is only made. `items` reads the samples."""

    cfg: RunConfig
    sets: list[TrainingSet]
    pairs: list[Item]
    emit: Emit

    @property
    def count(self) -> int:
        """Clips that a validation makes, as far as nothing fails."""
        return sum(len(self._first(each)) + len(_partners(self._first(each))) for each in self.sets) + len(
            self.pairs
        )

    @property
    def prompts(self) -> list[str]:
        """Every text that a clip is made with."""
        mine = [self._prompt(sample) for each in self.sets for sample in self._first(each)]
        return list(dict.fromkeys([*mine, *(pair.prompt for pair in self.pairs)]))

    def items(self) -> tuple[list[Item], dict[str, Any]]:
        """The clips in a fixed order, recon before mixed, and the constants of their sets. One whose
        artifacts cannot be read is named and left out.

        Raises UnusableFile where none is left, Interrupted between two of them.
        """
        found: list[Item] = []
        constants: dict[str, Any] = {}
        for each in self.sets:
            each.prepare()
            constants |= each.constants
            found += self._items_of(each)
        found += self.pairs
        if not found:
            raise UnusableFile("no clip of the validation sets can be used", where="validation.sets")
        return sorted(found, key=lambda item: item.group == "mixed"), constants

    def _items_of(self, data: TrainingSet) -> list[Item]:
        samples = self._first(data)
        own: dict[str, Item] = {}
        read = data.read(range(len(samples)))
        for sample, learnt in zip(samples, read, strict=True):
            if isinstance(learnt, AvatarctlError):
                self.emit(Notice(f"{under_name(sample.name, learnt)}; validation leaves it out", "warning"))
                continue
            text = self._prompt(sample)
            own[sample.name] = Item(sample.name, "recon", sample.video, audio_of(sample), text, learnt)
            require_going(data.should_stop)
        mixed = [
            replace(own[name], name=f"{name} with {other}", group="mixed", audio=own[other].audio)
            for name, other in _partners(samples).items()
            if name in own and other in own
        ]
        return [*own.values(), *mixed]

    def _first(self, data: TrainingSet) -> list[Sample]:
        return data.samples[: self.cfg.validation.samples]

    def _prompt(self, sample: Sample) -> str:
        return prompt_of(sample, self.cfg.input.prompt or "")[0]


def open_sets(
    cfg: RunConfig,
    row: Row,
    family: TrainableFamily,
    encoders: Encoders | None,
    emit: Emit,
    *,
    with_faces: bool = False,
    should_stop: Callable[[], bool],
) -> ValidationSets:
    """The sets that a run asks for, looked at: `validation.sets`, else what it holds out.

    encoders: those that training has. with_faces: whether a sample needs a map to its aligned face.
    should_stop: see `TrainingSet`.
    Raises UsageError where nothing is named and nothing held out, PathNotFound and UnusableFile for sets
    that cannot be used.
    """
    wanted = cfg.validation
    if not wanted.sets and not wanted.holdout:
        raise UsageError(
            "there is nothing to validate on",
            where="validation.every",
            fix="--holdout 0.05 keeps a part of the data for it, --sets FOLDER names other samples",
        )
    quiet = replace(cfg, data=replace(cfg.data, workers=0, force=False))
    of_set = functools.partial(
        TrainingSet, row=row, family=family, emit=emit, encoders=encoders, with_faces=with_faces,
        instead="validation leaves it out", called="clips to validate on", should_stop=should_stop,
    )  # fmt: skip
    sets: list[TrainingSet] = []
    pairs: list[Item] = []
    if not wanted.sets:
        sets.append(of_set(quiet, choose=functools.partial(held_out, share=wanted.holdout)))
    for name in wanted.sets:
        path = expanded(name)
        if path.is_file() and (listed := _pairs(path, cfg)):
            pairs += listed[: wanted.samples]
        else:
            sets.append(of_set(replace(quiet, data=replace(quiet.data, path=str(path)))))
    for each in sets:
        each.check()
        if len(each.names) == 1:
            emit(Notice(f"{each.base}: a single clip, so none gets another's audio"))
    return ValidationSets(cfg, sets, pairs, emit)


def _pairs(path: Path, cfg: RunConfig) -> list[Item]:
    """The lines `video@@audio` (or `image@@audio`) of a list; none of a list of samples, whose lines are
    folders, or have a prompt as well. Raises UnusableFile for a list of both."""
    if path.suffix.lower() in (".csv", ".jsonl"):
        return []
    entries = read_entries(path)
    two = [entry for entry in entries if not entry.is_folder and not entry.audio]
    if two and len(two) < len(entries):
        raise UnusableFile(
            "has lines of video@@audio beside others", where=path, fix="make a list of each kind"
        )
    base, prompt = path.parent, cfg.input.prompt or ""
    return [
        Item(f"{entry.prompt} with {entry.video}", "mixed", base / entry.prompt, base / entry.video, prompt)
        for entry in two
    ]


def _partners(samples: Sequence[Sample]) -> dict[str, str]:
    """Whose audio each sample gets: that of the next one of another clip."""
    clips = [clip_of(sample) for sample in samples]
    found = {}
    for place, sample in enumerate(samples):
        order = [(place + step) % len(samples) for step in range(1, len(samples))]
        other = next((each for each in order if clips[each] != clips[place]), None)
        if other is not None:
            found[sample.name] = samples[other].name
    return found
