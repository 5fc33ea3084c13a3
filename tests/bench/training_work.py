"""What the trainer costs beside its networks, what its files weigh, and how long a run as typed takes.

    python tests/bench/training_work.py

CPU seconds of one process of one thread, which another program on the same cores changes less than seconds.

1. Optimizer steps of the trainer against the bare modules: the same network, two blocks of the width of the
   1.3B model on 1000 tokens, forward, backward, clipping and AdamW in a loop on tensors that are there.
   Of both the fastest step, and their ratio; target: at most 5 % more. Of the trainer's own steps the share
   of their seconds that it waits for samples whose artifacts exist, as `timing.jsonl` states both: a process
   that waits takes no CPU seconds, so this one wants an idle machine. Target: at most 2 %.
2. Parts of a step in the order of the public trainer (spec/omniavatar.md g.3, g.5, j 30, j 42), as a plain
   loop over the same networks and without its defects, against ours: what is read of a sample, and the
   auxiliary losses. The network's own pass is the same work in both.
3. Bytes, from shapes: an adapter of rank 128 of the 14B model as `convert-ckpt --dtype bfloat16` writes it,
   and, of a real run, `checkpoint-N/` for each number that is trained.
4. `avatarctl train v2v --aux sync,lpips` as it is typed.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import soundfile
import torch
from click.testing import CliRunner
from reporting import print_table, python, timed_process, verdict

from avatarctl.cli import app
from avatarctl.data.training_set import TrainingSample
from avatarctl.demo.samples import write_samples
from avatarctl.events import silent
from avatarctl.families import family_named
from avatarctl.models.omniavatar import OmniAvatarTransformer
from avatarctl.models.vae_gradient import decode_with_gradient
from avatarctl.registry import ROWS, configure, find_model
from avatarctl.training import start
from avatarctl.training.aux_step import implied_latents
from avatarctl.training.frame_losses import lpips_loss
from avatarctl.training.objective import flow_step
from avatarctl.training.run import TrainingRun
from avatarctl.training.run_folder import TIMING
from avatarctl.training.sync_loss import sync_cosines, sync_loss
from avatarctl.training.trainer import Trainer, _aux_batch
from avatarctl.weights.layout import Sizes
from avatarctl.weights.layouts import OMNIAVATAR

MODEL = "cartoon-v2v"
STEPS = 6
WIDE = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 4}
PLAIN = ("train.timestep_weight=none", "memory.activation_checkpointing=none")


def typed(*words: object) -> None:
    result = CliRunner().invoke(app, list(map(str, words)))
    if result.exit_code:
        raise SystemExit(f"training_work: {words[0]} ended with {result.exit_code}: {result.output}")


def cpu(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def prepared(folder: Path, count: int, side: int, frames: int) -> Path:
    write_samples(folder, range(count), frames, "audio.wav")
    for command in ("precompute-latents", "precompute-audio"):
        typed(command, "--data", folder, "--size", f"{side}x{side}", "--frames", frames)
    return folder


def trainer_on(data: Path, run: Path, side: int, frames: int, *words: str) -> Trainer:
    cfg = configure(
        f"model.name={MODEL}", f"data.path={data}", f"data.width={side}", f"data.height={side}",
        f"data.num_frames={frames}", *words,
    )  # fmt: skip
    made = TrainingRun("train v2v", cfg, find_model(MODEL), family_named("omniavatar"), run, silent)  # type: ignore[arg-type]
    run.mkdir()
    (run / "run.yaml").write_text("command: train v2v\nasked: {}\n")
    return made._trainer(made.open_data())


@contextmanager
def wide_network(sizes: Mapping[str, int] = WIDE, blocks: int = 2) -> Any:
    """The cartoon model's encoders, and a transformer as wide as the 1.3B's, or of other sizes."""

    row = find_model(MODEL)

    def plan(*_: Any) -> start.StartPlan:
        return start.StartPlan(row, OMNIAVATAR, {"model": row.name}, {})

    def make(_: start.StartPlan, cfg: Any, *__: Any) -> start.Start:
        small = {name: list(v) if isinstance(v, tuple) else v for name, v in row.network["dit"].items()}
        dit = OmniAvatarTransformer(**{**small, **sizes, "in_channels": cfg.model.channels}).eval()
        del dit.blocks[blocks:]  # fewer than four have no audio layer
        return start.Start(dit, OMNIAVATAR, {"model": row.name}, {})

    with (
        mock.patch.object(start, "plan_start", plan),
        mock.patch.object(start, "start_network", make),
    ):
        yield


def bare_step(trainer: Trainer, inputs: tuple[Any, ...], optimizer: torch.optim.Optimizer) -> None:
    x, t, text, audio, target = inputs
    velocity = trainer.network.dit(x, t, text, audio, mode="raw")
    (velocity.float() - target).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(trainer.network.trainables.parameters.values(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def overhead(base: Path) -> list[tuple[str, ...]]:
    side, frames = 160, 37  # 10 x 10 x 10 tokens
    data = prepared(base / "wide", 2, side, frames)
    words = (
        "train.mode=lora",
        "train.init=random",
        "train.lora_rank=32",
        "train.batch_size=1",
        *PLAIN,
    )
    with wide_network():
        trainer = trainer_on(data, base / "wide-run", side, frames, *words, f"train.max_steps={STEPS + 1}")
    (sample,) = (each for each in trainer.data.read([0]) if isinstance(each, TrainingSample))
    condition, timesteps, noise = trainer._prepared([sample], trainer._order.draws(0))
    assert condition.clean is not None and condition.channels is not None
    tokens = condition.clean[0, 0].numel() // 4
    inputs = (
        torch.cat([condition.clean, condition.channels], 1), timesteps.t, condition.text["prompt"],
        condition.audio["features"], noise,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(trainer.network.trainables.parameters.values(), lr=1e-4)
    bare, ours = [], []
    samples = trainer.data.read(trainer._order.from_step(0, STEPS + 1))
    for _ in range(STEPS + 1):  # the first one warms up
        bare.append(cpu(lambda: bare_step(trainer, inputs, optimizer)))
        started, clock = time.process_time(), time.monotonic()
        batch = trainer._next(samples)
        trainer._one_step(batch, time.monotonic() - clock, clock)
        ours.append(time.process_time() - started)
    fastest, alone = min(ours[1:]), min(bare[1:])
    timing = [json.loads(line) for line in (trainer.folder.path / TIMING).read_text().splitlines()][1:]
    waited, seconds = (sum(line[name] for line in timing) for name in ("waited", "seconds"))
    more, share = fastest / alone - 1, waited / seconds
    return [
        (f"a step of {tokens} tokens, CPU s, trainer / bare modules",
         f"{fastest:.2f} / {alone:.2f}", f"{more:+.1%}", "≤ 5 %", verdict(more, 0.05)),
        ("waiting for samples of these steps, s", f"{waited:.3f} / {seconds:.2f}", f"{share:.2%}", "≤ 2 %",
         verdict(share, 0.02)),
    ]  # fmt: skip


def public_order(base: Path) -> list[tuple[str, ...]]:
    """33 frames of 64x64."""
    side, frames = 64, 33
    data = prepared(base / "small", 2, side, frames)
    words = ("aux.losses=sync,lpips", "train.batch_size=1", "train.max_steps=9", *PLAIN)
    ours = trainer_on(data, base / "ours", side, frames, *words)
    window = trainer_on(data, base / "window", side, frames, *words, "aux.frames=16")
    (sample,) = (each for each in ours.data.read([0]) if isinstance(each, TrainingSample))
    stored = {**sample.tensors, "text": torch.zeros(1, 512, 4096)}
    for name, tensor in stored.items():
        torch.save({name: tensor.clone()}, base / f"{name}.pt")

    def read_public() -> None:
        """Every file of a sample, its text in float32 with its empty rows, and its audio, needed or not."""
        for name in stored:
            torch.load(base / f"{name}.pt", weights_only=True)
        soundfile.read(data / "000000/audio.wav", dtype="float32")

    def read_ours() -> None:
        list(ours.data.read([0]))

    draws = ours._order.draws(0)
    condition, timesteps, noise = ours._prepared([sample], draws)
    step = flow_step(ours.family, ours.network.dit, condition, timesteps, noise, ours.cfg)
    velocity = step.velocity.detach().requires_grad_()
    assert ours.aux is not None and condition.clean is not None and sample.waveform is not None
    vae, judges = ours.aux._vae, ours.aux.losses.judges
    assert judges.sync is not None and judges.lpips is not None
    waveform = sample.waveform[None]

    def judged_public() -> None:
        """All frames of both clips decoded, and judged, with all activations kept."""
        implied, _ = implied_latents(step.noisy, velocity, timesteps.sigma)
        made = decode_with_gradient(vae, implied, 0, frames, "full")
        with torch.no_grad():
            real = decode_with_gradient(vae, condition.clean, 0, frames, "full")  # type: ignore[arg-type]
        sync = sync_loss(sync_cosines(judges.sync, made, waveform, 8), "logits").mean()  # type: ignore[arg-type]
        (0.1 * sync + 0.1 * lpips_loss(judges.lpips, made, real).mean()).backward()  # type: ignore[arg-type]

    def judged(trainer: Trainer) -> None:
        batch = _aux_batch(step, [sample], draws, condition, timesteps, torch.device("cpu"))
        trainer.aux(replace(batch, velocity=velocity)).total.sum().backward()  # type: ignore[misc]

    def network() -> None:
        flow_step(ours.family, ours.network.dit, condition, timesteps, noise, ours.cfg).loss.sum().backward()

    rows, took = [], {}
    for what, theirs, own in (
        ("reading a sample", read_public, read_ours),
        ("the network, forward and backward", network, network),
        ("sync and LPIPS of all 33 frames", judged_public, lambda: judged(ours)),
        ("the same of a window of 16 (`aux.frames 16`)", judged_public, lambda: judged(window)),
    ):
        pairs = [(cpu(theirs), cpu(own)) for _ in range(4)][1:]
        took[what] = tuple(min(each) * 1000 for each in zip(*pairs, strict=True))
    read, net, whole, part = took.values()
    took["a step of these parts"] = (read[0] + net[0] + whole[0], read[1] + net[1] + whole[1])
    took["a step with the window"] = (read[0] + net[0] + whole[0], read[1] + net[1] + part[1])
    for what, (a, b) in took.items():
        rows.append((f"{what}, CPU ms, public order / ours", f"{a:.1f} / {b:.1f}", f"{a / b:.2f} x", "", ""))
    return rows


def bytes_of_files(base: Path, data: Path) -> list[tuple[str, ...]]:
    sizes = Sizes(
        width=5120, ffn=13824, layers=40, in_channels=33, out_channels=16, text_dim=4096, freq_dim=256,
        audio_hidden_size=32, audio_input_dim=14 * 768,
    )  # fmt: skip
    total = 0
    targets = ROWS["omniavatar-14b"].for_config.defaults.get("train.lora_targets") or (
        "q", "k", "v", "o", "ffn.0", "ffn.2",
    )  # fmt: skip
    for name, shape in OMNIAVATAR.shapes(sizes).items():
        wide = 4 if OMNIAVATAR.stays_float32(name) else 2
        module = name.removesuffix(".weight")
        if OMNIAVATAR.is_replaced(name):
            total += wide * torch.Size(shape).numel()
        elif name.startswith("blocks.") and any(f".{module}".endswith(f".{each}") for each in targets):
            total += 2 * 128 * sum(shape) * name.endswith(".weight")
    rows = [
        ("adapter of the 14B model, rank 128, bfloat16", f"{total / 1e9:.2f} GB", "", "≤ 1.4 GB",
         verdict(total, 1.4e9)),
    ]  # fmt: skip
    for what, limit, words in (("", 12, ()), (", with an average", 16, ("--ema", "0.9"))):
        run = base / f"weighed-{limit}"
        line = ("train", "v2v", "--data", data, "--size", "64x64", "--frames", 33, "--batch-size", 1)
        typed(*line, "--max-steps", 1, "--out", run, *words)
        held = run / "checkpoint-1"
        size = sum(path.stat().st_size for path in held.iterdir())
        header = (held / "trainable_weights.safetensors").read_bytes()
        length = int.from_bytes(header[:8], "little")
        shapes = [
            each["shape"]
            for name, each in json.loads(header[8 : 8 + length]).items()
            if name != "__metadata__"
        ]
        count = sum(torch.Size(shape).numel() for shape in shapes)
        rows.append((f"checkpoint, bytes for each trained number{what}", f"{size / count:.2f}", "",
                     f"≤ {limit} + 1 %", verdict(size / count, limit * 1.01)))  # fmt: skip
    return rows


def as_typed(base: Path) -> tuple[str, ...]:
    words = ("train", "v2v", "--aux", "sync,lpips", "--out", str(base / "typed"))
    used = timed_process(python("-m", "avatarctl", *words), time.monotonic)
    if used.code:
        raise SystemExit(f"training_work: the run as typed ended with {used.code}")
    measured = f"{used.wall:.0f} / {used.cpu:.0f}"
    return (
        "`avatarctl train v2v --aux sync,lpips`, s / CPU s",
        measured,
        "",
        "≤ 180 s",
        verdict(used.wall, 180),
    )


def main() -> None:
    torch.set_num_threads(1)
    header = ("what", "measured", "outcome", "target", "")
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        parts = public_order(base)
        print_table("training_work: parts of a step", header, parts)
        print_table("training_work: files", header, bytes_of_files(base, base / "small"))
        print_table("training_work: beside the networks", header, overhead(base))
        os.environ.pop("OMP_NUM_THREADS", None)
        print_table("training_work: as typed", header, [as_typed(base)])


if __name__ == "__main__":
    main()
