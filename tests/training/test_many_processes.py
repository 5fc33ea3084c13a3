"""Several processes that train together: they make what one makes, end alike, and leave one run."""

from __future__ import annotations

import functools
import gc
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from avatarctl.cli import launch
from avatarctl.cli import train as train_command
from avatarctl.cli.launch import Place, found_place, listening, start_processes
from avatarctl.config import preset_folder
from avatarctl.errors import Interrupted, NotYetSupported, UnusableFile, UsageError
from avatarctl.events import Notice
from avatarctl.parallel import world as world_module
from avatarctl.parallel.world import World
from avatarctl.training import trainer
from avatarctl.training.order import Order, own_slots
from tests.training.running import QUICK, bits, forked, made_trainer, typed

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@pytest.fixture(autouse=True)
def nothing_left() -> None:
    """A decoder that another test left and that is freed in a fork waits for threads that it has not."""
    gc.collect()


LINE = (
    "train", "v2v", "--size", "16x16", "--frames", "5", "--max-steps", "3", "--batch-size", "1", *QUICK,
    "-o", "checkpoint.every=1",
)  # fmt: skip
ONE = ("--gpus", "1", "--gradient-accumulation", "2")
TWO = ("--gpus", "2")
VALIDATED = (
    "-o", "validation.every=3", "-o", "validation.steps=1", "-o", "validation.samples=2",
    "-o", "validation.metrics=flow,psnr",
)  # fmt: skip


def _forking() -> None:
    """Processes are forks: new ones would import for five seconds each. None waits long for nothing."""
    world_module._PATIENCE = timedelta(seconds=60)  # type: ignore[misc]
    train_command.start_processes = functools.partial(start_processes, method="fork")  # type: ignore[attr-defined]


def _second_dies() -> None:
    """Rank 1, before the second step."""
    _forking()
    step = trainer.Trainer._one_step

    def killed(self: trainer.Trainer, *rest: Any) -> None:
        if self.step == 1 and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, *rest)

    trainer.Trainer._one_step = killed  # type: ignore[method-assign]


