"""H-Transformer-1D: the near field exact, the far field between means of ever more tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, device_of, namespace, to_numpy
from nla_llm.methods.attention.hierarchical.boxes import (
    PROMISES,
    Level,
    boxes_of,
    known,
    near_counts,
    near_field,
)
from nla_llm.methods.attention.sparse.tiles import enough_keys, rescaled, tile_softmax, to_tiles
from nla_llm.methods.registry import Properties, register, require, settle, whole_number
from nla_llm.operators import (
    Diagonal,
    Grouped,
    Panel,
    Product,
    RowNormalised,
    Sum,
    TiledSparse,
)
from nla_llm.operators.hierarchy import box_places

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["HTransformer"]


@register("h_transformer")
@final
@dataclass(frozen=True)
class HTransformer:
    """Kernel exp(logits) on neighbouring blocks of m tokens; farther away exp(q̄·k̄) of the means of 2, 4, 8, … tokens.

    Zhu and Soricut 2021, arXiv 2107.11906: H-Transformer-1D. Two blocks of m 2^l tokens that are no neighbours, but
    whose parents are, meet in groups of 2^(l+1) tokens: with the means q̄ and k̄ of two groups the kernel is the constant
    exp(scale q̄·k̄) for all pairs of them, so values are summed up over groups. About n m entries for each level, O(n m)
    together. Where m is odd the last group of a block has 2^l tokens. Groups at the end, and groups with hidden keys,
    are means over the tokens that they really have.

    Rows sum to one, entries are nonnegative, and with m >= n/2 it is softmax. What a block is wrong by before
    normalisation is bounded by :func:`nla_llm.theory.hierarchical.block_constant_error`. In the causal form a group of
    queries averages over later queries of the same group too, as published; keys and values are earlier ones always.

    Parameters
    ----------
    m
        Tokens of a block of the near field, the paper's N_r; at most n_k.

    Examples
    --------
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.repeat(np.random.default_rng(0).standard_normal((4, 3)), 16, axis=0)  # 4 runs of 16 equal tokens
    >>> problem = AttentionProblem(q, q)
    >>> bool(abs((HTransformer(8)(problem) - problem.exact()).dense()).max() < 1e-12)
    True
    """

    m: int
    properties: ClassVar[Properties] = replace(PROMISES, nonnegative=True)

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of class RowNormalised over the sum of near tiles and of one coarse matrix for each level."""
        require(self, problem)
        enough_keys(self.m, problem)
        xp, q = problem.xp, problem.scale * problem.q
        boxes = boxes_of(problem.n_q, problem.n_k, self.m, 1, problem.causal)
        panels, top = near_field(q, problem.k, problem.key_mask, boxes)
        coarse = [_Coarse.of(problem, q, level, self.m) for level in boxes.levels]
        scale = top
        for part in coarse:
            scale = xp.maximum(scale, part.top)
        shape = (*np.broadcast_shapes(problem.batch_shape, scale.shape[:-1]), problem.n_q, problem.n_k)
        op: Operator = TiledSparse(rescaled(panels, xp.exp(top - scale)), shape, nonnegative=True)
        for part in coarse:
            rows = Product(Diagonal(xp.exp(part.top - scale)), part.rows.T)
            op = Sum(op, Product(rows, Product(part.kernel, part.columns)))
        return RowNormalised(op, row_scale_log=scale)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Bound of the Frobenius error from the spread of the tokens within their groups."""
        from nla_llm.theory.hierarchical import block_constant_theory, coarse_logit_error  # noqa: PLC0415 - SciPy

        q, k = (to_numpy(problem.xp.astype(z, problem.xp.float64)) for z in (problem.scale * problem.q, problem.k))
        mask = None if problem.key_mask is None else to_numpy(problem.key_mask)
        exact, n_q = problem.exact(), problem.n_q
        blocks = (to_numpy(exact.rows(s, s + 256)) for s in range(0, n_q, 256))
        norms = np.concatenate([np.linalg.norm(rows, axis=-1) for rows in blocks], axis=-1)
        delta = np.zeros(norms.shape)
        for level in boxes_of(n_q, problem.n_k, self.m, 1, problem.causal).levels:
            rows, columns = (_bounds(n, level.size, self.m) for n in (n_q, problem.n_k))
            delta = np.maximum(delta, coarse_logit_error(q, k, rows, columns, mask))
        return block_constant_theory(norms, delta, exact.shape)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Near pairs; on each level means of tokens and pairs of groups; sums over groups and their products."""
        n_q, n_k, d, d_v = costs.symbols_of(problem)
        f = {name: _coarse_sum(name, problem.causal)(n_q, n_k, costs.m) for name in _Counts._fields}
        count, near, far = costs.Operations, f["near"], f["far"]
        softmax = count(madd=d, compare=1, add=1, exp=1) * (near + far)
        tops = count(compare=f["near_rows"] + f["far_rows"] + 2 * f["levels"] * n_q)
        means = count(add=f["sums"] * d, div=f["groups"] * d)
        scales = count(add=1, exp=1) * (n_q * (f["levels"] + 1)) + count(mul=near)

        def product(width: Any) -> costs.Operations:
            values: costs.Operations = count(madd=near + far, add=f["key_sums"] + f["added"], mul=f["expanded"]) * width
            return values

        prepare = count(mul=n_q * d) + softmax + tops + means + scales + product(1) + count(compare=2 * n_q)
        prepare += count(madd=-1, add=1) * f["alone"] + count(add=-1) * f["alone_rows"]  # summed up, not multiplied
        return costs.Cost(prepare=prepare, apply=product(d_v) + count(div=n_q * d_v))


