"""Paths as people type them: a home folder that nobody has, and an empty text where a variable was unset."""

from __future__ import annotations

from collections.abc import Callable

import pytest

NOBODY = "~nosuchuser/x.safetensors"

WORDS = {
    "model": ("infer", "--model", "{}"),
    "lora": ("infer", "--lora", "{}"),
    "lora with a scale": ("infer", "--lora", "{}:0.5"),
    "part": ("infer", "--model", "omniavatar-14b", "-o", "model.weights.vae={}"),
    "root of a run": ("infer", "--model", "omniavatar-14b", "--dry-run", "--weights-root", "{}"),
    "root of a model": ("models", "show", "omniavatar-14b", "--weights-root", "{}"),
    "root of a check": ("models", "verify", "omniavatar-14b", "--weights-root", "{}"),
    "root of a pull": ("models", "pull", "omniavatar-14b", "--dry-run", "--weights-root", "{}"),
    "SRC": ("convert-ckpt", "{}", "--inspect"),
    "--base": ("convert-ckpt", "a.pt", "--out", "b", "--merge-lora", "--base", "{}"),
    "--out": ("convert-ckpt", "a.pt", "--out", "{}"),
    "pull for a file": ("models", "pull", "--dry-run", "--for", "infer --model {}"),
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_a_user_that_nobody_is(words: tuple[str, ...], refused: Callable[..., str]) -> None:
    line = refused(2, *(word.replace("{}", NOBODY) for word in words))
    assert line.startswith("~nosuchuser") and "no such user" in line


EMPTY = {
    "lora": ("infer", "--lora", ""),
    "SRC": ("convert-ckpt", "", "--inspect"),
    "--base": ("convert-ckpt", "a.pt", "--out", "b", "--merge-lora", "--base", ""),
    "--out": ("convert-ckpt", "a.pt", "--out", ""),
}


@pytest.mark.parametrize("words", EMPTY.values(), ids=EMPTY)
def test_an_empty_path_is_not_the_current_folder(words: tuple[str, ...], refused: Callable[..., str]) -> None:
    assert "is empty" in refused(2, *words)
