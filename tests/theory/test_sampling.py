"""Importance sampling, against the enumeration of all draws."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_llm.theory import sampling
from nla_llm.theory.yardsticks import random_keys_error, random_keys_error_first_order

EPS = np.finfo(np.float64).eps


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def probabilities(seed, n):
    p = np.random.default_rng(seed).random(n) + 0.05
    return p / p.sum()


def over_all_draws(p, m, function):
    """Mean of ``function(draws)`` over the n^m ordered draws, each with its probability."""
    return sum(np.prod(p[list(r)]) * function(list(r)) for r in product(range(len(p)), repeat=m))


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 4), (4, 3), (5, 2)])
def test_error_of_the_product_is_the_mean_over_all_draws(n, m):
    """Theory C6 by enumeration of all n^m samples, and that the estimate is unbiased."""
    a, b, p = draw(0, 3, n), draw(1, n, 2), probabilities(2, n)

    def estimate(r):
        return sum(np.outer(a[:, j], b[j]) / (m * p[j]) for j in r)

    exact = a @ b
    np.testing.assert_allclose(over_all_draws(p, m, estimate), exact, rtol=0, atol=100 * EPS * np.linalg.norm(exact))
    error = over_all_draws(p, m, lambda r: np.sum((exact - estimate(r)) ** 2))
    np.testing.assert_allclose(sampling.product_error(a, b, p, m), error, rtol=1e3 * EPS)


@given(seed=st.integers(0, 1000), n=st.integers(1, 12), m=st.integers(1, 5))
def test_no_probabilities_beat_the_optimal_ones(seed, n, m):
    a, b = draw(seed, 3, n), draw(seed + 1, n, 2)
    best = sampling.product_error(a, b, sampling.optimal_probabilities(a, b), m)
    other = sampling.product_error(a, b, probabilities(seed, n), m)
    scale = (np.linalg.norm(a) * np.linalg.norm(b)) ** 2
    np.testing.assert_allclose(sampling.optimal_product_error(a, b, m), best, rtol=0, atol=1e3 * EPS * scale)
    assert best <= other + 1e3 * EPS * scale


@pytest.mark.parametrize(("n", "m"), [(2, 1), (3, 4), (4, 3)])
def test_variance_of_an_entry_is_that_over_all_draws(n, m):
    p = probabilities(3, n)
    weight = over_all_draws(p, m, lambda r: np.bincount(r, minlength=n) / (m * p))
    square = over_all_draws(p, m, lambda r: (np.bincount(r, minlength=n) / (m * p)) ** 2)
    np.testing.assert_allclose(weight, np.ones(n), rtol=100 * EPS)
    np.testing.assert_allclose(sampling.sampled_columns_variance(p, m), square - 1, rtol=1e3 * EPS)
    theory = sampling.sampled_columns_theory(p, m, (2, 3, n), always=(0,))
    assert theory.unbiased
    got = theory.relative_variance(1, 3)
    assert got.shape == (2, 2, n)
    assert not got[..., 0].any()
    np.testing.assert_allclose(got[..., 1:], np.broadcast_to(square - 1, got.shape)[..., 1:], rtol=1e3 * EPS)


def test_a_key_that_is_never_drawn_has_the_mean_zero():
    theory = sampling.sampled_columns_theory([0.5, 0.0, 0.5], 4, (1, 3))
    assert theory.mean().tolist() == [[1, 0, 1]]
    assert theory.unbiased is False


def test_stratified_draws_have_at_most_the_variance_of_independent_ones():
    """Variance of the counts from the part of each stratum that the interval of a key covers."""
    p, m = probabilities(4, 7), 5
    edges = np.concatenate([[0], np.cumsum(p)])
    strata = np.arange(m + 1) / m
    low = np.maximum.outer(strata[:-1], edges[:-1])
    high = np.minimum.outer(strata[1:], edges[1:])
    share = m * np.maximum(high - low, 0)  # (strata, keys): the chance that the draw of a stratum is that key
    np.testing.assert_allclose(share.sum(0), m * p, rtol=100 * EPS)
    variance = np.sum(share * (1 - share), axis=0) / (m * p) ** 2
    bound = sampling.sampled_columns_theory(p, m, (1, 7), stratified=True)
    assert (bound.kind, bound.status) == ("bound", "VB")
    assert np.all(variance <= bound.relative_variance()[0])
    assert np.any(variance < 0.9 * bound.relative_variance()[0])


def test_first_order_error_with_uniform_probabilities_is_that_of_random_keys():
    rows = np.exp(draw(5, 4, 9))
    rows /= rows.sum(-1, keepdims=True)
    got = sampling.importance_error_first_order(rows, np.full(9, 1 / 9), 6)
    np.testing.assert_allclose(got, random_keys_error_first_order(rows, 6, replacement=True), rtol=1e3 * EPS)


def test_first_order_error_approaches_the_exact_one_as_the_draws_grow():
    """Enumeration cannot reach many draws; for uniform p the exact error is known, and 1/m² is what is left."""
    row = np.exp(0.5 * draw(6, 8))
    row /= row.sum()
    gap = []
    for m in (50, 100, 200):
        exact = random_keys_error(row, m, replacement=True)
        gap.append(abs(sampling.importance_error_first_order(row, np.full(8, 1 / 8), m) / exact - 1))
    assert gap[0] < 0.1
    np.testing.assert_allclose(gap[:-1], 2 * np.asarray(gap[1:]), rtol=0.15)


def test_first_order_error_for_unequal_probabilities():
    """Normalised estimates of many draws: their mean square error within four standard errors and the 1/m² left."""
    rng, m = np.random.default_rng(7), 400
    row, p = probabilities(8, 5), probabilities(9, 5)
    counts = rng.multinomial(m, p, size=20_000)
    estimate = row * counts / p
    estimate /= estimate.sum(-1, keepdims=True)
    errors = np.sum((estimate - row) ** 2, axis=-1)
    promised = sampling.importance_error_first_order(row, p, m)
    allowed = 4 * errors.std(ddof=1) / np.sqrt(len(errors)) + 5 / m * promised
    assert abs(errors.mean() - promised) < allowed
    assert allowed < 0.06 * promised


@pytest.mark.parametrize(("n", "m"), [(4, 1), (5, 3), (5, 5)])
def test_draws_without_replacement_have_the_bound_as_their_variance(n, m):
    from itertools import combinations

    weights = np.asarray([np.isin(np.arange(n), s) * n / m for s in combinations(range(n), m)])
    np.testing.assert_allclose(weights.mean(0), np.ones(n), rtol=100 * EPS)
    bound = sampling.without_replacement_bound(n, m, (2, n))
    np.testing.assert_allclose(bound.relative_variance()[0], weights.var(0), rtol=0, atol=1e3 * EPS)
    assert bound.unbiased


@pytest.mark.parametrize("p", [[0.5, 0.4], [1.5, -0.5]])
def test_what_is_no_distribution_is_refused(p):
    with pytest.raises(ValueError, match="probabilities"):
        sampling.product_error(np.eye(2), np.eye(2), p, 1)
    with pytest.raises(ValueError, match="m must be a whole number"):
        sampling.sampled_columns_variance([0.5, 0.5], 0)
