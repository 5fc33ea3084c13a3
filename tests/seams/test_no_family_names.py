"""No file knows the name of a family, but those that belong to one.

A loop, a pipeline or a command that has to know a name stands on a wrong seam. Comments count too: what is
explained by a family's name holds for that family only. The page on which a cited fact stands does not count:
`spec/PAGE.md` says where something was read, and pages are named for what they describe.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import avatarctl
from avatarctl.registry import ROWS

PACKAGE = Path(avatarctl.__file__).parent
FAMILIES = sorted({row.family for row in ROWS.values() if row.family})
# "omniavatar" also as OmniAvatar, omni-avatar, OMNI_AVATAR.
WORDS = re.compile("|".join(name.replace("avatar", "[-_ ]?avatar") for name in FAMILIES), re.IGNORECASE)
CITED_PAGE = re.compile(r"\bspec/[a-z-]+\.md\b")

OWN_ROOMS = ("families", "models", "configs")
OWN_FILES = (
    "registry/rows.py",
    "registry/networks.py",
    "registry/defaults.py",
    # Names, shapes and fingerprints of one network's files.
    "weights/layouts.py",
    "loading/parts.py",
    "weights/published.py",
)


def mentions(path: Path) -> list[str]:
    """Lines of a file that name a family, and the path where it does."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = [f"{number}: {line.strip()}" for number, line in enumerate(text.splitlines(), 1)]
    return [
        line for line in (str(path.relative_to(PACKAGE)), *lines) if WORDS.search(CITED_PAGE.sub("", line))
    ]


def common_files() -> list[Path]:
    """Files of the package that belong to no family."""
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file()]
    return [
        path
        for path in sorted(files)
        if "__pycache__" not in path.parts
        and path.parts[0] not in OWN_ROOMS
        and path.as_posix() not in OWN_FILES
    ]


def test_the_families_are_known() -> None:
    assert {"omniavatar", "stableavatar"} <= set(FAMILIES)
    assert all(mentions(PACKAGE / "families" / f"{name}.py") for name in ("omniavatar", "stableavatar"))
    assert all(mentions(PACKAGE / name) for name in OWN_FILES), "one that names none needs no exception"
    assert {Path("family.py"), Path("cli/infer.py"), Path("sampling/denoise.py")} <= set(common_files())


@pytest.mark.parametrize("path", common_files(), ids=str)
def test_no_family_is_named(path: Path) -> None:
    assert mentions(PACKAGE / path) == []


def test_a_cited_page_is_no_name_and_a_name_beside_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path)
    (tmp_path / "room.py").write_text(
        "# a fact (spec/omniavatar.md a.4)\n# as OmniAvatar does (spec/omniavatar.md a)\n"
    )
    assert mentions(tmp_path / "room.py") == ["2: # as OmniAvatar does (spec/omniavatar.md a)"]
