"""What a row of the registry says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from avatarctl.config import ModelRowDefaults

__all__ = [
    "ASSETS",
    "ENCODER_FILES",
    "NEEDS_WEIGHTS",
    "NOT_YET",
    "WORKS",
    "Kind",
    "Row",
    "Status",
    "TrainedFor",
    "VideoShape",
    "Wanted",
    "encoder_part",
]

Kind = Literal["model", "base", "adapter", "encoder", "loss", "metric", "detector", "separator"]
Status = Literal["works", "needs weights", "not yet supported"]
VideoShape = Literal["square", "landscape or portrait"]

WORKS: Final[Status] = "works"
NEEDS_WEIGHTS: Final[Status] = "needs weights"
NOT_YET: Final[Status] = "not yet supported"

ENCODER_FILES: Final[Mapping[str, str]] = {
    "text": "models_t5_umt5-xxl-enc-bf16.pth",
    "vae": "Wan2.1_VAE.pth",
    "tokenizer": "google/umt5-xxl/",
    "clip": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
}
"""What stands beside the transformer in Wan releases, by part; "clip" in those that look at an image."""


ASSETS: Final = Path(__file__).resolve().parent.parent / "assets"
"""Files that come with the program."""


@dataclass(frozen=True)
class TrainedFor:
    """What a model saw in training or is published with; other values run, with a notice.

    sizes: (width, height) in pixels; num_frames, overlap_frames: pixel frames; shifts of the sigmas;
    guidance_scales, 1 where no branch was ever dropped in training. Empty means unknown.
    """

    sizes: tuple[tuple[int, int], ...] = ()
    num_frames: tuple[int, ...] = ()
    overlap_frames: tuple[int, ...] = ()
    shifts: tuple[float, ...] = ()
    guidance_scales: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    """One thing that can be named.

    source:  "package" comes with the program; "hub" is a repository; "other" is described by `obtained`;
             "path" is a file or folder that a person named, see `path`; only loading/model_row.py makes it.
    files:   names relative to the repository; "a|b" is satisfied by either, a trailing "/" is a folder. Of a
             row that comes with the program they are relative to `ASSETS`, and the first word of a file's
             name is the part of a run that it is; without files its networks get seeded random weights.
    sha256:  digest of a file by its name, where the row states it.
    stand_ins: names in `files` -> the name under which `avatarctl convert-ckpt` may have written the same.
    network: constructor arguments by part: "dit" (the family's transformer), "vae" (`AutoencoderKLWan`),
             "text" (`UMT5Config`), "audio" (`Wav2Vec2Config`), "clip" (`clip_config`), if there is one; the
             judges of auxiliary losses "syncnet", "lpips_vgg", "videomae", where the row has its own.
    defaults: RunConfig values by dotted key.
    audio_offset_stated: the weights themselves say which audio offset they were made with.
    trained_with: the mask and the mask rule that the weights themselves state (`weights.metadata.data_of`).
    world:   the made-up world that the model alone knows, empty for people.
    compat:  what each `model.compat` sets for this model; None for `COMPAT`.
    needs:   names of the rows whose files it needs as well.
    part:    the part of a run that the folder of an encoder is, or the file of a judge, empty where each file
             is a part of its own.
    made_for: the shape of the videos that these weights were trained for, None where that is one.
    instead: names of the rows that run in its place where the video has the shape that they are made for, or
             where they are here and it is not.
    copies:  (repository, folder in it) that hold the same files.
    path:    of the transformer's file, absolute, where the source is "path".
    base_path, base_sha256: the full model that the adapter at `path` was trained on, absolute, and digests of
             its files by name, where the adapter states them.
    passed_over, chosen: of a folder that `avatarctl train` made, a line for each checkpoint that is damaged,
             and the file of it that is used.
    home:    folder that the files of a row of the package lie in, absolute, where it is not `ASSETS`: while
             they are made.
    """

    name: str
    kind: Kind
    title: str
    status: Status
    source: Literal["package", "hub", "other", "path"] = "hub"
    hub_id: str = ""
    files: tuple[str, ...] = ()
    sha256: Mapping[str, str] = field(default_factory=dict)
    stand_ins: Mapping[str, str] = field(default_factory=dict)
    obtained: str = ""
    license: str = ""
    family: str = ""
    network: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    audio_offset_stated: bool = False
    trained_with: Mapping[str, str] = field(default_factory=dict)
    compat: Mapping[str, Mapping[str, Any]] | None = None
    trained: bool = True
    world: Literal["", "cartoon"] = ""
    trained_for: TrainedFor = TrainedFor()
    needs: tuple[str, ...] = ()
    part: str = ""
    made_for: VideoShape | None = None
    instead: tuple[str, ...] = ()
    copies: tuple[tuple[str, str], ...] = ()
    path: str = ""
    base_path: str = ""
    base_sha256: Mapping[str, str] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()
    chosen: str = ""
    home: str = ""

    @property
    def assets(self) -> Path:
        """What the files of a row of the package are relative to."""
        return Path(self.home) if self.home else ASSETS

    @property
    def folder(self) -> str:
        """Name of the folder that holds its files below a weights root."""
        return self.hub_id.rpartition("/")[2] or self.name

    @property
    def scope(self) -> str:
        """What a model of a made-up world knows, as the beginning of a sentence; empty for one of people."""
        return f"{self.name} knows only the drawn faces of the {self.world} world" if self.world else ""

    def accepted(self, names: str) -> str:
        """A name of `files` with what may stand in for it on a disk, as "a|b"; a hub has the former only."""
        return f"{names}|{self.stand_ins[names]}" if names in self.stand_ins else names

    @property
    def width(self) -> int:
        """Width of the transformer, 0 for rows that do not state it."""
        dit = self.network.get("dit", {})
        return int(dit.get("num_attention_heads", 0)) * int(dit.get("attention_head_dim", 0))

    @property
    def for_config(self) -> ModelRowDefaults:
        """What `avatarctl.config.resolve` needs of it."""
        return ModelRowDefaults(self.name, self.defaults, self.audio_offset_stated, self.compat)


@dataclass(frozen=True)
class Wanted:
    """A file that is not there: its name in the repository, the folder it goes to, the repository."""

    file: str
    folder: str
    hub_id: str


def encoder_part(name: str) -> str:
    """The part of a run that a file of a release is, in whatever folder of it; empty for none."""
    return next((part for part, file in ENCODER_FILES.items() if f"/{name}".endswith(f"/{file}")), "")
