"""Options of the parity tests: which folder of recorded numbers, and the list of what is not compared."""

from __future__ import annotations

import pytest

from .formats import FORMATS, folders
from .golden import Folder, comparisons, listed_here

_FOLDERS = pytest.StashKey[list[Folder]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("parity")
    group.addoption("--golden", metavar="DIR", help="one folder of recorded numbers, of one format")
    group.addoption("--waits", action="store_true", help="list what is not compared, and why")


def pytest_configure(config: pytest.Config) -> None:
    try:
        # The options are unknown when the whole suite runs: this file is then found too late to add them.
        config.stash[_FOLDERS] = folders(config.getoption("golden", None))
    except ValueError as error:
        raise pytest.UsageError(f"--golden: {error}") from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = metafunc.config.stash[_FOLDERS]
    if "comparison" in metafunc.fixturenames:
        cases = [case for folder in given for case in comparisons(folder)]
        metafunc.parametrize("comparison", cases, ids=[case.id for case in cases])
    if "golden_folder" in metafunc.fixturenames:
        metafunc.parametrize("golden_folder", given, ids=[folder.label for folder in given])
    for fixture, table in (("waiting", "waits_for"), ("defect", "defects")):
        if fixture in metafunc.fixturenames:
            rows = [
                (f"{folder.label}-{file}-{entry.key}", (entry, file, count))
                for folder in given
                for entry, file, count in listed_here(folder, getattr(folder.format, table))
            ]
            metafunc.parametrize(fixture, [row for _, row in rows], ids=[name for name, _ in rows])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("waits", False):
        return
    for known in FORMATS:
        for title, table in (("waits for", known.waits_for), ("defect of the reference", known.defects)):
            terminalreporter.section(f"{known.name}: not compared, {title}")
            for entry in table:
                terminalreporter.write_line(f"{entry.file}: {entry.key}: {entry.reason}")
