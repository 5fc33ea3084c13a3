"""Every key takes what it says and refuses everything else, in files and on the command line.

Values are derived from each key's own type and bounds by the rules written here, not by the parser's.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest

from avatarctl.config import KeySpec, RunConfig, keys, read_assignment, read_config
from avatarctl.config.rules import WEIGHT_PARTS
from avatarctl.errors import ConfigError

PROMISED = {  # the public table of sections and keys, written out again
    "model": "name channels audio_offset weights_root weights lora compat",
    "input": "image fit video audio prompt negative_prompt jobs latents face face_detector",
    "sampling": "steps guidance_scale audio_guidance_scale guidance_rule null_audio batch_branches "
    "latents_dtype guidance_interval shift solver cache "
    "cache_threshold preset",
    "long_video": "strategy num_frames overlap_frames schedule blend carry max_tokens max_size audio_window",
    "output": "path fps width height lead_silence length soundtrack paste crf preview save_latents overwrite",
    "memory": "mode group_blocks vae_gradient activation_checkpointing base_precision optimizer_device "
    "swap_blocks shard",
    "data": "path videos num_frames width height fps sample_rate window stride max_windows faces face_look "
    "audio_name mask references artifact_dtype mask_rule reference_sequence reference_frames format shard "
    "workers force",
    "train": "mode init optimizer learning_rate final_learning_rate schedule hold betas weight_decay "
    "warmup_steps max_steps batch_size gradient_accumulation lora_rank lora_alpha lora_targets text_dropout "
    "audio_dropout prefix_frames prefix_dropout prefix_noise timestep_weight mouth_weight clip_norm ema",
    "aux": "losses sync_weight lpips_weight trepa_weight recon_weight sync_mode lpips_backend window stride "
    "frames trepa_mode mouth_crop max_sigma",
    "checkpoint": "every keep_last resume accept_schedule",
    "validation": "every sets samples steps metrics holdout",
    "runtime": "seed device dtype attention compile gpus trackers log_level",
}

TEXTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # taken, refused
    "input.face": (("none", "largest", "0", "1,2,3,4"), ("", "1,2,3", "1,2,0,4", "-1", "biggest", "٣")),
    "runtime.device": (("auto", "cpu", "cuda", "cuda:3"), ("", "gpu", "cuda:", "cuda:x", "cpu:0", "CPU")),
    "data.shard": (("0/1", "3/4"), ("", "4/4", "1", "-1/4", "a/b", "1/0", "1/4/2")),
    "input.prompt": (("", "yes", "0", " a: b # c"), ()),
    "input.negative_prompt": (("", "~ß"), ()),
}
NUMBERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # rules that bounds do not express
    "long_video.num_frames": (("81",), ("80", "82", "83")),
    "long_video.overlap_frames": (("0", "1", "13"), ("2", "12")),
    "output.width": (("720",), ("500", "24")),
    "output.height": (("400",), ("40", "8")),
    "data.num_frames": (("81",), ("80",)),
    "data.width": (("512",), ("500",)),
    "data.height": (("512",), ("500",)),
    "data.window": (("81",), ("80",)),
    "data.reference_frames": (("9",), ("8",)),
}
LISTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "model.lora": (("a.safetensors:0.5", "with, comma"), ()),
    "sampling.guidance_interval": (
        ("0,1", "0.25, 0.75"),
        ("1,0", "0.5", "0,0.5,1", "0,1.1", "-0.1,1", "a,b"),
    ),
    "train.betas": (("0.9,0.999", "0, 0.5"), ("0.9", "0.9,1", "0.9,0.99,0.9", "-0.1,0.9", "a,b")),
    "train.lora_targets": (("q", "q,k,ffn.0"), ()),
    "train.prefix_frames": (("0", "1,5,13"), ("2", "1,-3", "1,100003", "a", "1.0")),
    "aux.losses": (("sync", "sync,lpips,trepa"), ("sync,sync", "lips", "sync;lpips")),
    "validation.sets": (("some,folder",), ()),
    "validation.metrics": (("flow", "sync,lpips,psnr"), ("flow,flow", "fid")),
    "runtime.trackers": (("jsonl", "jsonl,wandb"), ("jsonl,jsonl", "csv")),
}

ALL = [pytest.param(spec, id=spec.dotted) for spec in keys().values()]


def kind(spec: KeySpec) -> Any:
    """The key's type without None."""
    if get_origin(spec.type) in (Union, types.UnionType):
        return next(arg for arg in get_args(spec.type) if arg is not type(None))
    return spec.type


