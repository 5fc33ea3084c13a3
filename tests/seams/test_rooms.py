"""What rooms do not reach by any way. The contract in pyproject.toml says it for `make lint`."""

from __future__ import annotations

import functools

import grimp
import pytest


@functools.cache
def house() -> grimp.ImportGraph:
    return grimp.build_graph(
        "avatarctl", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )


def reached(room: str) -> set[str]:
    """All modules that the modules of a room import, directly or by others."""
    inside = {name for name in house().modules if name == room or name.startswith(f"{room}.")}
    assert inside, room
    return set().union(*map(house().find_upstream_modules, inside))


def of(package: str, modules: set[str]) -> list[str]:
    return sorted(name for name in modules if name == package or name.startswith(f"{package}."))


@pytest.mark.parametrize("foreign", ["registry", "files", "hub", "weights", "loading", "config"])
def test_networks_know_neither_files_nor_rows(foreign: str) -> None:
    assert of(f"avatarctl.{foreign}", reached("avatarctl.models")) == []


@pytest.mark.parametrize(
    "foreign", ["diffusers", "transformers", "avatarctl.models", "avatarctl.registry", "avatarctl.weights"]
)
def test_bytes_of_files_know_no_network_and_no_model(foreign: str) -> None:
    assert of(foreign, reached("avatarctl.files")) == []


def test_a_way_by_others_is_found() -> None:
    assert of("avatarctl.files", reached("avatarctl.pipelines")) and of("torch", reached("avatarctl.models"))
