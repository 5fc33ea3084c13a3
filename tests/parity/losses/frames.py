"""LPIPS and TREPA, and the names and shapes of the published judges (spec/losses-and-eval.md 1, 2 and 3)."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from avatarctl.models.lpips_vgg import LpipsVgg
from avatarctl.models.stable_syncnet import PUBLISHED_SYNCNET, StableSyncNet
from avatarctl.models.videomae import PUBLISHED_VIDEOMAE, VideoMae, sinusoids
from avatarctl.registry import ASSETS
from avatarctl.training.frame_losses import TrepaMode, lpips_loss, trepa_loss

from ..golden import Checks, Reader
from .building import expected, filled, formula_weights

checks = Checks()

LPIPS = "lpips_vgg.safetensors"
TREPA = "trepa_tiny.safetensors"
VIDEOMAE = "videomae_tiny.safetensors"
KEYS = "state_dict_keys.json"
_GRADIENT = 1e-5


def _lpips(reader: Reader) -> LpipsVgg:
    """The published heads on a trunk of formula weights."""
    network = LpipsVgg()
    network.load_state_dict(formula_weights(LpipsVgg, expected(reader)["seed"]))
    network.eval().requires_grad_(False)
    for name in reader.keys("lin*"):
        network.get_parameter(name).copy_(reader.take(name))
    return network


@checks(LPIPS, compares=("per_layer", "lpips"), needs=("x", "y", "lin*"))
def distances(reader: Reader) -> None:
    network, x, y = _lpips(reader), reader.take("x"), reader.take("y")
    reader.compare("per_layer", network.per_level(x, y), rtol=1e-5)
    reader.compare("lpips", network(x, y), rtol=1e-5)


@checks(LPIPS, compares=("lin*",))
def heads_that_come_with_the_package(reader: Reader) -> None:
    shipped = load_file(ASSETS / "lpips" / "heads.safetensors")
    assert set(shipped) == set(reader.keys("lin*"))
    for name, head in shipped.items():
        reader.compare(name, head)


@checks(LPIPS, compares=("grad_x_of_mean",), needs=("x", "y", "lin*"))
def gradient_of_distances(reader: Reader) -> None:
    """In float64: in float32 a unit that is next to 0 may count or not, which moves one image by 0.2 %."""
    network, y = _lpips(reader).double(), reader.take("y").double()
    x = reader.take("x").double().requires_grad_()
    (gradient,) = torch.autograd.grad(network(x, y).mean(), x)
    reader.compare("grad_x_of_mean", gradient, relative_l2=_GRADIENT)


@checks("expected.json", compares=("lpips.values",))
def distances_in_words(reader: Reader) -> None:
    """The loss of a clip looks at the lower half: here the images are below a half that nobody sees."""
    recorded = reader.folder.open(LPIPS)
    network = _lpips(recorded)
    clips = [recorded.take(name)[:, :, None] for name in ("x", "y")]
    upper = [torch.full_like(clip, value) for clip, value in zip(clips, (-1.0, 1.0), strict=True)]
    whole = [torch.cat(pair, dim=3) for pair in zip(upper, clips, strict=True)]
    reader.compare("lpips.values", lpips_loss(network, *whole), rtol=1e-5)


def _videomae(reader: Reader) -> VideoMae:
    sizes = expected(reader)["videomae_tiny"]
    return filled(
        VideoMae(
            image_size=sizes["img_size"],
            patch_size=sizes["patch_size"],
            frames=sizes["all_frames"],
            tubelet=sizes["tubelet_size"],
            width=sizes["embed_dim"],
            depth=sizes["depth"],
            heads=sizes["num_heads"],
            mlp_width=round(sizes["embed_dim"] * sizes["mlp_ratio"]),
            classes=sizes["num_classes"],
        ),
        reader,
    )


@checks(VIDEOMAE, compares=("*",))
def weights_by_the_formula(reader: Reader) -> None:
    for name, tensor in _videomae(reader).state_dict().items():
        reader.compare(name, tensor)


@checks(TREPA, compares=("pos_embed_first8", "pos_embed_last8"))
def positions(reader: Reader) -> None:
    table = sinusoids(8 * 16 * 16, reader.take("pos_embed_first8").shape[1])
    reader.compare("pos_embed_first8", table[:8], atol=1e-6)
    reader.compare("pos_embed_last8", table[-8:], atol=1e-6)


def _compare_clip(reader: Reader, clip: str, modes: tuple[TrepaMode, ...]) -> None:
    encoder, real = _videomae(reader), reader.take(f"{clip}.real").float()
    fake = reader.take(f"{clip}.fake").float().requires_grad_()
    with torch.no_grad():
        reader.compare(f"{clip}.feat_real", encoder(real), atol=1e-4)
        reader.compare(f"{clip}.feat_fake", encoder(fake), atol=1e-4)
    for mode in modes:
        loss = trepa_loss(encoder, fake, real, mode)
        reader.compare(f"{clip}.loss", loss, rtol=1e-3)
        (gradient,) = torch.autograd.grad(loss.sum(), fake)
        reader.compare(f"{clip}.grad_fake_abs_sum", _absolute_sum(gradient), rtol=1e-3)


@checks(TREPA, compares=("t16.feat_*", "t16.loss", "t16.grad_fake_abs_sum"), needs=("t16.real", "t16.fake"))
def clip_of_the_encoders_length(reader: Reader) -> None:
    """In one piece and by windows it is the same."""
    _compare_clip(reader, "t16", ("full", "windows"))


@checks(TREPA, compares=("t21.feat_*", "t21.loss", "t21.grad_fake_abs_sum"), needs=("t21.real", "t21.fake"))
def longer_clip_in_one_piece(reader: Reader) -> None:
    _compare_clip(reader, "t21", ("full",))


@checks(KEYS, compares=("stable_syncnet_*.state_dict.*",), needs=("stable_syncnet_*.config.*",))
def syncnet_names(reader: Reader) -> None:
    """Every published configuration; the one that is released is also ours by default."""
    for name in ("16_pixel_attn", "16_pixel", "16_latent"):
        path = f"stable_syncnet_{name}."
        sizes = {
            tower: _tower(reader, f"{path}config.{tower}.") for tower in ("audio_encoder", "visual_encoder")
        }
        with torch.device("meta"):
            networks = [StableSyncNet(**sizes)]
            if name == "16_pixel_attn":
                networks.append(StableSyncNet(**PUBLISHED_SYNCNET))
        for network in networks:
            _compare_names(reader, f"{path}state_dict.", network)


@checks(KEYS, compares=("vgg16_features.*",))
def vgg_names(reader: Reader) -> None:
    with torch.device("meta"):
        _compare_names(reader, "vgg16_features.features.", LpipsVgg().features)


@checks(KEYS, compares=("videomaev2_vit_g_ssv2.*",))
def videomae_names(reader: Reader) -> None:
    with torch.device("meta"):
        _compare_names(reader, "videomaev2_vit_g_ssv2.", VideoMae(**PUBLISHED_VIDEOMAE))


def _tower(reader: Reader, path: str) -> dict[str, Any]:
    """Arguments of a tower; a list of pairs and numbers was flattened to `name.0`, `name.1`, ..."""
    sizes: dict[str, Any] = {}
    for key in reader.keys(f"{path}*"):
        name, _, place = key.removeprefix(path).partition(".")
        value = reader.take(key)
        if place:
            sizes.setdefault(name, []).append(value)
        else:
            sizes[name] = value
    return sizes


def _compare_names(reader: Reader, path: str, network: nn.Module) -> None:
    ours = {f"{path}{name}": list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert set(ours) == set(reader.keys(f"{path}*"))
    for key, shape in ours.items():
        reader.compare(key, shape)


def _absolute_sum(gradient: Tensor) -> Tensor:
    return gradient.double().abs().sum().reshape(1)
