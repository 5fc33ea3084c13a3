"""`avatarctl models`: what exists and runs, which files it wants and where they are; fetch and check them."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from avatarctl.cli.app import CommandGroup
from avatarctl.cli.options import EXAMPLE_MODEL, WEIGHTS_VARIABLE
from avatarctl.cli.screen import Screen
from avatarctl.errors import Interrupted, UnusableWeights, UsageError, WeightsMissing, printable
from avatarctl.hub.locate import Located, hub_constants, locate, missing_files, with_needs
from avatarctl.registry import ROWS, Row, find

if TYPE_CHECKING:
    from avatarctl.hub.client import HubFile
    from avatarctl.hub.pull import PullPlan
    from avatarctl.hub.verify import Checked

__all__ = ["models"]

HELP = {"help_option_names": ["-h", "--help"]}
KINDS = ("model", "base", "adapter", "encoder", "loss", "metric", "detector", "separator")


@click.group(cls=CommandGroup, context_settings=HELP)
def models() -> None:
    """Show, fetch and check models and published files."""


@models.command("list", context_settings=HELP)
@click.option("--kind", type=click.Choice(KINDS), help="Only rows of this kind.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def list_models(kind: str | None, as_json: bool) -> None:
    """List models and the published files around them."""
    rows = [row for row in ROWS.values() if kind in (None, row.kind)]
    if as_json:
        fields = ("name", "kind", "title", "status", "source", "hub_id")
        click.echo(json.dumps([{name: getattr(row, name) for name in fields} for row in rows]))
        return
    width = max(len(row.name) for row in rows)
    for each in KINDS:
        of_kind = [row for row in rows if row.kind == each]
        if of_kind:
            click.echo(each)
        for row in of_kind:
            click.echo(f"  {row.name:<{width}}  {row.title}  [{_status(row)}]")


@models.command("show", context_settings=HELP)
@click.argument("name")
@click.option("--weights-root", metavar="PATH", help="Folder with the published files.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def show_model(name: str, weights_root: str | None, as_json: bool) -> None:
    """Show one model: where its files come from, where they are, what is missing here, its settings."""
    from avatarctl.hub.store import recorded_license

    row = find(name)
    root = _root(weights_root)
    located = [locate(each, root) for each in with_needs(row)]
    missing = [wanted for each in located for wanted in each.missing]
    stated = {each.row.hub_id: recorded_license(each.row.hub_id, root) for each in located if each.row.hub_id}
    licenses = {repo: text for repo, text in stated.items() if text}
    if as_json:
        found = {each.row.name: _paths(each) for each in located}
        extra = {"missing": [asdict(item) for item in missing], "found": found, "licenses": licenses}
        click.echo(json.dumps(asdict(row) | extra, default=str))
        return
    for label, value in _facts(row):
        click.echo(f"{label:<10} {value}")
    for repo, text in licenses.items():
        click.echo(f"{'license':<10} {printable(text)}  (of {repo}, as its card said when it was fetched)")
    if row.source == "package" and not row.files:
        click.echo("weights    none needed: seeded random weights are made at load")
    elif not missing:
        click.echo("weights    all files are here")
    for path in dict.fromkeys(path for each in located for path in _paths(each).values()):
        click.echo(f"found      {printable(path)}")
    for item in missing:
        origin = f"from {item.hub_id}" if item.hub_id else "no confirmed source"
        click.echo(f"missing    {item.file}  ({origin}; by hand: {printable(item.folder)}/{item.file})")
    if any(item.hub_id for item in missing):
        click.echo(f"fetch      {_pull_words([name], weights_root)}")
    for other in row.instead:
        lacking = missing_files(find(other), root)
        state = _pull_words([other], weights_root) if lacking else "here"
        click.echo(f"{'other':<10} {other}, for {find(other).made_for} videos: {state}")


def _pull_words(names: Iterable[str], weights_root: str | None) -> str:
    """The command that fetches what `names` want to where it was looked for."""
    root = ["--weights-root", weights_root] if weights_root else []
    return shlex.join(["avatarctl", "models", "pull", *names, *root])


def _root(weights_root: str | None) -> str | None:
    return weights_root or os.environ.get(WEIGHTS_VARIABLE) or None


def _paths(located: Located) -> dict[str, str]:
    """Name in the row -> path; a folder keeps its slash."""
    return {name: f"{path}{os.sep if name.endswith('/') else ''}" for name, path in located.files.items()}


def _status(row: Row) -> str:
    return row.status if row.trained else f"{row.status}, untrained"


def _facts(row: Row) -> Iterator[tuple[str, Any]]:
    yield "name", row.name
    yield "title", row.title
    yield "kind", row.kind
    yield "status", _status(row)
    if row.files or not row.needs:  # a model without files of its own is made of what it needs
        built_in = "built in" if row.source == "package" else "unconfirmed"
        yield "source", row.hub_id or row.obtained or built_in
    if row.license:
        yield "license", row.license
    if row.needs:
        yield "needs", ", ".join(row.needs)
    for dotted, value in row.defaults.items():
        if not dotted.startswith(("data.", "input.")):
            yield "default", f"{dotted} = {value}"


PULL_EXAMPLES = f"""\b
Examples:
  avatarctl models pull {EXAMPLE_MODEL}
  avatarctl models pull --for 'infer --model {EXAMPLE_MODEL} --lora someone/loras/style.safetensors' --dry-run
  avatarctl models pull someone/loras/style.safetensors --weights-root ~/weights
