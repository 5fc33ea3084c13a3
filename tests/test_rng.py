import torch

from avatarctl.rng import latent_noise, stable_hash


def test_a_window_sees_the_numbers_of_the_whole() -> None:
    whole = latent_noise(42, (7,), 0, 10, (4, 2, 3))
    assert torch.equal(latent_noise(42, (7,), 3, 4, (4, 2, 3)), whole[:, :, 3:7])
    assert whole.shape == (1, 4, 10, 2, 3) and abs(whole.mean()) < 0.3 and 0.7 < whole.std() < 1.3


def test_keys_do_not_run_into_each_other() -> None:
    keys = [("ab", "c"), ("a", "bc"), (1,), ("1",), (b"1",), (1, 1), (11,), ()]
    assert len({stable_hash(*key) for key in keys}) == len(keys)
    assert stable_hash("known", 1) == stable_hash("known", 1) < 2**63


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    latent_noise(1, (2,), 0, 3, (1, 1, 1))
    assert torch.equal(torch.rand(3), expected)
