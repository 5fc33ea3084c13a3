"""Judges of auxiliary losses from files as people have them, or made up for the built-in models."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from avatarctl.config import Model
from avatarctl.errors import AvatarctlError, ExtraMissing, PathNotFound, UnusableWeights, WeightsMissing
from avatarctl.events import Event, silent
from avatarctl.loading import judges as loader
from avatarctl.loading.judges import Judges, LossName, find_judges, judges_missing, load_judges
from avatarctl.loading.sources import find_sources
from avatarctl.models.lpips_vgg import LpipsVgg
from avatarctl.models.stable_syncnet import StableSyncNet
from avatarctl.models.videomae import VideoMae
from avatarctl.registry import ROWS, find_model

CARTOON = find_model("cartoon-v2v")
BIG = find_model("omniavatar-1.3b")
CPU = torch.device("cpu")
NAMES: tuple[LossName, ...] = ("sync", "lpips", "trepa")
WIDTHS = (4, 8, 8, 8, 8)
CLASSES = {"syncnet": StableSyncNet, "videomae": VideoMae}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published networks by other sizes: files of the real ones have gigabytes."""
    sizes = CARTOON.network
    monkeypatch.setattr(loader, "PUBLISHED_SYNCNET", sizes["syncnet"])
    published = {name: value for name, value in sizes["videomae"].items() if name != "classes"}
    monkeypatch.setattr(loader, "PUBLISHED_VIDEOMAE", published)


def state(part: str) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        name: tensor.clone() for name, tensor in CLASSES[part](**CARTOON.network[part]).state_dict().items()
    }


def load(model: Model, losses: tuple[LossName, ...], **more: Any) -> Judges:
    return load_judges(BIG, find_judges(BIG, model, losses), losses, CPU, silent, **more)


@pytest.mark.parametrize(
    ("part", "loss", "wrapper"),
    [("syncnet", "sync", "state_dict"), ("syncnet", "sync", ""), ("videomae", "trepa", "module"),
     ("videomae", "trepa", "model")],
)  # fmt: skip
def test_published_files_are_read_bare_and_wrapped(
    small: None, tmp_path: Path, part: str, loss: LossName, wrapper: str
) -> None:
    """Beside the tensors of StableSyncNet lie lists of its training; half precision becomes float32."""
    held = {name: tensor.half() for name, tensor in state(part).items()}
    file = tmp_path / "weights.pth"
    torch.save({wrapper: held, "train_loss_list": [0.5, 0.4], "global_step": 7} if wrapper else held, file)
    network = getattr(load(Model(weights={part: str(file)}), (loss,)), loss)
    assert not network.training
    for name, tensor in network.state_dict(keep_vars=True).items():
        assert tensor.dtype == torch.float32 and not tensor.requires_grad
        assert torch.equal(tensor, held[name].float()), name


def test_a_head_of_other_classes_does_not_matter(small: None, tmp_path: Path) -> None:
    held = state("videomae") | {"head.weight": torch.zeros(31, 48), "head.bias": torch.zeros(31)}
    save_file(held, tmp_path / "mae.safetensors")
    assert load(Model(weights={"videomae": str(tmp_path / "mae.safetensors")}), ("trepa",)).trepa is not None


def vgg(names: str) -> dict[str, Tensor]:
    """A trunk of published sizes under torchvision's names, or LPIPS'."""
    torch.manual_seed(2)
    trunk = LpipsVgg().state_dict()
    held = {name: tensor.clone() for name, tensor in trunk.items() if name.startswith("features.")}
    if names == "torchvision":
        return held | {"classifier.0.weight": torch.zeros(4, 4), "classifier.0.bias": torch.zeros(4)}
    levels = [(1, 0, 3), (2, 4, 8), (3, 9, 15), (4, 16, 22), (5, 23, 29)]
    renamed = {
        f"net.slice{level}.{name.removeprefix('features.')}": tensor
        for name, tensor in held.items()
        for level, first, last in levels
        if first <= int(name.split(".")[1]) <= last
    }
    return renamed | {"lin0.model.1.weight": torch.ones(1, 64, 1, 1), "scaling_layer.shift": torch.zeros(3)}


