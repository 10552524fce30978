"""The NumPy path of exact attention: threads over tiles, buffers reused, no pass over a tile that can be spared.

A tile of logits costs two matrix products and one exponential; everything else is avoided where that is safe. The
row maximum is only needed against overflow: where |q||k| bounds the logits well inside the exponent range of the dtype
(Cauchy–Schwarz), exp(logits) is summed as it stands, which is as accurate as the shifted sum since a shift only moves
the exponent. Otherwise the first product runs the online log-sum-exp, and later ones subtract the stored log-sum-exp.
Denominators come from a column of ones appended to the right-hand sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import parallel

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators.softmax import SoftmaxAttention

    Matrix = NDArray[Any]

__all__ = ["stream_apply", "stream_transpose"]

_ROWS, _KEYS = 256, 512  # a float32 tile of logits is half a MiB: it stays in a core's second-level cache


@dataclass(frozen=True)
class _Head:
    """One attention matrix of the batch: its arrays as views, and whether its logits need a shift."""

    op: SoftmaxAttention
    q: Matrix
    k: Matrix
    mask: NDArray[np.bool_] | None
    bias: Matrix | None
    bounded: bool

    def logits(self, i: tuple[int, int], j: tuple[int, int], scaled_q: Matrix, out: Matrix) -> Matrix:
        """Logits of rows ``i`` and keys ``j`` into ``out``, −∞ where causality, window or mask hide a key."""
        s = np.matmul(scaled_q, self.k[slice(*j)].T, out=out[: i[1] - i[0], : j[1] - j[0]])
        if self.bias is not None:
            s += self.bias[slice(*i), slice(*j)]
        keep = self.op.structure(*i, *j)
        if keep is not None:
            np.copyto(s, -np.inf, where=~keep)
        if self.mask is not None and not self.mask[slice(*j)].all():
            s[:, ~self.mask[slice(*j)]] = -np.inf
        return s


def stream_apply(op: SoftmaxAttention, x: Matrix, log_sum: Matrix | None) -> tuple[Matrix, Matrix]:
    """``P x`` and the log-sum-exps of the rows, which are only computed where they are not given."""
    batch, n_q = np.broadcast_shapes(op.batch_shape, x.shape[:-2]), op.shape[-2]
    dtype = np.result_type(op.dtype, x.dtype)
    out = np.empty((*batch, n_q, x.shape[-1]), dtype)
    sums = np.empty((*batch, n_q), dtype) if log_sum is None else np.broadcast_to(log_sum, (*batch, n_q))
    heads = {index: _head(op, batch, index) for index in np.ndindex(batch)}
    columns = _right_hand_sides(x, batch, dtype, append_ones=log_sum is None)

    def tile(task: tuple[tuple[int, ...], int]) -> None:
        index, start = task
        rows = (start, min(start + _ROWS, n_q))
        target = out[index][slice(*rows)]
        if log_sum is None:
            y, lse = _first_product(heads[index], rows, columns[index])
            target[...] = y
            sums[index][slice(*rows)] = lse
        else:
            target[...] = _later_product(heads[index], rows, columns[index], sums[index][slice(*rows)])

    starts = range(0, n_q, _ROWS)
    parallel(tile, [(index, s) for s in reversed(starts) for index in np.ndindex(batch)])
    if log_sum is None:
        log_sum = sums[(0,) * (len(batch) - len(op.batch_shape))]
    return out, log_sum


def stream_transpose(op: SoftmaxAttention, y: Matrix, log_sum: Matrix) -> Matrix:
    """``Pᵀ y`` from the log-sum-exps of the rows."""
    n_q, n_k = op.shape[-2:]
    batch = np.broadcast_shapes(op.batch_shape, y.shape[:-2])
    dtype = np.result_type(op.dtype, y.dtype)
    out = np.empty((*batch, n_k, y.shape[-1]), dtype)
    heads = {index: _head(op, batch, index) for index in np.ndindex(batch)}
    log_sum = np.broadcast_to(log_sum, (*batch, n_q))
    columns = np.broadcast_to(y, (*batch, *y.shape[-2:]))

    def tile(task: tuple[tuple[int, ...], int]) -> None:
        index, start = task
        keys = (start, min(start + _KEYS, n_k))
        out[index][slice(*keys)] = _adjoint_product(heads[index], keys, columns[index], log_sum[index])

    parallel(tile, [(index, s) for s in range(0, n_k, _KEYS) for index in np.ndindex(batch)])
    return out


def _head(op: SoftmaxAttention, batch: tuple[int, ...], index: tuple[int, ...]) -> _Head:
    def view(a: Matrix | None, axes: int) -> Matrix | None:
        return None if a is None else np.broadcast_to(a, (*batch, *a.shape[a.ndim - axes :]))[index]

    q, k, mask, bias = view(op.q, 2), view(op.k, 2), view(op.key_mask, 1), view(op.bias, 2)
    assert q is not None  # noqa: S101 - for the type checker: only mask and bias may be absent
    assert k is not None  # noqa: S101
    bound = abs(op.scale) * _largest_norm(q) * _largest_norm(k)
    if bias is not None:
        bound += float(np.max(np.abs(bias)))
    # Half of the exponent range: sums of up to exp(range / 2) such terms do not overflow, and none is subnormal.
    return _Head(op, q, k, mask, bias, bounded=bound <= 0.5 * float(np.log(np.finfo(op.dtype).max)))


def _largest_norm(a: Matrix) -> float:
    return float(np.sqrt(np.max(np.einsum("ij,ij->i", a, a))))


def _right_hand_sides(x: Matrix, batch: tuple[int, ...], dtype: Any, *, append_ones: bool) -> Matrix:
    if append_ones:
        x = np.concatenate([x.astype(dtype, copy=False), np.ones((*x.shape[:-1], 1), dtype)], axis=-1)
    return np.broadcast_to(x, (*batch, *x.shape[-2:]))


def _key_tiles(op: SoftmaxAttention, rows: tuple[int, int]) -> list[tuple[int, int]]:
    first, last = op.visible_keys(*rows)
    return [(s, min(s + _KEYS, last)) for s in range(first, last, _KEYS)]


def _first_product(head: _Head, rows: tuple[int, int], x: Matrix) -> tuple[Matrix, Matrix]:
    """Rows of P x and their log-sum-exps; the last column of ``x`` holds ones."""
    q = head.op.scale * head.q[slice(*rows)]
    buffer = np.empty((_ROWS, _KEYS), q.dtype)
    total = np.zeros((len(q), x.shape[1]), x.dtype)
    top = np.zeros(len(q), q.dtype) if head.bounded else np.full(len(q), -np.inf, q.dtype)
    for keys in _key_tiles(head.op, rows):
        s = head.logits(rows, keys, q, buffer)
        if not head.bounded:
            new_top = np.maximum(top, s.max(axis=1))
            shift = np.where(np.isfinite(new_top), new_top, 0)  # a row that has seen no visible key yet
            s -= shift[:, None]
            total *= np.exp(top - shift)[:, None]
            top = new_top
        np.exp(s, out=s)
        total += s @ x[slice(*keys)]
    return total[:, :-1] / total[:, -1:], top + np.log(total[:, -1])


def _later_product(head: _Head, rows: tuple[int, int], x: Matrix, log_sum: Matrix) -> Matrix:
    q = head.op.scale * head.q[slice(*rows)]
    buffer = np.empty((_ROWS, _KEYS), q.dtype)
    total = np.zeros((len(q), x.shape[1]), x.dtype)
    for keys in _key_tiles(head.op, rows):
        s = head.logits(rows, keys, q, buffer)
        if not head.bounded:
            s -= log_sum[:, None]
        np.exp(s, out=s)
        total += s @ x[slice(*keys)]
    return total / np.exp(log_sum)[:, None] if head.bounded else total


def _adjoint_product(head: _Head, keys: tuple[int, int], y: Matrix, log_sum: Matrix) -> Matrix:
    op = head.op
    buffer = np.empty((_ROWS, _KEYS), head.q.dtype)
    total = np.zeros((keys[1] - keys[0], y.shape[1]), np.result_type(head.q.dtype, y.dtype))
    for start in range(0, op.shape[-2], _ROWS):
        rows = (start, min(start + _ROWS, op.shape[-2]))
        first, last = op.visible_keys(*rows)
        if last <= keys[0] or first >= keys[1]:
            continue
        s = head.logits(rows, keys, op.scale * head.q[slice(*rows)], buffer)
        block = y[slice(*rows)]
        if head.bounded:
            block = block / np.exp(log_sum[slice(*rows)])[:, None]
        else:
            s -= log_sum[slice(*rows), None]
        np.exp(s, out=s)
        total += s.T @ block
    return total
