"""Settings that save memory in training: the same bits as without, and what they promise to move."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from avatarctl.config.sections import Train
from avatarctl.errors import ExtraMissing, UsageError
from avatarctl.events import silent
from avatarctl.live_bytes import LiveBytes
from avatarctl.loading.sources import find_sources
from avatarctl.models.fp8 import STORED
from avatarctl.models.recompute import again
from avatarctl.placement.units import Moves
from avatarctl.registry import find_model
from avatarctl.training import swapping
from avatarctl.training.checkpoints import Checkpoint
from avatarctl.training.optimizer import Optimizer
from avatarctl.training.run_folder import changed
from avatarctl.training.start import plan_start
from avatarctl.training.trainer import Trainer
from tests.training.running import ADAPTED as RUN_ADAPTED
from tests.training.running import bits, typed

ADAPTED = "cartoon-i2v"
LORA = ("train.mode=lora", "train.lora_rank=2", "train.learning_rate=0.01")
AWAY = "memory.swap_blocks=3"
SETTINGS = {
    "blocks made again": ("memory.activation_checkpointing=block",),
    "their inputs on the host": ("memory.activation_checkpointing=block_offload",),
    "blocks that wait": ("memory.activation_checkpointing=block", AWAY),
    "moments on the host": ("memory.optimizer_device=cpu",),
    "all of it": ("memory.activation_checkpointing=block_offload", AWAY, "memory.optimizer_device=cpu"),
}

TrainerOf = Callable[..., Trainer]


def trained(trainer: Trainer, steps: int = 2) -> Mapping[str, Tensor]:
    """Weights, moments and losses behind some steps."""
    samples = trainer.data.read(trainer._order.from_step(0, steps))
    losses = []
    for _ in range(steps):
        trainer._one_step(trainer._next(samples), 0.0, 0.0)
        losses.append(trainer.last["loss"])
    held = {**trainer.network.trainables.state(), **trainer._optimizer.state()}
    return {**held, "losses": torch.tensor(losses, dtype=torch.float64)}


@pytest.fixture
def plain(trainer_of: TrainerOf) -> Mapping[str, Tensor]:
    return trained(trainer_of(*LORA, model=ADAPTED))


def test_no_saving_changes_a_bit(plain: Mapping[str, Tensor], trainer_of: TrainerOf) -> None:
    for name, words in SETTINGS.items():
        found = trained(trainer_of(*LORA, *words, model=ADAPTED))
        assert found.keys() == plain.keys(), name
        assert all(torch.equal(found[key], plain[key]) for key in plain), name
    assert any("exp_avg" in key for key in plain)


@pytest.mark.parametrize(
    "words",
    [("train.mode=full",), LORA, (*LORA, "memory.activation_checkpointing=block", AWAY)],
    ids=["full", "lora", "blocks that wait"],
)
def test_weights_by_arithmetic_are_those_there(words: tuple[str, ...], trainer_of: TrainerOf) -> None:
    trainer, row = trainer_of(*words, model=ADAPTED), find_model(ADAPTED)
    plan = plan_start(row, find_sources(row, trainer.cfg.model), trainer.cfg, silent)
    held = sum(each.nbytes for each in trainer.network.dit.parameters() if each.device.type != "meta")
    assert plan.weights(trainer.cfg) == held


def test_blocks_come_for_both_passes_in_the_order_in_which_they_are_needed(
    trainer_of: TrainerOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host to device alone: twice in a pass, and the next one is under way while one computes."""
    told: list[Moves] = []
    real = swapping.in_groups

    def watched(*inputs: object, moves: object, **more: object) -> object:
        told.append(Moves())
        return real(*inputs, moves=told[0], **more)  # type: ignore[arg-type]

    monkeypatch.setattr(swapping, "in_groups", watched)
    trainer = trainer_of(*LORA, *SETTINGS["blocks that wait"], model=ADAPTED)
    trained(trainer, 1)
    blocks = list(trainer.network.dit.blocks)  # type: ignore[arg-type]
    first = len(blocks) - 3
    there = [f"blocks {first + place}" for place in (0, 1, 2)]
    assert told[0].order == [*there, *reversed(there)]
    frozen = sum(
        each.numel() * each.element_size()
        for block in blocks[first:]
        for each in block.parameters()
        if not each.requires_grad
    )
    assert frozen <= told[0].host_bytes < 1.1 * frozen
    assert told[0].copied_bytes == 2 * told[0].host_bytes
    assert {each.device.type for each in trainer.network.trainables.parameters.values()} == {"cpu"}
    assert all(each.is_meta for each in blocks[-1].parameters() if not each.requires_grad)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ((*LORA, AWAY), "cannot leave before it"),
        (("train.mode=full", "memory.activation_checkpointing=block", AWAY), "none can wait"),
        (
            (*LORA, "memory.activation_checkpointing=block", "memory.swap_blocks=99"),
            "99 blocks were to leave",
        ),
    ],
)
def test_swapping_that_could_save_nothing_is_refused(
    words: tuple[str, ...], what: str, trainer_of: TrainerOf
) -> None:
    with pytest.raises(UsageError, match=what) as caught:
        trainer_of(*words, model=ADAPTED)
    assert caught.value.where == "memory.swap_blocks" and caught.value.exit_code == 2


