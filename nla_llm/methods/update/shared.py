"""What the engines share: the operator that they work on, checks, batches one matrix at a time, results, costs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from nla_llm import costs
from nla_llm.backend import Array, device_of, generator, namespace
from nla_llm.linalg import singular_values, working
from nla_llm.methods.update.result import LowRankUpdate
from nla_llm.operators import Dense, Operator

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from nla_llm.linalg import SVD
    from nla_llm.problems import UpdateProblem

__all__ = [
    "by_matrix",
    "check_rank",
    "filled_up",
    "from_svd",
    "order",
    "scaled_left_cost",
    "spectrum_of",
    "working_operator",
]


def working_operator(problem: UpdateProblem) -> Operator:
    """The update in its own precision; an array of half precision in float32, since no library decomposes in less."""
    return problem.delta if isinstance(problem.delta, Operator) else Dense(working(problem.delta))


def check_rank(rank: int, problem: UpdateProblem) -> None:
    """Refuse a rank above the dimensions of the update."""
    if rank > min(problem.d_out, problem.d_in):
        raise ValueError(f"rank={rank} exceeds the dimensions of the update, {problem.d_out} x {problem.d_in}")


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
