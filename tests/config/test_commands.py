"""What is stated about commands: the keys that each reads, and the values for which one has no code yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pytest

from avatarctl.config import ANY, COMMANDS, CommandKeys, RunConfig, keys, keys_of, require_supported, unread
from avatarctl.config import commands as statements
from avatarctl.config.keys import Mark
from avatarctl.errors import NotYetSupported


@pytest.mark.parametrize("command", COMMANDS)
def test_a_statement_names_keys_that_exist_each_once(command: str) -> None:
    stated = COMMANDS[command]
    names = [f"{section}.{name}" for section, text in stated.read.items() for name in text.split()]
    assert len(set(names)) == len(names) and set(names) == set(keys_of(command))
    assert set(stated.main) <= set(stated.read)


def test_a_mark_names_commands_that_read_its_key() -> None:
    for dotted, spec in keys().items():
        if isinstance(spec.key.not_yet, Mapping):
            assert all(dotted in keys_of(command) for command in spec.key.not_yet), dotted


def test_infer_reads_what_it_uses_of_a_shared_section() -> None:
    read = keys_of("infer")
    assert {"memory.mode", "memory.swap_blocks", "runtime.seed", "output.width"} <= set(read)
    about_training = {"memory.vae_gradient", "memory.optimizer_device", "runtime.trackers", "data.window"}
    assert not about_training & set(read)
    assert list(read) == [dotted for dotted in keys() if dotted in read], "in the order of RunConfig"


def test_unread_keys_come_in_the_order_of_the_configuration() -> None:
    asked = {"train.ema", "sampling.steps", "data.path", "memory.vae_gradient"}
    assert unread(asked, "infer") == ("memory.vae_gradient", "data.path", "train.ema")
    assert unread({"sampling.steps"}, "infer") == ()


def marked(monkeypatch: pytest.MonkeyPatch, marks: Mapping[str, Mark | Mapping[str, Mark]]) -> None:
    """Gives keys other marks, and adds the command `other`, which reads all that infer reads."""
    changed = {
        dotted: replace(spec, key=replace(spec.key, not_yet=marks[dotted])) if dotted in marks else spec
        for dotted, spec in keys().items()
    }
    monkeypatch.setattr(statements, "keys", lambda: MappingProxyType(changed))
    monkeypatch.setitem(COMMANDS, "other", COMMANDS["infer"])


def refuses(command: str, section: str, **values: Any) -> bool:
    """Whether `command` has no code for these values of a section."""
    cfg = RunConfig()
    cfg = replace(cfg, **{section: replace(getattr(cfg, section), **values)})
    try:
        require_supported(cfg, command)
    except NotYetSupported as error:
        assert f"not yet supported by `avatarctl {command}`" in str(error)
        return True
    return False


def test_a_value_may_be_supported_by_one_command_and_not_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    marked(
        monkeypatch,
        {
            "model.channels": {"infer": (49, 65)},
            "sampling.solver": {"infer": ("unipc",), "other": ("dpm++",)},
            "runtime.compile": {"other": ANY},
            "model.weights": {"infer": ("syncnet",), "other": ("clip",)},
        },
    )
    assert refuses("infer", "model", channels=49) and not refuses("other", "model", channels=49)
    assert refuses("infer", "sampling", solver="unipc") and not refuses("other", "sampling", solver="unipc")
    assert refuses("other", "sampling", solver="dpm++") and not refuses("infer", "sampling", solver="dpm++")
    assert refuses("other", "runtime", compile=True) and not refuses("infer", "runtime", compile=True)
    assert not refuses("other", "runtime", compile=False)
    for part, command, able in (("syncnet", "infer", "other"), ("clip", "other", "infer")):
        assert refuses(command, "model", weights={part: "x"}) and not refuses(
            able, "model", weights={part: "x"}
        )


def test_a_mark_that_names_no_command_counts_in_every_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new command is not taken to support what nobody has said it does."""
    marked(monkeypatch, {"sampling.solver": ("unipc",)})
    for command in ("infer", "other"):
        assert refuses(command, "sampling", solver="unipc") and not refuses(
            command, "sampling", solver="dpm++"
        )


def test_a_mark_does_not_stop_a_command_that_does_not_read_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    marked(monkeypatch, {"memory.vae_gradient": ("offload",)})
    monkeypatch.setitem(COMMANDS, "other", CommandKeys(main=(), read={"memory": "vae_gradient"}))
    assert refuses("other", "memory", vae_gradient="offload") and not refuses(
        "infer", "memory", vae_gradient="offload"
    )
    assert refuses("infer", "sampling", solver="unipc") and not refuses("other", "sampling", solver="unipc")
