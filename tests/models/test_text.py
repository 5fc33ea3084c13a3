import pytest
import torch

from avatarctl.events import Notice
from avatarctl.loading.built_in import build_random_modules
from avatarctl.models.encode import encode_prompt
from avatarctl.models.text import clean_prompt
from avatarctl.registry import find_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a \n person\t talks ", "a person talks"),
        ("Tom &amp;amp; Ann", "Tom & Ann"),
        ("caf\u00c3\u00a9", "café"),  # UTF-8 once read as Latin-1
        ("Keep CASE", "Keep CASE"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned_as_published(text: str, clean: str) -> None:
    assert clean_prompt(text) == clean


def test_rows_behind_the_prompt_are_exactly_zero_and_the_empty_prompt_keeps_its_end() -> None:
    text = build_random_modules(find_model("cartoon-i2v")).text
    for prompt, tokens in (("", 1), ("hello", 6), ("été", 6)):
        states = text.encode(prompt, CPU)
        assert states.shape == (1, 512, 32)
        assert (states[0, :tokens] != 0).any(dim=1).all()
        assert (states[0, tokens:] == 0).all()
    assert not torch.equal(text.encode("hello", CPU), text.encode("hellO", CPU))


def test_a_prompt_that_is_cut_is_said_once() -> None:
    text = build_random_modules(find_model("cartoon-i2v")).text
    said: list[object] = []
    assert encode_prompt(text, "x" * 600, CPU, said.append).shape == (1, 512, 32)
    assert [type(event) for event in said] == [Notice]
    assert "601 tokens" in said[0].text