"""


@models.command("pull", context_settings=HELP, epilog=PULL_EXAMPLES)
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--for", "command", metavar="COMMAND", help="What this command needs, as you would type it.")
@click.option(
    "--weights-root",
    metavar="PATH",
    help="Folder to fetch to, and to look in first; without it the hub's cache.",
)
@click.option("-y", "--yes", is_flag=True, help="Do not ask; without a terminal nothing is asked anyway.")
@click.option("--dry-run", is_flag=True, help="Show what would be fetched; fetch nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def pull_models(
    names: tuple[str, ...],
    command: str | None,
    weights_root: str | None,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Fetch published files: models, encoders, judges, LoRA files.

    A NAME is one of `avatarctl models list`, and brings what it needs, or a repository or file on the hub
    (org/name, org/name/path). Files that are on this disk already are not fetched again. Sizes and licences
    are shown first; every file is checked; what was interrupted goes on where it stopped.
    """
    from avatarctl.cli.typed import read_typed
    from avatarctl.hub.pull import plan_pull, run_pull
    from avatarctl.loading.needs import needs, wanted_by_names

    if not names and command is None:
        raise UsageError("nothing is named", fix="give names, or a command with --for")
    wants = wanted_by_names(names)
    if command is not None:
        wants += needs(read_typed(command).resolved.cfg)
    _quiet_hub()
    with Screen("info") as screen:
        plan = plan_pull(wants, _root(weights_root), screen)
        for line in _plan_lines(plan):
            if dry_run and not as_json:
                click.echo(line)
            else:
                screen.line(line)
        paths: Mapping[HubFile, Path] = {}
        if plan.fetch and not dry_run:
            plan.store.check_space(plan.fetch)
            _confirm(yes)
            from avatarctl.cli.signals import stop_on_signals

            with stop_on_signals() as should_stop:
                paths = run_pull(plan, screen, should_stop)
    if as_json:
        click.echo(json.dumps({"command": "models pull", "dry_run": dry_run, **_plan_facts(plan, paths)}))
    elif not dry_run:
        for path in paths.values():
            click.echo(printable(path))
    if plan.by_hand and not dry_run:
        raise WeightsMissing(f"to be fetched by hand: {'; '.join(map(str, plan.by_hand))}")


def _quiet_hub() -> None:
    """Its log repeats in many lines, some of them the server's, what our errors say in one."""
    hub_constants()
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()


def _confirm(yes: bool) -> None:
    """Asks a person; a script without a terminal is not held up."""
    if not yes and sys.stdin.isatty() and sys.stderr.isatty() and not click.confirm("Fetch?", err=True):
        raise Interrupted("nothing was fetched")


