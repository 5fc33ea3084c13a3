import torch

from avatarctl.loading.built_in import build_random_modules
from avatarctl.models.precision import cast
from avatarctl.registry import find_model

KEPT = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")


def test_islands_stay_float32_and_everything_else_follows() -> None:
    dit = cast(build_random_modules(find_model("cartoon-i2v")).dit, torch.bfloat16)
    for name, parameter in dit.named_parameters():
        island = any(part in KEPT for part in name.split("."))
        assert parameter.dtype == (torch.float32 if island else torch.bfloat16), name


def test_a_bfloat16_transformer_stays_near_float32() -> None:
    modules = build_random_modules(find_model("cartoon-i2v"))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 33, 3, 8, 8, generator=generator)
    text, audio = torch.randn(1, 7, 32, generator=generator), torch.randn(1, 9, 192, generator=generator)
    t = torch.tensor([857.692])
    with torch.no_grad():
        exact = modules.dit(x, t, text, audio)
        rounded = cast(modules.dit, torch.bfloat16)(x, t, text, audio).float()
    assert (rounded - exact).norm() / exact.norm() < 0.02
