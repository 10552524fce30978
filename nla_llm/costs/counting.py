"""Counting: the same code run on arrays that tally what is done to them."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.arithmetic import CountingGenerator, Tally, counted, tally
from nla_llm.backend import generator, to_numpy
from nla_llm.costs.cost import Cost, Operations

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem

__all__ = ["UncountedWorkError", "count", "count_exact"]


class UncountedWorkError(RuntimeError):
    """A method handed arrays to plain NumPy, where its operations cannot be seen: the count would be too low."""


def count(
    method: Callable[[Any, Any], Operator], problem: Any, rng: int | np.random.Generator = 0, *, partial: bool = False
) -> Cost:
    """Operations that ``method`` really does on ``problem``: its own code, run on counted arrays.

    Parameters
    ----------
    method
        Anything that makes an operator of (problem, rng).
    problem
        Attention or update problem. One head is run, the first entry of the batch axes.
    rng
        For methods that draw; the count does not depend on it.
    partial
        Give the count even where part of the work went to plain NumPy unseen.

    Returns
    -------
    Cost of ints
        ``prepare``: making the operator; ``apply``: its product with v (with ones (n_k, d_v) where the problem has no
        v; for an update, with one input vector).

    Raises
    ------
    UncountedWorkError
        If the method converted counted arrays to NumPy, and not ``partial``.

    Examples
    --------
    >>> import nla_llm as nl
    >>> problem = nl.AttentionProblem(np.zeros((10, 2)), np.zeros((10, 2)), np.zeros((10, 3)))
    >>> count(nl.method("uniform"), problem).apply
    Operations(madd=60, add=0, mul=0, div=30, exp=0, sqrt=0, compare=0, draw=0)
    """
    head = _one_head(problem)
    x = _right_hand_side(head)
    with tally() as preparing:
        operator = method(head.map(counted), CountingGenerator(generator(rng)))
    with tally() as applying:
        operator @ counted(x)
    escaped = preparing.escaped + applying.escaped
    if escaped and not partial:
        name = getattr(method, "name", type(method).__name__)
        raise UncountedWorkError(
            f"{name} handed {escaped} array entries to plain NumPy, where operations cannot be counted; write it with "
            "xp = nla_llm.backend.namespace(...), or pass partial=True for a lower bound"
        )
    return Cost(_operations(preparing), _operations(applying))


def count_exact(problem: AttentionProblem) -> Cost:
    """Operations of exact attention on one head: one product with v, nothing prepared.

    Examples
    --------
    >>> from nla_llm.problems import AttentionProblem
    >>> problem = AttentionProblem(np.zeros((10, 2)), np.zeros((10, 2)), causal=True)
    >>> count_exact(problem).apply.madd == 55 * (2 + 2)
    True
    """
    return count(lambda counted_problem, _: counted_problem.exact(), problem)


def _operations(t: Tally) -> Operations:
    return Operations(**{f.name: getattr(t, f.name) for f in fields(Operations)})


def _one_head(problem: Any) -> Any:
    """The problem of the first entry of the batch axes, as NumPy arrays."""
    problem = problem.map(to_numpy)
    first = (0,) * len(problem.batch_shape)
    if not first:
        return problem
    return problem.head(first) if hasattr(problem, "head") else problem.map(lambda a: a[first] if a.ndim > 2 else a)


def _right_hand_side(head: Any) -> NDArray[Any]:
    if hasattr(head, "d_in"):
        return np.ones((head.d_in, 1), head.delta.dtype)
    if head.v is None:
        return np.ones((head.n_k, head.d_v), head.q.dtype)
    v: NDArray[Any] = head.v[(0,) * (head.v.ndim - 2)]
    return v
