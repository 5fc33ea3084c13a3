"""What was trained, as a weight file that every reader of this program knows: original names, conventions,
and which base it belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from avatarctl.files.safetensors_file import read_header
from avatarctl.files.tensors import ArrayTensor, StoredTensor
from avatarctl.loading.trained import BASE_KEY
from avatarctl.weights.export import export, with_release_config
from avatarctl.weights.layout import Sizes, WeightLayout
from avatarctl.weights.metadata import file_metadata
from avatarctl.weights.sizes import variant_of
from avatarctl.weights.weight_file import LoraPair, WeightFile

if TYPE_CHECKING:
    from avatarctl.config import RunConfig
    from avatarctl.training.trainables import Trainables

__all__ = ["read_trained", "stored", "trained_file"]

_WRITTEN: Final = ".default.weight"


def trained_file(
    dit: nn.Module,
    layout: WeightLayout,
    trained: Mapping[str, Tensor],
    trainables: Trainables,
    cfg: RunConfig,
    base: Mapping[str, Any],
    data: Mapping[str, str],
    step: int,
) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and header of the file.

    trained: by the names of `trainables`, its own weights or an average of them; base: what the header says
    of the model that an adapter changes; data: what it says of the mask that was trained with.
    """
    network: Mapping[str, Any] = dit.config  # type: ignore[assignment]
    heads, head_width = network["num_attention_heads"], network["attention_head_dim"]
    stated = {field: network[name] for name, field in layout.arguments.items() if network.get(name)}
    sizes = Sizes(width=heads * head_width, **stated)
    pairs = {
        module: LoraPair(
            down=stored(trained[f"{module}.lora_A.weight"]), up=stored(trained[f"{module}.lora_B.weight"])
        )
        for module in trainables.modules
    }
    of_pairs = {f"{module}.lora_{side}.weight" for module in trainables.modules for side in "AB"}
    weight_file = WeightFile(
        path=Path("trainable_weights.safetensors"),
        kind="adapter" if pairs else "model",
        naming="original",
        layout=layout,
        variant=variant_of("adapter" if pairs else "model", layout, sizes),
        sizes=sizes,
        tensors={name: stored(tensor) for name, tensor in trained.items() if name not in of_pairs},
        lora_pairs=pairs,
        scale=cfg.train.lora_alpha / cfg.train.lora_rank,
        heads=heads,
        heads_stated=True,
        audio_offset=cfg.model.audio_offset,
        metadata={"avatarctl.data": json.dumps(data, sort_keys=True)} if data else {},
        files=(Path("trainable_weights.safetensors"),),
    )
    weight_file = with_release_config(weight_file)
    exported = export(weight_file, "original")
    extra = {**exported.metadata, BASE_KEY: json.dumps(base, sort_keys=True)}
    operations = [{"operation": "train", "step": step}]
    return dict(exported.tensors), file_metadata(weight_file, operations, extra)


def read_trained(path: Path) -> dict[str, Tensor]:
    """The tensors of such a file by the names of `Trainables`. Raises UnusableWeights."""
    import safetensors.torch

    read_header(path)
    held = safetensors.torch.load_file(str(path))
    return {
        name.replace(_WRITTEN, ".weight") if ".lora_" in name else name: tensor
        for name, tensor in held.items()
    }


def stored(tensor: Tensor) -> StoredTensor:
    """A tensor in memory for a writer; float32 unless it is bfloat16."""
    held = tensor.detach().cpu().contiguous()
    if held.dtype == torch.bfloat16:
        return ArrayTensor(held.view(torch.int16).numpy().view("<u2"), "BF16")
    return ArrayTensor(held.to(torch.float32).numpy(), "F32")
