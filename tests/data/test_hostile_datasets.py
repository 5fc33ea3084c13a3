"""The damaged and unusual data sets beside the checkout, as their manifest says they should end."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import run


@pytest.fixture(scope="module")
def hostile(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with its links; commands write into it."""
    source, copy = shared_dir / "hostile", tmp_path_factory.mktemp("hostile")
    shutil.copytree(source / "datasets", copy / "datasets")
    for record in json.loads((source / "links.json").read_text(encoding="utf-8")):
        path = copy / record["path"]
        if not record["path"].startswith("datasets/"):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if record["type"] == "symlink":
            path.symlink_to(record["target"])
        elif record["type"] == "emptydir":
            path.mkdir()
        else:
            path.write_bytes(base64.b64decode(record["content_base64"]))
    return copy


def test_every_case_ends_as_it_should(
    hostile: Path, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AVATARCTL_CANARY", str(hostile / "PWNED"))
    manifest = json.loads((shared_dir / "hostile/manifest.json").read_text(encoding="utf-8"))
    cases = manifest if isinstance(manifest, list) else manifest["cases"]
    wrong: list[Any] = []
    for case in (case for case in cases if case["kind"] == "dataset"):
        folder = (hostile / case["file"]).parent
        size = () if any(folder.rglob("*.pt")) else ("--size", "32x32")  # artifacts there are of 64x64
        for command in ("precompute-latents", "precompute-audio"):
            ended = run(command, "--data", hostile / case["file"], *size, "--json")
            if ended.exit_code not in case["exit"]:
                wrong.append((case["file"], command, ended.exit_code, ended.stderr))
            if ended.exit_code == 0:
                told = json.loads(ended.stdout)
                if told["done"] + told["skipped"] != case.get("expect", {}).get("samples", 1):
                    wrong.append((case["file"], command, told))
            if ended.exit_code == 7 and case["expect"]["bad"] != ended.stderr.count("warning: "):
                wrong.append((case["file"], command, ended.stderr))
    assert not wrong
    assert not (hostile / "PWNED").exists() and not list(hostile.rglob(".tmp-*"))
