"""The NumPy path of exact attention: threads over tiles, buffers reused, no pass over a tile that can be spared.

A tile of logits costs two matrix products and one exponential; everything else is avoided where that is safe. The row
maximum is only needed against overflow: where |q||k| bounds the logits by a quarter of the exponent range of the dtype
(Cauchy–Schwarz), exp(logits) is summed as it stands, which is as accurate as the shifted sum since a shift only moves
the exponent; half of the range is left to the right-hand sides. Otherwise the first product runs the online
log-sum-exp, and later ones subtract the row maximum that it found. Denominators come from a column of ones appended to
the right-hand sides of the first product.
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
    Normaliser = tuple[Matrix, Matrix]

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

    def logits(self, rows: slice, keys: slice, scaled_q: Matrix, buffer: Matrix) -> Matrix:
        """Logits of a tile, −∞ where causality, window or mask hide a key."""
        s = buffer[: rows.stop - rows.start, : keys.stop - keys.start]
        np.matmul(scaled_q, self.k[keys].T, out=s)
        if self.bias is not None:
            s += self.bias[rows, keys]
        keep = self.op.structure(rows.start, rows.stop, keys.start, keys.stop)
        if keep is not None:
            np.copyto(s, -np.inf, where=~keep)
        if self.mask is not None and not self.mask[keys].all():
            s[:, ~self.mask[keys]] = -np.inf
        return s

    def weights(self, rows: slice, keys: slice, scaled_q: Matrix, shift: Matrix, buffer: Matrix) -> Matrix:
        """exp(logits − shift) of a tile."""
        s = self.logits(rows, keys, scaled_q, buffer)
        if not self.bounded:
            s -= shift[:, None]
        return np.exp(s, out=s)


def stream_apply(op: SoftmaxAttention, x: Matrix, normaliser: Normaliser | None) -> tuple[Matrix, Normaliser]:
    """``P x`` and the shifts and sums of the rows, which are only computed where they are not given."""
    batch, n_q = np.broadcast_shapes(op.batch_shape, x.shape[:-2]), op.shape[-2]
    dtype = np.result_type(op.dtype, x.dtype)
    out = np.empty((*batch, n_q, x.shape[-1]), dtype)
    first = normaliser is None  # otherwise the sums are known and need no column of their own
    shift, total = [np.empty((*batch, n_q), op.dtype) for _ in range(2)] if first else _spread(normaliser, batch)
    heads = {index: _head(op, batch, index) for index in np.ndindex(batch)}
    columns = _right_hand_sides(x, batch, dtype, append_ones=first)

    def tile(task: tuple[tuple[int, ...], int]) -> None:
        index, start = task
        part = slice(start, min(start + _ROWS, n_q))
        if first:
            y, shift[index][part], total[index][part] = _first_product(heads[index], part, columns[index])
        else:
            y = _later_product(heads[index], part, columns[index], shift[index][part])
        out[index][part] = y / total[index][part, None]

    starts = range(0, n_q, _ROWS)
    parallel(tile, [(index, s) for s in reversed(starts) for index in np.ndindex(batch)])
    own = _axes_of_its_own(op, batch)
    return out, (shift[own], total[own])


def stream_transpose(op: SoftmaxAttention, y: Matrix, normaliser: Normaliser) -> Matrix:
    """``Pᵀ y`` from the shifts and sums of the rows."""
    n_k = op.shape[-1]
    batch = np.broadcast_shapes(op.batch_shape, y.shape[:-2])
    dtype = np.result_type(op.dtype, y.dtype)
    out = np.empty((*batch, n_k, y.shape[-1]), dtype)
    heads = {index: _head(op, batch, index) for index in np.ndindex(batch)}
    shift, total = _spread(normaliser, batch)
    columns = y / total[..., None]

    def tile(task: tuple[tuple[int, ...], int]) -> None:
        index, start = task
        part = slice(start, min(start + _KEYS, n_k))
        out[index][part] = _adjoint_product(heads[index], part, columns[index], shift[index])

    parallel(tile, [(index, s) for s in range(0, n_k, _KEYS) for index in np.ndindex(batch)])
    return out


def _axes_of_its_own(op: SoftmaxAttention, batch: tuple[int, ...]) -> tuple[int | slice, ...]:
    """Index that drops the axes which only x brought in, or stretched from one: they repeat the same rows."""
    extra = (0,) * (len(batch) - len(op.batch_shape))
    return (*extra, *(slice(size) for size in op.batch_shape))


def _spread(normaliser: Normaliser | None, batch: tuple[int, ...]) -> list[Matrix]:
    return [np.broadcast_to(a, (*batch, a.shape[-1])) for a in normaliser or ()]


def _head(op: SoftmaxAttention, batch: tuple[int, ...], index: tuple[int, ...]) -> _Head:
    def view(a: Matrix | None, axes: int) -> Matrix | None:
        return None if a is None else np.broadcast_to(a, (*batch, *a.shape[a.ndim - axes :]))[index]

    q, k, mask, bias = view(op.q, 2), view(op.k, 2), view(op.key_mask, 1), view(op.bias, 2)
    assert q is not None  # noqa: S101 - for the type checker: only mask and bias may be absent
    assert k is not None  # noqa: S101
    bound = abs(op.scale) * _largest_norm(q) * _largest_norm(k)
    if bias is not None:
        bound += float(np.max(np.abs(bias)))
    return _Head(op, q, k, mask, bias, bounded=bound <= 0.25 * float(np.log(np.finfo(op.dtype).max)))


def _largest_norm(a: Matrix) -> float:
    return float(np.sqrt(np.max(np.einsum("ij,ij->i", a, a))))


def _right_hand_sides(x: Matrix, batch: tuple[int, ...], dtype: Any, *, append_ones: bool) -> Matrix:
    if append_ones:
        x = np.concatenate([x.astype(dtype, copy=False), np.ones((*x.shape[:-1], 1), dtype)], axis=-1)
    return np.broadcast_to(x, (*batch, *x.shape[-2:]))


def _tiles(first: int, last: int, size: int) -> list[slice]:
    return [slice(s, min(s + size, last)) for s in range(first, last, size)]


def _first_product(head: _Head, rows: slice, x: Matrix) -> tuple[Matrix, Matrix, Matrix]:
    """Rows of exp(logits − shift) x, the shifts and the sums; the last column of ``x`` holds ones."""
    q = head.op.scale * head.q[rows]
    buffer = np.empty((_ROWS, _KEYS), q.dtype)
    y = np.zeros((len(q), x.shape[1]), x.dtype)
    top = np.zeros(len(q), q.dtype) if head.bounded else np.full(len(q), -np.inf, q.dtype)
    for keys in _tiles(*head.op.visible_keys(rows.start, rows.stop), _KEYS):
        s = head.logits(rows, keys, q, buffer)
        if not head.bounded:
            new_top = np.maximum(top, s.max(axis=1))
            shift = np.where(np.isfinite(new_top), new_top, 0)  # a row that has seen no visible key yet
            s -= shift[:, None]
            y *= np.exp(top - shift)[:, None]
            top = new_top
        np.exp(s, out=s)
        y += s @ x[keys]
    return y[:, :-1], top, y[:, -1]


def _later_product(head: _Head, rows: slice, x: Matrix, shift: Matrix) -> Matrix:
    """Rows of exp(logits − shift) x."""
    q = head.op.scale * head.q[rows]
    buffer = np.empty((_ROWS, _KEYS), q.dtype)
    y = np.zeros((len(q), x.shape[1]), x.dtype)
    for keys in _tiles(*head.op.visible_keys(rows.start, rows.stop), _KEYS):
        y += head.weights(rows, keys, q, shift, buffer) @ x[keys]
    return y


def _adjoint_product(head: _Head, keys: slice, y: Matrix, shift: Matrix) -> Matrix:
    """Rows ``keys`` of exp(logits − shift)ᵀ y."""
    op = head.op
    buffer = np.empty((_ROWS, _KEYS), head.q.dtype)
    x = np.zeros((keys.stop - keys.start, y.shape[1]), np.result_type(head.q.dtype, y.dtype))
    for rows in _tiles(0, op.shape[-2], _ROWS):
        first, last = op.visible_keys(rows.start, rows.stop)
        if first < keys.stop and keys.start < last:
            x += head.weights(rows, keys, op.scale * head.q[rows], shift[rows], buffer).T @ y[rows]
    return x