# --- the frozen weights in eight bits ---------------------------------------------------------------

EIGHT = "memory.base_precision=fp8"


def test_losses_on_a_base_in_eight_bits_stay_beside_those_in_sixteen(trainer_of: TrainerOf) -> None:
    """A trained model, six steps in bfloat16: each loss within 3 % of the same step's."""
    words = (*LORA, "runtime.dtype=bfloat16", "train.learning_rate=0.001")
    first, second = trainer_of(*words, model=ADAPTED), trainer_of(*words, EIGHT, model=ADAPTED)
    begun = [{n: t.clone() for n, t in each.network.trainables.state().items()} for each in (first, second)]
    assert all(torch.equal(begun[0][name], begun[1][name]) for name in begun[0]), "adapters come first"
    losses = [trained(each, 6)["losses"] for each in (first, second)]
    apart = (losses[1] / losses[0] - 1).abs()
    assert 0 < float(apart.max()) < 0.03, apart
    stored = {name for name, each in second.network.dit.named_parameters() if each.dtype == STORED}
    assert stored and all(name.startswith("blocks.") for name in stored)
    assert not any("lora" in name or "norm" in name or "table" in name for name in stored)


def test_no_saving_changes_a_bit_of_a_base_in_eight_bits(trainer_of: TrainerOf) -> None:
    plain = trained(trainer_of(*LORA, EIGHT, model=ADAPTED))
    found = trained(trainer_of(*LORA, EIGHT, *SETTINGS["all of it"], model=ADAPTED))
    assert found.keys() == plain.keys() and all(torch.equal(found[key], plain[key]) for key in plain)


def test_a_run_on_a_base_in_eight_bits_goes_on_to_the_same_bits(
    plain: Mapping[str, Tensor], trainer_of: TrainerOf
) -> None:
    words = (*LORA, EIGHT)
    whole, first, second = (trainer_of(*words, model=ADAPTED) for _ in range(3))
    expected = trained(whole)
    trained(first, 1)
    path = first.save()
    second.resume(Checkpoint(path, 1, {}))
    samples = second.data.read(second._order.from_step(1, 2))
    second._one_step(second._next(samples), 0.0, 0.0)
    found = {**second.network.trainables.state(), **second._optimizer.state()}
    assert found.keys() | {"losses"} == plain.keys(), "a checkpoint knows nothing of it"
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_weights_that_are_trained_are_not_stored_in_eight_bits(trainer_of: TrainerOf) -> None:
    with pytest.raises(UsageError, match="only a frozen one can be stored") as caught:
        trainer_of("train.mode=full", EIGHT, model=ADAPTED)
    assert caught.value.where == "memory.base_precision" and caught.value.exit_code == 2


