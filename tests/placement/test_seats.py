"""What a plan says of memory without building anything is what the networks then take."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from avatarctl.cli import app
from avatarctl.loading.built_in import build_on_meta
from avatarctl.loading.weighed import weighed
from avatarctl.models.fp8 import store_in_float8
from avatarctl.models.precision import is_float32_island
from avatarctl.pipelines.infer import load
from avatarctl.placement.host import HostMemory
from avatarctl.placement.seats import Part, seated
from avatarctl.profiling.fakes import fill, tensor_bytes
from avatarctl.registry import configure, find_model
from tests.placement.test_modes import CHUNKS, plan_of


def built(model: str, precision: str) -> dict[str, nn.Module]:
    """On meta, in the dtypes of a run in bfloat16 on a card."""
    parts = build_on_meta(find_model(model))
    for part, network in parts.items():
        half = torch.bfloat16 if part in ("text", "vae", "dit") else torch.float32
        fill(
            network,
            nullcontext(),
            lambda name, _, network=network, half=half: (
                torch.float32 if is_float32_island(network, name) else half
            ),
            "meta",
        )
    if precision == "fp8":
        store_in_float8(parts["dit"])
    return parts


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        ("cartoon-v2v", "bf16"),
        ("stableavatar-tiny", "bf16"),
        ("omniavatar-14b", "fp8"),
        ("stableavatar-1.3b", "fp8"),
    ],
)
def test_weights_of_a_plan_are_those_of_the_networks(model: str, precision: str) -> None:
    cfg = configure(f"model.name={model}", "runtime.dtype=bfloat16", f"memory.base_precision={precision}")
    parts, unknown = weighed(find_model(model), None, cfg)
    networks = built(model, precision)
    assert not unknown and {part.name for part in parts} == networks.keys()
    for part in parts:
        network: Any = networks[part.name]
        assert part.weights == tensor_bytes(network), part.name
        own = (list(module._parameters.values()) for module in network.modules())
        largest = max(sum(each.nbytes for each in tensors if each is not None) for tensors in own)
        assert part.largest == largest, part.name
        if part.name == "dit":
            assert list(part.blocks) == [tensor_bytes(block) for block in network.blocks]


@pytest.mark.parametrize(
    "words",
    [("memory.mode=group", "memory.group_blocks=4"), ("memory.mode=sequential",), ("memory.swap_blocks=2",)],
)
def test_what_waits_is_what_the_plan_says(words: tuple[str, ...]) -> None:
    """In the order of a run; tensors that are packed have up to 64 bytes between them."""
    plan = plan_of(*CHUNKS, *words)
    modules: Any = load(plan)
    for part in ("text", "vae", "audio", "dit"):
        getattr(modules, part)
    assert plan.seating.host <= modules.moves.host_peak < plan.seating.host * 1.01
    before = modules.moves.host_bytes
    modules.drop("dit")
    left = before - modules.moves.host_bytes
    assert plan.seating.seats[-1].host <= left < plan.seating.seats[-1].host * 1.01, "forgotten with it"


def test_seats_of_each_mode() -> None:
    """Numbers of a transformer of five blocks, by hand."""
    parts = (Part("text", 50, 30), Part("vae", 4, 2), Part("dit", 107, 6, (10, 20, 30, 20, 20)))

    def seats(*words: str) -> tuple[int, ...]:
        made = seated(parts, configure("model.name=cartoon-i2v", *words).memory)
        return made.seats[-1].device, made.seats[-1].host, made.before, made.after, made.host, made.packing

    assert seats() == (107, 0, 0, 161, 0, 0)
    assert seats("memory.mode=model") == (107, 0, 54, 111, 0, 0)
    # Groups of 30, 50 and 20: the first two together, and 7 that stay.
    assert seats("memory.mode=group", "memory.group_blocks=2") == (87, 100, 54, 91, 100, 50)
    assert seats("memory.mode=group", "memory.group_blocks=5") == (107, 100, 54, 111, 100, 100)
    # The last three leave, one coming while another is here.
    assert seats("memory.swap_blocks=3") == (87, 70, 54, 91, 70, 30)
    assert seats("memory.swap_blocks=1") == (107, 20, 54, 111, 20, 20)
    # The text encoder waits no more when the transformer does.
    assert seats("memory.mode=sequential") == (6, 107, 30, 6, 111, 30)
    # One encoder at a time, beside the 4 that stay.
    parts = (*parts[:2], Part("image", 60, 5), parts[2])
    assert seats("memory.mode=model") == (107, 0, 64, 111, 0, 0)
    assert seats() == (107, 0, 0, 221, 0, 0)


def test_a_dry_run_shows_the_table() -> None:
    words = ["infer", "--memory", "group", "--dry-run"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    *_, mode, title, text, vae, audio, dit, moments, more = shown.stdout.splitlines()
    assert mode == "memory: group" and title.startswith("  weights of") and "wait on the host" in moments
    assert more.strip() == "activations come on top: avatarctl vram-profile infer counts them"
    table = [title, text, vae, audio, dit]
    assert table[4].split()[0] == "transformer" and table[4].endswith("2 groups, one and the next")
    document = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)["memory"]
    assert [part["part"] for part in document["parts"]] == [
        "text encoder",
        "VAE",
        "audio encoder",
        "transformer",
    ]
    assert document["host"] == document["parts"][-1]["host"] > 0


def test_a_host_without_room_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit = HostMemory(2000, 1000, "the container (/sys/fs/cgroup/job/memory.max)")
    monkeypatch.setattr("avatarctl.pipelines.job.host_memory", lambda: limit)
    words = ["infer", "--memory", "group", "--out", str(tmp_path / "v.mp4")]
    refused = CliRunner().invoke(app, words)
    assert refused.exit_code == 5 and not list(tmp_path.iterdir())
    line = refused.stderr.splitlines()[-1]
    assert line.startswith("error: memory mode group: ") and "/sys/fs/cgroup/job/memory.max" in line
    assert "loading" not in refused.stderr
    planned = CliRunner().invoke(app, [*words, "--dry-run"])
    assert planned.exit_code == 0 and "a run would end with exit 5: memory mode group" in planned.stderr
    full = CliRunner().invoke(app, ["infer", "--memory", "full", "--dry-run"])
    assert "exit 5" not in full.stderr, "nothing waits there"
