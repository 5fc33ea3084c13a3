"""Processes of `avatarctl` that need not each import PyTorch for seconds: forks of one that did.

A fork is a process like one that was typed: own signals, limits, pipes, user, memory and end. Only what comes
before the imports are over cannot be seen in it.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

PATIENCE = 300.0
"""Seconds after which a process that does not end is killed: far more than any of them takes."""


class Fork:
    """A process that was started: as much of `subprocess.Popen` as the tests need.

    peak_bytes: largest resident memory, once `wait` has returned.
    """

    def __init__(self, server: Forks, pid: int, stdout: int, stderr: int) -> None:
        self._server, self.pid = server, pid
        self.stdout = open(stdout, encoding="utf-8")  # noqa: SIM115 closed by `wait`
        self.stderr = open(stderr, encoding="utf-8")  # noqa: SIM115
        self.returncode: int | None = None
        self.peak_bytes = 0

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:  # the server keeps the number until `wait`: it means no other process
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """The rest of both streams, after the end; standard output is short enough to wait in its pipe."""
        guard = threading.Timer(PATIENCE, self.kill)
        guard.start()
        try:
            stderr = self.stderr.read()
            stdout = self.stdout.read()
        finally:
            guard.cancel()
        self.wait()
        return stdout, stderr

    def wait(self) -> int:
        if self.returncode is None:
            told = self._server.ask({"wait": self.pid})
            self.returncode, self.peak_bytes = told["code"], told["peak"]
            self.stdout.close()
            self.stderr.close()
        return self.returncode


class Forks(AbstractContextManager["Forks"]):
    """The process that imports once and forks; ends with its block."""

    def __enter__(self) -> Forks:
        self._channel, theirs = socket.socketpair()
        self._channel.settimeout(PATIENCE)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # so that the streams are made as those of a pipe are
                stderr=subprocess.STDOUT,
                pass_fds=[theirs.fileno()],
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()
        self._process.communicate(timeout=PATIENCE)

    def ask(self, request: dict[str, Any], *descriptors: int) -> dict[str, Any]:
        socket.send_fds(self._channel, [json.dumps(request).encode()], descriptors)
        message = self._channel.recv(1 << 16)
        assert message, f"the imports have failed: {self._process.communicate()[0].decode()}"
        answer: dict[str, Any] = json.loads(message)
        return answer

    def start(
        self,
        *words: str,
        folder: Path,
        file_bytes: int | None = None,
        user: int | None = None,
        env: Mapping[str, str | None] | None = None,
    ) -> Fork:
        """`avatarctl WORDS` in a folder; file_bytes: the largest file it may write; user: who runs it, where
        root starts it; env: variables set besides, or taken away (None), of those that no import reads."""
        stdout, their_stdout = os.pipe()
        stderr, their_stderr = os.pipe()
        request: dict[str, Any] = {
            "words": words,
            "folder": str(folder),
            "file_bytes": file_bytes,
            "user": user,
        }
        request["env"] = dict(env or {})
        try:
            pid = self.ask(request, their_stdout, their_stderr)["pid"]
        finally:
            os.close(their_stdout)
            os.close(their_stderr)
        return Fork(self, pid, stdout, stderr)

    def run(self, *words: str, **asked: Any) -> tuple[Fork, str, str]:
        """The process after its end, and what it said on standard output and standard error."""
        started = self.start(*words, **asked)
        return started, *started.communicate()


def _become(request: dict[str, Any], descriptors: list[int]) -> None:
    """Makes this process, just forked, the one that was asked for."""
    for stream, descriptor in enumerate(descriptors, start=1):
        os.dup2(descriptor, stream)
        os.close(descriptor)
    os.chdir(request["folder"])
    sys.argv[:] = ["avatarctl", *request["words"]]
    for name, value in request["env"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    if request["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
    if request["user"] is not None and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(request["user"])
        os.setuid(request["user"])


def _serve(channel: socket.socket) -> bool:
    """Answers requests until nobody asks any more; True in a fork, which has to run its command."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 1 << 16, 2)
        if not message:
            return False
        request = json.loads(message)
        if "wait" in request:
            _, status, used = os.wait4(request["wait"], 0)
            peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            answer = {"code": os.waitstatus_to_exitcode(status), "peak": peak}
        else:
            pid = os.fork()
            if pid == 0:
                _become(request, descriptors)
                return True
            for descriptor in descriptors:
                os.close(descriptor)
            answer = {"pid": pid}
        channel.sendall(json.dumps(answer).encode())


if __name__ == "__main__":
    import gc

    import avatarctl.cli.infer
    import avatarctl.demo.sample
    import avatarctl.pipelines.infer  # noqa: F401 what every command would import for itself
    from avatarctl.cli import main

    gc.freeze()  # or the end of every fork would visit, and so copy, all that was imported
    with socket.socket(fileno=int(sys.argv[1])) as asked:
        is_fork = _serve(asked)
    if is_fork:
        main()
