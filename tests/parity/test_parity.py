"""The product against recorded numbers: one test per check, file and folder."""

from __future__ import annotations

import pytest

from .golden import Comparison, Folder, Listed, unaccounted


def test_parity(comparison: Comparison) -> None:
    comparison.run()


def test_every_key_is_accounted_for(golden_folder: Folder) -> None:
    assert unaccounted(golden_folder) == []


def test_not_compared_yet(waiting: tuple[Listed, str, int]) -> None:
    entry, file, count = waiting
    pytest.skip(f"{file}: {count} keys wait for {entry.reason}")


def test_documents_a_defect_of_the_reference(defect: tuple[Listed, str, int]) -> None:
    entry, file, count = defect
    pytest.skip(f"{file}: {count} keys document {entry.reason}")
