"""What a machine lacks or forbids before a command begins: folders, signals, imports."""

from __future__ import annotations

import importlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from avatarctl.cli.app import exit_code_of

TINY = ("-o", "output.width=16", "-o", "output.height=16", "--num-frames", "9", "--steps", "2")
NOWHERE = "/dev/null/home"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals and limits of POSIX systems")


def run_of(*words: str) -> list[str]:
    return [sys.executable, "-m", "avatarctl", *words]


# torch sets a folder of its own once it has compiled something in this process, and then asks for no other.
OF_LIBRARIES = ("HF_", "XDG_", "TORCHINDUCTOR_", "TRITON_")


def environment(**variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OF_LIBRARIES)}
    return kept | {"HF_HUB_ENABLE_HF_TRANSFER": "1", "HF_HUB_OFFLINE": "1"} | variables


def nothing_can_be_written() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_without_a_temporary_folder(tmp_path: Path) -> None:
    """A file size limit of nothing: no folder of the machine will do."""
    found = subprocess.run(
        run_of("infer", *TINY, "--out", "a.mp4"),
        cwd=tmp_path, env=environment(), text=True, capture_output=True, timeout=120,
        preexec_fn=nothing_can_be_written,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (4, ""), found.stderr
    line = found.stderr.splitlines()[-1]
    assert line.startswith("error: ") and "no usable temporary folder (set TMPDIR to" in line
    assert "Traceback" not in found.stderr and list(tmp_path.iterdir()) == []


def ignoring() -> None:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def test_without_a_home_and_with_signals_ignored_from_the_start(tmp_path: Path) -> None:
    """As below `nohup`, and in the background of a script: the run goes on to its end. Neither the home nor a
    cache can be written, which it has no need of, and a variable of the hub is not warned of."""
    process = subprocess.Popen(
        run_of("infer", *TINY, "--out", "a.mp4"),
        cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=ignoring,
        env=environment(HOME=NOWHERE, HF_HOME=NOWHERE, XDG_CACHE_HOME=NOWHERE, MODELSCOPE_CACHE=NOWHERE),
    )  # fmt: skip
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("chunk 1 of"):
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGHUP)
            break
    stdout, rest = process.communicate(timeout=120)
    stderr = "".join([*said, rest])
    assert process.returncode == 0 and stdout == f"{tmp_path / 'a.mp4'}\n", stderr
    assert "Warning" not in stderr and "HF_TRANSFER" not in stderr


BODIES = {
    "of a file": ("open('{folder}/absent')", "No such file"),
    "of a library": ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart"),
    "of an operator": ("raise RuntimeError('operator nms does not exist')", "operator nms"),
    "of another package": ("import package_that_nobody_has", "No module named"),
    "told by another": ("try: 1 / 0\nexcept ZeroDivisionError as e: raise KeyError('told') from e", "told"),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_an_import_that_fails(
    body: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, says = body
    (tmp_path / "broken_package.py").write_text(source.format(folder=tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("BROKEN_PACKAGE_CACHE", str(tmp_path))
    assert exit_code_of(lambda: importlib.import_module("broken_package")) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: broken_package cannot be imported: ") and says in line
    if says == "No such file":
        assert "(set BROKEN_PACKAGE_CACHE to a folder that can be written)" in line


def test_what_a_lazy_package_says_of_its_own_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers tells a failed import of a part of it by another error, raised from the first."""
    (tmp_path / "broken_part.py").write_text("raise OSError('no cache')")
    monkeypatch.syspath_prepend(tmp_path)

    def lazy() -> None:
        try:
            importlib.import_module("broken_part")
        except OSError as error:
            raise RuntimeError("a part cannot be loaded") from error

    assert exit_code_of(lazy) == 4
    assert "broken_part cannot be imported: a part cannot be loaded" in capsys.readouterr().err


def own_import() -> None:
    raise ImportError("cannot import name 'x'", name="avatarctl.registry")


def call_of_a_finished_package() -> None:
    raise RuntimeError("a bug")


@pytest.mark.parametrize("bug", [own_import, call_of_a_finished_package])
def test_a_bug_stays_one(bug: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(bug) == 1  # type: ignore[arg-type]
    assert "Traceback" in capsys.readouterr().err
