"""EVA against a dense definition; where it is exact, and how its bias shrinks with the segments."""

import numpy as np
import pytest
from scipy.special import ndtri, softmax

import nla_llm as nl
from nla_llm.backend import to_numpy

EPS = np.finfo(np.float64).eps


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def close(got, want, constant=1000):
    np.testing.assert_allclose(to_numpy(got), want, rtol=0, atol=constant * EPS * max(1.0, np.abs(want).max()))


def numbers(n, m):
    lengths = [n // m + (s >= m - n % m) for s in range(m)]
    return np.repeat(np.arange(m), lengths)


def nested(n, m, windows):
    """Windows first, then the segments of each: numbers of both, token by token."""
    window, parts = numbers(n, windows), np.bincount(numbers(m, windows))
    segment, first = np.empty(n, int), 0
    for b, part in enumerate(parts):
        segment[window == b] = first + numbers(np.sum(window == b), part)
        first += part
    return window, segment


def eva(x, y, m, noise, *, causal=False, keep=None, windows=None):
    """Weights in proportion: exp(x·y) in the own window, |c| exp(x·ȳ_c) shared out elsewhere."""
    keep = np.ones(len(y), bool) if keep is None else keep
    (window, of_query), (window_of_key, of_key) = (nested(len(a), m, min(m, windows or m)) for a in (x, y))
    A = np.where(window[:, None] == window_of_key, np.exp(x @ y.T), 0) * keep
    for c in range(m):
        members = (of_key == c) & keep
        own = of_query == c
        if not members.any():
            continue
        omega = x[own].mean(axis=0) + y[members].mean(axis=0) + noise[c]
        shares = softmax(y[members] @ omega - np.sum(y[members] ** 2, axis=1) / 2)
        here = window_of_key[of_key == c][0]
        others = window > here if causal else window != here
        weight = members.sum() * np.exp(x[others] @ y[members].mean(axis=0))
        A[np.ix_(others, members)] = weight[:, None] * shares
    A = np.tril(A) if causal else A
    return A / A.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(1, None), (3, None), (5, None), (12, None), (3, 5), (5, 2), (7, 3), (12, 5)])
def test_eva_is_its_definition(sizes, causal, masked, xp):
    m, windows = sizes
    n_q, n_k = (12, 12) if causal else (14, 12)
    q, k, v = draw(0, 2, n_q, 3), draw(1, 2, n_k, 3), draw(2, 2, n_k, 2)
    keep = (np.arange(n_k) % 3 != 1) & ~np.isin(np.arange(n_k), [5, 6, 7, 8]) if masked else None
    noise = np.random.default_rng(4).standard_normal((m, 3))
    want = np.stack([eva(a, b, m, noise, causal=causal, keep=keep, windows=windows) for a, b in zip(q, k, strict=True)])
    mask = None if keep is None else xp.asarray(keep)
    problem = nl.AttentionProblem(xp.asarray(q), xp.asarray(k), scale=1.0, causal=causal, key_mask=mask)
    P = nl.method("eva", m=m, windows=windows)(problem, rng=4)
    close(P.dense(), want)
    close(P @ xp.asarray(v), want @ v)
    close(P.T @ xp.asarray(draw(5, 2, n_q, 2)), np.swapaxes(want, -1, -2) @ draw(5, 2, n_q, 2))


def test_without_draws_every_direction_is_at_its_mean():
    q, k, keep = draw(0, 11, 3), draw(1, 11, 3), np.arange(11) % 4 != 2
    problem = nl.AttentionProblem(q, k, scale=1.0, key_mask=keep)
    close(nl.method("eva", m=4, sampled=False)(problem).dense(), eva(q, k, 4, np.zeros((4, 3)), keep=keep))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("m", [1, 13])
def test_exact_with_one_segment_and_with_one_key_in_each(m, causal):
    problem = nl.AttentionProblem(draw(0, 2, 13, 3), draw(1, 2, 13, 3), causal=causal)
    close(nl.method("eva", m=m)(problem, rng=0).dense(), problem.exact().dense())


def test_exact_where_keys_agree_inside_segments():
    """Nothing is approximated then, whatever the queries and the draw: the factor |c| counts the equal keys."""
    k = np.repeat(draw(1, 5, 3), [2, 3, 3, 3, 3], axis=0)
    assert np.array_equal(np.repeat(np.arange(5), [2, 3, 3, 3, 3]), numbers(14, 5))
    problem = nl.AttentionProblem(draw(0, 9, 3), k)
    close(nl.method("eva", m=5)(problem, rng=0).dense(), problem.exact().dense())


def test_the_error_falls_with_the_segments_of_fixed_windows():
    problem = nl.AttentionProblem(draw(0, 60, 3), draw(1, 60, 3))
    exact = problem.exact().dense()

    def error(m, windows=None):
        return np.linalg.norm(nl.method("eva", m=m, windows=windows, sampled=False)(problem).dense() - exact)

    errors = [error(m, 4) for m in (4, 12, 30, 60)]
    assert np.all(np.diff(errors) < 0)
    assert errors[-1] < 1e-12
    assert error(1) < 1e-12 < error(4) < error(12)  # where every segment is a window it rises at first


def test_equal_logits_give_equal_weights():
    """Without |c|, or with the own segment counted twice, they would not be."""
    problem = nl.AttentionProblem(np.zeros((11, 2)), np.zeros((11, 2)))
    close(nl.method("eva", m=4)(problem, rng=0).dense(), np.full((11, 11), 1 / 11))


class Constant(np.random.Generator):
    def __init__(self, value):
        super().__init__(np.random.PCG64(0))
        self.value = value

    def standard_normal(self, size=None, dtype=float, out=None):
        return np.full(size, self.value)


def bias(q, centres, spread, m):
    """‖E P̂ − P‖_F for tokens on a line, by an equal-weight quadrature of ω.

    A row is linear in the shares of each segment, so that all segments may use the same noise.
    """
    n = q.shape[0]
    offsets = np.linspace(-1, 1, n // m)
    k = (centres[:, None] + spread * offsets).reshape(-1, 1)
    problem = nl.AttentionProblem(q, k, scale=1.0)
    nodes = ndtri((np.arange(200) + 0.5) / 200)
    mean = np.mean([nl.method("eva", m=m)(problem, rng=Constant(t)).dense() for t in nodes], axis=0)
    return np.linalg.norm(mean - problem.exact().dense())


def test_eva_is_biased_to_first_order_in_the_spread_of_a_segment():
    """The division of a segment's weight follows its own queries, not the one at hand."""
    q, centres = draw(0, 12, 1), draw(1, 3)
    errors = [bias(q, centres, spread, 3) for spread in (0.2, 0.1, 0.05)]
    assert errors[0] > 5e-3
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2, rtol=0.15)


def test_the_bias_is_of_second_order_where_the_queries_agree():
    q, centres = np.full((12, 1), 0.8), draw(1, 3)
    errors = [bias(q, centres, spread, 3) for spread in (0.1, 0.05, 0.025)]
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 4, rtol=0.15)


def test_refusals():
    q = draw(0, 6, 2)
    with pytest.raises(ValueError, match="m=5 segments cannot be made of 6 queries and 4 keys"):
        nl.method("eva", m=5)(nl.AttentionProblem(q, q[:4]), rng=0)
    with pytest.raises(nl.methods.Unsupported, match="window"):
        nl.method("eva", m=2)(nl.AttentionProblem(q, q, window=2), rng=0)
