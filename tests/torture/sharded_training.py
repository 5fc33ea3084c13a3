"""Whole runs of two processes that share the model: killed within a pass, resumed by two and by one.

    python tests/torture/sharded_training.py

On four prepared clips and a CPU, with an average and validations. One process trains; two that share do, and
their losses, scores and weights are those of one up to rounding; again two, of which the second is killed,
or meets an error, while the first waits for its part of a block: all end within a minute, with 6 or the exit
code of the error. Two go on to the
bits of those that nobody disturbed, one to numbers beside them. Takes five minutes of a core.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from avatarctl.demo.samples import write_samples
from avatarctl.errors import UnusableFile
from avatarctl.loading.trained import TRAINED
from avatarctl.training import trainer
from avatarctl.training.weights_file import read_trained

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.training.running import bits, forked, typed
from tests.training.test_many_processes import LINE, ONE, TWO, VALIDATED, _forking


def second_meets(happening: Callable[[], None]) -> Callable[[], None]:
    """Rank 1, behind the third block of the second step."""

    def prepare() -> None:
        _forking()
        accumulate = trainer.Trainer.accumulate

        def watched(self: trainer.Trainer, batch: list[trainer.TrainingSample]) -> dict[str, float]:
            if self.step == 1 and self.world.rank == 1:
                blocks: Any = self.network.dit.blocks
                blocks[2].register_forward_hook(lambda *_: happening())
            return accumulate(self, batch)

        trainer.Trainer.accumulate = watched  # type: ignore[method-assign]

    return prepare


def death() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def error() -> None:
    """One of ours, as a sample may raise it that is encoded within the step."""
    raise UnusableFile("cannot be read", where="clip")


def defect() -> None:
    raise RuntimeError("shapes do not fit")


def apart(one: Path, other: Path) -> float:
    """The largest difference of a weight behind three steps."""
    pair = [read_trained(run / "checkpoint-3" / TRAINED) for run in (one, other)]
    return max(float((pair[0][name] - pair[1][name]).abs().max()) for name in pair[0])


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def run_all(folder: Path) -> None:
    data, samples, said = folder / "prepared", folder / "samples", folder / "said.txt"
    for each in (data, samples):
        write_samples(each, range(4), 17, "audio.wav")
    for command in ("precompute-latents", "precompute-audio"):
        made = typed(command, "--data", data, "--size", "32x32", "--frames", "9")
        assert made.exit_code == 0, made.output
    line = (*LINE, "--data", data, "--resume", "auto", "--ema", "0.5", *VALIDATED, "--sets", samples)
    shared = (*line, *TWO, "-o", "memory.shard=fsdp2")
    one, whole, run, other = (folder / name for name in ("one", "whole", "run", "other"))
    alone = typed(*line, *ONE, "--out", one)
    assert alone.exit_code == 0, alone.output
    assert forked(_forking, *shared, "--out", whole, said=said) == 0, said.read_text()
    pairs = list(zip(losses(one), losses(whole), strict=True))
    print(f"losses of one and of two that share: {pairs}; weights {apart(one, whole):.2g} apart")
    assert all(abs(a / b - 1) < 1e-4 for a, b in pairs)
    began = time.monotonic()
    code = forked(second_meets(death), *shared, "--out", run, said=said)
    text = said.read_text()
    assert code == 6 and "Traceback" not in text and text.count("error") == 1, (code, text)
    print(f"killed within a pass: exit 6 in {time.monotonic() - began:.0f} s of wall clock, all of it")
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    for happening, expected, told in ((error, 3, "clip: cannot be read"), (defect, 1, "shapes do not fit")):
        shutil.copytree(run, other)
        began = time.monotonic()
        code = forked(second_meets(happening), *shared, "--out", other, said=said)
        text = said.read_text()
        seconds = time.monotonic() - began
        print(f"{happening.__name__} within a pass: exit {code} in {seconds:.0f} s, all of it")
        assert code == expected and told in text and seconds < 60, (code, text)
        assert happening is defect or ("Traceback" not in text and text.count("error: ") == 1), text
        shutil.rmtree(other)
    shutil.copytree(run, other)
    assert forked(_forking, *shared, "--out", run, said=said) == 0, said.read_text()
    assert "resumed behind step 1" in said.read_text()
    assert bits(run, 3) == bits(whole, 3)
    for name in ("checkpoint-3/ema_weights.safetensors", "validation.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    alone = typed(*line, *ONE, "--out", other)
    assert alone.exit_code == 0 and "resumed behind step 1" in alone.output, alone.output
    print(f"saved by two, gone on by one: weights {apart(other, whole):.2g} apart")
    assert apart(other, whole) < 1e-4


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        run_all(Path(name))
    print("as it should be")
