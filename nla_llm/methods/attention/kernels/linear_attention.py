"""Kernel attention: softmax replaced by φ(q)·φ(k), normalised by rows, in time linear in n.

The normalisation makes any common factor of a row irrelevant, and the sum over features lets a factor of feature r
move between queries and keys. Both keep exponentials in range without an epsilon: key features are scaled by their
largest value *per feature*, the inverse goes to the query side, and query rows are then scaled by their largest entry.
In the causal form the scale of the keys may only know the past, so it runs along the chunks and the state is rescaled.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, by_heads, device_of, is_numpy, namespace
from nla_llm.operators import CausalLowRank, LowRank, RowNormalised

if TYPE_CHECKING:
    from collections.abc import Callable

    from nla_llm.problems import AttentionProblem

__all__ = [
    "CHUNK",
    "Features",
    "half_square_norm",
    "half_square_norm_cost",
    "kernel_attention",
    "kernel_attention_cost",
]

CHUNK = 64  # rows of a causal chunk: near the feature counts in use, where state and triangle cost the same


@dataclass(frozen=True, eq=False)
class Features:
    """Features φ = amplitude · exp(log + row + column): their logarithmic scale is carried apart so that it can move.

    Queries and keys have the same parts, but for ``column``.

    Attributes
    ----------
    amplitude
        (..., n, m), or None for ones.
    log
        (..., n, m) or (..., n, 1), or None for zeros; −inf is a feature that is zero.
    row
        (..., n, 1), or None for zeros: what all features of a token share. It never meets the features of the queries,
        whose rows are normalised.
    column
        (..., 1, m), or None for zeros: what all keys share, only beside a ``log`` of m columns. It never meets the
        features of the keys: it is moved to the queries together with the scale of the keys.
    zeros
        Share of the features of a token that are zero by construction, their log −inf: not counted as underflow.
    """

    amplitude: Array | None = None
    log: Array | None = None
    row: Array | None = None
    column: Array | None = None
    zeros: float = 0.0

    def hide(self, mask: Array | None) -> Features:
        """The same with the rows of hidden tokens zero."""
        if mask is None:
            return self
        xp = namespace(mask)
        keep = mask[..., None]

        def blank(a: Array | None, fill: float) -> Array | None:
            return None if a is None else xp.where(keep, a, xp.asarray(fill, dtype=a.dtype, device=device_of(a)))

        return replace(
            self, amplitude=blank(self.amplitude, 0.0), log=blank(self.log, -xp.inf), row=blank(self.row, -xp.inf)
        )

    def times(self, exponential: Array | None) -> Array:
        """amplitude · exponential, where None stands for ones; an exponential of this shape is overwritten."""
        if exponential is None or self.amplitude is None:
            return self.amplitude if exponential is None else exponential
        if exponential.shape == self.amplitude.shape:
            exponential *= self.amplitude
            return exponential
        return by_heads(operator.mul, self.amplitude, exponential)


class _Scaled(NamedTuple):
    """Exponentials of the scaled logs, None for ones, and what the scales have taken off the kernel."""

    queries: Array | None = None
    keys: Array | None = None
    row_scale: Array | None = None
    decay: Array | None = None
    chunk: int = 1


def kernel_attention(
    problem: AttentionProblem,
    queries: Features,
    keys: Features,
    *,
    log_factor: float = 0.0,
    nonnegative: bool = False,
    chunk: int = CHUNK,
    overwrite: bool = False,
) -> RowNormalised:
    """diag(Â 1)⁻¹ Â for Â = exp(log_factor) φ(q) φ(k)ᵀ, its lower triangle where the problem is causal.

    Masked keys are removed from numerator and denominator alike. The operator's ``underflow_share`` tells which share
    of the exponentials has vanished. With ``overwrite`` the logs of the features may be overwritten.
    """
    keys = keys.hide(problem.key_mask)
    scaled = _scale_causal(queries, keys, chunk) if problem.causal else _scale(queries, keys, overwrite)
    left, right = queries.times(scaled.queries), keys.times(scaled.keys)
    op: CausalLowRank | LowRank
    if problem.causal:
        op = CausalLowRank(left, right, decay=scaled.decay, chunk=scaled.chunk, nonnegative=nonnegative)
    else:
        op = LowRank(left, right, nonnegative=nonnegative)
    row_scale = None if scaled.row_scale is None else scaled.row_scale[..., 0] + log_factor
    exponentials = scaled.queries, scaled.keys
    return RowNormalised(
        op, row_scale_log=row_scale, exponentials=exponentials, zeros=keys.zeros, visible=problem.key_mask
    )


def _scale(queries: Features, keys: Features, overwrite: bool) -> _Scaled:
    """The largest log of each feature moves from the keys to the queries, that of a query to the scale of its row."""
    if keys.log is None:
        if keys.row is None:
            return _Scaled()
        xp = namespace(keys.row)
        top = xp.max(keys.row, axis=-2, keepdims=True)
        return _Scaled(None, xp.exp(keys.row - top), queries.row + top)
    exp_k, top = _in_place(_exp_below_maximum_of_columns, keys.log, keys.row, overwrite)
    weights = top if keys.column is None else top + keys.column
    exp_q, row_scale = _in_place(_exp_below_maximum_of_rows, queries.log, weights, overwrite)
    return _Scaled(exp_q, exp_k, row_scale if queries.row is None else row_scale + queries.row)


def _in_place(function: Callable[..., Any], log: Array, other: Array | None, overwrite: bool) -> Any:
    """``function`` of a log that it overwrites, or of log + other in a new array."""
    if other is None:
        return by_heads(function, log if overwrite else namespace(log).asarray(log, copy=True), overwrite=True)
    if overwrite and np.broadcast_shapes(log.shape, other.shape) == log.shape:
        return by_heads(partial(_after_adding, function), log, other, overwrite=True)
    return by_heads(lambda a, b: function(a + b), log, other)


def _after_adding(function: Callable[..., Any], log: Array, other: Array) -> Any:
    log += other
    return function(log)


def _exp_below_maximum_of_columns(log: Array) -> tuple[Array, Array]:
    top = namespace(log).max(log, axis=-2, keepdims=True)
    log -= _finite(top)
    return _exp_of_fresh(log), top


def _exp_below_maximum_of_rows(log: Array) -> tuple[Array, Array]:
    top = _finite(namespace(log).max(log, axis=-1, keepdims=True))
    log -= top
    return _exp_of_fresh(log), top


def _finite(top: Array) -> Array:
    """A scale that can be taken off: 0 for a feature that no key has, or a query that shares none with any key."""
    xp = namespace(top)
    return xp.where(top == -xp.inf, xp.asarray(0.0, dtype=top.dtype, device=device_of(top)), top)


def _exp_of_fresh(a: Array) -> Array:
    """exp(a) of an array that nobody else holds."""
    return np.exp(a, out=a) if is_numpy(a) else namespace(a).exp(a)


def _scale_causal(queries: Features, keys: Features, chunk: int) -> _Scaled:
    """The same with the running maximum of the keys."""
    if keys.log is None:
        if keys.row is None:
            return _Scaled(chunk=chunk)
        row_scale, row_k, decay, chunk = _running_scale(queries.row, keys.row, chunk)
        return _Scaled(None, namespace(row_k).exp(row_k), row_scale, decay, chunk)
    log_k = keys.log if keys.row is None else keys.log + keys.row
    log_q, log_k, decay, chunk = _running_scale(queries.log, log_k, chunk, keys.column)
    xp = namespace(log_q)
    row_scale = _finite(xp.max(log_q, axis=-1, keepdims=True))
    log_q -= row_scale
    exp_q, exp_k = by_heads(_exp_of_fresh, log_q), by_heads(_exp_of_fresh, log_k)
    return _Scaled(exp_q, exp_k, row_scale if queries.row is None else row_scale + queries.row, decay, chunk)


def _running_scale(
    log_q: Array, log_k: Array, chunk: int, column: Array | None = None
) -> tuple[Array, Array, Array, int]:
    """Move the running maximum of the keys' log-features, chunk by chunk, to the queries.

    Returns the moved logs, the decay of the state on entering each chunk, and the chunk size. A row at the start of a
    chunk is scaled by a maximum that includes the later keys of its own chunk; where that maximum has grown by more
    than the exponent range allows, chunks are halved (a chunk of one row knows no later key).
    """
    xp = namespace(log_k)
    allowed = 0.45 * float(xp.log(xp.asarray(xp.finfo(log_k.dtype).max)))  # both factors stay normal numbers
    n = log_k.shape[-2]
    top = log_k[..., :1, :]
    moved_q, moved_k, decay = [], [], []
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)  # the standard leaves a slice beyond the end undefined
        block = log_k[..., start:stop, :]
        at_first_row = xp.maximum(top, block[..., :1, :])
        new_top = xp.maximum(top, xp.max(block, axis=-2, keepdims=True))
        scale = _finite(new_top)
        grown = scale - xp.where(at_first_row == -xp.inf, scale, at_first_row)  # a new feature has no past to spoil
        if chunk > 1 and bool(xp.any(grown > allowed)):
            return _running_scale(log_q, log_k, chunk // 2, column)
        moved_k.append(block - scale)
        moved_q.append(log_q[..., start:stop, :] + (new_top if column is None else new_top + column))
        decay.append(xp.exp(top - scale))
        top = new_top
    return xp.concat(moved_q, axis=-2), xp.concat(moved_k, axis=-2), xp.concat(decay, axis=-2), chunk


def half_square_norm(x: Array) -> Array:
    """½|x|² of every token, (..., n, 1): what turns exp(ω·x) into a feature of the softmax kernel."""
    return 0.5 * namespace(x).sum(x * x, axis=-1, keepdims=True)


def half_square_norm_cost(tokens: Any, d: Any) -> costs.Operations:
    """Cost of :func:`half_square_norm`."""
    norms: costs.Operations = tokens * (costs.Operations(mul=d + 1) + costs.formulas.sum_of(d))
    return norms


def kernel_attention_cost(
    problem: AttentionProblem,
    features: Any,
    *,
    log_width: Any = None,
    amplitude: bool = False,
    row: bool = False,
    column: bool = False,
) -> costs.Cost:
    """Cost of :func:`kernel_attention` with ``features`` features: which parts they have, and the columns of their log.

    Holds where no chunk has to be halved; a causal run that halves them does more.
    """
    n_q, n_k, _, d_v = costs.symbols_of(problem)
    op: costs.formulas.LowRankShape | costs.formulas.CausalLowRankShape
    scaled = log_width is not None or row
    if problem.causal:
        op = costs.formulas.CausalLowRankShape(n_q, features, costs.c, decay=scaled)
    else:
        op = costs.formulas.LowRankShape(n_q, n_k, features)
    normalised = costs.formulas.row_normalised(op, n_q, d_v)
    if not scaled:
        return normalised
    width = 1 if log_width is None else log_width
    if isinstance(op, costs.formulas.CausalLowRankShape):
        scaling = _running_scale_cost(n_q, op.chunks, width) + costs.Operations(add=op.chunks * width if column else 0)
    else:
        unseen = 0 if log_width is None else width  # features that no key has
        scaling = _scale_cost(n_q, n_k, width) + costs.Operations(add=width if column else 0, compare=unseen)
    factor = costs.Operations(add=n_q)
    if log_width is None:  # the rows of queries meet no feature
        values = costs.Operations(exp=n_k, mul=n_k * features if amplitude else 0)
        return costs.Cost(prepare=scaling + factor + values) + normalised
    row_scale = costs.formulas.maximum_of(width, times=n_q) + costs.Operations(add=n_q * width, compare=n_q)
    rows = costs.Operations(add=n_k * width + n_q if row else 0)
    values = costs.Operations(exp=width, mul=features if amplitude else 0) * (n_q + n_k)
    return costs.Cost(prepare=scaling + row_scale + rows + factor + values) + normalised


def _scale_cost(n_q: Any, n_k: Any, width: Any) -> costs.Operations:
    """The largest log of each feature, moved from the keys to the queries."""
    return costs.formulas.maximum_of(n_k, times=width) + costs.Operations(add=(n_q + n_k) * width)


def _running_scale_cost(n: Any, chunks: Any, width: Any) -> costs.Operations:
    """Cost of :func:`_running_scale`: per chunk its maximum, the new scale, its test and its decay."""
    per_chunk = costs.Operations(compare=5 * width, add=2 * width, exp=width)
    moved = costs.Operations(compare=(n - chunks) * width, add=2 * n * width)
    in_chunks: costs.Operations = per_chunk * chunks
    return in_chunks + moved + costs.Operations(exp=1)  # the exponent range is one logarithm
