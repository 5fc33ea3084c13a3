"""The pins hold what an installation needs, all of it and nothing that breaks it, and make uses them. What is
built from the checkout carries its licence."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in LINES)}
DEVELOPMENT = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]
DECLARED = [Requirement(line) for line in PROJECT["dependencies"]] + DEVELOPMENT


def needed(
    requirements: list[Requirement], seen: set[tuple[str, str]] | None = None
) -> Iterator[tuple[str, str]]:
    """(name, "" or extra) of every distribution that the requirements pull in here, recursively."""
    seen = set() if seen is None else seen
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            yield name, extra
            further = map(Requirement, importlib.metadata.requires(name) or [])
            applies = [r for r in further if not r.marker or r.marker.evaluate({"extra": extra})]
            yield from needed(applies, seen)


# Installed from PyPI, torch for Linux brings CUDA's libraries; it pins them itself, build by build.
CUDA = re.compile(r"nvidia-.*|cuda-.*|triton")
NEEDED = sorted({name for name, _ in needed(DECLARED) if not CUDA.fullmatch(name)})


def test_every_line_is_a_plain_pin() -> None:
    assert [line for line in LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
    assert sorted(LINES, key=str.lower) == LINES and len(PINS) == len(LINES)


def test_torch_is_pinned_without_the_label_of_one_build() -> None:
    assert str(PINS["torch"]) == "2.13.0"


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda requirement: requirement.name)
def test_every_declared_dependency_is_pinned_within_its_range(requirement: Requirement) -> None:
    assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


def test_the_walk_reaches_dependencies_of_dependencies() -> None:
    assert {"torch", "sympy", "mpmath", "pytest", "iniconfig"} <= set(NEEDED)


def test_everything_that_an_installation_pulls_in_is_pinned() -> None:
    assert [name for name in NEEDED if name not in PINS] == []


def test_what_is_installed_is_what_is_pinned() -> None:
    installed = {name: Version(importlib.metadata.version(name)) for name in NEEDED}
    different = {
        name: f"{version} is installed, {PINS[name]} is pinned"
        for name, version in installed.items()
        if version.public != PINS[name].public
    }
    assert different == {}


@pytest.mark.parametrize("name", ["torchvision", "torchaudio"])
def test_packages_that_break_imports_of_other_packages_are_nowhere(name: str) -> None:
    """A torchvision of another build than torch's makes transformers and diffusers fail to import."""
    assert name not in PINS
    assert name not in NEEDED


def test_commands_of_the_readme_and_the_makefile_name_the_pinned_torch() -> None:
    for file in ("README.md", "Makefile"):
        named = re.findall(r"torch==([0-9.]+[0-9])", (ROOT / file).read_text(encoding="utf-8"))
        assert named and set(named) == {str(PINS["torch"])}, file


def test_licence_and_weights_travel_with_what_is_built(tmp_path: Path) -> None:
    """The licence in the metadata and as whole texts, in the wheel and in the source archive; the weights in
    the wheel."""
    checkout, built = tmp_path / "checkout", tmp_path / "built"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("avatarctl", "configs"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=ignore)
    files = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "constraints.txt", "LICENSE", "NOTICE")
    for file in files:
        shutil.copyfile(ROOT / file, checkout / file)
    built.mkdir()
    build = "from setuptools import build_meta as b; b.build_sdist('../built'); b.build_wheel('../built')"
    subprocess.run([sys.executable, "-c", build], cwd=checkout, check=True, capture_output=True)

    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    base = source.name.removesuffix(".tar.gz")
    with zipfile.ZipFile(wheel) as archive, tarfile.open(source) as sources:
        metadata = archive.read(f"{base}.dist-info/METADATA").decode().splitlines()
        for name in ("LICENSE", "NOTICE"):
            text = (ROOT / name).read_bytes()
            assert archive.read(f"{base}.dist-info/licenses/{name}") == text
            member = sources.extractfile(f"{base}/{name}")
            assert member is not None and member.read() == text
    for line in ("License-Expression: Apache-2.0", "License-File: NOTICE", "Author: avatarctl contributors"):
        assert line in metadata
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in licence and "END OF TERMS AND CONDITIONS" in licence

    # The weights travel too, of the bytes that the registry states.
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "unpacked")
    installed = {**os.environ, "PYTHONPATH": str(tmp_path / "unpacked")}
    verify = [sys.executable, "-m", "avatarctl", "models", "verify", "cartoon-i2v"]
    found = subprocess.run(
        verify, cwd=tmp_path, env=installed, check=True, capture_output=True, text=True
    ).stdout
    assert str(tmp_path / "unpacked") in found and "6 ok" in found, found


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed; the README has the commands")
def test_make_installs_once_and_again_only_when_the_pins_change(tmp_path: Path) -> None:
    """The real Makefile, with a stand-in for Python that writes down what it was asked to do."""
    asked = tmp_path / "asked.txt"
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$*" >> "{asked}"\n')
    python.chmod(0o755)
    for tool in ("python", "avatarctl"):
        (tmp_path / ".venv/bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / ".venv/bin" / tool).symlink_to(python)
    for file in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())

    def make(*arguments: str) -> list[str]:
        asked.write_text("")
        command = ["make", "--no-print-directory", f"PYTHON={python}", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        return asked.read_text().splitlines()

    install = "-m pip install --disable-pip-version-check"
    first = make("demo")
    assert [line for line in first if line.startswith("-m")] == [
        "-m venv .venv",
        f"{install} torch==2.13.0 -c constraints.txt",
        f"{install} -e .[dev] -c constraints.txt",
    ]
    assert "demo --out demo.mp4 --overwrite" in first
    assert "demo --out other name.mp4 --overwrite" in make("demo", "OUT=other name.mp4")
    assert not [line for line in make("demo") if line.startswith("-m")]
    later = (tmp_path / ".venv/installed").stat().st_mtime + 10
    os.utime(tmp_path / "constraints.txt", (later, later))
    assert [line for line in make("demo") if line.startswith("-m")] == first[1:4]