def is_list(spec: KeySpec) -> bool:
    return get_origin(kind(spec)) is tuple


def is_mapping(spec: KeySpec) -> bool:
    return get_origin(kind(spec)) not in (None, tuple, Literal)


def taken(spec: KeySpec) -> list[str]:
    for table in (TEXTS, LISTS):
        if spec.dotted in table:
            return list(table[spec.dotted][0])
    if is_mapping(spec):
        return [f"{part}=/some where/{part}" for part in WEIGHT_PARTS]
    if get_origin(kind(spec)) is Literal:
        return [str(choice) for choice in get_args(kind(spec))]
    if kind(spec) is bool:
        return ["true", "false"]
    if kind(spec) is str:
        return ["a", "a b/ü", "025", "off"]
    lowest = spec.key.low if spec.key.above is None else math.nextafter(spec.key.above, math.inf)
    bounds = [lowest, spec.key.high]
    extra = NUMBERS.get(spec.dotted, ((), ()))[0]
    if kind(spec) is int:
        return [*(str(int(bound)) for bound in bounds if bound is not None), *extra]
    return [repr(float(bound)) for bound in bounds if bound is not None] + ["1e-3"] * (not spec.key.low)


def refused(spec: KeySpec) -> list[str]:
    for table in (TEXTS, LISTS):
        if spec.dotted in table:
            return list(table[spec.dotted][1])
    if is_mapping(spec):
        return ["dti=a", "dit=", "dit", "=a", "dit=  "]
    if get_origin(kind(spec)) is Literal:
        first = str(get_args(kind(spec))[0])
        return ["", f"{first}x", f" {first}", first.upper() if first != first.upper() else "no", "null"]
    if kind(spec) is bool:
        return ["", "yes", "no", "on", "off", "1", "0", "True", "TRUE", "null"]
    if kind(spec) is str:
        return ["", "   ", "a\0b"]
    wrong = ["", "yes", "on", "null", "nan", ".nan", ".inf", "inf", "0,5", "0x10", "1_000", "٣", "2026-01-01"]
    low, above, high = spec.key.low, spec.key.above, spec.key.high
    assert high is not None, "every number needs an upper bound"
    assert (low is None) != (above is None), "and exactly one lower bound"
    if kind(spec) is int:
        assert low is not None
        wrong += [str(int(low) - 1), str(int(high) + 1), "1.5", "1e2", "1.0e+2", "9" * 30, "9" * 5000]
    elif low is not None:
        wrong += [repr(math.nextafter(low, -math.inf)), repr(math.nextafter(high, math.inf)), "1e999"]
    else:
        wrong += [repr(above), "-1", repr(math.nextafter(high, math.inf)), "1e999"]
    return [*wrong, *NUMBERS.get(spec.dotted, ((), ()))[1]]


def as_expected(spec: KeySpec, text: str) -> Any:
    """The value that `text` stands for, by Python's own constructors."""
    one = kind(spec)
    if is_mapping(spec):
        part, _, path = text.partition("=")
        return {part: path}
    if is_list(spec):
        item = get_args(one)[0]
        parts = [text] if spec.key.split is None else [part.strip() for part in text.split(spec.key.split)]
        return tuple(part if get_origin(item) is Literal else item(part) for part in parts)
    if get_origin(one) is Literal:
        return type(get_args(one)[0])(text)
    return text == "true" if one is bool else one(text)


def test_the_promised_keys_and_no_others() -> None:
    promised = {f"{section}.{name}" for section, names in PROMISED.items() for name in names.split()}
    assert set(keys()) == promised


def test_stated_defaults() -> None:
    cfg = RunConfig()
    assert (cfg.memory.mode, cfg.memory.vae_gradient) == ("auto", "segment")
    assert (cfg.memory.activation_checkpointing, cfg.data.mask_rule) == ("block", "all")
    assert (cfg.long_video.strategy, cfg.long_video.audio_window) == ("chunks", 30.0)
    assert (cfg.output.lead_silence, cfg.output.fps, cfg.model.compat) == (0.0, 25, "none")
    weights = (cfg.aux.sync_weight, cfg.aux.lpips_weight, cfg.aux.trepa_weight, cfg.aux.recon_weight)
    assert weights == (0.1, 0.1, 10.0, 1.0)


def test_sections_are_frozen() -> None:
    cfg = RunConfig()
    for section in PROMISED:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(cfg, section, None)
        name = PROMISED[section].split()[0]
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(getattr(cfg, section), name, None)


