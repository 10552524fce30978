"""Randomly pivoted Cholesky and CUR against naive definitions, enumeration of pivots, and dense leverage scores."""

from itertools import product

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods import Unsupported
from nla_llm.methods.attention.landmarks.columns import random_pivots
from nla_llm.operators import LowRank, RowNormalised, Skeleton
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
    ("name", "options", "message"),
    [
        ("rpcholesky", {"m": 4, "balance": 2.0}, "balance must be a number between 0 and 1"),
        ("rpcholesky", {"m": 0}, "m must be"),
        ("cur_attention", {"m": 4, "sampling": "best"}, "sampling must be one of uniform"),
        ("cur_attention", {"m": 4, "core": "best"}, "core must be one of ridge"),
        ("cur_attention", {"m": 4, "ridge": float("nan")}, "ridge must be a number > 0"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        nl.method(name, **options)


def test_too_many_tokens_and_causality_are_refused():
    q, k, keep = draw(0, 5, 2), draw(1, 9, 2), np.arange(9) < 4
    with pytest.raises(ValueError, match="m=10 tokens cannot be drawn from 9"):
        nl.method("rpcholesky", m=10)(nl.AttentionProblem(q, k, key_mask=keep), rng=0)
    with pytest.raises(ValueError, match="5 queries and 4 visible keys"):
        nl.method("cur_attention", m=5)(nl.AttentionProblem(q, k, key_mask=keep), rng=0)
    for name in ("rpcholesky", "cur_attention"):
        with pytest.raises(Unsupported, match="earlier"):
            nl.method(name, m=2)(nl.AttentionProblem(q, q, causal=True), rng=0)


# -- CUR ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("core", ["pinv", "ridge"])
@pytest.mark.parametrize("sampling", ["uniform", "leverage", "ridge_leverage"])
def test_sampled_rows_and_columns_are_those_of_the_kernel(sampling, core):
    q, k = draw(0, 14, 3), draw(1, 11, 3)
    problem = nl.AttentionProblem(q, k)
    P = nl.method("cur_attention", m=4, sampling=sampling, core=core, ridge=1e-2)(problem, rng=2)
    assert isinstance(P.op, Skeleton)
    a = np.exp(3**-0.5 * q @ k.T)
    c, r, w = P.op.left.dense(), P.op.right.dense(), P.op.intersection
    scaled_rows, scaled_columns = a / a.max(1, keepdims=True), a.T
    rows = [int(np.argmin(np.abs(scaled_rows - row).max(1))) for row in r]
    ratios = c[:, :1] / scaled_columns.T
    columns = [int(np.argmin(np.ptp(c[:, [j]] / a * np.exp(P.row_scale_log)[:, None], axis=0))) for j in range(4)]
    assert ratios.shape == (14, 11)
    np.testing.assert_allclose(r, scaled_rows[rows], rtol=0, atol=100 * EPS)
    np.testing.assert_allclose(c * np.exp(P.row_scale_log)[:, None], a[:, columns], rtol=1e-12)
    np.testing.assert_allclose(w, scaled_rows[np.ix_(rows, columns)], rtol=1e-12)
    level = 1e-2 * np.linalg.norm(w, 1) * np.linalg.norm(w, np.inf)
    inverse = np.linalg.inv(w) if core == "pinv" else np.linalg.solve(w.T @ w + level * np.eye(4), w.T)
    want = a[:, columns] @ inverse @ r
    got = P.dense()
    want = want / want.sum(1, keepdims=True)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e4 * EPS * np.linalg.cond(w) * np.abs(want).max())
    assert np.isclose(float(P.op.core_condition), np.linalg.cond(w), rtol=1e-6)


def test_intersection_of_full_rank_reproduces_a_kernel_of_low_rank():
    """Queries that repeat three directions: the kernel has rank three and CUR with the pseudo-inverse is exact."""
    q, k = np.repeat(2 * draw(0, 3, 2), 6, axis=0), np.repeat(2 * draw(1, 3, 2), 5, axis=0)
    problem = nl.AttentionProblem(q, k)
    P = nl.method("cur_attention", m=9, core="pinv", sampling="uniform")(problem, rng=0)
    np.testing.assert_allclose(P.dense(), problem.exact().dense(), rtol=0, atol=1e-10)


def test_ridge_tames_what_the_pseudo_inverse_does_to_isotropic_data():
    problem = nl.AttentionProblem(draw(0, 256, 16), draw(1, 256, 16))
    exact = problem.exact().dense()

    def error(core):
        method = nl.method("cur_attention", m=64, core=core)
        return np.median([np.linalg.norm(method(problem, rng=s).dense() - exact) for s in range(3)])

    assert error("ridge") < 0.8 * np.linalg.norm(exact)
    assert error("pinv") > 3 * np.linalg.norm(exact)


@pytest.mark.parametrize("masked", [False, True])
def test_optimal_core_is_the_best_for_its_rows_and_columns(masked, xp):
    """The sampled columns and rows are those of P that lie in the spans of the factors."""
    q, k, keep = draw(0, 14, 3), draw(1, 11, 3), np.arange(11) % 4 != 1
    mask = keep if masked else None
    exact = nl.AttentionProblem(q, k, key_mask=mask).exact().dense()
    problem = nl.AttentionProblem(xp.asarray(q), xp.asarray(k), key_mask=None if mask is None else xp.asarray(mask))
    P = nl.method("cur_attention", m=4, core="optimal")(problem, rng=1)
    left, right = to_numpy(P.left.dense()), to_numpy(P.right.dense()).T
    outside = np.linalg.norm(exact - left @ (left.T @ exact), axis=0)
    columns = [j for j in np.flatnonzero(outside < 1e-10) if mask is None or mask[j]]
    rows = np.flatnonzero(np.linalg.norm(exact.T - right @ (right.T @ exact.T), axis=0) < 1e-10)
    assert len(columns) == len(rows) == 4
    c, r = exact[:, columns], exact[rows]
    got = to_numpy(P.dense())
    np.testing.assert_allclose(got, c @ (np.linalg.pinv(c) @ exact @ np.linalg.pinv(r)) @ r, rtol=0, atol=1e-10)
    np.testing.assert_allclose(to_numpy(P.intersection), exact[np.ix_(rows, columns)], rtol=0, atol=100 * EPS)
    floor = np.sqrt((np.linalg.svd(exact, compute_uv=False)[4:] ** 2).sum())
    from_intersection = c @ np.linalg.pinv(exact[np.ix_(rows, columns)]) @ r
    assert floor < np.linalg.norm(got - exact) < np.linalg.norm(from_intersection - exact)


def test_the_optimal_core_takes_logits_whose_rounding_is_beyond_the_exponent():
    """Chosen columns are made once more, with other roundings than the row sums that divide them."""
    q, k = np.random.default_rng(0).standard_normal((2, 64, 64))
    q, k = (5e17 / np.linalg.norm(a, axis=1).max() * a for a in (q, k))
    P = nl.method("cur_attention", m=8, core="optimal")(nl.AttentionProblem(q, k), rng=0)
    assert np.isfinite(P.dense()).all()
    assert np.linalg.norm(P.dense(), 2) <= 64**0.5 * (1 + 1e-12)  # between projections, no larger than softmax
