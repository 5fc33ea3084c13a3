"""The formats that are known, how a folder is recognised, and the folders used by default."""

from __future__ import annotations

from pathlib import Path

from .faces import FACES
from .golden import Folder, Format
from .losses import LOSSES
from .omniavatar import OMNIAVATAR
from .stableavatar import STABLEAVATAR

FORMATS: tuple[Format, ...] = (OMNIAVATAR, STABLEAVATAR, FACES, LOSSES)

_TESTS = Path(__file__).resolve().parent.parent
_SHIPPED = _TESTS / "golden"
_SHARED = _TESTS.parent.parent / "shared" / "golden"


def recognise(path: Path) -> Format:
    """The format most of whose files are in the folder. Raises ValueError with what would do."""
    if not path.is_dir():
        raise ValueError(f"{path} is not a folder")
    names = [item.name for item in path.iterdir()]
    found = {known.name: sum(known.knows(name) for name in names) for known in FORMATS}
    best = max(FORMATS, key=lambda known: found[known.name])
    if not found[best.name]:
        raise ValueError(
            f"{path} has no file of a known format ({', '.join(found)}); give one folder of recorded numbers"
        )
    return best


def folders(chosen: str | None) -> list[Folder]:
    """The folder asked for, or the shipped subsets and, where present, what lies beside the checkout."""
    if chosen is not None:
        path = Path(chosen).expanduser().resolve()
        return [Folder(path, _label(path), recognise(path))]
    places = [(root / known.name, known) for known in FORMATS for root in (_SHIPPED, _SHARED)]
    return [Folder(path, _label(path), known) for path, known in places if path.is_dir()]


def _label(path: Path) -> str:
    """`shipped`, `shared`, or the folder's own name."""
    return {_SHIPPED: "shipped", _SHARED: "shared"}.get(path.parent, path.name)
