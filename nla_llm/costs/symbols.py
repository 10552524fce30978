"""The letters of the formulas, and their values for a problem and a method.

=========  ============================================================================
n          number of tokens, where queries and keys are as many (n_q, n_k where not); of calibration inputs of an update
d, d_v     dimension of queries and keys, and of values
m          directions, sampled keys or rank of an attention method (its field ``m``)
r          rank of an update (field ``rank``)
c          rows of a chunk (``chunk``), at most n
w          window, at most n
p          pairs of a query and a key that it sees, where a mask of keys makes them a property of the data
d_out      rows of an update
d_in       columns of an update
=========  ============================================================================

The symbols carry no assumptions, so ``expression.subs({"n": 4096})`` finds them by name.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import sympy

from nla_llm.backend import to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable

    from nla_llm.problems import AttentionProblem

__all__ = ["AttentionSizes", "size_function", "structural_pairs", "symbols_of", "values", "visible_pairs"]

n, n_q, n_k, d, d_v, m, r, c, w, p, d_out, d_in = sympy.symbols("n n_q n_k d d_v m r c w p d_out d_in")

_LETTERS = {"rank": r, "chunk": c}  # fields of methods whose letter is not their name


class AttentionSizes(NamedTuple):
    """Symbols of the sizes of an attention problem."""

    n_q: sympy.Symbol
    n_k: sympy.Symbol
    d: sympy.Symbol
    d_v: sympy.Symbol


def symbols_of(problem: AttentionProblem) -> AttentionSizes:
    """Symbols for (n_q, n_k, d, d_v): the same n twice where there are as many queries as keys.

    Raises
    ------
    TypeError
        If the problem is none of attention.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> tuple(symbols_of(AttentionProblem(np.zeros((4, 2)), np.zeros((4, 2)))))
    (n, n, d, d_v)
    """
    if not hasattr(problem, "n_q"):
        raise TypeError(f"the cost of attention is that of an AttentionProblem, got {type(problem).__name__}")
    return AttentionSizes(n, n, d, d_v) if problem.n_q == problem.n_k else AttentionSizes(n_q, n_k, d, d_v)


def visible_pairs(problem: AttentionProblem) -> sympy.Expr:
    """Number of (query, key) pairs that causality, window and mask leave; a bias hides none, however large.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> visible_pairs(AttentionProblem(np.zeros((4, 2)), np.zeros((4, 2)), causal=True))
    n*(n + 1)/2
    """
    return structural_pairs(problem) if problem.key_mask is None else p


def structural_pairs(problem: AttentionProblem) -> sympy.Expr:
    """Number of pairs that causality and window leave, those that a mask of keys hides among them."""
    sizes = symbols_of(problem)
    if problem.window is not None:
        return n * w - w * (w - 1) / 2 if problem.causal else n * (2 * w - 1) - w * (w - 1)
    return n * (n + 1) / 2 if problem.causal else sizes.n_q * sizes.n_k


def values(problem: Any, method: Any = None) -> dict[sympy.Symbol, int]:
    """Values of the symbols for a problem and, if given, the hyper-parameters of a method.

    The symbol of a hyper-parameter has the name of its field, but r for ``rank`` and c for ``chunk``, which may also be
    an attribute of the class. Masks are those of the first entry of the batch axes, since costs are per head.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> values(UpdateProblem(np.eye(3)))
    {d_out: 3, d_in: 3}
    """
    known = _hyperparameters(method)
    if hasattr(problem, "d_out"):
        samples = {} if problem.inputs is None else {n: int(problem.inputs.shape[-2])}
        return known | {d_out: problem.d_out, d_in: problem.d_in} | samples
    sizes = symbols_of(problem)
    known |= {sizes.n_q: problem.n_q, sizes.n_k: problem.n_k, d: problem.d, d_v: problem.d_v}
    if c in known:
        known[c] = min(known[c], problem.n_k)
    if problem.window is not None:
        known[w] = min(int(problem.window), problem.n_k)
    if problem.key_mask is not None:
        known[p] = _count_visible_pairs(problem)
    return known


def _hyperparameters(method: Any) -> dict[sympy.Symbol, int]:
    """The whole numbers among the fields of a method, and its chunk."""
    names = [f.name for f in fields(method)] if is_dataclass(method) else []
    named = {name: getattr(method, name, None) for name in (*names, "chunk")}
    whole = {name: x for name, x in named.items() if isinstance(x, int) and not isinstance(x, bool)}
    return {_LETTERS.get(name, sympy.Symbol(name)): x for name, x in whole.items()}


def _count_visible_pairs(problem: AttentionProblem) -> int:
    """Sum over the keys of the first mask of the number of queries that see them."""
    mask = to_numpy(problem.key_mask)
    key = np.flatnonzero(mask.reshape(-1, mask.shape[-1])[0])
    reach = problem.n_k if problem.window is None else int(problem.window)
    first = key if problem.causal else np.maximum(0, key - reach + 1)
    last = np.minimum(problem.n_q, key + reach)
    if problem.window is None and not problem.causal:
        return int(key.size * problem.n_q)
    return int(np.sum(last - first))


def size_function(name: str, evaluate: Callable[..., int], arguments: int = 3) -> Any:
    """A function of SymPy that evaluates where its arguments are whole numbers, for counts that have no formula.

    Examples
    --------
    >>> halvings = size_function("halvings", lambda size: size.bit_length() - 1, 1)
    >>> 2 * halvings(n), (2 * halvings(n)).subs(n, 20)
    (2*halvings(n), 8)
    """

    def number(*sizes: Any) -> int:
        return int(evaluate(*map(int, sizes)))

    def evaluated(cls: Any, *sizes: Any) -> Any:  # noqa: ARG001
        return sympy.Integer(number(*sizes)) if all(x.is_Integer for x in sizes) else None

    members = {"eval": classmethod(evaluated), "nargs": arguments, "_imp_": staticmethod(number)}  # _imp_: lambdify
    return type(name, (sympy.Function,), members)
