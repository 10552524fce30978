"""Randomised attention and LARA against dense definitions; their means by equal-weight quadrature of the draws."""

import numpy as np
import pytest
from scipy.special import logsumexp, ndtri, softmax

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods.attention.randomised.randomised_attention import _draw_keys, _invert, _query_weights
from nla_llm.operators import Segments
from nla_llm.testing.checks.statistics import kernel

EPS = np.finfo(np.float64).eps


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def close(got, want, constant=1000):
    np.testing.assert_allclose(to_numpy(got), want, rtol=0, atol=constant * EPS * max(1.0, np.abs(want).max()))


class Scripted(np.random.Generator):
    """A generator that gives the numbers that it is told to give."""

    def __init__(self, normal, uniform=None):
        super().__init__(np.random.PCG64(0))
        self.normal, self.uniform_numbers = normal, uniform

    def standard_normal(self, size=None, dtype=float, out=None):
        return np.broadcast_to(self.normal, size)

    def random(self, size=None, dtype=float, out=None):
        return np.broadcast_to(self.uniform_numbers, size)


def midpoints(n):
    return (np.arange(n) + 0.5) / n


# -- randomised attention ----------------------------------------------------------------------------------------------

STRUCTURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": 4},
    "causal window": {"causal": True, "window": 4},
    "key_mask": {"key_mask": np.arange(13) % 4 != 1},
    "causal key_mask": {"causal": True, "key_mask": np.arange(13) % 4 != 1},
    "bias": {"bias": np.where(np.random.default_rng(3).random((13, 13)) < 0.4, -np.inf, draw(9, 13, 13)) + np.eye(13)},
}
STRUCTURES["bias"]["bias"][:, 0] = 0.3


def visible(structure, n=13):
    i, j = np.indices((n, n))
    keep = np.ones((n, n), bool)
    if structure.get("causal"):
        keep &= j <= i
    if "window" in structure:
        keep &= np.abs(i - j) < structure["window"]
    if "key_mask" in structure:
        keep &= structure["key_mask"]
    return keep


@pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
def test_randomised_attention_is_its_definition(structure, xp):
    """Row by row and draw by draw: a key by inversion, ω near it, a softmax over what the query sees."""
    n, m, d = 13, 5, 3
    q, k, v = draw(0, 2, n, d), draw(1, 2, n, d), draw(2, 2, n, 2)
    rng = np.random.default_rng(7)
    uniform, noise = rng.random((n, m)), rng.standard_normal((m, n, d))
    bias, keep = structure.get("bias", np.zeros((n, n))), visible(structure)
    x, y = q * 0.9**0.5, k * 0.9**0.5
    want = np.zeros((2, n, n))
    for h, i, s in np.ndindex(2, n, m):
        p = softmax(np.where(keep[i], x[h, i] @ y[h].T + bias[i], -np.inf))
        key = int(np.argmax(np.cumsum(p) > uniform[i, s]))
        omega = x[h, i] + y[h, key] + noise[s, i]
        logits = omega @ y[h].T - np.sum(y[h] ** 2, axis=-1) / 2 + bias[i]
        want[h, i] += softmax(np.where(keep[i], logits, -np.inf)) / m
    given = {name: xp.asarray(a) if isinstance(a, np.ndarray) else a for name, a in structure.items()}
    problem = nl.AttentionProblem(xp.asarray(q), xp.asarray(k), scale=0.9, **given)
    P = nl.method("randomised_attention", m=m)(problem, rng=7)
    close(P.dense(), want)
    close(P @ xp.asarray(v), want @ v)
    close(P.T @ xp.asarray(v), np.swapaxes(want, -1, -2) @ v)


def test_randomised_attention_is_unbiased_for_softmax_attention_itself():
    """Mean over a grid of uniform numbers times normal quantiles: no row is normalised afterwards."""
    u, t = 500, 60
    q, k = np.array([[1.2], [-0.4]]), np.array([[-1.0], [1.0], [0.3]])
    uniform = np.repeat(midpoints(u), t)[None, :]  # (1, m): the same for both queries
    normal = np.tile(ndtri(midpoints(t)), u)[:, None, None]
    problem = nl.AttentionProblem(q, k)
    P = nl.method("randomised_attention", m=u * t)(problem, rng=Scripted(normal, uniform)).dense()
    exact = problem.exact().dense()
    assert np.abs(P - exact).max() < 4e-3  # of the grid: 1/u in the keys, about 1/t² in the noise
    narrow = nl.method("randomised_attention", m=u * t)(problem, rng=Scripted(0 * normal, uniform)).dense()
    assert np.abs(narrow - exact).max() > 0.03  # without noise, as published for evaluation, it is biased


def test_keys_are_drawn_with_the_probabilities_of_a_row():
    p = np.array([[0.0, 0.3, 0.0, 0.5, 0.2, 0.0]])
    index = _invert(p, midpoints(1000)[None, :], steps=3)
    np.testing.assert_allclose(np.bincount(index[0], minlength=6) / 1000, p[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65])
