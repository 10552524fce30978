"""Sparse plus low rank against a dense definition in logarithms, at ordinary and at extreme logits."""

import numpy as np
import pytest
from scipy.special import logsumexp

import nla_llm as nl
from nla_llm.methods.attention.kernels.directions import draw_directions

CASES = [(40, 40, 8, False), (40, 40, 8, True), (150, 150, 33, False), (150, 150, 33, True), (70, 70, 1, True),
         (70, 70, 1, False), (300, 300, 260, False), (300, 300, 260, True), (90, 30, 7, False), (20, 131, 12, False),
         (11, 11, 11, False), (11, 11, 11, True)]  # fmt: skip


def problem(n_q, n_k=None, *, d=3, seed=0, batch=(), size=1.0, **structure):
    rng = np.random.default_rng(seed)
    n_k = n_q if n_k is None else n_k
    q, k = rng.standard_normal((*batch, n_q, d)), rng.standard_normal((*batch, n_k, d))
    return nl.AttentionProblem(size * q, size * k, rng.standard_normal((*batch, n_k, 2)), **structure)


def window(p, m):
    """Tiles of ⌈m/4⌉ queries, at most 64: m keys around the middle one, or the last m up to the tile's last query."""
    keep = np.zeros((p.n_q, p.n_k), bool)
    height = min(64, -(-m // 4))
    for start in range(0, p.n_q, height):
        stop = min(start + height, p.n_q)
        middle = min((start + stop) // 2, p.n_k - 1)
        low = max(stop - m, 0) if p.causal else min(max(middle - m // 2, 0), p.n_k - m)
        keep[start:stop, low : low + m] = True
    return np.tril(keep) if p.causal else keep


def logarithms(p, m, f, seed):
    """log Â entry by entry: the logits in the window, log φ(x)·φ(y) outside, −∞ for what is hidden."""
    x, y = p.q * p.scale**0.5, p.k * p.scale**0.5
    omega = draw_directions("iid", f, p.d, np.random.default_rng(seed), like=np.zeros(1)).dense()
    log_x, log_y = (z @ omega.T - (z**2).sum(-1, keepdims=True) / 2 for z in (x, y))
    features = logsumexp(log_x[:, None, :] + log_y[None, :, :], axis=-1) - np.log(f)
    out = np.where(window(p, m), x @ y.T, features)
    if p.causal:
        out = np.where(np.tri(p.n_q, dtype=bool), out, -np.inf)
    return out if p.key_mask is None else np.where(p.key_mask, out, -np.inf)


@pytest.mark.parametrize("size", [1.0, 12.0])
@pytest.mark.parametrize(("n_q", "n_k", "m", "causal"), CASES)
def test_it_is_the_kernel_in_the_window_and_features_outside(n_q, n_k, m, causal, size):
    p = problem(n_q, n_k, causal=causal, size=size)
    op = nl.method("scatterbrain", m=m, features=6)(p, 3)
    log_kernel = logarithms(p, m, 6, 3)
    expected = np.exp(log_kernel - logsumexp(log_kernel, axis=-1, keepdims=True))
    eps = 1e2 * np.finfo(float).eps * np.abs(log_kernel[np.isfinite(log_kernel)]).max()
    np.testing.assert_allclose(op.dense(), expected, rtol=0, atol=eps)
    np.testing.assert_allclose(op @ p.v, expected @ p.v, rtol=0, atol=10 * eps)


@pytest.mark.parametrize("causal", [False, True])
def test_float32_at_logits_of_hundreds(causal):
    """Every row is what it is in float64, up to rounding of the logits; differences of kernels would be noise."""
    p = problem(150, causal=causal, size=12.0).astype(np.float32)
    fine = p.astype(np.float64)
    assert np.std(fine.scale * fine.q @ fine.k.T) > 50
    here, there = (nl.method("scatterbrain", m=20, features=8)(x, 1).dense() for x in (p, fine))
    assert here.dtype == np.float32
    size = np.abs(logarithms(fine, 20, 8, 1)[np.tri(150, dtype=bool)]).max()
    np.testing.assert_allclose(here, there, rtol=0, atol=8 * np.finfo(np.float32).eps * size)


@pytest.mark.parametrize("causal", [False, True])
def test_masks_that_hide_whole_windows(causal):
    keep = (np.arange(120) < 40) & (np.arange(120) % 3 != 1)
    p = problem(120, causal=causal, key_mask=keep)
    log_kernel = logarithms(p, 12, 5, 2)
    expected = np.exp(log_kernel - logsumexp(log_kernel, axis=-1, keepdims=True))
    np.testing.assert_allclose(nl.method("scatterbrain", m=12, features=5)(p, 2).dense(), expected, atol=1e-13)


def test_the_kernel_before_normalisation_is_exact_in_the_window():
    p = problem(60)
    op = nl.method("scatterbrain", m=10, features=4)(p, 0)
    kernel = op.op.dense() * np.exp(op.row_scale_log)[:, None]
    near = window(p, 10)
    np.testing.assert_allclose(kernel[near], np.exp(p.scale * p.q @ p.k.T)[near], rtol=1e-13)
    assert np.median(abs(kernel / np.exp(p.scale * p.q @ p.k.T) - 1)[~near]) > 0.1


def test_all_keys_in_the_window_are_softmax():
    p = problem(37, batch=(2,))
    np.testing.assert_allclose(nl.method("scatterbrain", m=37)(p, 0).dense(), p.exact().dense(), rtol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_the_generic_path_agrees_with_numpy(causal):
    strict = pytest.importorskip("array_api_strict")
    p = problem(90, batch=(2,), causal=causal)
    here, there = (nl.method("scatterbrain", m=9, features=5)(x, 1) for x in (p, p.map(strict.asarray)))
    np.testing.assert_allclose(np.asarray(there @ strict.asarray(p.v)), here @ p.v, atol=1e-13)
    np.testing.assert_allclose(np.asarray(there.T @ strict.asarray(p.q)), here.T @ p.q, atol=1e-12)


def test_theory_is_that_of_the_features_and_silent_in_the_window():
    p = problem(60)
    promise = nl.method("scatterbrain", m=10, features=4).theory(p)
    features = nl.method("positive_features", m=4).theory(p)
    near = window(p, 10)
    np.testing.assert_array_equal(promise.relative_variance()[near], 0)
    np.testing.assert_array_equal(promise.relative_variance()[~near], features.relative_variance()[~near])
    np.testing.assert_array_equal(promise.relative_variance(7, 19), promise.relative_variance()[7:19])
    assert nl.method("scatterbrain", m=60).theory(p) is None


def test_refusals_say_why():
    with pytest.raises(ValueError, match="exceeds the number of keys"):
        nl.method("scatterbrain", m=6)(problem(5), 0)
    with pytest.raises(ValueError, match="features"):
        nl.method("scatterbrain", m=6, features=0)
    with pytest.raises(nl.methods.Unsupported, match="beyond the window"):
        nl.method("scatterbrain", m=6)(problem(9, window=3), 0)


@pytest.mark.parametrize("features", [None, 1, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_counts_are_the_formula_for_every_border(features, causal):
    rng = np.random.default_rng(4)
    for m in (1, 2, 3, 9, 30):
        n = int(rng.integers(m, 120))
        p = problem(n if causal else int(rng.integers(1, 120)), n, causal=causal)
        method = nl.method("scatterbrain", m=m, features=features)
        assert nl.costs.count(method, p) == method.cost(p).at(p, method)
