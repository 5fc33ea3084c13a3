"""Write the shipped subset of a folder: `python tests/parity/make_subset.py SOURCE TARGET`.

Numbers are copied, never changed. Whole keys and whole cases are left out; subset.json and README.md of the
target say which.
"""

from __future__ import annotations

import argparse
import json
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

LIMIT = 4_000_000  # bytes, all files of the folder together
SOURCE_OF_HEADS = "dit_in49.safetensors"

# Key patterns that are left out, by file; "*" leaves out the file.
LEFT_OUT: dict[str, tuple[str, ...]] = {
    "denoise.safetensors": ("teacache.*",),
    "dit_in33.safetensors": ("*",),
    "dit_in33_batch2.safetensors": ("*",),
    "dit_in33_bf16_output.safetensors": ("*",),
    "dit_in49.safetensors": ("*",),
    "dit_in65.safetensors": ("*",),
    "latentsync_mask.safetensors": ("*",),
    "lora_in33.safetensors": ("*",),
    "patch_embedding_expansion.safetensors": ("*",),
    "scheduler.safetensors": ("train1000.timesteps_bf16", "train1000.index_after_bf16_rounding"),
    "train_i2v_in33.safetensors": ("*",),
    "train_v2v_in49.safetensors": ("*",),
    "train_v2v_in65.safetensors": ("*",),
    "vae.safetensors": ("*_tiled_*",),
    "wav2vec_features.safetensors": ("input_values", "input_values_padded"),
}
# Every n-th case of a list is kept; 7 meets every size, overlap, budget and length of the 120 recorded plans.
EVERY = {"chunk_plans.json": 7}

_README = """# OmniAvatar numbers, shipped subset

Recorded by running the published implementation (Omni-Avatar/OmniAvatar) with small random weights, on a
CPU in float32. `tests/parity` compares the product with them; `tests/parity/make_subset.py` wrote this
folder from the full one, copying numbers unchanged. What is here is enough to notice, without the full
folder, a wrong audio projection, sound shifted by a frame, a prefix that is not kept, timesteps in the
wrong unit and latents normalised the wrong way. The network is compared through `denoise`, in both modes of
its forward; its hidden states, gradients, wider channel layouts, batches and bf16 need the full folder.

`denoise` states `num_heads` in its metadata, which in the full folder is read from `dit_in49`.

| file | left out |
|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    write_subset(arguments.source, arguments.target)


def write_subset(source: Path, target: Path) -> None:
    """Copy what is kept. Raises SystemExit if the result is larger than LIMIT."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.safetensors")):
        if "*" not in LEFT_OUT.get(path.name, ()):
            _copy_tensors(path, target / path.name)
    for path in sorted(source.glob("*.json")):
        cases = json.loads(path.read_text(encoding="utf-8"))
        kept = json.dumps(cases[:: EVERY.get(path.name, 1)], separators=(",", ":"))
        # One case a line: a change of the recording is then a readable difference.
        (target / path.name).write_text(kept.replace('},{"chunks', '},\n{"chunks') + "\n", encoding="utf-8")
    stated = {"left_out": {name: list(patterns) for name, patterns in LEFT_OUT.items()}}
    (target / "subset.json").write_text(json.dumps(stated, indent=1) + "\n", encoding="utf-8")
    (target / "README.md").write_text(_README + _table(source), encoding="utf-8")
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{size} bytes in {target}")
    if size > LIMIT:
        raise SystemExit(f"the subset has {size} bytes, more than {LIMIT}")


def _copy_tensors(source: Path, target: Path) -> None:
    """One file without its left-out keys."""
    patterns = LEFT_OUT.get(source.name, ())
    with safe_open(source, "pt") as opened:
        metadata = opened.metadata() or {}
        kept = {
            key: opened.get_tensor(key)
            for key in opened.keys()  # noqa: SIM118 not a mapping
            if not any(fnmatchcase(key, pattern) for pattern in patterns)
        }
    if source.name == "denoise.safetensors":
        with safe_open(source.parent / SOURCE_OF_HEADS, "pt") as opened:
            metadata["num_heads"] = str(json.loads(opened.metadata()["config"])["num_heads"])
    save_file(kept, target, metadata=metadata or None)


def _table(source: Path) -> str:
    """Rows for README.md."""
    rows = []
    for path in sorted((*source.glob("*.safetensors"), *source.glob("*.json"))):
        patterns = LEFT_OUT.get(path.name, ())
        if "*" in patterns:
            left_out = "the whole file"
        elif path.name in EVERY:
            left_out = f"all but every {EVERY[path.name]}th case"
        else:
            left_out = ", ".join(f"`{pattern}`" for pattern in patterns) or "nothing"
        rows.append(f"| {path.name} | {left_out} |\n")
    return "".join(rows)


if __name__ == "__main__":
    main()
