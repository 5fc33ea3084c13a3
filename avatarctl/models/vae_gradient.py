"""The decoder of the VAE with a gradient, for losses on frames.

Sources: spec/omniavatar.md g.5, spec/losses-and-eval.md 4.2, spec/building-blocks.md 2.

`models/vae.py` decodes for people, without a gradient. Here the frames are those of the whole clip, bit for
bit, and only a window of them is part of the graph.

full and checkpoint leave the backward pass to autograd. segment and offload write it out: the decoder goes
frame by frame and cell by cell, so its backward pass can do the same, with one cell's activations at a time.
What has to be known for a frame is what all causal convolutions kept of the frame before, a snapshot; as many
of them are kept as there is room for, and the frames between two are decoded again.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from avatarctl.host import HOST, to_device, to_host
from avatarctl.models.vae import WanVae
from avatarctl.models.vae_cells import Cache, Cell, decoder_cells
from avatarctl.timeline import latent_frames, pixel_frames

__all__ = ["VaeGradient", "decode_with_gradient", "frames_decoded"]

VaeGradient = Literal["full", "checkpoint", "segment", "offload"]

Caches = list[Any]
"""What every causal convolution kept of the latent frame before: a tensor, a word, or None."""

Snapshot = list[list[Cache]]
"""The same by cell of the decoder."""

_ROOM: Final = {"segment": 4, "offload": 8}
"""Snapshots at once, beside that of a window's begin: on the device, and on the host. One of Wan's VAE at
512x512 is 2.3 GiB in float32."""


def decode_with_gradient(
    vae: WanVae,
    latents: Tensor,
    start: int,
    frames: int,
    mode: VaeGradient = "segment",
    host: torch.device = HOST,
) -> Tensor:
    """Pixel frames start .. start + frames - 1 of a clip, float32 [B, 3, frames, 8h, 8w] in [-1, 1].

    latents: the whole clip from its first frame on, normalised, [B, C, T, h, w].
    mode: full keeps all activations; checkpoint what passes between latent frames; segment that of some
    frames, between which it is made again; offload the same on the host, with more of them. All give the same
    numbers.

    The latent frames before the window are decoded without a gradient: the window's frames are right, and
    its gradient ends at the first latent frame that belongs to it. Pixels outside [-1, 1] have none either.
    Raises ValueError for a window that is not inside the clip.
    """
    whole = pixel_frames(latents.shape[2])
    if not 0 <= start < start + frames <= whole:
        raise ValueError(f"{frames} frames from {start} are not inside a clip of {whole}")
    # Pixel frame f belongs to latent frame ceil(f / 4).
    first, last = latent_frames(start), latent_frames(start + frames - 1)
    if mode in ("segment", "offload") and torch.is_grad_enabled() and latents.requires_grad:
        cells = decoder_cells(vae)
        with torch.no_grad():
            snapshot = _passed(cells, latents[:, :, :first], [[None] * cell.slots for cell in cells])
        plan = _Plan(cells, _ROOM[mode], host if mode == "offload" else None)
        decoded: Tensor = _Decoded.apply(plan, snapshot, latents[:, :, first : last + 1])
    else:
        decoded = _plain(vae, latents, first, last, mode == "checkpoint")
    before = start - (pixel_frames(first) if first else 0)
    # Not in place: the gradient needs what was there.
    return decoded[:, :, before : before + frames].clamp(-1, 1)


def _plain(vae: WanVae, latents: Tensor, first: int, last: int, remember: bool) -> Tensor:
    """By autograd, with all activations or a checkpoint for each frame."""
    caches: Caches = [None] * vae.vae._cached_conv_counts["decoder"]
    with torch.no_grad():
        for index in range(first):
            _, caches = _one_frame(vae, latents[:, :, index : index + 1], caches, index == 0)
    parts = []
    for index in range(first, last + 1):
        inputs = (vae, latents[:, :, index : index + 1], caches, index == 0)
        if remember and torch.is_grad_enabled():
            part, caches = checkpoint(_one_frame, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            part, caches = _one_frame(*inputs)
        parts.append(part)
    return torch.cat(parts, dim=2)


def _one_frame(vae: WanVae, latents: Tensor, caches: Caches, is_first: bool) -> tuple[Tensor, Caches]:
    """One latent frame and what the next one needs. The caches that were given are left as they are: a
    second pass over the frame reads them again."""
    kept = list(caches)
    mean, std = vae._statistics(latents)
    hidden = vae.vae.post_quant_conv((latents * std + mean).to(vae._dtype))
    decoded = vae.vae.decoder(hidden, feat_cache=kept, feat_idx=[0], first_chunk=is_first)
    return decoded.to(torch.promote_types(decoded.dtype, torch.float32)), kept


# --- the backward pass, written out ----------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """room: snapshots at once; host: where they wait, None for the device."""

    cells: list[Cell]
    room: int
    host: torch.device | None

    def kept(self, snapshot: Snapshot) -> Snapshot:
        """A snapshot for later."""
        return [self.put_away(own) for own in snapshot]

    def put_away(self, own: list[Cache]) -> list[Cache]:
        """The caches of one cell, or their gradients, for later."""
        host = self.host
        if host is None:
            return own
        return [to_host(each, host) if isinstance(each, Tensor) else each for each in own]

    def brought(self, own: list[Cache], device: torch.device) -> list[Cache]:
        """The same where the cell computes."""
        if self.host is None:
            return list(own)
        return [to_device(each, device) if isinstance(each, Tensor) else each for each in own]


@functools.cache
def frames_decoded(frames: int, room: int) -> tuple[int, int]:
    """How many frames are decoded to walk back over `frames` of them from a snapshot at their begin, with
    room for that many more; and behind how many of them the next snapshot is best taken.

    Walking back over n frames means: decode up to m, keep a snapshot, walk back over the n - m behind it with
    less room, forget it, walk back over the first m. (The schedule of checkpoints of Griewank and Walther,
    "Algorithm 799: revolve", 2000, found here by trying all m.) The frame itself is decoded in any case.
    """
    if frames <= 1:
        return 0, 0
    if room == 0:
        return frames * (frames - 1) // 2, 0
    tried = (
        (behind + frames_decoded(frames - behind, room - 1)[0] + frames_decoded(behind, room)[0], behind)
        for behind in range(1, frames)
    )
    return min(tried)


class _Decoded(torch.autograd.Function):
    """Latent frames of a window [B, C, n, h, w] -> their pixel frames, float32."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, snapshot: Snapshot, latents: Tensor) -> Tensor:
        ctx.plan, ctx.begin = plan, plan.kept(snapshot)
        ctx.save_for_backward(latents)
        ctx.starts = {0: ctx.begin}
        count, room, due, done = latents.shape[2], plan.room, 0, 0
        frames: Tensor | None = None
        for index in range(count):
            if index == due:
                if index:
                    ctx.starts[index] = plan.kept(snapshot)
                    room -= 1
                due += frames_decoded(count - index, room)[1] if room else 0
            frame, snapshot = _one(plan.cells, latents[:, :, index : index + 1], snapshot)
            if frames is None:
                total = frame.shape[2] + 4 * (count - 1)
                frames = _longer(frame, total)
            frames[:, :, done : done + frame.shape[2]] = frame
            done += frame.shape[2]
            del frame
        assert frames is not None
        return frames

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        (latents,) = ctx.saved_tensors
        walk = _Walk(ctx.plan, latents, gradient, ctx.starts)
        ctx.starts = ctx.begin = None
        walk.back(0, latents.shape[2], ctx.plan.room)
        return None, None, walk.found


