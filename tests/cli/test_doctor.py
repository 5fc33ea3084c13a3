"""`avatarctl doctor`, with packages that are broken in several ways."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from avatarctl.profiling import trials
from avatarctl.profiling.trials import Found, driver_version, started, tried
from tests.cli.conftest import Run


class Ended:
    """A process that has said this."""

    returncode = 0

    def __init__(self, *found: Found) -> None:
        self.said = "\n".join(json.dumps(vars(each)) for each in found)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        return self.said, ""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes seconds: only optional packages are tried."""

    def start(name: str, *words: str) -> Any:
        return started(name, *words) if name == "optional" else Ended(Found(name, "ok", "tried elsewhere"))

    monkeypatch.setattr(trials, "started", start)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`package(name, source)` installs one, for this process and those that it starts."""
    folder = tmp_path / "site"
    folder.mkdir()
    root = str(Path(trials.__file__).parents[2])
    monkeypatch.setenv("PYTHONPATH", f"{folder}:{root}")
    monkeypatch.syspath_prepend(str(folder))

    def install(name: str, source: str) -> None:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(source)

    return install


def test_the_networks_of_this_machine_run(capsys: pytest.CaptureFixture[str]) -> None:
    """What a child process would do, here, where the packages are imported anyway."""
    trials._networks("cpu")
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    found = {each["name"]: each for each in said if "state" in each}
    assert {each["begin"] for each in said if "begin" in each} > {"torch", "device", "networks"}
    assert found["torch"]["state"] == found["networks"]["state"] == found["lpips backend"]["state"] == "ok"
    assert found["attention native"]["found"] == "on cpu as torch's own, in float32"
    assert found["attention"]["found"] == "--attention auto takes native here"
    assert not [each for each in found.values() if each["state"] == "broken"]


def test_two_processes_add(tmp_path: Path) -> None:
    both = [started("gloo", str(rank), f"file://{tmp_path}/meeting") for rank in range(2)]
    assert [[each.state for each in tried(process)] for process in both] == [["ok"], ["ok"]]


def test_a_working_machine(run: Run, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no password: a screen is sent around."""
    secrets = {
        "HF_TOKEN": "hf_verysecret",
        "WANDB_API_KEY": "wandbsecret",
        "HTTPS_PROXY": "http://me:proxysecret@127.0.0.1:1",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    made = run("doctor", "--json")
    assert made.exit_code == 0, made.output
    found = json.loads(made.stdout)
    assert found["ok"] and found["command"] == "doctor"
    checks = {each["name"]: each for each in found["checks"]}
    assert {"python", "memory", "disk", "codecs", "networks", "weights of omniavatar-14b", "hub cache"} <= {
        *checks
    }
    assert checks["weights of omniavatar-14b"]["fix"].startswith("`avatarctl models pull omniavatar-14b`")
    assert checks["hub"]["found"].endswith("HF_TOKEN, WANDB_API_KEY")
    assert "secret" not in made.output


def test_a_torchvision_of_another_build(run: Run, quick: None, package: Callable[[str, str], None]) -> None:
    package("torchvision", "raise RuntimeError('operator torchvision::nms does not exist')")
    package("wandb", "raise ValueError('no good')")
    made = run("doctor")
    assert made.exit_code == 4
    assert "torchvision is of another build than torch" in made.stdout
    assert "do: `pip uninstall torchvision`" in made.stdout
    assert "broken   optional wandb" in made.stdout and "no good" in made.stdout
    # Only what every run needs decides: a tracker is optional, and transformers imports torchvision.
    assert made.stderr.splitlines()[-1] == "error: does not work here: optional torchvision"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11"),
        ("import sys; sys.exit('I quit')", "I quit"),
        ("import time; time.sleep(60)", "nothing came back in"),
        ("print('{\"state\": 1}'); print(3); import nowhere_at_all", "nowhere_at_all"),
    ],
)
def test_a_package_that_ends_python_ends_no_more_than_its_trial(
    package: Callable[[str, str], None], source: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package("sageattention", source)
    monkeypatch.setattr(trials, "_PATIENCE", 2.0 if "sleep" in source else 60.0)
    (found,) = tried(started("optional", "sageattention"))
    assert found.state == "broken" and said in found.found and "pip uninstall sageattention" in found.fix


def test_a_module_of_the_current_folder_is_not_taken_for_a_package(here: Path) -> None:
    (here / "json.py").write_text("raise SystemExit('mine')")
    found = tried(started("codecs"))
    assert [each.state for each in found] == ["ok"], found


@pytest.mark.parametrize(("name", "value"), [("HF_HUB_ETAG_TIMEOUT", "soon")])
def test_a_variable_that_nobody_can_read(tmp_path: Path, name: str, value: str) -> None:
    """It is one line of the screen, not the end of it."""
    code = (
        "from avatarctl.cli.doctor import _folders, _said\n"
        "print([each.state for each in _said('folders', _folders(None))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(Path(trials.__file__).parents[2]), name: value},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "['broken']\n", done.stderr


@pytest.mark.parametrize("words", [("--weights-root", ""), ("--jsno",), ("now",)])
def test_refused(refused: Callable[..., str], words: tuple[str, ...]) -> None:
    assert refused(2, "doctor", *words)


def test_the_driver_is_that_of_the_kernel(tmp_path: Path) -> None:
    assert driver_version(tmp_path) is None
    path = tmp_path / "proc/driver/nvidia/version"
    path.parent.mkdir(parents=True)
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n")
    assert driver_version(tmp_path) == "580.95.05"
