"""Gaussian projections: fourth moments by exact quadrature, and the counter-example to what was published."""

from itertools import product

import numpy as np
import pytest

from nla_llm.theory import projections

EPS = np.finfo(np.float64).eps


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def expectation(f, m, n):
    """E f(R) for R (m, n) with entries N(0, 1/m) and f of degree 5 at most: three nodes in each entry are exact."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    weights = weights / weights.sum()
    total = 0.0
    for index in product(range(3), repeat=m * n):
        R = nodes[list(index)].reshape(m, n) / np.sqrt(m)
        total = total + np.prod(weights[list(index)]) * f(R)
    return total


@pytest.mark.parametrize(("m", "n"), [(1, 3), (2, 3), (3, 2)])
def test_mean_and_errors_by_quadrature(m, n):
    P, w = draw(0, 4, n), draw(1, n)
    np.testing.assert_allclose(expectation(lambda R: P @ R.T @ R, m, n), P, atol=100 * EPS * abs(P).max())
    variance = expectation(lambda R: (P @ R.T @ R - P) ** 2, m, n)
    np.testing.assert_allclose(projections.gaussian_projection_entry_variance(P, m), variance, rtol=1e-12)
    vector = expectation(lambda R: np.sum((P @ R.T @ R @ w - P @ w) ** 2), m, n)
    np.testing.assert_allclose(projections.gaussian_projection_vector_error(P, w, m), vector, rtol=1e-12)
    error = projections.gaussian_projection_error(np.sum(P**2), n, m)
    np.testing.assert_allclose(error**2, variance.sum(), rtol=1e-12)


def test_the_matrix_form_is_the_sum_over_unit_vectors():
    P = draw(0, 2, 5, 7)
    parts = [projections.gaussian_projection_vector_error(P, e, 3) for e in np.eye(7)]
    total = projections.gaussian_projection_error(np.sum(P**2, axis=(-2, -1)), 7, 3) ** 2
    np.testing.assert_allclose(total, np.sum(parts, axis=0), rtol=1e-12)


def test_the_published_bound_is_false_for_its_own_construction():
    """P = 11ᵀ/n and w ⊥ 1: P w = 0, so |P RᵀR w| <= ε |P w| says zero; it is about |w|/√m, whatever ε."""
    n, m, draws = 400, 200, 400
    w = np.concatenate([np.ones(n // 2), -np.ones(n // 2)])
    P = np.full((n, n), 1 / n)
    expected = float(projections.gaussian_projection_vector_error(P, w, m))
    np.testing.assert_allclose(expected, n / m, rtol=1e-12)
    rng = np.random.default_rng(0)
    squared = []
    for _ in range(draws):
        R = rng.standard_normal((m, n)) / np.sqrt(m)
        squared.append(n * ((np.ones(n) / n) @ R.T @ (R @ w)) ** 2)  # every row of P is the same
    assert np.linalg.norm(P @ w) < 1e-12
    assert abs(np.mean(squared) - expected) < 4 * np.std(squared) / draws**0.5
    assert projections.linformer_published_rank(n, 0.9) > m > projections.linformer_published_rank(n, 0.5) / 2


def test_relative_error_is_that_of_nothing_at_one_direction_more_than_keys():
    assert float(projections.gaussian_projection_error(4.0, 63, 64)) == 2.0


def test_theory_object():
    promise = projections.gaussian_projection_theory(np.array([1.0, 4.0]), 15, 4, (2, 15, 15))
    np.testing.assert_array_equal(promise.error("frobenius"), [2.0, 4.0])
    assert promise.covers == {"error"}
    with pytest.raises(ValueError, match="'frobenius' only"):
        promise.error("spectral")
    with pytest.raises(ValueError, match="m must be"):
        projections.gaussian_projection_theory(1.0, 15, 0, (15, 15))
    with pytest.raises(ValueError, match="epsilon"):
        projections.linformer_published_rank(10, 1.0)
