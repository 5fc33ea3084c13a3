"""Before networks are imported: no collector walks over what imports make, and waiting threads sleep."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from avatarctl.cli.start import importing_networks

SETUP = """
import gc, os, sys, types
from avatarctl.cli import main
from avatarctl.pipelines.job import JobPlan
sys.argv = ["avatarctl", "infer", "--chunked"]
"""

BEFORE_THE_IMPORT = """
def require_weights(plan):
    raise SystemExit(print("torch" in sys.modules, os.environ["OMP_WAIT_POLICY"]))
JobPlan.require_weights = require_weights
main()
"""

BEHIND_THE_IMPORT = """
import contextlib
collects = []
def written(*given, **named):
    raise SystemExit(print(*set(collects), gc.get_freeze_count() > 0, gc.isenabled()))
class Pipeline(types.ModuleType):
    def __getattr__(self, name):  # what is imported from it
        if name not in ("write_video", "Happened"):
            raise AttributeError(name)
        collects.append(gc.isenabled())
        return written if name == "write_video" else Happened
class Happened(contextlib.nullcontext):
    failed = None
    def __init__(self, counting):
        super().__init__()
    def watch(self, modules):
        pass
for name in ("pipelines.infer", "profiling.happened"):
    sys.modules[f"avatarctl.{name}"] = Pipeline(name)
main()
"""


def printed(code: str, env: dict[str, str]) -> list[str]:
    command = [sys.executable, "-c", SETUP + code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(("given", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_are_told_to_sleep_before_torch_is_there(given: str | None, found: str) -> None:
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"OMP_WAIT_POLICY": given} if given else {}
    assert printed(BEFORE_THE_IMPORT, env) == ["False", found]


def test_nothing_is_collected_while_networks_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    frozen = gc.get_freeze_count()
    with importing_networks():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > frozen
    with pytest.raises(ImportError), importing_networks():
        raise ImportError
    assert gc.isenabled(), "after an import that fails as well"


def test_collection_goes_on_where_networks_are_there_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", gc)
    frozen: list[None] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(None))
    with importing_networks():
        assert gc.isenabled()
    assert not frozen
    monkeypatch.delitem(sys.modules, "diffusers")
    with importing_networks():
        assert not gc.isenabled()
    assert frozen, "as it would be where they are not"


def test_infer_imports_networks_that_way() -> None:
    """Without the networks themselves, whose import takes seconds."""
    assert printed(BEHIND_THE_IMPORT, dict(os.environ)) == ["False", "True", "True"]
