"""Random Maclaurin and Poisson features against products written out with the same draws; laws of degrees and rates."""

from math import ceil, factorial

import numpy as np
import pytest
from methods.attention.kernels.written_out import (
    assert_heads_stand_alone,
    assert_kernel,
    assert_single_precision,
    draw,
    kernel_of,
)
from scipy.stats import poisson

import nla_llm as nl
from nla_llm.methods import Unsupported
from nla_llm.methods.attention.kernels.series_features import _poisson_quantile, _signed_powers
from nla_llm.operators import ZeroRowSumError

MACLAURIN = [{"m": m, "stratified": s} for m in (1, 2, 7, 40) for s in (False, True)]
SERIES = [
    *[("maclaurin_features", options) for options in MACLAURIN],
    ("poisson_features", {"m": 7, "rate": 0.3}),
    ("poisson_features", {"m": 7}),
]


def definition(method, x, y, seed, *, keep=None):
    """Â_ij as a mean over features of products multiplied out, from the numbers that the method draws."""
    rng, m, d = np.random.default_rng(seed), method.m, x.shape[-1]
    total = 0.0
    if method.name == "poisson_features":
        visible = slice(None) if keep is None else keep
        sigma = np.mean([a**2 @ b**2 for a in x for b in y[visible]])
        rate = method.rate or np.sqrt(sigma / d)
        for powers in poisson.ppf(rng.random((m, d)), rate):
            a, b = (np.exp(rate * d / 2) * np.prod((z / np.sqrt(rate)) ** powers, axis=-1) for z in (x, y))
            total = total + np.outer(a, b)
        return total / m
    u = rng.random(m)
    u = (np.arange(m) + u) / m if method.stratified else u
    largest = ceil(np.log2(m)) + 6
    law = 0.5 ** np.arange(1, largest + 2)
    law /= law.sum()
    degrees = sorted((int(np.argmax(np.cumsum(law) > v)) for v in u), reverse=True)
    signs = [
        2.0 * rng.integers(0, 2, (ceil(m / 2**k) if method.stratified else m, d)) - 1 for k in range(1, largest + 1)
    ]
    for r, k in enumerate(degrees):
        a, b = (np.prod([z @ signs[j][r] for j in range(k)], axis=0) * np.ones(len(z)) for z in (x, y))
        total = total + np.outer(a, b) / (factorial(k) * law[k])
    return total / m


# -- the definition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", [{}, {"causal": True}, {"masked": True}], ids=str)
@pytest.mark.parametrize("scale", [0.6, -0.6])
@pytest.mark.parametrize(("name", "options"), SERIES, ids=str)
def test_definition(name, options, scale, structure):
    n, d = 70, 3
    q, k = draw(0, n, d), draw(1, n, d)
    method, causal = nl.method(name, **options), "causal" in structure
    if causal and "causal" not in method.properties.supports:
        with pytest.raises(Unsupported, match=r"causal: its rate is a mean over all keys; pass rate=\.\.\."):
            method(nl.AttentionProblem(q, k, causal=True), rng=0)
        return
    keep = np.arange(n) % 4 != 2 if "masked" in structure else np.ones(n, bool)
    problem = nl.AttentionProblem(q, k, scale=scale, causal=causal, key_mask=keep if "masked" in structure else None)
    x, y = np.sqrt(0.6) * q, np.copysign(np.sqrt(0.6), scale) * k
    want = definition(method, x, y, seed=3, keep=keep) * keep
    want = np.tril(want) if causal else want
    assert_kernel(method(problem, rng=3), want)


@pytest.mark.parametrize(("name", "options"), SERIES[4:], ids=str)
def test_other_libraries_and_batches(name, options, xp):
    q, k = draw(0, 2, 3, 11, 3), draw(1, 2, 1, 13, 3)
    q[1] *= 3  # so that rates differ
    assert_heads_stand_alone(nl.method(name, **options), definition, q, k, xp)


