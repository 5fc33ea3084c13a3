"""Whose turn it is, with which random numbers, at which learning rate: functions of seed and step."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from avatarctl.family import Draw
from avatarctl.registry import configure
from avatarctl.training.optimizer import learning_rate
from avatarctl.training.order import Order

TRAIN = configure("model.name=cartoon-v2v").train


def test_every_sample_has_one_turn_in_an_epoch() -> None:
    order = Order(seed=7, samples=10, slots=4)
    turns = list(order.from_step(0, 5))
    assert sorted(turns[:10]) == sorted(turns[10:20]) == list(range(10))
    assert turns[:10] != turns[10:20]


def test_order_needs_no_memory() -> None:
    whole = list(Order(seed=7, samples=10, slots=4).from_step(0, 9))
    late = Order(seed=7, samples=10, slots=4)
    assert list(late.from_step(6, 9)) == whole[24:]
    assert late.places(2) == whole[8:12]


def test_slots_of_a_step_do_not_depend_on_how_it_is_cut() -> None:
    """A step of four samples is the same step as one batch and as four."""
    assert Order(3, 10, 4).draws(5) == [Draw(3, 5, slot, 4) for slot in range(4)]


def test_draws_are_spread_evenly_and_differ_by_purpose() -> None:
    draws = [Draw(1, step, slot, 8) for step in range(500) for slot in range(8)]
    uniform = [draw.uniform("one") for draw in draws]
    assert abs(sum(uniform) / len(uniform) - 0.5) < 0.02
    assert 0 <= min(uniform) < 0.01 < 0.99 < max(uniform) < 1
    assert uniform != [draw.uniform("another") for draw in draws]
    counts = [[draw.integer("three", 3) for draw in draws].count(value) for value in range(3)]
    assert all(abs(count / len(draws) - 1 / 3) < 0.03 for count in counts)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.25), (3, 1.0), (4, 1.0), (51, 1.0), (76, None), (99, None), (100, 0.1), (300, 0.1)],
)
def test_warm_up_hold_and_cosine(step: int, rate: float | None) -> None:
    train = replace(
        TRAIN, learning_rate=1.0, final_learning_rate=0.1, schedule="cosine", hold=0.5, warmup_steps=4,
        max_steps=100,
    )  # fmt: skip
    if rate is None:
        rate = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 52) / 48))
    assert learning_rate(train, step) == pytest.approx(rate)


def test_a_constant_rate_does_not_know_the_length_of_a_run() -> None:
    rates = {learning_rate(replace(TRAIN, max_steps=steps), 20) for steps in (30, 300)}
    assert rates == {TRAIN.learning_rate}
