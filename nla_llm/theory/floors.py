"""Floors: below which error no matrix of a given structure comes, whatever a method puts into it.

Low rank, blocks of low rank, few entries in a row, few columns. A floor says nothing of how near a method comes to it.
Everything is float64 NumPy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from nla_llm.theory.bound import Matrix, Theory
from nla_llm.theory.yardsticks import eckart_young

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "Block",
    "block_rank_floor",
    "block_rank_floor_theory",
    "blocks_below_diagonal",
    "few_columns_floor",
    "few_columns_floor_theory",
    "few_entries_floor",
    "few_entries_floor_theory",
    "rank_floor_theory",
]

Block: TypeAlias = tuple[Any, Any]  # rows and columns, each a slice or an array of places
Entries: TypeAlias = Callable[[], Matrix]


def block_rank_floor(matrix: ArrayLike, blocks: Sequence[Block], rank: int, norm: str = "frobenius") -> Matrix:
    """The least error of matrices whose given blocks have a rank; outside the blocks nothing is wrong.

    Eckart and Young, block by block. The blocks do not overlap, so in the Frobenius norm their errors add up,
    √(Σ_blocks Σ_i>rank σ_i²), and that is attained; in the spectral norm it is the largest σ_(rank+1) of a block, a
    lower bound, since no norm of a block exceeds that of the matrix.

    Parameters
    ----------
    matrix
        (..., n_q, n_k).
    blocks
        Rows and columns of each, as slices or arrays of places.
    rank
        At least 0.
    norm
        'frobenius' or 'spectral'.

    Returns
    -------
    Absolute error, an array of the batch shape.

    Examples
    --------
    >>> float(block_rank_floor(np.diag([3.0, 4.0]), [(slice(0, 2), slice(0, 2))], 1))
    3.0
    """
    if norm not in {"frobenius", "spectral"}:
        raise ValueError(f"the floor of blocks is known in the norms 'frobenius' and 'spectral', got {norm!r}")
    a = np.asarray(matrix, dtype=np.float64)
    floors = [np.zeros(a.shape[:-2])]
    for rows, columns in blocks:
        block = a[..., rows, :][..., columns]
        if min(block.shape[-2:]) > rank:
            floors.append(eckart_young(np.linalg.svd(block, compute_uv=False), rank, norm))
    found = np.stack(floors)
    return np.asarray(np.linalg.norm(found, axis=0) if norm == "frobenius" else found.max(axis=0))


def blocks_below_diagonal(n: int) -> list[Block]:
    """Blocks that cover all below the diagonal of an n × n matrix, by halving: all of rank r where it is tril(A Bᵀ).

    Examples
    --------
    >>> blocks_below_diagonal(3)
    [(slice(1, 3, None), slice(0, 1, None)), (slice(2, 3, None), slice(1, 2, None))]
    """
    blocks: list[Block] = []

    def halve(start: int, stop: int) -> None:
        middle = (start + stop) // 2
        if start < middle:
            blocks.append((slice(middle, stop), slice(start, middle)))
            halve(start, middle)
            halve(middle, stop)

    halve(0, n)
    return blocks


def few_entries_floor(matrix: ArrayLike, kept: ArrayLike) -> Matrix:
    """The least Frobenius error of matrices with ``kept`` entries (..., n_q) in a row: what is not among the largest.

    Examples
    --------
    >>> float(few_entries_floor([[3.0, 4.0, 0.0], [1.0, 1.0, 1.0]], [1, 3]))
    3.0
    """
    squares = -np.sort(-(np.asarray(matrix, dtype=np.float64) ** 2), axis=-1)
    beyond = np.arange(squares.shape[-1]) >= np.asarray(kept)[..., None]
    return np.asarray(np.sqrt(np.sum(np.where(beyond, squares, 0), axis=(-2, -1))))


def few_columns_floor(matrix: ArrayLike, m: int) -> Matrix:
    """The least Frobenius error of matrices of which m columns are not zero: the norm of the n_k − m smallest columns.

    Never below that of rank m, as what is left of the largest columns has rank m.

    Examples
    --------
    >>> float(few_columns_floor([[3.0, 4.0, 0.0], [0.0, 0.0, 5.0]], 2))
    3.0
    """
    squares = np.sort(np.sum(np.asarray(matrix, dtype=np.float64) ** 2, axis=-2), axis=-1)
    return np.asarray(np.sqrt(np.sum(squares[..., : max(0, squares.shape[-1] - m)], axis=-1)))


# -- as promises -------------------------------------------------------------------------------------------------------


def rank_floor_theory(entries: Entries, rank: int, shape: tuple[int, ...]) -> Theory:
    """No matrix of rank ``rank`` is nearer, in the Frobenius, spectral and nuclear norms.

    ``entries`` gives the matrix (..., n_q, n_k); it is called where an error is asked for.

    Examples
    --------
    >>> float(rank_floor_theory(lambda: np.diag([3.0, 2.0, 1.0]), 1, (3, 3)).error("spectral"))
    2.0
    """
    values = cache(lambda: np.linalg.svd(entries(), compute_uv=False))
    source = "Eckart and Young 1936, Mirsky 1960"
    return _floor(f"no matrix of rank {rank}", source, shape, lambda norm: eckart_young(values(), rank, norm))


def block_rank_floor_theory(
    entries: Entries, blocks: Sequence[Block], rank: int, shape: tuple[int, ...], *, name: str = ""
) -> Theory:
    """No matrix whose blocks have rank ``rank`` is nearer, in the Frobenius and spectral norms.

    Examples
    --------
    >>> whole = [(slice(0, 2), slice(0, 2))]
    >>> float(block_rank_floor_theory(lambda: np.diag([3.0, 4.0]), whole, 1, (2, 2)).error("frobenius"))
    3.0
    """
    source = "Eckart and Young 1936, block by block"
    return _floor(
        name or f"no blocks of rank {rank}", source, shape, lambda norm: block_rank_floor(entries(), blocks, rank, norm)
    )


def few_entries_floor_theory(entries: Entries, kept: ArrayLike, shape: tuple[int, ...]) -> Theory:
    """No matrix with ``kept`` entries (..., n_q) in a row is nearer, in the Frobenius norm.

    Examples
    --------
    >>> float(few_entries_floor_theory(lambda: np.array([[3.0, 4.0]]), [1], (1, 2)).error("frobenius"))
    3.0
    """
    return _frobenius(
        "no other entries", "derived: row by row the largest entries", shape, lambda: few_entries_floor(entries(), kept)
    )


def few_columns_floor_theory(entries: Entries, m: int, shape: tuple[int, ...]) -> Theory:
    """No matrix of which m columns are not zero is nearer, in the Frobenius norm.

    Examples
    --------
    >>> float(few_columns_floor_theory(lambda: np.array([[3.0, 4.0]]), 1, (1, 2)).error("frobenius"))
    3.0
    """
    return _frobenius(
        f"no other {m} columns", "derived: the largest columns", shape, lambda: few_columns_floor(entries(), m)
    )


def _frobenius(name: str, source: str, shape: tuple[int, ...], error: Callable[[], Matrix]) -> Theory:
    return _floor(name, source, shape, partial(_frobenius_only, error))


def _frobenius_only(error: Callable[[], Matrix], norm: str) -> Matrix:
    if norm != "frobenius":
        raise ValueError(f"the floor is known in the norm 'frobenius' only, got {norm!r}")
    return error()


def _floor(name: str, source: str, shape: tuple[int, ...], error: Callable[[str], Matrix]) -> Theory:
    return Theory(
        name=name,
        kind="floor",
        status="VE",
        source=source,
        shape=shape,
        error_norm=error,
        assumptions=("exact arithmetic",),
    )
