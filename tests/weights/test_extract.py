"""A model that was made from a base and an adapter gives the adapter back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from avatarctl.errors import UnusableWeights
from avatarctl.events import Event, Notice, silent
from avatarctl.files.source import RawWeights
from avatarctl.files.tensors import ArrayTensor, from_float32, read_whole, to_float32
from avatarctl.weights.export import export
from avatarctl.weights.extract import extract_adapter
from avatarctl.weights.merge import merge_adapter
from avatarctl.weights.recognise import recognise
from avatarctl.weights.transforms import cast
from avatarctl.weights.weight_file import LoraPair, WeightFile
from tests.weights.published_tables import LINEARS, Shapes, audio, ends, lora, wan

WIDTH, FFN, LAYERS, RANK = 32, 48, 6, 4
BASE = wan(WIDTH, FFN, LAYERS, text=7, freq=10)
AUDIO = audio(WIDTH, LAYERS, hidden=3, features=5)
PATCH: Shapes = {"patch_embedding.weight": (WIDTH, 33, 1, 2, 2), "patch_embedding.bias": (WIDTH,)}
CONFIG = {"model_config": {"num_heads": 2}}


def values(shapes: Shapes, seed: int, scale: float = 0.1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape, np.float32) * scale for name, shape in shapes.items()}


def weight_file(
    arrays: dict[str, np.ndarray], dtype: str = "F32", name: str = "model", **config: object
) -> WeightFile:
    tensors = {key: ArrayTensor(from_float32(array, dtype), dtype) for key, array in arrays.items()}
    path = Path(f"{name}.safetensors")
    return recognise(RawWeights(path, (path,), "safetensors", tensors, config={**CONFIG, **config}))


def adapter(seed: int = 2, scale: float = 0.1) -> WeightFile:
    arrays = values(lora(WIDTH, FFN, LAYERS, RANK), seed, scale) | values(PATCH | AUDIO, seed + 1)
    return weight_file(arrays, name="adapter", train_architecture="lora", lora_rank=RANK, lora_alpha=2 * RANK)


def merged(base: WeightFile, given: WeightFile, dtype: str = "F32") -> WeightFile:
    """A full model in one dtype."""
    full = merge_adapter(base, given)
    return replace(
        full, path=Path("merged.safetensors"), tensors={n: cast(t, dtype) for n, t in full.tensors.items()}
    )


def product(held: WeightFile, pair: LoraPair) -> np.ndarray:
    return held.scale_of(pair) * (read_whole(pair.up) @ read_whole(pair.down))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


class Notices(list[Event]):
    """An `Emit` that keeps what it is told."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    @property
    def notices(self) -> list[str]:
        return [event.text for event in self if isinstance(event, Notice)]

    def remainder(self) -> tuple[float, float, str]:
        """Of the change, of the weight, and in which tensor, as reported."""
        found = re.search(
            r"largest remainder (\S+) of the change \((\S+) of the weight\), in (\S+)", " ".join(self.notices)
        )
        assert found
        return float(found[1]), float(found[2]), found[3]


def test_a_lora_that_was_merged_comes_back() -> None:
    base, given = weight_file(values(BASE, 1)), adapter()
    found = extract_adapter(merged(base, given), base, emit=silent)
    assert (found.kind, found.naming, found.layout.family) == ("adapter", "original", "omniavatar")
    assert found.lora_pairs.keys() == given.lora_pairs.keys()
    for module, pair in found.lora_pairs.items():
        assert pair.rank == RANK and found.scale_of(pair) == 1
        assert error(product(found, pair), product(given, given.lora_pairs[module])) < 1e-5
    assert not found.differences
    assert found.tensors.keys() == (PATCH | AUDIO).keys()
    for name, tensor in found.tensors.items():
        assert np.array_equal(read_whole(tensor), read_whole(given.tensors[name]))


def test_an_adapter_does_not_carry_what_is_said_of_the_model() -> None:
    base = weight_file(values(BASE, 1))
    said = {"modelspec.merged_from": "base, a", "modelspec.title": "sum", "ss_network_module": "networks.x"}
    model = merged(base, adapter())
    model = replace(model, metadata={**said, "modelspec.author": "me", "avatarctl.conventions": "{}"})
    found = extract_adapter(model, base, emit=silent).metadata
    assert found == {"modelspec.author": "me", "avatarctl.conventions": "{}"}


