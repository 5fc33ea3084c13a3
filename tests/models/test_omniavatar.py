import pytest
import torch

from avatarctl.loading.built_in import build_random_modules
from avatarctl.registry import find_model


@pytest.mark.parametrize("frames", [5, 13, 21])
def test_audio_of_another_length_than_the_video_is_refused(frames: int) -> None:
    """48 tokens divide by 2, 4 and 6 frames as well: without a check, audio would meet the wrong ones."""
    dit = build_random_modules(find_model("cartoon-i2v")).dit
    x, text = torch.zeros(1, 33, 3, 8, 8), torch.zeros(1, 4, 32)
    with pytest.raises(ValueError, match="latent frames for a video of 3"):
        dit(x, torch.tensor([500.0]), text, torch.zeros(1, frames, 192))


def test_an_unknown_mode_is_refused() -> None:
    dit = build_random_modules(find_model("cartoon-i2v")).dit
    with pytest.raises(ValueError, match="mode is one of raw, prepare, denoise"):
        dit(mode="prepar")


def test_building_leaves_every_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    build_random_modules(find_model("cartoon-i2v"))
    assert torch.equal(torch.rand(2), expected)
