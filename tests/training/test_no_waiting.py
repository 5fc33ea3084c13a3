"""The program runs ahead of the device: within a step nothing asks for numbers until all passes are done.

On a CPU no copy shows it, so tensors that would be on a device are followed by a mark on their memory, from
samples and weights on, and every question for their numbers is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from avatarctl.data.training_set import ToFace, TrainingSample
from avatarctl.training.trainer import Trainer
from tests.repeats import repeats

ASKING = {
    "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "equal",
    "_linalg_check_errors",
}  # fmt: skip
READING = {"tolist", "numpy", "__array__", "cpu"}


def is_there(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and getattr(leaf.untyped_storage(), "is_there", False)


def put_there(*leaves: object) -> None:
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            leaf.untyped_storage().is_there = True  # type: ignore[attr-defined]


def leaves_of(thing: object) -> Iterator[object]:
    """As torch's `tree_leaves`, which takes longer than these operations."""
    if isinstance(thing, dict):
        thing = tuple(thing.values())
    if isinstance(thing, (list, tuple)):
        for each in thing:
            yield from leaves_of(each)
    else:
        yield thing


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(map(is_there, leaves_of(args))) or (kwargs and any(map(is_there, leaves_of(kwargs)))):
            name = func._schema.name.removeprefix("aten::")
            by_mask = name in {"index", "index_put", "index_put_"} and any(
                isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in leaves_of(args[1])
            )
            if name in ASKING or by_mask:
                self.found.append(name)
            put_there(*leaves_of(result))
        return result


class Calls(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READING and is_there(args[0]):
            self._found.append(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def questions() -> Iterator[list[str]]:
    with Operations() as operations, Calls(operations.found):
        yield operations.found


def test_a_question_is_seen() -> None:
    weight = torch.ones(3)
    put_there(weight)
    with questions() as found:
        made = weight * torch.ones(3)
        float(made.sum()), made.nonzero(), made[made > 0], (made + 1).tolist(), torch.ones(2).tolist()
    assert found == ["_local_scalar_dense", "nonzero", "index", "tolist"]


@pytest.mark.parametrize("cut", repeats([("1", "2")], [("2", "1")]))
def test_a_step_asks_when_all_passes_are_done(
    cut: tuple[str, str], trainer_of: Callable[..., Trainer], samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all its numbers at once, and for the gradient's norm, however it is cut: both decide whether the
    weights move. With all auxiliary losses, on faces that are aligned first, as of clips that show more; the
    sigma of one sample is too high for them."""
    # As on a GPU, which reads all rows of a text.
    monkeypatch.setattr("avatarctl.models.omniavatar.without_padding", lambda text: (text, None))
    size, passes = cut
    trainer = trainer_of(
        f"train.batch_size={size}", f"train.gradient_accumulation={passes}", "aux.losses=sync,lpips,trepa",
        "memory.vae_gradient=segment", "data.num_frames=17", "aux.max_sigma=0.8", data=samples,
    )  # fmt: skip
    to_face = ToFace(0.9 * torch.eye(2, 3).repeat(17, 1, 1), 32)
    read = [each for each in trainer.data.read(range(2)) if isinstance(each, TrainingSample)]
    batch = [replace(each, to_face=to_face) for each in read]
    put_there(*(tensor for sample in batch for tensor in (*sample.tensors.values(), sample.waveform)))
    put_there(to_face.matrices, *trainer.data.constants.values(), *trainer.network.dit.parameters())
    with questions() as found:
        trainer._one_step(batch, 0.0, 0.0)
    assert found == ["tolist", "_local_scalar_dense"]
    assert {"sync", "lpips", "trepa"} <= trainer.last.keys() and trainer.last["judged"] == 0.5
