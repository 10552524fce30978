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


def parts(n_q, n_k, m, window=None):
    """Windows of queries and of keys, then the groups of both on each level, token by token."""
    fewest = min(-(-n_k // (window or m)), n_q)
    if fewest <= m:
        (win_q, seg_q), (win_k, seg_k) = nested(n_q, m, fewest), nested(n_k, m, fewest)
        return (win_q, win_k), [(seg_q, seg_k)]
    halvings = 0
    while m * 2**halvings < fewest and m * 2 ** (halvings + 1) <= min(n_q, n_k):
        halvings += 1
    win_q, win_k = (numbers(n, m * 2**halvings) for n in (n_q, n_k))
    return (win_q, win_k), [(win_q // 2**h, win_k // 2**h) for h in range(halvings, -1, -1)]


def eva(x, y, m, rng, *, causal=False, keep=None, window=None):
    """Weights in proportion: exp(x·y) in the own window, |c| exp(x·ȳ_c) shared out in the largest groups without it."""
    keep = np.ones(len(y), bool) if keep is None else keep
    (win_q, win_k), levels = parts(len(x), len(y), m, window)
    A = np.where(win_q[:, None] == win_k, np.exp(x @ y.T), 0) * keep
    owner = np.where(win_q[:, None] == win_k, -1, -2)  # -2: not yet in any group
    for level, (of_query, of_key) in enumerate(levels):
        groups = of_key.max() + 1
        noise = np.zeros((groups, x.shape[1])) if rng is None else rng.standard_normal((groups, x.shape[1]))
        for c in range(groups):
            whole = of_key == c
            members, here = whole & keep, win_k[whole]
            others = ~np.isin(win_q, here) & np.all(owner[:, whole] == -2, axis=1)
            owner[np.ix_(others, whole)] = level
            if causal:
                others &= win_q > here.max()
            if not members.any():
                continue
            omega = x[of_query == c].mean(axis=0) + y[members].mean(axis=0) + noise[c]
            shares = softmax(y[members] @ omega - np.sum(y[members] ** 2, axis=1) / 2)
            weight = members.sum() * np.exp(x[others] @ y[members].mean(axis=0))
            A[np.ix_(others, members)] = weight[:, None] * shares
    assert np.all(owner != -2)  # every key is in the window or in a group
    A = np.tril(A) if causal else A
    return A / A.sum(axis=1, keepdims=True)


SIZES = [(1, None), (1, 5), (1, 12), (2, 2), (3, None), (3, 1), (3, 2), (5, None), (12, None), (5, 3), (5, 6), (12, 3)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_eva_is_its_definition(sizes, causal, masked, xp):
    m, window = sizes
    n_q, n_k = (12, 12) if causal else (14, 12)
    q, k, v = draw(0, 2, n_q, 3), draw(1, 2, n_k, 3), draw(2, 2, n_k, 2)
    keep = (np.arange(n_k) % 3 != 1) & ~np.isin(np.arange(n_k), [5, 6, 7, 8]) if masked else None
    rngs = [np.random.default_rng(4) for _ in q]
    heads = zip(q, k, rngs, strict=True)
    want = np.stack([eva(a, b, m, rng, causal=causal, keep=keep, window=window) for a, b, rng in heads])
    mask = None if keep is None else xp.asarray(keep)
    problem = nl.AttentionProblem(xp.asarray(q), xp.asarray(k), scale=1.0, causal=causal, key_mask=mask)
    P = nl.method("eva", m=m, window=window)(problem, rng=4)
    close(P.dense(), want)
    close(P @ xp.asarray(v), want @ v)
    close(P.T @ xp.asarray(draw(5, 2, n_q, 2)), np.swapaxes(want, -1, -2) @ draw(5, 2, n_q, 2))


@pytest.mark.parametrize(("n_q", "n_k"), [(3, 40), (40, 7), (1, 9), (31, 29)])
def test_eva_is_its_definition_where_windows_are_few(n_q, n_k):
    """There are never more windows than queries or keys."""
    q, k = draw(0, n_q, 3), draw(1, n_k, 3)
    want = eva(q, k, 1, np.random.default_rng(4), window=2)
    close(nl.method("eva", m=1, window=2)(nl.AttentionProblem(q, k, scale=1.0), rng=4).dense(), want)


@pytest.mark.parametrize("m", [2, 4])
def test_without_draws_every_direction_is_at_its_mean(m):
    q, k, keep = draw(0, 11, 3), draw(1, 11, 3), np.arange(11) % 4 != 2
    problem = nl.AttentionProblem(q, k, scale=1.0, key_mask=keep)
    close(nl.method("eva", m=m, sampled=False)(problem).dense(), eva(q, k, m, None, keep=keep))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("m", "window"), [(1, 13), (4, 13), (13, None), (13, 1), (13, 4)])
def test_exact_with_one_window_and_with_one_key_in_each_segment(m, window, causal):
    problem = nl.AttentionProblem(draw(0, 2, 13, 3), draw(1, 2, 13, 3), causal=causal)
    close(nl.method("eva", m=m, window=window)(problem, rng=0).dense(), problem.exact().dense())


def test_no_window_is_longer_than_it_may_be_and_operations_are_linear_in_the_tokens():
    """Every row sees one window exactly; twice the tokens, one halving more."""

    def operations(n, m):
        x = np.zeros((n, 4))
        problem = nl.AttentionProblem(x, x, x)
        method = nl.method("eva", m=m)
        return method.cost(problem).at(problem, method).total()

    for n, m in ((1000, 4), (777, 8), (130, 16)):
        (_, win_k), _ = parts(n, n, m)
        assert np.bincount(win_k).max() <= m
    for m in (4, 8, 16):
        assert 2 < operations(20000, m) / operations(10000, m) < 2.3
        assert operations(10**6, m) / operations(10**5, m) < 13


@pytest.mark.parametrize("window", [1, 2, 3, 5, 6])
def test_exact_where_keys_agree_inside_segments(window):
    """Nothing is approximated then, whatever the queries and the draw: the factor |c| counts the equal keys."""
    _, levels = parts(9, 14, 4, window)
    problem = nl.AttentionProblem(draw(0, 9, 3), draw(1, 4, 3)[levels[0][1]])
    close(nl.method("eva", m=4, window=window)(problem, rng=0).dense(), problem.exact().dense())


def test_the_error_falls_with_the_segments_and_with_the_window():
    q, k = np.cumsum(draw(0, 2, 64, 3), axis=1) / 4  # neighbours are alike
    problem = nl.AttentionProblem(q, k)
    exact = problem.exact().dense()

    def error(m, window):
        method = nl.method("eva", m=m, window=window, sampled=False)
        return np.linalg.norm(method(problem).dense() - exact)

    errors = [error(m, 16) for m in (1, 4, 8, 16, 32, 64)]
    assert np.all(np.diff(errors) < 0)
    assert errors[-1] < 1e-12
    errors = [error(4, window) for window in (2, 4, 8, 16, 32, 64)]
    assert np.all(np.diff(errors) < 0)
    assert errors[-1] < 1e-12


def test_equal_logits_give_equal_weights():
    """Without |c|, or with the own segment counted twice, they would not be."""
    problem = nl.AttentionProblem(np.zeros((11, 2)), np.zeros((11, 2)))
    for m in (1, 2, 4):
        close(nl.method("eva", m=m)(problem, rng=0).dense(), np.full((11, 11), 1 / 11))


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
    mean = np.mean([nl.method("eva", m=m, window=n // m)(problem, rng=Constant(t)).dense() for t in nodes], axis=0)
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
