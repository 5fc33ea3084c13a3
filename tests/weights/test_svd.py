"""The approximation itself, against numpy's exact decomposition."""

from __future__ import annotations

import numpy as np
import pytest

from avatarctl.weights.svd import factorise


def matrix(values: np.ndarray, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """A float32 matrix with these singular values."""
    random = np.random.default_rng(seed)
    left, _ = np.linalg.qr(random.standard_normal((rows, len(values))))
    right, _ = np.linalg.qr(random.standard_normal((columns, len(values))))
    return ((left * values) @ right.T).astype(np.float32)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (700, 620), (620, 700)])
def test_a_matrix_of_low_rank_comes_back(shape: tuple[int, int]) -> None:
    given = matrix(np.linspace(3, 1, 6), *shape)
    found = factorise(given, 6)
    assert found.up.shape == (shape[0], 6) and found.down.shape == (6, shape[1])
    assert found.up.dtype == found.down.dtype == np.float32
    assert np.linalg.norm(found.up @ found.down - given) < 1e-5 * np.linalg.norm(given)
    assert found.residual < 1e-5 * np.linalg.norm(given)
    np.testing.assert_allclose(found.values, np.linspace(3, 1, 6), rtol=1e-5)


@pytest.mark.parametrize(("side", "tolerance"), [(300, 1e-4), (600, 0.02)])
def test_the_residual_is_the_energy_of_the_tail(side: int, tolerance: float) -> None:
    """Exactly for small matrices; the randomised one is at most 2 % above on a slowly decaying spectrum."""
    values = 1 / np.sqrt(1 + np.arange(side))
    given = matrix(values, side, side)
    found = factorise(given, 12)
    best = float(np.sqrt(np.square(values[12:]).sum()))
    assert found.residual >= best * (1 - 1e-4)
    assert found.residual == pytest.approx(best, rel=tolerance)
    assert found.residual == pytest.approx(np.linalg.norm(given - found.up @ found.down), rel=1e-5)


def test_values_at_the_floor_are_dropped_and_the_largest_never() -> None:
    given = matrix(np.array([4.0, 2.0, 0.5, 0.25]), 30, 20)
    assert factorise(given, 4, floor=0.5 * 1.001).rank == 2
    assert factorise(given, 4, floor=100).rank == 1
    assert factorise(given, 4).rank == 4


def test_each_value_has_its_own_floor() -> None:
    given = matrix(np.array([4.0, 2.0, 0.5, 0.25]), 30, 20)
    assert factorise(given, 3, floor=np.array([1.0, 1.9, 0.6])).rank == 2
    assert factorise(given, 3, floor=np.array([1.0, 2.1, 2.1])).rank == 1


def test_a_large_matrix_of_rank_one_has_no_second_value() -> None:
    """Small whole numbers: every element is exact."""
    random = np.random.default_rng(0)
    given = np.outer(random.integers(-99, 99, 700), random.integers(-99, 99, 620)).astype(np.float32)
    values = factorise(given, 2).values
    assert values[1] < 1e-12 * values[0]


def test_no_more_values_than_the_shorter_side() -> None:
    assert factorise(matrix(np.ones(3), 3, 50), 128).rank == 3


def test_the_same_seed_gives_the_same_bits() -> None:
    given = matrix(np.linspace(2, 1, 600), 600, 640)
    one, two, other = (factorise(given, 5, seed=seed) for seed in ("a", "a", "b"))
    assert np.array_equal(one.up, two.up) and np.array_equal(one.down, two.down)
    assert not np.array_equal(one.up, other.up)
