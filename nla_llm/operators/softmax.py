"""Exact softmax attention as an operator, streamed: nothing n × n is held."""

from __future__ import annotations

from typing import final

import numpy as np

from nla_llm.backend import Array, device_of, is_numpy, matmul, matmul_where, namespace
from nla_llm.operators._streaming import stream_apply, stream_transpose
from nla_llm.operators.base import Operator

__all__ = ["SoftmaxAttention"]

_BLOCK_ENTRIES = 1 << 21  # logits held at once by the generic path; memory does not depend on n


@final
class SoftmaxAttention(Operator):
    """P = softmax(scale · q kᵀ + bias) over the visible keys, (..., n_q, n_k).

    Query i sees key j if ``key_mask[j]``, and j ≤ i where ``causal``, and |i − j| < window where a window is given.
    Rows are computed in tiles with an online log-sum-exp (Milakov and Gimelshein 2018, arXiv 1805.02867); the shifts
    and sums of the rows are kept after the first product, and later products and the adjoint start from them.

    Parameters
    ----------
    q, k
        Queries (..., n_q, d) and keys (..., n_k, d); leading axes broadcast.
    scale
        Factor of the logits.
    causal, window, key_mask, bias
        As in :class:`nla_llm.AttentionProblem`, which validates them; nothing is validated here.

    Examples
    --------
    >>> import numpy as np
    >>> P = SoftmaxAttention(np.zeros((3, 2)), np.zeros((3, 2)), scale=1.0, causal=True)
    >>> np.round(P.dense(), 3).tolist()
    [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.333, 0.333, 0.333]]
    """

    nonnegative = True

    def __init__(
        self,
        q: Array,
        k: Array,
        *,
        scale: float,
        causal: bool = False,
        window: int | None = None,
        key_mask: Array | None = None,
        bias: Array | None = None,
    ) -> None:
        xp = namespace(q, k)
        batch = [a.shape[:-2] for a in (q, k, bias) if a is not None]
        batch += [key_mask.shape[:-1]] if key_mask is not None else []
        shape = (*np.broadcast_shapes(*batch), q.shape[-2], k.shape[-2])
        super().__init__(shape, xp.zeros((), dtype=xp.result_type(q.dtype, k.dtype), device=device_of(q)))
        self.q, self.k, self.scale = q, k, scale
        self.causal, self.window, self.key_mask, self.bias = causal, window, key_mask, bias
        self._normaliser: tuple[Array, Array] | None = None

    @property
    def log_sum_exp(self) -> Array:
        """log Σ_j exp(logit_ij) over the visible keys, (..., n_q)."""
        shift, total = self.normaliser
        return shift + self.xp.log(total)

    @property
    def normaliser(self) -> tuple[Array, Array]:
        """Shift s_i and Σ_j exp(logit_ij − s_i), each (..., n_q): kept from the first product for all later ones."""
        if self._normaliser is None:
            self.apply(self.xp.zeros((self.shape[-1], 1), dtype=self.dtype, device=device_of(self.q)))
        assert self._normaliser is not None  # noqa: S101 - for the type checker: the product has set it
        return self._normaliser

    def apply(self, x: Array) -> Array:
        if is_numpy(self.q, self.k, x):
            y, self._normaliser = stream_apply(self, x, self._normaliser)
            return y
        xp, known = self.xp, self._normaliser
        outputs, shifts, totals = [], [], []
        for start, stop in self._row_blocks():
            logits = self._logits(start, stop)
            first, last = self.visible_keys(start, stop)
            if known is None:
                weights, shift, total = _softmax_parts(logits)
                shifts.append(shift)
                totals.append(total)
            else:
                shift, total = (a[..., start:stop] for a in known)
                weights = xp.exp(logits - shift[..., None])
            outputs.append(matmul(weights, x[..., first:last, :]) / total[..., None])
        if known is None:
            self._normaliser = xp.concat(shifts, axis=-1), xp.concat(totals, axis=-1)
        return xp.concat(outputs, axis=-2)

    def apply_transpose(self, y: Array) -> Array:
        shift, total = self.normaliser
        if is_numpy(self.q, self.k, y):
            return stream_transpose(self, y, (shift, total))
        xp, parts = self.xp, []
        for start, stop in self._row_blocks():
            weights = xp.exp(self._logits(start, stop) - shift[..., start:stop, None])
            part = matmul(xp.matrix_transpose(weights), y[..., start:stop, :] / total[..., start:stop, None])
            parts.append(self._pad_keys(part, *self.visible_keys(start, stop)))
        return sum(parts[1:], parts[0])

    def rows(self, start: int, stop: int) -> Array:
        stop = min(stop, self.shape[-2])
        xp = self.xp
        weights, _, total = _softmax_parts(self._logits(start, stop))
        columns = self._pad_keys(xp.matrix_transpose(weights / total[..., None]), *self.visible_keys(start, stop))
        return xp.matrix_transpose(columns)

    def row_sums(self) -> Array:
        """Ones: the rows of a softmax sum to one."""
        return self.xp.ones(self.shape[:-1], dtype=self.dtype, device=device_of(self.q))

    # -- tiles -----------------------------------------------------------------------------------------------------

    def visible_keys(self, start: int, stop: int) -> tuple[int, int]:
        """First and one past the last key that any of the rows ``start:stop`` can see by causality and window."""
        n = self.shape[-1]
        first = 0 if self.window is None else max(0, start - self.window + 1)
        if self.causal:
            return first, min(n, stop)
        return first, n if self.window is None else min(n, stop + self.window - 1)

    def structure(self, start: int, stop: int, first: int, last: int) -> Array | None:
        """Which of the keys ``first:last`` the rows ``start:stop`` see by causality and window; None where all."""
        hidden_ahead = self.causal and last - 1 > start
        hidden_behind = self.window is not None and (
            stop - 1 - first >= self.window or (not self.causal and last - 1 - start >= self.window)
        )
        if not (hidden_ahead or hidden_behind):
            return None
        xp, device = self.xp, device_of(self.q)
        i = xp.arange(start, stop, device=device)[:, None]
        j = xp.arange(first, last, device=device)[None, :]
        keep = j <= i if self.causal else xp.ones((stop - start, last - first), dtype=xp.bool, device=device)
        if self.window is not None:
            keep = keep & (i - j < self.window) & (j - i < self.window)
        return keep

    def _row_blocks(self) -> list[tuple[int, int]]:
        n_q, n_k = self.shape[-2:]
        heads = 1
        for size in self.batch_shape:
            heads *= size
        block = max(1, _BLOCK_ENTRIES // (n_k * heads))
        return [(s, min(s + block, n_q)) for s in range(0, n_q, block)]

    def _logits(self, start: int, stop: int) -> Array:
        """Logits of some rows on the keys that they can see, −∞ on those that they cannot."""
        xp = self.xp
        first, last = self.visible_keys(start, stop)
        q = self.scale * self.q[..., start:stop, :]
        k = xp.matrix_transpose(self.k[..., first:last, :])
        keep = self.structure(start, stop, first, last)
        if self.key_mask is not None:
            mask = self.key_mask[..., None, first:last]
            keep = mask if keep is None else keep & mask
        logits = q @ k if keep is None else matmul_where(q, k, keep, -xp.inf)
        return logits if self.bias is None else logits + self.bias[..., start:stop, first:last]

    def _pad_keys(self, x: Array, first: int, last: int) -> Array:
        """``x`` on the keys ``first:last``, zeros on the others."""
        xp, n = self.xp, self.shape[-1]
        if (first, last) == (0, n):
            return x
        parts = [
            xp.zeros((*x.shape[:-2], size, x.shape[-1]), dtype=x.dtype, device=device_of(x))
            for size in (first, n - last)
        ]
        return xp.concat([parts[0], x, parts[1]], axis=-2)


def _softmax_parts(logits: Array) -> tuple[Array, Array, Array]:
    """exp(logits − row maximum), the row maxima, and the row sums."""
    xp = namespace(logits)
    top = xp.max(logits, axis=-1)
    weights = xp.exp(logits - top[..., None])
    return weights, top, xp.sum(weights, axis=-1)
