"""Patterns fixed in advance: the masks that the papers draw, the softmax on them, and what they cost a row."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.operators import ZeroRowSumError

PATTERNS = [
    ("sliding_window", {}),
    ("longformer", {}),
    ("longformer", {"globals": 3}),
    ("bigbird", {}),
    ("bigbird", {"globals": 2}),
    ("strided_attention", {}),
    ("block_sparse", {}),
]
IDS = ["-".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in PATTERNS]


def problem(n_q, n_k=None, *, d=3, seed=0, batch=(), **structure):
    rng = np.random.default_rng(seed)
    n_k = n_q if n_k is None else n_k
    return nl.AttentionProblem(
        rng.standard_normal((*batch, n_q, d)), rng.standard_normal((*batch, n_k, d)),
        rng.standard_normal((*batch, n_k, 2)), **structure,
    )  # fmt: skip


def support(name, p, m, **options):
    return nl.method(name, m=m, **options)(p, 0).dense() > 0


def restricted(p, keep):
    """Softmax over ``keep``, written down entry by entry."""
    kernel = np.where(keep, np.exp(p.scale * p.q @ np.swapaxes(p.k, -1, -2)), 0)
    return kernel / kernel.sum(axis=-1, keepdims=True)


def window_mask(n, m, *, causal, g=0):
    """Row by row: the g first keys, and of the others the nearest until there are m."""
    keep = np.zeros((n, n), bool)
    for i in range(n):
        if causal:
            keep[i, : min(g, i + 1)] = True
            keep[i, max(g, i - (m - g) + 1) : i + 1] = True
        else:
            keep[i, :g] = True
            first = min(max(i - (m - g) // 2, g), n - (m - g))
            keep[i, first : first + m - g] = True
    if not causal:
        keep[:g] = True
    return keep


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 1), (13, 1), (13, 4), (13, 13), (131, 7), (131, 70), (64, 64)])
def test_windows_are_the_nearest_keys(n, m, causal):
    p = problem(n, causal=causal)
    for g in {0, 1, min(3, m)}:
        name, options = ("longformer", {"globals": g}) if g else ("sliding_window", {})
        keep = window_mask(n, m, causal=causal, g=g)
        np.testing.assert_array_equal(support(name, p, m, **options), keep)
        np.testing.assert_allclose(nl.method(name, m=m, **options)(p).dense(), restricted(p, keep), rtol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (13, 4), (13, 13), (131, 7), (700, 300)])
def test_blocks_are_cut_from_the_left(n, m, causal):
    keep = np.zeros((n, n), bool)
    for start in range(0, n, m):
        first = start if causal else min(start, n - m)
        keep[start : start + m, first : first + m] = True
    keep = np.tril(keep) if causal else keep
    p = problem(n, causal=causal)
    np.testing.assert_array_equal(support("block_sparse", p, m), keep)
    np.testing.assert_allclose(nl.method("block_sparse", m=m)(p).dense(), restricted(p, keep), rtol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("name", "options"), PATTERNS[:-2], ids=IDS[:-2])
@pytest.mark.parametrize("m", [3, 8, 131])
def test_every_query_sees_m_keys(name, options, m, causal):
    n, g = 131, options.get("globals", int(name != "sliding_window"))
    seen = support(name, problem(n, causal=causal), m, **options).sum(axis=1)
    expected = np.minimum(np.arange(n) + 1, m) if causal else np.where(np.arange(n) < g, n, m)
    np.testing.assert_array_equal(seen, expected)


def test_with_more_queries_than_keys_the_last_window_stays():
    keep = support("sliding_window", problem(9, 4), 2)
    np.testing.assert_array_equal(keep, window_mask(4, 2, causal=False)[np.minimum(np.arange(9), 3)])


def test_random_keys_are_uniform_over_what_is_no_window():
    """Over draws each of the other keys is seen equally often: a binomial count within four deviations."""
    n, draws = 100, 400
    p, method = problem(n, d=1), nl.method("bigbird", m=13)
    counts = sum(method(p, s).dense()[1] > 0 for s in range(draws))
    windows = window_mask(n, 7, causal=False, g=1)[1:65].any(axis=0)  # of the 64 queries that share the draw
    others, share = counts[~windows], 6 / np.sum(~windows)
    assert others.size == 33
    assert np.all(abs(others - draws * share) < 4 * np.sqrt(draws * share * (1 - share)))


def test_a_block_of_queries_shares_its_random_keys():
    keep = support("bigbird", problem(400), 9)
    far = np.abs(np.subtract.outer(np.arange(400), np.arange(400))) > 70
    drawn = (keep & far)[:, 1:]
    assert all((drawn[i] == drawn[i + 1]).mean() > 0.99 for i in (1, 30, 62, 65, 200))
    assert not np.array_equal(drawn[20], drawn[80])


def test_windows_stay_before_padding():
    """Hidden keys at the end are no part of the sequence, each entry of a batch with its own end."""
    keep = np.arange(80) < np.array([[80], [61], [9]])
    p = problem(80, batch=(3,), key_mask=keep)
    op = nl.method("longformer", m=7)(p)
    for i, end in enumerate((80, 61, 9)):
        short = nl.AttentionProblem(p.q[i], p.k[i, :end])
        np.testing.assert_allclose(op.dense()[i, :, :end], nl.method("longformer", m=7)(short).dense(), rtol=1e-13)
    assert np.all((nl.method("bigbird", m=7)(p, 0).dense() > 0).sum(-1) <= np.where(np.arange(80) < 1, 80, 7))


@pytest.mark.parametrize("causal", [False, True])
def test_a_mask_hides_keys_of_the_pattern(causal):
    keep = np.arange(50) % 4 != 2
    p = problem(50, key_mask=keep, causal=causal)
    seen = window_mask(50, 9, causal=causal, g=1) & keep
    op = nl.method("longformer", m=9)(p)
    np.testing.assert_allclose(op.dense(), restricted(p, seen), rtol=1e-13)


def test_a_query_without_visible_keys_is_refused():
    p = problem(30, key_mask=np.arange(30) > 20)
    with pytest.raises(ZeroRowSumError, match="hides every key that the pattern leaves"):
        nl.method("longformer", m=3)(p)
    with pytest.raises(nl.methods.Unsupported, match="left without any"):
        nl.method("sliding_window", m=3)(p)


@pytest.mark.parametrize(("name", "options"), PATTERNS, ids=IDS)
def test_budgets_that_make_no_sense_are_refused(name, options):
    with pytest.raises(ValueError, match="exceeds the number of keys"):
        nl.method(name, m=6, **options)(problem(5), 0)
    with pytest.raises(ValueError, match="whole number"):
        nl.method(name, m=0, **options)


def test_more_global_tokens_than_keys_are_refused():
    with pytest.raises(ValueError, match="globals=5 tokens do not fit into m=4"):
        nl.method("longformer", m=4, globals=5)


@pytest.mark.parametrize(("name", "options"), PATTERNS, ids=IDS)
def test_the_generic_path_agrees_with_numpy(name, options):
    strict = pytest.importorskip("array_api_strict")
    for structure in ({}, {"causal": True}, {"batch": (2,)}):
        p = problem(90, **structure)
        method = nl.method(name, m=9, **options)
        other = method(p.map(strict.asarray), 0)
        x, y = p.v, np.swapaxes(p.q, -1, -2)[..., :2, :].swapaxes(-1, -2)
        here = method(p, 0)
        np.testing.assert_allclose(np.asarray(other @ strict.asarray(x)), here @ x, atol=1e-13)
        np.testing.assert_allclose(np.asarray(other.T @ strict.asarray(y)), here.T @ y, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_logits_that_overflow_every_exponential(causal):
    p = problem(70, causal=causal).astype(np.float32)
    sharp = nl.AttentionProblem(300 * p.q, 300 * p.k, causal=causal)
    dense = nl.method("sliding_window", m=9)(sharp).dense()
    assert dense.dtype == np.float32
    np.testing.assert_allclose(dense.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("name", ["sliding_window", "longformer", "block_sparse", "strided_attention"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_promised_error_is_the_error(name, causal):
    p = problem(300, batch=(2,), causal=causal)
    method = nl.method(name, m=20)
    error = np.linalg.norm(method(p).dense() - p.exact().dense(), axis=(-2, -1))
    np.testing.assert_allclose(method.theory(p).error("frobenius"), error, rtol=1e-12)
    with pytest.raises(ValueError, match="frobenius"):
        method.theory(p).error("spectral")


@pytest.mark.parametrize(("name", "options"), PATTERNS, ids=IDS)
def test_counts_are_the_formula_for_every_option_and_border(name, options):
    rng = np.random.default_rng(4)
    for _ in range(12):
        causal = bool(rng.integers(2))
        n_q, n_k = (int(n) for n in rng.integers(3, 150, 2))
        p = problem(n_k if causal else n_q, n_k, causal=causal)
        method = nl.method(name, m=int(rng.integers(3, n_k + 1)), **options)
        assert nl.costs.count(method, p) == method.cost(p).at(p, method)
        if method.m == n_k:
            np.testing.assert_allclose(method(p, 0).dense(), p.exact().dense(), rtol=1e-12)
