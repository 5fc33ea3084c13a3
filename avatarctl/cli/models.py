"""`avatarctl models`: what exists, what runs, which files it wants and where they go."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import click

from avatarctl.cli.app import CommandGroup
from avatarctl.cli.options import WEIGHTS_VARIABLE
from avatarctl.registry import ROWS, Row, find
from avatarctl.weights.locate import missing_files

__all__ = ["models"]

HELP = {"help_option_names": ["-h", "--help"]}
KINDS = ("model", "base", "adapter", "encoder", "loss", "metric", "detector", "separator")


@click.group(cls=CommandGroup, context_settings=HELP)
def models() -> None:
    """Show which models and published files exist."""


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
    """Show one model: where its files come from, what is missing here, its settings."""
    row = find(name)
    missing = missing_files(row, weights_root or os.environ.get(WEIGHTS_VARIABLE) or None)
    if as_json:
        document = asdict(row) | {"missing": [asdict(item) for item in missing]}
        click.echo(json.dumps(document, default=str))
        return
    for label, value in _facts(row):
        click.echo(f"{label:<10} {value}")
    if row.source == "package":
        click.echo("weights    none needed: seeded random weights are made at load")
    elif not missing:
        click.echo("weights    all files are here")
    for item in missing:
        origin = f"  (from {item.hub_id})" if item.hub_id else "  (no confirmed source)"
        click.echo(f"missing    {item.folder}/{item.file}{origin}")


def _status(row: Row) -> str:
    return row.status if row.trained else f"{row.status}, untrained"


def _facts(row: Row) -> Iterator[tuple[str, Any]]:
    yield "name", row.name
    yield "title", row.title
    yield "kind", row.kind
    yield "status", _status(row)
    yield "source", row.hub_id or row.obtained or ("built in" if row.source == "package" else "unconfirmed")
    if row.license:
        yield "license", row.license
    if row.needs:
        yield "needs", ", ".join(row.needs)
    for dotted, value in row.defaults.items():
        if not dotted.startswith(("data.", "input.")):
            yield "default", f"{dotted} = {value}"