@pytest.mark.parametrize(("name", "options"), SERIES, ids=str)
def test_single_precision(name, options):
    assert_single_precision(nl.method(name, **options), definition, 200)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("std", [50.0, 1000.0])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("name", "options"), SERIES[6:], ids=str)
def test_sharp_logits_of_both_signs(name, options, sign, std, dtype, causal):  # noqa: PLR0917 - a grid
    q, k = draw(0, 90, 16), draw(1, 90, 16)
    method = nl.method(name, **options)
    if causal and "causal" not in method.properties.supports:
        return
    root = np.sqrt(std / np.std(q @ k.T / 4))
    problem = nl.AttentionProblem((root * q).astype(dtype), (sign * root * k).astype(dtype), causal=causal)
    P = method(problem, rng=0)
    dense = P.dense()
    assert np.all(np.isfinite(dense))
    tolerance = 1e4 * float(np.finfo(dtype).eps) * np.abs(dense).max()  # weights of both signs may be large
    np.testing.assert_allclose(dense.sum(-1), 1, rtol=0, atol=tolerance)


# -- Maclaurin ---------------------------------------------------------------------------------------------------------


class Evenly:
    """A generator whose numbers are evenly spread."""

    def random(self, size):
        return (np.arange(size) + 0.5) / size


def test_degrees_follow_their_law():
    m = 2**12
    method = nl.method("maclaurin_features", m=m)
    law = nl.theory.sketches.degree_law(method.largest_degree)
    degrees = method._degrees(Evenly())
    assert np.all(np.abs(np.bincount(degrees, minlength=len(law)) - m * law) <= 1)
    assert np.all(np.diff(degrees) <= 0)


@pytest.mark.parametrize("m", [1, 2, 3, 16, 100, 257])
def test_stratified_degrees_need_few_linear_forms(m):
    method = nl.method("maclaurin_features", m=m, stratified=True)
    capacities = method._capacities()
    assert len(capacities) == method.largest_degree
    assert sum(capacities) <= m + method.largest_degree
    for seed in range(200):
        degrees = method._degrees(np.random.default_rng(seed))
        assert all(np.count_nonzero(degrees >= k) <= c for k, c in enumerate(capacities, start=1))


def test_hardly_any_degree_is_cut():
    for m in (1, 16, 1000):
        largest = nl.method("maclaurin_features", m=m).largest_degree
        assert m * 0.5 ** (largest + 1) <= 2**-7


@pytest.mark.parametrize("stratified", [False, True])
def test_error_is_what_theory_says(stratified):
    """At a large m all entries are within six of their standard deviations, of which they have much in common."""
    problem = nl.AttentionProblem(draw(0, 9, 3), draw(1, 8, 3), scale=0.1)
    method = nl.method("maclaurin_features", m=50_000, stratified=stratified)
    deviation = kernel_of(method(problem, rng=0)) / np.exp(0.1 * problem.q @ problem.k.T) - 1
    expected = np.sqrt(method.theory(problem).relative_variance())
    assert np.all(np.abs(deviation) < 6 * expected)
    assert 0.05 < np.sqrt(np.mean((deviation / expected) ** 2)) < 2
    assert np.all(expected < 0.05)


def test_a_query_of_zeros_sees_all_keys_alike():
    """Only features of degree zero remain, and of sixteen there is one nearly always."""
    q, k = draw(0, 4, 3), draw(1, 5, 3)
    q[2], k[1] = 0, 0
    P = nl.method("maclaurin_features", m=16)(nl.AttentionProblem(q, k), rng=0).dense()
    np.testing.assert_allclose(P[2], 0.2, rtol=1e-12)
    seeds = [s for s in range(50) if np.random.default_rng(s).random(1) > 0.6]  # m = 1: its degree is above zero
    with pytest.raises(ZeroRowSumError, match=r"25\.00% of the rows"):
        nl.method("maclaurin_features", m=1)(nl.AttentionProblem(q, k), rng=seeds[0])


# -- Poisson -----------------------------------------------------------------------------------------------------------


