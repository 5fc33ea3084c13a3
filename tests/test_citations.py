"""Every fact that code, tests and docs cite is on a page of docs/spec, in the section that they name.

A citation is `spec/PAGE.md SECTION`; several sections are written as `a, b.2 and c` or `c to g`, an entry of
a list as `a.3 point 5`. A section without its page is a mistake too: readers would have to guess.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "docs" / "spec"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in SPEC.glob("*.md") if path.stem != "README"}

SECTION = r"(?:[a-o](?:\.\d+[a-z]?)?|\d+(?:\.\d+|[a-z])?)(?: point \d+)?(?![\w-])"
CITATION = re.compile(rf"spec/([a-z-]+)\.md(?: \(?({SECTION}(?:(?:[,;]| and| to) {SECTION})*))?")
UNCLEAR = (
    re.compile(rf"(?<![\w/-])(?:{'|'.join(PAGES)})\.md {SECTION}"),  # the folder is left out
    re.compile(rf"(?<![\w/.-])[Ss]pec(?:ification)? (?:section )?{SECTION}"),  # of which page?
    re.compile(r"(?<![\w.'\"/\[-])[a-o]\.\d+[a-z]?(?![\w.(\[])"),
)


def sections(page: str) -> set[str]:
    """What can be cited of a page: its headings (`a`, `a.4`, `3a`, `3.1`), entries of numbered lists and
    tables (`a.3 point 5`), and such entries of a section that is not divided (`b.8`)."""
    found: set[str] = set()
    here = ""
    for line in page.splitlines():
        if heading := re.match(r"#{2,3} ([a-o](?:\.\d+[a-z]?)?|\d+(?:\.\d+|[a-z])?)\.? ", line):
            here = heading[1]
            found.add(here)
        elif here and (entry := re.match(r"(?:\| )?(\d+)(?: \||\. )", line)):
            found.add(f"{here} point {entry[1]}")
            if "." not in here:
                found.add(f"{here}.{entry[1]}")
    return found


SECTIONS = {page: sections(text) for page, text in PAGES.items()}


def named(listed: str) -> Iterator[str]:
    """`a, b.2 and c` or `c to g`, one by one."""
    for part in re.split(r"(?:[,;]| and) ", listed):
        first, _, last = part.partition(" to ")
        yield first
        if first.isdigit() and last:
            yield from map(str, range(int(first) + 1, int(last) + 1))
        elif last:
            yield from map(chr, range(ord(first) + 1, ord(last) + 1))


def mistakes(text: str, page: str = "") -> Iterator[str]:
    """Citations that lead nowhere. A page of docs/spec names sections of its own without saying where."""
    flat = re.sub(r"\s*\n[ \t]*(?:# ?)?", " ", text)
    flat = re.sub(r"\[[^\]]*\]\(([^)]*)\)", r"\1", flat)  # a link stands for where it leads
    if page:
        flat = re.sub(rf"(?<![\w/-])({'|'.join(PAGES)})\.md", r"spec/\1.md", flat)
    for cited in CITATION.finditer(flat):
        where, listed = cited.groups()
        if where not in PAGES:
            yield f"{cited[0]}: there is no such page"
        elif not listed and SECTIONS[where] and not page:
            yield f"{cited[0]}: which section?"
        elif listed and (absent := [each for each in named(listed) if each not in SECTIONS[where]]):
            yield f"{cited[0]}: there is no section {', '.join(absent)}"
    rest = CITATION.sub("", flat)
    if page:
        yield from (each[0] for each in UNCLEAR[-1].finditer(rest) if each[0] not in SECTIONS[page])
    else:
        yield from (f"{each[0]}: of which page?" for pattern in UNCLEAR for each in pattern.finditer(rest))


def texts(*folders: str, files: tuple[str, ...] = ()) -> dict[Path, str]:
    """By path; without the pages of docs/spec, and without this file, which shows mistakes."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    paths = [path for path in paths if path.suffix in (".py", ".md", ".yaml") and SPEC not in path.parents]
    paths += [ROOT / name for name in files]
    return {path: path.read_text(encoding="utf-8") for path in paths if path != Path(__file__).resolve()}


OURS = ("README.md", "CHANGELOG.md", "NOTICE", "Makefile", "pyproject.toml")


def test_every_citation_names_a_page_and_a_section_that_exist() -> None:
    everything = texts("avatarctl", "configs", "docs", "tests", files=OURS)
    assert sum(len(CITATION.findall(text)) for text in everything.values()) > 50
    found = [
        f"{path.relative_to(ROOT)}: {what}" for path, text in everything.items() for what in mistakes(text)
    ]
    assert found == []


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_sections_that_they_have(page: str) -> None:
    assert list(mistakes(PAGES[page], page)) == []


def test_nothing_names_what_a_reader_of_the_repository_does_not_have() -> None:
    """Some tests read a folder beside the checkout, say so, and are skipped without it."""
    private = re.compile(r"design\.md|shared/spec")
    found = [path for path, text in texts("tests").items() if private.search(text)]
    elsewhere = texts("avatarctl", "configs", "docs", files=OURS)
    elsewhere |= {SPEC / f"{page}.md": text for page, text in PAGES.items()}
    found += [path for path, text in elsewhere.items() if re.search(r"design\.md|\bshared/", text)]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "(spec/omniavatar.md a.4)", "spec/omniavatar.md a, b, f. Chunks", "spec/omniavatar.md (a.2, c)",
        "spec/omniavatar.md a.3 point 5", "spec/omniavatar.md j.15:", "spec/stableavatar.md c to g, files",
        "spec/cartoon-world.md 3 to 5.", "spec/building-blocks.md 1 and 3", "spec/field.md\n    # 4a, then",
        "spec/weight-sources.md for the files", "[docs/spec/field.md](docs/spec/field.md) 3a",
        "blocks.0.q and 'a.1'", "spec: KeySpec", "read_text(spec, f)",
    ],
)  # fmt: skip
def test_what_is_right(text: str) -> None:
    assert list(mistakes(text)) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("(spec/omniavatar.md a.9)", "no section a.9"),
        ("spec/omniavatar.md a.4, b and f.12", "no section f.12"),
        ("spec/omniavatar.md a.3 point 9", "no section a.3 point 9"),
        ("spec/cartoon-world.md 3 to 12", "no section 10, 11, 12"),
        ("spec/losses.md 1", "no such page"),
        ("spec/omniavatar.md says so", "which section?"),
        ("(spec a.4)", "of which page?"),
        ("# spec 0", "of which page?"),
        ("Numbers of spec\n    section f.", "of which page?"),
        ("as in omniavatar.md i", "of which page?"),
        ("four rows (b.2)", "of which page?"),
    ],
)
def test_what_is_a_mistake(text: str, says: str) -> None:
    assert any(says in what for what in mistakes(text)), list(mistakes(text))
