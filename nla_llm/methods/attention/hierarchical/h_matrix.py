"""Hierarchical attention: the near field exact, the far field by low-rank blocks."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, constant, decomposable, device_of, namespace, to_numpy
from nla_llm.methods.attention.floors import block_rank_floor
from nla_llm.methods.attention.hierarchical.boxes import (
    PROMISES,
    boxes_of,
    near_counts,
    near_field,
)
from nla_llm.methods.attention.hierarchical.cross_approximation import (
    cross_approximation,
    cross_approximation_cost,
    references_of,
    take_blocks,
)
from nla_llm.methods.attention.sparse.tiles import enough_keys, rescaled
from nla_llm.methods.registry import Properties, one_of, register, require, settle, whole_number
from nla_llm.operators import (
    BlockLowRank,
    Permutation,
    Product,
    RowNormalised,
    Sum,
    TiledSparse,
)
from nla_llm.operators.hierarchy import box_places, from_blocks

if TYPE_CHECKING:
    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["HMatrix"]


@register("h_matrix")
@final
@dataclass(frozen=True)
class HMatrix:
    """Kernel exp(logits) as a hierarchical matrix: leaves exact, far blocks by m crosses, then division by row sums.

    Hackbusch 1999 (Computing 62) for the blocks, Bebendorf 2000 (Numer. Math. 86) for the crosses. Leaves are boxes of
    2 m tokens, far blocks pairs of boxes of 2 m 2^l tokens. With ``admissibility="weak"`` all pairs of siblings are far
    (the HODLR format); with "strong" pairs of neighbours are not, so neighbouring leaves are exact and each block is at
    least as far from the diagonal as it is long, for about three times the entries. Far blocks are found by
    :func:`~nla_llm.methods.attention.hierarchical.cross_approximation.cross_approximation`: exact where a block
    has rank m. The rank is fixed, so that costs do not depend on the data; ``ranks`` of the operator's far
    blocks says how much of it was needed. O(n m log(n/m)) entries, O(n m (d + m) log(n/m)) operations.

    With m >= n/2 everything is a leaf and it is softmax. Entries of a truncated cross approximation, and even row sums,
    may be negative; they are counted, never clamped. Row scales carry logarithms, so sharp logits neither over- nor
    underflow; shifting all logits of a row changes nothing. In the causal form all far blocks lie below the diagonal: a
    row depends on earlier keys alone, but through the choice of pivots on later queries of its block. There the near
    field, which later keys are part of, has no say in that choice, and errors of local heads are a few times larger.

    Parameters
    ----------
    m
        Crosses of a far block; leaves have 2 m tokens. At most n_k.
    admissibility
        'weak' or 'strong'.
    order
        'tokens', or 'projection': queries and keys each in the order of their products with the leading principal
        direction of the visible keys (8 steps of power iteration), so that boxes are intervals of that projection.

    Examples
    --------
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.linspace(-1, 1, 200)[:, None]
    >>> problem = AttentionProblem(q, q)
    >>> bool(abs((HMatrix(8)(problem) - problem.exact()).dense()).max() < 1e-12)
    True
    """

    m: int
    _: KW_ONLY
    admissibility: str = "weak"
    order: str = "tokens"
    properties: ClassVar[Properties] = replace(PROMISES, shift_invariant=True)

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        one_of("admissibility", self.admissibility, ("weak", "strong"))
        one_of("order", self.order, ("tokens", "projection"))
        if self.order == "projection":
            why = "in the order of a projection the keys of a block are not earlier than its queries"
            promised = replace(
                type(self).properties, permutation_equivariant=True, supports=frozenset({"key_mask"}),
                refusals={**PROMISES.refusals, "causal": why},
            )  # fmt: skip
            object.__setattr__(self, "properties", promised)

    @property
    def _reach(self) -> int:
        return int(self.admissibility == "strong")

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of class RowNormalised over leaves and far blocks, between permutations where tokens are sorted."""
        require(self, problem)
        enough_keys(self.m, problem)
        q = problem.scale * problem.q
        if self.order == "tokens":
            op, scale = self._hierarchy(q, problem.k, problem.key_mask, causal=problem.causal)
            return RowNormalised(op, row_scale_log=scale)
        queries, keys = _projection_order(problem, q)
        there, back = Permutation(keys, like=problem.k), Permutation(queries, like=q)
        mask = problem.key_mask
        if mask is not None:
            mask = there.there.gather(mask[..., None])[..., 0]
        op, scale = self._hierarchy(back @ q, there @ problem.k, mask, causal=False)
        sorted_back = Product(Product(back.T, op), there)
        return RowNormalised(sorted_back, row_scale_log=(back.T @ scale[..., None])[..., 0])

    def _hierarchy(self, q: Array, k: Array, mask: Array | None, *, causal: bool) -> tuple[Operator, Array]:
        """The kernel of scaled queries and keys with its row scales, (..., n_q)."""
        xp, n_q = namespace(q), q.shape[-2]
        boxes = boxes_of(n_q, k.shape[-2], 2 * self.m, self._reach, causal)
        panels, top = near_field(q, k, mask, boxes)
        # the near field of a later row knows later keys, which must not reach earlier rows through the choice of pivots
        seen = xp.full_like(top, -xp.inf) if causal else top
        far = [cross_approximation(q, k, mask, seen[..., None], level=level, m=self.m) for level in boxes.levels]
        scale = top
        for level, blocks in zip(boxes.levels, far, strict=True):
            places = box_places(level.rows, -(-n_q // level.size))
            for part in from_blocks(blocks.scale[..., None], places, n_q, -np.inf):
                scale = xp.maximum(scale, part[..., 0])
        scale = xp.where(scale > -xp.inf, scale, xp.zeros_like(scale))  # a row with nothing is refused by its sum
        shape = (*scale.shape[:-1], n_q, k.shape[-2])
        op: Operator = TiledSparse(rescaled(panels, xp.exp(top - scale)), shape)
        for level, blocks in zip(boxes.levels, far, strict=True):
            left = blocks.left
            left *= xp.exp(blocks.scale - take_blocks(scale[..., None], level.rows, level.size)[..., 0])[..., None, :]
            op = Sum(op, BlockLowRank(left, blocks.right, level.rows, level.columns, shape, pivots=blocks.pivots))
        return op, scale

    def theory(self, problem: AttentionProblem) -> Theory | None:
        """Floor of far blocks of rank m, which the division of the rows leaves as they are; None with several orders.

        Crosses come near it where singular values of the blocks fall fast; no bound of their error with partial pivots
        is known that is not exponential in m.
        """
        boxes = boxes_of(problem.n_q, problem.n_k, 2 * self.m, self._reach, problem.causal)
        queries, keys = np.arange(problem.n_q), np.arange(problem.n_k)
        if self.order == "projection":
            if problem.batch_shape or (problem.key_mask is not None and problem.key_mask.ndim > 1):
                return None  # every head has an order of its own
            queries, keys = (to_numpy(order) for order in _projection_order(problem, problem.scale * problem.q))
        blocks = [
            (queries[i * level.size : (i + 1) * level.size], keys[j * level.size : (j + 1) * level.size])
            for level in boxes.levels
            for i, j in zip(level.rows, level.columns, strict=True)
        ]
        return block_rank_floor(problem, blocks, self.m)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Leaves; m crosses of each far block; their products."""
        n_q, n_k, d, d_v = costs.symbols_of(problem)
        m, count = costs.m, costs.Operations
        f = {name: _block_sum(name, self._reach, problem.causal)(n_q, n_k, m) for name in _BlockCounts._fields}
        near = count(madd=d, compare=1, add=1, exp=1, mul=1) * f["near"] + count(compare=f["near_rows"])
        far = cross_approximation_cost(f["slots"], f["blocks"], f["references"], d)
        scales = count(add=1, exp=1) * (n_q + f["slots"]) + count(compare=(f["most"] + 1) * n_q, mul=f["slots"] * m)

        def product(width: Any) -> costs.Operations:
            added = f["added"] + (f["most"] - f["levels"]) * n_q
            return count(madd=(f["near"] + 2 * f["slots"] * m) * width, add=added * width)

        prepare = count(mul=n_q * d) + near + far + scales + product(1) + count(compare=2 * n_q)
        if self.order == "projection":
            prepare += _projection_cost(n_q, n_k, d)
        else:  # leaves alone are summed up, not multiplied with ones
            prepare += count(madd=-1, add=1) * f["alone"] + count(add=-1) * f["alone_rows"]
        return costs.Cost(prepare=prepare, apply=product(d_v) + count(div=n_q * d_v))


class _BlockCounts(NamedTuple):
    """What the cost of a hierarchical matrix is made of."""

    near: int  # pairs of tokens
    near_rows: int  # queries that have any
    levels: int
    blocks: int
    slots: int  # rows of all blocks
    references: int  # entries of their reference columns
    most: int  # far blocks in a row of boxes, at most, summed up over the levels
    added: int  # rows that meet what has been summed up before
    alone: int  # pairs of tokens where there are no far blocks
    alone_rows: int


@lru_cache(maxsize=256)
def _block_counts(n_q: int, n_k: int, m: int, reach: int, causal: bool) -> _BlockCounts:
    boxes = boxes_of(n_q, n_k, 2 * m, reach, causal)
    near, alive = near_counts(boxes)
    levels, rows = boxes.levels, int(alive.sum())
    return _BlockCounts(
        near=near,
        near_rows=rows,
        levels=len(levels),
        blocks=sum(len(level.rows) for level in levels),
        slots=sum(len(level.rows) * level.size for level in levels),
        references=sum(len(level.rows) * level.size * references_of(level) for level in levels),
        most=sum(int(np.bincount(level.rows).max()) for level in levels),
        added=rows + (len(levels) - 1) * n_q if levels else 0,
        alone=0 if levels else near,
        alone_rows=0 if levels else rows,
    )


@cache
def _block_sum(name: str, reach: int, causal: bool) -> Any:
    """One of the counts as a function of SymPy."""

    def evaluate(n_q: int, n_k: int, m: int) -> int:
        return int(getattr(_block_counts(n_q, n_k, m, reach, causal), name))

    return costs.symbols.size_function(f"h_matrix_{name}", evaluate)


# -- the order of a projection -------------------------------------------------------------------------------------

_POWER_STEPS = 8


def _projection_order(problem: AttentionProblem, q: Array) -> tuple[Array, Array]:
    """Orders of the scaled queries (..., n_q) and of the keys (..., n_k), hidden keys last."""
    xp, k, mask, device = problem.xp, problem.k, problem.key_mask, device_of(problem.k)
    shown = xp.ones((problem.n_k,), dtype=xp.bool, device=device) if mask is None else mask
    direction = xp.astype(_principal_direction(decomposable(k), shown), k.dtype, copy=False)
    along = (k @ direction)[..., 0]
    along = xp.where(shown, along, constant(xp.inf, like=k))
    return xp.argsort((q @ direction)[..., 0], axis=-1), xp.argsort(along, axis=-1)


def _principal_direction(k: Array, shown: Array) -> Array:
    """Direction (..., d, 1) in which the shown keys vary most, by the power method; its largest entry is one."""
    xp = namespace(k)
    t = xp.matrix_transpose
    count = xp.astype(xp.sum(xp.astype(shown, xp.int64), axis=-1), k.dtype)[..., None, None]
    mean = (xp.astype(shown, k.dtype)[..., None, :] @ xp.where(shown[..., None], k, xp.zeros_like(k))) / count
    centred = xp.where(shown[..., None], k - mean, constant(0.0, like=k))
    centred = _over_largest(centred, (-2, -1))
    covariance = t(centred) @ centred
    largest = xp.argmax(xp.linalg.diagonal(covariance), axis=-1, keepdims=True)[..., None]
    largest = xp.broadcast_to(largest, (*covariance.shape[:-1], 1))
    direction = _over_largest(xp.take_along_axis(covariance, largest, axis=-1), -2)
    for _ in range(_POWER_STEPS):
        direction = _over_largest(covariance @ direction, -2)
    return direction


def _over_largest(a: Array, axis: int | tuple[int, ...]) -> Array:
    """``a`` over its largest entry along an axis or two, zeros as they are."""
    xp = namespace(a)
    size = xp.max(xp.abs(a), axis=axis, keepdims=True)
    return a / xp.where(size > 0, size, xp.ones_like(size))


def _projection_cost(n_q: Any, n_k: Any, d: Any) -> costs.Operations:
    count, f = costs.Operations, costs.formulas
    covariance = count(madd=n_k * d, div=d, add=n_k * d) + f.matmul(d, n_k, d) + f.maximum_of(d)
    covariance += f.maximum_of(n_k * d) + count(compare=1, div=n_k * d)
    unit = f.maximum_of(d) + count(compare=1, div=d)
    step = f.matmul(d, d, 1) + unit
    sorting = count(madd=(n_q + n_k) * d) + f.merge_sort(n_q) + f.merge_sort(n_k)
    total: costs.Operations = covariance + unit + _POWER_STEPS * step + sorting
    return total
