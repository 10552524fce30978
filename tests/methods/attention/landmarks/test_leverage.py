"""Scores of tokens against dense projections and inverses, and the clocks that draw by them."""

import numpy as np
import pytest

from nla_llm.backend import to_numpy
from nla_llm.methods.attention.landmarks.leverage import leverage, ridge_leverage, ring
from nla_llm.theory import columns as theory

EPS = np.finfo(np.float64).eps


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def gaussian(x, y):
    return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 2)


@pytest.mark.parametrize("masked", [False, True])
def test_leverage_scores_are_the_diagonal_of_the_projection(masked, xp):
    x, keep = draw(0, 25, 4) + 3, np.arange(25) % 5 != 2
    mask = xp.asarray(keep) if masked else None
    got = to_numpy(leverage(xp.asarray(x), mask))
    kept = x[keep] if masked else x
    centred = kept - kept.mean(0)
    want = np.diag(centred @ np.linalg.pinv(centred))
    np.testing.assert_allclose(got[keep] if masked else got, want, rtol=0, atol=1e4 * EPS)
    assert np.isclose(got.sum(), 4)


def test_ridge_leverage_from_all_tokens_as_landmarks_is_exact():
    x = draw(0, 20, 2)
    want = theory.ridge_leverage_scores(gaussian(x, x), 0.1)
    np.testing.assert_allclose(10 * ridge_leverage(x, x), want / 1.0, rtol=1e-8)


def test_clocks_draw_in_proportion_to_the_scores():
    scores, rng = np.array([1.0, 3.0, 0.0, 6.0]), np.random.default_rng(0)
    draws = 20000
    first = np.argmin(ring(rng.standard_exponential((draws, 4)), scores), axis=-1)
    share = np.bincount(first, minlength=4) / draws
    p = scores / scores.sum()
    assert np.all(np.abs(share - p) <= 4 * np.sqrt(p * (1 - p) / draws))


@pytest.mark.parametrize("factor", [1e-30, 1e18])
def test_leverage_scores_know_no_scale(factor):
    x = np.random.default_rng(0).standard_normal((30, 5)).astype(np.float32)
    np.testing.assert_allclose(leverage(np.float32(factor) * x, None), leverage(x, None), rtol=1e-4)
    np.testing.assert_array_equal(leverage(np.zeros((3, 2)), None), 0)
