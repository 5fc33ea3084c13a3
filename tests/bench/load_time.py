"""How long does loading take, and how much memory, at the true size of OmniAvatar 1.3B?

    python tests/bench/load_time.py

Random bfloat16 weights in the published layout are written to a temporary folder (about 7 GB): base, adapter
of rank 128, VAE and audio encoder at full size, a small text encoder. Every figure is that of a child
process of its own, with the files in the page cache.

Targets: live bytes at most 1.1 times the final model; the time stands beside that of
`safetensors.torch.load_file`, which maps the file: it is followed by reading one byte of every page, as any
use of the weights would.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reporting import print_table, python, verdict

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for the writer of the release

LIMIT = 1.1
REPEATS = 3
FULL = "full/diffusion_pytorch_model.safetensors"


def write_release(root: Path) -> None:
    """In a child, so that the parent stays small."""
    import torch
    from safetensors.torch import save_file

    from tests.pipelines import tiny_release as release

    made = release.tiny_release(release.OMNIAVATAR_1_3B, torch.bfloat16)
    made.write(root, "1.3B")
    whole = {name: tensor for name, tensor in made.adapter.items() if "lora" not in name}
    (root / FULL).parent.mkdir()
    save_file(made.base | whole, root / FULL)
    release.write_json((root / FULL).with_name("config.json"), {"num_heads": made.dims.heads})


def map_and_touch(root: Path) -> dict[str, float]:
    import torch
    from safetensors.torch import load_file

    started = time.perf_counter()
    state = load_file(root / FULL)
    mapped = time.perf_counter() - started
    for tensor in state.values():
        tensor.reshape(-1).view(torch.uint8)[::4096].sum()
    return {"seconds": time.perf_counter() - started, "mapped": mapped}


def read_and_copy(root: Path) -> dict[str, float]:
    """`load_file` into memory of one's own, as a program needs it that casts or moves what it loads."""
    from safetensors.torch import load_file

    started = time.perf_counter()
    state = {name: tensor.clone() for name, tensor in load_file(root / FULL).items()}
    return {"seconds": time.perf_counter() - started, "tensors": len(state)}


def load_full(root: Path) -> dict[str, float]:
    import torch

    from avatarctl.loading.parts import transformer
    from avatarctl.weights.recognise import open_model

    started = time.perf_counter()
    network = transformer(open_model(root / FULL), torch.bfloat16, torch.device("cpu"))
    return {"seconds": time.perf_counter() - started, "bytes": size(network)}


def load_merged(root: Path) -> dict[str, float]:
    import torch

    from avatarctl.loading.parts import transformer
    from avatarctl.weights.merge import merge_adapter
    from avatarctl.weights.recognise import open_model

    started = time.perf_counter()
    base = open_model(root / "Wan2.1-T2V-1.3B" / "diffusion_pytorch_model.safetensors")
    held = merge_adapter(base, open_model(root / "OmniAvatar-1.3B"), dtype="F32")
    network = transformer(held, torch.bfloat16, torch.device("cpu"))
    return {"seconds": time.perf_counter() - started, "bytes": size(network)}


def live_bytes(root: Path) -> dict[str, float]:
    """Of the merging load, which does most. Counting takes time, so this is a run of its own."""
    from avatarctl.live_bytes import LiveBytes

    with LiveBytes() as live:
        return load_merged(root) | {"live": live.peak}


def run_one_step(root: Path) -> dict[str, float]:
    """The whole program but for the file: all parts loaded, one step of one chunk of 29 frames at 64x64."""
    from avatarctl.demo.sample import sample_image
    from avatarctl.events import Event, Stage, StepFinished
    from avatarctl.media import open_audio
    from avatarctl.pipelines.infer import generate
    from avatarctl.pipelines.job import Job, check_job
    from avatarctl.registry import configure, find_model

    marks: dict[str, float] = {}

    def emit(event: Event) -> None:
        if isinstance(event, StepFinished):
            marks["step"] = time.perf_counter()
        elif isinstance(event, Stage):
            marks[event.name] = time.perf_counter()

    row = find_model("omniavatar-1.3b")
    cfg = configure(
        f"model.name={row.name}", f"model.weights_root={root}", "output.width=64", "output.height=64",
        "sampling.steps=1", "sampling.guidance_scale=1", "long_video.num_frames=29",
        "long_video.overlap_frames=1",
    )  # fmt: skip
    job = Job(sample_image(), open_audio(root / "voice.wav"), "a person", "")
    plan = check_job(cfg, row, job, emit)
    started = time.perf_counter()
    frames = sum(block.pixels.shape[1] for block in generate(plan, emit=emit))
    return {
        "loading": marks["sampling"] - started,
        "sampling": marks["step"] - marks["sampling"],
        "seconds": time.perf_counter() - started,
        "frames": frames,
    }


