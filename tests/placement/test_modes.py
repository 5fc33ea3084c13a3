"""Memory modes: every one makes the same video to the bit, and holds what it says it holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from avatarctl.demo.sample import sample_audio, sample_image
from avatarctl.errors import UsageError
from avatarctl.events import silent
from avatarctl.live_bytes import LiveBytes
from avatarctl.loading.built_in import build_random_modules
from avatarctl.models.fp8 import store_in_float8
from avatarctl.models.wan_blocks import AvatarBlock
from avatarctl.pipelines.infer import generate, load
from avatarctl.pipelines.job import Job, JobPlan, check_job
from avatarctl.placement.place import in_groups, leaf_by_leaf
from avatarctl.placement.units import Moves, Unit
from avatarctl.profiling.fakes import tensor_bytes, tensors
from avatarctl.profiling.happened import Happened
from avatarctl.profiling.inference import counted_modules
from avatarctl.registry import configure, find_model

SIZE = ("output.width=16", "output.height=16")
CHUNKS = (
    "model.name=cartoon-i2v",
    "sampling.steps=2",
    "long_video.strategy=chunks",
    "long_video.num_frames=9",
    "long_video.overlap_frames=1",
    *SIZE,
)
WINDOWS = ("model.name=stableavatar-tiny", "sampling.steps=2", *SIZE)
BLOCKS = {CHUNKS: 6, WINDOWS: 2}
PASSES = 1 + 2 * 2
"""Over the blocks of the chunked job: keys and values of the text, then two steps of two chunks."""
GUIDED = ("sampling.guidance_scale=3", "sampling.audio_guidance_scale=2")


def plan_of(*settings: str) -> JobPlan:
    cfg = configure(*settings)
    assert cfg.model.name is not None
    seconds = 0.6 if cfg.long_video.strategy == "chunks" else 0.9
    job = Job(sample_image(), sample_audio(seconds), "a person is talking", "")
    return check_job(cfg, find_model(cfg.model.name), job, silent)


def made(plan: JobPlan, modules: Any = None) -> torch.Tensor:
    return torch.cat([block.pixels for block in generate(plan, modules=modules)], dim=1)


@pytest.fixture(scope="module", params=[CHUNKS, WINDOWS], ids=["chunks", "windows"])
def whole(request: pytest.FixtureRequest) -> tuple[tuple[str, ...], torch.Tensor]:
    """The settings of a job, and its frames with everything on the device."""
    return request.param, made(plan_of(*request.param))


@pytest.mark.parametrize(
    "memory",
    [
        ("memory.mode=model",),
        ("memory.mode=group", "memory.group_blocks=2"),
        ("memory.swap_blocks=1",),
        ("memory.mode=sequential",),
    ],
    ids=lambda words: words[0].partition(".")[2],
)
def test_a_mode_changes_no_bit(whole: tuple[tuple[str, ...], torch.Tensor], memory: tuple[str, ...]) -> None:
    settings, expected = whole
    assert torch.equal(made(plan_of(*settings, *memory)), expected)


def test_branches_that_share_a_visit_change_no_bit() -> None:
    job = (*CHUNKS, *GUIDED)
    assert torch.equal(made(plan_of(*job, "memory.mode=group")), made(plan_of(*job)))


def test_branches_one_by_one_find_their_weights() -> None:
    """That of silence takes a bias alone, whose layer is called for it."""
    job = (*WINDOWS, "sampling.batch_branches=false")
    assert torch.equal(made(plan_of(*job, "memory.mode=sequential")), made(plan_of(*job)))


def test_audio_in_windows_finds_its_weights() -> None:
    """The moments of a long recording are used behind the norm, whose weights came for its call alone."""
    encoder = build_random_modules(find_model("cartoon-i2v")).audio
    generator = torch.Generator().manual_seed(0)
    waveform = torch.randn(1, 6400, generator=generator)

    def features() -> torch.Tensor:
        moments = encoder.recording_moments(lambda start, stop: waveform[:, start:stop], 6400, 3200)
        return encoder.features(waveform, 10, moments)

    expected = features()
    leaf_by_leaf(encoder, torch.device("cpu"))
    assert torch.equal(features(), expected)


def test_float8_is_the_same_in_every_mode(whole: tuple[tuple[str, ...], torch.Tensor]) -> None:
    settings, wide = whole
    stored = (*settings, "memory.base_precision=fp8")
    expected = made(plan_of(*stored))
    assert not torch.equal(expected, wide)
    group = ("memory.mode=group", "memory.group_blocks=2")
    for words in (group, ("memory.swap_blocks=1",), ("memory.mode=sequential",)):
        assert torch.equal(made(plan_of(*stored, *words)), expected), words


def test_float8_is_counted_as_it_is() -> None:
    """Of the network that a profile has, and of blocks of 8-bit matrices that wait on the host: 64 x 64
    matrices with 64 scales and biases of float32, two of which are here at most."""
    cfg = configure(*CHUNKS, "memory.base_precision=fp8")
    counted = counted_modules(find_model("cartoon-i2v"), cfg, tensors("fake")).dit.blocks
    numbers = sum(each.numel() for each in counted.parameters())
    assert numbers < tensor_bytes(counted) < 1.2 * numbers, "norms, tables, biases and scales are float32"

    network = torch.nn.Module()
    with torch.device("meta"):
        network.blocks = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(4)).requires_grad_(False)
    store_in_float8(network)
    moves = Moves()
    with tensors("fake"), torch.no_grad(), LiveBytes() as live:
        in_groups(network, torch.device("cpu"), group=1, host=torch.device("meta"), moves=moves)
        x = torch.zeros(1, 64)
        for block in network.blocks:
            x = block(x)
    packed = 64 * 64 + 2 * 64 * 4
    assert moves.host_bytes == 4 * packed
    widened = 64 * 64 * 4
    assert live.peak == 2 * packed + widened + 2 * 64 * 4, "two blocks, a matrix, input, output"


@pytest.mark.parametrize(
    ("settings", "loads"),
    [(CHUNKS, ["text", "vae", "audio", "dit"]), (WINDOWS, ["image", "vae", "text", "audio", "dit"])],
    ids=["chunks", "windows"],
)
def test_the_text_encoder_is_gone_before_the_transformer_is_read(
    settings: tuple[str, ...], loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(*settings, "memory.mode=model")
    modules: Any = load(plan)
    read, text = modules._read, []

    def watched(part: str, place: torch.device) -> Any:
        if part == "dit":
            assert text and text[0]() is None, "both are here"
        network = read(part, place)
        if part == "text":
            text.append(weakref.ref(network))
        return network

    monkeypatch.setattr(modules, "_read", watched)
    made(plan, modules)
    assert modules.loads == loads, "each once, none before it is needed"


@pytest.mark.parametrize(("guidance", "passes"), [((), PASSES), (GUIDED, PASSES + 1)], ids=["one", "three"])
def test_each_step_moves_what_is_away_once_and_two_groups_are_here_at_most(
    monkeypatch: pytest.MonkeyPatch, guidance: tuple[str, ...], passes: int
) -> None:
    """With three guidance branches as with one, but that there are two texts with keys and values."""
    plan = plan_of(*CHUNKS, *guidance, "memory.mode=group", "memory.group_blocks=2")
    units: list[Unit] = []
    start, most = Unit.start, [0]

    def counted(self: Unit, stream: Any = None) -> None:
        start(self, stream)
        if self not in units:
            units.append(self)
        most[0] = max(most[0], sum(unit.is_here for unit in units))

    monkeypatch.setattr(Unit, "start", counted)
    modules: Any = load(plan)
    made(plan, modules)
    moves, groups = modules.moves, BLOCKS[CHUNKS] // 2
    # The next group is under way when the last pass ends.
    assert moves.copies == passes * groups + 1
    assert moves.copied_bytes == sum(unit.nbytes for unit in units) * passes + units[0].nbytes
    assert moves.order[:4] == ["blocks 0", "blocks 2", "blocks 4", "blocks 0"]
    assert most[0] == 2


def test_the_account_of_a_run_says_what_was_read_and_moved() -> None:
    plan = plan_of(*CHUNKS, "memory.mode=group", "memory.group_blocks=2")
    modules: Any = load(plan)
    with Happened() as happened:
        happened.watch(modules)
        made(plan, modules)
    *phases, loads, moves = happened.lines()
    assert {"text", "image", "condition", "step", "decode"} <= {line.split()[0] for line in phases}
    assert loads == "loads: text, vae, audio, dit"
    assert moves.startswith(f"moves: {PASSES * 3 + 1} copies to the device")


def calls_of(monkeypatch: pytest.MonkeyPatch, counts: Callable[[torch.nn.Module], bool]) -> list[int]:
    """How many calls of modules there were, of those that count; counted at the modules themselves."""
    calls, call = [0], torch.nn.Module._call_impl

    def counted(self: torch.nn.Module, *inputs: Any, **more: Any) -> Any:
        calls[0] += counts(self)
        return call(self, *inputs, **more)

    monkeypatch.setattr(torch.nn.Module, "_call_impl", counted)
    return calls


def test_sequential_copies_a_module_once_for_each_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of(monkeypatch, lambda each: any(held is not None for held in each._parameters.values()))
    plan = plan_of(*CHUNKS, "memory.mode=sequential")
    modules: Any = load(plan)
    made(plan, modules)
    assert modules.moves.copies == calls[0] > 100


def test_a_group_that_holds_all_blocks_is_told() -> None:
    lines: list[str] = []
    plan = plan_of(*WINDOWS, "memory.mode=group", "memory.group_blocks=3")
    assert load(plan, emit=lambda event: lines.append(getattr(event, "text", ""))).dit is not None
    assert [line for line in lines if "memory" in line] == [
        "memory: a group of 3 holds all 2 blocks, so that a step saves nothing; memory.group_blocks 1 would"
    ]


def test_windows_move_each_group_once_for_each_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass for each window of a step; the branches of a window enter a block together."""
    calls = calls_of(monkeypatch, lambda each: isinstance(each, AvatarBlock))
    plan = plan_of(*WINDOWS, "memory.mode=group", "memory.group_blocks=1")
    modules: Any = load(plan)
    made(plan, modules)
    assert modules.moves.copies == calls[0] + 1 > BLOCKS[WINDOWS]


def test_swapped_blocks_are_the_last_ones() -> None:
    plan = plan_of(*CHUNKS, "memory.swap_blocks=2")
    modules: Any = load(plan)
    made(plan, modules)
    assert set(modules.moves.order) == {"blocks 4", "blocks 5"}
    assert modules.moves.copies == PASSES * 2 + 1, "each once a pass, and the first again for the next one"
    there = [next(block.parameters()).device.type for block in modules.dit.blocks]
    assert there == ["cpu"] * 4 + ["meta"] * 2


@pytest.mark.parametrize("mode", ["full", "group", "sequential"])
def test_a_mode_that_moves_blocks_takes_no_number_of_swapped_ones(mode: str) -> None:
    with pytest.raises(UsageError, match="already says which blocks leave"):
        plan_of(*CHUNKS, f"memory.mode={mode}", "memory.swap_blocks=1")


def test_more_blocks_than_there_are() -> None:
    with pytest.raises(UsageError, match="7 blocks were to leave, and the transformer has 6"):
        plan_of(*CHUNKS, "memory.swap_blocks=7")
