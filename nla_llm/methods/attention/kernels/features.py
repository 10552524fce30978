"""Features of queries and keys, with their logarithmic scale carried apart."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, by_heads, constant, namespace

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Features", "MadeByRows", "half_square_norm", "half_square_norm_cost"]


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

    def whole(self) -> Features:
        """Themselves: all rows are there."""
        return self

    def hide(self, mask: Array | None) -> Features:
        """The same with the rows of hidden tokens zero."""
        if mask is None:
            return self
        xp = namespace(mask)
        keep = mask[..., None]

        def blank(a: Array | None, fill: float) -> Array | None:
            return None if a is None else xp.where(keep, a, constant(fill, like=a))

        return replace(
            self, amplitude=blank(self.amplitude, 0.0), log=blank(self.log, -xp.inf), row=blank(self.row, -xp.inf)
        )

    def times(self, exponential: Array | None, *, overwrite: bool = False) -> Array:
        """amplitude · exponential, where None stands for ones; an exponential of this shape is overwritten.

        With ``overwrite`` the amplitude is, where the exponential is a number for each token.
        """
        if exponential is None or self.amplitude is None:
            return self.amplitude if exponential is None else exponential
        if exponential.shape == self.amplitude.shape:
            exponential *= self.amplitude
            return exponential
        if overwrite and np.broadcast_shapes(self.amplitude.shape, exponential.shape) == self.amplitude.shape:
            return by_heads(operator.imul, self.amplitude, exponential, overwrite=True)
        return by_heads(operator.mul, self.amplitude, exponential)


@dataclass(frozen=True, eq=False)
class MadeByRows:
    """Features that are made for some rows at a time, where all their parts would take several times the memory.

    On NumPy the factors of the kernel are then held, and beside them the parts of a block of rows; those of the keys
    are made twice, first for their scale. Other libraries and counted arrays make all rows at once.

    Attributes
    ----------
    shape
        (..., n, m) of the features.
    make
        Function (start, stop) → :class:`Features` of these rows: a ``log`` (..., stop − start, m) that may be
        overwritten, and no ``column``.
    zeros
        As for features.
    """

    shape: tuple[int, ...]
    make: Callable[[int, int], Features]
    zeros: float = 0.0

    def hide(self, mask: Array | None) -> MadeByRows:
        """The same with the rows of hidden tokens zero."""
        if mask is None:
            return self

        def hidden(start: int, stop: int) -> Features:
            return self.make(start, stop).hide(mask[..., start:stop])

        batch = np.broadcast_shapes(self.shape[:-2], mask.shape[:-1])
        return replace(self, shape=(*batch, *self.shape[-2:]), make=hidden)

    def whole(self) -> Features:
        """All rows."""
        return self.make(0, self.shape[-2])


def half_square_norm(x: Array) -> Array:
    """½|x|² of every token, (..., n, 1): what turns exp(ω·x) into a feature of the softmax kernel."""
    return 0.5 * namespace(x).sum(x * x, axis=-1, keepdims=True)


def half_square_norm_cost(tokens: Any, d: Any) -> costs.Operations:
    """Cost of :func:`half_square_norm`."""
    norms: costs.Operations = tokens * (costs.Operations(mul=d + 1) + costs.formulas.sum_of(d))
    return norms
