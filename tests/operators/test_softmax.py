"""Exact attention: against the definition, in every path, at every size of the logits, without n × n."""

import tracemalloc

import numpy as np
import pytest
from scipy.special import logsumexp, softmax

from nla_llm import AttentionProblem
from nla_llm.operators import SoftmaxAttention

EPS32, EPS64 = np.finfo(np.float32).eps, np.finfo(np.float64).eps


def reference(p):
    """The definition, dense in float64."""
    q, k = np.asarray(p.q, np.float64), np.asarray(p.k, np.float64)
    logits = p.scale * q @ np.swapaxes(k, -1, -2)
    i, j = np.arange(p.n_q)[:, None], np.arange(p.n_k)[None, :]
    if p.bias is not None:
        logits = logits + p.bias
    hidden = np.zeros((p.n_q, p.n_k), bool)
    if p.causal:
        hidden |= j > i
    if p.window is not None:
        hidden |= abs(i - j) >= p.window
    if p.key_mask is not None:
        hidden = hidden | ~p.key_mask[..., None, :]
    return np.where(hidden, -np.inf, logits)


def problem(n=700, d=8, size=1.0, dtype=np.float64, seed=0, **options):
    q, k, v = (size * np.random.default_rng(seed).standard_normal((3, n, d))).astype(dtype)
    return AttentionProblem(q, k, v, **options)


CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": 37},
    "causal window": {"causal": True, "window": 37},
    "mask": {"key_mask": np.arange(700) < 650},
    "scattered causal mask": {"causal": True, "key_mask": np.arange(700) % 5 != 3},
    "bias": {"bias": -0.01 * np.abs(np.arange(700.0)[:, None] - np.arange(700.0)[None, :])},
    "hiding bias": {"bias": np.where(np.arange(700)[None, :] % 7 == 2, -np.inf, 0.5)[[0] * 700]},
}


@pytest.mark.parametrize("size", [1.0, 30.0], ids=["bounded logits", "logits of thousands"])
@pytest.mark.parametrize("case", CASES)
def test_streamed_products_agree_with_the_definition(case, size):
    p = problem(size=size, **CASES[case])
    logits = reference(p)
    P = softmax(logits, axis=-1)
    op = p.exact()
    # Rounding of a logit of size s moves its weight by s eps; 8 covers the sum of d products and the exponential.
    tolerance = 8 * EPS64 * max(1.0, np.abs(logits[np.isfinite(logits)]).max())
    first, again = op @ p.v, op @ p.v
    np.testing.assert_allclose(first, P @ p.v, rtol=0, atol=tolerance * np.abs(p.v).max())
    np.testing.assert_allclose(again, P @ p.v, rtol=0, atol=tolerance * np.abs(p.v).max())
    np.testing.assert_allclose(op.T @ p.v, P.T @ p.v, rtol=0, atol=tolerance * np.abs(p.v).sum())
    np.testing.assert_allclose(op.log_sum_exp, logsumexp(logits, axis=-1), rtol=4 * EPS64, atol=tolerance)
    np.testing.assert_allclose(op.dense(), P, rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_computed_in_float32(case):
    p = problem(dtype=np.float32, **CASES[case])
    y = p.exact(np.float32) @ p.v
    P = softmax(reference(p), axis=-1)
    assert y.dtype == np.float32 or case == "bias"
    np.testing.assert_allclose(y, P @ p.v, rtol=0, atol=40 * EPS32 * np.abs(p.v).max())


@pytest.mark.parametrize("case", CASES)
def test_generic_path_agrees_with_numpy_path(case, xp):
    p = problem(n=700, **CASES[case])
    generic = p.map(xp.asarray)
    op, fast = generic.exact(), p.exact()
    for x in (p.v, p.v[:, :1]):
        y = op @ xp.asarray(x)
        np.testing.assert_allclose(np.asarray(y), fast @ x, rtol=0, atol=64 * EPS64 * np.abs(x).max())
        z = op.T @ xp.asarray(x)
        np.testing.assert_allclose(np.asarray(z), fast.T @ x, rtol=0, atol=64 * EPS64 * np.abs(x).sum())


def test_grouped_queries_share_keys():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((2, 3, 40, 4)), rng.standard_normal((2, 1, 40, 4)), rng.standard_normal((2, 1, 40, 4))
    y = AttentionProblem(q, k, v, causal=True).exact() @ v
    for i in range(2):
        for j in range(3):
            alone = AttentionProblem(q[i, j], k[i, 0], causal=True).exact() @ v[i, 0]
            np.testing.assert_allclose(y[i, j], alone, rtol=0, atol=16 * EPS64 * np.abs(v).max())


def test_one_pass_serves_several_right_hand_sides_and_broadcast_batches():
    p = problem(n=50)
    x = np.random.default_rng(1).standard_normal((2, 3, 50, 4))
    np.testing.assert_allclose(p.exact() @ x, p.exact().dense() @ x, rtol=0, atol=64 * EPS64 * np.abs(x).max())


def test_what_is_kept_of_a_pass_has_the_batch_axes_of_the_operator():
    """Neither further axes of x nor an axis of length one that x stretches may stay with the sums of the rows."""
    q, k = np.random.default_rng(0).standard_normal((2, 2, 1, 50, 4))
    p, x = SoftmaxAttention(q, k, scale=0.5), np.random.default_rng(1).standard_normal((5, 2, 3, 50, 4))
    y = p @ x
    assert p.log_sum_exp.shape == (2, 1, 50)
    np.testing.assert_allclose(p @ x[0, :, :1], y[0, :, :1], rtol=0, atol=64 * EPS64 * np.abs(x).max())
    atol = 64 * EPS64 * np.abs(x).max() * np.sqrt(50)
    adjoint = np.swapaxes(p.dense(), -1, -2)
    np.testing.assert_allclose(p.T @ x[0, :, :1], adjoint @ x[0, :, :1], rtol=0, atol=atol)


@pytest.mark.parametrize("causal", [False, True])
def test_memory_does_not_grow_with_the_square_of_n(causal):
    """At n = 16384 a dense float32 matrix takes 1 GiB; products may take a few tiles and O(n d)."""
    n, d = 16384, 8
    p = problem(n=n, d=d, dtype=np.float32, causal=causal)
    op = p.exact(np.float32)
    tracemalloc.start()
    try:
        op.T @ (op @ p.v)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * 4 * n * (d + 1) + 16 * 2**20


def test_visible_keys_skip_what_causality_hides():
    op = SoftmaxAttention(np.zeros((1000, 1)), np.zeros((1000, 1)), scale=1.0, causal=True, window=10)
    assert op.visible_keys(500, 600) == (491, 600)
