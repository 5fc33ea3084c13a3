"""`avatarctl convert-ckpt`: any weight file that we read to any that others read."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from avatarctl.cli.command import Command
from avatarctl.cli.screen import Screen
from avatarctl.errors import UsageError, printable
from avatarctl.events import Notice
from avatarctl.files.named_path import expanded

if TYPE_CHECKING:
    from avatarctl.pipelines.convert import ConvertRequest

__all__ = ["convert_ckpt"]

TARGETS: Final = ("original", "diffusers", "peft", "comfyui")
DTYPES: Final = ("float32", "bfloat16", "float16", "fp32", "bf16", "fp16")

_SIZE: Final = re.compile(
    r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>[KMGT]?)(?P<binary>i?)B?", re.ASCII | re.IGNORECASE
)
_SMALLEST_SHARD: Final = 1_000_000

EXAMPLES = """\b
Examples:
  avatarctl convert-ckpt pytorch_model.pt --inspect
  avatarctl convert-ckpt my-adapter --out lora.safetensors --to comfyui
  avatarctl convert-ckpt my-adapter --out merged --merge-lora --base Wan2.1-T2V-14B --shard-size 5GB
"""


@click.command(
    "convert-ckpt",
    cls=Command,
    epilog=EXAMPLES,
    context_settings={"help_option_names": ["-h", "--help"]},
    short_help="Convert, merge, extract or inspect weight files.",
)
@click.argument("source", metavar="SRC")
@click.option(
    "--out", metavar="DST", help="What to write: a name ending in .safetensors is a file, any other a folder."
)
@click.option("--to", type=click.Choice(TARGETS), help="Whose names to write. [default: original]")
@click.option("--channels", type=click.Choice(("33", "49", "65")), help="Input channels; new ones are zero.")
@click.option("--drop-channels", is_flag=True, help="Let --channels lose channels.")
@click.option("--merge-lora", is_flag=True, help="Merge SRC, an adapter, into BASE.")
@click.option("--extract", type=click.Choice(("lora",)), help="Take the difference of SRC from BASE.")
@click.option("--base", metavar="BASE", help="Full model for --merge-lora and --extract.")
@click.option("--lora-scale", type=float, metavar="X", help="Factor on top of alpha / rank. [default: 1.0]")
@click.option("--rank", type=click.IntRange(min=1), metavar="N", help="Rank of what --extract writes.")
@click.option("--shard-size", metavar="SIZE", help="Largest file, such as 5GB; writes an index beside them.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of all but what must stay float32.")
@click.option(
    "--audio-offset",
    type=click.Choice(("0", "1")),
    help="State what no tensor tells: 1 for published image-to-video weights, 0 for all others.",
)
@click.option("--allow-nonfinite", is_flag=True, help="Write NaN and infinity instead of refusing them.")
@click.option("--sha256", is_flag=True, help="Note the SHA-256 of large source files too; slower.")
@click.option("--overwrite", is_flag=True, help="Replace an existing DST.")
@click.option("--inspect", is_flag=True, help="Show what SRC is; write nothing.")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; touch nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Say warnings and errors only.")
def convert_ckpt(**params: Any) -> None:
    """Convert, merge, extract or inspect weight files.

    SRC is a file or a folder: safetensors, .pt, .pth or .bin, a published release, a trainer's output, a
    diffusers or PEFT folder, a kohya or ComfyUI LoRA, a run of `avatarctl train` or one of its checkpoints.
    Nothing in it is executed. DST is safetensors, with the configuration beside it where DST is a folder. The
    path of DST is printed on standard output.
    """
    _check_combination(params)
    source = expanded(params["source"])
    with Screen("warning" if params["quiet"] or params["inspect"] else "info") as screen:
        source = _weights_of(source, screen)
        if params["inspect"]:
            _inspect(source, params["as_json"])
            return
        request = _request(source, params)
        if params["dry_run"]:
            _dry_run(request, params["as_json"], screen)
        else:
            _run(request, params["as_json"], screen)


def _weights_of(source: Path, screen: Screen) -> Path:
    """The weight file of a folder that `avatarctl train` made, which `infer --model` takes: of a run its
    newest good checkpoint, of a checkpoint its averaged weights if it has them. Others stay what they are."""
    from avatarctl.loading.trained import is_run_folder, trained_weights

    if not is_run_folder(source):
        return source
    path, notes = trained_weights(source)
    for note in notes:
        screen(Notice(note, "warning"))
    screen(Notice(f"of this run: {path.parent.name}/{path.name}"))
    return path


_ALONE: Final = ("inspect", "as_json", "quiet", "source")
_FLAGS: Final = {"as_json": "--json", "merge_lora": "--merge-lora"}


def _flag(name: str) -> str:
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def _check_combination(params: dict[str, Any]) -> None:
    """Options that would have no effect beside others are refused: their effect was wanted."""
    given = [name for name, value in params.items() if value is not None and value is not False]
    for name, flag in (("source", "SRC"), ("base", "--base"), ("out", "--out")):
        if params[name] == "":  # it would mean the current folder
            raise UsageError("is empty", where=flag)
    if params["inspect"]:
        for name in given:
            if name not in _ALONE:
                raise UsageError(f"{_flag(name)} has no meaning beside --inspect, which writes nothing")
        return
    if params["out"] is None:
        raise UsageError("where to write is missing", fix="add --out DST, or --inspect to look only")
    if params["merge_lora"] and params["extract"]:
        raise UsageError("--merge-lora and --extract are opposites", fix="choose one")
    changes = params["merge_lora"] or params["extract"]
    if changes and params["base"] is None:
        name = "--merge-lora" if params["merge_lora"] else "--extract"
        raise UsageError("needs the full model it belongs to", where=name, fix="add --base BASE")
    for name, needed, there in (
        ("base", "--merge-lora or --extract lora", changes),
        ("lora_scale", "--merge-lora", params["merge_lora"]),
        ("rank", "--extract lora", params["extract"]),
        ("drop_channels", "--channels", params["channels"]),
    ):
        if name in given and not there:
            raise UsageError(f"has no meaning without {needed}", where=_flag(name))
    if params["lora_scale"] is not None and not math.isfinite(params["lora_scale"]):
        raise UsageError(f"{params['lora_scale']} is no finite number", where="--lora-scale")


def _request(source: Path, params: dict[str, Any]) -> ConvertRequest:
    from avatarctl.pipelines.convert import ConvertRequest
    from avatarctl.pipelines.convert_steps import DTYPE_NAMES

    return ConvertRequest(
        source=source,
        out=expanded(params["out"]),
        to=params["to"] or "original",
        channels=None if params["channels"] is None else int(params["channels"]),
        drop_channels=params["drop_channels"],
        base=None if params["base"] is None else expanded(params["base"]),
        merge=params["merge_lora"],
        strength=1.0 if params["lora_scale"] is None else params["lora_scale"],
        extract=params["extract"] is not None,
        rank=params["rank"],
        shard_bytes=None if params["shard_size"] is None else _bytes(params["shard_size"]),
        dtype=None if params["dtype"] is None else DTYPE_NAMES[params["dtype"]],
        audio_offset=None if params["audio_offset"] is None else int(params["audio_offset"]),
        allow_nonfinite=params["allow_nonfinite"],
        sha256=params["sha256"],
        overwrite=params["overwrite"],
    )


def _bytes(text: str) -> int:
    """5GB is 5e9 bytes, 5GiB 5 * 2^30."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"expected a size such as 5GB, got {text[:60]!r}", where="--shard-size")
    power = " KMGT".index(match["unit"].upper() or " ")
    size = float(match["number"]) * (1024 if match["binary"] else 1000) ** power
    if not _SMALLEST_SHARD <= size < 1e15:
        raise UsageError(f"{text[:60]} is no useful size: at least 1MB", where="--shard-size")
    return int(size)