def test_merging_what_was_extracted_gives_the_model_again() -> None:
    base = weight_file(values(BASE, 1), "BF16")
    model = merged(base, adapter(), "BF16")
    again = merged(base, extract_adapter(model, base, rank=WIDTH, emit=silent), "BF16")
    for name, tensor in model.tensors.items():
        ours, theirs = (to_float32(read_whole(each), "BF16") for each in (again.tensors[name], tensor))
        np.testing.assert_allclose(ours, theirs, rtol=2**-7, err_msg=name)


def test_a_model_in_bfloat16_gives_the_lora_up_to_its_rounding() -> None:
    """Half a unit in the last place of bfloat16 is 2^-9 to 2^-8 of a value; its mean square over uniform
    mantissas is about 0.4 of the upper end."""
    base, given, notices = weight_file(values(BASE, 1), "BF16"), adapter(), Notices()
    found = extract_adapter(merged(base, given, "BF16"), base, emit=notices)
    assert all(pair.rank == RANK for pair in found.lora_pairs.values())
    of_change, of_weight, name = notices.remainder()
    assert 0.2 * 2**-8 < of_weight < 2**-8
    module = name.removesuffix(".weight")
    expected = product(given, given.lora_pairs[module])
    assert 1e-4 < error(product(found, found.lora_pairs[module]), expected) < of_change


def test_the_remainder_of_a_change_of_full_rank_is_the_tail_of_its_exact_spectrum() -> None:
    """Reported is the worst tensor: the one with the flattest spectrum."""
    arrays = values(BASE, 1)
    changed = {**arrays}
    flat, steep = "blocks.1.ffn.0.weight", "blocks.2.cross_attn.o.weight"
    changed[flat] = arrays[flat] + values({flat: BASE[flat]}, 5, 0.01)[flat]
    changed[steep] = arrays[steep] + np.outer(np.arange(WIDTH), np.ones(WIDTH, np.float32)).astype(np.float32)
    notices = Notices()
    found = extract_adapter(weight_file(changed), weight_file(arrays), rank=8, emit=notices)
    assert found.lora_pairs.keys() == {flat.removesuffix(".weight"), steep.removesuffix(".weight")}
    spectrum = np.linalg.svd((changed[flat] - arrays[flat]).astype(np.float64), compute_uv=False)
    tail = np.sqrt(np.square(spectrum[8:]).sum())
    of_change, of_weight, name = notices.remainder()
    assert name == flat
    assert of_change == pytest.approx(tail / np.linalg.norm(spectrum), rel=0.01)
    assert of_weight == pytest.approx(tail / np.linalg.norm(changed[flat]), rel=0.01)


def test_what_did_not_change_is_no_target() -> None:
    arrays = values(BASE, 1)
    name = "blocks.3.self_attn.v.weight"
    found = extract_adapter(
        weight_file({**arrays, name: arrays[name] * 1.5}), weight_file(arrays), rank=2, emit=silent
    )
    assert list(found.lora_pairs) == ["blocks.3.self_attn.v"]
    assert not found.tensors and not found.differences
    assert found.lora_pairs["blocks.3.self_attn.v"].rank == 2


def test_biases_norms_and_modulation_become_differences() -> None:
    arrays = values(BASE, 1)
    names = (
        "blocks.0.self_attn.q.bias",
        "blocks.1.norm3.weight",
        "blocks.2.modulation",
        "patch_embedding.weight",
    )
    changed = {**arrays, **{name: arrays[name] + 0.25 for name in names}}
    found = extract_adapter(weight_file(changed), weight_file(arrays), emit=silent)
    assert set(found.differences) == set(names) and not found.lora_pairs
    for name in names:
        np.testing.assert_array_equal(read_whole(found.differences[name]), changed[name] - arrays[name])


def test_differences_survive_the_only_naming_that_holds_them() -> None:
    """Biases, norms and parameters that are no module's weight, as ComfyUI writes them."""
    arrays = values(BASE, 1)
    changed = {name: array + 0.25 for name, array in arrays.items()}
    found = extract_adapter(weight_file(changed), weight_file(arrays), emit=silent)
    path = Path("lora.safetensors")
    again = recognise(RawWeights(path, (path,), "safetensors", export(found, "comfyui").tensors))
    assert not again.unknown
    assert again.lora_pairs.keys() == found.lora_pairs.keys()
    assert again.differences.keys() == found.differences.keys()
    assert {"blocks.2.modulation", "head.modulation", "head.head.bias"} < again.differences.keys()


