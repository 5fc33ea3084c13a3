"""`avatarctl doctor`: what this machine has, by trying it, and what to do where something is missing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

import avatarctl
from avatarctl.cli.command import Command
from avatarctl.cli.launch import meeting_place
from avatarctl.cli.memory_mode import counts_folder
from avatarctl.cli.options import WEIGHTS_VARIABLE
from avatarctl.cli.screen import Screen
from avatarctl.errors import AvatarctlError, EnvironmentMissing, UsageError, printable
from avatarctl.events import Stage
from avatarctl.registry import JUDGES, NEEDS_WEIGHTS, ROWS

if TYPE_CHECKING:
    from avatarctl.profiling.trials import Found

__all__ = ["doctor"]

_OLDEST: Final = (3, 11)
_LITTLE_MEMORY: Final = 4 << 30
"""Bytes; the suite and the built-in models need less, every published model more."""
_LITTLE_DISK: Final = 5 * 10**9
_SECRETS: Final = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")
"""Whether they are set is said, and nothing of what they hold."""


@click.command(
    "doctor",
    cls=Command,
    context_settings={"help_option_names": ["-h", "--help"]},
    short_help="Say what is missing on this machine.",
)
@click.option("--weights-root", metavar="PATH", help="Folder of fetched weights.")
@click.option(
    "--device", metavar="DEVICE", default="auto", help="Where attention kernels are tried. [default: auto]"
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(weights_root: str | None, device: str, as_json: bool) -> None:
    """Say what this machine has and what is missing.

    Packages, codecs, attention kernels and two processes that talk to each other are really run, each in a
    process of its own. Nothing is fetched or changed, and no token or password is shown. Ends with 0 where
    everything works that every run needs, else with 4: what is absent and optional is no failure.
    """
    if weights_root == "":
        raise UsageError("is empty", where="--weights-root")
    root = weights_root or os.environ.get(WEIGHTS_VARIABLE) or None
    found = []
    with Screen("warning" if as_json else "info") as screen:
        screen(Stage("trying packages, codecs and processes: about ten seconds"))
        for each in _checks(root, device):
            found.append(each)
            if not as_json:
                for line in _lines(each):
                    click.echo(printable(line))
    broken = [each.name for each in found if each.state == "broken" and each.name not in _unneeded()]
    if as_json:
        document = {"command": "doctor", "version": avatarctl.__version__, "ok": not broken}
        click.echo(json.dumps({**document, "checks": [asdict(each) for each in found]}))
    if broken:
        raise EnvironmentMissing(f"does not work here: {', '.join(broken)}")


def _unneeded() -> frozenset[str]:
    """Checks of what a run may do without. A broken torchvision is none of them: transformers and diffusers
    import it wherever it is."""
    from avatarctl.profiling.trials import OPTIONAL

    return frozenset(f"optional {module}" for module in OPTIONAL if module != "torchvision")


def _lines(found: Found) -> Iterator[str]:
    yield f"{found.state:<7}  {found.name:<24}  {found.found}"
    if found.fix:
        yield f"{'':<7}  {'':<24}  do: {found.fix}"


def _checks(root: str | None, device: str) -> Iterator[Found]:
    """In the order of the screen; what takes seconds runs beside what is said before it."""
    from avatarctl.profiling.trials import started, tried

    networks, codecs = started("networks", device), started("codecs")
    yield _python()
    yield from _memory_and_disk()
    yield from tried(networks)
    yield from tried(codecs)
    yield from _optional()
    yield from _said("gloo", _gloo())
    yield from _said("weights", _weights(root))
    yield from _said("folders", _folders(root))
    yield from _said("hub", _keys())


def _said(name: str, checks: Iterator[Found]) -> Iterator[Found]:
    """The checks; an error of ours is what one of them found."""
    from avatarctl.profiling.trials import Found

    try:
        yield from checks
    except AvatarctlError as error:
        where = f"{error.where}: " if error.where is not None else ""
        yield Found(name, "broken", f"{where}{error.what}", error.fix or "")


def _gloo() -> Iterator[Found]:
    from avatarctl.profiling.trials import started, tried

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with meeting_place() as meeting:
        both = [started("gloo", str(rank), meeting) for rank in range(2)]
        found = [each for process in both for each in tried(process)]
    yield next((each for each in found if each.state != "ok"), found[0])


def _python() -> Found:
    from avatarctl.profiling.trials import Found

    version = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info < _OLDEST:
        return Found("python", "broken", version, "Python 3.11 or newer")
    return Found("python", "ok", f"{version}, {os.cpu_count()} cores; avatarctl {avatarctl.__version__}")


def _memory_and_disk() -> Iterator[Found]:
    from avatarctl.placement.host import host_memory
    from avatarctl.placement.seats import shown
    from avatarctl.profiling.trials import Found

    memory = host_memory()
    if memory.total is None:
        yield Found("memory", "note", "the system does not tell how much there is")
    else:
        free = f"{shown(memory.free)} free of " if memory.free is not None else ""
        text = f"{free}{shown(memory.total)} ({memory.limit} counts)"
        little = (memory.free or memory.total) < _LITTLE_MEMORY
        yield Found("memory", "note" if little else "ok", text, "close other programs" if little else "")
    places = {"disk": Path.cwd()}
    try:
        places["temporary folder"] = Path(tempfile.gettempdir())
    except OSError:
        fix = "set TMPDIR to a folder that can be written"
        yield Found("temporary folder", "broken", "there is none that can be written", fix)
    for name, place in places.items():
        room = shutil.disk_usage(place).free
        little = room < _LITTLE_DISK
        fix = "free some space: a published model takes 4 to 50 GB" if little else ""
        yield Found(name, "note" if little else "ok", f"{room / 1e9:.1f} GB free at {place}", fix)


def _optional() -> Iterator[Found]:
    """Packages that are not required: those that are installed are used."""
    from avatarctl.profiling.trials import OPTIONAL, Found, started, tried

    for module, how in OPTIONAL.items():
        if find_spec(module) is not None:
            yield from tried(started("optional", module))
        else:
            yield Found(f"optional {module}", "absent", how[1])


def _weights(root: str | None) -> Iterator[Found]:
    """Published models, and the judges of auxiliary losses: what of each is on this disk."""
    from avatarctl.hub.locate import locate, with_needs
    from avatarctl.profiling.trials import Found

    rows = [row for row in ROWS.values() if row.kind == "model" and row.status == NEEDS_WEIGHTS]
    for row in (*rows, *JUDGES.values()):
        parts = [locate(each, root) for each in with_needs(row)]
        missing = [wanted.file for part in parts for wanted in part.missing]
        count = len(missing) + sum(len(part.files) for part in parts)
        name = f"weights of {row.name}"
        if not missing:
            yield Found(name, "ok", f"all {count} files are here")
        else:
            here = f"{count - len(missing)} of {count} files are here"
            fix = f"`avatarctl models pull {row.name}` fetches them, or says from where"
            yield Found(name, "absent", here, fix)


def _folders(root: str | None) -> Iterator[Found]:
    """Where fetched files go."""
    from avatarctl.files.named_path import expanded
    from avatarctl.hub.locate import hub_cache
    from avatarctl.profiling.trials import Found

    named = [("hub cache", hub_cache(), "HF_HOME"), ("counts", counts_folder(), "XDG_CACHE_HOME")]
    if root is not None:
        named.append(("weights root", expanded(root), WEIGHTS_VARIABLE))
    for name, path, variable in named:
        place = next(each for each in (path, *path.absolute().parents) if each.exists())
        free = shutil.disk_usage(place).free
        text = f"{path} ({'there' if place == path else 'not there yet'}, {free / 1e9:.1f} GB free)"
        if os.access(place, os.W_OK) and place.is_dir():
            yield Found(name, "ok", text)
        else:
            fix = f"set {variable} to a folder that can be written"
            yield Found(name, "note", f"{text}: nothing can be written to it", fix)


def _keys() -> Iterator[Found]:
    from avatarctl.hub.client import endpoint
    from avatarctl.profiling.trials import Found

    held = [name for name in _SECRETS if os.environ.get(name)]
    yield Found("hub", "ok", f"{endpoint()}; keys in the environment: {', '.join(held) or 'none'}")
