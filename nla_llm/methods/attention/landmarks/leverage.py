"""Scores by which columns and rows are sampled, leverage and ridge leverage, and the clocks that draw by them."""

from __future__ import annotations

from typing import Any

from nla_llm import costs
from nla_llm.backend import Array, constant, decomposable, eps, namespace
from nla_llm.methods.attention.landmarks.gaussian import gaussian, gaussian_cost

__all__ = ["hidden_last", "leverage", "ridge_leverage", "ring", "sample_cost"]


def ring(clock: Array, scores: Array) -> Array:
    """clock / scores; the largest finite number where the score is zero or next to it."""
    xp = namespace(clock)
    scores = xp.astype(scores, clock.dtype, copy=False)
    some = scores > 0
    latest = xp.full_like(scores, xp.finfo(clock.dtype).max)
    time = clock / xp.where(some, scores, xp.ones_like(scores))
    return xp.where(some, xp.minimum(time, latest), latest)


def hidden_last(order: Array, mask: Array | None) -> Array:
    """``order`` with hidden places at infinity."""
    if mask is None:
        return order
    xp = namespace(order)
    return xp.where(mask, order, constant(xp.inf, like=order))


def leverage(x: Array, mask: Array | None) -> Array:
    """x_iᵀ (XᵀX)⁺ x_i of the centred rows of x (..., n, d), which no common factor of them changes."""
    xp, x = namespace(x), decomposable(x)
    if mask is None:
        centred = x - xp.mean(x, axis=-2, keepdims=True)
    else:
        x = xp.where(mask[..., None], x, xp.zeros_like(x))
        shown = xp.sum(xp.astype(mask, x.dtype), axis=-1, keepdims=True)[..., None]
        centred = x - xp.sum(x, axis=-2, keepdims=True) / shown
        centred = xp.where(mask[..., None], centred, xp.zeros_like(centred))
    size = xp.max(xp.abs(centred), axis=(-2, -1), keepdims=True)
    centred = centred / xp.where(size > 0, size, xp.ones_like(size))
    inverse = _symmetric_pseudo_inverse(xp.matrix_transpose(centred) @ centred, eps(x))
    return xp.sum((centred @ xp.astype(inverse, x.dtype, copy=False)) * centred, axis=-1)


def ridge_leverage(x: Array, landmarks: Array) -> Array:
    """1 − g_iᵀ (G_SS + λI)⁻¹ g_i with λ = 1/10, a tenth of the estimate of the ridge leverage score of token i."""
    xp = namespace(x)
    values, vectors = xp.linalg.eigh(xp.astype(gaussian(landmarks, landmarks), xp.float64, copy=False))
    scaled = vectors / (xp.maximum(values, xp.zeros_like(values)) + 0.1)[..., None, :]
    inverse = xp.astype(scaled @ xp.matrix_transpose(vectors), x.dtype, copy=False)
    near = gaussian(x, landmarks)
    left_over = 1.0 - xp.sum((near @ inverse) * near, axis=-1)
    return xp.maximum(left_over, xp.zeros_like(left_over))


def _symmetric_pseudo_inverse(a: Array, precision: float) -> Array:
    """Pseudo-inverse of a positive semi-definite matrix known to ``precision``, from its eigenvalues in float64."""
    xp = namespace(a)
    values, vectors = xp.linalg.eigh(xp.astype(a, xp.float64, copy=False))
    keep = values > a.shape[-1] * precision * values[..., -1:]
    inverse = xp.where(keep, 1.0 / xp.where(keep, values, xp.ones_like(values)), xp.zeros_like(values))
    return (vectors * inverse[..., None, :]) @ xp.matrix_transpose(vectors)


def sample_cost(sampling: str, n: Any, d: Any, *, masked: bool) -> costs.Operations:
    """Cost of the clocks, scores and sorting of one side, for CUR."""
    m, f, count = costs.m, costs.formulas, costs.Operations
    total: costs.Operations = count(draw=n) + f.merge_sort(n)
    scored = count(compare=2 * n, div=n)
    if sampling == "ridge_leverage":
        kernels = gaussian_cost(n, m, d) + gaussian_cost(m, m, d)
        solved = f.eigh(m) + count(compare=m, add=m, div=m**2) + f.matmul(m, m, m) + f.matmul(n, m, m)
        left = count(mul=n * m, add=n, compare=n) + f.sum_of(m, times=n)
        total += count(draw=n) + f.merge_sort(n) + kernels + solved + left + scored
    elif sampling == "leverage":
        mean = f.sum_of(n, times=d) + count(div=d, add=n * d) + (f.sum_of(n) if masked else count())
        mean += f.maximum_of(n * d) + count(compare=1, div=n * d)
        gram = f.matmul(d, n, d) + f.eigh(d) + count(mul=1 + d**2, compare=d, div=d) + f.matmul(d, d, d)
        total += mean + gram + f.matmul(n, d, d) + count(mul=n * d) + f.sum_of(d, times=n) + scored
    return total
