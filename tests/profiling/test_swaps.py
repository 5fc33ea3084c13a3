"""How many blocks have to leave, in how few counts; and what is given up last."""

from __future__ import annotations

from typing import Any

import pytest

from avatarctl.config import RunConfig
from avatarctl.errors import DoesNotFit
from avatarctl.events import silent
from avatarctl.profiling.account import Account
from avatarctl.profiling.fit import Found, Room, fastest
from avatarctl.profiling.plans import Plan, Swaps, faster_plans, slower_plans
from avatarctl.registry import configure
from tests.accounts import account

MIB = 1 << 20
BLOCKS, BLOCK = 40, 16  # and their MiB
REST = 100
LORA = ("model.name=omniavatar-14b", "train.lora_rank=4")


def need(cfg: RunConfig, wide: int = BLOCK) -> int:
    """MiB: of what stays, of all blocks that are here and two that come. Nothing needs less than 200."""
    memory = cfg.memory
    block = wide // 2 if memory.base_precision == "fp8" else wide
    if memory.swap_blocks:
        here = BLOCKS - memory.swap_blocks + min(2, memory.swap_blocks)
    else:
        here = {"group": 8, "sequential": 1}.get(memory.mode, BLOCKS)
    return max(200, REST + here * block + (500 if memory.mode == "full" else 0))


class Counts(list[str]):
    """Configurations that were counted."""

    def __call__(self, cfg: RunConfig) -> Account:
        memory = cfg.memory
        self.append(f"{memory.mode} {memory.swap_blocks} {memory.base_precision}")
        here = need(cfg)
        return account({"step": here * MIB}, host=max(0, 740 - here) * MIB)


def found(
    room: int, cfg: RunConfig, asked: Any = (), job: str = "infer", **more: Any
) -> tuple[Found, Counts]:
    counts = Counts()
    card = round(room * MIB * 1.06)
    best = fastest(job, "m", cfg, dict.fromkeys(asked), Room(card), counts, silent, blocks=BLOCKS, **more)
    return best, counts


@pytest.mark.parametrize("room", [725, 724, 600, 333, 250, 201])
def test_as_few_blocks_leave_as_fit_and_few_are_counted(room: int) -> None:
    cfg = configure("model.name=omniavatar-14b", "memory.mode=full")
    best, counts = found(room, cfg)
    assert best.plan.changes["memory.mode"] == "model"
    number = best.plan.changes["memory.swap_blocks"]
    fits = (n for n in range(1, BLOCKS + 1) if REST + (BLOCKS - n + min(2, n)) * BLOCK <= room)
    assert number == next(fits)
    assert len(counts) <= 8, counts


def test_where_none_of_them_fits_one_count_says_so_and_the_next_mode_is_tried() -> None:
    cfg = configure("model.name=omniavatar-14b", "memory.mode=full")
    with pytest.raises(DoesNotFit):
        found(199, cfg)
    counts = Counts()
    with pytest.raises(DoesNotFit):
        fastest("infer", "m", cfg, {}, Room(100 * MIB), counts, silent, blocks=BLOCKS)
    assert counts == ["full 0 bf16", "model 0 bf16", "model 40 bf16", "group 0 bf16", "sequential 0 bf16"]


def test_eight_bits_come_last_and_are_said() -> None:
    steps = list(slower_plans("infer", configure("model.name=omniavatar-14b"), {}, BLOCKS, rounded=True))
    plans = [step.of(7) if isinstance(step, Swaps) else step for step in steps]
    modes = [(plan.cfg.memory.mode, plan.cfg.memory.swap_blocks) for plan in plans]
    later = [("model", 0), ("model", 7), ("group", 0), ("sequential", 0)]
    assert modes == [*later, (plans[4].cfg.memory.mode, 0), *later]
    stored = [plan.cfg.memory.base_precision == "fp8" for plan in plans]
    assert stored == [False] * 4 + [True] * 5
    assert all(
        ("eight bits" in plan.costs) == is_stored for plan, is_stored in zip(plans, stored, strict=True)
    )
    assert "copied" not in plans[0].costs, "what leaves for good is not copied"
    asked = {"memory.base_precision": ...}
    assert len(list(slower_plans("infer", configure(*LORA[:1]), asked, BLOCKS, rounded=True))) == 4


def test_a_slow_run_with_room_takes_fewer_blocks_away() -> None:
    cfg = configure("model.name=omniavatar-14b", "memory.mode=group")
    best, counts = found(600, cfg)
    assert best.plan.changes == {"memory.mode": "model", "memory.swap_blocks": 11}
    assert counts[:3] == ["group 0 bf16", "full 0 bf16", "model 0 bf16"]
    assert [type(step) for step in faster_plans("infer", cfg, {}, 0)] == [Plan, Plan]


def test_training_lets_wait_what_it_can_before_it_changes_numbers() -> None:
    cfg = configure(*LORA, "memory.activation_checkpointing=none", "train.batch_size=2")
    steps = list(slower_plans("train v2v", cfg, {}, BLOCKS, rounded=True))
    plans = [step.of(3) if isinstance(step, Swaps) else step for step in steps]
    assert [set(plan.changes) - {"memory.activation_checkpointing"} for plan in plans] == [
        set(),
        {"memory.optimizer_device"},
        {"memory.optimizer_device"},
        {"memory.optimizer_device", "memory.swap_blocks"},
        {"memory.optimizer_device", "memory.swap_blocks", "train.batch_size", "train.gradient_accumulation"},
        {"memory.optimizer_device", "memory.swap_blocks", "train.batch_size", "train.gradient_accumulation",
         "memory.base_precision"},
    ]  # fmt: skip
    assert [plan.cfg.memory.activation_checkpointing for plan in plans] == ["block"] * 2 + [
        "block_offload"
    ] * 4
    assert plans[4].cfg.memory.swap_blocks == BLOCKS and plans[4].cfg.train.batch_size == 1
    assert all(plan.costs for plan in plans)


def test_a_network_that_is_trained_whole_stays_where_it_is() -> None:
    cfg = configure("model.name=omniavatar-14b", "train.mode=full", "train.batch_size=1")
    steps = list(slower_plans("train v2v", cfg, {}, BLOCKS, rounded=True))
    assert not any(isinstance(step, Swaps) for step in steps)
    assert all(step.cfg.memory.base_precision == "bf16" for step in steps if isinstance(step, Plan))


def test_weights_that_are_too_large_are_not_counted_again() -> None:
    cfg = configure(*LORA, "memory.activation_checkpointing=none", "train.batch_size=1")
    counts: list[Any] = []

    def count(each: RunConfig) -> Account:
        counts.append(each)
        here = 900 - 20 * each.memory.swap_blocks
        return account({"forward": here * MIB}, {"dit": 800 * MIB})

    best = fastest("train v2v", "m", cfg, {}, Room(700 * MIB), count, silent, blocks=BLOCKS)
    assert best.plan.cfg.memory.swap_blocks == 12  # 900 - 240 is the first below 700 / 1.06
    assert [each.memory.swap_blocks > 0 for each in counts[:2]] == [False, True], "the run itself, then swaps"
