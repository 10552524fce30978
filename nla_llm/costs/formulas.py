"""Formulas of the pieces that methods are made of: each mirrors one operator or one array function.

They are composed in the ``cost`` of a method as its code composes the operators, and compared with what counted arrays
count, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sympy

from nla_llm.arithmetic import factorisations
from nla_llm.arithmetic.quantisers import NESTED
from nla_llm.costs.cost import Cost, Operations
from nla_llm.costs.symbols import symbols_of, visible_pairs

if TYPE_CHECKING:
    from nla_llm.arithmetic.quantisers import Quantiser
    from nla_llm.problems import AttentionProblem

__all__ = [
    "CausalLowRankShape",
    "LowRankShape",
    "bisections",
    "eigh",
    "exact_attention",
    "hadamard_directions",
    "hadamard_projection",
    "iterated_inverse",
    "matmul",
    "maximum_of",
    "merge_sort",
    "norm_product",
    "orthogonal_directions",
    "pairs_inside_segments",
    "pseudo_inverse",
    "qr",
    "quantisation",
    "ridge_inverse",
    "row_normalised",
    "segment_slots",
    "simplex_directions",
    "softmax_product",
    "softmax_rows",
    "softmax_weights",
    "solve",
    "sum_of",
    "svd",
    "walsh_hadamard",
]

Expr = Any  # an int or an expression of SymPy, which has no types


def matmul(rows: Expr, inner: Expr, columns: Expr) -> Operations:
    """A product of a rows × inner by an inner × columns matrix.

    Examples
    --------
    >>> matmul(2, 3, 4).madd
    24
    """
    return Operations(madd=rows * inner * columns)


def sum_of(length: Expr, *, times: Expr = 1) -> Operations:
    """``times`` sums of ``length`` entries each."""
    return Operations(add=times * (length - 1))


def maximum_of(length: Expr, *, times: Expr = 1) -> Operations:
    """``times`` maxima over ``length`` entries each."""
    return Operations(compare=times * (length - 1))


def merge_sort(length: Expr) -> Operations:
    """Sorting: n⌈lg n⌉ − 2^⌈lg n⌉ + 1 comparisons (Knuth, The Art of Computer Programming, volume 3, section 5.2.4)."""
    levels = sympy.ceiling(sympy.log(length, 2))
    return Operations(compare=length * levels - 2**levels + 1)


def bisections(length: Expr) -> Expr:
    """Steps of a search by bisection among ``length`` entries, ⌈lg length⌉."""
    return sympy.ceiling(sympy.log(length, 2))


def segment_slots(n: Expr, m: Expr, windows: Expr) -> Expr:
    """Slots of m segments of n tokens in windows, those that are filled up included."""
    return m * sympy.ceiling(sympy.ceiling(n / windows) / sympy.floor(m / windows))


def pairs_inside_segments(n_q: Expr, n_k: Expr, m: Expr, *, causal: bool = False) -> Expr:
    """Pairs of a query and a key in segments of one number: m segments of ⌊n/m⌋ tokens, the last n mod m one longer."""
    length_q, length_k = sympy.floor(n_q / m), sympy.floor(n_k / m)
    longer_q, longer_k = sympy.Mod(n_q, m), sympy.Mod(n_k, m)
    if causal:
        return (m - longer_q) * length_q * (length_q + 1) / 2 + longer_q * (length_q + 1) * (length_q + 2) / 2
    return m * length_q * length_k + longer_q * length_k + longer_k * length_q + sympy.Min(longer_q, longer_k)


def svd(rows: Expr, columns: Expr) -> Operations:
    """Thin singular value decomposition, 14mn² + 8n³ operations for m ≥ n (Golub and Van Loan, section 8.6)."""
    if rows == columns:
        return Operations(madd=factorisations.svd(rows, rows))
    return Operations(madd=factorisations.svd(sympy.Max(rows, columns), sympy.Min(rows, columns)))


def eigh(order: Expr) -> Operations:
    """Eigenvalues and eigenvectors of a symmetric matrix, 9n³ operations (Golub and Van Loan, section 8.3)."""
    return Operations(madd=factorisations.eigh(order))


def qr(rows: Expr, columns: Expr) -> Operations:
    """Thin QR factorisation, rows >= columns (Golub and Van Loan, section 5.2.2)."""
    return Operations(madd=factorisations.qr(rows, columns))


def solve(order: Expr, columns: Expr) -> Operations:
    """A square system with some right-hand sides (Golub and Van Loan, sections 3.1 and 3.2)."""
    return Operations(madd=factorisations.solve(order, columns))


def norm_product(order: Expr) -> Operations:
    """Costs of :func:`nla_llm.linalg.inverses.norm_product`: sums of columns and rows, their maxima, one product."""
    norms: Operations = 2 * (sum_of(order, times=order) + maximum_of(order))
    return norms + Operations(mul=1)


def iterated_inverse(order: Expr, iterations: Expr) -> Operations:
    """Costs of :func:`nla_llm.linalg.inverses.iterated_inverse` from its first Z: four products a step."""
    step = 4 * matmul(order, order, order) + Operations(add=3 * order**2, mul=order**2)
    steps: Operations = iterations * step
    return steps + Operations(mul=3 * order**2)


def pseudo_inverse(rows: Expr, columns: Expr) -> Operations:
    """Costs of :func:`nla_llm.linalg.inverses.pseudo_inverse`, or of ``ridge_inverse`` but for its filter."""
    rank = rows if rows == columns else sympy.Min(rows, columns)
    cut = Operations(mul=1, compare=rank, div=rank)
    return svd(rows, columns) + cut + Operations(mul=columns * rank) + matmul(columns, rank, rows)


def ridge_inverse(order: Expr) -> Operations:
    """Costs of :func:`nla_llm.linalg.inverses.ridge_inverse` of a square matrix."""
    filtered = Operations(mul=order, add=order, div=order)
    return svd(order, order) + filtered + Operations(mul=order**2) + matmul(order, order, order)


def orthogonal_directions(m: Expr, d: Expr, *, fixed_norms: bool = False) -> Operations:
    """m directions in blocks of d: the Haar rotations (QR and its signs) and the χ lengths, if any."""
    rotation = Operations(madd=factorisations.qr(d, d), compare=d, draw=d**2)
    rotations: Operations = rotation * sympy.ceiling(m / d)
    lengths = Operations() if fixed_norms else Operations(sqrt=m, draw=m)
    return rotations + lengths + Operations(mul=m * d)


def simplex_directions(m: Expr, d: Expr) -> Operations:
    """m directions in regular simplices of d: orthogonal ones, less the share of their centre, and one factor more."""
    centring: Operations = Operations(add=d * (d - 1) + d**2, mul=d) * sympy.ceiling(m / d)
    return orthogonal_directions(m, d) + centring + Operations(mul=m)


def walsh_hadamard(length: Expr, *, times: Expr = 1) -> Operations:
    """Fast transforms of ``length`` entries, a power of two."""
    return Operations(add=times * length * sympy.ceiling(sympy.log(length, 2)))


def hadamard_directions(m: Expr, d: Expr, *, factors: int, chi: bool) -> Operations:
    """Signs of the diagonals, those of the later factors scaled, and the χ lengths, if any."""
    size = 2 ** sympy.ceiling(sympy.log(d, 2))
    entries = sympy.ceiling(m / size) * size
    signs = Operations(draw=factors * entries, mul=(factors - 1) * entries)
    return signs + (Operations(sqrt=m, mul=m, draw=m) if chi else Operations())


def hadamard_projection(m: Expr, d: Expr, *, factors: int, chi: bool) -> Operations:
    """One token: in each block the diagonals and the transforms, then the lengths of the m rows, if any."""
    size = 2 ** sympy.ceiling(sympy.log(d, 2))
    transforms: Operations = factors * walsh_hadamard(size)
    block = Operations(mul=d + (factors - 1) * size) + transforms
    blocks: Operations = block * sympy.ceiling(m / size)
    return blocks + Operations(mul=m if chi else 0)


def quantisation(rows: Expr, columns: Expr, quantiser: Quantiser) -> Operations:
    """Costs of a :class:`~nla_llm.arithmetic.quantisers.Quantiser`: scales, quotients, a bisection and a product each.

    Blocks that are filled up count in full.
    """
    block = columns if quantiser.block is None else sympy.Min(quantiser.block, rows * columns)
    blocks = rows if quantiser.block is None else sympy.ceiling(rows * columns / block)
    entries, extremes = blocks * block, 2 if quantiser.affine else 1
    scales = maximum_of(block, times=extremes * blocks) + Operations(compare=(3 * extremes + 1) * blocks)
    if quantiser.nested:
        part = sympy.Min(NESTED, blocks)
        parts = sympy.ceiling(blocks / part)
        scales += maximum_of(part, times=parts) + Operations(compare=parts)
        scales += Operations(compare=1, div=2, mul=2) * (parts * part)
    shifts = Operations(add=2 * entries + blocks if quantiser.affine else 0)
    bisection = (len(quantiser.levels) - 1).bit_length()
    return scales + shifts + Operations(compare=bisection * entries, div=entries, mul=entries)


# -- exact attention -----------------------------------------------------------------------------------------------


def softmax_weights(problem: AttentionProblem) -> Operations:
    """Logits, their exponentials after the row maximum is taken off, and the sums of the rows."""
    rows, _, d, _ = symbols_of(problem)
    pairs = visible_pairs(problem)
    return softmax_rows(rows, pairs, d) + Operations(add=0 if problem.bias is None else pairs)


def softmax_rows(rows: Expr, pairs: Expr, d: Expr) -> Operations:
    """Weights and sums of ``rows`` rows of a :class:`~nla_llm.operators.SoftmaxAttention` with ``pairs`` entries."""
    return (
        Operations(mul=rows * d, madd=pairs * d)  # scaled queries, times keys
        + Operations(compare=pairs - rows, add=pairs, exp=pairs)
        + Operations(add=pairs - rows)  # row sums
    )


def softmax_product(rows: Expr, pairs: Expr, d: Expr, width: Expr) -> Operations:
    """Product of such rows with a matrix of ``width`` columns."""
    return softmax_rows(rows, pairs, d) + Operations(madd=pairs * width, div=rows * width)


def exact_attention(problem: AttentionProblem) -> Cost:
    """Exact softmax attention: nothing is prepared, one product with v; 2 (d + d_v) matrix operations a visible pair.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> exact_attention(AttentionProblem(np.zeros((4, 2)), np.zeros((4, 2)))).matmuls()
    2*d*n**2 + 2*d_v*n**2
    """
    rows, _, _, d_v = symbols_of(problem)
    weighted_sum = Operations(madd=visible_pairs(problem) * d_v, div=rows * d_v)
    return Cost(apply=softmax_weights(problem) + weighted_sum)


# -- operators -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LowRankShape:
    """Costs of :class:`~nla_llm.operators.LowRank`: left (rows × rank) by the transpose of right (columns × rank)."""

    rows: Expr
    columns: Expr
    rank: Expr

    def row_sums(self) -> Operations:
        """Sum of the rows of right, then one product with left."""
        return sum_of(self.columns, times=self.rank) + matmul(self.rows, self.rank, 1)

    def apply(self, width: Expr) -> Operations:
        """Product with a columns × width matrix, from the right."""
        return matmul(self.rank, self.columns, width) + matmul(self.rows, self.rank, width)


@dataclass(frozen=True)
class CausalLowRankShape:
    """Costs of :class:`~nla_llm.operators.CausalLowRank`: n × n, chunks of c ≤ n rows, with or without decay."""

    n: Expr
    rank: Expr
    c: Expr
    decay: bool = False

    @property
    def chunks(self) -> Expr:
        """Number of chunks, the last one perhaps shorter."""
        return sympy.ceiling(self.n / self.c)

    @property
    def pairs(self) -> Expr:
        """Pairs inside chunks: c(c+1)/2 in each of the (n − ρ)/c full ones, ρ(ρ+1)/2 in the last ρ = n mod c rows."""
        rest = sympy.Mod(self.n, self.c)
        return (self.n * (self.c + 1) - rest * (self.c - rest)) / 2

    def decayed(self, width: Expr) -> Operations:
        """The state, rank × width, multiplied on entering each chunk but the first."""
        return Operations(mul=(self.chunks - 1) * self.rank * width if self.decay else 0)

    def row_sums(self) -> Operations:
        """Running sums of right within chunks, the state added after the first, inner products with left."""
        running = Operations(add=(self.n - self.chunks) * self.rank + (self.n - self.c) * self.rank)
        inner = Operations(mul=self.n * self.rank) + sum_of(self.rank, times=self.n)
        return running + self.decayed(1) + inner

    def apply(self, width: Expr) -> Operations:
        """Product with an n × width matrix: triangles of chunks, updates of the state, rows times the state."""
        triangles = Operations(madd=self.pairs * (self.rank + width))
        updates = matmul(self.rank, self.n, width) + Operations(add=(self.chunks - 1) * self.rank * width)
        later_rows = matmul(self.n - self.c, self.rank, width) + Operations(add=(self.n - self.c) * width)
        return triangles + updates + later_rows + self.decayed(width)


def row_normalised(op: LowRankShape | CausalLowRankShape, rows: Expr, width: Expr) -> Cost:
    """Costs of :class:`~nla_llm.operators.RowNormalised`: row sums and their two checks; a product and its division."""
    return Cost(
        prepare=op.row_sums() + Operations(compare=2 * rows),
        apply=op.apply(width) + Operations(div=rows * width),
    )
