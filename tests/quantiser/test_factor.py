"""quantize/encode/factor.py against numpy in float64."""

import numpy as np
import pytest
from numpy.typing import NDArray

from quantize.base import blas
from quantize.encode.factor import BLOCK, Factor

WIDTHS = (1, 31, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 40)
COLUMNS = (1, blas.PIECE, blas.PIECE + 3)
EPS = np.finfo(np.float32).eps


def covariance(n: int, seed: int = 0) -> NDArray[np.float32]:
    """Of channels whose sizes span two decades, damped as the quantiser damps."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2 * n, n)) * np.geomspace(1, 100, n)
    h = x.T @ x
    return (h / np.trace(h) * n + 0.05 * np.eye(n)).astype(np.float32)


@pytest.mark.parametrize("n", WIDTHS)
def test_the_factor_multiplies_to_the_matrix(n: int) -> None:
    h = covariance(n)
    factor = Factor(h)
    m = factor.above.astype(np.float64)
    for at, inner, inverse in zip(factor.blocks, factor.inner, factor.inverse, strict=True):
        m[at, at] = inner
        assert np.allclose(inner @ inverse, np.eye(len(inner)), atol=1e-4)
    assert np.array_equal(m, np.triu(m)) and (m.diagonal() == 1).all() and (factor.v > 0).all()
    # Every product is summed over at most n terms, none larger than the largest of h: a float32 bound on each.
    assert np.abs((m * factor.v) @ m.T - h).max() <= 8 * (1 + np.sqrt(n)) * EPS * np.abs(h).max()


@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("k", COLUMNS)
def test_equations_are_solved(n: int, k: int) -> None:
    h, b = covariance(n), np.random.default_rng(1).standard_normal((n, k)).astype(np.float32)
    x = Factor(h).solve(b).T
    assert x.dtype == np.float32 and x.shape == b.shape
    exact = np.linalg.solve(h.astype(np.float64), b.astype(np.float64))
    condition = np.linalg.cond(h.astype(np.float64))
    assert np.abs(x - exact).max() <= condition * np.sqrt(n) * EPS * np.abs(exact).max()


def test_bits_do_not_depend_on_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    h, b = covariance(WIDTHS[-1]), np.random.default_rng(1).standard_normal((WIDTHS[-1], 600)).astype(np.float32)
    many = Factor(h).solve(b)
    for module in ("encode.factor", "base.blas"):
        monkeypatch.setattr(f"quantize.{module}.spread", lambda tasks: [task() for task in tasks])
    with blas.one_thread():
        assert np.array_equal(Factor(h).solve(b), many)


def test_what_is_not_positive_definite_is_refused() -> None:
    h = covariance(BLOCK + 7)
    h[3, 3] = -1
    with pytest.raises(np.linalg.LinAlgError):
        Factor(h)
