"""Kernel attention written out densely, and the comparisons with it that the tests of this folder share."""

import numpy as np

import nla_llm as nl
from nla_llm.backend import to_numpy

EPS = np.finfo(np.float64).eps


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def mask(n):
    keep = np.arange(n) % 4 != 2
    keep[-3:] = False
    return keep


def dense_attention(kernel, *, causal=False, key_mask=None):
    """Rows of a dense kernel matrix over the visible keys, divided by their sums."""
    a = kernel if key_mask is None else kernel * key_mask[..., None, :]
    a = np.tril(a) if causal else a
    return a / a.sum(axis=-1, keepdims=True)


def close(got, want, constant=100):
    np.testing.assert_allclose(to_numpy(got), want, rtol=0, atol=constant * EPS * max(1.0, np.abs(want).max()))


def kernel_of(P):
    """The kernel before the division by row sums."""
    return np.exp(to_numpy(P.row_scale_log))[..., None] * to_numpy(P.op.dense())


def assert_kernel(P, want):
    """The kernel of P is ``want``, and so are its products after the division by row sums, which may cancel."""
    sizes = np.abs(want).max(-1, keepdims=True)
    np.testing.assert_allclose(kernel_of(P) / sizes, want / sizes, rtol=0, atol=1e4 * EPS)
    v, sums = draw(2, want.shape[-1], 2), want.sum(-1, keepdims=True)
    amplification = np.abs(want).sum(-1, keepdims=True) / np.abs(sums)  # where terms cancel, rounding grows
    assert np.all(np.abs(P @ v - want @ v / sums) <= 1e4 * EPS * amplification**2 * np.abs(v).max())


def assert_heads_stand_alone(method, definition, q, k, xp):
    """Grouped queries: every head is what it would be alone, with the same draw."""
    P = method(nl.AttentionProblem(xp.asarray(q), xp.asarray(k)), rng=1)
    for index in np.ndindex(*q.shape[:2]):
        alone = nl.AttentionProblem(q[index], k[index[0], 0])
        want = definition(method, *(alone.scale**0.5 * a for a in (alone.q, alone.k)), seed=1)
        np.testing.assert_allclose(kernel_of(P)[index], want, rtol=0, atol=1e4 * EPS * np.abs(want).max())


def assert_single_precision(method, definition, constant):
    q, k = draw(0, 40, 3).astype(np.float32), draw(1, 40, 3).astype(np.float32)
    P = method(nl.AttentionProblem(q, k), rng=1)
    want = definition(method, *(3**-0.25 * a.astype(np.float64) for a in (q, k)), seed=1)
    assert P.dtype == np.float32
    atol = constant * np.finfo(np.float32).eps * np.abs(want).max()
    np.testing.assert_allclose(kernel_of(P), want, rtol=0, atol=atol)
