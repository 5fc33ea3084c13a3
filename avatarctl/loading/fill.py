"""Tensors on the disk -> a network that was built without memory.

    with on_meta(): network = Network(...)
    fill(network, tensors, dtype_of=..., device=...)

Nothing is initialised that will be overwritten, and nothing is held twice: every parameter is allocated once,
in its final dtype and on its device, and filled block by block. Beside the network only one block of one
tensor is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from avatarctl.errors import UnusableWeights
from avatarctl.files.finite import nonfinite, nonfinite_file
from avatarctl.files.strict_json import listed
from avatarctl.files.tensors import BLOCK_BYTES, DTYPES, Array, FileTensor, StoredTensor, block_ranges
from avatarctl.finite import is_finite

__all__ = ["fill", "on_meta"]

_FILE_BLOCK: Final = 2 << 20
"""Bytes read at a time from a file: larger blocks and the parameters keep taking each other's memory from the
allocator, and every block costs fresh pages (8 MB: 1.5 times the processor time, measured)."""

# Storage types of numpy and what their bits mean. uint16 and uint8 only carry them.
_BITS: Final = {"BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


@contextmanager
def on_meta() -> Iterator[None]:
    """Modules built inside have shapes and no memory.

    The global random generator is given back as it was: some constructors draw from it even here.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        yield


def fill(
    network: nn.Module,
    tensors: Mapping[str, StoredTensor],
    *,
    dtype_of: Callable[[str], torch.dtype],
    device: torch.device,
    where: Path,
    likely: Callable[[], str | None] = lambda: None,
    unused: Collection[str] = (),
    told_as: Callable[[str], str | None] = lambda name: name,
    done: Callable[[str], None] = lambda name: None,
) -> None:
    """Give every parameter and buffer of `network` its value, frozen; tied ones stay tied.

    tensors:  by the network's own names.
    dtype_of: final dtype of a floating-point tensor, by that name.
    where, likely: what to name, and what the probable cause is, when names do not fit.
    unused:   parameters that no forward pass in evaluation mode reads; zero where the file lacks them.
    told_as:  a name of the network as it is in the file, where it is another; several may be one there.
    done:     is told each tensor, by the network's own name, when its value is in place.

    Raises UnusableWeights for a missing, left-over, misshapen or integer tensor, for NaN and infinity, and
    for values that the final dtype does not hold.
    """

    def told(name: str) -> str:
        return told_as(name) or name

    slots = _slots(network)
    missing = dict.fromkeys(map(told, sorted(slots.keys() - tensors.keys() - set(unused))))
    over = dict.fromkeys(map(told, sorted(tensors.keys() - slots.keys())))
    _refuse_names(list(missing), list(over), where, likely)
    for name, slot in slots.items():
        if name in tensors:
            _check(told(name), slot.shape, tensors[name], where, likely)
    holders = _holders(network)
    for name in (*tensors, *(slots.keys() - tensors.keys())):  # in the order of the file
        slot = slots[name]
        if name in tensors:
            value = torch.empty(slot.shape, dtype=dtype_of(name), device=device)
            _stream(told(name), tensors[name], value, where)
        else:
            value = torch.zeros(slot.shape, dtype=dtype_of(name), device=device)
        if isinstance(slot, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        for holder, key in holders[id(slot)]:
            holder[key] = value
        done(name)


def _slots(network: nn.Module) -> dict[str, torch.Tensor]:
    """Every distinct parameter and buffer that a file must give, under its first name."""
    slots: dict[str, torch.Tensor] = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    stored = network.state_dict(keep_vars=True)
    if computed := slots.keys() - stored.keys():
        # A buffer that no file holds would stay without memory; none of our networks has one.
        raise ValueError(f"buffers outside the state dict must be computed: {', '.join(sorted(computed))}")
    return slots


def _refuse_names(missing: list[str], over: list[str], where: Path, likely: Callable[[], str | None]) -> None:
    if not missing and not over:
        return
    are, have = ("s are" if len(missing) > 1 else " is"), ("have" if len(over) > 1 else "has")
    lacks = f"{len(missing)} tensor{are} missing: {listed(missing, most=3)}" if missing else ""
    has = f"{len(over)} {have} no place in the network: {listed(over, most=3)}" if over else ""
    raise UnusableWeights("; ".join(filter(None, (lacks, has))), where=where, fix=likely())


def _check(
    name: str, shape: torch.Size, tensor: StoredTensor, where: Path, likely: Callable[[], str | None]
) -> None:
    if not DTYPES[tensor.info.dtype].floating:
        raise UnusableWeights(
            f"{name[:100]} has dtype {tensor.info.dtype}; weights are floating point", where=where
        )
    if tensor.info.shape != tuple(shape):
        raise UnusableWeights(
            f"{name[:100]} has shape {list(tensor.info.shape)}, the network needs {list(shape)}",
            where=where,
            fix=likely(),
        )


def _stream(name: str, tensor: StoredTensor, value: torch.Tensor, where: Path) -> None:
    flat, dtype = value.view(-1), tensor.info.dtype
    # A product is computed in tiles, so that small blocks would compute it again and again.
    size = _FILE_BLOCK if isinstance(tensor, FileTensor) else BLOCK_BYTES
    for start, stop in block_ranges(tensor.info, size):
        block = tensor.read(start, stop)
        if nonfinite(block, dtype):
            raise UnusableWeights(
                f"{name[:100]} holds NaN or infinity",
                where=nonfinite_file(tensor) or where,
                fix="the file is damaged, or its training diverged",
            )
        part = flat[start:stop]
        part.copy_(_as_torch(block, dtype))
        if value.dtype == torch.float16 and dtype != "F16" and not is_finite(part):
            raise UnusableWeights(
                f"{name[:100]} holds values too large for float16", where=where, fix="use --dtype bfloat16"
            )


def _as_torch(block: Array, dtype: str) -> torch.Tensor:
    """The same memory as a torch tensor of the stored dtype."""
    shared = torch.from_numpy(block)
    return shared.view(_BITS[dtype]) if dtype in _BITS else shared


def _holders(network: nn.Module) -> dict[int, list[tuple[dict[str, Any], str]]]:
    """By identity of a tensor: every dictionary and key in which a module holds it."""
    holders: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in network.modules():
        for held in (module._parameters, module._buffers):
            for key, tensor in held.items():
                if tensor is not None:
                    holders.setdefault(id(tensor), []).append((held, key))
    return holders
