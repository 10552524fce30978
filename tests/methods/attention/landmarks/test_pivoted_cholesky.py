"""Randomly pivoted Cholesky: pivots, triangles, the kernel before normalisation, refusals."""

from itertools import product

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods import Unsupported
from nla_llm.methods.attention.landmarks.pivoted_cholesky import random_pivots
from nla_llm.operators import LowRank, RowNormalised
from nla_llm.theory import columns as theory

EPS = np.finfo(np.float64).eps


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def gaussian(x, y):
    return np.exp(-((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(-1) / 2)


def pivots_of(z, u, balance=0.0, shown=None):
    diagonal = np.ones((*z.shape[:-1], 1)) if shown is None else shown[..., None].astype(z.dtype)
    places, triangle, _ = random_pivots(z, diagonal, u=np.asarray(u), balance=balance)
    return places[..., 0], triangle


# -- pivots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_a_pivot_is_drawn_in_proportion_to_the_tilted_residual(balance):
    """Quantiles instead of draws: uniform numbers on a grid hit every second pivot as often as its probability says."""
    z = draw(0, 6, 2)
    first = 0
    kernel = gaussian(z, z)
    residual = 1 - kernel[:, first] ** 2
    tilt = np.exp(balance * (z**2).sum(-1))
    start = (0.5 * tilt[first]) / tilt.sum()  # falls into the first token's share
    grid = (np.arange(1500) + 0.5) / 1500
    hits = np.array([pivots_of(z, [start, u], balance)[0][1] for u in grid])
    share = np.bincount(hits, minlength=6) / grid.size
    np.testing.assert_allclose(share, tilt * residual / (tilt * residual).sum(), rtol=0, atol=2 / grid.size)
    assert share[first] == 0


def test_the_triangle_is_the_cholesky_factor_of_the_kernel_of_the_pivots(xp):
    z = draw(0, 2, 30, 3)
    places, triangle, fresh = random_pivots(
        xp.asarray(z), xp.ones((2, 30, 1), dtype=xp.float64), u=xp.asarray(draw(1, 8) % 1.0), balance=0.5
    )
    assert to_numpy(fresh).all()
    for head in range(2):
        s = to_numpy(places)[head, :, 0]
        assert np.unique(s).size == 8
        want = np.linalg.cholesky(gaussian(z[head][s], z[head][s]))
        np.testing.assert_allclose(to_numpy(triangle)[head], want, rtol=0, atol=1e3 * EPS)


def test_hidden_tokens_are_never_chosen():
    z, shown = draw(0, 30, 3), np.arange(30) % 3 == 0
    for seed in range(10):
        assert shown[pivots_of(z, np.random.default_rng(seed).random(8), shown=shown)[0]].all()


def test_pivots_beyond_the_rank_add_nothing():
    """Three different tokens: after three pivots nothing is left, and further rows are those of the identity."""
    z = np.repeat(draw(0, 3, 2), 4, axis=0)
    places, triangle = pivots_of(z, np.random.default_rng(0).random(5))
    assert np.unique(places[:3] // 4).size == 3
    assert np.array_equal(triangle[3:], np.eye(5)[3:])
    problem = nl.AttentionProblem(z, z)  # three queries and three shifted keys that differ
    P = nl.method("rpcholesky", m=9)(problem, rng=0)
    np.testing.assert_allclose(P.dense(), problem.exact().dense(), rtol=0, atol=1e6 * EPS)


def test_mean_trace_error_by_enumeration_keeps_the_promise():
    """One token at a time from a grid of uniform numbers; the errors are of the Gaussian kernel."""
    z = 0.7 * draw(2, 7, 2)
    kernel = gaussian(z, z)
    w = np.sort(np.linalg.eigvalsh(kernel))[::-1]
    grid = (np.arange(16) + 0.5) / 16
    k = theory.rpcholesky_pivots(1, epsilon=1.0, eta=w[1:].sum() / w.sum())
    errors = []
    for u in product(grid, repeat=k):
        s = pivots_of(z, u)[0]
        errors.append(np.trace(kernel - kernel[:, s] @ np.linalg.solve(kernel[np.ix_(s, s)], kernel[s])))
    assert 0 < np.mean(errors) <= 2 * w[1:].sum()


# -- the method --------------------------------------------------------------------------------------------------------


def test_kernel_before_normalisation_is_the_nystrom_approximation(xp):
    q, k = draw(0, 12, 3), draw(1, 15, 3)
    P = nl.method("rpcholesky", m=6)(nl.AttentionProblem(xp.asarray(q), xp.asarray(k)), rng=5)
    assert isinstance(P, RowNormalised)
    assert isinstance(P.op, LowRank)
    assert P.op.rank == 6
    x, y = 3**-0.25 * q, 3**-0.25 * k
    y = y - y.mean(0) - x.mean(0)
    z = np.concatenate([x, y])
    places, _ = pivots_of(z, np.random.default_rng(5).random(6), 0.5)
    a = np.exp(z @ z.T)
    want = a[:12][:, places] @ np.linalg.solve(a[np.ix_(places, places)], a[places][:, 12:])
    got = to_numpy(P.op.dense()) * np.exp(to_numpy(P.row_scale_log))[:, None]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e6 * EPS * np.abs(want).max())
    np.testing.assert_allclose(to_numpy(P.dense()), want / want.sum(-1, keepdims=True), rtol=0, atol=1e6 * EPS)


def test_error_falls_to_rounding_with_the_pivots():
    problem = nl.AttentionProblem(0.5 * draw(0, 40, 2), 0.5 * draw(1, 40, 2))
    exact = problem.exact().dense()
    errors = [
        np.median([np.abs(nl.method("rpcholesky", m=m)(problem, rng=s).dense() - exact).max() for s in range(3)])
        for m in (2, 6, 12, 40)
    ]
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[-1] < 1e-7


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sharp_logits_stay_finite(balance, dtype):
    q = draw(0, 60, 4)
    for sign in (1.0, -1.0):
        k = draw(1, 60, 4)
        root = (50 / np.std(0.5 * q @ k.T)) ** 0.5
        problem = nl.AttentionProblem((root * q).astype(dtype), (sign * root * k).astype(dtype))
        P = nl.method("rpcholesky", m=12, balance=balance)(problem, rng=0)
        size = np.abs(P.op.left) @ np.abs(P.op.right).sum(axis=0)
        amplification = size / np.abs(P.sums)  # infinite or NaN entries fail below
        defect = np.abs(P.row_sums() - 1)
        assert np.all(defect <= 1e3 * np.finfo(dtype).eps * amplification)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"m": 4, "balance": 2.0}, "balance must be a number between 0 and 1"), ({"m": 0}, "m must be")],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        nl.method("rpcholesky", **options)


def test_too_many_tokens_and_causality_are_refused():
    q, k, keep = draw(0, 5, 2), draw(1, 9, 2), np.arange(9) < 4
    with pytest.raises(ValueError, match="m=10 tokens cannot be drawn from 9"):
        nl.method("rpcholesky", m=10)(nl.AttentionProblem(q, k, key_mask=keep), rng=0)
    with pytest.raises(Unsupported, match="earlier"):
        nl.method("rpcholesky", m=2)(nl.AttentionProblem(q, q, causal=True), rng=0)