def _longer(frame: Tensor, total: int) -> Tensor:
    """Room for `total` frames, with the strides that joining them would give: judges sum in their order."""
    last = torch.channels_last_3d
    layout = last if frame.is_contiguous(memory_format=last) else torch.contiguous_format
    shape = (*frame.shape[:2], total, *frame.shape[3:])
    return torch.empty(shape, dtype=frame.dtype, device=frame.device, memory_format=layout)


class _Walk:
    """From the last frame to the first. starts: snapshots by the frame that follows them, forgotten when
    they have served."""

    def __init__(self, plan: _Plan, latents: Tensor, gradient: Tensor, starts: dict[int, Snapshot]) -> None:
        self._plan, self._latents, self._gradient, self._starts = plan, latents, gradient, starts
        self.found = torch.zeros_like(latents)
        self._of_caches: list[list[Tensor | None]] = [[None] * cell.slots for cell in plan.cells]
        self._stop = gradient.shape[2]

    @torch.no_grad()
    def back(self, first: int, frames: int, room: int) -> None:
        """Over `frames` of them from `first` on."""
        while frames > 1:
            behind = frames_decoded(frames, room)[1] or frames - 1
            between = first + behind
            if between not in self._starts:
                start = self._starts[first]
                snapshot = [self._plan.brought(own, self._latents.device) for own in start]
                del start
                for index in range(first, between):
                    snapshot = _one(self._plan.cells, self._frame(index), snapshot)[1]
                self._starts[between] = self._plan.kept(snapshot)
                del snapshot
            self.back(between, frames - behind, max(room - 1, 0))
            frames = behind
        self._one_frame(first)

    def _frame(self, index: int) -> Tensor:
        return self._latents[:, :, index : index + 1]

    def _one_frame(self, index: int) -> None:
        """The gradient of one frame's latents, and of the caches that it was given."""
        cells, latents = self._plan.cells, self._frame(index)
        snapshot = self._starts.pop(index)
        inputs, x = [], latents
        for cell, own in zip(cells, snapshot, strict=True):
            inputs.append(x)
            if cell is not cells[-1]:
                x = cell.run(x, self._plan.brought(own, latents.device))
        del x
        length = 1 if snapshot[0][0] is None else 4
        gradient = self._gradient[:, :, self._stop - length : self._stop]
        self._stop -= length
        for place in range(len(cells) - 1, -1, -1):
            own = self._plan.brought(snapshot[place], latents.device)
            snapshot[place] = []
            x = inputs.pop()
            of_caches = self._plan.brought(self._of_caches[place], latents.device)
            self._of_caches[place] = []
            gradient, of_caches = _back_through(cells[place], x, own, gradient, of_caches)
            self._of_caches[place] = self._plan.put_away(of_caches)
        self.found[:, :, index : index + 1] = gradient