def test_keys_without_weight_are_never_drawn(n, dtype):
    p = np.zeros((2, n), dtype)
    p[0, n // 2], p[1, [0, n - 1]] = 0.1, 0.3
    p[:, n // 3] += dtype(1e-3)
    uniform = np.array([0.0, np.nextafter(1.0, 0.0)] * 2, dtype).reshape(2, 2)
    uniform = np.concatenate([uniform, np.ones((2, 1), dtype)], axis=1)  # where a uniform number was rounded up
    index = _invert(p, uniform, steps=(n - 1).bit_length())
    assert np.all(np.take_along_axis(p, index, axis=-1) > 0)


def test_keys_are_drawn_block_by_block(monkeypatch):
    problem = nl.AttentionProblem(draw(0, 40, 2), draw(1, 40, 2), causal=True)
    uniform = np.random.default_rng(0).random((40, 3))
    whole = _draw_keys(problem, uniform)
    for name in ("_COPY_ENTRIES", "_ROW_ENTRIES"):
        monkeypatch.setattr(f"nla_llm.methods.attention.randomised.randomised_attention.{name}", 200)
    np.testing.assert_array_equal(_draw_keys(problem, uniform), whole)
    assert np.all(whole <= np.arange(40))
    P = nl.method("randomised_attention", m=3)(problem, rng=0)
    assert len(P.parts) == 3
    monkeypatch.undo()
    close(P.dense(), nl.method("randomised_attention", m=3)(problem, rng=0).dense())


def test_it_is_better_than_keys_drawn_from_softmax_attention():
    """Rao and Blackwell: mean square error over the bound, which is that of m keys drawn from the rows of P."""
    problem = nl.AttentionProblem(draw(0, 30, 4), draw(1, 30, 4))
    method, exact = nl.method("randomised_attention", m=2), problem.exact().dense()
    squared = [np.sum((method(problem, rng=s).dense() - exact) ** 2) for s in range(100)]
    ratio = np.mean(squared) / float(method.theory(problem).error("frobenius")) ** 2
    assert 0.02 < ratio < 0.5


# -- LARA --------------------------------------------------------------------------------------------------------------


def lara_kernel(x, y, proposals, omega, weighting):
    """Σ_s α_s N(ω_s; 0, I)/N(ω_s; μ_s, I) ξ(x, ω_s) ξ(y, ω_s), multiplied out."""
    mu, near_x = proposals

    def log_density(w, mean):
        return -np.sum((w - mean) ** 2, axis=-1) / 2

    total = 0.0
    t = np.stack([softmax(x @ a) for a in near_x], axis=1)
    for s, w in enumerate(omega):
        alpha = np.exp(log_density(w, mu[s]) - logsumexp([log_density(w, a) for a in mu]))
        if weighting == "query":
            alpha = alpha + t[:, s] - t.mean(axis=1)
        ratio = np.exp(log_density(w, 0) - log_density(w, mu[s]))
        left, right = (np.exp(a @ w - np.sum(a**2, axis=-1) / 2) for a in (x, y))
        total = total + (alpha * ratio * left)[:, None] * right
    return total


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighting", ["balance", "query"])
@pytest.mark.parametrize("sizes", [(5, None), (7, 3), (2, 4), (6, 1)])
def test_lara_is_its_definition(sizes, weighting, masked, xp):
    m, proposals = sizes
    q, k, v = draw(0, 11, 3), draw(1, 13, 3), draw(2, 13, 2)
    x, y = q * 0.6**0.5, k * 0.6**0.5
    keep = np.arange(13) % 4 != 1 if masked else np.ones(13, bool)
    c = m if proposals is None else min(m, proposals)
    near_x, near_y = segment_means(x, c), segment_means(y, c, keep)
    number = np.arange(m) % c
    mu = (near_x + near_y)[number]
    omega = mu + np.random.default_rng(5).standard_normal((m, 3))
    A = lara_kernel(x, y, (mu, near_x[number]), omega, weighting) * keep
    mask = xp.asarray(keep) if masked else None
    problem = nl.AttentionProblem(xp.asarray(q), xp.asarray(k), scale=0.6, key_mask=mask)
    P = nl.method("lara", m=m, proposals=proposals, weighting=weighting)(problem, rng=5)
    size = (np.abs(A).sum(axis=1) / np.abs(A.sum(axis=1))).max()
    close(P.dense(), A / A.sum(axis=1, keepdims=True), 1e4 * size)
    close(P @ xp.asarray(v), A / A.sum(axis=1, keepdims=True) @ v, 1e4 * size)
    np.testing.assert_allclose(kernel(P), A, rtol=0, atol=1e4 * EPS * np.abs(A).max())


def segment_means(x, c, keep=None):
    """Means over the segments: the last n mod c ones have a token more; an empty one takes the mean of all."""
    n = len(x)
    keep = np.ones(n, bool) if keep is None else keep
    lengths = [n // c + (s >= c - n % c) for s in range(c)]
    ends = np.cumsum(lengths)
    parts = [(x[a:b])[keep[a:b]] for a, b in zip(ends - lengths, ends, strict=True)]
    return np.stack([part.mean(axis=0) if len(part) else x[keep].mean(axis=0) for part in parts])


@pytest.mark.parametrize("proposals", [1, 2])
def test_lara_is_unbiased_before_normalisation(proposals):
    """Its kernel at normal quantiles, an equal-weight quadrature under each proposal, is exp(x·y)."""
    nodes = 4000
    x, y = np.array([[0.5], [-0.2], [0.7], [0.1]]), np.array([[0.3], [-0.4], [0.2], [0.6]])
    normal = np.repeat(ndtri(midpoints(nodes)), proposals)[:, None]
    problem = nl.AttentionProblem(x, y, scale=1.0)
    P = nl.method("lara", m=nodes * proposals, proposals=proposals)(problem, rng=Scripted(normal))
    np.testing.assert_allclose(kernel(P), np.exp(x @ y.T), rtol=2e-3)


def test_a_proposal_at_the_pair_has_no_variance():
    """One query, one key, one segment: ω is drawn near x + y and the kernel is exact, whatever the draw."""
    x, y = draw(0, 1, 4), draw(1, 1, 4)
    for seed in range(5):
        P = nl.method("lara", m=3, proposals=1)(nl.AttentionProblem(x, y, scale=1.0), rng=seed)
        np.testing.assert_allclose(kernel(P), np.exp(x @ y.T), rtol=1e-12)


def test_query_weights_sum_to_zero_over_proposals():
    weights = _query_weights(draw(0, 2, 9, 3), draw(1, 2, 4, 3))
    close(weights.sum(axis=-1), np.zeros((2, 9)))
    assert np.abs(weights).max() > 0.05


def test_negative_rows_of_query_weights_are_counted():
    problem = nl.AttentionProblem(2 * draw(0, 64, 8), 2 * draw(1, 64, 8))
    shares = [float(nl.method("lara", m=32, weighting="query")(problem, rng=s).negative_share) for s in range(20)]
    assert max(shares) > 0
    assert all(float(nl.method("lara", m=32)(problem, rng=s).negative_share) == 0 for s in range(5))


def test_segments_without_visible_keys_take_the_mean_of_all():
    keep = np.arange(12) < 5
    problem = nl.AttentionProblem(draw(0, 12, 2), draw(1, 12, 2), key_mask=keep)
    P = nl.method("lara", m=4)(problem, rng=0)
    shift = nl.AttentionProblem(problem.q, problem.k + 1.5, key_mask=keep)
    close(P.dense(), nl.method("lara", m=4)(shift, rng=0).dense(), 1e4)


def test_refusals():
    q = draw(0, 6, 2)
    with pytest.raises(nl.methods.Unsupported, match="means over segments of all queries and keys"):
        nl.method("lara", m=2)(nl.AttentionProblem(q, q, causal=True), rng=0)
    with pytest.raises(ValueError, match="pass proposals <= 4, and m is free"):
        nl.method("lara", m=5)(nl.AttentionProblem(q, q[:4]), rng=0)
    with pytest.raises(ValueError, match="one of balance, query"):
        nl.method("lara", m=5, weighting="other")
    with pytest.raises(ValueError, match="proposals must be"):
        nl.method("lara", m=5, proposals=0)


# -- segments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 3), (12, 4), (13, 12), (13, 13)])
def test_segments_are_consecutive_and_differ_by_one_at_most(n, m, xp):
    segments = Segments(n, m)
    lengths = segments.filled.sum(axis=1)
    assert lengths.sum() == n
    assert lengths.max() - lengths.min() <= 1
    np.testing.assert_array_equal(segments.slots[segments.filled], np.arange(n))
    np.testing.assert_array_equal(np.bincount(segments.number), lengths)
    x = draw(0, 2, n, 3)
    close(segments.join(segments.split(xp.asarray(x))), x, 0)


@pytest.mark.parametrize(("n", "m", "windows"), [(13, 5, 2), (13, 13, 4), (12, 6, 3), (29, 11, 4), (7, 1, 1)])
def test_segments_do_not_cross_windows(n, m, windows):
    segments, outer = Segments(n, m, windows=windows), Segments(n, windows)
    np.testing.assert_array_equal(segments.slots[segments.filled], np.arange(n))
    np.testing.assert_array_equal(segments.window[segments.number], outer.number)
    assert segments.filled.any(axis=1).all()
    with pytest.raises(ValueError, match="1 <= windows <= m"):
        Segments(n, m, windows=m + 1)


@pytest.mark.parametrize(("n", "m", "count"), [(13, 4, 2), (12, 4, 4), (29, 6, 3), (7, 7, 1)])
def test_merged_segments_hold_the_tokens_of_their_parts(n, m, count, xp):
    parts = Segments(n, m)
    whole = parts.merged(count)
    np.testing.assert_array_equal(whole.slots[whole.filled], np.arange(n))
    np.testing.assert_array_equal(whole.number, parts.number // count)
    np.testing.assert_array_equal(np.bincount(whole.number), whole.filled.sum(axis=1))
    x = draw(0, 2, n, 3)
    close(whole.join(whole.split(xp.asarray(x))), x, 0)
    with pytest.raises(ValueError, match="pass a divisor"):
        parts.merged(m + 1)
