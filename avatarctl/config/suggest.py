"""What a mistyped name was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from avatarctl.config.sections import keys, section_names

__all__ = ["nearest", "unknown_key", "unknown_section"]


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most like `name`, or None when none is like it."""
    matches = difflib.get_close_matches(name.strip().casefold()[:100], list(names), n=1, cutoff=0.6)
    return matches[0] if matches else None


def unknown_key(section: str, name: str) -> tuple[str, str]:
    """(what is wrong, what to do) for a key that its section does not have."""
    what = f"{section} has no key {name[:100]!r}"
    own = [spec.name for spec in keys().values() if spec.section == section]
    homes = [spec.dotted for spec in keys().values() if spec.name == name.strip().casefold()]
    like = nearest(name, own)
    if like is not None:
        return what, f"did you mean {section}.{like}?"
    if homes:
        return what, f"did you mean {' or '.join(homes)}?"
    elsewhere = nearest(name, {spec.name for spec in keys().values()})
    homes = [spec.dotted for spec in keys().values() if spec.name == elsewhere]
    return what, f"did you mean {' or '.join(homes)}?" if homes else f"it has {', '.join(own)}"


def unknown_section(name: str) -> tuple[str, str]:
    """(what is wrong, what to do) for a name at the root of a file that is no section."""
    what = f"there is no section {name[:100]!r}"
    like = nearest(name, section_names())
    if like is not None:
        return what, f"did you mean {like}?"
    homes = [spec.dotted for spec in keys().values() if spec.name == name.strip().casefold()]
    if homes:
        return what, f"did you mean {' or '.join(homes)}?"
    return what, f"the sections are {', '.join(section_names())}"
