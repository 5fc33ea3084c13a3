"""What a dry run imports: planning is arithmetic, and waits for no network library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tests.pipelines import tiny_release as tiny

DRY = """
import sys
from avatarctl.cli import app
try:
    app.main(sys.argv[1:])
except SystemExit as end:
    heavy = {"torch", "diffusers", "transformers", "peft"}
    print(end.code, *sorted(heavy & sys.modules.keys()))
"""


def imported(*words: str | Path) -> tuple[str, str]:
    """Exit code and heavy imports of `infer --dry-run` in a process of its own, and what it said."""
    command = [sys.executable, "-c", DRY, "infer", "--dry-run", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout.splitlines()[-1], done.stderr


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release, and the same model whole as safetensors."""
    root = tmp_path_factory.mktemp("weights")
    release = tiny.tiny_release()
    release.write(root)
    whole = release.base | {name: held for name, held in release.adapter.items() if "lora" not in name}
    (root / "whole").mkdir()
    tiny.write_json(root / "whole" / "config.json", {"num_heads": tiny.TINY.heads})
    save_file(whole, root / "whole" / "model.safetensors")
    return root


@pytest.mark.parametrize("model", ["cartoon-i2v", "stableavatar-tiny", "omniavatar-14b"])
def test_a_registry_model_imports_nothing_heavy(model: str, tmp_path: Path) -> None:
    """The last one's files are missing, which is said."""
    found, said = imported("--model", model, "--weights-root", tmp_path)
    assert found == "0" and ("weights are missing" in said) == (model == "omniavatar-14b")


def test_safetensors_files_import_nothing_heavy(root: Path) -> None:
    found, said = imported("--model", root / "whole", "--weights-root", root, "--size", "64x64")
    assert found == "0", said
    assert "OmniAvatar of width 48" in said and "weights are missing" not in said


def test_a_pickle_imports_no_network(root: Path) -> None:
    """The published adapter, on its base."""
    words = ("--model", root / "OmniAvatar-14B", "--weights", f"dit={root / 'Wan2.1-T2V-14B'}")
    found, said = imported(*words, "--weights-root", root, "--size", "64x64")
    assert found == "0 torch", said
    assert "OmniAvatar" in said and "weights are missing" not in said


def test_a_device_that_is_named_is_tried() -> None:
    found, said = imported("--device", "cuda:63")
    assert found == "0 torch"
    assert "a run would end with exit 4: runtime.device: cuda:63 is not there" in said
