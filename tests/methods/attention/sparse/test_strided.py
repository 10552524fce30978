"""Strided attention: the mask written down row by row, the published stride, counts at every border, and its tiles."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.operators import TiledSparse


def problem(n_q, n_k=None, *, d=3, **structure):
    rng = np.random.default_rng(0)
    n_k = n_q if n_k is None else n_k
    return nl.AttentionProblem(
        rng.standard_normal((n_q, d)), rng.standard_normal((n_k, d)), rng.standard_normal((n_k, 2)), **structure
    )


def restricted(p, keep):
    """Softmax over ``keep``, written down entry by entry."""
    kernel = np.where(keep, np.exp(p.scale * p.q @ p.k.T), 0)
    return kernel / kernel.sum(axis=-1, keepdims=True)


def support(p, m, **options):
    return nl.method("strided_attention", m=m, **options)(p).dense() > 0


def strided_mask(n_q, n, m, s, *, causal):
    """Row by row: keys at a multiple of s from the query, then a run of the others around it, up to m."""
    keep = np.zeros((n_q, n), bool)
    for i in range(n_q):
        place = min(i, n - 1)
        strided = [j for j in range(n) if (place - j) % s == 0]
        others = [j for j in range(n) if j not in strided]
        if causal:
            far = [a for a in range(n) if a % s]  # distances, the same for all queries: the last one sees m keys
            reach = far[: m - len([a for a in range(n) if a % s == 0])]
            keep[i, [j for j in range(i + 1) if j in strided or i - j in reach]] = True
        else:
            count = m - len(strided)
            first = sum(j < place for j in others) - count // 2
            first = min(max(first, 0), len(others) - count)
            keep[i, strided + others[first : first + count]] = True
    return keep


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("n", "m", "stride"),
    [(1, 1, None), (2, 1, None), (2, 2, None), (13, 1, None), (13, 4, None), (13, 13, None), (97, 12, None),
     (97, 13, 8), (13, 7, 2), (13, 12, 2), (13, 13, 3), (13, 5, 40), (64, 16, None)],
)  # fmt: skip
def test_strides_are_counted_from_the_query(n, m, stride, causal):
    s = stride or max(2, -(-n // -(-m // 2)))
    for n_q in (n,) if causal else (n, n + 5, max(1, n - 3)):
        p = problem(n_q, n, causal=causal)
        keep = strided_mask(n_q, n, m, s, causal=causal)
        op = nl.method("strided_attention", m=m, stride=stride)(p)
        np.testing.assert_allclose(op.dense(), restricted(p, keep), rtol=1e-12)
        assert (keep.sum(axis=1) == m).all() or causal
        assert keep[-1].sum() == m


def test_the_published_stride_is_the_root_of_n():
    """Child et al., section 4.3: the l latest keys and every l-th, l = √n; here a distance that is both counts once."""
    n, stride = 144, 12
    keep = support(problem(n, causal=True), 2 * stride)
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    published = (j <= i) & ((i - j < stride) | ((i - j) % stride == 0))
    assert np.all(keep[published])
    assert np.array_equal(keep, (j <= i) & ((i - j <= stride + 1) | ((i - j) % stride == 0)))


@pytest.mark.parametrize("options", [{}, {"stride": 9}])
def test_counts_of_strides_are_the_formula(options):
    rng = np.random.default_rng(5)
    for _ in range(12):
        causal = bool(rng.integers(2))
        n_q, n_k = (int(n) for n in rng.integers(10, 120, 2))
        p = problem(n_k if causal else n_q, n_k, causal=causal)
        method = nl.method("strided_attention", m=int(rng.integers(-(-n_k // 9), n_k + 1)), **options)
        assert nl.costs.count(method, p) == method.cost(p).at(p, method)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_q", "n_k"), [(27, 27), (31, 31), (40, 31), (20, 31), (29, 31)])
def test_counts_where_some_queries_have_no_window(n_q, n_k, causal):
    """With m = ⌈n_k/s⌉ only the queries that have a strided key less see any other."""
    p = problem(n_k if causal else n_q, n_k, causal=causal)
    method = nl.method("strided_attention", m=-(-n_k // 9), stride=9)
    assert nl.costs.count(method, p) == method.cost(p).at(p, method)


def test_a_stride_that_leaves_too_many_keys_is_refused():
    with pytest.raises(ValueError, match="stride=4 leaves 5 of 20 keys, more than m=4"):
        nl.method("strided_attention", m=4, stride=4)(problem(20))
    with pytest.raises(ValueError, match="stride must be a whole number >= 2"):
        nl.method("strided_attention", m=4, stride=1)


@pytest.mark.parametrize("causal", [False, True])
def test_queries_share_the_keys_of_their_tiles(causal):
    """A key is gathered for many queries: entries held are at most a few for each pair, keys gathered far fewer."""
    n, m = 2048, 64
    op = nl.method("strided_attention", m=m)(problem(n, causal=causal)).op
    assert isinstance(op, TiledSparse)
    assert op.stored < 3 * n * m
    assert sum(panel.keys.size for panel in op.panels) < n * m / 8
