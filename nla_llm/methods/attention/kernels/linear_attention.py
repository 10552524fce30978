"""Kernel attention: softmax replaced by φ(q)·φ(k), normalised by rows, in time linear in n.

The normalisation makes any common factor of a row irrelevant, and the sum over features lets a factor of feature r
move between queries and keys. Both keep exponentials in range without an epsilon: key features are scaled by their
largest value *per feature*, the inverse goes to the query side, and query rows are then scaled by their largest entry.
In the causal form the scale of the keys may only know the past, so it runs along the chunks and the state is rescaled.
"""

from __future__ import annotations

from functools import partial, reduce
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, by_heads, constant, exp_in_place, is_numpy, namespace, parallel
from nla_llm.methods.attention.kernels.features import Features, MadeByRows, half_square_norm, half_square_norm_cost
from nla_llm.operators import CausalLowRank, LowRank, RowNormalised

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nla_llm.problems import AttentionProblem

__all__ = [
    "CHUNK",
    "Features",
    "MadeByRows",
    "half_square_norm",
    "half_square_norm_cost",
    "kernel_attention",
    "kernel_attention_cost",
]

_BLOCK_ENTRIES = 1 << 18  # of a block of features that are made by rows: a MiB in float32, a core's second-level cache
CHUNK = 64  # rows of a causal chunk: near the feature counts in use, where state and triangle cost the same


class _Scaled(NamedTuple):
    """Exponentials of the scaled logs, None for ones, and what the scales have taken off the kernel."""

    queries: Array | None = None
    keys: Array | None = None
    row_scale: Array | None = None
    decay: Array | None = None
    chunk: int = 1


def kernel_attention(
    problem: AttentionProblem,
    queries: Features | MadeByRows,
    keys: Features | MadeByRows,
    *,
    log_factor: float = 0.0,
    nonnegative: bool = False,
    chunk: int = CHUNK,
    overwrite: bool = False,
) -> RowNormalised:
    """diag(Â 1)⁻¹ Â for Â = exp(log_factor) φ(q) φ(k)ᵀ, its lower triangle where the problem is causal.

    Masked keys are removed from numerator and denominator alike. The operator's ``underflow_share`` tells which share
    of the exponentials has vanished. With ``overwrite`` the parts of the features may be overwritten. Features are
    :class:`MadeByRows` on both sides or on neither.
    """
    op: CausalLowRank | LowRank
    if isinstance(queries, MadeByRows) and isinstance(keys, MadeByRows) and is_numpy(problem.q, problem.k):
        keys = keys.hide(problem.key_mask)
        scaled = _scale_by_rows(queries, keys, chunk if problem.causal else None)
        left, right = scaled.queries, scaled.keys
    else:
        queries, keys = queries.whole(), keys.whole().hide(problem.key_mask)
        scaled = _scale_causal(queries, keys, chunk) if problem.causal else _scale(queries, keys, overwrite)
        left, right = (f.times(e, overwrite=overwrite) for f, e in ((queries, scaled.queries), (keys, scaled.keys)))
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
        return by_heads(function, log if overwrite else namespace(log).astype(log, log.dtype), overwrite=True)
    if overwrite and np.broadcast_shapes(log.shape, other.shape) == log.shape:
        return by_heads(partial(_after_adding, function), log, other, overwrite=True)
    return by_heads(lambda a, b: function(a + b), log, other)


def _after_adding(function: Callable[..., Any], log: Array, other: Array) -> Any:
    log += other
    return function(log)


def _exp_below_maximum_of_columns(log: Array) -> tuple[Array, Array]:
    top = namespace(log).max(log, axis=-2, keepdims=True)
    log -= _finite(top)
    return exp_in_place(log), top


def _exp_below_maximum_of_rows(log: Array) -> tuple[Array, Array]:
    top = _finite(namespace(log).max(log, axis=-1, keepdims=True))
    log -= top
    return exp_in_place(log), top


def _finite(top: Array) -> Array:
    """A scale that can be taken off: 0 for a feature that no key has, or a query that shares none with any key."""
    xp = namespace(top)
    return xp.where(top == -xp.inf, constant(0.0, like=top), top)


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
    exp_q, exp_k = by_heads(exp_in_place, log_q), by_heads(exp_in_place, log_k)
    return _Scaled(exp_q, exp_k, row_scale if queries.row is None else row_scale + queries.row, decay, chunk)


