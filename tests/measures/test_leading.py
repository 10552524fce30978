"""Approximation of a large matrix: brackets against a decomposition in full."""

import numpy as np
import pytest

from nla_llm.measures import leading
from nla_llm.measures.leading import gram_spectrum, leading_spectrum, remainder
from nla_llm.operators import Dense


def matrix(m, n, dtype=np.float64, seed=0):
    """Rank eight above a bulk of noise."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((k, 8)))[0] for k in (m, n))
    noise = rng.standard_normal((m, n)) / (np.sqrt(m) + np.sqrt(n))
    return ((u * np.linspace(9, 3, 8)) @ v.T + noise).astype(dtype)


@pytest.mark.parametrize("shape", [(150, 260), (260, 150)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_brackets_of_a_part_hold_all_singular_values(monkeypatch, shape, dtype):
    """As for a matrix too large to be decomposed: limits are lowered, not the matrix enlarged."""
    monkeypatch.setattr(leading, "FULL_ORDER", 10)
    monkeypatch.setattr(leading, "DENSE_ENTRIES", 10)
    a = matrix(*shape, dtype)
    found = leading_spectrum(a, 12, rng=1)
    s = np.linalg.svd(a.astype(np.float64), compute_uv=False)
    spectrum = found.spectrum
    assert (spectrum.size, spectrum.order) == (12, 150)
    assert np.all(spectrum.lower <= s[:12])
    assert np.all(s[:12] <= spectrum.upper)
    assert s[12] <= spectrum.rest < 1.3 * s[12]
    error = a - (found.factors.left * found.factors.values) @ found.factors.right.T
    assert found.spectral.contains(np.linalg.norm(error, 2))
    assert found.frobenius.contains(np.linalg.norm(error))
    assert np.linalg.norm(error, 2) < 1.03 * s[12]
    assert np.linalg.norm(error) < 1.005 * np.linalg.norm(s[12:])


def test_a_small_matrix_is_decomposed_in_full():
    a = matrix(40, 30)
    found = leading_spectrum(a, 3, rng=0)
    assert found.spectrum.complete
    assert np.allclose(found.spectrum.values, np.linalg.svd(a, compute_uv=False), rtol=1e-12)


def test_the_gram_matrix_gives_all_values_with_honest_brackets():
    """Values below √(n eps) σ₁ are not resolved, and the brackets say so."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((k, 30)))[0] for k in (40, 50))
    s = np.logspace(0, -12, 30)
    found = gram_spectrum((u * s) @ v.T)
    assert np.all(found.lower[:30] <= s)
    assert np.all(s <= found.upper[:30])
    assert np.allclose(found.values[:8], s[:8], rtol=1e-3)
    assert found.lower[29] == 0


def test_an_exact_rank_leaves_rounding():
    rng = np.random.default_rng(0)
    a = (rng.standard_normal((80, 4)) @ rng.standard_normal((4, 60))).astype(np.float32)
    found = leading_spectrum(a, 4, rng=0)
    assert float(found.spectral.upper) < 1e-4 * found.factors.values[0]


def test_the_remainder_of_any_product_is_bracketed():
    a, rng = matrix(70, 50, np.float32), np.random.default_rng(3)
    left, right = rng.standard_normal((70, 5)), rng.standard_normal((50, 5))
    spectral, frobenius = remainder(Dense(a), left, right, rng=0)
    error = a - left @ right.T
    assert spectral.contains(np.linalg.norm(error, 2))
    assert frobenius.contains(np.linalg.norm(error))