def size(network: Any) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in network.parameters()))


CHILDREN: dict[str, Callable[[Path], dict[str, float] | None]] = {
    each.__name__: each
    for each in (
        write_release,
        map_and_touch,
        read_and_copy,
        load_full,
        load_merged,
        live_bytes,
        run_one_step,
    )
}


def measure(name: str, root: Path) -> dict[str, float]:
    """Figures of a child, with its largest resident set."""
    done = subprocess.run(python(__file__, name, str(root)), stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def child(name: str, root: Path) -> None:
    from avatarctl.live_bytes import process_peak_bytes

    if name != "write_release":
        import torch  # noqa: F401  (its own time and memory are no part of loading)

        import avatarctl.loading.modules  # noqa: F401
    figures = CHILDREN[name](root) or {}
    print(json.dumps(figures | {"peak": process_peak_bytes()}))


def main() -> None:
    from reporting import write_voice

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        measure("write_release", root)
        write_voice(root / "voice.wav", 1)
        measure("map_and_touch", root)  # fills the page cache
        names = ("map_and_touch", "read_and_copy", "load_full")
        runs = [[measure(name, root) for name in names] for _ in range(REPEATS)]
        merged, live, run = (measure(name, root) for name in ("load_merged", "live_bytes", "run_one_step"))
    mapped, copied, ours = (list(of_one) for of_one in zip(*runs, strict=True))
    report(mapped, copied, ours, merged, live, run)


def report(
    mapped: list[dict[str, float]],
    copied: list[dict[str, float]],
    ours: list[dict[str, float]],
    merged: dict[str, float],
    live: dict[str, float],
    run: dict[str, float],
) -> None:
    def seconds(runs: list[dict[str, float]]) -> float:
        return statistics.median(one["seconds"] for one in runs)

    def peak(figures: dict[str, float]) -> str:
        return f"{figures['peak'] / 1e9:.1f}"

    print_table(
        f"Loading OmniAvatar 1.3B, {ours[0]['bytes'] / 1e9:.2f} GB in bfloat16 (median of {REPEATS})",
        ("what", "seconds", "process peak, GB"),
        (
            ("`safetensors.torch.load_file`, mapped and touched", f"{seconds(mapped):.2f}", peak(mapped[0])),
            ("the same, copied to memory of its own", f"{seconds(copied):.2f}", peak(copied[0])),
            ("a full model into a network that is ready to run", f"{seconds(ours):.2f}", peak(ours[0])),
            ("base and adapter of rank 128, merged", f"{merged['seconds']:.2f}", peak(merged)),
        ),
        f"A full model takes {seconds(ours) / seconds(copied):.2f} times the time of `load_file` and a copy.",
    )
    ratio = live["live"] / live["bytes"]
    print_table(
        "Live bytes of loading and merging",
        ("final model, GB", "peak, GB", "ratio", f"at most {LIMIT}"),
        ((f"{live['bytes'] / 1e9:.3f}", f"{live['live'] / 1e9:.3f}", f"{ratio:.3f}", verdict(ratio, LIMIT)),),
    )
    print_table(
        "One sampling step at true size, 64x64, a chunk of 29 frames, bfloat16, small text encoder",
        (
            "loading all parts, s",
            "until the first step is done, s",
            f"all {run['frames']:.0f} frames, s",
            "process peak, GB",
        ),
        ((f"{run['loading']:.1f}", f"{run['sampling']:.1f}", f"{run['seconds']:.1f}", peak(run)),),
    )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        child(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
