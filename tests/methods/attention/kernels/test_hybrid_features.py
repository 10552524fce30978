"""Hybrid features against the weighted mean of the two estimates that they are made of."""

import numpy as np
import pytest
from methods.attention.kernels.written_out import EPS, draw, kernel_of

import nla_llm as nl
from nla_llm.backend import to_numpy

OPTIONS = (
    {"weight": "angular", "r": 1},
    {"weight": "angular", "r": 3},
    {"weight": "gaussian", "r": 1, "width": 0.6},
    {"weight": "gaussian", "r": 3, "width": 1.2},
)


def textbook(method, x, y, seed):
    rng = np.random.default_rng(seed)
    omega, tau = rng.standard_normal((method.m, x.shape[1])), rng.standard_normal((method.r, x.shape[1]))
    positive = nl.method("positive_features", m=method.m)(nl.AttentionProblem(x, y, scale=1.0), rng=seed)
    wave = nl.method("trigonometric_features", m=method.m)(nl.AttentionProblem(x, y, scale=1.0), rng=seed)
    squares = np.sum(x**2, -1)[:, None] / 2, np.sum(y**2, -1)[None] / 2
    a, b = (x @ omega.T)[:, None], (y @ omega.T)[None]
    np.testing.assert_allclose(kernel_of(positive), np.mean(np.exp(a + b), -1) * np.exp(-sum(squares)), rtol=1e-9)
    if method.weight == "angular":
        weight = 0.5 - np.mean(np.sign(x @ tau.T)[:, None] * np.sign(y @ tau.T)[None], -1) / 2
    else:
        weight = np.mean(np.cos(method.width * (x[:, None] + y[None]) @ tau.T), -1)
    return weight * kernel_of(positive) + (1 - weight) * kernel_of(wave)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, -0.6])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weighted_mean_of_two_estimates(options, scale, causal):
    n = 150
    problem = nl.AttentionProblem(0.8 * draw(0, n, 4), 0.8 * draw(1, n, 4), scale=scale, causal=causal)
    method = nl.method("hybrid_features", m=8, **options)
    root = np.sqrt(abs(problem.scale))
    want = textbook(method, root * problem.q, np.copysign(root, problem.scale) * problem.k, 3)
    want = np.tril(want) if causal else want
    P = method(problem, rng=3)
    np.testing.assert_allclose(kernel_of(P), want, rtol=0, atol=1e3 * EPS * np.abs(want).max())
    if causal:
        assert P.op.chunk == 64  # sides that no earlier key has do not split chunks


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_number_of_features(options):
    method = nl.method("hybrid_features", m=5, **options)
    P = method(nl.AttentionProblem(draw(0, 9, 3), draw(1, 9, 3)), rng=0)
    r = method.r
    assert P.op.rank == 5 * (6 * r if method.weight == "angular" else 6 * r + 2)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_count_equals_formula(options):
    method = nl.method("hybrid_features", m=5, orthogonal=True, **options)
    for structure in ({}, {"causal": True}):
        n = 70 if structure else 50
        problem = nl.AttentionProblem(draw(0, 70, 3), draw(1, n, 3), draw(2, n, 2), **structure)
        assert nl.costs.count(method, problem) == method.cost(problem).at(problem, method)


def test_sides_that_a_token_is_not_on_have_not_underflowed():
    x = draw(0, 40, 4).astype(np.float32)
    near, far = (nl.method("hybrid_features", m=8, r=2)(nl.AttentionProblem(a, a), rng=0) for a in (x, 20 * x))
    assert np.mean(near.op.left == 0) == 0.5
    assert float(near.underflow_share) == 0
    assert float(far.underflow_share) == np.mean(np.stack([far.op.left, far.op.right]) == 0) - 0.5
    assert 0.05 < float(far.underflow_share) < 0.5


def test_exact_at_both_ends():
    x = draw(0, 12, 4)
    method = nl.method("hybrid_features", m=1)
    for y in (x, -x):
        entries = np.diag(kernel_of(method(nl.AttentionProblem(x, y, scale=1.0), rng=0)))
        np.testing.assert_allclose(entries, np.exp(np.sum(x * y, -1)), rtol=1e4 * EPS)
    gaussian = nl.method("hybrid_features", m=1, weight="gaussian")
    entries = np.diag(kernel_of(gaussian(nl.AttentionProblem(0.5 * x, -0.5 * x, scale=1.0), rng=0)))
    np.testing.assert_allclose(entries, np.exp(-np.sum(x**2, -1) / 4), rtol=1e-9)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_query_that_all_keys_oppose_keeps_its_weights(dtype, causal):
    """Keys −20 e and queries 20 e: no trigonometric feature is left, and the positive ones are far below its scale."""
    line = np.linspace(18, 20, 70)[:, None] * np.array([[0.6, 0.8]])
    problem = nl.AttentionProblem(line.astype(dtype), -line.astype(dtype), scale=1.0, causal=causal)
    P = nl.method("hybrid_features", m=4)(problem, rng=0)
    want = nl.method("positive_features", m=4)(problem, rng=0).dense()
    np.testing.assert_allclose(P.dense(), want, rtol=0, atol=1e5 * np.finfo(dtype).eps)


def test_libraries_agree(xp):
    problem = nl.AttentionProblem(0.7 * draw(0, 2, 20, 4), 0.7 * draw(1, 2, 20, 4))
    for options in OPTIONS[1::2]:
        method = nl.method("hybrid_features", m=16, **options)
        want, got = method(problem, rng=0), method(problem.map(xp.asarray), rng=0)
        amplification = (np.abs(want.op.dense()).sum(-1) / np.abs(want.sums)).max()
        np.testing.assert_allclose(to_numpy(got.dense()), want.dense(), rtol=0, atol=1e3 * EPS * amplification**2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"weight": "sine"}, "weight must be one of angular, gaussian, got 'sine'"),
        ({"r": 0}, "r must be a whole number >= 1, got 0"),
        ({"weight": "gaussian", "width": 0.0}, "width must be a number > 0, got 0.0"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        nl.method("hybrid_features", m=4, **options)
