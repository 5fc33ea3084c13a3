"""What the JSON files beside the tensors state, against the tensors and the product's own plans."""

from __future__ import annotations

from typing import Any

from avatarctl.families.stableavatar import StableAvatar
from avatarctl.timeline import FPS, SAMPLE_RATE, SAMPLES_PER_FRAME, latent_frames

from ..golden import Checks, Reader
from .building import CONFIG, META, state_of, transformer
from .stand_ins import reference_config

checks = Checks()

SET2, SET3 = "set2_transformer.safetensors", "set3_guidance.safetensors"
SET4, SET6 = "set4_fusion.safetensors", "set6_long_pipeline.safetensors"

_OF_THE_NETWORK = (
    "patch_size", "in_dim", "dim", "ffn_dim", "freq_dim", "text_dim", "out_dim", "num_heads", "num_layers",
    "eps", "audio_in_dim", "audio_proj_dim", "vocal_num_heads", "vocal_num_layers", "vocal_ffn_dim",
    "clip_image_dim",
)  # fmt: skip
_OF_THE_WINDOW = ("clip_tokens", "clip_frames", "latent_frames", "latent_height", "latent_width")


@checks(CONFIG, compares=_OF_THE_NETWORK, needs=("qk_norm", "cross_attn_norm", "model_type"))
def sizes_of_the_network(reader: Reader) -> None:
    """The network that is built from the tensors is the one that config.json describes."""
    assert reader.take("model_type") == "i2v" and reader.take("qk_norm") and reader.take("cross_attn_norm")
    ours = transformer(reader).config
    width = ours["num_attention_heads"] * ours["attention_head_dim"]
    observed = {
        "patch_size": list(ours["patch_size"]),
        "in_dim": ours["in_channels"],
        "dim": width,
        "ffn_dim": ours["ffn_dim"],
        "freq_dim": ours["freq_dim"],
        "text_dim": ours["text_dim"],
        "out_dim": ours["out_channels"],
        "num_heads": ours["num_attention_heads"],
        "num_layers": ours["num_layers"],
        "eps": ours["eps"],
        "audio_in_dim": ours["vocal_dim"],
        "audio_proj_dim": state_of(reader.folder)["vocal_projector.final_head.final_proj.weight"].shape[0],
        "vocal_num_heads": ours["vocal_heads"],
        "vocal_num_layers": ours["vocal_layers"],
        "vocal_ffn_dim": ours["vocal_ffn_dim"],
        "clip_image_dim": ours["image_dim"],
    }
    for name, value in observed.items():
        reader.compare(name, value)


@checks(CONFIG, compares=(*_OF_THE_WINDOW, "text_len"))
def sizes_of_the_window(reader: Reader) -> None:
    inputs = reader.folder.open(SET2)
    frames, height, width = inputs.take("x").shape[2:]
    reader.compare("latent_frames", frames)
    reader.compare("latent_height", height)
    reader.compare("latent_width", width)
    reader.compare("clip_tokens", inputs.take("clip_fea").shape[1])
    reader.compare("text_len", inputs.take("b1.text_embedding").shape[1])
    assert latent_frames(reader.take("clip_frames")) == frames
    reader.compare("clip_frames", 4 * frames - 3)


def _plan_of(reader: Reader, file: str) -> Any:
    """Spans of a recorded run. Samples: of its audio where there is one."""
    run = reader.folder.open(file)
    stated = {name: reader.take(f"{file}.{name}") for name in ("n_frames", "clip_frames", "overlap", "steps")}
    samples = len(run.take("audio")) if run.keys("audio") else stated["n_frames"] * SAMPLES_PER_FRAME
    init = run.take("init")
    size = (8 * init.shape[3], 8 * init.shape[4])
    cfg = reference_config(
        clip_frames=stated["clip_frames"],
        overlap=stated["overlap"],
        text=3.0,
        audio=5.0,
        size=size,
        steps=stated["steps"],
    )
    spans = list(StableAvatar().plan(samples, cfg).spans())
    assert spans[-1].start + spans[-1].frames == init.shape[2]
    reader.compare(f"{file}.n_frames", samples // SAMPLES_PER_FRAME)
    reader.compare(f"{file}.steps", len(run.take("timesteps")))
    return spans


@checks(META, compares=(f"{SET4}.n_frames", f"{SET4}.steps", f"{SET4}.latent_channels"), needs=(f"{SET4}.*",))
def run_of_the_fusion(reader: Reader) -> None:
    _plan_of(reader, SET4)
    reader.compare(f"{SET4}.latent_channels", reader.folder.open(SET4).take("init").shape[1])
    for name in ("text", "audio"):
        assert reader.take(f"{SET4}.{name}_guide_scale") >= 0


@checks(META, compares=(f"{SET3}.scales.*",))
def runs_of_one_window(reader: Reader) -> None:
    """One pair of scales, (text, audio), for every recorded result."""
    finals = reader.folder.open(SET3).keys("s*.final")
    pairs = reader.keys(f"{SET3}.scales.*")
    assert len(pairs) == len(finals)
    for key in pairs:
        text, audio = reader.take(key)
        reader.compare(key, [float(text), float(audio)])


@checks(
    META,
    compares=(
        *(f"{SET6}.{name}" for name in ("n_frames", "steps", "fps", "sr", "n_windows")),
        f"{SET6}.windows.*",
    ),
    needs=(f"{SET6}.clip_frames", f"{SET6}.overlap", f"{SET6}.scheme", f"{SET6}.s*"),
)
def run_of_the_pipeline(reader: Reader) -> None:
    spans = _plan_of(reader, SET6)
    run = reader.folder.open(SET6)
    reader.compare(f"{SET6}.fps", FPS)
    reader.compare(f"{SET6}.sr", SAMPLE_RATE)
    reader.compare(f"{SET6}.n_windows", len(spans))
    assert reader.take(f"{SET6}.scheme") in ("uniform", "log")
    for index, span in enumerate(spans):
        prefix = f"{SET6}.windows.{index}"
        reader.compare(f"{prefix}.samples", span.audio[1] - span.audio[0])
        reader.compare(f"{prefix}.latent_frames", span.frames)
        reader.compare(f"{prefix}.tokens", run.take(f"window{index}.wav2vec").shape[1])
    for key in run.keys("s*.final"):
        for name in ("text", "audio"):
            assert reader.take(f"{SET6}.{key.removesuffix('final')}{name}_guide_scale") >= 0
