"""A run file repeats a run exactly: every value of every key survives the way through YAML."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import yaml

from avatarctl.config import (
    KeySpec,
    ModelRowDefaults,
    Resolved,
    Setting,
    dump_run,
    keys,
    read_config,
    resolve,
)
from avatarctl.config.rules import WEIGHT_PARTS
from avatarctl.errors import ConfigError

WORDS = (
    "yes no on off y N true False null ~ 1 025 0o17 0x1F 1_000 1e5 1.5 1e-4 .inf -.INF .nan 1:30",
    "2026-01-01 2026-01-01T10:00:00Z << = *a &a !a %a @a `a |- > - ? : #a a#b [] {} [a {a, 'a'",
    '"a" \\ a: --- ... !!str é 日本語 🙂 a,b',
)
LOOKS_LIKE_SOMETHING_ELSE = [
    *(word for line in WORDS for word in line.split()),
    *(" lead", "trail ", "a: b", "a #b", "- a", "? a", "two  spaces", "{a: b}"),
]
CHARACTERS = (
    "aZ09 _-.:,#'\"\\/{}[]&*!|>%@`=~?\t\n\r\x00\x07\x1b\x7f\x85\xa0"
    "\u200b\u202e\u2028\ufeffßéя漢\U0001f600\U0010ffff"
)


def row(name: str) -> ModelRowDefaults:
    return ModelRowDefaults(name, {})


def resolved(values: dict[str, Any]) -> Resolved:
    return resolve(row, {}, None, {dotted: Setting(value, "test") for dotted, value in values.items()})


def reread(text: str, tmp_path: Path) -> Resolved:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode("utf-8"))
    return resolve(row, {}, read_config(path, command="infer"), {})


def asked(found: Resolved) -> dict[str, Any]:
    return {dotted: setting.value for dotted, setting in found.asked.items()}


def plain(cfg: Any) -> dict[str, Any]:
    """The nested values as another YAML reader gives them: lists, and nothing where nothing is set."""

    def value_of(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else dict(value) if hasattr(value, "keys") else value

    sections = {
        section.name: {
            item.name: value_of(getattr(getattr(cfg, section.name), item.name))
            for item in dataclasses.fields(getattr(cfg, section.name))
            if getattr(getattr(cfg, section.name), item.name) not in (None, {})
        }
        for section in dataclasses.fields(cfg)
    }
    return {name: values for name, values in sections.items() if values}


class Values:
    """Random values that a key takes, among them the ones that are hard to write down."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self) -> str:
        if self.random.random() < 0.5:
            return self.random.choice(LOOKS_LIKE_SOMETHING_ELSE)
        return "".join(self.random.choices(CHARACTERS, k=self.random.randrange(0, 30)))

    def path(self) -> str:
        return self.text().replace("\0", "0") + "x" * (self.random.random() < 0.2) or "x"

    def number(self, spec: KeySpec) -> float:
        low = spec.key.low if spec.key.low is not None else math.nextafter(spec.key.above or 0, math.inf)
        high = spec.key.high
        assert high is not None
        return self.random.choice(
            [
                float(low),
                float(high),
                self.random.uniform(low, high),
                low + (high - low) * 10.0 ** -self.random.uniform(0, 14),
                low + (high - low) / 3,
            ]
        )

    def integer(self, spec: KeySpec) -> int:
        low, high = int(spec.key.low or 0), int(spec.key.high or 0)
        value = self.random.choice([low, high, self.random.randint(low, high)])
        says = spec.key.rule.says if spec.key.rule else ""
        if "4k" in says or "4n" in says:
            value = (value - 1) // 4 * 4 + 1
            return value if value >= low else low + (1 - low) % 4
        return value // 16 * 16 if "16" in says else value

    def of(self, spec: KeySpec) -> Any:
        kind = spec.type
        if get_origin(kind) in (Union, types.UnionType):
            kind = next(arg for arg in get_args(kind) if arg is not type(None))
        special: dict[str, list[Any]] = {
            "input.face": ["none", "largest", "12", "1,2,30,40"],
            "runtime.device": ["auto", "cuda:1"],
            "data.shard": ["0/1", "11/12"],
            "sampling.guidance_interval": [(0.1, 0.3), (0.0, 1.0), (1e-07, 2e-07)],
            "train.betas": [(0.9, 0.999), (0.0, 1e-05), (0.1234567890123, 0.999_999_9)],
            "train.prefix_frames": [(), (0,), (1, 5, 9)],
        }
        if spec.dotted in special:
            return self.random.choice(special[spec.dotted])
        if get_origin(kind) is Literal:
            return self.random.choice(get_args(kind))
        if get_origin(kind) is tuple:
            item = get_args(kind)[0]
            count = self.random.randrange(0, 4)
            if get_origin(item) is Literal:
                return tuple(self.random.sample(get_args(item), min(count, len(get_args(item)))))
            return tuple(self.path() for _ in range(count))
        if kind is bool:
            return self.random.random() < 0.5
        if kind is int:
            return self.integer(spec)
        if kind is float:
            return self.number(spec)
        if kind is str:
            if spec.dotted in ("input.prompt", "input.negative_prompt"):
                return self.text()
            path = self.path()
            return path if path.strip() else "x"
        parts = self.random.sample(WEIGHT_PARTS, self.random.randrange(0, 4))
        return {part: self.path() + "x" for part in parts}


