"""An image -> tokens of CLIP's image tower, as Wan image-to-video models see it (spec/stableavatar.md f).

The tower is ViT-H/14 of open-clip's XLM-RoBERTa model, up to the layer before its last: tokens of the whole
image, which the last layer and the norm behind it would gather into one. Its GELU is exact, unlike the
"quick" one of OpenAI's CLIP that transformers takes unless told otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

__all__ = ["ClipImageEncoder", "clip_config"]

# Of CLIP's training images, red, green, blue in [0, 1] (spec/stableavatar.md f).
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def clip_config(**sizes: Any) -> CLIPVisionConfig:
    """The published tower, or one of other `sizes`; num_hidden_layers counts the layers that are computed,
    one less than the file holds."""
    published = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 31,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    return CLIPVisionConfig(**{**published, **sizes}, hidden_act="gelu", layer_norm_eps=1e-5)


class _Embeddings(CLIPVisionEmbeddings):
    """Patches behind a class token, with positions from their table: the parent keeps an index of all rows
    in a buffer that no file fills."""

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        patches = rearrange(self.patch_embedding(pixel_values), "b d h w -> b (h w) d")
        first = self.class_embedding.expand(len(patches), 1, -1)
        # Through its own forward: a table that waits on the host comes for that alone.
        rows = torch.arange(self.position_embedding.num_embeddings, device=patches.device)
        return torch.cat([first, patches], dim=1) + self.position_embedding(rows)


class ClipImageEncoder(CLIPVisionModel):
    """`CLIPVisionModel` without its last layer and the norm behind it, behind the `ImageEncoder` protocol.

    Build it from `clip_config`. Weights are float32 under any run dtype (spec/stableavatar.md f).
    """

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__(config)
        self.post_layernorm = nn.Identity()
        self.embeddings.__class__ = _Embeddings
        del self.embeddings.position_ids

    @property
    def width(self) -> int:
        """Of a token."""
        return int(self.config.hidden_size)

    def pixels(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> what the tower sees, [B, 3, 224, 224]: bicubic, without antialiasing,
        and stretched to a square."""
        size = self.config.image_size
        resized = F.interpolate(image.float(), size=(size, size), mode="bicubic", align_corners=False)
        mean, std = (rearrange(resized.new_tensor(values), "c -> c 1 1") for values in (_MEAN, _STD))
        return (resized * 0.5 + 0.5 - mean) / std

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> float32 [B, 257, width]."""
        return self(self.pixels(image)).last_hidden_state
