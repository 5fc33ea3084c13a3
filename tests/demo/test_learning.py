"""Training teaches: from a transformer that says nothing to lips that follow voices it never met, within a
minute. What is left without the audio is in tests/bench/learning.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.demo.learning import learnt, scored, short


def test_a_fresh_transformer_learns_to_talk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, attributes in short().items():
        for name, value in attributes.items():
            monkeypatch.setattr(module, name, value)
    own, other = scored(learnt(tmp_path), clips=8)
    print(f"\nr with the own audio {own:.3f}, with another's {other:.3f}")
    assert own >= 0.80, "the mouth follows the audio"
    assert other <= 0.25 and own - other >= 0.55, "and nothing else"