def test_a_run_keeps_the_precision_of_its_base(trainer_of: TrainerOf) -> None:
    """It decides numbers, where the other settings of memory do not."""
    trainer = trainer_of(*LORA, model=ADAPTED)
    run = trainer.folder.path
    (run / "run.yaml").write_text("command: train i2v\nmemory:\n  base_precision: bf16\n", encoding="utf-8")
    eight = replace(trainer.cfg, memory=replace(trainer.cfg.memory, base_precision="fp8", swap_blocks=3))
    found = {key for key in changed(run, eight, "train i2v") if key.startswith("memory.")}
    assert found == {"memory.base_precision"}


# --- calls that are made again -------------------------------------------------------------------


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 32), nn.GELU(), nn.Linear(32, 6)).double()


@pytest.mark.parametrize("host", [None, torch.device("cpu")])
@pytest.mark.parametrize("wants", [True, False])
def test_a_call_that_is_made_again_has_the_gradients_of_a_plain_one(
    host: torch.device | None, wants: bool
) -> None:
    """Those of its parameters too, whether or not an input has one."""

    def gradients(call: Callable[..., Tensor]) -> list[Tensor]:
        network, x = layer(), torch.linspace(-2, 2, 24, dtype=torch.float64).reshape(4, 6)
        x.requires_grad_(wants)
        call(network, x).square().sum().backward()
        assert (x.grad is not None) == wants
        leaves = [*network.parameters(), *([x] if wants else [])]
        return [each.grad for each in leaves if each.grad is not None]

    def plainly(network: nn.Module, x: Tensor) -> Tensor:
        made: Tensor = network(x)
        return made

    def made_again(network: nn.Module, x: Tensor) -> Tensor:
        made: Tensor = again(network, x, host=host)
        return made

    pairs = list(zip(gradients(plainly), gradients(made_again), strict=True))
    assert len(pairs) == 4 + wants and all(torch.equal(*pair) for pair in pairs)


def test_a_call_is_made_again_in_the_precision_of_the_first() -> None:
    found = []

    def seen(x: Tensor, weight: Tensor) -> Tensor:
        found.append((x @ weight).dtype)
        return x @ weight

    x, weight = torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        made = again(seen, x, weight)
    made.float().sum().backward()
    assert found == [torch.bfloat16, torch.bfloat16]


def test_what_waits_on_the_host_is_counted_there() -> None:
    x = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        live.track(x)
        made = again(lambda each: each * 2, x * 1, host=torch.device("cpu"))
        assert (live.current, live.host) == (2 * 4000, 4000), "input and result, and the input of the call"
        made.sum().backward()
        del made
    assert (live.current, live.host) == (2 * 4000, 0), "input and its gradient"


def test_moments_on_the_host_take_nothing_of_the_device_between_steps() -> None:
    held = {}
    for host in (None, torch.device("cpu")):
        weights = {f"w{index}": nn.Parameter(torch.ones(1000)) for index in range(3)}
        optimizer = Optimizer(weights, Train(), host)
        with LiveBytes() as live:
            for step in range(2):
                for weight in weights.values():
                    weight.grad = torch.ones(1000)
                optimizer.step(step)
            held[host] = live.current, live.host
    assert held[None][0] - held[torch.device("cpu")][0] == 3 * 2 * 4000
    assert (held[None][1], held[torch.device("cpu")][1]) == (0, 3 * 2 * 4000)


# --- moments in 8 bits -----------------------------------------------------------------------------


