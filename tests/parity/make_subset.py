"""Write the shipped subset of a folder: `python tests/parity/make_subset.py SOURCE TARGET`.

Numbers are copied, never changed. Whole keys and whole cases are left out; subset.json and README.md of the
target say which.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

SOURCE_OF_HEADS = "dit_in49.safetensors"


@dataclass(frozen=True)
class Subset:
    """limit: bytes, all files of the folder together. left_out: key patterns by file, "*" for the whole file.
    words: the README above its table. every: of a JSON file that is a list, every n-th case is kept.
    first: of a file's tensors that go through frames, only so many frames are kept."""

    limit: int
    left_out: Mapping[str, tuple[str, ...]]
    words: str
    every: Mapping[str, int] = field(default_factory=dict)
    first: Mapping[str, int] = field(default_factory=dict)


_OMNIAVATAR = """# OmniAvatar numbers, shipped subset

Recorded by running the published implementation (Omni-Avatar/OmniAvatar) with small random weights, on a
CPU in float32. `tests/parity` compares the product with them; `tests/parity/make_subset.py` wrote this
folder from the full one, copying numbers unchanged. What is here is enough to notice, without the full
folder, a wrong audio projection, audio shifted by a frame, a prefix that is not kept, timesteps in the
wrong unit, latents normalised the wrong way, a mask of another shape and the channels of a video in another
order. The network is compared through `denoise`, in both modes of
its forward; its hidden states, gradients, wider channel layouts, batches and bf16 need the full folder.

`denoise` states `num_heads` in its metadata, which in the full folder is read from `dit_in49`.
"""

_STABLEAVATAR = """# StableAvatar numbers, shipped subset

Recorded by running the published implementation (Francis-Rings/StableAvatar) with small random weights, on a
CPU in float32. `tests/parity` compares the product with them; `tests/parity/make_subset.py` wrote this
folder from the full one, copying numbers unchanged. What is here is enough to notice, without the full
folder, audio cut for the wrong latent frame or window, channels in the wrong order, guidance scales swapped,
sigmas shifted once, a cross-fade the wrong way round and a short window that is not padded. Guidance
is compared through the long pipeline, for two pairs of scales; its single steps need the full folder.
"""

_FACES = """# Face numbers, shipped subset

Google MediaPipe's face detector and face mesh (Apache-2.0), run by LiteRT with separate numpy code around.
`tests/parity` compares the product with them; `tests/parity/make_subset.py` wrote this folder from the full
one, copying numbers unchanged. One input of each network is here (the crop of a portrait whose repository is
Apache-2.0), and all final numbers; those need the portraits beside the checkout.
"""

_LOSSES = """# Numbers of the losses, shipped subset

Recorded by running published implementations (bytedance/LatentSync, richzhang/PerceptualSimilarity and what
they use) on a CPU in float32. The weights are made by a formula from names, shapes and a seed
(`tests/parity/losses/formula.py`), but for the heads of LPIPS v0.1, which are the published ones
(BSD-2-Clause, Copyright (c) 2018 Richard Zhang, Phillip Isola, Alexei A. Efros, Eli Shechtman, Oliver Wang).
`tests/parity` compares the product with them; `tests/parity/make_subset.py` wrote this folder from the full
one, copying numbers unchanged. What is here is enough to notice, without the full folder, a wrong mel
spectrogram, audio of other frames, a wrong audio tower, either sync loss, and a name or shape of a judge. The
tower of StableSyncNet that looks at frames, gradients, LPIPS and TREPA need the full folder, and of alignment
and paste-back two of four frames are here.
"""

_OF_TRAINING = ("*.noisy_latents", "*.logged_unweighted_mse_reference", "*.grad.*", "state.*")
"""Of a training step what needs a network, and what follows from noise and sigmas as in the image step."""

