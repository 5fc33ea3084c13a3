"""`models pull` in this process, for the tests of it."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from avatarctl.cli import app

NAME = "wav2vec2-base-960h"
REPO = "facebook/wav2vec2-base-960h"
FILES = ["config.json", "model.safetensors", "preprocessor_config.json"]


def models(*words: str, code: int = 0) -> Result:
    """`avatarctl models ...` in this process; one error line at most, and the expected exit code."""
    result = CliRunner().invoke(app, ["models", *words], prog_name="avatarctl")
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == (code != 0)
    return result


def error_of(result: Result) -> str:
    return result.stderr.splitlines()[-1].removeprefix("error: ")


def incomplete(folder: Path) -> list[Path]:
    return list(folder.rglob("*.incomplete"))


def never() -> bool:
    return False
