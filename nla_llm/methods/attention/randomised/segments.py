"""Means of segments of consecutive tokens, near which the linear forms of randomised attention draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nla_llm import costs
from nla_llm.backend import Array, device_of, namespace

if TYPE_CHECKING:
    from nla_llm.operators import Segments

Expr = Any  # an int or an expression of SymPy, which has no types

__all__ = [
    "segment_means",
    "segment_means_cost",
]


def segment_means(x: Array, segments: Segments, mask: Array | None = None) -> tuple[Array, Array]:
    """Means of the visible tokens of each segment (..., m, d), and how many these are (..., m).

    A segment without visible tokens takes the mean of all.
    """
    xp = namespace(x)
    keep = xp.asarray(segments.filled[:, None, :], device=device_of(x))
    if mask is not None:
        keep = keep & xp.matrix_transpose(segments.split(mask[..., None]))
    count = xp.sum(xp.astype(keep, xp.int64), axis=(-2, -1))
    size = xp.astype(xp.where(count > 0, count, 1), x.dtype)[..., None]
    sums = (xp.astype(keep, x.dtype) @ segments.split(x))[..., 0, :]
    if mask is None:
        return sums / size, count
    total = xp.astype(xp.sum(count, axis=-1), x.dtype)[..., None, None]
    overall = xp.sum(sums, axis=-2, keepdims=True) / total
    return xp.where((count > 0)[..., None], sums / size, overall), count


def segment_means_cost(n: Expr, d: Expr, m: Expr, *, slots: Expr | None = None, mask: bool = False) -> costs.Operations:
    """Sums over all slots of the segments, filled up or not, and the divisions."""
    f = costs.formulas
    sums = costs.Operations(madd=(f.segment_slots(n, m, m) if slots is None else slots) * d, div=m * d)
    return sums + f.sum_of(m, times=d) + costs.Operations(div=d) if mask else sums
