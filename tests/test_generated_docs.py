"""Pages made from the code say what the code says."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from avatarctl.cli import app
from avatarctl.config import keys, preset_names

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("docs/cli.md", "docs/configuration.md", "configs/README.md")


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate = _generator()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the generator reads and writes."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        shutil.copyfile(ROOT / page, tmp_path / page)
    return tmp_path


def test_committed_pages_are_fresh() -> None:
    assert list(generate.stale(ROOT)) == [], "run `python docs/generate.py` and commit what it wrote"


@pytest.mark.parametrize("page", PAGES)
def test_check_names_a_page_that_one_letter_makes_stale(
    checkout: Path, page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkout / page).write_text((checkout / page).read_text("utf-8").replace("a", "e", 1), "utf-8")
    before = (checkout / page).read_bytes()
    assert generate.main(["--check"], checkout) == 1
    assert capsys.readouterr().err.startswith(f"{page} is stale")
    assert (checkout / page).read_bytes() == before
    assert generate.main([], checkout) == 0
    assert generate.main(["--check"], checkout) == 0


def test_a_new_configuration_makes_the_table_stale(checkout: Path) -> None:
    shutil.copyfile(checkout / "configs/infer/omniavatar-14b.yaml", checkout / "configs/infer/another.yaml")
    assert list(generate.stale(checkout)) == ["configs/README.md"]


def test_a_configuration_that_names_no_source_is_refused(checkout: Path) -> None:
    (checkout / "configs/infer/another.yaml").write_text("command: infer\nmodel:\n  name: cartoon-i2v\n")
    with pytest.raises(SystemExit, match=r"another\.yaml.*Source"):
        generate.pages(checkout)


def test_help_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = []
    for columns, force in (("40", "1"), ("300", "")):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setenv("FORCE_COLOR", force)
        monkeypatch.setenv("AVATARCTL_WEIGHTS", columns)
        pages.append(generate.pages(ROOT))
    assert pages[0] == pages[1]


def test_every_command_key_and_configuration_has_its_place() -> None:
    pages = generate.pages(ROOT)
    for name in ("infer", "models", "models list", "models show"):
        assert f"\n## {app.name} {name}\n" in pages["docs/cli.md"]
    for section in {spec.section for spec in keys().values()}:
        part = pages["docs/configuration.md"].partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        assert {f"`{spec.name}`" for spec in keys().values() if spec.section == section} == {
            line.split(" | ")[0].removeprefix("| ") for line in part.splitlines() if line.startswith("| `")
        }
    assert all(f"]({name}.yaml)" in pages["configs/README.md"] for name in preset_names())