@pytest.mark.parametrize("spec", ALL)
def test_default_fits_its_own_key(spec: KeySpec) -> None:
    if spec.default is None or spec.default == () or spec.default == {}:
        return
    if spec.key.from_row:
        pytest.fail("a key that the model fills has no default of its own")
    value = spec.default
    text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    if isinstance(value, bool):
        text = text.lower()
    assert read_assignment(f"{spec.dotted}={text}", "-o")[1].value == value


@pytest.mark.parametrize("spec", ALL)
def test_taken_on_the_command_line(spec: KeySpec) -> None:
    texts = taken(spec)
    assert texts
    for text in texts:
        dotted, setting = read_assignment(f"{spec.dotted}={text}", "-o")
        want = as_expected(spec, text)
        assert (dotted, setting.value) == (spec.dotted, want)
        assert type(setting.value) is type(want)


@pytest.mark.parametrize("spec", ALL)
def test_refused_on_the_command_line(spec: KeySpec) -> None:
    for text in refused(spec):
        with pytest.raises(ConfigError) as caught:
            read_assignment(f"{spec.dotted}={text}", "-o here")
        message = str(caught.value)
        assert message.startswith("-o here: ") and spec.dotted in message, text
        assert "expected" in message or "twice" in message, text
        assert "\n" not in message and len(message) < 400, text


def _yaml(spec: KeySpec, text: str, quote: bool) -> str:
    section, name = spec.dotted.split(".")
    if is_mapping(spec):
        part, _, path = text.partition("=")
        return f"{section}:\n  {name}:\n    {part}: {path}\n"
    shown = f"'{text}'" if quote else text
    return f"{section}:\n  {name}: {shown}\n"


@pytest.mark.parametrize("spec", ALL)
def test_taken_in_a_file(spec: KeySpec, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    for text in taken(spec):
        listed = is_list(spec) and spec.key.split is not None
        quote = kind(spec) is str or (is_list(spec) and not listed)
        path.write_text(_yaml(spec, text, quote), encoding="utf-8")
        file = read_config(path)
        assert file.settings[spec.dotted].value == as_expected(spec, text)
        assert file.settings[spec.dotted].origin == f"{path}:2"
        assert file.asked == {spec.dotted}


@pytest.mark.parametrize("spec", ALL)
def test_refused_in_a_file(spec: KeySpec, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    quote = kind(spec) is str
    texts = [
        text
        for text in refused(spec)
        if "\0" not in text and text[:1] != "=" and (quote or text == text.strip())
    ]
    bodies = [_yaml(spec, text, quote) for text in texts]
    section, name = spec.dotted.split(".")
    bodies += [f"{section}:\n  {name}: {empty}\n" for empty in ("", "~", "null", "NULL")]
    bodies += [f"{section}:\n  {name}: [[1]]\n", f"{section}:\n  {name}: {{a: {{b: c}}}}\n"]
    if not is_list(spec):
        bodies.append(f"{section}:\n  {name}: [1, 2]\n")
    if not is_mapping(spec):
        bodies.append(f"{section}:\n  {name}: {{a: b}}\n")
    if kind(spec) in (int, float, bool):
        bodies.append(f"{section}:\n  {name}: '{taken(spec)[0]}'\n")  # quoted: a text, not a number
    for body in bodies:
        path.write_text(body, encoding="utf-8")
        with pytest.raises(ConfigError) as caught:
            read_config(path)
        message = str(caught.value)
        assert re.match(rf"{re.escape(str(path))}:[23]: ", message), body
        assert spec.dotted in message or spec.name in message, body


def test_numbers_are_what_is_written() -> None:
    """YAML 1.1 makes 21 of 025, a text of 1e-4 and 62 of 1:02."""
    assert read_assignment("sampling.steps=025", "-o")[1].value == 25
    assert read_assignment("train.learning_rate=1e-4", "-o")[1].value == 0.0001
    assert read_assignment("long_video.strategy=off", "-o")[1].value == "off"
    with pytest.raises(ConfigError):
        read_assignment("sampling.steps=1:02", "-o")


def test_parts_of_weights_are_set_one_by_one() -> None:
    assert read_assignment("model.weights.dit=/a=b", "-o") == (
        "model.weights",
        read_assignment("model.weights=dit=/a=b", "-o")[1],
    )
    value = read_assignment("model.weights.vae=x", "-o")[1].value
    assert isinstance(value, Mapping) and value == {"vae": "x"}
