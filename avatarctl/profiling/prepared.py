"""What training reads of its data, as large as a run asks for and without numbers: a family's artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from avatarctl.conditioning.masking import mask_tensor, mouth_mask
from avatarctl.config import RunConfig
from avatarctl.family import Artifact, TrainableFamily

__all__ = ["Prepared"]

_ROWS: Final[Mapping[str, int]] = {"prompt": 128, "data set": 1}
"""Of a text: a prompt's and an empty one's; the network reads 512 rows whatever it is."""


class Prepared:
    """parts: the networks of a row; of their encoders only the widths are looked at."""

    def __init__(self, family: TrainableFamily, cfg: RunConfig, parts: Mapping[str, nn.Module]) -> None:
        self._cfg, self._artifacts = cfg, family.artifacts(cfg)
        self._parts: Mapping[str, Any] = parts

    def samples(self, count: int, place: torch.device) -> Sequence[Mapping[str, Tensor]]:
        """As they are read from files: bfloat16 numbers as float32."""
        own = [each for each in self._artifacts if each.of != "data set"]
        return [
            {each.name: torch.zeros(self._shape(each), device=place) for each in own} for _ in range(count)
        ]

    def constants(self, place: torch.device) -> Mapping[str, Tensor]:
        """Those of the whole data set, and the mask, which a run may have."""
        shared = [each for each in self._artifacts if each.of == "data set"]
        made = {each.name: torch.zeros(self._shape(each), device=place) for each in shared}
        return {**made, "mask": mask_tensor(mouth_mask()).to(place)}

    def _shape(self, artifact: Artifact) -> tuple[int, ...]:
        """What only an encoder knows is the last size; what only a sample knows is a number of rows."""
        frames = self._cfg.data.num_frames
        assert frames is not None
        rows = _ROWS[artifact.of] if artifact.part == "text" else frames
        *front, last = artifact.shape
        width = self._parts[artifact.part].width if last is None else last
        return (*(rows if size is None else size for size in front), width)
