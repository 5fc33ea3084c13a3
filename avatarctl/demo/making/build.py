"""Makes the built-in models from an empty folder: each part goes on where it was stopped, bit for bit.

FOLDER/PART holds the state of a part while it learns, FOLDER/made/PART what it became, FOLDER/cartoon the
files that are shipped, and their card. Two processes may make two parts of one folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from avatarctl.atomic import atomic_path, atomic_write_bytes, atomic_write_text
from avatarctl.conditioning.masking import mouth_mask
from avatarctl.demo.making.audio_learner import AudioLearner, feature_statistics
from avatarctl.demo.making.card import card_text
from avatarctl.demo.making.drawn_set import DrawnSet
from avatarctl.demo.making.judge_learner import JudgeLearner
from avatarctl.demo.making.learning import learn
from avatarctl.demo.making.recipe import NEEDS, PARTS, Part, Recipe
from avatarctl.demo.making.transformers import (
    Which,
    encoding_settings,
    settings_of,
    shipped_weights,
    train_transformer,
    write_start,
)
from avatarctl.demo.making.vae_learner import VaeLearner, latent_statistics
from avatarctl.errors import UsageError
from avatarctl.events import Emit, Notice, Stage
from avatarctl.families import family_named
from avatarctl.files.strict_json import read_object
from avatarctl.files.writer import write_safetensors
from avatarctl.loading.built_in import build_random_modules
from avatarctl.loading.modules import SomeModules, load_parts
from avatarctl.loading.sources import find_sources
from avatarctl.registry import ROWS, Row
from avatarctl.training.run_folder import RunFolder
from avatarctl.training.weights_file import stored

if TYPE_CHECKING:
    from avatarctl.family import Modules
    from avatarctl.loading.modules import Part as ModulePart

__all__ = ["Build", "built_row"]

ROW_OF: Final[Mapping[Which, str]] = {"i2v": "cartoon-i2v", "v2v": "cartoon-v2v"}
_HOME: Final = "cartoon"
_METADATA: Final = {"format": "pt", "world": "cartoon 64x64"}
_FIRST_SEED: Final = 100_000  # of the clips that the transformers learn from
_ENCODERS: Final = ("vae.safetensors", "config.json", "audio.safetensors", "text.safetensors")
CARD: Final = "build.json"
_LONGEST_CARD: Final = 1 << 20


def built_row(name: str, folder: Path) -> Row:
    """The row of a built-in model with the files of a build, as far as they are there."""
    row, home = ROWS[name], folder / _HOME
    which = name.rpartition("-")[2]
    names = [
        name
        for name in (f"dit_{which}.safetensors", *_ENCODERS, "syncnet.safetensors")
        if (home / name).is_file()
    ]
    digests = {f"{_HOME}/{name}": _sha256(home / name) for name in names}
    return replace(row, files=tuple(digests), sha256=digests, home=str(folder), trained=True)


@dataclass
class Build:
    """One folder. facts: what the parts that are done became, by name: steps, minutes, scores."""

    folder: Path
    seed: int
    recipe: Recipe
    emit: Emit
    facts: dict[str, Any] = field(default_factory=dict)

    def run(self, should_stop: Callable[[], bool], only: Part | None = None) -> None:
        """Makes what is not there, or `only` one part.

        Raises Interrupted, behind what is saved; OutputRefused while another process makes the same part;
        UsageError for a part whose own parts are not made, or a folder of another seed or recipe.
        """
        self._read_facts()
        for part in PARTS if only is None else (only,):
            with RunFolder(self._made(part)).held():
                self._read_facts()
                if part in self.facts:
                    continue
                if lacking := [each for each in NEEDS[part] if each not in self.facts]:
                    fix = f"--part {lacking[0]} first, or leave --part out"
                    raise UsageError(f"is made out of {', '.join(lacking)}", where=part, fix=fix)
                self.emit(Stage(f"{part}"))
                self.facts[part] = _MAKERS[part](self, should_stop)
                self._write_facts(part)
        self._read_facts()
        if all(part in self.facts for part in PARTS):
            self._finish()

    def _made_by(self, part: Part) -> str:
        return f"{self.recipe.made_by(part, self.seed)} torch {torch.__version__}"

    def _vae(self, should_stop: Callable[[], bool]) -> dict[str, Any]:
        sizes = ROWS[ROW_OF["i2v"]].network["vae"]
        recipe = self.recipe
        learner = VaeLearner(sizes, self.seed, recipe.vae_steps, recipe.score_every, recipe.watched)
        made = learn(learner, self.folder / "vae", self.emit, should_stop, self._made_by("vae"))
        learner.vae.eval()
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in sizes.items()}
        stated = {**plain, **latent_statistics(learner.vae, recipe.statistics)}
        self._write("vae.safetensors", {k: t.to(torch.bfloat16) for k, t in learner.vae.state_dict().items()})
        atomic_write_text(self._home / "config.json", json.dumps(stated, indent=1) + "\n")
        return made

    def _audio(self, should_stop: Callable[[], bool]) -> dict[str, Any]:
        sizes = ROWS[ROW_OF["i2v"]].network["audio"]
        learner = AudioLearner(sizes, self.seed, self.recipe.audio_steps, self.recipe.score_every)
        made = learn(learner, self.folder / "audio", self.emit, should_stop, self._made_by("audio"))
        mean, deviation = feature_statistics(learner.encoder, self.recipe.statistics)
        atomic_write_bytes(
            self.folder / "audio" / "statistics.safetensors", save({"mean": mean, "deviation": deviation})
        )
        self._write("audio.safetensors", learner.encoder.state_dict())
        # Random and never trained: it reads bytes, and the transformers learn what it makes of them.
        text: Any = build_random_modules(ROWS[ROW_OF["i2v"]]).text
        self._write("text.safetensors", _unshared(text.encoder.state_dict()))
        return made

    def _clips(self, should_stop: Callable[[], bool]) -> dict[str, Any]:
        data = self._drawn("v2v")
        data.make(should_stop)
        return {"clips": len(data.seeds), "frames": data.frames}

    def _transformer(self, which: Which, should_stop: Callable[[], bool]) -> dict[str, Any]:
        from safetensors.torch import load_file

        row = built_row(ROW_OF[which], self.folder)
        row = replace(row, files=tuple(name for name in row.files if "/dit_" not in name))
        folder, start = self.folder / which, self.folder / f"start_{which}.safetensors"
        if not start.is_file():
            statistics = load_file(self.folder / "audio" / "statistics.safetensors")
            write_start(start, row, self.seed, statistics["mean"], statistics["deviation"])
        row = replace(row, path=str(start))
        more: dict[str, Any] = {
            "train__max_steps": self.recipe.transformer_steps,
            "train__batch_size": self.recipe.batch_size,
        }
        # The loss has to know where mouths are, of an image as of a video.
        mask = self.folder / f"mask_{which}.png"
        if not mask.is_file():
            with atomic_path(mask) as temporary:
                Image.fromarray(mouth_mask()).save(temporary, "PNG")
        more |= {"data__num_frames": self.recipe.frames, "data__mask": str(mask.absolute())}
        resolved = settings_of(which, row, self.seed, **more)
        last = train_transformer(which, row, resolved, self._drawn(which), folder, self.emit, should_stop)
        self._write(f"dit_{which}.safetensors", shipped_weights(last, row))
        return {"steps": self.recipe.transformer_steps, "minutes": _minutes(folder / "timing.jsonl")}

    def _i2v(self, should_stop: Callable[[], bool]) -> dict[str, Any]:
        return self._transformer("i2v", should_stop)

    def _v2v(self, should_stop: Callable[[], bool]) -> dict[str, Any]:
        return self._transformer("v2v", should_stop)

    def _judge(self, should_stop: Callable[[], bool]) -> dict[str, Any]:
        sizes = ROWS[ROW_OF["v2v"]].network["syncnet"]
        learner = JudgeLearner(sizes, self.seed, self.recipe.judge_steps, self.recipe.score_every)
        made = learn(learner, self.folder / "judge", self.emit, should_stop, self._made_by("judge"))
        tensors = learner.judge.state_dict()
        self._write(
            "syncnet.safetensors", {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
        )
        return made

    def _drawn(self, which: Which) -> DrawnSet:
        """The clips of both transformers; `which` one learns from them now."""
        row = built_row(ROW_OF[which], self.folder)
        row = replace(row, files=tuple(name for name in row.files if "/dit_" not in name))
        encode = encoding_settings(self.seed, self.recipe.frames)
        cfg = settings_of(which, row, self.seed, data__num_frames=self.recipe.frames).cfg

        def modules() -> Modules:
            device = torch.device("cpu")
            sources = find_sources(row, cfg.model)
            parts: tuple[ModulePart, ...] = ("text", "vae", "audio")
            loaded = load_parts(row, sources, None, cfg, parts, device, self.emit)
            return SomeModules(parts, loaded.get, device)  # type: ignore[return-value]

        # The hashes of the encoders belong to it: whoever makes one anew makes the clips anew.
        encoders = "".join(digest for name, digest in sorted(row.sha256.items()) if "/dit_" not in name)
        made_by = hashlib.sha256((self._made_by("clips") + encoders).encode()).hexdigest()[:16]
        seeds = range(_FIRST_SEED, _FIRST_SEED + self.recipe.clips)
        family: Any = family_named(row.family)
        return DrawnSet(self.folder / "clips", seeds, family, cfg, encode, modules, made_by, self.emit)

    @property
    def _home(self) -> Path:
        return self.folder / _HOME

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """A file as it is shipped: the same bytes for the same tensors, by size of elements, then by name."""
        self._home.mkdir(exist_ok=True)
        names = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
        write_safetensors(self._home / name, {key: stored(tensors[key]) for key in names}, _METADATA)

    def _made(self, part: Part) -> Path:
        return self.folder / "made" / part

    def _read_facts(self) -> None:
        """Of every part that is there, by whatever process it was made."""
        for part in PARTS:
            path = self._made(part) / CARD
            if not path.is_file():
                continue
            held = read_object(path, _LONGEST_CARD)
            if held.get("made_by") != self._made_by(part) or not isinstance(held.get("part"), dict):
                raise UsageError(
                    f"holds a {part} of another seed, recipe or version of torch",
                    where=self.folder,
                    fix="choose another --out",
                )
            self.facts[part] = held["part"]

    def _write_facts(self, part: Part) -> None:
        held = {"made_by": self._made_by(part), "seed": self.seed, "part": self.facts[part]}
        atomic_write_text(self._made(part) / CARD, json.dumps(held, indent=1) + "\n")

    def _finish(self) -> None:
        files = sorted(path for path in self._home.iterdir() if path.suffix in (".safetensors", ".json"))
        digests = {path.name: _sha256(path) for path in files}
        card = card_text(self.seed, self.recipe, self.facts, digests)
        atomic_write_text(self._home / "README.md", card)
        self.emit(Notice(f"made: {self._home}"))


_MAKERS: Final[Mapping[Part, Callable[[Build, Callable[[], bool]], dict[str, Any]]]] = {
    "vae": Build._vae,
    "audio": Build._audio,
    "clips": Build._clips,
    "i2v": Build._i2v,
    "v2v": Build._v2v,
    "judge": Build._judge,
}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _unshared(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without tensors that are the same memory under a second name."""
    seen: dict[int, str] = {}
    for name, tensor in tensors.items():
        seen.setdefault(tensor.data_ptr(), name)
    return {name: tensors[name] for name in seen.values()}


def _minutes(path: Path) -> float:
    lines = path.read_text(encoding="utf-8").splitlines()
    return round(sum(json.loads(line)["seconds"] for line in lines) / 60, 1)