def test_quantiles_are_those_of_the_distribution():
    u = np.random.default_rng(0).random(4000)
    for rate in (1e-8, 0.3, 5.0, 80.0, 3000.0):
        np.testing.assert_array_equal(_poisson_quantile(u, np.full((1,), rate)), poisson.ppf(u, rate))
    assert not np.any(_poisson_quantile(u, np.zeros(1)))
    assert np.all(np.isfinite(_poisson_quantile(np.array([0.0, 1 - 2**-53]), np.array([1.0]))))


def test_signs_and_logarithms_of_powers():
    x = np.array([[-2.0, 3.0, 0.0], [-0.5, -1.0, 2.0], [0.0, 0.0, 0.0]])
    powers = np.array([[0.0, 0, 0], [1, 0, 0], [2, 3, 0], [3, 1, 1], [0, 0, 2], [101, 50, 0]])
    sign, log = _signed_powers(x, powers.T)
    np.testing.assert_allclose(sign * np.exp(log), np.prod(x[:, None] ** powers[None], axis=-1), rtol=1e-12)
    np.testing.assert_array_equal(np.unique(sign), [-1, 0, 1])


def test_a_hidden_key_does_not_change_the_rate():
    q, k, keep = draw(0, 6, 3), draw(1, 6, 3), np.arange(6) < 4
    method = nl.method("poisson_features", m=8)
    P = method(nl.AttentionProblem(q, k, key_mask=keep), rng=0).dense()
    np.testing.assert_allclose(P[:, :4], method(nl.AttentionProblem(q, k[:4]), rng=0).dense(), rtol=1e-12)


def test_heads_do_not_change_each_other_s_draw():
    """Each head has a rate of its own, and either of two heads may change without the other."""
    q, k = draw(0, 2, 6, 3), draw(1, 2, 6, 3)
    method = nl.method("poisson_features", m=8)
    before = method(nl.AttentionProblem(q, k), rng=0).dense()
    for head in (0, 1):
        other = q.copy()
        other[head] *= 5
        after = method(nl.AttentionProblem(other, k), rng=0).dense()
        np.testing.assert_allclose(after[1 - head], before[1 - head], rtol=1e-12)
        assert np.abs(after[head] - before[head]).max() > 1e-2


def test_precision_does_not_change_the_draw():
    q, k = draw(0, 50, 8).astype(np.float32), draw(1, 50, 8).astype(np.float32)
    method = nl.method("poisson_features", m=4000)
    coarse, fine = (method._rates(nl.AttentionProblem(q.astype(t), k.astype(t))) for t in (np.float32, np.float64))
    assert coarse == fine


def test_queries_of_zeros():
    """Without any common coordinate the rate is zero, the only power is none, and softmax is uniform: exact."""
    problem = nl.AttentionProblem(np.zeros((3, 2)), draw(1, 4, 2))
    np.testing.assert_allclose(nl.method("poisson_features", m=3)(problem, rng=0).dense(), 0.25, rtol=1e-12)
    with pytest.raises(ZeroRowSumError):
        nl.method("poisson_features", m=3, rate=20.0)(problem, rng=0)


def test_error_of_poisson_features_is_what_theory_says():
    problem = nl.AttentionProblem(draw(0, 9, 3), draw(1, 8, 3), scale=0.1)
    for options in ({}, {"rate": 0.1}):
        method = nl.method("poisson_features", m=50_000, **options)
        deviation = kernel_of(method(problem, rng=0)) / np.exp(0.1 * problem.q @ problem.k.T) - 1
        expected = np.sqrt(method.theory(problem).relative_variance())
        assert np.all(np.abs(deviation) < 6 * expected)
        assert 0.05 < np.sqrt(np.mean((deviation / expected) ** 2)) < 2
        assert np.all(expected < 0.05)


@pytest.mark.parametrize("rate", [0.0, -1.0, np.inf, np.nan, True])
def test_bad_rates(rate):
    with pytest.raises(ValueError, match="rate must be a number > 0 or None"):
        nl.method("poisson_features", m=3, rate=rate)
