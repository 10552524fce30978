"""H-Transformer-1D against its definition, pair by pair, and against the bound of its blocks."""

import numpy as np
import pytest

import nla_llm as nl

CASES = [(40, 40, 4), (41, 41, 3), (37, 37, 1), (64, 64, 2), (90, 23, 5), (17, 83, 4), (50, 50, 25), (1, 9, 2)]


def problem(n_q, n_k=None, *, d=3, seed=0, size=1.0, **structure):
    rng = np.random.default_rng(seed)
    n_k = n_q if n_k is None else n_k
    q, k = size * rng.standard_normal((n_q, d)), size * rng.standard_normal((n_k, d))
    return nl.AttentionProblem(q, k, rng.standard_normal((n_k, 2)), **structure)


def slow_tokens(n=300):
    return np.cumsum(0.03 * np.random.default_rng(0).standard_normal((n, 3)), axis=0)


def group(i, size, m, n):
    """Tokens of the group of 2 size/m tokens in which token i is, in its box of ``size`` tokens."""
    box, step = i // size, 2 * size // m
    first = box * size + (i - box * size) // step * step
    return np.arange(first, min(first + step, (box + 1) * size, n))


def logarithms(p, m):
    """The logit of a pair, or that of the means of their groups on the last level where their boxes are apart."""
    out = np.full((p.n_q, p.n_k), -np.inf)
    seen = np.ones(p.n_k, bool) if p.key_mask is None else p.key_mask
    for i in range(p.n_q):
        for j in range(i + 1 if p.causal else p.n_k):
            if not seen[j]:
                continue
            if abs(i // m - j // m) <= 1:
                out[i, j] = p.scale * p.q[i] @ p.k[j]
                continue
            size = m
            while abs(i // (2 * size) - j // (2 * size)) > 1:
                size *= 2
            rows, keys = group(i, size, m, p.n_q), group(j, size, m, p.n_k)
            out[i, j] = p.scale * p.q[rows].mean(axis=0) @ p.k[keys[seen[keys]]].mean(axis=0)
    return out


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1.0, 12.0])
@pytest.mark.parametrize(("n_q", "n_k", "m"), CASES)
def test_it_is_its_definition(n_q, n_k, m, size, masked):
    for causal in {False, n_q == n_k}:
        mask = (np.arange(n_k) % 5 != 2) & (np.arange(n_k) // 6 != 1) if masked else None
        p = problem(n_q, n_k, size=size, causal=causal, key_mask=mask)
        op = nl.method("h_transformer", m=m)(p)
        log = logarithms(p, m)
        tolerance = 30 * np.finfo(float).eps * max(1.0, abs(log[np.isfinite(log)]).max())
        np.testing.assert_allclose(op.dense(), softmax(log), rtol=0, atol=tolerance)
        np.testing.assert_allclose(op @ p.v, softmax(log) @ p.v, rtol=0, atol=10 * tolerance)


def test_half_of_the_tokens_in_a_block_are_softmax():
    p = problem(37)
    np.testing.assert_allclose(nl.method("h_transformer", m=19)(p).dense(), p.exact().dense(), atol=1e-14)
    assert abs(nl.method("h_transformer", m=9)(p).dense() - p.exact().dense()).max() > 1e-2


@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_that_grows_keeps_its_earlier_rows(causal):
    """Whole boxes: no group gets another member; without causality the later keys are hidden instead."""
    p = problem(96, causal=causal, key_mask=None if causal else np.arange(96) < 48)
    short = nl.AttentionProblem(p.q[:48], p.k[:48], causal=causal)
    method = nl.method("h_transformer", m=6)
    np.testing.assert_allclose(method(p).dense()[:48, :48], method(short).dense(), atol=1e-14)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_its_error_stays_below_the_bound(causal, masked):
    x, mask = slow_tokens(), np.arange(300) % 7 != 3 if masked else None
    p = nl.AttentionProblem(x, x, causal=causal, key_mask=mask)
    method = nl.method("h_transformer", m=16)
    error = np.linalg.norm(method(p).dense() - p.exact().dense())
    promised = float(method.theory(p).error("frobenius"))
    assert 1e-4 < error <= promised < np.linalg.norm(p.exact().dense())


def test_means_of_slow_tokens_beat_means_of_random_ones():
    x, errors = slow_tokens(), []
    for tokens in (x, np.random.default_rng(1).permutation(x)):
        p = nl.AttentionProblem(tokens, tokens)
        exact = p.exact().dense()
        errors.append(np.linalg.norm(nl.method("h_transformer", m=16)(p).dense() - exact))
    assert errors[0] < 0.2 * errors[1]


def test_refusals_say_why():
    with pytest.raises(ValueError, match="exceeds the number of keys"):
        nl.method("h_transformer", m=6)(problem(5))
    with pytest.raises(nl.methods.Unsupported, match="window"):
        nl.method("h_transformer", m=2)(problem(9, window=3))


def test_the_averages_of_equal_tokens_are_exact():
    q = np.repeat(np.random.default_rng(0).standard_normal((6, 3)), 16, axis=0)
    p, method = nl.AttentionProblem(q, q), nl.method("h_transformer", m=8)
    np.testing.assert_allclose(method(p).dense(), p.exact().dense(), rtol=0, atol=1e-14)
    assert np.linalg.norm((method(problem(96)) - problem(96).exact()).dense()) > 1e-3
