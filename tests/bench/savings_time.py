"""What each setting that saves memory in training costs in time, beside the step without it.

    python tests/bench/savings_time.py

An OmniAvatar transformer of four blocks of width 768, adapters of rank 32, 512 tokens, float32, one thread:
wide enough that matrices take most of the time. CPU seconds of whole steps of the trainer, medians of steps
that take turns, against the step with all activations kept and everything on the device. On a CPU a copy to
the host is one from memory to memory, and nothing goes on beside it: an accelerator copies over a slower way
while it computes. Widening weights of eight bits takes as long for any number of tokens, of which a clip of
512x512 and 81 frames has forty times as many. Two minutes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import tempfile
from pathlib import Path

import torch
from reporting import print_table
from training_work import cpu, prepared, trainer_on, wide_network

from avatarctl.training.trainer import Trainer

SIZES = {"num_attention_heads": 6, "attention_head_dim": 128, "ffn_dim": 2304, "num_layers": 4}
BLOCKS, SIDE, FRAMES, TURNS = 4, 128, 29, 11
BLOCK, AWAY = "memory.activation_checkpointing=block", f"memory.swap_blocks={BLOCKS}"
OFFLOAD = "memory.activation_checkpointing=block_offload"
MOMENTS, EIGHT = "memory.optimizer_device=cpu", "memory.base_precision=fp8"
WAYS = {
    "nothing saved": (),
    "`activation_checkpointing block`": (BLOCK,),
    "`block_offload`": (OFFLOAD,),
    "`block` and `swap_blocks` of all": (BLOCK, AWAY),
    "`optimizer_device cpu`": (MOMENTS,),
    "`base_precision fp8`": (EIGHT,),
    "all of it": (OFFLOAD, AWAY, MOMENTS, EIGHT),
}


def step_of(trainer: Trainer) -> None:
    trainer._one_step(trainer._next(trainer.data.read(trainer._order.places(trainer.step))), 0.0, 0.0)


def main() -> None:
    torch.set_num_threads(1)
    words = ("train.mode=lora", "train.lora_rank=32", "train.batch_size=1", f"train.max_steps={TURNS + 1}",
             "train.timestep_weight=none", "memory.activation_checkpointing=none")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        data = prepared(base / "data", 1, SIDE, FRAMES)
        with wide_network(SIZES, BLOCKS):
            trainers = {
                way: trainer_on(data, base / str(index), SIDE, FRAMES, *words, *own)
                for index, (way, own) in enumerate(WAYS.items())
            }
        turns = [
            {way: cpu(lambda made=trainer: step_of(made)) for way, trainer in trainers.items()}
            for _ in range(TURNS + 1)
        ][1:]  # the first is slower whatever it is, and has no moments
    took = {way: statistics.median(turn[way] for turn in turns) for way in WAYS}
    plain = took["nothing saved"]
    rows = [(way, f"{seconds:.2f}", f"{seconds / plain:.2f}") for way, seconds in took.items()]
    print_table("savings_time: a step of training", ("", "CPU s", "against nothing saved"), rows)


if __name__ == "__main__":
    main()
