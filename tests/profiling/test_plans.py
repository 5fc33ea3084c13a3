"""The order of plans, and what they leave alone."""

from __future__ import annotations

from avatarctl.profiling.plans import faster_plans, slower_plans
from avatarctl.registry import configure

AUX = "aux.losses=sync,lpips"


def test_modes_of_infer_from_the_fastest_to_the_smallest() -> None:
    cfg = configure("model.name=omniavatar-14b")
    plans = list(slower_plans("infer", cfg, {}))
    assert [plan.changes["memory.mode"] for plan in plans] == ["model", "group", "sequential"]
    assert not list(slower_plans("infer", cfg, {"memory.mode": ...}))
    slow = configure("model.name=omniavatar-14b", "memory.mode=sequential")
    assert str(next(faster_plans("infer", slow, {}))) == "memory.mode full"


def test_what_changes_the_video_comes_last_and_says_so() -> None:
    cfg = configure("model.name=omniavatar-14b", "long_video.num_frames=57")
    plans = list(slower_plans("infer", cfg, {}, rounded=True))
    eight_bits = [plan.cfg.memory.base_precision == "fp8" for plan in plans]
    assert eight_bits == [False] * 3 + [True] * 4 + [False] * 2
    assert [plan.cfg.long_video.num_frames for plan in plans[-2:]] == [49, 33]
    assert plans[-1].costs == "chunks of 33 frames in place of 57: another video"
    kept = slower_plans("infer", cfg, {"long_video.num_frames": 57}, rounded=True)
    assert {plan.cfg.long_video.num_frames for plan in kept} == {57}


def test_training_recomputes_before_it_cuts_the_batch_and_looks_at_fewer_frames_last() -> None:
    cfg = configure("model.name=omniavatar-14b", AUX, "train.batch_size=4", "memory.vae_gradient=full",
                    "memory.activation_checkpointing=none", "data.num_frames=81")  # fmt: skip
    plans = list(slower_plans("train v2v", cfg, {}))
    first, last = plans[0], plans[-1]
    assert dict(first.changes) == {"memory.vae_gradient": "checkpoint"}
    assert last.cfg.aux.frames == 16 and last.cfg.train.batch_size == 1
    cut = [(plan.cfg.train.batch_size, plan.cfg.train.gradient_accumulation) for plan in plans[-3:-1]]
    assert cut == [(2, 2), (1, 4)]
    # Every sample of a step stays in it.
    assert {p.cfg.train.batch_size * p.cfg.train.gradient_accumulation for p in plans} == {4}
    assert all(plan.costs for plan in plans)


def test_what_was_asked_for_stays() -> None:
    cfg = configure("model.name=omniavatar-14b", "train.batch_size=4")
    settings = ("memory.activation_checkpointing", "memory.optimizer_device", "train.batch_size")
    asked = dict.fromkeys(settings)
    assert not list(slower_plans("train v2v", cfg, asked)) and not list(faster_plans("train v2v", cfg, asked))


def test_a_faster_plan_keeps_what_there_is_room_for() -> None:
    cfg = configure("model.name=omniavatar-14b")
    (plan,) = faster_plans("train v2v", cfg, {})
    assert dict(plan.changes) == {"memory.activation_checkpointing": "none"} and not plan.costs
