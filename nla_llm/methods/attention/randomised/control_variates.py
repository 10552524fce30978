"""Control variates for randomised attention: exact nearby, one direction for each group elsewhere."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from functools import reduce
from math import ceil
from typing import TYPE_CHECKING, ClassVar, NamedTuple, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, constant, device_of, exp_in_place, from_numpy, generator, matmul_where, namespace
from nla_llm.methods.attention.floors import block_rank_floor
from nla_llm.methods.attention.kernels.linear_attention import half_square_norm, half_square_norm_cost
from nla_llm.methods.attention.randomised.segments import (
    segment_means,
    segment_means_cost,
)
from nla_llm.methods.registry import Properties, register, require, settle, whole_number
from nla_llm.operators import Dense, Operator, Product, SegmentDiagonal, Segments, Sum

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["Eva"]


@register("eva")
@final
@dataclass(frozen=True)
class Eva:
    """Exact attention in the window of a query; any group c elsewhere as a whole, with the weight |c| exp(x·ȳ_c).

    EVA of Zheng, Yuan, Wang and Kong 2023, arXiv 2302.04542: randomised attention with a control variate for each of
    several groups of consecutive keys. Where the coefficient of a group is its own best one, the sum over the group
    becomes exact and the ω of the other groups drop out of it. What is left of a group outside the window is its
    total weight Σ_{j ∈ c} exp(x_i·y_j), approximated by the mean key ȳ_c, and the division of this weight among its
    keys, which is softmax_j(ω_c·y_j − |y_j|²/2) with ω_c ~ N(x̄_c + ȳ_c, I), x̄_c the mean of the queries of the same
    number.

    The groups are m segments. Where a window is shorter than a segment, its own segment cannot be a group as a whole:
    it is halved h times, h = ⌈lg(n/(w m))⌉, until the halves are no longer than a window, and the halves without the
    window are groups too. So no key is left out and none is counted twice, with m − 1 + h groups for each query. The
    halving is our own: the paper says that the keys outside the window are parted into groups, not how a group that
    the window cuts into is to be treated. The rest is the paper as we read it.

    Biased: the weight by Jensen's inequality, of second order in the spread of the keys of a group, the division of
    first order, as ω_c ought to lie near x_i + ȳ_c. With m = n_k it is softmax attention itself. The draw
    of ω_c adds a variance that no other draw averages: without it the error is smaller.

    Three things are otherwise in the authors' program: it leaves out the factor |c|, without which a group weighs as
    much as a single key; it counts the keys of the window twice, exactly and in groups; and it halves the mean of ω.

    Costs about 2 n (w + m + 3h)(d + d_v) operations with windows of w keys: linear in n but for h, which grows by one
    where n doubles. The causal form sees the earlier keys of its own window and the groups before it.

    Parameters
    ----------
    m
        Number of segments, at most n_q and n_k.
    window
        Largest number of keys w in a window, by default m. (There are never more windows than queries.) With a fixed
        one the error falls with m.
    sampled
        Draw the ω_c. With False they are at their means, as in the authors' program when it evaluates: nothing is
        random then.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.zeros((5, 2))
    >>> Eva(2)(AttentionProblem(q, q), rng=0).dense()[0, :2].tolist()
    [0.2, 0.2]
    """

    m: int
    _: KW_ONLY
    window: int | None = None
    sampled: bool = True
    properties: ClassVar[Properties] = Properties(
        family="randomised", budget="m", converges=True, nonnegative=True, deterministic=False, shift_invariant=True,
        permutation_equivariant=False, supports=frozenset({"causal", "key_mask"}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        if self.window is not None:
            whole_number("window", self.window)
        if not self.sampled:
            why = "segments are made of positions: hiding a key makes its own shorter, removing it moves all borders"
            promised = replace(type(self).properties, deterministic=True, exceptions={"padding": why})
            object.__setattr__(self, "properties", promised)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator: the own window exactly, the groups through one row for each."""
        require(self, problem)
        if self.m > min(problem.n_q, problem.n_k):
            raise ValueError(
                f"m={self.m} segments cannot be made of {problem.n_q} queries and {problem.n_k} keys; pass a smaller m"
            )
        (x, y), random = problem.scaled_inputs(), generator(rng) if self.sampled else None
        xp, norms = namespace(x), half_square_norm(y)
        windows, levels = self._parts(problem)
        logits, shares = [], []
        for level in levels:
            near_y, count = segment_means(y, level.columns, problem.key_mask)
            omega = segment_means(x, level.rows)[0] + near_y
            if random is not None:
                noise = random.standard_normal((level.columns.m, problem.d))
                omega = omega + xp.astype(from_numpy(noise, like=x), x.dtype)
            logits.append(level.logits(x, near_y, count, causal=problem.causal))
            shares.append(_shares((y, norms), omega, level.columns, _hidden_slots(problem, level.columns), count))
        own, others = _joint_softmax(_own_logits(problem, x, y, windows), xp.concat(logits, axis=-1), windows[0])
        terms: list[Operator] = [SegmentDiagonal(own, *windows, nonnegative=True)]
        first = 0
        for level, division in zip(levels, shares, strict=True):
            weights = level.operator(others[..., first : first + level.children])
            single = Segments(level.columns.m, level.columns.m)
            terms.append(Product(weights, SegmentDiagonal(division, single, level.columns, nonnegative=True)))
            first += level.children
        return reduce(Sum, terms)

    def _parts(self, problem: AttentionProblem) -> tuple[tuple[Segments, Segments], list[_Level]]:
        """Windows of queries and keys; the segments, and their halves level by level."""
        windows, halvings = self._counts(problem)
        if halvings == 0:
            rows, columns = (Segments(n, self.m, windows=windows) for n in (problem.n_q, problem.n_k))
            return (Segments(problem.n_q, windows), Segments(problem.n_k, windows)), [_Level(1, rows, columns)]
        leaves = Segments(problem.n_q, windows), Segments(problem.n_k, windows)
        levels = []
        for halving in range(halvings + 1):
            rows, columns = (leaf.merged(2 ** (halvings - halving)) for leaf in leaves)
            levels.append(_Level(rows.m // 2 if halving else 1, rows, columns))
        return leaves, levels

    def _counts(self, problem: AttentionProblem) -> tuple[int, int]:
        """Number of windows, and how often a segment is halved down to one."""
        windows = min(ceil(problem.n_k / (self.window or self.m)), problem.n_q)
        halvings = 0
        while self.m << halvings < windows and self.m << halvings + 1 <= min(problem.n_q, problem.n_k):
            halvings += 1
        return (windows if windows <= self.m else self.m << halvings), halvings

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of groups that are weighed as a whole: rank one for the queries outside their window, at any draw."""
        blocks = []
        for level in self._parts(problem)[1]:
            first = level.rows.number // level.children * level.children
            seen = level.seen(causal=problem.causal)
            for group in range(level.columns.m):
                child = group - first
                whole = (child >= 0) & (child < level.children)
                whole &= seen[np.arange(len(seen)), np.clip(child, 0, level.children - 1)]
                blocks.append((np.flatnonzero(whole), np.flatnonzero(level.columns.number == group)))
        return block_rank_floor(problem, blocks, 1, name="no group as a whole")

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Logits inside windows and with groups, their softmax; means, directions and shares level by level."""
        from sympy import Integer, Min, Symbol, ceiling  # noqa: PLC0415 - SymPy loads with the first formula

        n_q, n_k, d, d_v = costs.symbols_of(problem)
        m, f = costs.m, costs.formulas
        windows, halvings = self._counts(problem)
        w = m if self.window is None else Symbol("window")
        b = Min(ceiling(n_k / w), n_q) if windows < self.m else m * Integer(2) ** halvings
        pairs = f.pairs_inside_segments(n_q, n_k, b, causal=problem.causal)
        slots = f.segment_slots(n_q, b, b)
        parts = costs.Operations(mul=(n_q + n_k) * d) + half_square_norm_cost(n_k, d)
        for halving in range(halvings + 1):
            c = m * 2**halving
            outer = (b, m) if halvings == 0 else (b, b)
            for n, mask in ((n_q, False), (n_k, problem.key_mask is not None)):
                parts += segment_means_cost(n, d, c, slots=f.segment_slots(n, outer[1], outer[0]), mask=mask)
            parts += costs.Operations(exp=c, add=c * d) + costs.Operations(add=c * d, draw=c * d) * int(self.sampled)
            parts += costs.Operations(madd=n_k * d, add=3 * n_k - c, compare=n_k - c, exp=n_k, div=n_k)
        groups = m + 2 * halvings
        logits = costs.Operations(madd=(pairs + n_q * groups) * d, add=n_q * groups)
        softmax = costs.Operations(compare=pairs + n_q * groups - n_q, exp=pairs + n_q * groups)
        softmax += costs.Operations(add=2 * (pairs + n_q * groups) - n_q, div=pairs + n_q * groups)
        through = n_q * m + 2 * halvings * slots + n_k * (halvings + 1)
        products = costs.Operations(madd=(pairs + through) * d_v, add=n_q * d_v * (halvings + 1))
        return costs.Cost(prepare=parts + logits + softmax, apply=products)


class _Level(NamedTuple):
    """Groups of one size: ``parents`` parts of all tokens, each of as many; queries see those of their own."""

    parents: int
    rows: Segments
    columns: Segments

    @property
    def children(self) -> int:
        """Groups in a parent."""
        return self.rows.m // self.parents

    @property
    def outer(self) -> Segments:
        """The queries of the parents."""
        return Segments(self.rows.n, 1) if self.parents == 1 else self.rows.merged(self.children)

    def logits(self, x: Array, near_y: Array, count: Array, *, causal: bool) -> Array:
        """log(|c| exp(x·ȳ_c)) (..., n_q, children); −∞ in the own window, in later ones, and without visible keys."""
        xp, outer = namespace(x), self.outer
        shape = (self.parents, self.children)
        near_y = xp.reshape(near_y, (*near_y.shape[:-2], *shape, near_y.shape[-1]))
        count = xp.reshape(count, (*count.shape[:-1], *shape))[..., None, :]
        filled = np.repeat(outer.filled[..., None], self.children, axis=-1)
        filled = xp.asarray(filled, device=device_of(x))
        logits = matmul_where(outer.split(x), xp.matrix_transpose(near_y), filled, -xp.inf)
        logits = logits + xp.log(xp.astype(xp.where(count > 0, count, 1), logits.dtype))
        seen = outer.split(xp.asarray(self.seen(causal=causal), device=device_of(x))) & (count > 0)
        return outer.join(xp.where(seen, logits, constant(-xp.inf, like=logits)))

    def seen(self, *, causal: bool) -> NDArray[np.bool_]:
        """Which children of their parent queries see, (n_q, children)."""
        own = self.rows.window[self.rows.number][:, None]
        first = self.rows.number[:, None] // self.children * self.children
        child = self.rows.window[first + np.arange(self.children)]
        seen: NDArray[np.bool_] = child < own if causal else child != own
        return seen

    def operator(self, weights: Array) -> Operator:
        """The weights (..., n_q, children) as an operator on groups."""
        xp, outer = namespace(weights), self.outer
        if self.parents == 1:
            return Dense(weights, nonnegative=True)
        filled = xp.asarray(outer.filled[..., None], device=device_of(weights))
        blocks = xp.where(filled, outer.split(weights), constant(0.0, like=weights))
        return SegmentDiagonal(blocks, outer, Segments(self.columns.m, self.parents), nonnegative=True)


def _own_logits(problem: AttentionProblem, x: Array, y: Array, windows: tuple[Segments, Segments]) -> Array:
    """Logits of the keys of its own window, (..., B, rows.size, columns.size), −∞ for keys that it does not see."""
    xp, (rows, columns) = namespace(x), windows
    hidden = _hidden_slots(problem, columns)
    keep = rows.filled[:, :, None] & columns.filled[:, None, :]
    if problem.causal:
        keep = keep & (columns.slots[:, None, :] <= rows.slots[:, :, None])
    seen = xp.asarray(keep, device=device_of(x))
    logits = matmul_where(rows.split(x), xp.matrix_transpose(columns.split(y)), seen, -xp.inf)
    return logits if hidden is None else xp.where(hidden & seen, constant(-xp.inf, like=logits), logits)


def _joint_softmax(own: Array, others: Array, rows: Segments) -> tuple[Array, Array]:
    """Weights of both kinds of logits, which sum to one together."""
    xp = namespace(own)

    def joined(a: Array) -> Array:
        return rows.join(a[..., None])[..., 0]

    def split(a: Array) -> Array:
        return rows.split(a[..., None])

    top = xp.maximum(joined(xp.max(own, axis=-1)), xp.max(others, axis=-1))
    own -= split(top)  # in place from here on: both are fresh arrays
    others -= top[..., None]
    own, others = exp_in_place(own), exp_in_place(others)
    total = joined(xp.sum(own, axis=-1)) + xp.sum(others, axis=-1)
    own /= split(total)
    others /= total[..., None]
    return own, others


def _shares(keys: tuple[Array, Array], omega: Array, columns: Segments, hidden: Array | None, count: Array) -> Array:
    """softmax_j(ω_c·y_j − |y_j|²/2) over the visible keys of each group (..., m, 1, columns.size), from y and ½|y|²."""
    (y, norms), xp = keys, namespace(omega)
    filled = xp.asarray(columns.filled[:, None, :], device=device_of(y))
    split = columns.split(y)
    logits = matmul_where(omega[..., None, :], xp.matrix_transpose(split), filled, -xp.inf)
    logits = logits - xp.matrix_transpose(columns.split(norms))
    if hidden is not None:  # a segment without visible keys has no weight, whatever its shares
        logits = xp.where(hidden & filled & (count > 0)[..., None, None], constant(-xp.inf, like=logits), logits)
    shares = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    return shares / xp.sum(shares, axis=-1, keepdims=True)


def _hidden_slots(problem: AttentionProblem, columns: Segments) -> Array | None:
    """Which slots of a segment hold hidden keys, (..., m, 1, size)."""
    if problem.key_mask is None:
        return None
    return ~problem.xp.matrix_transpose(columns.split(problem.key_mask[..., None]))
