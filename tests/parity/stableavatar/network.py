"""The diffusion transformer (spec/stableavatar.md a): one forward, its parts, its gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from avatarctl.models.stableavatar import PreparedStable, StableAvatarTransformer
from avatarctl.models.vocal_projector import vocal_windows
from avatarctl.weights.layouts import STABLEAVATAR

from ..golden import Checks, Reader
from .building import STATE, compare_output, latents_and_condition, padded_text, setting, transformer
from .stand_ins import BRANCHES

checks = Checks()

FILE = "set2_transformer.safetensors"
_GRADIENT = 1e-5  # of the norm
_NEEDS = ("x", "y", "t", "context_pos", "clip_fea", "vocal_embeddings")


def _arguments(reader: Reader, vocal: str = "vocal_embeddings") -> dict[str, Tensor]:
    """Of a raw forward of one sample with the positive context."""
    return {
        "hidden_states": latents_and_condition(reader),
        "timestep": reader.take("t"),
        "encoder_hidden_states": padded_text(reader, "context_pos"),
        "image": reader.take("clip_fea"),
        "vocal": reader.take(vocal),
    }


def _prepared(model: StableAvatarTransformer, given: dict[str, Tensor], frames: int) -> PreparedStable:
    return model(
        mode="prepare",
        text=given["encoder_hidden_states"],
        image=given["image"],
        grid=tuple(given["hidden_states"].shape[2:]),
        vocal=given["vocal"],
        frames=frames,
    )


@checks(FILE, compares=("b1.out",), needs=_NEEDS)
@torch.no_grad()
def raw_forward(reader: Reader) -> None:
    compare_output(reader, "b1.out", transformer(reader)(**_arguments(reader)))


@checks(FILE, compares=("b1.out",), needs=_NEEDS)
@torch.no_grad()
def prepared_forward(reader: Reader) -> None:
    model, given = transformer(reader), _arguments(reader)
    ready = {"full": _prepared(model, given, setting(reader, "clip_frames"))}
    out = model(given["hidden_states"], given["timestep"], ready, mode="denoise")["full"]
    compare_output(reader, "b1.out", out)


@checks(FILE, compares=("b1.out",), needs=_NEEDS)
@torch.no_grad()
def samples_of_a_batch(reader: Reader) -> None:
    """Two samples in a batch are independent; the reference takes one only."""
    given = _arguments(reader)
    other = {name: value.flip(1) for name, value in given.items() if name != "timestep"}
    other["timestep"] = given["timestep"] / 2
    both = transformer(reader)(**{name: torch.cat([other[name], given[name]]) for name in given})
    compare_output(reader, "b1.out", both[1:])


_PARTS: dict[str, Callable[[StableAvatarTransformer], nn.Module]] = {
    "time_embedding": lambda model: model.condition_embedder.time_embedder,
    "time_projection": lambda model: model.condition_embedder.time_proj,
    "text_embedding": lambda model: model.condition_embedder.text_embedder,
    "img_emb": lambda model: model.condition_embedder.image_embedder,
    "patch": lambda model: model.patch_embedding,
    "vocal_context": lambda model: model.vocal_projector,
}


@torch.no_grad()
def _compare_parts(reader: Reader, *patterns: str) -> None:
    """What the modules of one forward give."""
    model, seen = transformer(reader), dict[str, Tensor]()

    def note(module: nn.Module, name: str) -> None:
        module.register_forward_hook(lambda _, __, out: seen.__setitem__(f"b1.{name}", out))

    for name, find in _PARTS.items():
        note(find(model), name)
    for index, block in enumerate(model.blocks):
        note(block, f"block{index}")
    model(**_arguments(reader))
    for key in (key for pattern in patterns for key in reader.keys(f"b1.{pattern}")):
        compare_output(reader, key, seen[key])


@checks(FILE, compares=("b1.block*",), needs=_NEEDS)
def blocks(reader: Reader) -> None:
    _compare_parts(reader, "block*")


@checks(FILE, compares=("b1.time_embedding", "b1.time_projection", "b1.text_embedding"), needs=_NEEDS)
def time_and_text(reader: Reader) -> None:
    _compare_parts(reader, "time_embedding", "time_projection", "text_embedding")


@checks(FILE, compares=("b1.patch", "b1.img_emb"), needs=_NEEDS)
def patches_and_image_tokens(reader: Reader) -> None:
    _compare_parts(reader, "patch", "img_emb")


@checks(FILE, compares=("b1.vocal_context",), needs=_NEEDS)
def audio_of_the_frames(reader: Reader) -> None:
    _compare_parts(reader, "vocal_context")


@checks(FILE, compares=("b1.vocal_context_lens",), needs=("vocal_embeddings",))
def lengths_of_the_windows(reader: Reader) -> None:
    tokens = reader.take("vocal_embeddings").shape[1]
    valid = vocal_windows(tokens, setting(reader, "clip_frames"))[1]
    reader.compare("b1.vocal_context_lens", valid.sum(dim=1))


@checks(FILE, compares=("zero_audio.out",), needs=_NEEDS)
@torch.no_grad()
def silence(reader: Reader) -> None:
    given = _arguments(reader)
    given["vocal"] = torch.zeros_like(given["vocal"])
    compare_output(reader, "zero_audio.out", transformer(reader)(**given))


@checks(FILE, compares=("clip_level.out",), needs=_NEEDS)
@torch.no_grad()
def audio_of_the_whole_clip(reader: Reader) -> None:
    out = transformer(reader)(**_arguments(reader), clip_level=True)
    compare_output(reader, "clip_level.out", out)


def _short(reader: Reader) -> tuple[dict[str, Tensor], dict[str, int]]:
    """A window that is padded with zero tokens, and the audio of a full one: arguments and options."""
    given = _arguments(reader, "short.vocal_embeddings")
    frames = reader.take("short.out").shape[2]
    given["hidden_states"] = given["hidden_states"][:, :, :frames]
    return given, {
        "frames": setting(reader, "clip_frames"),
        "padded_frames": reader.take("x").shape[2],
    }


@checks(FILE, compares=("short.out",), needs=("short.vocal_embeddings", *_NEEDS[:5]))
@torch.no_grad()
def short_window(reader: Reader) -> None:
    given, options = _short(reader)
    compare_output(reader, "short.out", transformer(reader)(**given, **options))


@checks(FILE, compares=("short.out",), needs=("short.vocal_embeddings", *_NEEDS[:5]))
@torch.no_grad()
def short_window_prepared(reader: Reader) -> None:
    model = transformer(reader)
    given, options = _short(reader)
    ready = {"full": _prepared(model, given, options["frames"])}
    out = model(
        given["hidden_states"],
        given["timestep"],
        ready,
        mode="denoise",
        padded_frames=options["padded_frames"],
    )
    compare_output(reader, "short.out", out["full"])


def triple(
    model: StableAvatarTransformer, given: dict[str, Tensor], negative: Tensor, frames: int
) -> dict[str, PreparedStable]:
    """Prepared tensors of the recorded batch of three."""
    full = _prepared(model, given, frames)
    used = replace(full, text=model(mode="prepare", text=negative).text)
    return dict(zip(BRANCHES, (replace(used, vocal=None), used, full), strict=True))


def _compare_triple(reader: Reader, *, batched: bool) -> None:
    model, given = transformer(reader), _arguments(reader)
    blocks: list[Any] = []
    contexts: list[Tensor] = []
    # A copy: the network empties the list of a block when it has entered the next.
    model.blocks[0].register_forward_hook(
        lambda _, __, out: blocks.append(list(out) if isinstance(out, list) else out)
    )
    model.vocal_projector.register_forward_hook(lambda _, __, out: contexts.append(out))
    ready = triple(model, given, padded_text(reader, "context_neg"), setting(reader, "clip_frames"))
    blocks.clear()  # `prepare` enters the blocks for their keys and values
    velocities: dict[str, Any] = model(
        given["hidden_states"], given["timestep"], ready, mode="denoise", batched=batched
    )
    compare_output(reader, "cfg3.out", torch.cat([velocities[name] for name in BRANCHES]))
    assert len(contexts) == 1, "the projector runs once for the three"
    compare_output(reader, "cfg3.vocal_context", contexts[0])
    mixed, seen = blocks
    assert len(mixed) == 1, "the first self-attention runs once for the three"
    if batched:
        # The branch without audio stands last.
        compare_output(reader, "cfg3.block0", seen.roll(1, dims=0))
    else:
        compare_output(reader, "cfg3.block0", torch.cat(seen))


_TRIPLE = {"compares": ("cfg3.*",), "needs": (*_NEEDS, "context_neg")}


@checks(FILE, **_TRIPLE)
@torch.no_grad()
def three_branches(reader: Reader) -> None:
    _compare_triple(reader, batched=False)


@checks(FILE, **_TRIPLE)
@torch.no_grad()
def three_branches_in_a_batch(reader: Reader) -> None:
    _compare_triple(reader, batched=True)


def _compare_gradients(reader: Reader, *, checkpointing: bool) -> None:
    model = transformer(reader).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    weight = reader.take("grad_weight")
    loss = (model(**_arguments(reader)) * weight).sum()
    loss.backward()
    reader.compare("b1.loss", loss, atol=1e-5 * weight.numel() ** 0.5)
    # Biases of keys that no norm follows have no gradient but rounding: softmax does not see them.
    least = 1e-3 * max(float(reader.take(key).norm()) for key in reader.keys("grad.*"))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, gradient in STABLEAVATAR.key_map.rename_to_original(gradients).items():
        assert gradient is not None and bool(torch.isfinite(gradient).all()), f"{name}: no gradient"
        if not reader.keys(f"grad.{name}"):
            continue
        if float(reader.take(f"grad.{name}").norm()) < least:
            reader.compare(f"grad.{name}", gradient, atol=_GRADIENT * least)
        else:
            reader.compare(f"grad.{name}", gradient, relative_l2=_GRADIENT)


_LEARNT = {"compares": ("grad.*", "b1.loss"), "needs": (*_NEEDS, "grad_weight")}


@checks(FILE, **_LEARNT)
def gradients(reader: Reader) -> None:
    _compare_gradients(reader, checkpointing=False)


@checks(FILE, **_LEARNT)
def gradients_with_checkpointing(reader: Reader) -> None:
    _compare_gradients(reader, checkpointing=True)


@checks(STATE, compares=("*",))
def names_round_trip(reader: Reader) -> None:
    """Original names in, through the network, original names out: the same file."""
    exported = STABLEAVATAR.key_map.rename_to_original(transformer(reader).state_dict())
    assert exported.keys() == set(reader.keys("*"))
    for key, value in exported.items():
        reader.compare(key, value)
