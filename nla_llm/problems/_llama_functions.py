"""The functions of a Llama layer, on arrays of any library."""

from __future__ import annotations

from typing import Any

from nla_llm.backend import Array, namespace

__all__ = ["cross_entropy", "merge_heads", "rms_norm", "rotate", "silu", "split_heads", "wide"]

_LOGITS_AT_ONCE = 1 << 23  # entries; bounds the memory of the loss for a large vocabulary


def wide(x: Array) -> Any:
    """Dtype for sums over entries of x: its own, float32 where that is narrower."""
    xp = namespace(x)
    return x.dtype if xp.finfo(x.dtype).bits >= 32 else xp.float32


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """x / √(mean x² + eps) · gain over the last axis, float32 at least (Zhang and Sennrich 2019, arXiv 1910.07467)."""
    xp = namespace(x)
    y = xp.astype(x, wide(x), copy=False)
    y = y / xp.sqrt(xp.mean(y * y, axis=-1, keepdims=True) + eps)
    return xp.astype(y, x.dtype, copy=False) * gain


def silu(x: Array) -> Array:
    """x / (1 + e⁻ˣ), by the exponential that cannot overflow."""
    xp = namespace(x)
    small = xp.exp(-xp.abs(x))
    return x * xp.where(x < 0, small, xp.ones_like(x)) / (1 + small)


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Turn the pairs (x_i, x_{i + d/2}) of x (..., n, d) by angles of which cos and sin are (n, d/2)."""
    half = x.shape[-1] // 2
    left, right = x[..., :half], x[..., half:]
    return namespace(x).concat([left * cos - right * sin, right * cos + left * sin], axis=-1)


def split_heads(x: Array, heads: int, group: int) -> Array:
    """(..., n, heads · group · d) to (..., heads, group, n, d)."""
    b = x.ndim - 2
    x = namespace(x).reshape(x, (*x.shape[:-1], heads, group, x.shape[-1] // (heads * group)))
    return namespace(x).permute_dims(x, (*range(b), b + 1, b + 2, b, b + 3))


def merge_heads(x: Array) -> Array:
    """(..., heads, group, n, d) to (..., n, heads · group · d): the inverse of :func:`split_heads`."""
    b = x.ndim - 4
    x = namespace(x).permute_dims(x, (*range(b), b + 2, b, b + 1, b + 3))
    return namespace(x).reshape(x, (*x.shape[:-3], -1))


def cross_entropy(hidden: Array, targets: Array, head: Array) -> Array:
    """−log softmax(head · hidden)[target], for hidden (..., n, d) and targets (..., n), without all logits at once."""
    xp = namespace(hidden)
    rows, flat = xp.reshape(hidden, (-1, hidden.shape[-1])), xp.reshape(targets, (-1,))
    block = max(1, _LOGITS_AT_ONCE // head.shape[0])
    values = []
    for start in range(0, rows.shape[0], block):
        stop = min(start + block, rows.shape[0])
        x = rows[start:stop, :]
        logits = xp.astype(x @ xp.matrix_transpose(head), wide(x), copy=False)
        top = xp.max(logits, axis=-1, keepdims=True)
        log_sum = top[:, 0] + xp.log(xp.sum(xp.exp(logits - top), axis=-1))
        chosen = xp.take(head, flat[start:stop], axis=0)
        values.append(log_sum - xp.sum(xp.astype(x, wide(x)) * xp.astype(chosen, wide(x)), axis=-1))
    return xp.reshape(xp.concat(values), targets.shape)
