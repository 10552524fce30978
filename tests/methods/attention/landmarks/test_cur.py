"""CUR factorisations: samples, cores, refusals."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods import Unsupported
from nla_llm.operators import Skeleton

EPS = np.finfo(np.float64).eps


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def gaussian(x, y):
    return np.exp(-((x[..., :, None, :] - y[..., None, :, :]) ** 2).sum(-1) / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 4, "sampling": "best"}, "sampling must be one of uniform"),
        ({"m": 4, "core": "best"}, "core must be one of ridge"),
        ({"m": 4, "ridge": float("nan")}, "ridge must be a number > 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        nl.method("cur_attention", **options)


def test_too_many_tokens_and_causality_are_refused():
    q, k, keep = draw(0, 5, 2), draw(1, 9, 2), np.arange(9) < 4
    with pytest.raises(ValueError, match="5 queries and 4 visible keys"):
        nl.method("cur_attention", m=5)(nl.AttentionProblem(q, k, key_mask=keep), rng=0)
    with pytest.raises(Unsupported, match="earlier"):
        nl.method("cur_attention", m=2)(nl.AttentionProblem(q, q, causal=True), rng=0)


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
