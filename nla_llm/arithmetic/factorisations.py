"""Multiply-adds of the factorisations, by their textbook formulas: integers of integers, expressions of symbols.

What LAPACK really does depends on its block sizes and on convergence, so a count of it would belong to one machine. The
formulas are those of Golub and Van Loan, Matrix Computations (4th edition); a flop of the book is an operation here,
and two of them make a multiply-add, since all of these algorithms consist of inner products, updates and rotations.
"""

from __future__ import annotations

from typing import Any

__all__ = ["eigh", "merge_sort", "qr", "reflections", "solve", "svd", "svdvals"]


def reflections(rows: Any, columns: Any) -> Any:
    """Multiply-adds of applying the ``columns`` Householder reflections of a rows × columns matrix, rows ≥ columns.

    Reflection i meets the trailing (rows − i) × (columns − i) block twice, in an inner product and in an update:
    2 Σ_i (rows − i)(columns − i), of leading order rows·columns² − columns³/3 (section 5.2.2: 2n²(m − n/3) flops).
    The sum is kept in full, so that it is a whole number.

    Examples
    --------
    >>> reflections(2, 2), reflections(5, 3)
    (10, 52)
    """
    m, n = rows, columns
    return (m - n) * n * (n + 1) + _quotient(n * (n + 1) * (2 * n + 1), 3)


def qr(rows: Any, columns: Any) -> Any:
    """Thin Q and R of a rows × columns matrix, rows ≥ columns: forming Q costs as much as R (section 5.2.2).

    Examples
    --------
    >>> qr(4, 4)
    120
    """
    return 2 * reflections(rows, columns)


def svd(rows: Any, columns: Any) -> Any:
    """Thin U, Σ and V of a rows × columns matrix, rows ≥ columns.

    Golub–Reinsch, 14mn² + 8n³ flops (section 8.6, the row "Σ, U₁, V" of its table).

    Examples
    --------
    >>> svd(10, 2)
    312
    """
    return 7 * rows * columns**2 + 4 * columns**3


def svdvals(rows: Any, columns: Any) -> Any:
    """Singular values alone, rows ≥ columns: reflections from both sides (section 8.6, 4mn² − 4n³/3 flops).

    Examples
    --------
    >>> svdvals(4, 4)
    120
    """
    return 2 * reflections(rows, columns)


def eigh(order: Any) -> Any:
    """Eigenvalues and vectors of a symmetric matrix by tridiagonal QR: 9n³ flops (section 8.3), n more to make it even.

    Examples
    --------
    >>> eigh(3)
    123
    """
    return _quotient(9 * order**3 + order, 2)


def solve(order: Any, columns: Any) -> Any:
    """Solution of a square system with some right-hand sides: LU, 2n³/3 flops, and two triangles, 2n² flops a column.

    Sections 3.1 and 3.2. The multiply-adds of the elimination are Σ_i i(i + 1) = (n³ − n)/3, a whole number.

    Examples
    --------
    >>> solve(3, 1)
    17
    """
    return _quotient(order**3 - order, 3) + order**2 * columns


def _quotient(numerator: Any, divisor: int) -> Any:
    """``numerator / divisor`` where that is known to be whole; ``//`` would wrap an expression in a floor."""
    return numerator // divisor if isinstance(numerator, int) else numerator / divisor


def merge_sort(length: int) -> int:
    """Comparisons of sorting ``length`` numbers by merging, in the worst case: n⌈lg n⌉ − 2^⌈lg n⌉ + 1.

    Knuth, The Art of Computer Programming, volume 3, section 5.2.4.

    Examples
    --------
    >>> [merge_sort(n) for n in (1, 2, 3, 4, 8)]
    [0, 1, 3, 5, 17]
    """
    levels = (length - 1).bit_length()
    return length * levels - (1 << levels) + 1
