"""`models pull` as people start it: the environment that the hub's client reads, terminals, kills."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.hub.conftest import WEIGHTS
from tests.hub.hub_server import HubServer, Slow
from tests.hub.pulling import NAME, incomplete

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(hub: HubServer, tmp_path: Path) -> Start:
    """`avatarctl models pull NAME` as people start it, with the variables of the hub set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AVATARCTL_"))}
    environment = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0",
                          "HF_TOKEN": "hf_right", "TERM": "xterm", "COLUMNS": "200"}  # fmt: skip

    def run(terminal: int | None = None, **extra: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "avatarctl", "models", "pull", NAME],
            env=environment | extra, cwd=tmp_path, text=True, stdin=terminal, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if terminal is None else terminal,
        )  # fmt: skip

    return run


def wait_for_part(folder: Path, size: int) -> Path:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for path in incomplete(folder):
            if path.stat().st_size > size:
                return path
        time.sleep(0.02)
    raise AssertionError("nothing was fetched")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX systems")
def test_killed_in_the_middle_then_completed(hub: HubServer, start: Start, tmp_path: Path) -> None:
    hub.faults["model.safetensors"] = [Slow(200_000), Slow(300_000)]
    for number, code, size in ((signal.SIGKILL, -signal.SIGKILL, 150_000), (signal.SIGINT, 6, 400_000)):
        process = start()
        part = wait_for_part(tmp_path / "hf", size)
        time.sleep(0.3)
        process.send_signal(number)
        if number == signal.SIGINT:
            assert process.stderr is not None
            assert any("once more to stop at once" in line for line in process.stderr)  # or both would be one
            process.send_signal(number)  # nothing more comes: the second stops it at once
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == code, stderr
        assert "Traceback" not in stderr and part.exists()
    kept = part.stat().st_size
    assert kept > 400_000
    process = start()
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert f"going on after {kept} bytes" in stderr and "hf_right" not in stdout + stderr
    (path,) = (Path(line) for line in stdout.splitlines() if line.endswith("model.safetensors"))
    assert path.is_relative_to(tmp_path / "hf" / "hub") and path.read_bytes() == WEIGHTS
    assert not incomplete(tmp_path)
    last = [each for each in hub.gets() if each.path.startswith("/storage")][-1]
    assert last.range == f"bytes={kept}-"


@pytest.mark.skipif(os.name != "posix", reason="terminals of POSIX systems")
@pytest.mark.parametrize("answer", ["n", "y"])
def test_a_person_is_asked(answer: str, hub: HubServer, start: Start, tmp_path: Path) -> None:
    import pty

    keyboard, terminal = pty.openpty()
    process = start(terminal)
    os.close(terminal)
    shown = b""
    while b"Fetch? [y/N]" not in shown:
        shown += os.read(keyboard, 1000)
    assert b"total" in shown and hub.fetched() == [], "sizes come before the question"
    os.write(keyboard, f"{answer}\n".encode())
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while more := os.read(keyboard, 1000):
            shown += more
    stdout, _ = process.communicate(timeout=60)
    os.close(keyboard)
    if answer == "n":
        assert process.returncode == 6 and b"error: nothing was fetched" in shown and hub.fetched() == []
    else:
        assert process.returncode == 0 and len(stdout.splitlines()) == 3
        assert b"checking facebook/wav2vec2-base-960h/model.safetensors" in shown, "a bar"


@pytest.mark.parametrize(
    ("variable", "value", "code", "says"),
    [
        ("HF_HOME", __file__, 4, "the token of the hub cannot be read (check HF_HOME"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "-1", 2, "HF_HUB_DOWNLOAD_TIMEOUT must be a positive number"),
        ("SSL_CERT_FILE", "/nonexist", 4, "check SSL_CERT_FILE"),
        ("HF_ENDPOINT", "http://hub:port", 4, "HF_ENDPOINT: is no address"),
        pytest.param(
            "ALL_PROXY",
            "socks5://me:hf_right@127.0.0.1:1",
            4,
            "ALL_PROXY: a SOCKS proxy needs the package",
            marks=pytest.mark.skipif(find_spec("socksio") is not None, reason="socksio is here"),
        ),
    ],
)
def test_an_environment_that_cannot_work(
    variable: str, value: str, code: int, says: str, hub: HubServer, start: Start
) -> None:
    process = start(HF_TOKEN="", HF_HUB_ENABLE_HF_TRANSFER="1", **{variable: value})
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code and says in errors and "hf_right" not in errors
    assert hub.requests == [] and len(errors.splitlines()) == 1, "no traceback, no warning"


def test_offline_by_the_environment(hub: HubServer, start: Start) -> None:
    process = start(HF_HUB_OFFLINE="1")
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 4 and stdout == "" and len(stderr.splitlines()) == 1
    assert "HF_HUB_OFFLINE is set" in stderr and hub.requests == []
