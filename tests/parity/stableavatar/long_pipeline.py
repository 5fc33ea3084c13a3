"""A whole long video through the public pipeline (spec/stableavatar.md c to g), from files.

Audio and image are files, wav2vec and the transformer have the recorded weights, a last window is short.
Text tokens, image tokens, the masked video's latents and the noise are the recorded ones.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import PIL.Image
import soundfile
import torch
from torch import Tensor
from transformers import Wav2Vec2Config

from avatarctl.config import RunConfig
from avatarctl.events import Event, StepFinished, silent
from avatarctl.families.stableavatar import StableAvatar
from avatarctl.family import Guidance, Modules
from avatarctl.media import load_image, open_audio
from avatarctl.models.encode import image_tensor
from avatarctl.models.wav2vec import FrameWav2Vec2
from avatarctl.pipelines.infer import generate
from avatarctl.pipelines.job import Job, check_job
from avatarctl.registry import configure, find_model
from avatarctl.timeline import SAMPLE_RATE, pixel_frames

from ..golden import Checks, Folder, Reader
from .building import padded_text, run_setting, transformer
from .stand_ins import BRANCHES, Codec, Image, Text

checks = Checks()

FILE = "set6_long_pipeline.safetensors"
ENCODER, ENCODER_CONFIG = "set6_wav2vec_state.safetensors", "set6_wav2vec_config.json"
_RELATIVE = 1e-5  # of the norm
_IMAGE = 1e-6  # absolute, on pixels in [-1, 1]
_NEEDS = (
    "audio", "init", "masked_video_latents", "clip_fea", "context_pos", "context_neg", "cond_image_rgb_uint8",
)  # fmt: skip


def _wav2vec(reader: Reader) -> FrameWav2Vec2:
    """The real class with the recorded weights; the published state has no other keys."""
    stated = json.loads((reader.folder.path / ENCODER_CONFIG).read_text(encoding="utf-8"))
    stated.pop("feature_extractor", None)
    model = FrameWav2Vec2(Wav2Vec2Config(**stated)).eval()
    model.load_state_dict(reader.folder.open(ENCODER).group(""))
    return model


@dataclass
class _Everything(StableAvatar):
    """The family, running all recorded branches also where one has no weight."""

    def branches(self, guidance: Guidance, step: int) -> tuple[str, ...]:
        return BRANCHES


@dataclass
class _Seen:
    """What happened in a run, window by window: x [1, 16, T, h, w], y [1, 20, T, h, w] and velocities of each
    pass by (step, window); wav2vec's tokens in order; what VAE and image encoder were shown; the result."""

    x: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    y: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    velocities: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)
    tokens: list[Tensor] = field(default_factory=list)
    image: Tensor | None = None
    video: Tensor | None = None
    final: Tensor | None = None


def _config(reader: Reader, run: str, *further: str) -> RunConfig:
    """As a person asks for it: the published model's row, compat reference, and what meta.json states."""
    height, width = (8 * side for side in reader.take("init").shape[3:])
    overlap = run_setting(reader, "overlap")
    return configure(
        "model.name=stableavatar-1.3b",
        "model.compat=reference",
        f"sampling.steps={run_setting(reader, 'steps')}",
        f"sampling.guidance_scale={run_setting(reader, f'{run}.text_guide_scale')}",
        f"sampling.audio_guidance_scale={run_setting(reader, f'{run}.audio_guide_scale')}",
        f"long_video.num_frames={run_setting(reader, 'clip_frames')}",
        f"long_video.overlap_frames={pixel_frames(overlap) if overlap else 0}",
        f"long_video.blend={run_setting(reader, 'scheme')}",
        f"output.height={height}",
        f"output.width={width}",
        "runtime.dtype=float32",
        *further,
    )


