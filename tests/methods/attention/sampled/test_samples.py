"""Draws of keys and the values that weigh them."""

import numpy as np
import pytest
from scipy.stats import chi2

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods.attention.sampled import samples, thinning
from nla_llm.methods.attention.sampled.samples import (
    draw_with_replacement,
    squared_value_norms,
    uniform_numbers,
    values_of_operator,
)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 64, 101])
def test_draws_are_those_of_a_searched_distribution_function(n, xp):
    weights = np.abs(draw(n, 2, n)) * (np.arange(n) % 3 != 1)
    u = np.concatenate([[0.0, np.nextafter(1.0, 0.0)], np.random.default_rng(0).random(50)])
    index, p = draw_with_replacement(xp.asarray(weights), xp.asarray(u))
    for h in range(2):
        cdf = np.cumsum(weights[h]) / np.cumsum(weights[h])[-1]  # not the sum, which rounds differently
        want = np.searchsorted(cdf, u, side="right")
        assert to_numpy(index)[h].tolist() == want.tolist()
        np.testing.assert_allclose(to_numpy(p)[h], (weights[h] / weights[h].sum())[want], rtol=1e-14)
        assert np.all(weights[h][want] > 0)


def test_keys_are_drawn_as_often_as_their_weights_say():
    weights = np.asarray([1.0, 0.0, 2.0, 5.0])
    index, _ = draw_with_replacement(weights, uniform_numbers(np.random.default_rng(1), 8000, stratified=False))
    counts = np.bincount(index, minlength=4)
    assert counts[1] == 0
    expected = 1000 * weights[[0, 2, 3]]
    statistic = np.sum((counts[[0, 2, 3]] - expected) ** 2 / expected)
    assert chi2.ppf(1e-4, 2) < statistic < chi2.isf(1e-4, 2)


def test_stratified_numbers_give_counts_within_two_of_their_means():
    weights = np.abs(draw(3, 11))
    for seed in range(20):
        u = uniform_numbers(np.random.default_rng(seed), 40, stratified=True)
        assert np.all((u >= 0) & (u < 1))
        counts = np.bincount(draw_with_replacement(weights, u)[0], minlength=11)
        assert np.max(np.abs(counts - 40 * weights / weights.sum())) < 2


def test_weights_that_are_all_zero_are_refused():
    with pytest.raises(ValueError, match="all sampling weights of a head are zero"):
        draw_with_replacement(np.asarray([[1.0, 2.0], [0.0, 0.0]]), np.asarray([0.5]))


def test_values_with_axes_of_their_own_are_columns():
    q, k, v = draw(0, 3, 1, 5, 2), draw(1, 3, 1, 7, 2), draw(2, 4, 3, 2, 7, 6)
    p = nl.AttentionProblem(q, k, v)
    own = values_of_operator(p)
    assert own.shape == (3, 1, 7, 4 * 2 * 6)
    want = np.sum(v**2, axis=(0, 2, -1))[:, None]
    np.testing.assert_allclose(squared_value_norms(p), want, rtol=1e-14)
    np.testing.assert_allclose(np.sum(own**2, -1), want, rtol=1e-14)
    shared = nl.AttentionProblem(q, k, draw(3, 7, 2))
    assert values_of_operator(shared) is shared.v
    assert squared_value_norms(nl.AttentionProblem(q, k)).tolist() == [1.0] * 7


# -- NumPy's own paths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("given", [False, True])
def test_exponentials_in_tiles_are_those_of_the_generic_path(monkeypatch, dtype, given):
    logits = draw(0, 2, 3, 101, 7).astype(dtype)
    logits[0, 0, 0, 1:] = -np.inf
    top = logits.max(-1) + 1 if given else None
    generic = samples.exponentials(logits.copy(), top)
    monkeypatch.setattr(samples, "_WORTH_TILES", 1)
    monkeypatch.setattr(samples, "_TILE_ENTRIES", 50)
    tiled = samples.exponentials(logits.copy(), top)
    for a, b in zip(tiled, generic, strict=True):
        assert a.dtype == dtype
        np.testing.assert_allclose(a, b, rtol=4 * np.finfo(dtype).eps)


@pytest.mark.parametrize("values", [False, True])
def test_gram_matrices_in_groups_are_those_of_the_generic_path(monkeypatch, values):
    q, k, v = draw(0, 2, 3, 5, 4), draw(1, 2, 1, 83, 4), draw(2, 2, 1, 83, 6)
    p = nl.AttentionProblem(q, k, v if values else None)
    method = nl.method("thinformer", m=7, bucket=8)
    generic = method(p, rng=0).dense()
    monkeypatch.setattr(thinning, "_WORTH_GROUPS", 1)
    monkeypatch.setattr(thinning, "_GROUP_ENTRIES", 700)
    np.testing.assert_allclose(method(p, rng=0).dense(), generic, rtol=0, atol=1e3 * np.finfo(float).eps)