class _Coarse(NamedTuple):
    """A level: sums over groups of keys, the kernel of the means, its largest logits token by token, groups of rows."""

    rows: Grouped
    columns: Grouped
    kernel: TiledSparse
    top: Array

    @classmethod
    def of(cls, problem: AttentionProblem, q: Array, level: Level, m: int) -> _Coarse:
        """Means of the tokens, their logits, and the exponentials below the largest of each row."""
        xp, device, plan = problem.xp, device_of(q), _Plan.of(problem.n_q, problem.n_k, level, m)
        rows = Grouped(plan.rows, like=q)
        columns = Grouped(plan.columns, like=q, mask=problem.key_mask)
        mean_q, mean_k = (_means(op, x) for op, x in ((rows, q), (columns, problem.k)))
        mask = None if problem.key_mask is None else columns.sizes > 0
        keys, seen = (xp.asarray(a, device=device) for a in (plan.keys, plan.seen))
        nothing = xp.zeros((1, 1, 1), dtype=xp.bool, device=device)
        weights, top = tile_softmax(to_tiles(mean_q, plan.seen.shape[-2]), mean_k, keys, seen, mask, repeated=nothing)
        batch = weights.shape[:-3]
        kernel = TiledSparse([Panel(weights, keys)], (*batch, rows.shape[-2], columns.shape[-2]), nonnegative=True)
        top = xp.reshape(known(top), (*top.shape[:-2], -1))
        return cls(rows, columns, kernel, xp.take(top, xp.asarray(rows.number, device=device), axis=-1))


class _Plan(NamedTuple):
    """Groups of a level, and which groups of keys (T, s) the groups of a box of queries see, (T, b, s)."""

    rows: NDArray[np.int64]
    columns: NDArray[np.int64]
    keys: NDArray[np.int64]
    seen: NDArray[np.bool_]

    @classmethod
    def of(cls, n_q: int, n_k: int, level: Level, m: int) -> _Plan:
        """⌈m/2⌉ groups of a box; the last boxes may have empty ones."""
        per_box = -(-m // 2)
        rows, columns = (_bounds(n, level.size, m) for n in (n_q, n_k))
        pair = box_places(level.rows, -(-n_q // level.size)).T  # (T, most boxes of keys)
        box = np.append(level.columns, -1)[pair]
        keys = np.repeat(box, per_box, axis=-1) * per_box + np.tile(np.arange(per_box), box.shape[-1])
        there = np.repeat(box >= 0, per_box, axis=-1)
        keys = np.where(there, keys, 0)
        there &= (np.diff(columns) > 0)[keys]
        full = (np.diff(rows) > 0).reshape(-1, per_box)
        return cls(rows, columns, keys, full[:, :, None] & there[:, None, :])


def _bounds(n: int, size: int, m: int) -> NDArray[np.int64]:
    """Borders of the groups of 2 size/m tokens in boxes of ``size`` tokens."""
    starts = np.minimum(np.arange(-(-m // 2)) * (2 * size // m), size)
    firsts = np.arange(-(-n // size))[:, None] * size + starts
    return np.asarray(np.minimum(np.append(firsts.reshape(-1), n), n))


def _means(groups: Grouped, x: Array) -> Array:
    xp, sizes = namespace(x), groups.sizes
    return (groups @ x) / xp.astype(xp.where(sizes > 0, sizes, xp.ones_like(sizes)), x.dtype)[..., None]


class _Counts(NamedTuple):
    """What the cost of a coarse hierarchy is made of, summed up over the levels."""

    levels: int
    near: int  # pairs of tokens
    near_rows: int  # twice those that have any
    far: int  # pairs of groups
    far_rows: int  # groups of queries that see any, twice those that have any are compared
    sums: int  # additions for the means of queries and keys
    key_sums: int
    groups: int
    expanded: int  # rows that get something from a level
    added: int
    alone: int  # pairs of tokens where there are no coarse levels
    alone_rows: int


@lru_cache(maxsize=256)
def _coarse_counts(n_q: int, n_k: int, m: int, causal: bool) -> _Counts:
    boxes = boxes_of(n_q, n_k, m, 1, causal)
    near, alive = near_counts(boxes)
    total = dict.fromkeys(_Counts._fields, 0) | {"near": near, "near_rows": int(alive.sum())}
    for level in boxes.levels:
        plan = _Plan.of(n_q, n_k, level, m)
        any_row = plan.seen.any(axis=-1).reshape(-1)
        here = np.repeat(any_row, np.diff(plan.rows))
        sums = [(len(b) - 1) * (max(1, int(np.diff(b).max())) - 1) for b in (plan.rows, plan.columns)]
        total["levels"] += 1
        total["far"] += int(plan.seen.sum())
        total["far_rows"] += int(any_row.sum())
        total["sums"] += sum(sums)
        total["key_sums"] += sums[1]
        total["groups"] += len(plan.rows) + len(plan.columns) - 2
        total["expanded"] += int(here.sum())
        total["added"] += int((here & alive).sum())
        alive = alive | here
    if not boxes.levels:
        total |= {"alone": near, "alone_rows": total["near_rows"]}
    return _Counts(**total)


@cache
def _coarse_sum(name: str, causal: bool) -> Any:
    """One of the counts as a function of SymPy."""

    def evaluate(n_q: int, n_k: int, m: int) -> int:
        return int(getattr(_coarse_counts(n_q, n_k, m, causal), name))

    return costs.symbols.size_function(f"h_transformer_{name}", evaluate)