def _second_is_asked_to_stop() -> None:
    """Rank 1, in the middle of the second step, twice, as a starter does that passes on what it got."""
    _forking()
    step = trainer.Trainer.accumulate

    def asked(self: trainer.Trainer, batch: list[trainer.TrainingSample]) -> dict[str, float]:
        if self.step == 1 and self.world.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch)

    trainer.Trainer.accumulate = asked  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def of_one(prepared: Path, samples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps of one process, two forward passes each, then four clips are made; nobody changes it."""
    run = tmp_path_factory.mktemp("of-one") / "run"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = typed(*LINE, *ONE, *VALIDATED, "--sets", samples, "--data", prepared, "--out", run)
    torch.set_num_threads(before)
    assert made.exit_code == 0, made.output
    return run


def test_a_killed_process_ends_all_and_one_goes_on_to_the_bits_of_one(
    of_one: Path, prepared: Path, tmp_path: Path
) -> None:
    """The first step was made by two. A rank in the key of a random number would show here."""
    run, said = tmp_path / "run", tmp_path / "said.txt"
    line = (*LINE, "--data", prepared, "--out", run, "--resume", "auto")
    began = time.monotonic()
    assert forked(_second_dies, *line, *TWO, said=said) == 6, said.read_text()
    assert time.monotonic() - began < 60
    told = [text for text in said.read_text().splitlines() if text.startswith("error")]
    assert len(told) == 1 and "process 1 of 2" in told[0] and "SIGKILL" in told[0], told
    assert "Traceback" not in said.read_text()
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]
    resumed = typed(*line, *ONE)
    assert resumed.exit_code == 0 and "resumed behind step 1" in resumed.output, resumed.output
    assert "a step was 1 x 1 x 2 (batch, passes, processes) and is 1 x 2 x 1" in resumed.output
    assert bits(run, 3) == bits(of_one, 3)


def test_one_that_is_asked_to_stop_stops_all_and_two_go_on_to_the_bits_of_one(
    of_one: Path, prepared: Path, samples: Path, tmp_path: Path
) -> None:
    """They share the clips of a validation as well."""
    run, said = tmp_path / "run", tmp_path / "said.txt"
    line = (*LINE[:-1], "checkpoint.every=9", *TWO, "--data", prepared, "--out", run, "--resume", "auto")
    line = (*line, *VALIDATED, "--sets", samples)
    assert forked(_second_is_asked_to_stop, *line, said=said) == 6, said.read_text()
    assert said.read_text().count("error") == 1, said.read_text()
    assert "stopped after step 2, which is saved" in said.read_text()
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert forked(_forking, *line, said=said) == 0, said.read_text()
    assert said.read_text().count("resumed behind step 2") == 1
    assert bits(run, 3) == bits(of_one, 3)
    assert (run / "validation.jsonl").read_bytes() == (of_one / "validation.jsonl").read_bytes()
    made = [{path.name for path in (each / "validation/step-3").iterdir()} for each in (run, of_one)]
    assert made[0] == made[1] and len(made[0]) == 5
    words = (*LINE, "--gpus", "1", "--data", prepared, "--out", run, "--resume", "auto")
    refused = typed(*words)  # half of the step
    assert refused.exit_code == 2 and "runtime.gpus was 2 and is 1" in refused.output


# --- a step of two processes, seen from inside ----------------------------------------------------


RUNS = {
    "full": ("cartoon-v2v", "train.mode=full"),
    "lora": ("cartoon-i2v", "train.mode=lora", "train.lora_rank=2", "train.lora_targets=q"),
}
"""What is trained: model and settings."""


def _moved(made: trainer.Trainer) -> torch.Tensor:
    """How far two steps of SGD in float64 take all weights that are trained; in the first one the half of
    a LoRA has no gradient. They are left as if none was made."""
    weights = list(made.network.trainables.parameters.values())
    for weight in weights:
        weight.data = weight.data.double()
    before, sgd = [weight.detach().clone() for weight in weights], torch.optim.SGD(weights, lr=0.1)
    for made.step in range(2):
        made.accumulate(made._next(made.data.read(made._order.places(made.step))))
        sgd.step()
        sgd.zero_grad()
    made.step = 0
    return torch.cat([(w.detach() - b).flatten() for w, b in zip(weights, before, strict=True)])


def _inside(folder: Path, prepared: Path, place: Place) -> None:
    """What each of two processes sees; written down, as nobody would see an assertion fail here."""
    world_module._PATIENCE = timedelta(seconds=60)  # type: ignore[misc]
    world = World(place.rank, place.size, place.local)
    world.join(place.meeting, "cpu")
    words = ("train.batch_size=1", "train.gradient_accumulation=2", "runtime.gpus=2")
    found: dict[str, Any] = {}
    for mode, (model, *own) in reversed(RUNS.items()):
        made = made_trainer(folder / f"{mode}-{place.rank}", prepared, *own, *words, model=model, world=world)
        found[mode] = _moved(made)
    read = made.data.read

    def broken(places: Any) -> Any:
        for at in places:
            (sample,) = read([at])
            assert isinstance(sample, trainer.TrainingSample)
            if world.rank == 1:
                sample.tensors["latents"].mul_(torch.nan)
                found.setdefault("broken", []).append(sample.name)
                made.data.read = read  # type: ignore[method-assign]
            yield sample

    made.data.read = broken  # type: ignore[method-assign]
    before = [tensor.clone() for tensor in made.network.trainables.state().values()]
    made._one_step(made._next(made.data.read(made._order.places(0))), 0.0, 0.0)
    after = made.network.trainables.state().values()
    found["moved"] = any(not torch.equal(*pair) for pair in zip(before, after, strict=True))
    found["skipped"] = made.last["skipped"]
    if world.rank == 1:
        made._news = made.failed = {"b": UnusableFile("is gone")}
    made.accumulate(made._next(made.data.read(made._order.places(1))))
    found["failed"] = list(made.failed)
    found["told"] = [event.text for event in made.events if isinstance(event, Notice)]  # type: ignore[attr-defined]
    try:
        with world.together():
            if world.rank == 1:
                raise UnusableFile("one cannot go on", where="here", fix="do")
    except UnusableFile as error:
        found["error"] = (str(error), error is world.agreed)
    stop, patience = world.stops(lambda: world.rank == 1), time.monotonic() + 20
    while not stop() and time.monotonic() < patience:
        time.sleep(0.01)
    found["stopped"] = stop()  # also the one that nobody asked
    found["wrote"] = (folder / f"full-{place.rank}" / "log.jsonl").is_file()
    world.leave()
    torch.save(found, folder / f"found-{place.rank}.pt")


def test_a_step_of_two_processes_is_that_of_one(prepared: Path, tmp_path: Path) -> None:
    """A pair of passes in each, of all weights and a LoRA; numbers that are not finite, a sample, errors."""
    assert start_processes(2, _inside, (tmp_path, prepared), method="fork") == 0
    both = [torch.load(tmp_path / f"found-{rank}.pt") for rank in range(2)]
    for mode, (model, *own) in RUNS.items():
        words = (*own, "train.batch_size=1", "train.gradient_accumulation=4")
        whole = _moved(made_trainer(tmp_path / mode, prepared, *words, model=model))
        assert float((both[0][mode] - whole).norm() / whole.norm()) < 1e-6, mode
        assert torch.equal(both[0][mode], both[1][mode]), mode
    for found in both:
        assert not found["moved"]
        assert sorted(found["skipped"].split(", ")) == sorted(both[1]["broken"])
        assert found["failed"] == ["b"]
        assert found["stopped"]
        assert found["error"] == ("here: one cannot go on (do)", True)
    assert "b: is gone; another sample takes its turns" in both[0]["told"]
    assert [found["wrote"] for found in both] == [True, False]


def test_slots_of_a_step_are_dealt_whole_and_once() -> None:
    from avatarctl.registry import configure

    cfg = configure(
        "model.name=cartoon-v2v", "train.batch_size=2", "train.gradient_accumulation=3", "runtime.gpus=4"
    )
    whole = Order(3, 50, 24)
    parts = [Order(3, 50, 24, own_slots(cfg, rank)) for rank in range(4)]
    assert [draw for part in parts for draw in part.draws(5)] == whole.draws(5)
    assert [at for part in parts for at in part.places(5)] == whole.places(5)


def test_more_processes_than_samples(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"runtime.gpus: a step takes 5 samples, 1 in each of 5 processes"):
        made_trainer(tmp_path / "run", prepared, "train.batch_size=1", "runtime.gpus=5")


# --- who starts them ------------------------------------------------------------------------------

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node", "MASTER_PORT": "29500",
}  # fmt: skip


def test_the_environment_of_torchrun_is_taken() -> None:
    assert found_place({}) is None and found_place({"WORLD_SIZE": "1", "RANK": "0"}) is None
    assert found_place(TORCHRUN) == Place(3, 4, 1, "env://")
    assert found_place({**TORCHRUN, "ACCELERATE_USE_DEEPSPEED": "false"}) is not None


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "MASTER_ADDR"])
def test_half_an_environment_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is not set"):
        found_place({key: value for key, value in TORCHRUN.items() if key != name})


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"DeepSpeed is not used .*configs/accelerate/fsdp2\.yaml"),
        ({"ACCELERATE_USE_FSDP": "true"}, r"only the second version .*configs/accelerate/fsdp2\.yaml"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "stay on their card",
        ),
    ],
)
def test_what_spreads_weights_otherwise_is_refused(environment: dict[str, str], what: str) -> None:
    with pytest.raises(NotYetSupported, match=what) as caught:
        found_place({**TORCHRUN, **environment})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("name", "shard", "processes"), [("ddp", False, 4), ("fsdp2", True, 8)])
def test_files_for_accelerate_are_read_by_it_and_found_by_us(
    name: str, shard: bool, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own parser and what it would set, and torchrun beside it; nothing is started."""
    command = pytest.importorskip("accelerate.commands.launch")
    from accelerate.utils.launch import prepare_multi_gpu_env

    from avatarctl.registry import configure

    for each in [key for key in os.environ if key.startswith(("ACCELERATE_", "FSDP_"))]:
        monkeypatch.delenv(each)
    path = preset_folder() / "accelerate" / f"{name}.yaml"
    words = ["--config_file", str(path), "--main_process_port", "0", "-m", "avatarctl", "train", "v2v"]
    asked, *_ = command._validate_launch_command(command.launch_command_parser().parse_args(words))
    set_by_it = prepare_multi_gpu_env(asked)
    ranks = {**TORCHRUN, "WORLD_SIZE": str(asked.num_processes)}
    place = found_place({**set_by_it, **ranks})
    assert place == Place(3, processes, 1, "env://", shard=shard)
    assert launch.ignored_precision(set_by_it, place, configure("model.name=cartoon-v2v")) is None


def test_a_precision_of_accelerate_is_told_of() -> None:
    from avatarctl.registry import configure

    cfg = configure("model.name=cartoon-v2v")
    place = found_place(TORCHRUN)
    told = launch.ignored_precision({"ACCELERATE_MIXED_PRECISION": "bf16"}, place, cfg)
    assert told is not None and "--dtype decides, and it is float32" in told
    assert launch.ignored_precision({"ACCELERATE_MIXED_PRECISION": "no"}, place, cfg) is None


def test_each_process_has_a_card_of_its_own() -> None:
    world = World(3, 4, 1)
    assert world.device("cuda") == "cuda:1" and world.device("cpu") == "cpu"
    assert World().device("cuda:2") == "cuda:2"
    with pytest.raises(UsageError, match="cuda:0 is one card, and 4 processes take one each"):
        world.device("cuda:0")


def _waits(folder: Path, place: Place) -> None:
    with listening(place) as should_stop:
        (folder / f"here-{place.rank}").touch()
        while not should_stop():
            time.sleep(0.01)
    raise Interrupted("stopped")


def _asks_the_starter(folder: Path, place: Place) -> None:
    if place.rank == 1:
        while not (folder / "here-0").is_file():
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGTERM)
    _waits(folder, place)


def test_a_signal_to_the_starter_reaches_all(tmp_path: Path) -> None:
    assert start_processes(2, _asks_the_starter, (tmp_path,), method="fork") == 6


def _fails_or_goes_on(place: Place) -> None:
    if place.rank == 1:
        raise UnusableFile("cannot be read")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(300)


def test_the_exit_code_is_that_of_the_first_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one ignores what it is told, as one that waits in a kernel does."""
    monkeypatch.setattr(launch, "_GRACE", 0.1)
    began = time.monotonic()
    assert start_processes(2, _fails_or_goes_on, (), method="fork") == 3
    assert time.monotonic() - began < 30
