"""Scripts that the suite does not run: what they take from the package is there."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPTS = sorted(path for folder in ("bench", "torture", "gpu") for path in (HERE / folder).glob("*.py"))


def taken(script: Path) -> Iterator[tuple[str, str]]:
    """(module, name) of what it imports from the package and from the tests, wherever it does."""
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("avatarctl", "tests"):
            yield from ((str(node.module), alias.name) for alias in node.names)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_a_script_takes_is_there(script: Path) -> None:
    for module, name in taken(script):
        found = importlib.import_module(module)
        if not hasattr(found, name):  # a name of a package may be a module that nobody imported yet
            importlib.import_module(f"{module}.{name}")


@pytest.mark.parametrize(
    "script", sorted((HERE / "torture").glob("*_mutations.py")), ids=lambda path: path.stem
)
def test_each_known_mistake_can_be_made_and_its_test_is_there(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that moved on would end the script before it caught anything."""
    monkeypatch.syspath_prepend(str(script.parent))
    for mutation in importlib.import_module(script.stem).MUTATIONS:
        source = (HERE.parent / "avatarctl" / mutation.file).read_text(encoding="utf-8")
        assert source.count(mutation.before) == 1, mutation.what
        file, _, name = mutation.test.partition("::")
        path = next(each for each in (HERE / file, HERE / "training" / file) if each.is_file())
        assert f"def {name.partition('[')[0]}(" in path.read_text(encoding="utf-8"), mutation.what