def _run(reader: Reader, cfg: RunConfig, family: StableAvatar | None = None) -> _Seen:
    """From files in a temporary folder to latents, through `check_job` and `generate`."""
    seen, passes = _Seen(), list[tuple[Tensor, dict[str, Tensor]]]()
    init, dit, ears = reader.take("init"), transformer(reader), _wav2vec(reader)
    image, codec = Image(reader.take("clip_fea")), Codec(reader.take("masked_video_latents"))

    def note_pass(_: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if kwargs.get("mode") == "denoise":
            passes.append((args[0], out))

    def note_step(event: Event) -> None:
        if isinstance(event, StepFinished):
            at = (event.step, event.span)
            inputs, velocities = passes.pop()
            assert not passes, "one forward per window and step"
            seen.x[at], seen.y[at] = inputs[:, : init.shape[1]], inputs[:, init.shape[1] :]
            seen.velocities[at] = velocities

    def noise(seed: int, key: Sequence[Any], first: int, frames: int, shape: Any) -> Tensor:
        assert (init.shape[1], *init.shape[3:]) == shape
        return init[:, :, first : first + frames].clone()

    dit.register_forward_hook(note_pass, with_kwargs=True)
    ears.register_forward_hook(lambda _, __, out: seen.tokens.append(out.last_hidden_state))
    text = Text(
        {"positive": padded_text(reader, "context_pos"), "negative": padded_text(reader, "context_neg")}
    )
    with tempfile.TemporaryDirectory() as name:
        job, row = _job(reader, Path(name)), find_model("stableavatar-1.3b")
        plan = check_job(cfg, row, job, silent)
        blocks = generate(
            plan if family is None else replace(plan, family=family),
            modules=Modules(dit, codec, text, ears, image, device=torch.device("cpu")),
            noise=noise,
            emit=note_step,
        )
        seen.final = torch.cat([block.pixels for block in blocks], dim=1)[None]
    (seen.image,), (seen.video,) = image.shown, codec.shown
    return seen


@functools.cache
def _plain_run(folder: Folder, run: str) -> tuple[_Seen, set[str]]:
    """A recorded run as a person asks for it, and the keys that it took; several checks look at one."""
    reader = folder.open(FILE)
    return _run(reader, _config(reader, run)), reader.read


def _seen(reader: Reader, run: str) -> _Seen:
    seen, taken = _plain_run(reader.folder, run)
    reader.read |= taken
    return seen


def _job(reader: Reader, folder: Path) -> Job:
    """Image and audio as files."""
    image, audio = folder / "image.png", folder / "voice.wav"
    PIL.Image.fromarray(reader.take("cond_image_rgb_uint8").numpy()).save(image)
    soundfile.write(audio, reader.take("audio").numpy(), SAMPLE_RATE, subtype="FLOAT")
    return Job(load_image(image), open_audio(audio), prompt="positive", negative_prompt="negative")


def _runs(reader: Reader) -> list[str]:
    return [key.removesuffix(".final") for key in reader.keys("s[0-9]*.final")]


@checks(FILE, compares=("s[0-9]*.final",), needs=_NEEDS)
def results(reader: Reader) -> None:
    """wav2vec gets every window once, whatever the number of steps."""
    windows = len(reader.keys("window*.wav2vec"))
    for run in _runs(reader):
        seen = _seen(reader, run)
        assert len(seen.tokens) == windows
        reader.compare(f"{run}.final", seen.final, relative_l2=_RELATIVE)


@checks(FILE, compares=("s[0-9]*.final",), needs=_NEEDS)
def results_in_wavefront_order(reader: Reader) -> None:
    """With the branches of a step as one batch."""
    for run in _runs(reader):
        cfg = _config(reader, run, "sampling.batch_branches=true", "long_video.schedule=wavefront")
        reader.compare(f"{run}.final", _run(reader, cfg).final, relative_l2=_RELATIVE)


@checks(FILE, compares=("window*.wav2vec", "y_window0"), needs=_NEEDS)
def inputs_of_the_windows(reader: Reader) -> None:
    seen = _seen(reader, _runs(reader)[0])
    assert len(seen.tokens) == len(reader.keys("window*.wav2vec"))
    for index, tokens in enumerate(seen.tokens):
        reader.compare(f"window{index}.wav2vec", tokens, atol=1e-5)
    reader.compare("y_window0", seen.y[0, 0])


@checks(FILE, compares=("s*.step*.window*.preds", "s*.step*.window*.x"), needs=_NEEDS)
def passes_of_the_windows(reader: Reader) -> None:
    for run in _runs(reader):
        keys = reader.keys(f"{run}.step*")
        seen = _run(reader, _config(reader, run), _Everything()) if keys else _Seen()
        for key in keys:
            found = re.fullmatch(r"s\d+\.step(\d+)\.window(\d+)\.(preds|x)", key)
            assert found, f"{key} is not the name of a known tensor"
            at = int(found[1]), int(found[2])
            ours = seen.x[at] if found[3] == "x" else torch.cat([seen.velocities[at][n] for n in BRANCHES])
            reader.compare(key, ours, relative_l2=_RELATIVE)


@checks(FILE, compares=("clip_input",), needs=("cond_image_rgb_uint8",))
def image_for_the_image_encoder(reader: Reader) -> None:
    reader.compare("clip_input", _image(reader)[0, :, None], atol=_IMAGE)


@checks(FILE, compares=("vae_input_frame0", "vae_input_frame1_absmax"), needs=_NEEDS)
def video_for_the_vae(reader: Reader) -> None:
    """The image, then grey; the image encoder sees the same image."""
    seen = _seen(reader, _runs(reader)[0])
    assert seen.video is not None and seen.image is not None
    reader.compare("vae_input_frame0", seen.video[:, :, 0], atol=_IMAGE)
    reader.compare("vae_input_frame1_absmax", seen.video[:, :, 1:].abs().max())
    assert torch.equal(seen.image, seen.video[:, :, 0])


def _image(reader: Reader) -> Tensor:
    """[1, 3, H, W] from a file, as `generate` makes it."""
    height, width = (reader.take("clip_input").shape[i] for i in (2, 3))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "image.png"
        PIL.Image.fromarray(reader.take("cond_image_rgb_uint8").numpy()).save(path)
        return image_tensor(load_image(path).pixels, (height, width), "stretch")


@checks(ENCODER, compares=("*",))
def encoder_weights(reader: Reader) -> None:
    """The recorded state is the whole state of the real class."""
    state = _wav2vec(reader).state_dict()
    assert state.keys() == set(reader.keys("*"))
    for key, value in state.items():
        reader.compare(key, value)


@checks(ENCODER_CONFIG, compares=("*",))
def encoder_config(reader: Reader) -> None:
    """Also what the published feature extractor does, ours without asking (spec/stableavatar.md c)."""
    stated = {"feature_extractor.do_normalize": True, "feature_extractor.sampling_rate": SAMPLE_RATE}
    ours = _wav2vec(reader).config.to_dict() | stated
    mask = "feature_extractor.return_attention_mask"  # all ones either way: nothing is padded
    if reader.keys(mask):
        ours[mask] = reader.take(mask)
    for key in reader.keys("*"):
        reader.compare(key, ours[key])
