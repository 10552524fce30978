"""What promises need of the exact matrix, and the floors that structure alone gives to any matrix of its kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import to_numpy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory
    from nla_llm.theory.bound import Matrix
    from nla_llm.theory.floors import Block

__all__ = ["block_rank_floor", "few_columns_floor", "few_entries_floor", "rank_floor", "squared_norm"]


def rank_floor(problem: AttentionProblem, rank: int) -> Theory:
    """Of an operator of a rank; in the causal form of the lower triangle of one, by its blocks below the diagonal."""
    from nla_llm.theory import floors  # noqa: PLC0415 - SciPy loads there

    if problem.causal:
        return block_rank_floor(problem, floors.blocks_below_diagonal(problem.n_k), rank)
    exact = problem.exact()
    return floors.rank_floor_theory(lambda: _entries(problem), rank, exact.shape)


def block_rank_floor(problem: AttentionProblem, blocks: Sequence[Block], rank: int, *, name: str = "") -> Theory:
    """Of an operator whose blocks, which do not overlap, have a rank."""
    from nla_llm.theory.floors import block_rank_floor_theory  # noqa: PLC0415 - SciPy loads there

    return block_rank_floor_theory(lambda: _entries(problem), blocks, rank, problem.exact().shape, name=name)


def few_entries_floor(problem: AttentionProblem, kept: ArrayLike) -> Theory:
    """Of an operator with so many entries in a row, (n_q,)."""
    from nla_llm.theory.floors import few_entries_floor_theory  # noqa: PLC0415 - SciPy loads there

    return few_entries_floor_theory(lambda: _entries(problem), kept, problem.exact().shape)


def few_columns_floor(problem: AttentionProblem, m: int) -> Theory:
    """Of an operator that gives weights to m keys alone, the same for all queries."""
    from nla_llm.theory.floors import few_columns_floor_theory  # noqa: PLC0415 - SciPy loads there

    return few_columns_floor_theory(lambda: _entries(problem), m, problem.exact().shape)


def squared_norm(op: Operator, *, block: int = 256) -> NDArray[Any]:
    """‖A‖_F² of the batch shape, from blocks of rows: the one number that theory needs of the exact matrix."""
    starts = range(0, op.shape[-2], block)
    parts = [to_numpy(op.xp.sum(op.rows(s, s + block) ** 2, axis=(-2, -1))) for s in starts]
    return np.asarray(np.sum(parts, axis=0))


def _entries(problem: AttentionProblem) -> Matrix:
    """The exact matrix in float64."""
    matrix: Matrix = to_numpy(problem.exact().dense())
    return matrix
