import pytest
import torch

from avatarctl.loading.built_in import build_random_modules
from avatarctl.registry import find_model
from avatarctl.registry.networks import CARTOON


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


def test_rows_behind_a_prompt_are_one_row_and_weigh_as_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training reads 512 rows of a text that has a few: the result is that of all 512."""
    from avatarctl.models import omniavatar
    from avatarctl.models.wan_blocks import without_padding

    torch.manual_seed(0)
    dit = omniavatar.OmniAvatarTransformer(**{**CARTOON["dit"], "in_channels": 33})
    text = torch.zeros(2, 512, 32)
    text[0, :20], text[1, :7] = torch.randn(20, 32), torch.randn(7, 32)
    rows, bias = without_padding(text)
    assert rows.shape == (2, 21, 32) and bias is not None and bias.shape == (2, 1, 1, 21)
    inputs = (torch.randn(2, 33, 3, 8, 8), torch.tensor([700.0, 20.0]), text, torch.randn(2, 9, 192))
    short = dit(*inputs, mode="raw")
    monkeypatch.setattr(omniavatar, "without_padding", lambda text: (text, None))
    torch.testing.assert_close(short, dit(*inputs, mode="raw"), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("used", [0, 511, 512])
def test_a_text_without_room_behind_it_stays_as_it_is(used: int) -> None:
    from avatarctl.models.wan_blocks import without_padding

    text = torch.zeros(1, 512, 4)
    text[:, :used] = 1
    rows, bias = without_padding(text)
    assert rows.shape[1] == (1 if used == 0 else 512) and (bias is None) == (used > 0)
