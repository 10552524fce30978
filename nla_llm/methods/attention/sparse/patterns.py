"""Sparse attention with patterns that are fixed in advance: windows, blocks, global tokens, random keys.

A query sees m keys by their places, whatever they hold, and softmax runs over these alone. What a row of P loses is
known: in total variation the mass that is left out (:mod:`nla_llm.theory.sparse`).

Query i stands at key i, or at the last one where there are fewer keys. Near the ends a window does not shrink but
stays inside the sequence, before the hidden keys at its end, so that every query sees m keys, and all of them at
m = n_k; the causal form sees min(i + 1, m).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import generator
from nla_llm.methods.attention.floors import few_entries_floor
from nla_llm.methods.attention.sparse.tiles import (
    TILE,
    Support,
    enough_keys,
    restricted_softmax,
    restricted_softmax_cost,
    row_groups,
)
from nla_llm.methods.attention.sparse.windows import (
    global_queries,
    places,
    range_support,
    window_supports,
)
from nla_llm.methods.registry import Properties, register, require, settle, whole_number

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory


__all__ = ["BigBird", "BlockSparse", "FixedPattern", "Longformer", "SlidingWindow", "promises", "restriction_promise"]

_WINDOW_REFUSED = "the pattern says itself which keys are near, and its budget counts them"
_MASK_REFUSED = (
    "a query all of whose keys are hidden would be left without any; patterns with a global token have a form"
)
_BIAS_REFUSED = "a bias is an n × n array, of which a sparse method would read every entry that it gathers"


def promises(*, key_mask: bool = False, deterministic: bool = True) -> Properties:
    """What patterns of places promise."""
    refusals = {} if key_mask else {"key_mask": _MASK_REFUSED}
    return Properties(
        family="pattern", budget="m", converges=True, nonnegative=True, deterministic=deterministic,
        shift_invariant=True, permutation_equivariant=False, partial=key_mask,
        supports=frozenset({"causal", "key_mask"} if key_mask else {"causal"}),
        refusals=refusals | {"window": _WINDOW_REFUSED, "bias": _BIAS_REFUSED},
    )  # fmt: skip


@dataclass(frozen=True)
class FixedPattern(ABC):
    """What the patterns share: keys are chosen by their places, softmax runs over them.

    Parameters
    ----------
    m
        Keys that a query sees, at most n_k.
    """

    m: int
    properties: ClassVar[Properties]

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of class RowNormalised over tiles."""
        require(self, problem)
        enough_keys(self.m, problem)
        return restricted_softmax(problem, self.supports(problem, rng))

    @abstractmethod
    def supports(self, problem: AttentionProblem, rng: int | np.random.Generator | None) -> list[Support]:
        """Which keys each block of queries sees."""

    @abstractmethod
    def pairs(self, problem: AttentionProblem) -> Any:
        """Number of pairs of a query and a key that it sees, as a formula."""

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Logits, softmax and a product over the pairs of the pattern; keys hidden by a mask are not spared."""
        return restricted_softmax_cost(problem, self.pairs(problem))


class _Deterministic(FixedPattern):
    """A pattern without randomness, whose error is known in closed form."""

    def theory(self, problem: AttentionProblem) -> Theory:
        """Error in the Frobenius norm from the mass that each row keeps, exactly."""
        return restriction_promise(self, problem)


def restriction_promise(method: Any, problem: AttentionProblem) -> Theory:
    """The closed form of the error of a method that restricts softmax to the keys on which its operator is positive."""
    from nla_llm.backend import to_numpy  # noqa: PLC0415 - with the theory, where it is asked for
    from nla_llm.theory.sparse import restriction_theory  # noqa: PLC0415 - SciPy loads there

    exact, op = problem.exact(), method(problem.astype(problem.xp.float64))

    def rows(start: int, stop: int) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        return to_numpy(exact.rows(start, stop)), to_numpy(op.rows(start, stop)) > 0

    return restriction_theory(rows, exact.shape)


@register("sliding_window")
@final
@dataclass(frozen=True)
class SlidingWindow(_Deterministic):
    """Softmax over the m nearest keys; in the causal form over the last m, the token itself included.

    The local attention of Child et al. 2019 (arXiv 1904.10509) and Beltagy et al. 2020 (arXiv 2004.05150, section 3.1)
    without global tokens. Query i sees the keys from i − ⌊m/2⌋ on, the window moved inwards at the ends.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.zeros((4, 1))
    >>> SlidingWindow(2)(AttentionProblem(q, q, causal=True)).dense().tolist()
    [[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """

    properties: ClassVar[Properties] = promises()

    def supports(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> list[Support]:
        """Windows of m keys."""
        del rng
        return window_supports(problem, width=self.m)

    def pairs(self, problem: AttentionProblem) -> Any:
        """m for each query; fewer for the first ones of the causal form."""
        return _full_rows(problem)


@register("longformer")
@final
@dataclass(frozen=True)
class Longformer(_Deterministic):
    """Softmax over g global keys and the m − g nearest of the others; global queries see all keys.

    Beltagy et al. 2020, arXiv 2004.05150, section 3.1. The global tokens are the first g. Their queries see everything,
    as published, at n_k keys each, beside the budget; in the causal form they see what comes before them. A mask that
    hides the global keys and all of a window is refused with :class:`~nla_llm.operators.ZeroRowSumError`; in the causal
    form that cannot happen, since the first query sees the first key alone.

    Parameters
    ----------
    m
        Keys that a query sees, the global ones included.
    globals
        Global tokens, g <= m.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.zeros((4, 1))
    >>> (Longformer(2)(AttentionProblem(q, q)).dense() > 0).astype(int).tolist()
    [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]
    """

    globals: int = 1
    properties: ClassVar[Properties] = promises(key_mask=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_globals(self.globals, self.m)

    def supports(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> list[Support]:
        """Rows of global queries, then windows beside global keys."""
        del rng
        return window_supports(problem, width=self.m - self.globals, g=self.globals)

    def pairs(self, problem: AttentionProblem) -> Any:
        """m for each query, n for the global ones."""
        return _full_rows(problem, self.globals)


@register("bigbird")
@final
@dataclass(frozen=True)
class BigBird(FixedPattern):
    """Softmax over g global keys, r = ⌊(m − g)/2⌋ random ones and the m − g − r nearest of the others.

    Zaheer et al. 2020, arXiv 2007.14062, section 2, where window and random keys are as many as here. A block of 64
    queries shares its random keys, drawn without replacement from those that are neither global nor in a window of
    the block; where these are fewer than r (at the beginning of the causal form, and where m is near n) the window is
    wider by r instead. So every query sees m keys, in the causal form min(i + 1, m). Global tokens are as in
    :class:`Longformer`.

    Parameters
    ----------
    m
        Keys that a query sees.
    globals
        Global tokens, g <= m.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.zeros((200, 1))
    >>> (BigBird(9)(AttentionProblem(q, q), rng=0).dense() > 0).sum(axis=1).tolist() == [200] + 199 * [9]
    True
    """

    globals: int = 1
    properties: ClassVar[Properties] = promises(key_mask=True, deterministic=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_globals(self.globals, self.m)

    def supports(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> list[Support]:
        """Rows of global queries, then windows beside global and random keys."""
        random = (self.m - self.globals) // 2
        return window_supports(
            problem, width=self.m - self.globals - random, g=self.globals, random=random, rng=generator(rng)
        )

    def pairs(self, problem: AttentionProblem) -> Any:
        """m for each query, n for the global ones."""
        return _full_rows(problem, self.globals)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of m keys a query, the global ones apart; which of them are drawn is not known before."""
        everything = np.arange(problem.n_q) < global_queries(problem, self.globals)
        return few_entries_floor(problem, np.where(everything, problem.n_k, self.m))

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """The draws, r for each block of 64 queries; then as the other patterns."""
        from sympy import ceiling, floor  # noqa: PLC0415 - SymPy loads with the first formula

        rows = costs.symbols_of(problem).n_q - global_queries(problem, self.globals)
        draws = costs.Operations(draw=ceiling(rows / TILE) * floor((costs.m - self.globals) / 2))
        return costs.Cost(prepare=draws) + super().cost(problem)


@register("block_sparse")
@final
@dataclass(frozen=True)
class BlockSparse(_Deterministic):
    """Softmax within blocks of m keys: the sequence is cut, and a query sees the block in which it stands.

    One permutation, the identity, of the blockwise attention of Qiu et al. 2019 (arXiv 1911.02972, section 3). The last
    block is moved inwards so that it holds m keys as well; in the causal form a query sees its block up to itself.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.zeros((3, 1))
    >>> BlockSparse(2)(AttentionProblem(q, q)).dense().tolist()
    [[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]
    """

    properties: ClassVar[Properties] = promises()

    def supports(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> list[Support]:
        """Blocks of m keys, and tiles that do not cross them where queries are as many as keys."""
        del rng
        place = places(problem)
        first = place // self.m * self.m
        if problem.causal:
            last = place + 1
        else:
            first = np.minimum(first, problem.n_k - self.m)
            last = first + self.m
        supports = []
        for start, tiles, tall in row_groups(0, problem.n_q, tile=min(self.m, 4 * TILE)):
            part = slice(start, start + tiles * tall)
            supports.append(range_support(problem, start, *(a[part].reshape(tiles, tall) for a in (first, last))))
        return supports

    def pairs(self, problem: AttentionProblem) -> Any:
        """m for each query; in the causal form the triangles of the blocks."""
        from sympy import Mod  # noqa: PLC0415 - SymPy loads with the first formula

        n, m = costs.symbols_of(problem).n_q, costs.m
        rest = Mod(n, m)
        return (n * (m + 1) - rest * (m - rest)) / 2 if problem.causal else n * m


def _full_rows(problem: AttentionProblem, globals_: int = 0) -> Any:
    n_q, n_k, *_ = costs.symbols_of(problem)
    m = costs.m
    if problem.causal:
        return n_q * m - m * (m - 1) / 2
    g = global_queries(problem, globals_)
    return (n_q - g) * m + g * n_k


def _check_globals(globals_: int, m: int) -> None:
    whole_number("globals", globals_)
    if globals_ > m:
        raise ValueError(f"globals={globals_} tokens do not fit into m={m} keys a query; pass globals <= m")
