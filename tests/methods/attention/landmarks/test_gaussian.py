"""The Gaussian kernel of queries and keys together, and what is drawn from it."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods.attention.landmarks.gaussian import gaussian, joined_tokens, recentred_keys, sample_tokens

EPS = np.finfo(np.float64).eps


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("scale", [0.3, -2.0])
def test_softmax_kernel_is_the_gaussian_kernel_between_factors(scale, xp):
    q, k = draw(0, 2, 7, 3), draw(1, 2, 5, 3)
    x, y = nl.AttentionProblem(xp.asarray(q), xp.asarray(k), scale=scale).scaled_inputs()
    middle = to_numpy(gaussian(x, y))
    x, y = to_numpy(x), to_numpy(y)
    left, right = (np.exp((z**2).sum(-1) / 2) for z in (x, y))
    got = left[..., :, None] * middle * right[..., None, :]
    np.testing.assert_allclose(got, np.exp(scale * q @ np.swapaxes(k, -1, -2)), rtol=1e-12)
    assert middle.max() <= 1 + 10 * EPS


@pytest.mark.parametrize("masked", [False, True])
def test_recentring_leaves_softmax_and_makes_the_mean_of_sums_zero(masked, xp):
    x, y, keep = draw(0, 9, 3) + 1, draw(1, 13, 3) - 4, np.arange(13) % 3 != 0
    shown = keep if masked else np.ones(13, bool)
    junk = np.where(shown[:, None], y, 1e6)
    z = to_numpy(recentred_keys(xp.asarray(x), xp.asarray(junk), xp.asarray(keep) if masked else None))
    np.testing.assert_allclose(
        z[shown] - y[shown], (z - junk)[shown][:1].repeat(shown.sum(), 0), rtol=0, atol=100 * EPS
    )
    np.testing.assert_allclose(x.mean(0) + z[shown].mean(0), 0, rtol=0, atol=100 * EPS)


def test_tokens_are_drawn_uniformly_from_queries_and_visible_keys():
    q, k, keep = draw(0, 4, 2), draw(1, 6, 2), np.array([True, False, True, True, False, True])
    problem = nl.AttentionProblem(q, k, key_mask=keep)
    draws, rng = 4000, np.random.default_rng(0)
    hits = np.zeros(10)
    for _ in range(draws):
        hits[sample_tokens(problem, 3, rng).index] += 1
    assert not hits[4:][~keep].any()
    p = 3 / 8
    allowed = np.r_[np.ones(4, bool), keep]
    assert np.all(np.abs(hits[allowed] / draws - p) <= 4 * np.sqrt(p * (1 - p) / draws))


def test_queries_stand_before_keys_in_all_heads():
    x, y = draw(0, 2, 3, 4, 2), draw(1, 2, 1, 5, 2)
    tokens = joined_tokens(x, y)
    assert tokens.shape == (2, 3, 9, 2)
    assert np.array_equal(tokens[:, :, :4], x)
    assert np.array_equal(tokens[1, 2, 4:], y[1, 0])


def test_rounding_of_large_norms_makes_no_kernel_above_one(xp):
    x = 1e10 * np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    kernel = to_numpy(gaussian(xp.asarray(x), xp.asarray(x)))
    assert kernel.max() <= 1
    np.testing.assert_array_equal(kernel * (1 - np.eye(20)), 0)