def _running_scale(
    log_q: Array, log_k: Array, chunk: int, column: Array | None = None
) -> tuple[Array, Array, Array, int]:
    """Move the running maximum of the keys' log-features, chunk by chunk, to the queries.

    Returns the moved logs, the decay of the state on entering each chunk, and the chunk size. A row at the start of a
    chunk is scaled by a maximum that includes the later keys of its own chunk; where that maximum has grown by more
    than the exponent range allows, chunks are halved (a chunk of one row knows no later key).
    """
    n = log_k.shape[-2]
    spans = [(start, min(start + chunk, n)) for start in range(0, n, chunk)]
    chain = _chain([_tops(log_k[..., start:stop, :]) for start, stop in spans], halved=chunk == 1)
    if chain is None:
        return _running_scale(log_q, log_k, chunk // 2, column)
    xp = namespace(log_k)
    moved_q, moved_k = [], []
    for (start, stop), link in zip(spans, chain, strict=True):
        moved_k.append(log_k[..., start:stop, :] - link.scale)
        moved_q.append(log_q[..., start:stop, :] + (link.top if column is None else link.top + column))
    decay = xp.concat([link.decay for link in chain], axis=-2)
    return xp.concat(moved_q, axis=-2), xp.concat(moved_k, axis=-2), decay, chunk


class _Link(NamedTuple):
    """What the keys of a chunk do to the running maximum: the new one, as a finite scale, and the decay to it."""

    top: Array
    scale: Array
    decay: Array


def _tops(log: Array) -> tuple[Array, Array]:
    """Logs of the first row of a chunk, and the largest of each feature."""
    return log[..., :1, :], namespace(log).max(log, axis=-2, keepdims=True)


def _chain(tops: list[tuple[Array, Array]], *, halved: bool) -> list[_Link] | None:
    """The running maximum along the chunks; None where it grows too much within one that can still be halved."""
    top = tops[0][0]
    xp = namespace(top)
    allowed = 0.45 * float(xp.log(xp.asarray(xp.finfo(top.dtype).max)))  # both factors stay normal numbers
    links = []
    for first, largest in tops:
        at_first_row = xp.maximum(top, first)
        new_top = xp.maximum(top, largest)
        scale = _finite(new_top)
        grown = scale - xp.where(at_first_row == -xp.inf, scale, at_first_row)  # a new feature has no past to spoil
        if not halved and bool(xp.any(grown > allowed)):
            return None
        links.append(_Link(new_top, scale, xp.exp(top - scale)))
        top = new_top
    return links


# -- features that are made by rows ------------------------------------------------------------------------------------


def _scale_by_rows(queries: MadeByRows, keys: MadeByRows, chunk: int | None) -> _Scaled:
    """The factors themselves, filled block by block from threads; ``chunk`` is None where the form is not causal."""
    links, chunk = _links_by_rows(keys, chunk)
    (n_q, m), dtype = queries.shape[-2:], links[0].top.dtype
    batch = np.broadcast_shapes(queries.shape[:-2], keys.shape[:-2])
    left, right = np.empty((*batch, n_q, m), dtype), np.empty(keys.shape, dtype)
    row_scale = np.empty((*batch, n_q, 1), dtype)

    def fill_keys(span: tuple[int, int]) -> None:
        made, log = _with_row(keys, span)
        for rows, link in _in_span(links, chunk, span):
            log[..., rows, :] -= link.scale
        right[..., slice(*span), :] = made.times(np.exp(log, out=log))

    def fill_queries(span: tuple[int, int]) -> None:
        made, rows = queries.make(*span), slice(*span)
        own: Any = made.log
        log = left[..., rows, :]
        for part, link in _in_span(links, chunk, span):
            np.add(own[..., part, :], link.top, out=log[..., part, :])
        log -= (top := _finite(np.max(log, axis=-1, keepdims=True)))
        made.times(np.exp(log, out=log))
        row_scale[..., rows, :] = top if made.row is None else top + made.row

    parallel(fill_keys, _spans(keys, chunk))
    parallel(fill_queries, _spans(queries, chunk))
    decay = None if chunk is None else np.concatenate([link.decay for link in links], axis=-2)
    return _Scaled(left, right, row_scale, decay, chunk or 1)


def _links_by_rows(keys: MadeByRows, chunk: int | None) -> tuple[list[_Link], int | None]:
    """The scale of the keys, one for all rows or one for each chunk, and the chunk to which that has led."""

    def tops(span: tuple[int, int]) -> list[tuple[Array, Array]]:
        _, log = _with_row(keys, span)
        starts = range(0, span[1] - span[0], chunk or span[1] - span[0])
        parts = (log[..., start : start + starts.step, :] for start in starts)
        return [(first.copy(), largest) for first, largest in map(_tops, parts)]  # a view would keep the block

    found = [pair for pairs in parallel(tops, _spans(keys, chunk)) for pair in pairs]
    if chunk is None:
        top = reduce(np.maximum, [largest for _, largest in found])
        return [_Link(top, _finite(top), top)], None
    links = _chain(found, halved=chunk == 1)
    return _links_by_rows(keys, chunk // 2) if links is None else (links, chunk)


def _with_row(keys: MadeByRows, span: tuple[int, int]) -> tuple[Features, Array]:
    made = keys.make(*span)
    return made, made.log if made.row is None else made.log + made.row


def _spans(features: MadeByRows, chunk: int | None) -> list[tuple[int, int]]:
    """Blocks of rows that fit into a cache, of whole chunks."""
    n, unit = features.shape[-2], chunk or 1
    step = unit * max(1, _BLOCK_ENTRIES * n // (prod(features.shape) * unit))
    return [(start, min(start + step, n)) for start in range(0, n, step)]


def _in_span(links: list[_Link], chunk: int | None, span: tuple[int, int]) -> Iterator[tuple[slice, _Link]]:
    """Rows of each chunk of a block, counted from its first row, with what the keys of the chunk do."""
    start, stop = span
    step = chunk or stop - start
    for row in range(start, stop, step):
        yield slice(row - start, min(row - start + step, stop - start)), links[0 if chunk is None else row // step]


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
