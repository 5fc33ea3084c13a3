"""What a video-to-video model is shown: mouth mask and channels of a chunk (spec/omniavatar.md g.3)."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from avatarctl.conditioning.masking import keep_map, mask_tensor, mouth_mask
from avatarctl.families.omniavatar import OmniAvatar
from avatarctl.families.omniavatar_objective import Encoded

from ..golden import Checks, Reader

checks = Checks()

MASK = "latentsync_mask.safetensors"
STEPS = ("train_v2v_in49.safetensors", "train_v2v_in65.safetensors")


@checks(MASK, compares=("latent_mask_keep.*", "latent_mask_generate.*"))
def drawn_mask_at_latent_size(reader: Reader) -> None:
    mask = mask_tensor(mouth_mask())
    for key in reader.keys("latent_mask_keep.*"):
        size = tuple(map(int, key.rpartition(".")[2].split("x")))
        keep = keep_map(mask, size)[0, 0]
        reader.compare(key, keep)
        reader.compare(key.replace("keep", "generate"), 1 - keep)


@checks(MASK, compares=("pixel_mask_keep_512.*",), needs=("mask_image_uint8",))
def keep_map_of_the_published_mask(reader: Reader) -> None:
    """All three published ways of resizing give one map of this mask, and so does ours."""
    keep = keep_map(mask_tensor(reader.take("mask_image_uint8").numpy()), (512, 512))[0, 0]
    for key in reader.keys("pixel_mask_keep_512.*"):
        reader.compare(key, keep.to(torch.uint8))


@checks(MASK, compares=(), needs=("mask_image_uint8",))
def drawn_mask_is_the_published_geometry(reader: Reader) -> None:
    """A drawing of our own: edges are lines between a few corners, a pixel off here and there."""
    published = reader.take("mask_image_uint8").numpy()
    assert (mouth_mask() != published).sum() <= 0.0005 * published.size


def _samples(reader: Reader, data: str, batch: int) -> Tensor | None:
    """The first `batch` samples of what the steps were made from; None where a layout has no such data."""
    keys = reader.keys(f"*.data.precomputed_{data}")
    return reader.take(keys[0])[:batch] if keys else None


def _conditions(reader: Reader) -> None:
    """By the family's own code, from recorded latents and our drawn mask."""
    for key in reader.keys("*.y"):
        run = json.loads(reader.metadata[key.removesuffix(".y")])
        batch = run["B"]
        latents, masked = (_samples(reader, f"{name}_latents", batch) for name in ("input", "masked"))
        sequence = _samples(reader, "ref_sequence", batch) if run["ref_sequence"] else None
        assert latents is not None and masked is not None
        given = 0 if run["mask_all_frames"] else 1
        condition = OmniAvatar().build_condition(
            Encoded(
                reference=latents[:, :, :1],
                given=latents[:, :, :given] if given else None,
                counts=(given,) * batch,
                audio=torch.zeros(batch, 1, 1),
                text={},
                frames=latents.shape[2],
                keep=keep_map(mask_tensor(mouth_mask()), (latents.shape[3], latents.shape[4])),
                masked=masked,
                sequence=sequence,
            )
        )
        reader.compare(key, condition.channels)
        assert condition.fixed_mask is not None and condition.clean is not None
        # What is frozen is what is given, not what the mask keeps in the corner of every frame.
        assert condition.fixed_mask.flatten(1).sum(1).tolist() == [given] * batch
        assert torch.equal(condition.clean[:, :, :given], latents[:, :, :given])


_LATENTS = ("*.data.precomputed_input_latents", "*.data.precomputed_masked_latents")


@checks(STEPS[0], compares=("*.y",), needs=_LATENTS)
def condition_of_a_chunk_of_video(reader: Reader) -> None:
    _conditions(reader)


@checks(STEPS[1], compares=("*.y",), needs=(*_LATENTS, "*.data.precomputed_ref_sequence"))
def condition_with_a_reference_sequence(reader: Reader) -> None:
    _conditions(reader)
