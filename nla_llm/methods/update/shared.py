"""What the methods share: checks before and after, the operator that engines work on, batches, results, costs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from nla_llm import costs
from nla_llm.arithmetic import untallied
from nla_llm.backend import Array, device_of, generator, is_linalg_error, namespace
from nla_llm.linalg import in_range, singular_values, working
from nla_llm.methods.registry import describe, require
from nla_llm.methods.update.result import LowRankUpdate
from nla_llm.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Callable

    from nla_llm.linalg import SVD
    from nla_llm.problems import UpdateProblem

__all__ = [
    "by_matrix",
    "check_rank",
    "checked",
    "equivariant",
    "filled_up",
    "formed",
    "from_svd",
    "order",
    "scaled_left_cost",
    "spectrum_of",
    "working_operator",
]


Call = TypeVar("Call", bound="Callable[..., Any]")


def checked(call: Call) -> Call:
    """Decorator of ``__call__``: the problem fits the method, and what comes out is finite, or a sentence says why not.

    Arrays of a problem are finite. Operators are not looked at beforehand, and products may overflow: NaN then shows in
    the result, or a library finds no decomposition.
    """

    @wraps(call)
    def checked_call(self: Any, problem: UpdateProblem, rng: Any = None) -> Operator:
        require(self, problem)
        why: Exception | None = None
        with np.errstate(all="ignore"):  # what has overflowed shows in the result
            try:
                op: Operator = call(self, problem, rng)
            except Exception as error:
                if not is_linalg_error(error):
                    raise
                why = error
        if why is not None or not _is_finite(op):
            raise ValueError(
                f"{describe(self)['method']} met numbers that are not finite in {problem.like.dtype}: delta, base or "
                "inputs are operators that hold NaN or infinity, or products with them overflow; pass finite ones, "
                "scaled down, or problem.astype(xp.float64)"
            ) from why
        return op

    return checked_call  # type: ignore[return-value]


def equivariant(call: Call) -> Call:
    """:func:`checked`, for a method of which B(c ΔW) = c B(ΔW): a matrix whose squares overflow is scaled beforehand.

    By powers of two, so nothing else changes. An operator is taken as it is.
    """

    @checked
    @wraps(call)
    def scaled_call(self: Any, problem: UpdateProblem, rng: Any = None) -> Operator:
        delta, back = (problem.delta, None) if isinstance(problem.delta, Operator) else in_range(problem.delta)
        if back is None:
            found: Operator = call(self, problem, rng)
            return found
        op = call(self, replace(problem, delta=delta), rng)
        return LowRankUpdate(op.left * problem.xp.astype(back, op.left.dtype), op.right, of=problem.operator)

    return scaled_call  # type: ignore[return-value]


def _is_finite(op: Operator) -> bool:
    """Whether every array that ``op`` holds is."""
    seen: list[bool] = []

    def look(a: Array) -> Array:
        seen.append(bool(op.xp.all(op.xp.isfinite(a))))
        return a

    with untallied():
        op.map(look)
    return all(seen)


def formed(name: str, a: Array | Operator) -> Array:
    """A matrix, formed where it is an operator, in a precision that libraries decompose in.

    Raises
    ------
    ValueError
        If it is not finite there.
    """
    with np.errstate(all="ignore"):
        matrix = working(a.dense() if isinstance(a, Operator) else a)
    xp = namespace(matrix)
    with untallied():
        finite = bool(xp.all(xp.isfinite(matrix)))
    if not finite:
        raise ValueError(
            f"{name} has entries that are NaN, infinite or beyond {matrix.dtype}; pass finite ones, or a wider dtype"
        )
    return matrix


def working_operator(problem: UpdateProblem) -> Operator:
    """The update in its own precision; an array of half precision in float32, since no library decomposes in less."""
    return problem.delta if isinstance(problem.delta, Operator) else Dense(working(problem.delta))


def check_rank(rank: int, problem: UpdateProblem) -> None:
    """Refuse a rank above the dimensions of the update."""
    if rank > min(problem.d_out, problem.d_in):
        raise ValueError(
            f"rank={rank} exceeds the dimensions of the update, {problem.d_out} x {problem.d_in}; pass at most "
            f"rank={min(problem.d_out, problem.d_in)}"
        )


def from_svd(svd: SVD, problem: UpdateProblem) -> LowRankUpdate:
    """``left`` = U Σ and ``right`` = V."""
    return LowRankUpdate(svd.left * svd.values[..., None, :], svd.right, of=problem.operator)


def by_matrix(
    op: Operator,
    rng: int | np.random.Generator | None,
    run: Callable[[Operator, np.random.Generator], tuple[Array, ...]],
) -> tuple[Array, ...]:
    """``run`` on each matrix of a batch with a generator of its own, the results stacked: none depends on another.

    For algorithms that stop when they see fit. Results of fewer columns are filled up with zeros.
    """
    rng, xp, batch = generator(rng), op.xp, op.batch_shape
    if not batch:
        return run(op, rng)
    flat = op.map(lambda a: xp.reshape(xp.broadcast_to(a, (*batch, *a.shape[-2:])), (-1, *a.shape[-2:])))
    number = int(flat.shape[0])
    results = [run(flat.map(partial(_entry, index=i)), own) for i, own in enumerate(rng.spawn(number))]
    stacked = []
    for parts in zip(*results, strict=True):
        width = max(int(part.shape[-1]) for part in parts)
        whole = xp.stack([filled_up(part, width) for part in parts])
        stacked.append(xp.reshape(whole, (*batch, *whole.shape[1:])))
    return tuple(stacked)


def _entry(a: Array, index: int) -> Array:
    return a[index, ...]


def filled_up(a: Array, columns: int) -> Array:
    """The first columns of ``a``, filled up by zeros where there are fewer."""
    xp, have = namespace(a), int(a.shape[-1])
    if have >= columns:
        return a[..., :columns]
    return xp.concat([a, xp.zeros((*a.shape[:-1], columns - have), dtype=a.dtype, device=device_of(a))], axis=-1)


def spectrum_of(problem: UpdateProblem) -> np.ndarray[Any, Any]:
    """All singular values of the update, for theory: what a promise is made of costs more than the engine."""
    return singular_values(problem.exact())


def scaled_left_cost() -> costs.Cost:
    """Left factor times singular values; applying the product of rank r to one input."""
    d_out, d_in, r = costs.d_out, costs.d_in, costs.r
    return costs.Cost(
        prepare=costs.Operations(mul=d_out * r), apply=costs.formulas.LowRankShape(d_out, d_in, r).apply(1)
    )


def order() -> Any:
    """The smaller dimension of the update."""
    import sympy  # noqa: PLC0415 - loaded by the first formula only

    return sympy.Min(costs.d_out, costs.d_in)
