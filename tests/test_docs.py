"""Documentation that runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_library_example_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/python.md", "exec"), {})
    assert (tmp_path / "hello.mp4").stat().st_size > 1000
    assert "hello.mp4 25" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["architecture.md", "contributing.md"])
def test_files_named_in_the_house_exist(page: str) -> None:
    """A page about the house that names rooms which are not there misleads more than none."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rooms = {path.name for path in (ROOT / "avatarctl").rglob("*") if "__pycache__" not in path.parts}
    named = set(re.findall(r"`([a-z_0-9]+\.py)`", text))
    assert named and named <= rooms, f"not in the house: {sorted(named - rooms)}"


def test_every_defect_of_the_public_trainer_names_tests_that_exist() -> None:
    """A promise that nothing holds is none."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    rows = text.partition("## Defects of the public trainer")[2].splitlines()
    rows = [row for row in rows if re.match(r"\| (\d+|spec/\S+ g\.\d) \|", row)]
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    tests = set(re.findall(r"^def (test_\w+)\(", sources, re.MULTILINE))
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named and set(named) <= tests, row
