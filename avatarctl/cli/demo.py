"""`avatarctl demo`: a face of the cartoon world speaks; how its models are made, and how good they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from avatarctl.cli.app import CommandGroup
from avatarctl.cli.screen import Screen
from avatarctl.cli.signals import stop_on_signals
from avatarctl.cli.video_output import fresh_path, make_video, refuse_existing, sheet_path
from avatarctl.errors import PathNotFound, printable
from avatarctl.events import Notice
from avatarctl.files.named_path import expanded
from avatarctl.registry import configure, find_model

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.demo.contact_sheet import ContactSheet
    from avatarctl.pipelines.job import Job, JobPlan
    from avatarctl.registry import Row

__all__ = ["demo"]

_HELP: Final[Mapping[str, Any]] = {"help_option_names": ["-h", "--help"]}
_SEED: Final = click.IntRange(0, 2**31 - 1)
_ENCODERS: Final = frozenset(f"cartoon/{each}.safetensors" for each in ("vae", "audio", "text"))
_FILES: Final = {
    "vae": _ENCODERS,
    "i2v": _ENCODERS | {"cartoon/dit_i2v.safetensors"},
    "v2v": _ENCODERS | {"cartoon/dit_v2v.safetensors"},
    "sync": frozenset({"cartoon/syncnet.safetensors"}),
}
"""What a score needs of a build."""
_MADE: Final = ("vae", "audio", "clips", "i2v", "v2v", "judge")
_ROWS: Final = {"vae": "cartoon-i2v", "i2v": "cartoon-i2v", "v2v": "cartoon-v2v", "sync": "cartoon-v2v"}


@click.group(
    cls=CommandGroup,
    invoke_without_command=True,
    short_help="Let a face of the built-in cartoon world speak.",
    context_settings=_HELP,
)
@click.option("--audio", metavar="FILE", help="What it says. [default: a synthetic sentence]")
@click.option("--character", type=_SEED, metavar="SEED", help="Whose face it is. [default: 1000038]")
@click.option("--dub", is_flag=True, help="Give a drawn clip another mouth.")
@click.option("--out", metavar="FILE", help="The video. [default: a fresh folder below runs/]")
@click.option("--overwrite", is_flag=True, help="Replace a video that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def demo(
    ctx: click.Context,
    audio: str | None,
    character: int | None,
    dub: bool,
    out: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Let a face of the built-in cartoon world speak: nothing is downloaded, nobody is drawn.

    Beside the video stands a page that shows it: frames at eight moments, and how far the mouth is open
    against what the audio calls for.
    """
    if ctx.invoked_subcommand is not None:
        return
    from avatarctl.pipelines.job import check_job

    row = find_model("cartoon-v2v" if dub else "cartoon-i2v")
    asked = [
        f"model.name={row.name}", "long_video.strategy=chunks", f"output.overwrite={json.dumps(overwrite)}",
    ]  # fmt: skip
    if out is not None:
        asked.append(f"output.path={expanded(out)}")
    cfg = configure(*asked)
    refuse_existing(cfg, row)
    with Screen("info") as screen:
        screen(Notice(f"model: {row.name}"))
        plan = check_job(cfg, row, _job(cfg, audio, character, dub=dub), screen)
        sheet = _sheet(plan, known=audio is None)
        path = Path(cfg.output.path) if cfg.output.path else fresh_path(row, "demo")
        finished = make_video(plan, path, screen, sheet)
        sheet.save(sheet_path(path), f"{path.name}: {plan.job.visual.name}, {plan.job.audio.name}")
        screen(Notice(f"what it looks like: {sheet_path(path)}"))
        agreement = sheet.agreement()
        if agreement is not None:
            what = "how loud the audio is" if audio else "what the audio calls for"
            screen(Notice(f"the mouth and {what}: r = {agreement:.2f}"))
    if as_json:
        told = {"path": finished.path, "frames": finished.frames}
        told["r_loudness" if audio else "r_opening"] = agreement
        click.echo(json.dumps({"command": "demo", **told, "sheet": str(sheet_path(path).absolute())}))
    else:
        click.echo(printable(finished.path))


def _job(cfg: RunConfig, audio: str | None, character: int | None, *, dub: bool) -> Job:
    from avatarctl.demo.sample import sample_audio, sample_image, sample_video
    from avatarctl.media import open_audio
    from avatarctl.pipelines.job import Job

    voice = open_audio(audio) if audio else sample_audio()
    prompts = (cfg.input.prompt or "", cfg.input.negative_prompt or "")
    if dub:
        return Job(None, voice, *prompts, sample_video(seed=character))
    return Job(sample_image(seed=character), voice, *prompts)