SUBSETS: dict[str, Subset] = {
    "omniavatar": Subset(
        limit=5_200_000,
        left_out={
            "denoise.safetensors": ("teacache.*",),
            "dit_in33.safetensors": ("*",),
            "dit_in33_batch2.safetensors": ("*",),
            "dit_in33_bf16_output.safetensors": ("*",),
            "dit_in49.safetensors": ("*",),
            "dit_in65.safetensors": ("*",),
            "latentsync_mask.safetensors": ("mask_image_uint8", "pixel_mask_keep_512.*"),
            "lora_in33.safetensors": ("*",),
            "patch_embedding_expansion.safetensors": ("*",),
            "scheduler.safetensors": ("train1000.timesteps_bf16", "train1000.index_after_bf16_rounding"),
            "text_encoder.safetensors": ("*",),
            "train_i2v_in33.safetensors": ("grad.*", "state.*"),
            "train_v2v_in49.safetensors": (*_OF_TRAINING, "in49.plain.*", "*.x0_pred"),
            "train_v2v_in65.safetensors": (*_OF_TRAINING, "in65.maskall.*", "*.x0_pred"),
            "vae.safetensors": ("*_tiled_*",),
            "wav2vec_features.safetensors": (
                "input_values",
                "input_values_padded",
                "features_natural",
                "cnn_features",
            ),
        },
        words=_OMNIAVATAR,
        # 7 meets every size, overlap, budget and length of the 120 recorded plans.
        every={"chunk_plans.json": 7},
    ),
    "stableavatar": Subset(
        limit=2_000_000,
        left_out={
            "set1_vocal_projector.safetensors": ("b.*",),
            "set2_transformer.safetensors": ("cfg3.*", "b1.block0", "b1.img_emb", "b1.patch"),
            "set3_guidance.safetensors": ("*",),
            "set5_loss.safetensors": ("*",),
            "set5_loss_info.json": ("*",),
            "set6_long_pipeline.safetensors": ("clip_input",),
        },
        words=_STABLEAVATAR,
    ),
    "faces": Subset(
        limit=400_000,
        left_out={
            "blazeface_raw.safetensors": ("a.*", "none.*"),
            "face_mesh_raw.safetensors": ("b.*", "none.*"),
        },
        words=_FACES,
    ),
    "losses": Subset(
        limit=1_250_000,
        left_out={
            "affine.safetensors": ("p_bias_final",),
            "lpips_vgg.safetensors": ("*",),
            "mel.safetensors": ("mel_basis", "mel_slice", "mel_short_*", "overlap_*"),
            "metrics.safetensors": ("*",),
            "mouth_mask_256.png": ("*",),
            "stable_syncnet_tiny.safetensors": ("*",),
            "sync_loss.safetensors": ("pred_rgb", "lower_frame0_patch", "grad_*"),
            "syncnet_eval.safetensors": ("*",),
            "trepa_tiny.safetensors": ("*",),
            "videomae_tiny.safetensors": ("*",),
        },
        words=_LOSSES,
        first={"affine.safetensors": 2},
    ),
}
"""By the name of a format, which is that of its folders."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help=f"a folder named {' or '.join(SUBSETS)}")
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    source = arguments.source.resolve()
    if source.name not in SUBSETS:
        parser.error(f"{source.name} is not the name of a format: {', '.join(SUBSETS)}")
    write_subset(source, arguments.target, SUBSETS[source.name])


def write_subset(source: Path, target: Path, subset: Subset) -> None:
    """Copy what is kept. Raises SystemExit if the result is larger than the limit."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted((*source.glob("*.safetensors"), *source.glob("*.json"))):
        if "*" in subset.left_out.get(path.name, ()):
            continue
        if path.suffix == ".json":
            _copy_cases(path, target / path.name, subset.every.get(path.name, 1))
        else:
            _copy_tensors(
                path, target / path.name, subset.left_out.get(path.name, ()), subset.first.get(path.name)
            )
    stated = {"left_out": {name: list(patterns) for name, patterns in subset.left_out.items()}}
    (target / "subset.json").write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")
    readme = f"{subset.words}\n| file | left out |\n|---|---|\n{_table(source, subset)}"
    (target / "README.md").write_text(readme, encoding="utf-8")
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{size} bytes in {target}")
    if size > subset.limit:
        raise SystemExit(f"the subset has {size} bytes, more than {subset.limit}")


def _copy_cases(source: Path, target: Path, every: int) -> None:
    """A document; of a list, every n-th case, one a line: a change is then a readable difference."""
    document = json.loads(source.read_text(encoding="utf-8"))
    if isinstance(document, list):
        document = document[::every]
    kept = json.dumps(document, separators=(",", ":"))
    target.write_text(kept.replace('},{"chunks', '},\n{"chunks') + "\n", encoding="utf-8")


OF_FRAMES = ("frames", "landmarks3", "matrix_*", "face_crop", "aligned", "generated01", "restored")


def _copy_tensors(source: Path, target: Path, patterns: tuple[str, ...], first: int | None) -> None:
    """One file without the keys of `patterns`, and with the first frames of what goes through frames."""
    with safe_open(source, "pt") as opened:
        metadata = opened.metadata() or {}
        kept = {
            key: opened.get_tensor(key)
            for key in opened.keys()  # noqa: SIM118 not a mapping
            if not any(fnmatchcase(key, pattern) for pattern in patterns)
        }
    if first is not None:
        kept = {
            key: value[:first].clone() if any(fnmatchcase(key, name) for name in OF_FRAMES) else value
            for key, value in kept.items()
        }
    if source.name == "denoise.safetensors":
        with safe_open(source.parent / SOURCE_OF_HEADS, "pt") as opened:
            metadata["num_heads"] = str(json.loads(opened.metadata()["config"])["num_heads"])
    save_file(kept, target, metadata=metadata or None)


def _table(source: Path, subset: Subset) -> str:
    """Rows for README.md."""
    rows = []
    for path in sorted((*source.glob("*.safetensors"), *source.glob("*.json"))):
        patterns = subset.left_out.get(path.name, ())
        if "*" in patterns:
            left_out = "the whole file"
        elif path.name in subset.every:
            left_out = f"all but every {subset.every[path.name]}th case"
        else:
            left_out = ", ".join(f"`{pattern}`" for pattern in patterns) or "nothing"
        if path.name in subset.first:
            left_out += f"; all but the first {subset.first[path.name]} frames"
        rows.append(f"| {path.name} | {left_out} |\n")
    return "".join(rows)


if __name__ == "__main__":
    main()
