"""Strided sparse attention: every s-th key from the query on, and the nearest of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from nla_llm import costs
from nla_llm.methods.attention.sparse.patterns import promises, restriction_promise
from nla_llm.methods.attention.sparse.tiles import (
    TILE,
    Support,
    enough_keys,
    merged_softmax,
    merged_softmax_cost,
    row_groups,
)
from nla_llm.methods.attention.sparse.windows import places, range_support, row_tile
from nla_llm.methods.registry import Properties, register, require, settle, whole_number

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

    Whole = NDArray[np.int64]

__all__ = ["StridedAttention"]


@register("strided_attention")
@final
@dataclass(frozen=True)
class StridedAttention:
    """Softmax over every s-th key, counted from the query, and the nearest of the others, until there are m.

    The strided pattern of Child, Gray, Radford and Sutskever 2019 (arXiv 1904.10509, section 4.3), its two parts
    A⁽¹⁾ (the latest keys) and A⁽²⁾ = {j : (i − j) mod s = 0} merged in one head, one of the ways published; not their
    fixed pattern, in which all queries share the s-th keys. Of the distances i − j >= 0 the causal form has the
    ⌈n/s⌉ multiples of s and the m − ⌈n/s⌉ least of the others: m keys for the last query, fewer for those before.
    Without causality distances go both ways, and each query sees m keys, its window moved inwards at the ends.

    Queries whose distance is a multiple of s share the s-th keys, so that both parts are tiles; the two softmaxes are
    merged.

    Parameters
    ----------
    m
        Keys that a query sees, at most n_k.
    stride
        s >= 2, such that ⌈n_k/s⌉ <= m. By default ⌈n_k/⌈m/2⌉⌉, half of the keys for either part: with m = 2√n the
        published s = √n.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.zeros((6, 1))
    >>> (StridedAttention(4)(AttentionProblem(q, q, causal=True)).dense() > 0).astype(int)[3:].tolist()
    [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    """

    m: int
    stride: int | None = None
    properties: ClassVar[Properties] = promises()

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        if self.stride is not None:
            whole_number("stride", self.stride, at_least=2)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of class RowNormalised over the tiles of both parts."""
        del rng
        require(self, problem)
        enough_keys(self.m, problem)
        n, m, s = problem.n_k, self.m, self.stride or max(2, -(-problem.n_k // -(-self.m // 2)))
        if -(-n // s) > m:
            raise ValueError(f"stride={s} leaves {-(-n // s)} of {n} keys, more than m={m}; pass a larger stride or m")
        return merged_softmax(problem, [_alike(problem, s), _nearest_others(problem, m, s)])

    def theory(self, problem: AttentionProblem) -> Theory:
        """Error in the Frobenius norm from the mass that each row keeps, exactly."""
        return restriction_promise(self, problem)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Logits, softmax and a product over the pairs of both parts, and what it takes to merge these."""
        n_q, *_ = costs.symbols_of(problem)
        return merged_softmax_cost(problem, self.pairs(problem), n_q + self._windows(problem))

    def _windows(self, problem: AttentionProblem) -> Any:
        """Queries whose window is not empty: all, but for the first of the causal form; with m = ⌈n_k/s⌉ a few."""
        from sympy import Max, Min, Mod, floor  # noqa: PLC0415 - SymPy loads with the first formula

        n_q, n_k, *_ = costs.symbols_of(problem)
        s = self._stride(problem)
        wide = Min(1, costs.m - self._multiples(problem))
        if problem.causal:
            return wide * (n_q - 1)
        lacking, queries = Mod(-n_k, s), Min(n_q, n_k)  # rests that have a key less, the last ones
        few = floor(queries / s) * lacking + Max(0, Mod(queries, s) - s + lacking)
        return wide * n_q + (1 - wide) * few

    def _stride(self, problem: AttentionProblem) -> Any:
        from sympy import Max, Symbol, ceiling  # noqa: PLC0415 - SymPy loads with the first formula

        n_k = costs.symbols_of(problem).n_k
        return Max(2, ceiling(n_k / ceiling(costs.m / 2))) if self.stride is None else Symbol("stride")

    def _multiples(self, problem: AttentionProblem) -> Any:
        from sympy import ceiling  # noqa: PLC0415 - SymPy loads with the first formula

        return ceiling(costs.symbols_of(problem).n_k / self._stride(problem))

    def pairs(self, problem: AttentionProblem) -> Any:
        """m for each query; in the causal form less the distances, each as often as its keys are missing."""
        from sympy import floor  # noqa: PLC0415 - SymPy loads with the first formula

        n_q, *_ = costs.symbols_of(problem)
        m = costs.m
        if not problem.causal:
            return n_q * m
        s, multiples = self._stride(problem), self._multiples(problem)
        others, period = m - multiples, s - 1
        full = floor(others / period)
        missing = s * multiples * (multiples - 1) / 2
        missing += others * (others + 1) / 2 + period * full * (full - 1) / 2 + full * (others - full * period)
        return n_q * m - missing


def _alike(problem: AttentionProblem, s: int) -> tuple[Whole, list[Support]]:
    """Tiles of queries of the same rest modulo s, those of equal height one after the other, and their keys."""
    place = places(problem)
    rest = place % s
    by_rest = np.argsort(rest, kind="stable")
    classes = np.split(by_rest, np.flatnonzero(np.diff(rest[by_rest])) + 1)
    tiles = [tile for queries in classes for tile in np.array_split(queries, -(-len(queries) // TILE))]
    order, supports, first = [], [], 0
    for tall in sorted({len(tile) for tile in tiles}, reverse=True):
        queries = np.stack([tile for tile in tiles if len(tile) == tall])
        keys = rest[queries[:, :1]] + s * np.arange(-(-problem.n_k // s))
        seen = np.broadcast_to((keys < problem.n_k)[:, None, :], (*queries.shape, keys.shape[1]))
        if problem.causal:
            seen = seen & (keys[:, None, :] <= place[queries][..., None])
        supports.append(Support(first, np.minimum(keys, problem.n_k - 1), seen))
        order.append(queries.reshape(-1))
        first += queries.size
    return np.concatenate(order), supports


def _nearest_others(problem: AttentionProblem, m: int, s: int) -> tuple[Whole, list[Support]]:
    """Windows without the keys that lie a multiple of s away, so wide that a query sees m keys in all.

    In the causal form that is the last query; those before it see as far back as it does.
    """
    n, place = problem.n_k, places(problem)
    if problem.causal:
        near = m - -(-n // s) - 1  # the last one, counted from nought; −1 where there is none
        first, last = np.maximum(place - (1 + near + near // (s - 1)), 0), place + (near >= 0)
    else:
        rest = place % s
        others = m + (rest - n) // s  # less the keys of the same rest
        number = np.clip(place - place // s - others // 2, 0, n - m)  # of the first one, among the other keys
        first, last = number + 1 + (number - rest) // (s - 1), number + others
        last += (last - 1 - rest) // (s - 1) + 1
        last = np.where(others > 0, last, first)
    supports = []
    width = max(1, int((last - first).max()))
    for start, tiles, tall in row_groups(0, problem.n_q, tile=row_tile(width)):
        rows = slice(start, start + tiles * tall)
        at, low, high = (a[rows].reshape(tiles, tall) for a in (place, first, last))
        window = range_support(problem, start, low, np.maximum(high, low + 1))
        keys = low.min(axis=1)[:, None, None] + np.arange(window.keys.shape[1])
        seen = window.seen & (keys < high[..., None]) & ((keys - at[..., None]) % s != 0)
        supports.append(Support(start, window.keys, seen))
    return np.arange(problem.n_q), supports
