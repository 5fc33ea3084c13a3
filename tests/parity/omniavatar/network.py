"""The diffusion transformer and its audio packing (spec/omniavatar.md a)."""

from __future__ import annotations

import torch
from torch import Tensor

from avatarctl.models.omniavatar import AudioPack, OmniAvatarTransformer
from avatarctl.models.precision import cast
from avatarctl.weights.layouts import OMNIAVATAR

from ..golden import Checks, Reader
from .building import load, transformer

checks = Checks()

SINGLE = ("dit_in33.safetensors", "dit_in49.safetensors", "dit_in65.safetensors")
BATCH = "dit_in33_batch2.safetensors"
BF16 = "dit_in33_bf16_output.safetensors"
_NEEDS = ("state.*", "input.*")
_OUTPUT = 1e-4  # absolute, on outputs up to 5
_GRADIENT = 1e-3  # of the norm


def _inputs(reader: Reader) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x with y behind it, timestep, context, audio: the arguments of `forward`."""
    taken = {name: reader.take(f"input.{name}") for name in ("x", "y", "timestep", "context", "audio_emb")}
    return (
        torch.cat([taken["x"], taken["y"]], dim=1),
        taken["timestep"],
        taken["context"],
        taken["audio_emb"],
    )


def _prepared(model: OmniAvatarTransformer, x: Tensor, t: Tensor, context: Tensor, audio: Tensor) -> Tensor:
    ready = model(mode="prepare", text=context, audio=audio, grid=tuple(x.shape[2:]))
    return model(x, t, {"full": ready}, mode="denoise")["full"]


@checks("audio_pack.safetensors", compares=("output",), needs=("state.*", "input"))
def audio_pack(reader: Reader) -> None:
    state, features = reader.group("state."), reader.take("input")
    hidden, packed = state["proj.weight"].shape
    pack = AudioPack(packed // 4, hidden)
    load(pack, state, reader)
    out = pack(features[..., 0, 0].transpose(1, 2))  # recorded as videos of one pixel
    reader.compare("output", out[:, :, None, None], atol=1e-5)


@checks(*SINGLE, compares=("output",), needs=_NEEDS)
@torch.no_grad()
def raw_forward(reader: Reader) -> None:
    reader.compare("output", transformer(reader)(*_inputs(reader)), atol=_OUTPUT)


@checks(*SINGLE, compares=("output",), needs=_NEEDS)
@torch.no_grad()
def prepared_forward(reader: Reader) -> None:
    reader.compare("output", _prepared(transformer(reader), *_inputs(reader)), atol=_OUTPUT)


def _hidden(reader: Reader, which: str) -> None:
    """Compare hidden.blockN.input (after the audio residual: what norm1 sees) or .output."""
    model, seen = transformer(reader), dict[str, Tensor]()
    for key in reader.keys(f"hidden.block*.{which}"):
        block = model.blocks[int(key.split(".")[1].removeprefix("block"))]
        if which == "input":
            block.norm1.register_forward_pre_hook(lambda _, args, key=key: seen.__setitem__(key, args[0]))
        else:
            block.register_forward_hook(lambda _, __, out, key=key: seen.__setitem__(key, out))
    with torch.no_grad():
        model(*_inputs(reader))
    for key, value in seen.items():
        reader.compare(key, value, atol=_OUTPUT)


@checks(*SINGLE, compares=("hidden.block*.input",), needs=_NEEDS)
def block_inputs(reader: Reader) -> None:
    _hidden(reader, "input")


@checks(*SINGLE, compares=("hidden.block*.output",), needs=_NEEDS)
def block_outputs(reader: Reader) -> None:
    _hidden(reader, "output")


def _gradients(reader: Reader, *, checkpointing: bool) -> None:
    model = transformer(reader).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    (model(*_inputs(reader)) * reader.take("grad_seed_weights")).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in OMNIAVATAR.key_map.rename_to_original(gradients).items():
        if reader.keys(f"grad.{name}"):
            reader.compare(f"grad.{name}", gradient, relative_l2=_GRADIENT)


@checks(*SINGLE, compares=("grad.*",), needs=(*_NEEDS, "grad_seed_weights"))
def gradients(reader: Reader) -> None:
    _gradients(reader, checkpointing=False)


@checks(*SINGLE, compares=("grad.*",), needs=(*_NEEDS, "grad_seed_weights"))
def gradients_with_checkpointing(reader: Reader) -> None:
    _gradients(reader, checkpointing=True)


@checks(*SINGLE, BATCH, "denoise.safetensors", compares=("state.*",))
def names_round_trip(reader: Reader) -> None:
    """Original names in, through the network, original names out: the same file."""
    exported = OMNIAVATAR.key_map.rename_to_original(transformer(reader).state_dict())
    assert {f"state.{key}" for key in exported} == set(reader.keys("state.*"))
    for key, value in exported.items():
        reader.compare(f"state.{key}", value)


@checks(BATCH, compares=("output", "output_batched"), needs=_NEEDS)
@torch.no_grad()
def batch(reader: Reader) -> None:
    """A batch gives what its samples give one by one, in both modes."""
    model, inputs = transformer(reader), _inputs(reader)
    singles = [model(*(value[i : i + 1] for value in inputs)) for i in range(len(inputs[0]))]
    for key in ("output", "output_batched"):
        reader.compare(key, torch.cat(singles), atol=_OUTPUT)
        reader.compare(key, model(*inputs), atol=_OUTPUT)
        reader.compare(key, _prepared(model, *inputs), atol=_OUTPUT)


@checks(BF16, compares=("output_fp32",))
@torch.no_grad()
def float32_reference(reader: Reader) -> None:
    source = reader.folder.open("dit_in33.safetensors")
    reader.compare("output_fp32", transformer(source)(*_inputs(source)), atol=_OUTPUT)


@checks(BF16, compares=("output_bf16", "output_fp32"), needs=("input.timestep_bf16",))
@torch.no_grad()
def bf16_forward(reader: Reader) -> None:
    """5 % of the norm from the reference's bf16 and float32 runs, with the exact and the rounded timestep."""
    source = reader.folder.open("dit_in33.safetensors")
    model = cast(transformer(source), torch.bfloat16)
    x, timestep, context, audio = (value.to(torch.bfloat16) for value in _inputs(source))
    assert torch.equal(reader.take("input.timestep_bf16"), timestep), "not the inputs of dit_in33"
    exact = source.take("input.timestep")
    assert exact.dtype == torch.float32
    for t in (exact, timestep.float()):
        out = model(x, t, context, audio)
        assert out.dtype == torch.bfloat16
        reader.compare("output_bf16", out, relative_l2=0.05)
        reader.compare("output_fp32", out, relative_l2=0.05)