def _sheet(plan: JobPlan, *, known: bool) -> ContactSheet:
    """What the mouth should do is known of the sentence alone; of a recording its loudness says something."""
    from avatarctl.demo.contact_sheet import ContactSheet
    from avatarctl.demo.loudness import loudness
    from avatarctl.demo.sample import sentence

    frames = plan.video.frames
    if known:
        return ContactSheet(frames, sentence(frames).opening)
    return ContactSheet(frames, loudness=loudness(plan.job.audio, frames))


@demo.command(short_help="Make the built-in models from nothing.", context_settings=_HELP)
@click.option("--out", metavar="DIR", required=True, help="Folder of the build; what is there goes on.")
@click.option("--seed", type=_SEED, default=1, help="Everything is drawn from it. [default: 1]")
@click.option("--part", type=click.Choice(_MADE), help="Only this one.")
@click.option("--threads", type=click.IntRange(1, 64), help="Last digits depend on it. [default: all cores]")
@click.option("--short", is_flag=True, help="A few steps of everything, to see that it runs.")
def build(out: str, seed: int, part: Any, threads: int | None, short: bool) -> None:
    """Make the built-in models from an empty folder and a seed: VAE, audio encoder, both transformers, judge.

    Two hours and a half on two idle cores. Stopped at any moment, the same command goes on, bit for bit; two
    processes may make two parts (--part) beside each other. The files and their card are in DIR/cartoon.
    """
    import torch

    from avatarctl.demo.making.build import Build
    from avatarctl.demo.making.recipe import FULL, SHORT

    if threads is not None:
        torch.set_num_threads(threads)
    with Screen("info") as screen, stop_on_signals() as should_stop:
        work = Build(expanded(out), seed, SHORT if short else FULL, screen)
        work.run(should_stop, part)
    click.echo(printable(expanded(out) / "cartoon"))


@demo.command(short_help="Score the built-in models on faces they never saw.", context_settings=_HELP)
@click.option("--part", type=click.Choice(tuple(_ROWS)), multiple=True, help="[default: all of them]")
@click.option("--seed", type=_SEED, default=1_000_000, help="First of the clips. [default: 1000000]")
@click.option("--clips", type=click.IntRange(1, 10_000), default=64, help="[default: 64]")
@click.option("--speech", metavar="FILE", multiple=True, help="Recordings of people, said by four faces.")
@click.option("--build", "folder", metavar="DIR", help="Of a build, in place of the models of the package.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def benchmark(
    part: tuple[Any, ...], seed: int, clips: int, speech: tuple[str, ...], folder: str | None, as_json: bool
) -> None:
    """Score the built-in models on faces and voices that nothing was trained on: r of the mouth that was made
    and the one that the audio calls for, and the same with another clip's audio.

    With --speech: r of the mouth and how loud a recording is, at no lag, and the lag in frames that fits
    best; parts only if they are named.
    """
    from avatarctl.demo import benchmark as scores
    from avatarctl.demo.making.build import built_row
    from avatarctl.media import open_audio

    chosen = part or (() if speech else scores.PARTS)
    recordings = [open_audio(expanded(name)) for name in speech]
    found: dict[str, Any] = {}

    def row_of(each: str) -> Row:
        row = find_model(_ROWS[each]) if folder is None else built_row(_ROWS[each], expanded(folder))
        if folder is not None and (lacking := _FILES[each] - set(row.files)):
            raise PathNotFound(f"has no {min(lacking)}", where=folder, fix="`avatarctl demo build` makes it")
        return row

    with Screen("info") as screen:
        for each in chosen:
            found[each] = scores.benchmark(each, row_of(each), range(seed, seed + clips), screen)
        for audio in recordings:
            found[f"speech {audio.name}"] = scores.spoken(row_of("i2v"), audio, range(seed, seed + 4), screen)
    if as_json:
        click.echo(json.dumps({"command": "demo benchmark", "seed": seed, "clips": clips, **found}))
        return
    for each, numbers in found.items():
        for name, value in numbers.items():
            told = value if isinstance(value, int) else f"{value['mean']:.3f} ± {value['standard_error']:.3f}"
            click.echo(printable(f"{each} {name}: {told}"))