def test_one_changed_audio_tensor_brings_all_that_adapters_carry_whole() -> None:
    """An adapter with some of them would be refused as incomplete."""
    arrays = values(BASE | PATCH | AUDIO, 1)
    changed = {**arrays, "audio_proj.proj.bias": arrays["audio_proj.proj.bias"] + 1}
    found = extract_adapter(weight_file(changed), weight_file(arrays), emit=silent)
    assert found.tensors.keys() == (PATCH | AUDIO).keys()
    assert not found.lora_pairs and not found.differences


def test_more_input_channels_than_the_base_are_carried_whole() -> None:
    arrays = values(BASE | PATCH | AUDIO, 1)
    wider = {**arrays, "patch_embedding.weight": values({"p": (WIDTH, 49, 1, 2, 2)}, 3)["p"]}
    found = extract_adapter(weight_file(wider), weight_file(arrays), emit=silent)
    assert read_whole(found.tensors["patch_embedding.weight"]).shape[1] == 49
    assert found.sizes.in_channels == 49


def test_the_same_inputs_give_the_same_bits() -> None:
    base, given = weight_file(values(BASE, 1)), adapter()
    one, two = (extract_adapter(merged(base, given), base, emit=silent) for _ in range(2))
    for module, pair in one.lora_pairs.items():
        assert np.array_equal(read_whole(pair.up), read_whole(two.lora_pairs[module].up))


def refusal(model: WeightFile, base: WeightFile) -> str:
    with pytest.raises(UnusableWeights) as caught:
        extract_adapter(model, base, emit=silent)
    return str(caught.value)


def without(arrays: dict[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
    return {name: array for name, array in arrays.items() if name not in set(names)}


def test_other_sizes_are_refused_with_both_sides() -> None:
    model = weight_file(values(BASE, 1), name="small")
    base = weight_file(values(wan(2 * WIDTH, FFN, LAYERS, text=7, freq=10), 1), name="large")
    message = refusal(model, base)
    assert "small.safetensors" in message and "large.safetensors" in message
    assert f"width {WIDTH}" in message and f"{2 * WIDTH}" in message


def test_a_base_with_audio_layers_that_the_model_lacks_is_refused() -> None:
    message = refusal(
        weight_file(values(BASE, 1)), weight_file(values(BASE | PATCH | AUDIO, 1), name="avatar")
    )
    assert "lacks audio_" in message and "avatar.safetensors" in message


def test_an_adapter_on_either_side_is_refused() -> None:
    base = weight_file(values(BASE, 1))
    assert "no full model (adapter)" in refusal(adapter(), base)
    assert "no full model (adapter)" in refusal(base, adapter())


def test_an_incomplete_model_is_refused() -> None:
    arrays = values(BASE, 1)
    message = refusal(weight_file(without(arrays, ["blocks.2.norm3.bias"])), weight_file(arrays))
    assert "blocks.2.norm3.bias" in message


def test_the_same_model_twice_is_refused() -> None:
    arrays = values(BASE, 1)
    assert "nothing to extract" in refusal(weight_file(arrays), weight_file(arrays, name="base"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["blocks.0.ffn.2.weight", "blocks.0.norm3.weight"])
def test_values_that_are_not_finite_are_refused(bad: float, name: str) -> None:
    arrays = values(BASE, 1)
    broken = {**arrays, name: arrays[name].copy()}
    broken[name].reshape(-1)[3] = bad
    for model, base in ((broken, arrays), (arrays, broken), (broken, broken)):
        assert f"{name} has values that are not finite" in refusal(weight_file(model), weight_file(base))


def test_every_linear_layer_of_a_block_is_a_target() -> None:
    assert {ends(name, WIDTH, FFN) for name in LINEARS} == {(WIDTH, WIDTH), (FFN, WIDTH), (WIDTH, FFN)}
    arrays = values(BASE, 1)
    changed = {name: array + (array.ndim == 2) for name, array in arrays.items()}
    found = extract_adapter(weight_file(changed), weight_file(arrays), emit=silent)
    assert {f"blocks.{i}.{name}" for i in range(LAYERS) for name in LINEARS} < found.lora_pairs.keys()
    assert {"head.head", "text_embedding.0", "time_projection.1"} < found.lora_pairs.keys()
    assert all(pair.rank == 1 for pair in found.lora_pairs.values())
