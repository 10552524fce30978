"""MonarchAttention: its updates are coordinate ascent, its gap is a divergence, its ends are exact."""

import numpy as np
import pytest
from scipy.special import rel_entr

import nla_llm as nl
from nla_llm.theory.hierarchical import variational_gap

SHAPES = [(40, 40, 6), (41, 41, 7), (23, 60, 8), (60, 23, 5), (11, 50, 4), (50, 9, 4)]


def problem(n_q, n_k=None, *, d=3, seed=0, size=1.0, **structure):
    rng = np.random.default_rng(seed)
    n_k = n_q if n_k is None else n_k
    q, k = size * rng.standard_normal((n_q, d)), size * rng.standard_normal((n_k, d))
    return nl.AttentionProblem(q, k, rng.standard_normal((n_k, 2)), **structure)


def logits(p):
    s = p.scale * p.q @ p.k.T
    return s if p.key_mask is None else np.where(p.key_mask, s, -np.inf)


def softmax(s, axis=-1):
    weights = np.exp(s - s.max(axis=axis, keepdims=True))
    return weights / weights.sum(axis=axis, keepdims=True)


def alternating(p, m, steps):
    """Both updates in their naive form, for n = blocks · m tokens, from L = identity."""
    blocks = p.n_q // m
    q, k = (p.scale * p.q).reshape(blocks, m, -1), p.k.reshape(blocks, m, -1)
    left = np.repeat(np.eye(blocks)[None], m, axis=0)  # L[j, k, l]
    for _ in range(steps):
        alpha = np.einsum("jkl,ljd->kjd", left, q) / left.sum(axis=2).T[..., None]
        right = softmax(np.einsum("kjd,kid->kji", alpha, k))
        beta, entropy = np.einsum("kji,kid->jkd", right, k), -np.sum(right * np.log(right), axis=-1)
        left = softmax(np.einsum("jkd,ljd->jkl", beta, q) + entropy.T[..., None], axis=1)
    return np.einsum("jkl,kji->ljki", left, right).reshape(p.n_q, p.n_k)


@pytest.mark.parametrize(("n", "m"), [(12, 3), (20, 4), (35, 7), (16, 8)])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_it_is_its_definition(n, m, steps):
    p = problem(n)
    op = nl.method("monarch", m=m, steps=steps)(p)
    np.testing.assert_allclose(op.dense(), alternating(p, m, steps), atol=1e-13)
    np.testing.assert_allclose(op @ p.v, alternating(p, m, steps) @ p.v, atol=1e-13)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("n_q", "n_k", "m"), SHAPES)
@pytest.mark.parametrize("size", [1.0, 3.0])
def test_every_step_lessens_the_gap(n_q, n_k, m, size, masked):
    """Σ P̂ ∘ logits + entropy over the real queries never falls; the rest of log-sum-exp is the divergence."""
    p = problem(n_q, n_k, size=size, key_mask=np.arange(n_k) % 4 != 1 if masked else None)
    gaps = []
    for steps in (1, 2, 3, 4, 6, 10):
        weights = nl.method("monarch", m=m, steps=steps)(p).dense()
        gaps.append(variational_gap(weights, logits(p)).sum())
        divergence = rel_entr(weights, p.exact().dense()).sum()
        np.testing.assert_allclose(gaps[-1], divergence, rtol=1e-10)
    assert np.all(np.diff(gaps) <= 1e-12 * gaps[0])
    assert 0 < gaps[-1] < gaps[0]


@pytest.mark.parametrize("m", [1, 23])
def test_it_is_exact_with_blocks_of_one_key_or_of_all(m):
    for n_q, n_k in ((23, 23), (9, 23)):
        p = problem(n_q, n_k, key_mask=np.arange(n_k) % 4 != 1)
        np.testing.assert_allclose(nl.method("monarch", m=m)(p).dense(), p.exact().dense(), atol=1e-14)


def test_it_is_exact_where_one_block_holds_all_queries():
    """Then no query shares its weights with another one."""
    p = problem(5, 40)
    np.testing.assert_allclose(nl.method("monarch", m=7, steps=1)(p).dense(), p.exact().dense(), atol=1e-14)


def test_it_does_not_converge_as_blocks_grow():
    """The error is largest between the two ends, so that the budget of keys is not a budget of accuracy."""
    p = problem(64, size=1.5)
    errors = [np.linalg.norm((nl.method("monarch", m=m)(p) - p.exact()).dense()) for m in (1, 8, 32, 64)]
    assert max(errors[0], errors[-1]) < 1e-12
    assert min(errors[1:-1]) > 0.1


def test_tokens_that_fill_up_have_no_weight():
    """Hidden keys behind the end change nothing, and queries that nobody asks for take no part."""
    p, rng = problem(41), np.random.default_rng(5)
    longer = np.concatenate([p.k, 50 * rng.standard_normal((9, 3))])
    padded = nl.AttentionProblem(p.q, longer, key_mask=np.arange(50) < 41)
    method = nl.method("monarch", m=7)
    np.testing.assert_allclose(method(padded).dense()[:, :41], method(p).dense(), atol=1e-14)
    np.testing.assert_allclose(method(p).dense().sum(axis=-1), 1, atol=1e-13)


def test_float32_at_logits_of_hundreds():
    p = problem(60, size=12.0).astype(np.float32)
    fine = p.astype(np.float64)
    assert np.std(logits(fine)) > 50
    here, there = (nl.method("monarch", m=8, steps=2)(x).dense() for x in (p, fine))
    assert here.dtype == np.float32
    eps = np.finfo(np.float32).eps * abs(logits(fine)).max()
    np.testing.assert_allclose(here, there, rtol=0, atol=32 * eps)


def test_blocks_are_no_heads():
    """Long enough for threads over heads: without heads there is only one task, with them one for each."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 900, 4))
    method = nl.method("monarch", m=30, steps=2)
    many = method(nl.AttentionProblem(q, k)) @ v
    for h in range(2):
        np.testing.assert_allclose(method(nl.AttentionProblem(q[h], k[h])) @ v[h], many[h], atol=1e-13)


def test_refusals_say_why():
    with pytest.raises(ValueError, match="exceeds the number of keys"):
        nl.method("monarch", m=6)(problem(5))
    with pytest.raises(ValueError, match="steps"):
        nl.method("monarch", m=6, steps=0)
    with pytest.raises(nl.methods.Unsupported, match="share the weights within a block"):
        nl.method("monarch", m=2)(problem(9, causal=True))


def test_it_is_a_monarch_matrix():
    """Blocks of the permuted matrix have rank one: rows with the same j share R_kj up to a factor L_jkl."""
    m, blocks = 6, 6
    dense = nl.method("monarch", m=m)(problem(m * blocks)).dense()
    for j in range(m):
        for k in range(blocks):
            part = dense[j::m, k * m : (k + 1) * m]
            s = np.linalg.svd(part, compute_uv=False)
            assert s[1] <= 1e-13 * max(s[0], 1e-300) + 1e-300