def _inspect(source: Path, as_json: bool) -> None:
    from avatarctl.weights.describe import describe, lines
    from avatarctl.weights.recognise import read_weight_file, require_complete

    weight_file = read_weight_file(source)
    description = describe(weight_file)
    if as_json:
        click.echo(json.dumps(description, ensure_ascii=True))
    else:
        for line in lines(description):
            click.echo(printable(line))
    if weight_file.missing:  # shown all the same: what is there may tell why; unknown tensors are listed only
        require_complete(weight_file)


def _dry_run(request: ConvertRequest, as_json: bool, screen: Screen) -> None:
    from avatarctl.pipelines.convert import preview_conversion

    plan = preview_conversion(request, screen)
    if as_json:
        click.echo(json.dumps({"command": "convert-ckpt", "dry_run": True, **plan}, ensure_ascii=True))
        return
    from avatarctl.weights.describe import size_text

    later = "known after the extraction"
    folder = request.out.parent if request.out.suffix == ".safetensors" else request.out
    for place in [later] if plan["files"] is None else [folder / name for name in plan["files"]]:
        click.echo(f"file: {printable(place)}")
    click.echo(f"tensors: {later if plan['tensors'] is None else plan['tensors']}")
    click.echo(f"size: {later if plan['bytes'] is None else size_text(plan['bytes'])}")
    for line in plan["did"]:
        click.echo(f"step: {printable(line)}")


def _run(request: ConvertRequest, as_json: bool, screen: Screen) -> None:
    from avatarctl.atomic import remove_left_behind
    from avatarctl.pipelines.convert import plan_conversion, write
    from avatarctl.weights.describe import size_text

    for line in remove_left_behind(request.out.parent):  # before the free space is looked at
        screen(Notice(line))
    plan = plan_conversion(request, screen)
    for line in plan.did:
        screen(Notice(line))
    done = write(plan, screen)
    files = ", ".join(done.files)
    tensors = f"{done.tensors} tensor{'' if done.tensors == 1 else 's'}"
    amount = f"{tensors}, {size_text(done.bytes)} in {done.seconds:.1f} s"
    screen(Notice(f"{amount}: {files}"))
    if as_json:
        result = {each.name: getattr(done, each.name) for each in fields(done)}
        document = {
            "command": "convert-ckpt",
            **result,
            "path": str(done.path),
            "seconds": round(done.seconds, 3),
        }
        click.echo(json.dumps(document, ensure_ascii=True))
        return
    # A program gets the very bytes of the name; a terminal no control characters.
    click.echo(printable(done.path) if sys.stdout.isatty() else os.fsencode(done.path))