def _one(cells: list[Cell], latents: Tensor, snapshot: Snapshot) -> tuple[Tensor, Snapshot]:
    """One latent frame's pixels, and the snapshot behind it; the one before is used up, cell by cell, so that
    what nobody keeps of it makes room."""
    after, x = [], latents
    for place, cell in enumerate(cells):
        caches, snapshot[place] = list(snapshot[place]), []
        x = cell.run(x, caches)
        after.append(caches)
    return x, after


def _passed(cells: list[Cell], latents: Tensor, snapshot: Snapshot) -> Snapshot:
    """Behind some latent frames."""
    for index in range(latents.shape[2]):
        snapshot = _one(cells, latents[:, :, index : index + 1], snapshot)[1]
    return snapshot


def _back_through(
    cell: Cell, x: Tensor, caches: list[Cache], gradient: Tensor, of_caches: list[Tensor | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of a cell's input and of the caches that it was given, from those of what it made."""
    leaf = x.detach().requires_grad_()
    given = [each.detach().requires_grad_() if isinstance(each, Tensor) else each for each in caches]
    with torch.enable_grad():
        made, after = leaf, list(given)
        made = cell.run(leaf, after)
    outputs, gradients = [made], [gradient]
    for each, own in zip(after, of_caches, strict=True):
        if own is not None:
            outputs.append(each)
            gradients.append(own)
    of_caches.clear()
    del made, after
    leaves = [leaf, *(each for each in given if isinstance(each, Tensor))]
    torch.autograd.backward(outputs, gradients)
    assert leaf.grad is not None
    del outputs, gradients, leaves
    return leaf.grad, [each.grad if isinstance(each, Tensor) else None for each in given]
