import pytest
import torch

from avatarctl.errors import ExtraMissing
from avatarctl.loading.built_in import build_random_modules
from avatarctl.models.attention import choose_attention, use_attention
from avatarctl.models.wan_blocks import AvatarAttnProcessor
from avatarctl.registry import find_model

CPU = torch.device("cpu")


def test_auto_is_native_where_nothing_faster_runs() -> None:
    assert choose_attention("auto", CPU, torch.bfloat16, 64) == "native"


@pytest.mark.parametrize("name", ["flash", "flash3", "sage"])
def test_a_named_kernel_that_does_not_run_here_ends_with_exit_4(name: str) -> None:
    with pytest.raises(ExtraMissing, match=f"{name} attention does not run here") as caught:
        choose_attention(name, CPU, torch.bfloat16, 64)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


def test_every_attention_layer_is_told() -> None:
    dit = build_random_modules(find_model("cartoon-i2v")).dit
    use_attention(dit, "native")
    processors = [m.processor for m in dit.modules() if hasattr(m, "processor")]
    assert len(processors) == 12
    assert all(isinstance(p, AvatarAttnProcessor) and p.backend == "native" for p in processors)