def test_a_trunk_by_either_names_is_the_same_and_gets_the_published_heads(tmp_path: Path) -> None:
    found = []
    for names in ("torchvision", "lpips"):
        torch.save(vgg(names), tmp_path / f"{names}.pth")
        judge = load(Model(weights={"lpips_vgg": str(tmp_path / f"{names}.pth")}), ("lpips",)).lpips
        assert isinstance(judge, LpipsVgg)
        found.append(judge.state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    heads = [found[0][f"lin{level}.model.1.weight"] for level in range(5)]
    assert [head.shape[1] for head in heads] == [64, 128, 256, 512, 512]
    assert all(head.min() >= 0 and head.max() > 0 for head in heads)


def test_a_file_that_does_not_fit_is_refused_with_what_was_expected(small: None, tmp_path: Path) -> None:
    wrong = state("syncnet")
    wrong["audio_encoder.conv_in.weight"] = torch.zeros(32, 1, 5, 5)
    lacking = state("videomae")
    del lacking["fc_norm.weight"]
    cases: list[tuple[LossName, dict[str, Tensor], str]] = [
        ("sync", wrong, "audio_encoder.conv_in.weight has shape"),
        ("trepa", lacking, "1 tensor is missing: fc_norm.weight"),
        ("trepa", state("syncnet"), "tensors are missing"),
        ("lpips", {"features.0.weight": torch.zeros(64, 3, 3, 3)}, "features.0.bias"),
    ]
    for loss, tensors, what in cases:
        save_file(tensors, tmp_path / "file.safetensors")
        model = Model(weights={loader.PART_OF[loss]: str(tmp_path / "file.safetensors")})
        with pytest.raises(UnusableWeights, match=what) as caught:
            load(model, (loss,))
        assert caught.value.exit_code == 3 and "expected" in str(caught.value)


def test_absent_files_are_named_with_their_format_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = find_judges(BIG, Model(), NAMES)
    assert found.missing == ("syncnet", "lpips_vgg", "videomae")
    with pytest.raises(WeightsMissing) as caught:
        load_judges(BIG, found, NAMES, CPU, silent)
    text = str(caught.value)
    assert caught.value.exit_code == 4 and "\n" not in text and text == str(judges_missing(found))
    for word in (
        "stable_syncnet.pt", "model.weights.syncnet", "vgg16-397923af.pth", "safetensors", "features.*",
        "vit_g_hybrid_pt_1200e_ssv2_ft.pth", "avatarctl models pull stable-syncnet lpips-vgg16 videomae-v2-g",
    ):  # fmt: skip
        assert word in text, word


def test_a_file_in_a_usual_place_is_found_and_a_named_one_must_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "checkpoints" / "LatentSync-1.6" / "stable_syncnet.pt"
    place.parent.mkdir(parents=True)
    place.write_bytes(b"x")
    assert find_judges(BIG, Model(), ("sync",)).files["syncnet"].resolve() == place
    with pytest.raises(PathNotFound, match="no such file") as caught:
        find_judges(BIG, Model(weights={"syncnet": str(tmp_path / "gone.pt")}), ("sync",))
    assert caught.value.exit_code == 2 and "model.weights.syncnet" in str(caught.value)


@pytest.mark.parametrize("name", ["cartoon-i2v", "cartoon-v2v"])
def test_built_in_models_have_judges_and_say_which_are_untrained(name: str) -> None:
    row, said = ROWS[name], list[Event]()
    found = find_judges(row, Model(), NAMES)
    assert found.random == ("lpips_vgg", "videomae") and not found.missing
    assert found.files == {"syncnet": row.assets / "cartoon/syncnet.safetensors"}
    state = torch.random.get_rng_state()
    first, second = (load_judges(row, found, NAMES, CPU, said.append) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert isinstance(first.sync, StableSyncNet) and isinstance(first.trepa, VideoMae)
    for loss in NAMES:
        one, other = getattr(first, loss).state_dict(), getattr(second, loss).state_dict()
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert sum(tensor.numel() for tensor in one.values()) < 1_000_000
    assert [event.text for event in said if "numbers mean nothing" in getattr(event, "text", "")] == [
        "auxiliary losses (lpips, trepa): untrained miniature judges, whose numbers mean nothing"
    ] * 2  # fmt: skip


def test_a_judge_is_no_part_of_inference(tmp_path: Path) -> None:
    """One configuration serves training and inference: a judge's file is no part of a built-in model."""
    (tmp_path / "sync.pt").write_bytes(b"x")
    model = Model(weights={"syncnet": str(tmp_path / "sync.pt")})
    assert "syncnet" not in find_sources(CARTOON, model).encoders
    with pytest.raises(AvatarctlError, match="built in"):
        find_sources(CARTOON, dataclasses.replace(model, weights={"vae": str(tmp_path / "sync.pt")}))
    assert find_judges(CARTOON, model, ("sync",)).random == ()


class StandIn(nn.Module):
    """`lpips.LPIPS` as version 0.1.4 names its parts; what it computes is its own affair."""

    def __init__(
        self, pretrained: bool = True, net: str = "alex", version: str = "0.1", lpips: bool = True,
        spatial: bool = False, pnet_rand: bool = False, pnet_tune: bool = False, use_dropout: bool = True,
        model_path: str | None = None, eval_mode: bool = True, verbose: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        assert net == "vgg" and pnet_rand and pretrained, "torchvision would fetch its weights"
        layers = LpipsVgg().features
        self.net = nn.Module()
        for level, (first, last) in enumerate(((0, 4), (4, 9), (9, 16), (16, 23), (23, 30)), start=1):
            part = nn.Sequential()
            for place in range(first, last):
                part.add_module(str(place), layers[place])
            setattr(self.net, f"slice{level}", part)

    def forward(self, in0: Tensor, in1: Tensor) -> Tensor:
        """[N, 3, H, W] twice -> [N, 1, 1, 1]."""
        features: list[Tensor] = []
        for x in (in0, in1):
            for level in range(1, 6):
                x = getattr(self.net, f"slice{level}")(x)
            features.append(x)
        return (features[0] - features[1]).square().mean(dim=(1, 2, 3), keepdim=True)


def test_the_package_gets_the_trunk_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("lpips")
    module.LPIPS = StandIn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", module)
    held = vgg("torchvision")
    torch.save(held, tmp_path / "vgg.pth")
    judge = load(Model(weights={"lpips_vgg": str(tmp_path / "vgg.pth")}), ("lpips",), backend="package").lpips
    assert isinstance(judge, nn.Module) and not judge.training
    ours = dict(judge.named_parameters())
    assert torch.equal(ours["judge.net.slice3.14.weight"], held["features.14.weight"])
    assert len(ours) == 26 and not any(tensor.requires_grad for tensor in ours.values())
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert judge(images, images).tolist() == [0, 0] and judge(images, -images).shape == (2,)


@pytest.mark.parametrize("failure", [ImportError("No module named 'lpips'"), RuntimeError("operator nms")])
def test_a_package_that_does_not_import_ends_with_exit_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def fail(name: str) -> None:
        raise failure

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(ExtraMissing, match=r"avatarctl\[aux\]") as caught:
        found = loader.JudgeFiles(files={"lpips_vgg": tmp_path / "never-read"})
        load_judges(BIG, found, ("lpips",), CPU, silent, backend="package")
    assert caught.value.exit_code == 4 and str(failure) in str(caught.value)


def test_the_package_needs_the_real_trunk_even_beside_a_miniature(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_judges(CARTOON, Model(), ("lpips",), backend="package").missing == ("lpips_vgg",)
