"""RunConfig: every setting of every command, as nested frozen dataclasses.

All sections and keys exist and are validated whoever uses them; commands.py states which command reads
which. A field that is None and marked `from_row` takes its value from the model's registry row.
Sources of the numbers: a published configuration and trainer (spec/omniavatar.md 0, g.4, g.5).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_type_hints

from avatarctl.config import rules
from avatarctl.config.keys import ANY, KeySpec, key

__all__ = [
    "Aux",
    "Checkpoint",
    "Data",
    "Input",
    "LongVideo",
    "Memory",
    "Model",
    "Output",
    "RunConfig",
    "Runtime",
    "Sampling",
    "Train",
    "Validation",
    "keys",
    "section_names",
    "spec_named",
]

MAX_FRAMES = 100_001
MAX_SIDE = 8192
LAST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Model:
    """Which network runs, and where its files are."""

    name: str | None = key(
        None, "model: its registry name (see `avatarctl models list`), or its exported file or folder",
        rule=rules.PATH,
    )  # fmt: skip
    channels: Literal[33, 36, 49, 65] | None = key(
        None,
        "input channels: 33 image, 36 image and image tokens, 49 video, 65 video and reference sequence",
        from_row=True,
    )  # fmt: skip
    audio_offset: Literal[0, 1] | None = key(
        None, "1: audio frame k drives video frame k + 1 (published I2V weights); 0: frame k", from_row=True
    )
    weights_root: str | None = key(
        None, "folder with the published files, one sub-folder per repository", rule=rules.PATH
    )
    weights: Mapping[str, str] = key(
        {}, "path of a part's own file, by part name", rule=rules.PARTS,
        not_yet=("syncnet_v2", "yunet", "mdx"),
    )  # fmt: skip
    lora: tuple[str, ...] = key(
        (),
        "LoRA to merge: `path[:scale]`, or the name of one fetched from the hub; several add up",
        split=None,
    )
    compat: Literal["none", "reference", "fork"] = key(
        "none", "reproduce the published script (reference) or the trainer's (fork) where they differ"
    )


@dataclass(frozen=True)
class Input:
    """What the video is made from."""

    image: str | None = key(None, "image of the person", rule=rules.PATH)
    fit: Literal["crop", "stretch"] = key(
        "crop", "how an image of another shape fills the frame: its edges are cut, or it is stretched"
    )
    video: str | None = key(None, "video of the person, to be given a new mouth", rule=rules.PATH)
    audio: str | None = key(None, "audio file with the voice", rule=rules.PATH)
    prompt: str | None = key(None, "what the video shows", from_row=True)
    negative_prompt: str | None = key(None, "what the video should not show", from_row=True)
    jobs: str | None = key(None, "list of jobs, one output each", rule=rules.PATH, not_yet=ANY)
    latents: str | None = key(None, "saved latents to start from", rule=rules.PATH, not_yet=ANY)
    face: str = key(
        "none", "which face to follow: none, largest, its index, or x,y,w,h", rule=rules.FACE, not_yet=ANY
    )
    face_detector: Literal["auto", "yunet", "insightface", "haar"] = key("auto", "face detector", not_yet=ANY)


@dataclass(frozen=True)
class Sampling:
    """The way from noise to latents."""

    steps: int | None = key(None, "sampling steps", low=1, high=1000, from_row=True)
    guidance_scale: float | None = key(
        None, "guidance by the prompt; 1 runs the conditional branch only", low=0, high=100, from_row=True
    )
    audio_guidance_scale: float | None = key(
        None, "guidance by the audio; the same as guidance_scale unless given", low=0, high=100
    )
    guidance_rule: Literal["cfg", "native"] = key(
        "cfg", "how the branches of a step are combined: classifier-free guidance, or audio native guidance"
    )
    null_audio: Literal["zero_context", "projected_silence"] = key(
        "zero_context",
        "what a branch without audio gets: nothing at all, or silence as the audio encoder encodes it",
    )
    batch_branches: bool | None = key(
        None,
        "run the branches of a step as one batch, which needs more memory; unless given, where a branch has "
        "512 video tokens or fewer: only there small networks gain from it",
        formerly="batch_passes",
    )
    latents_dtype: Literal["float32", "bfloat16"] = key(
        "float32", "how latents are kept between the steps of fused windows"
    )
    guidance_interval: tuple[float, float] | None = key(
        None, "part of the steps that is guided, as two fractions", low=0, high=1, rule=rules.INTERVAL,
        not_yet=ANY,
    )  # fmt: skip
    shift: float | None = key(None, "shift of the sigma schedule", above=0, high=100, from_row=True)
    solver: Literal["euler", "dpm++", "unipc"] = key("euler", "solver", not_yet=("dpm++", "unipc"))
    cache: Literal["none", "teacache", "first_block", "mag"] = key(
        "none",
        "step cache: skip branches that would change little",
        not_yet=("teacache", "first_block", "mag"),
    )
    cache_threshold: float | None = key(
        None, "how much change the step cache ignores", above=0, high=10, not_yet=ANY
    )
    preset: str | None = key(
        None, "named sampling settings; fills only what nothing else sets", rule=rules.PATH, not_yet=ANY
    )


@dataclass(frozen=True)
class LongVideo:
    """How a video longer than one window is made."""

    strategy: Literal["off", "chunks", "fused", "stream"] = key(
        "chunks",
        "off: one window only; chunks: one after another, each continues the last; fused: windows that "
        "are fused in every step; stream: blocks that attend to what came before; a model offers some",
    )
    num_frames: int | None = key(
        None, "pixel frames of a chunk or window; wins over max_tokens", low=5, high=MAX_FRAMES,
        rule=rules.FRAMES_4K1,
    )  # fmt: skip
    overlap_frames: int | None = key(
        None, "pixel frames that a chunk repeats from the one before, or that two windows share", low=0,
        high=MAX_FRAMES, rule=rules.OVERLAP, from_row=True,
    )  # fmt: skip
    schedule: Literal["auto", "step", "wavefront"] = key(
        "auto",
        "order of the windows (fused only): step by step, or wavefront, which finishes early windows first; "
        "auto takes wavefront where it needs fewer windows at a time",
    )
    blend: Literal["uniform", "log"] = key(
        "uniform", "weights of the cross-fade between windows (fused only)"
    )
    carry: Literal["pixels", "latents"] | None = key(
        None, "what a chunk hands to the next: decoded frames or latents (chunks only)"
    )
    max_tokens: int | None = key(
        None, "tokens of a chunk, from which its length follows", low=1, high=10_000_000
    )
    max_size: Literal[720, 1280] | None = key(None, "which table of image sizes to choose from")
    audio_window: float = key(30.0, "seconds of audio encoded in one piece", low=5, high=86_400)


@dataclass(frozen=True)
class Output:
    """The file that is written."""

    path: str | None = key(None, "what is written: a video, or the folder of a run", rule=rules.PATH)
    fps: int = key(25, "frames per second; the models know 25 only", low=1, high=240, not_yet=ANY)
    width: int | None = key(
        None,
        "width in pixels; from the image unless given",
        low=16,
        high=MAX_SIDE,
        rule=rules.MULTIPLE_OF_16,
    )
    height: int | None = key(
        None,
        "height in pixels; from the image unless given",
        low=16,
        high=MAX_SIDE,
        rule=rules.MULTIPLE_OF_16,
    )
    lead_silence: float = key(0.0, "seconds of silence put before the audio", low=0, high=60)
    length: Literal["pingpong", "hold", "video"] = key(
        "pingpong",
        "what a source video does when the audio is longer: pingpong turns back and forth, hold keeps the "
        "last frame, video ends with it",
    )
    soundtrack: str = key(
        "input", "audio of the video: input, source, or the path of a file", rule=rules.PATH, not_yet=ANY
    )
    paste: Literal["face", "mouth-only"] | None = key(
        None, "paste this part of the result back into the source video", not_yet=ANY
    )
    crf: int = key(18, "H.264 quality: 0 lossless, 51 worst", low=0, high=51)
    preview: bool = key(False, "write a quick preview as well", not_yet=ANY)
    save_latents: bool = key(False, "write the latents beside the video", not_yet=ANY)
    overwrite: bool = key(False, "replace an output that exists")


@dataclass(frozen=True)
class Memory:
    """What lives where."""

    mode: Literal["full", "model", "group", "sequential", "auto"] = key(
        "auto",
        "what waits on the host: auto as little as fits; full nothing; model text and image encoders leave "
        "before the transformer is read; group its blocks come in groups as well; sequential every module "
        "comes for itself alone",
    )
    group_blocks: int = key(4, "transformer blocks that come together in mode group", low=1, high=1000)
    vae_gradient: Literal["full", "checkpoint", "segment", "offload"] = key(
        "segment", "what auxiliary losses keep of the decoder and their networks for the backward pass: full "
        "all of it, checkpoint what passes between latent frames, segment what passes between some of them, "
        "offload the same on the host; the numbers are the same",
    )  # fmt: skip
    activation_checkpointing: Literal["none", "block", "block_offload"] = key(
        "block", "what is computed again in the backward pass: none nothing, block every transformer block "
        "from its input, block_offload the same with these inputs on the host",
    )  # fmt: skip
    base_precision: Literal["bf16", "fp8"] = key(
        "bf16", "storage of the transformer: as it computes, or the matrices of its blocks in eight bits; of "
        "training those that are frozen",
    )  # fmt: skip
    optimizer_device: Literal["auto", "cpu", "cuda"] = key(
        "auto", "where moments live between steps: auto and cuda with the weights, cpu on the host"
    )
    swap_blocks: int = key(
        0, "transformer blocks that wait on the host, one coming at a time; in infer the mode is then model, "
        "in training only frozen weights wait", low=0, high=1000,
    )  # fmt: skip
    shard: Literal["none", "fsdp2"] = key(
        "none", "what processes that train hold: none the whole model each, fsdp2 a part of every tensor",
    )  # fmt: skip


@dataclass(frozen=True)
class Data:
    """The training set and its preparation."""

    path: str | None = key(None, "folder of samples, or a list of them", rule=rules.PATH)
    videos: str | None = key(
        None, "folder or list of videos to cut samples from; they become folders below data.path",
        rule=rules.PATH,
    )  # fmt: skip
    num_frames: int | None = key(
        None, "pixel frames of a training clip", low=5, high=MAX_FRAMES, rule=rules.FRAMES_4K1, from_row=True
    )
    width: int | None = key(
        None, "width of a training clip", low=16, high=MAX_SIDE, rule=rules.MULTIPLE_OF_16, from_row=True
    )
    height: int | None = key(
        None, "height of a training clip", low=16, high=MAX_SIDE, rule=rules.MULTIPLE_OF_16, from_row=True
    )
    fps: int = key(25, "frames per second after reading", low=1, high=240)
    sample_rate: int = key(16_000, "samples of audio per second after reading", low=8_000, high=192_000)
    window: int | None = key(
        None, "pixel frames cut from a longer clip; num_frames unless given", low=5, high=MAX_FRAMES,
        rule=rules.FRAMES_4K1,
    )  # fmt: skip
    stride: int | None = key(None, "pixel frames between two windows of a clip", low=1, high=MAX_FRAMES)
    max_windows: int | None = key(None, "windows taken from one clip at most", low=1, high=1_000_000)
    faces: str | None = key(
        None,
        "around whose face samples are cut: auto one in each scene, the largest in its first frame with any; "
        "all everybody's, each in samples of its own; the path of a table of faces (docs/faces.md); or none, "
        "for faces aligned already, or drawn",
        rule=rules.FACES,
        from_row=True,
    )
    face_look: Literal["whole", "near", "far"] = key(
        "near",
        "how small faces may be: whole finds those from about 10 % of the frame's long side on, near from "
        "6 %, far from 4 %, which takes longer where nobody is to be seen",
    )
    audio_name: str = key("audio.wav", "file name of the audio in a sample folder", rule=rules.PATH)
    mask: str | None = key(None, "image of the mouth mask; white is kept", rule=rules.PATH)
    mask_rule: Literal["all", "first_keep", "legacy_two_step"] = key("all", "which frames are masked")
    reference_sequence: bool = key(False, "give a second clip of the person as reference")
    reference_frames: int | None = key(
        None, "pixel frames of the reference sequence", low=1, high=MAX_FRAMES, rule=rules.FRAMES_4K1
    )
    references: int = key(
        0, "single frames elsewhere in the source that are coded alone, drawn at random", low=0, high=64
    )
    artifact_dtype: Literal["bfloat16", "float32"] = key("bfloat16", "numbers of written artifacts")
    format: Literal["safetensors", "pt"] = key(
        "safetensors", "format of written artifacts; pt is for published trainers"
    )
    shard: str | None = key(None, "work on part i of n, as i/n counted from 0", rule=rules.SHARD)
    workers: int = key(0, "reading processes beside the one that computes; 0 for none", low=0, high=256)
    force: bool = key(False, "make artifacts again that are up to date")


@dataclass(frozen=True)
class Train:
    """What is learnt, and how."""

    mode: Literal["lora", "full"] = key("lora", "train a LoRA, or every weight")
    init: Literal["random", "zero_channels", "published"] | None = key(
        None,
        "where weights start that the base does not have: random draws the whole network from the seed; "
        "zero_channels makes new input channels zero and audio layers small; published as the public trainer",
        from_row=True,
    )
    optimizer: Literal["adamw", "adamw8bit"] = key("adamw", "adamw8bit: 8-bit moments, by bitsandbytes")
    learning_rate: float = key(1e-4, "learning rate", above=0, high=10)
    final_learning_rate: float = key(0.0, "learning rate at the end of a cosine", low=0, high=10)
    schedule: Literal["constant", "cosine"] = key("constant", "learning rate after the warm-up")
    hold: float = key(0.0, "share of the steps after the warm-up before the cosine falls", low=0, high=1)
    betas: tuple[float, float] = key((0.9, 0.999), "decay of AdamW's two moments", low=0, high=0.999_999_9)
    weight_decay: float = key(0.01, "weight decay", low=0, high=10)
    warmup_steps: int = key(0, "optimizer steps until the full learning rate", low=0, high=10_000_000)
    max_steps: int = key(10_000, "optimizer steps in all", low=1, high=100_000_000)
    batch_size: int = key(1, "samples per process and forward pass", low=1, high=4096)
    gradient_accumulation: int = key(1, "forward passes per optimizer step", low=1, high=4096)
    lora_rank: int = key(128, "rank of the adapters", low=1, high=4096)
    lora_alpha: float = key(64.0, "alpha of the adapters; their scale is alpha / rank", above=0, high=65_536)
    lora_targets: tuple[str, ...] = key(
        ("q", "k", "v", "o", "ffn.0", "ffn.2"), "layers with adapters, by the end of their name"
    )
    text_dropout: float = key(0.1, "share of samples trained without prompt", low=0, high=1)
    audio_dropout: float = key(0.1, "share of samples trained without audio", low=0, high=1)
    prefix_frames: tuple[int, ...] = key(
        (1, 5, 9, 13),
        "clean pixel frames in front, one drawn per sample",
        low=0,
        high=MAX_FRAMES,
        rule=rules.PREFIXES,
    )
    prefix_dropout: float = key(0.1, "share of samples trained without clean frames", low=0, high=1)
    prefix_noise: float = key(
        0.0,
        "noise on clean frames in front: its deviation in latents is drawn between 0 and this, small ones "
        "more often. Inference gives the model frames that it made itself",
        low=0,
        high=10,
    )
    timestep_weight: Literal["bell", "none"] = key(
        "bell", "weight of the loss by timestep: the bell of the published recipe, or the same for all"
    )
    mouth_weight: float = key(1.0, "weight of the loss inside the mouth mask", low=0, high=1000)
    clip_norm: float = key(1.0, "largest gradient norm", above=0, high=1e6)
    ema: float = key(0.0, "decay of the averaged weights; 0 keeps none", low=0, high=0.999_999)


@dataclass(frozen=True)
class Aux:
    """Auxiliary losses on decoded frames."""

    losses: tuple[Literal["sync", "lpips", "trepa"], ...] = key((), "which losses")
    sync_weight: float = key(0.1, "coefficient of the sync loss; 0 does not run it", low=0, high=1e6)
    lpips_weight: float = key(0.1, "coefficient of the LPIPS loss; 0 does not run it", low=0, high=1e6)
    trepa_weight: float = key(10.0, "coefficient of the TREPA loss; 0 does not run it", low=0, high=1e6)
    recon_weight: float = key(1.0, "coefficient of the flow-matching loss", low=0, high=1e6)
    sync_mode: Literal["logits", "prob"] = key(
        "prob",
        "what the sync loss makes of a cosine: prob takes it as a probability (best 0, chance 0.693), logits "
        "as a logit (best 0.313), as the public trainer does",
    )
    lpips_backend: Literal["builtin", "package"] = key(
        "builtin", "whose LPIPS: builtin needs no package; package is lpips (extra `aux`), unverified"
    )
    window: int = key(16, "pixel frames of a sync window; the published judge has 16", low=5, high=MAX_FRAMES)
    stride: int = key(8, "pixel frames between sync windows", low=1, high=MAX_FRAMES)
    frames: int = key(
        0,
        "pixel frames that are decoded for auxiliary losses, a window at random in each step; 0 decodes all. "
        "sync and trepa need 16",
        low=0,
        high=MAX_FRAMES,
    )
    trepa_mode: Literal["windows", "full"] = key(
        "windows",
        "how TREPA takes a clip: by windows of the 16 frames that its network knows, or in one piece, as the "
        "public trainer does",
    )
    mouth_crop: bool = key(False, "decode the mouth region only", not_yet=ANY)
    max_sigma: float = key(1.0, "sigma above which auxiliary losses are not computed", above=0, high=1)


@dataclass(frozen=True)
class Checkpoint:
    """Saving and resuming training."""

    every: int = key(500, "optimizer steps between checkpoints", low=1, high=100_000_000)
    keep_last: int = key(3, "checkpoints kept; older ones are removed", low=1, high=100_000)
    resume: str | None = key(None, "auto, or the run or checkpoint folder to continue", rule=rules.PATH)
    accept_schedule: bool = key(
        False, "go on under a cosine of another length, though the learning rate jumps"
    )


@dataclass(frozen=True)
class Validation:
    """Looking at a model while it trains."""

    every: int = key(0, "optimizer steps between validations; 0 for never", low=0, high=100_000_000)
    sets: tuple[str, ...] = key(
        (),
        "what to validate on, in place of what is held out: folders or lists of samples, or lists of "
        "video@@audio (image@@audio) lines",
        split=None,
    )
    samples: int = key(4, "samples per set; each is made twice, with its own and another's audio", low=1,
                       high=1_000_000)  # fmt: skip
    steps: int | None = key(None, "sampling steps; the model's own unless given", low=1, high=1000)
    metrics: tuple[Literal["flow", "sync", "lpips", "psnr"], ...] = key(
        ("flow", "sync", "lpips", "psnr"),
        "scores: loss at fixed noise, cosine of the sync judge, LPIPS of the mouth, PSNR",
    )
    holdout: float = key(0.0, "share of the clips that is never trained on and validated", low=0, high=0.9)


@dataclass(frozen=True)
class Runtime:
    """The machine, not the result."""

    seed: int = key(42, "seed of all random numbers", low=0, high=LAST_SEED)
    device: str = key("auto", "auto, cpu, cuda or cuda:N", rule=rules.DEVICE)
    dtype: Literal["float32", "bfloat16"] | None = key(None, "arithmetic of the transformer", from_row=True)
    attention: Literal["auto", "native", "flash", "flash3", "sage"] = key("auto", "attention kernel")
    compile: bool = key(False, "compile the transformer", not_yet=ANY)
    gpus: int = key(
        1,
        "processes, one card each; each takes a batch of its own, so a step has gpus times as many samples. "
        "On a CPU they share its cores. torchrun and accelerate launch decide it themselves",
        low=1,
        high=1024,
        not_yet={"infer": ANY},
    )
    trackers: tuple[Literal["jsonl", "tensorboard", "wandb", "trackio"], ...] = key(
        ("jsonl",),
        "where training curves go: log.jsonl is always written; the others need the extra `track` and are "
        "unverified",
    )
    log_level: Literal["debug", "info", "warning", "error"] = key("info", "how much is said on the screen")


@dataclass(frozen=True)
class RunConfig:
    """One run, resolved. Immutable; `dataclasses.replace` makes variants."""

    model: Model = field(default_factory=Model)
    input: Input = field(default_factory=Input)
    sampling: Sampling = field(default_factory=Sampling)
    long_video: LongVideo = field(default_factory=LongVideo)
    output: Output = field(default_factory=Output)
    memory: Memory = field(default_factory=Memory)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    aux: Aux = field(default_factory=Aux)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    runtime: Runtime = field(default_factory=Runtime)


@functools.cache
def section_types() -> Mapping[str, type]:
    """Section name to dataclass, in the order of `RunConfig`."""
    return MappingProxyType(get_type_hints(RunConfig))


@functools.cache
def keys() -> Mapping[str, KeySpec]:
    """Every key by its dotted name, in the order of `RunConfig`."""
    specs = {}
    for section, cls in section_types().items():
        hints = get_type_hints(cls)
        for item in dataclasses.fields(cls):
            default = item.default if item.default is not dataclasses.MISSING else {}
            spec = KeySpec(section, item.name, hints[item.name], default, item.metadata["key"])
            specs[spec.dotted] = spec
    return MappingProxyType(specs)


def spec_named(section: str, name: str) -> KeySpec | None:
    """The key of this name, or of this older name, in a section; None for an unknown one."""
    former = (spec for spec in keys().values() if (spec.section, spec.key.formerly) == (section, name))
    return keys().get(f"{section}.{name}") or next(former, None)


def section_names() -> tuple[str, ...]:
    """The sections in the order of `RunConfig`."""
    return tuple(section_types())