class StandIn(torch.optim.Optimizer):
    """Of bitsandbytes: the same arguments and kinds of state, a step that is a step."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                own = self.state[parameter]
                own.setdefault("step", 0)
                own.setdefault("state1", torch.zeros_like(parameter, dtype=torch.uint8))
                own.setdefault("absmax1", torch.zeros(1))
                own["step"] += 1
                own["state1"] += 1
                parameter -= group["lr"] * own["state1"] * parameter.grad


def test_moments_in_8_bits_are_kept_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in of the package: what is saved and read again goes on to the same weights."""
    package = types.ModuleType("bitsandbytes")
    package.optim = types.SimpleNamespace(AdamW8bit=StandIn)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", package.optim)
    settings = Train(optimizer="adamw8bit", learning_rate=0.1)

    def stepped(optimizer: Optimizer, weight: nn.Parameter, steps: int) -> None:
        for step in range(steps):
            weight.grad = torch.ones(4)
            optimizer.step(step)

    for host in (None, torch.device("cpu")):
        whole, half = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
        stepped(Optimizer({"w": whole}, settings, host), whole, 4)
        first = Optimizer({"w": half}, settings, host)
        stepped(first, half, 2)
        saved = {name: tensor.clone() for name, tensor in first.state().items()}
        assert saved["w.state1"].dtype == torch.uint8 and saved["w.step"] == 2
        second = Optimizer({"w": half}, settings, host)
        second.load(saved)
        stepped(second, half, 2)
        assert torch.equal(half, whole)


def test_without_bitsandbytes_the_command_says_how_to_install_it(
    trainer_of: TrainerOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ExtraMissing, match="bitsandbytes") as caught:
        trainer_of(*LORA, "train.optimizer=adamw8bit", model=ADAPTED)
    assert caught.value.exit_code == 4 and "pip install 'avatarctl[adamw8bit]'" in str(caught.value)


# --- what a run held --------------------------------------------------------------------------------


def test_a_run_tells_what_it_held_in_each_phase(adapted: Path, samples: Path, tmp_path: Path) -> None:
    """With -v, behind it; the bits are those of a run that nobody watched."""
    run = tmp_path / "run"
    made = typed("train", "i2v", *RUN_ADAPTED, "--data", samples, "--out", run, "-v")
    assert made.exit_code == 0, made.output
    rows = re.findall(r"^(\w+) +([\d.]+) (\w+) +([\d.]+) (\w+)$", made.output, re.MULTILINE)
    table = {name: (size(live, unit), size(peak, of)) for name, live, unit, peak, of in rows}
    assert list(table)[:5] == ["loop", "load", "condition", "forward", "backward"], made.output
    assert {"optimizer", "checkpoint"} <= table.keys() and all(live <= peak for live, peak in table.values())
    assert table["forward"][1] > table["load"][1] and table["optimizer"][0] > table["load"][0]
    assert bits(run, 2) == bits(adapted, 2)


def size(number: str, unit: str) -> float:
    return float(number) * {"MiB": 1.0, "GiB": 1024.0}[unit]


# --- what saves memory stays on --------------------------------------------------------------------


def test_blocks_are_still_made_again_behind_a_validation_and_in_a_run_that_goes_on(
    trainer_of: TrainerOf,
) -> None:
    """By the bytes that are alive: one step with kept activations takes far more."""

    def most(trainer: Trainer) -> int:
        with LiveBytes() as live:
            trained(trainer, 1)
        return live.peak

    kept = most(trainer_of(*LORA, model=ADAPTED))
    words = (*LORA, *SETTINGS["blocks made again"])
    first = trainer_of(*words, model=ADAPTED)
    assert most(first) < 0.8 * kept, "from the start"
    first.network.dit.eval()
    with torch.no_grad(), first.network.averaged():
        pass
    first.network.dit.train()
    first.step = 1
    path = first.save()
    second = trainer_of(*words, model=ADAPTED)
    second.resume(Checkpoint(path, 1, {}))
    for trainer in (first, second):
        assert most(trainer) < 0.8 * kept
