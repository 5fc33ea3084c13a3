"""Whether an adapter is in a model already: merged once more, every change would count twice.

No tensor tells, only what our headers record and which files were read.
"""

from __future__ import annotations

from avatarctl.errors import UnusableWeights
from avatarctl.files.hashes import FileHashes
from avatarctl.weights.metadata import OwnMetadata, read_own
from avatarctl.weights.weight_file import WeightFile

__all__ = ["check_lineage"]


def check_lineage(base: WeightFile, adapter: WeightFile) -> str:
    """What to warn of where `adapter` is merged into `base`; empty where nothing hints at a second time.

    Files are hashed only where the base's header says that something was merged into it.

    Raises UnusableWeights where the adapter is certainly in the base.
    """
    again = adapter.layout is base.layout and any(map(adapter.layout.is_replaced, adapter.tensors))
    if (again and _files(adapter) & _files(base)) or _recorded(base, adapter):
        raise UnusableWeights(
            f"is in the base {base.path} already: merged once more, its changes would count twice",
            where=adapter.path,
            fix="name the base without it",
        )
    merges = [step for step in read_own(base.metadata).operations if step.get("operation") == "merge"]
    if any(step.get("adapter") == adapter.path.name for step in merges):
        return (
            f"an adapter of the name {adapter.path.name} was merged into {base.path} before; "
            f"if it was {adapter.path}, its changes count twice"
        )
    if again:
        return (
            f"{base.path} is {base.variant} already: {adapter.path} replaces its audio layers, and adds its "
            "LoRA to what was merged before"
        )
    return ""


def _files(weight_file: WeightFile) -> set[str]:
    return {str(file.resolve()) for file in weight_file.files}


def _recorded(base: WeightFile, adapter: WeightFile) -> bool:
    """Whether the base was made of the adapter's files, or of what these were converted from."""
    theirs, ours = read_own(base.metadata), read_own(adapter.metadata)
    if not _did(theirs, "merge") or not theirs.sources:
        return False
    # An extracted adapter comes from models, and the same plain model may have been the other merge's base.
    origins = set() if _did(ours, "extract") else set(ours.sources)
    if origins & set(theirs.sources):
        return True
    with FileHashes() as hashes:
        hashes.start(adapter.files)
        found = {value for digest in hashes.digests(adapter.files) for value in digest.entries().values()}
    return not found.isdisjoint(theirs.sources)


def _did(header: OwnMetadata, operation: str) -> bool:
    return any(step.get("operation") == operation for step in header.operations)
