"""The column "predicted memory" of configs/README.md: every shipped configuration of `infer` and training,
counted as `avatarctl vram-profile COMMAND --config NAME` counts it.

    python tests/bench/preset_memory.py                    compares; ends with 1 where a line is another
    python tests/bench/preset_memory.py --write            writes the lines; then run docs/generate.py
    python tests/bench/preset_memory.py --write -24gb      those whose names end with one of the words

Of `infer` at 720x400 for OmniAvatar and 480x832 for StableAvatar, the sizes that their publishers state
figures for; of training at the size in the file. Most of an hour of one core, nearly all of it training.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import replace

from avatarctl.config import RunConfig, preset_folder, preset_names, read_config, resolve
from avatarctl.errors import NotYetSupported
from avatarctl.loading.weighed import weighed
from avatarctl.placement.seats import seated, shown
from avatarctl.profiling.account import Account
from avatarctl.profiling.inference import profile_inference
from avatarctl.profiling.training import profile_training
from avatarctl.registry import COMPAT, Row, based_on, find_model

PREDICTED = re.compile(r"^# Predicted: .*\n", re.MULTILINE)
CARD = re.compile(r"^# Card: .*\n", re.MULTILINE)
SIZES = {"omniavatar": (720, 400), "stableavatar": (480, 832)}


def configured(name: str, command: str) -> tuple[Row, RunConfig]:
    file = read_config(preset_folder() / f"{name}.yaml", command=command)
    cfg = resolve(lambda each: (based_on(each) or find_model(each)).for_config, COMPAT, file, {}).cfg
    assert cfg.model.name is not None
    return based_on(cfg.model.name) or find_model(cfg.model.name), cfg


def predicted(name: str) -> str:
    """What the line says behind its first word."""
    if name.startswith("train/"):
        row, cfg = configured(name, "train i2v" if "-i2v" in name else "train v2v")
        try:
            account = profile_training(row, cfg)
        except NotYetSupported as error:
            return f"not counted: {error.what}"
        data = cfg.data
        return in_words(account, f"{data.width}x{data.height}, {data.num_frames} frames")
    row, cfg = configured(name, "infer")
    width, height = SIZES[row.family]
    mode = "full" if cfg.memory.mode == "auto" else cfg.memory.mode
    cfg = replace(cfg, output=replace(cfg.output, width=width, height=height),
                  memory=replace(cfg.memory, mode=mode))  # fmt: skip
    packing = seated(weighed(row, None, cfg)[0], cfg.memory).packing
    return in_words(profile_inference(row, cfg), f"{width}x{height}", packing)


def in_words(account: Account, frame: str, packing: int = 0) -> str:
    peak = shown(account.peak_bytes).removesuffix(" GiB")
    waits = f"; {shown(account.host)} on the host" if account.host else ""
    if account.host and packing:
        packed = shown(account.host + packing).removesuffix(" GiB")
        waits += f", {packed} while they are packed"
    return f"{shown(account.live_bytes)} live at {frame}, {peak} with the allowance{waits}"


def main() -> int:
    write, words = "--write" in sys.argv, tuple(word for word in sys.argv[1:] if word != "--write")
    others = 0
    for name in preset_names():
        if not name.startswith(("infer/", "train/")) or (words and not name.endswith(words)):
            continue
        begun = time.process_time()
        line = f"# Predicted: {predicted(name)}\n"
        path = preset_folder() / f"{name}.yaml"
        text = path.read_text(encoding="utf-8")
        if line not in text:
            others += 1
            if write:
                said = CARD.search(PREDICTED.sub("", text))
                assert said is not None
                text = PREDICTED.sub("", text)
                path.write_text(
                    text[: said.end()] + line + text[said.end() :], encoding="utf-8", newline="\n"
                )
        seconds = time.process_time() - begun
        print(f"{name:44} {seconds:6.0f} CPU s  {line[13:-1]}", flush=True)
    return int(others > 0 and not write)


if __name__ == "__main__":
    sys.exit(main())