def random_run(seed: int) -> dict[str, Any]:
    """Values for a random part of the keys, or for all, that are possible together."""
    values = Values(seed)
    share = values.random.choice([0.1, 0.5, 1.0])
    run = {dotted: values.of(spec) for dotted, spec in keys().items() if values.random.random() < share}
    if {"input.image", "input.video"} <= run.keys():
        del run[values.random.choice(["input.image", "input.video"])]
    for section in ("output", "data"):
        if len({f"{section}.width", f"{section}.height"} & run.keys()) == 1:
            run |= {f"{section}.width": 64, f"{section}.height": 8192}
    frames, overlap = run.get("long_video.num_frames"), run.get("long_video.overlap_frames")
    if overlap == 0 or (frames is not None and overlap is not None and overlap >= frames):
        run["long_video.overlap_frames"] = 1
    return run


@pytest.mark.parametrize("seed", range(60))
def test_random_run_comes_back_exactly(seed: int, tmp_path: Path) -> None:
    run = random_run(seed)
    first = resolved(run)
    text = dump_run(first, "infer")
    again = reread(text, tmp_path)
    assert again.cfg == first.cfg
    assert asked(again) == asked(first) == run
    assert dump_run(again, "infer") == text
    others = yaml.safe_load(text)
    assert others.pop("command") == "infer"
    others.pop("asked")
    assert others == plain(first.cfg)


def test_all_keys_come_up_in_the_random_runs() -> None:
    assert set().union(*(random_run(seed) for seed in range(60))) == set(keys())


@pytest.mark.parametrize("text", LOOKS_LIKE_SOMETHING_ELSE)
def test_texts_that_look_like_something_else(text: str, tmp_path: Path) -> None:
    first = resolved({"input.prompt": text, "model.lora": (text, text), "model.weights": {"dit": text + "x"}})
    dumped = dump_run(first, "infer")
    assert reread(dumped, tmp_path).cfg == first.cfg
    assert yaml.safe_load(dumped)["input"]["prompt"] == text


@pytest.mark.parametrize("number", [1e-05, 1e-4, 0.1 + 0.2, 5e-324, 2.5e-16, 9.999999999999999, 10.0, 1e-300])
def test_floats_to_the_last_bit(number: float, tmp_path: Path) -> None:
    first = resolved({"train.learning_rate": number})
    dumped = dump_run(first, "infer")
    assert reread(dumped, tmp_path).cfg.train.learning_rate == number
    other = yaml.safe_load(dumped)["train"]["learning_rate"]
    assert type(other) is float and other == number


def test_a_name_with_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    name = b"caf\xe9.wav".decode("utf-8", "surrogateescape")
    first = resolved({"input.audio": name})
    dumped = dump_run(first, "infer")
    assert "\\udce9" in dumped
    assert reread(dumped, tmp_path).cfg == first.cfg


def test_largest_seed(tmp_path: Path) -> None:
    first = resolved({"runtime.seed": sys.maxsize})
    assert reread(dump_run(first, "infer"), tmp_path).cfg.runtime.seed == 2**63 - 1


def test_nothing_asked(tmp_path: Path) -> None:
    first = resolved({})
    dumped = dump_run(first, "infer")
    assert "asked: {}" in dumped
    assert reread(dumped, tmp_path) == dataclasses.replace(first, origins=reread(dumped, tmp_path).origins)


def test_run_file_of_another_command_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(dump_run(resolved({}), "train i2v"), encoding="utf-8")
    assert read_config(path).command == "train i2v"
    with pytest.raises(ConfigError, match=r"belongs to `avatarctl train i2v`.*--config"):
        read_config(path, command="infer")


def test_edited_value_that_contradicts_asked_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("asked:\n  sampling:\n    steps: 3\nsampling:\n  steps: 4\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run.yaml:3: sampling.steps is given another value in line 5"):
        read_config(path)


def test_asked_alone_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("asked:\n  sampling:\n    steps: 3\n", encoding="utf-8")
    file = read_config(path)
    assert file.settings["sampling.steps"].value == 3 and file.asked == {"sampling.steps"}
