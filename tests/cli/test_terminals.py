"""What a terminal is sent whose encoding lacks the signs that we use."""

from __future__ import annotations

import io
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from avatarctl.cli.app import main
from avatarctl.cli.screen import Screen
from avatarctl.events import Notice, Planned, Stage, StepFinished, TrainingStepFinished


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding: str) -> None:
        self.sent = io.BytesIO()
        super().__init__(self.sent, encoding, write_through=True)

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("encoding", "ellipsis"), [("ascii", b"..."), ("latin-1", b"..."), ("utf-8", "…".encode())]
)
def test_an_ellipsis_as_the_terminal_has_it(encoding: str, ellipsis: bytes) -> None:
    terminal = Terminal(encoding)
    Screen("info", terminal)(Stage("loading models"))
    assert terminal.sent.getvalue().rstrip() == b"loading models " + ellipsis


def test_other_signs_and_names() -> None:
    terminal = Terminal("ascii")
    Screen("info", terminal)(Notice("“é” – 3×2 → ±1", "warning"))
    assert terminal.sent.getvalue().rstrip() == rb'warning: "\xe9" - 3x2 -> +-1'


def test_a_progress_display_on_a_narrow_ascii_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal("ascii")
    with Screen("info", terminal) as screen:
        screen(Planned(frames=5, width=64, height=64, fps=25, spans=30, unit="window", steps=20))
        screen(StepFinished(0, 0))
    assert b"..." in terminal.sent.getvalue() and b"\\u" not in terminal.sent.getvalue()


def test_training_tells_losses_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of 100 columns, whole, and in a log."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    losses = {"loss": 0.3456, "mse": 1.25, "flow": 1.5, "sync": 0.75, "lpips": 0.125, "gradient_norm": 7.5}
    event = TrainingStepFinished(25, 500, losses, 1.26, 600.0, 3 << 30)
    terminal, log = Terminal("utf-8"), io.StringIO()
    for stream in (terminal, log):
        with Screen("info", stream) as screen:
            screen(event)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.sent.getvalue().decode())
    assert "loss 0.3456, mse 1.25, flow 1.5, sync 0.75, lpips 0.125, gradient norm 7.5" in shown
    assert re.search(r"1\.3 s a step, 3\.00 GiB .* 25/500 10 min left", shown), shown
    losses_told = "loss 0.3456, mse 1.25, flow 1.5, sync 0.75, lpips 0.125, gradient norm 7.5"
    assert log.getvalue() == f"step 25 of 500: {losses_told}; 1.3 s a step, 3.00 GiB, 10 min left\n"


def test_results_reach_a_latin_1_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output is strict by itself: a name that Latin-1 lacks would end the command as a bug does."""
    path = tmp_path / "顔…é.safetensors"
    down, up = np.ones((1, 128), np.float32), np.ones((128, 1), np.float32)
    layer = "blocks.0.self_attn.q"
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}, path)
    shown, told = Terminal("latin-1"), Terminal("latin-1")
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", told)
    monkeypatch.setattr(sys, "argv", ["avatarctl", "convert-ckpt", str(path), "--inspect"])
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert ended.value.code in (None, 0), told.sent.getvalue()
    assert b"\\u9854...\xe9.safetensors" in shown.sent.getvalue()
