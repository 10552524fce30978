"""The NumPy path of causal low-rank products: threads over heads, chunks in batched products, few calls.

The generic path loops over chunks; with chunks of 64 rows the calls themselves then cost as much as the arithmetic.
Here the products inside chunks are batched over a group of chunks that fits into the cache, and only the states are
carried from chunk to chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nla_llm.backend import parallel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators.lowrank import CausalLowRank

    Matrix = NDArray[Any]

__all__ = ["chunked_product", "chunked_row_sums"]

_GROUP_ENTRIES = 1 << 18  # of the largest array of a group of chunks: a MiB in float32, a core's second-level cache


def chunked_product(op: CausalLowRank, x: Matrix, *, transpose: bool) -> Matrix:
    """``A x``, or ``Aᵀ x``, one task for each head."""
    batch = np.broadcast_shapes(op.batch_shape, x.shape[:-2])
    out = np.empty((*batch, *x.shape[-2:]), np.result_type(op.dtype, x.dtype))

    def head(index: tuple[int, ...]) -> None:
        near, far, columns = (_view(a, batch, index) for a in (op.left, op.right, x))
        decay = None if op.decay is None else _view(op.decay, batch, index)
        if transpose:  # Aᵀ is the same recurrence run backwards, with the roles of the factors exchanged
            near, far = far, near
        _head_product(near, far, decay, columns, out[index], chunk=op.chunk, transpose=transpose)

    parallel(head, np.ndindex(batch))
    return out


def _head_product(
    near: Matrix, far: Matrix, decay: Matrix | None, x: Matrix, out: Matrix, *, chunk: int, transpose: bool
) -> None:
    """One head: what the rows ``near`` see of x through ``far``, in their own chunk and through the state."""
    n, m = near.shape
    state = np.zeros((m, x.shape[1]), out.dtype)
    lower = np.tri(chunk, dtype=bool)
    keep = lower.T if transpose else lower
    per_group = max(1, _GROUP_ENTRIES // (max(m, chunk) * max(chunk, x.shape[1])))
    starts = range(0, n, per_group * chunk)
    for start in reversed(starts) if transpose else starts:
        rows = slice(start, min(start + per_group * chunk, n))
        group = _Group(_blocks(near[rows], chunk), _blocks(far[rows], chunk), _blocks(x[rows], chunk), keep)
        scales = None if decay is None else decay[start // chunk : start // chunk + len(group.near), :, None]
        y, state = _group_product(group, scales, state, backwards=transpose)
        out[rows] = y.reshape(-1, x.shape[1])[: rows.stop - start]


def chunked_row_sums(op: CausalLowRank) -> Matrix:
    """``A 1`` by running sums of the right factor, without the products inside chunks."""
    out = np.empty(op.shape[:-1], op.dtype)
    (n, m), chunk = op.left.shape[-2:], op.chunk
    lower = np.tri(chunk, dtype=op.dtype)
    rows = chunk * max(1, _GROUP_ENTRIES // (chunk * m))

    def head(index: tuple[int, ...]) -> None:
        left, right = _view(op.left, op.batch_shape, index), _view(op.right, op.batch_shape, index)
        decay = None if op.decay is None else _view(op.decay, op.batch_shape, index)
        before = None
        for start in range(0, n, rows):
            group = slice(start, min(start + rows, n))
            seen = lower @ _blocks(right[group], chunk)  # running sums in chunks: a product beats a strided cumsum
            for c in range(len(seen)):
                if before is not None:
                    seen[c] += before if decay is None else decay[start // chunk + c] * before
                before = seen[c, -1]
            # into a new array: sums of narrow formats come in float32, and are rounded by the assignment
            out[index][group] = np.einsum("nm,nm->n", left[group], seen.reshape(-1, m)[: group.stop - start])

    parallel(head, np.ndindex(op.batch_shape))
    return out


def _view(a: Matrix, batch: tuple[int, ...], index: tuple[int, ...]) -> Matrix:
    matrix: Matrix = np.broadcast_to(a, (*batch, *a.shape[-2:]))[index]
    return matrix


def _blocks(a: Matrix, chunk: int) -> Matrix:
    """Rows in blocks (blocks, chunk, columns), the last one filled up with zeros."""
    short = -len(a) % chunk
    if short:
        a = np.concatenate([a, np.zeros((short, a.shape[1]), a.dtype)])
    return a.reshape(-1, chunk, a.shape[1])


class _Group(NamedTuple):
    """Some chunks: factors and columns (blocks, chunk, ·), and which products inside a chunk stay."""

    near: Matrix
    far: Matrix
    x: Matrix
    keep: Matrix


def _group_product(group: _Group, decay: Matrix | None, state: Matrix, *, backwards: bool) -> tuple[Matrix, Matrix]:
    """Products of a group; the state (m, columns) is that on entering, and then on leaving it."""
    near, far, x, keep = group
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows above the diagonal does not count
        weights = near @ far.transpose(0, 2, 1)
    np.copyto(weights, 0, where=~keep)
    y = weights @ x
    updates = far.transpose(0, 2, 1) @ x
    order = range(len(near))
    for c in reversed(order) if backwards else order:
        if decay is not None and not backwards:
            state = decay[c] * state
        left = state + updates[c]
        updates[c] = state  # from here on, the state on entering the chunk
        state = left if decay is None or not backwards else decay[c] * left
    y += near @ updates
    return y, state
