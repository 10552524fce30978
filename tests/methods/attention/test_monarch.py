"""MonarchAttention against the variational problem that it solves, with the matrix written out."""

from itertools import pairwise

import numpy as np
import pytest

import nla_llm as nl

EPS = np.finfo(np.float64).eps


def gaussian(n_q, n_k, d=4, seed=0, **structure):
    rng = np.random.default_rng(seed)
    return nl.AttentionProblem(rng.standard_normal((n_q, d)), rng.standard_normal((n_k, d)), **structure)


def value(p, dense):
    """Σ P̂ ∘ logits + entropy, over all rows."""
    logits = p.scale * p.q @ p.k.T
    positive = dense > 0
    entropy = -np.sum(dense[positive] * np.log(dense[positive]))
    return np.sum(dense * logits) + entropy


@pytest.mark.parametrize(("n", "m"), [(36, 6), (37, 5), (50, 8)])
def test_the_value_never_falls_and_stays_below_that_of_softmax(n, m):
    p = gaussian(n, n)
    values = [value(p, nl.method("monarch", m=m, steps=steps)(p).dense()) for steps in (1, 2, 3, 6, 12)]
    assert all(later >= earlier - 1e3 * EPS * n for earlier, later in pairwise(values))
    exact = p.exact().dense()
    assert values[-1] < value(p, exact)
    np.testing.assert_allclose(value(p, exact), np.sum(p.exact().log_sum_exp), rtol=1e-12)


@pytest.mark.parametrize(("n_q", "n_k", "m"), [(36, 36, 6), (20, 37, 5), (37, 20, 7)])
def test_what_is_missing_is_the_divergence(n_q, n_k, m):
    p = gaussian(n_q, n_k)
    dense, exact = nl.method("monarch", m=m)(p).dense(), p.exact().dense()
    positive = dense > 0
    divergence = np.sum(dense[positive] * np.log(dense[positive] / exact[positive]))
    np.testing.assert_allclose(value(p, exact) - value(p, dense), divergence, rtol=1e-9)
    assert divergence > 1e-3


@pytest.mark.parametrize("m", [1, 37])
def test_one_block_and_blocks_of_one_are_exact(m):
    p = gaussian(37, 37)
    np.testing.assert_allclose(nl.method("monarch", m=m)(p).dense(), p.exact().dense(), rtol=0, atol=100 * EPS)


def test_it_is_a_monarch_matrix():
    """Blocks of the permuted matrix have rank one: rows with the same j share R_kj up to a factor L_jkl."""
    m, blocks = 6, 6
    dense = nl.method("monarch", m=m)(gaussian(m * blocks, m * blocks)).dense()
    for j in range(m):
        for k in range(blocks):
            part = dense[j::m, k * m : (k + 1) * m]
            s = np.linalg.svd(part, compute_uv=False)
            assert s[1] <= 100 * EPS * max(s[0], 1e-300) + 1e-300