def _plan_lines(plan: PullPlan) -> Iterator[str]:
    for _, path in plan.present:
        yield f"here       {printable(path)}"
    for file in plan.fetch:
        kept = plan.store.kept(file)
        note = f"  ({_size(kept)} of it are here)" if kept else ""
        yield f"fetch      {'size unknown' if file.size is None else _size(file.size):>9}  {file}{note}"
    for item in plan.by_hand:
        yield f"by hand    {printable(item)}"
    for listing in plan.listings.values():
        yield f"license    {listing.repo}: {printable(listing.license) or 'none stated on its card'}"
    if plan.fetch:
        count = f"{len(plan.fetch)} file{'s' if len(plan.fetch) > 1 else ''}"
        yield f"total      {_size(plan.total_bytes)} in {count}, to {printable(plan.store.top)}"
    elif plan.by_hand:
        yield "total      nothing can be fetched from the hub"
    else:
        yield "total      nothing to fetch" + (": everything is here" if plan.present else "")


def _plan_facts(plan: PullPlan, paths: Mapping[HubFile, Path]) -> dict[str, Any]:
    return {
        "files": [
            {**asdict(file), "to_fetch": left, "path": str(paths[file]) if file in paths else None}
            for file, left in plan.fetch.items()
        ],
        "present": [{"name": name, "path": str(path)} for name, path in plan.present],
        "by_hand": [asdict(item) for item in plan.by_hand],
        "licenses": {listing.repo: listing.license for listing in plan.listings.values()},
        "total_bytes": plan.total_bytes,
        "to": str(plan.store.top),
    }


def _size(count: int) -> str:
    """Bytes for people; GB = 1e9."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


@models.command("verify", context_settings=HELP)
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option("--weights-root", metavar="PATH", help="Folder with the published files.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def verify_models(names: tuple[str, ...], weights_root: str | None, as_json: bool) -> None:
    """Compare files on this disk with the digests that the hub states.

    Files that were fetched by `models pull` or the hub's own tools are checked without a connection. Ends
    with 3 if a file is damaged, with 4 if one is missing or none could be checked.
    """
    from avatarctl.cli.signals import stop_on_signals
    from avatarctl.hub.verify import verify

    rows = {row.name: row for name in names for row in with_needs(find(name))}
    _quiet_hub()
    with Screen("info") as screen, stop_on_signals() as should_stop:
        found = []
        for item in verify(rows.values(), _root(weights_root), screen, should_stop):
            found.append(item)
            if not as_json:
                why = f": {item.why}" if item.why else ""
                click.echo(f"{item.state:<11}  {printable(item.path or item.name)}{printable(why)}")
    if as_json:
        click.echo(
            json.dumps({"command": "models verify", "files": [asdict(item) for item in found]}, default=str)
        )
    else:
        click.echo(_verdict(found))
    _raise_for(found, names, weights_root)


def _verdict(found: list[Checked]) -> str:
    count = Counter(item.state for item in found)
    parts = [
        f"{count[state]} {state}" for state in ("ok", "damaged", "missing", "not checked") if count[state]
    ]
    return f"total        {', '.join(parts)}" if parts else "total        no files: built in"


def _raise_for(found: list[Checked], names: tuple[str, ...], weights_root: str | None) -> None:
    """Raises UnusableWeights for damaged files, WeightsMissing where some are missing or none was checked.

    What is said to be fetched is what the user named, so that the rest of it comes as well.
    """
    damaged = [item for item in found if item.state == "damaged"]
    missing = [item for item in found if item.state == "missing"]
    lacking = {item.row for item in (*damaged, *missing)}
    named = [name for name in names if any(row.name in lacking for row in with_needs(find(name)))]
    pull = f"`{_pull_words(dict.fromkeys(named), weights_root)}`"
    if packaged := [item for item in (*damaged, *missing) if find(item.row).source == "package"]:
        raise WeightsMissing(
            packaged[0].why + _and_more(packaged),
            where=packaged[0].path or packaged[0].name,
            fix="install avatarctl again",
        )
    if damaged:
        raise UnusableWeights(
            f"{damaged[0].why}{_and_more(damaged)}", where=damaged[0].path, fix=f"remove it, then {pull}"
        )
    if missing:
        raise WeightsMissing(
            f"{missing[0].name} is missing{_and_more(missing)}", where=missing[0].row, fix=pull
        )
    if found and not any(item.state == "ok" for item in found):
        raise WeightsMissing(f"no file was checked: {found[0].why}", where=", ".join(dict.fromkeys(names)))


def _and_more(items: list[Any]) -> str:
    return f", and {len(items) - 1} more" if len(items) > 1 else ""
