"""Low-rank products, their causal halves, and the division of rows by their sums."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, final

import numpy as np

from nla_llm.backend import Array, by_heads, device_of, eps, is_numpy, matmul, matmul_where, namespace
from nla_llm.operators._chunked import chunked_product, chunked_row_sums
from nla_llm.operators.base import Operator

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CausalLowRank", "LowRank", "RowNormalised", "Selection", "ZeroRowSumError"]


class LowRank(Operator):
    """left rightᵀ for left (..., n_q, r) and right (..., n_k, r).

    The one operator that is extended: what an engine for updates returns remembers what it approximates
    (:class:`nla_llm.methods.update.LowRankUpdate`).

    Examples
    --------
    >>> import numpy as np
    >>> op = LowRank(np.ones((3, 1)), np.ones((2, 1)))
    >>> op.dense().tolist()
    [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """

    def __init__(self, left: Array, right: Array, *, nonnegative: bool = False) -> None:
        super().__init__(_factored_shape(left, right), left)
        self.left = left
        self.right = right
        self.nonnegative = nonnegative

    @property
    def rank(self) -> int:
        """Number of columns of the factors, an upper bound of the rank."""
        return int(self.left.shape[-1])

    @property
    def T(self) -> Operator:  # noqa: N802
        """The factors exchanged."""
        return LowRank(self.right, self.left, nonnegative=self.nonnegative)

    def apply(self, x: Array) -> Array:
        return by_heads(_through, self.left, self.right, x)

    def apply_transpose(self, y: Array) -> Array:
        return by_heads(_through, self.right, self.left, y)

    def rows(self, start: int, stop: int) -> Array:
        left = self.left[..., start:stop, :]
        entries = left @ self.xp.matrix_transpose(self.right)
        return _without_negative_noise(entries, left, self.right) if self.nonnegative else entries

    def row_sums(self) -> Array:
        total = self.xp.sum(self.right, axis=-2)
        return (self.left @ total[..., None])[..., 0]

    def map(self, function: Callable[[Array], Array]) -> Operator:
        return LowRank(function(self.left), function(self.right), nonnegative=self.nonnegative)


@final
class CausalLowRank(Operator):
    """Lower triangle of left rightᵀ: entry (i, j) is left_i · right_j for j ≤ i and zero above the diagonal.

    One pass over chunks of c rows carries the state Σ right_jᵀ x_j (m × columns), so a product costs O(n (c + m)) per
    column and nothing n × n is formed (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 17–20; the chunked form is that
    of Hua et al. 2022, arXiv 2202.10447).

    Parameters
    ----------
    left, right
        Factors (..., n, m).
    decay
        Optional factors (..., ceil(n/c), m) that multiply the state on entering each chunk: entry (i, j) becomes
        Σ_r left_ir right_jr Π decay_r over the chunks after that of j up to that of i. Carries a running scale.
    chunk
        Rows in a chunk, c.
    """

    def __init__(
        self, left: Array, right: Array, *, decay: Array | None = None, chunk: int = 64, nonnegative: bool = False
    ) -> None:
        super().__init__(_factored_shape(left, right), left)
        if self.shape[-1] != self.shape[-2]:
            raise ValueError(f"a causal low-rank operator is square, got left {left.shape} and right {right.shape}")
        self.left = left
        self.right = right
        self.decay = decay
        self.chunk = min(chunk, self.shape[-1])
        self.nonnegative = nonnegative

    @property
    def rank(self) -> int:
        """Number of columns of the factors."""
        return int(self.left.shape[-1])

    def apply(self, x: Array) -> Array:
        if is_numpy(self.left, self.right, x):
            return chunked_product(self, x, transpose=False)
        xp = self.xp
        state, out = None, []
        for c, start, stop in self._chunks():
            left, right = self.left[..., start:stop, :], self.right[..., start:stop, :]
            block = x[..., start:stop, :]
            y = matmul(matmul_where(left, xp.matrix_transpose(right), self._lower(stop - start)), block)
            update = matmul(xp.matrix_transpose(right), block)
            if state is not None:
                if self.decay is not None:
                    state = self.decay[..., c, :, None] * state
                y = y + matmul(left, state)
                update = state + update
            state = update
            out.append(y)
        return xp.concat(out, axis=-2)

    def apply_transpose(self, y: Array) -> Array:
        if is_numpy(self.left, self.right, y):
            return chunked_product(self, y, transpose=True)
        xp = self.xp
        state, out = None, []
        for c, start, stop in reversed(self._chunks()):
            left, right = self.left[..., start:stop, :], self.right[..., start:stop, :]
            block = y[..., start:stop, :]
            weights = matmul_where(left, xp.matrix_transpose(right), self._lower(stop - start))
            x = matmul(xp.matrix_transpose(weights), block)
            update = matmul(xp.matrix_transpose(left), block)
            if state is not None:
                x = x + matmul(right, state)
                update = state + update
            state = update if self.decay is None else self.decay[..., c, :, None] * update
            out.append(x)
        return xp.concat(out[::-1], axis=-2)

    def rows(self, start: int, stop: int) -> Array:
        entries = super().rows(start, stop)
        left = self.left[..., start:stop, :]
        return _without_negative_noise(entries, left, self.right) if self.nonnegative else entries

    def row_sums(self) -> Array:
        if is_numpy(self.left, self.right):
            return chunked_row_sums(self)
        xp = self.xp
        state, sums = None, []
        for c, start, stop in self._chunks():
            left, right = self.left[..., start:stop, :], self.right[..., start:stop, :]
            seen = xp.cumulative_sum(right, axis=-2)
            if state is not None:
                seen = seen + (state if self.decay is None else self.decay[..., c : c + 1, :] * state)
            state = seen[..., -1:, :]
            sums.append(xp.sum(left * seen, axis=-1))
        return xp.concat(sums, axis=-1)

    def _chunks(self) -> list[tuple[int, int, int]]:
        n = self.shape[-1]
        return [(c, s, min(s + self.chunk, n)) for c, s in enumerate(range(0, n, self.chunk))]

    def _lower(self, size: int) -> Array:
        row = self.xp.arange(size, device=device_of(self.like))
        return row[:, None] >= row[None, :]

    @staticmethod
    def step(state: Array, left: Array, right: Array, x: Array) -> tuple[Array, Array]:
        """One row of decoding: the new state (..., m, c) and the new output row (..., 1, c).

        ``left`` and ``right`` are (..., 1, m), ``x`` is (..., 1, c); start from a state of zeros. The cost does not
        depend on how many rows came before.

        Examples
        --------
        >>> import numpy as np
        >>> left, right, x = np.random.default_rng(0).standard_normal((3, 5, 2))
        >>> state, rows = np.zeros((2, 2)), []
        >>> for i in range(5):
        ...     state, y = CausalLowRank.step(state, left[i : i + 1], right[i : i + 1], x[i : i + 1])
        ...     rows.append(y)
        >>> bool(np.allclose(np.concatenate(rows), CausalLowRank(left, right) @ x))
        True
        """
        xp = namespace(left)
        state = state + xp.matrix_transpose(right) @ x
        return state, left @ state


class ZeroRowSumError(FloatingPointError):
    """A row of an approximate kernel sums to zero, so it cannot be normalised."""


@final
class RowNormalised(Operator):
    """diag(A 1)⁻¹ A: the rows of the result sum to one.

    ``row_scale_log`` (..., n_q), where given, says that the kernel itself is diag(exp(row_scale_log)) A: a common
    factor of a row that cancels here and that would over- or underflow if it were multiplied out.

    Parameters
    ----------
    exponentials
        Where the factors of A contain exponentials: those of queries (..., n_q, m or 1) and of keys (..., n_k, m or 1),
        None for ones. They are read only when ``underflow_share`` is asked for.
    zeros
        Share of the exponentials of a token that are zero by construction.
    visible
        (..., n_k), True for keys that are not hidden; None where all are visible.

    Attributes
    ----------
    sums
        The row sums of A, (..., n_q).
    negative_share
        Share of rows with a negative sum (..., ): possible where features take both signs; reported, never clamped.
    underflow_share
        Share of features that are zero because their exponential underflowed (..., ).

    Raises
    ------
    ZeroRowSumError
        If a row sums to exactly zero or to a non-finite number.
    """

    def __init__(
        self,
        op: Operator,
        *,
        row_scale_log: Array | None = None,
        exponentials: tuple[Array | None, Array | None] = (None, None),
        zeros: float = 0.0,
        visible: Array | None = None,
    ) -> None:
        super().__init__(op.shape, op.like)
        self.op = op
        self.row_scale_log = row_scale_log
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused below
            self.sums = op.row_sums()
        self.nonnegative = op.nonnegative
        self._exponentials = exponentials
        self._zeros = zeros
        self._visible = visible
        xp = self.xp
        bad = ~(xp.isfinite(self.sums) & (self.sums != 0))
        if bool(xp.any(bad)):
            share = float(xp.mean(xp.astype(bad, self.dtype)))
            raise ZeroRowSumError(
                f"{share:.2%} of the rows have a sum that is zero or not finite, so they cannot be normalised: "
                "no key shares a feature with these queries, or the features overflowed; "
                f"pass another rng, a larger m, or a wider dtype than {self.dtype}"
            )

    @property
    def underflow_share(self) -> Array:
        """Share of the features of queries and visible keys whose exponential is exactly zero, for each batch entry.

        Their logarithms are finite: in exact arithmetic they would not vanish. Exponentials that are zero by
        construction do not count; a zero that an amplitude has brought into an array of the same shape does.

        What underflows is smaller than the largest of its row, or for keys than the largest of its feature, by more
        than the range of the format, about e^103 in float32 and e^745 in float64. Its loss does not show in the sums,
        but a share near one says that the kernel rests on a few features.
        """
        xp, (n_q, n_k), (of_queries, of_keys) = self.xp, self.shape[-2:], self._exponentials
        seen = xp.ones((n_k,), dtype=xp.float64, device=device_of(self.like))
        if self._visible is not None:
            seen = xp.astype(self._visible, xp.float64)
        lost = xp.zeros(self.batch_shape, dtype=xp.float64, device=device_of(self.like))
        if of_queries is not None:
            lost = lost + xp.sum(_zeros_of_rows(of_queries), axis=-1)
        if of_keys is not None:
            lost = lost + xp.sum(_zeros_of_rows(of_keys) * seen, axis=-1)
        return lost / (n_q + xp.sum(seen, axis=-1)) - self._zeros

    @property
    def negative_share(self) -> Array:
        """Share of rows whose sum is negative, one number for each batch entry."""
        return self.xp.mean(self.xp.astype(self.sums < 0, self.dtype), axis=-1)

    def apply(self, x: Array) -> Array:
        y = self.op.apply(x)
        y /= self.sums[..., None]  # in place: a product is a fresh array, as wide as its factors
        return y

    def apply_transpose(self, y: Array) -> Array:
        return self.op.apply_transpose(y / self.sums[..., None])

    def rows(self, start: int, stop: int) -> Array:
        return self.op.rows(start, stop) / self.sums[..., start:stop, None]


@final
class Selection(Operator):
    """Rows of the identity: ``op @ x`` picks the rows ``index`` (..., m) of x (..., n, c).

    Examples
    --------
    >>> import numpy as np
    >>> (Selection(np.array([2, 0]), 3, like=np.zeros(1)) @ np.array([10.0, 11.0, 12.0])).tolist()
    [12.0, 10.0]
    """

    nonnegative = True

    def __init__(self, index: Array, n: int, *, like: Array) -> None:
        super().__init__((*index.shape, n), like)
        self.index = index

    def gather(self, x: Array) -> Array:
        """The rows of x, whatever its dtype."""
        xp = self.xp
        if self.index.ndim == 1:
            return xp.take(x, self.index, axis=-2)
        n, c = x.shape[-2:]
        batch = np.broadcast_shapes(self.batch_shape, x.shape[:-2])
        own, device = x.shape[:-2], device_of(self.index)
        first = n * xp.reshape(xp.arange(prod(own), device=device), (*own, 1))  # row 0 of each matrix, all stacked
        index = xp.broadcast_to(self.index + first, (*batch, self.shape[-2]))
        rows = xp.take(xp.reshape(x, (-1, c)), xp.reshape(index, (-1,)), axis=0)  # whole rows move, not entries
        return xp.reshape(rows, (*batch, self.shape[-2], c))

    def apply(self, x: Array) -> Array:
        return self.gather(x)

    def apply_transpose(self, y: Array) -> Array:
        xp = self.xp
        keys = xp.arange(self.shape[-1], device=device_of(self.index))
        return xp.astype(keys[:, None] == self.index[..., None, :], y.dtype) @ y


def _zeros_of_rows(a: Array) -> Array:
    """Share of zeros in each row of a matrix."""
    xp = namespace(a)
    return xp.mean(xp.astype(a == 0, xp.float64), axis=-1)


def _without_negative_noise(entries: Array, left: Array, right: Array) -> Array:
    """Zero where a product left rightᵀ that is nowhere negative has come out below zero by the rounding of its sums.

    Factors that take both signs do that; what is further below zero than sums of their length can round stays.
    """
    xp = namespace(entries)
    if not bool(xp.any(entries < 0)):
        return entries
    most = xp.matrix_transpose(xp.sum(xp.abs(right), axis=-1, keepdims=True))
    noise = left.shape[-1] * eps(left) * xp.max(xp.abs(left), axis=-1, keepdims=True) * most
    return xp.where((entries < 0) & (entries >= -noise), xp.zeros_like(entries), entries)


def _through(near: Array, far: Array, x: Array) -> Array:
    """near farᵀ x, from the right."""
    return matmul(near, matmul(namespace(far).matrix_transpose(far), x))


def _factored_shape(left: Array, right: Array) -> tuple[int, ...]:
    if left.ndim < 2 or right.ndim < 2 or left.shape[-1] != right.shape[-1]:
        raise ValueError(
            f"left must be (..., n_q, r) and right (..., n_k, r) with the same r, got {left.shape} and {right.shape}"
        )
    return (*np.broadcast_shapes(left.shape[:-2], right.shape[:-2]), left.shape[-2], right.shape[-2])
