"""Randomly pivoted Cholesky: the Gaussian kernel of all tokens from columns that are drawn by its own residual."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, final

from nla_llm import costs
from nla_llm.backend import Array, by_heads, constant, decomposable, device_of, eps, generator, namespace
from nla_llm.methods.attention.floors import rank_floor
from nla_llm.methods.attention.kernels.linear_attention import (
    Features,
    half_square_norm,
    kernel_attention,
    kernel_attention_cost,
)
from nla_llm.methods.attention.landmarks.gaussian import (
    joined_tokens,
    recentred_keys,
    recentring_cost,
)
from nla_llm.methods.registry import Properties, register, require, settle, whole_number
from nla_llm.operators import RowNormalised, Selection

if TYPE_CHECKING:
    import numpy as np

    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["RPCholesky", "random_pivots"]


@register("rpcholesky")
@final
@dataclass(frozen=True)
class RPCholesky:
    """Kernel exp(x·y) ≈ A_qS A_SS⁺ A_Sk on m tokens S chosen by randomly pivoted Cholesky, then division by row sums.

    Chen, Epperly, Tropp and Webber 2022, arXiv 2207.06503, algorithm 1, for the positive semi-definite kernel of
    queries and keys together, of which attention needs the cross block; x = √scale q, y = √scale k. Keys are first
    shifted by −mean(x) − mean(y), which softmax does not see. All that is exponentiated is the Gaussian kernel, whose
    diagonal is one: the factors exp(|x|²/2) and exp(|y|²/2) stay in the logarithmic scales of rows and features.
    Each of the m steps makes one column of the kernel and updates the residual diagonal of all tokens, so the cost
    grows as (n_q + n_k) m². Entries, and even row sums, may be negative; the operator reports the share of the latter.

    Parameters
    ----------
    m
        Number of pivots.
    balance
        A pivot is drawn with a probability proportional to exp(balance |z|²) times the residual diagonal of the
        Gaussian kernel: 0 is the algorithm for the Gaussian kernel, 1 for exp(z·z'), between them for their mean. The
        default is empirical: Gaussian pivots waste few steps on sharp data, exponential ones see the large entries.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.linspace(0, 1, 20)[:, None]
    >>> problem = AttentionProblem(q, q)
    >>> bool(abs(RPCholesky(6)(problem, rng=0).dense() - problem.exact().dense()).max() < 1e-5)
    True
    """

    m: int
    _: KW_ONLY
    balance: float = 0.5
    properties: ClassVar[Properties] = Properties(
        family="columns", budget="m", converges=True, deterministic=False, shift_invariant=True, partial=True,
        permutation_equivariant=False, supports=frozenset({"key_mask"}),
        refusals={"causal": "a pivot that is a later token would leak into earlier rows"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        if isinstance(self.balance, bool) or not isinstance(self.balance, float | int) or not 0 <= self.balance <= 1:
            raise ValueError(f"balance must be a number between 0 and 1, got {self.balance!r}")

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> RowNormalised:
        """Operator of rank m, normalised by rows."""
        require(self, problem)
        xp, (x, y) = problem.xp, problem.scaled_inputs()
        y = recentred_keys(x, y, problem.key_mask)
        tokens = joined_tokens(x, y)
        _enough(self.m, problem)
        diagonal = _shown(problem, tokens)
        u = xp.asarray(generator(rng).random(self.m), device=device_of(x))
        pivots, triangle, fresh = by_heads(partial(random_pivots, u=u, balance=float(self.balance)), tokens, diagonal)
        chosen = Selection(pivots[..., 0], tokens.shape[-2], like=x).gather(tokens)
        triangle = decomposable(triangle)
        inverse = xp.linalg.solve(triangle, xp.eye(self.m, dtype=triangle.dtype, device=device_of(triangle)))
        inverse = xp.astype(xp.where(fresh, inverse, xp.zeros_like(inverse)), x.dtype, copy=False)
        queries, keys = (pivot_features(tokens, chosen, inverse) for tokens in (x, y))
        return kernel_attention(problem, queries, keys)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of its rank, m: whatever the method puts into it."""
        return rank_floor(problem, self.m)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Tokens, m steps over all of them, the interpolation from the pivots; then a kernel of rank m."""
        n_q, n_k, d, _ = costs.symbols_of(problem)
        m, f, count, tokens = costs.m, costs.formulas, costs.Operations, n_q + n_k
        pivots = count(mul=tokens * d, draw=m) + recentring_cost(problem) + _pivots_cost(tokens, d) + f.solve(m, m)
        logs = 2 * m * (count(mul=d + 1) + f.sum_of(d)) + f.matmul(tokens, d, m) + f.maximum_of(m, times=tokens)
        features = logs + count(add=2, exp=2, compare=1) * (tokens * m) + f.matmul(tokens, m, m)
        return costs.Cost(prepare=pivots + features) + kernel_attention_cost(
            problem, m, log_width=m, amplitude=True, row=True
        )


# -- pivots --------------------------------------------------------------------------------------------------------


def random_pivots(tokens: Array, diagonal: Array, *, u: Array, balance: float) -> tuple[Array, Array, Array]:
    """Randomly pivoted Cholesky of the Gaussian kernel: its pivots, and the factor of their own kernel matrix.

    Parameters
    ----------
    tokens : array (..., N, d)
    diagonal : array (..., N, 1)
        One for tokens that may be chosen, zero for others.
    u : array (m,)
        Uniform numbers in [0, 1), one for each step.
    balance
        Exponent of the tilt exp(balance |z|²) of the probabilities.

    Returns
    -------
    pivots
        Places (..., m, 1) among the tokens.
    triangle
        Lower triangular L (..., m, m) with L Lᵀ the kernel of the pivots.
    fresh
        (..., m, 1), False for a step that found nothing left: its pivot is the first token once more, its row of L
        that of the identity, and it must not become a feature. A residual below m eps is rounding and taken for zero.
    """
    xp, m = namespace(tokens), int(u.shape[0])
    half = half_square_norm(tokens)[..., 0]
    residual = diagonal[..., 0]
    log_tilt = xp.where(residual > 0, 2.0 * balance * half, xp.full_like(half, -xp.inf))
    tilt = xp.exp(log_tilt - xp.max(log_tilt, axis=-1, keepdims=True))
    factor = xp.zeros((*tokens.shape[:-2], m, tokens.shape[-2]), dtype=tokens.dtype, device=device_of(tokens))
    place = xp.arange(tokens.shape[-2], device=device_of(tokens))
    smallest, one = m * eps(tokens), constant(1.0, like=tokens)
    zero = xp.zeros_like(one)
    pivots, fresh_steps = [], []
    for i in range(m):
        running = xp.cumulative_sum(xp.astype(tilt * residual, xp.float64), axis=-1)
        passed = running <= u[i] * running[..., -1:]
        pivot = xp.sum(xp.astype(passed, xp.int64), axis=-1, keepdims=True)  # (..., 1)
        pivot = xp.where(running[..., -1:] > 0, pivot, xp.zeros_like(pivot))
        token = xp.take_along_axis(tokens, pivot[..., None], axis=-2)  # (..., 1, d)
        log = (token @ xp.matrix_transpose(tokens))[..., 0, :] - half - xp.take_along_axis(half, pivot, axis=-1)
        before = factor[..., :i, :]
        at_pivot = xp.take_along_axis(before, pivot[..., None], axis=-1)  # (..., i, 1)
        column = xp.exp(xp.minimum(log, zero)) - (xp.matrix_transpose(at_pivot) @ before)[..., 0, :]
        left_over = xp.take_along_axis(residual, pivot, axis=-1)
        fresh = left_over > smallest
        root = xp.sqrt(xp.where(fresh, left_over, one))
        column = xp.where(fresh, xp.where(place == pivot, root, column / root), zero)  # at the pivot: free of rounding
        factor[..., i, :] = column
        residual = residual - column * column
        residual = xp.where((residual > smallest) & (place != pivot), residual, xp.zeros_like(residual))
        pivots.append(pivot)
        fresh_steps.append(fresh)
    chosen = xp.stack(pivots, axis=-2)
    index = xp.broadcast_to(xp.matrix_transpose(chosen), (*factor.shape[:-1], m))
    triangle = xp.tril(xp.matrix_transpose(xp.take_along_axis(factor, index, axis=-1)))
    eye = xp.eye(m, dtype=factor.dtype, device=device_of(factor))
    is_fresh = xp.stack(fresh_steps, axis=-2)
    return chosen, xp.where(is_fresh, triangle, eye), is_fresh


def _pivots_cost(tokens: Any, d: Any) -> costs.Operations:
    """Norms and tilts, then m steps: a draw by running sums, a column of the kernel, its residual, the diagonal."""
    m, f, count = costs.m, costs.formulas, costs.Operations
    norms = tokens * (count(mul=d + 1) + f.sum_of(d))
    tilt = count(compare=tokens, mul=tokens, add=tokens, exp=tokens) + f.maximum_of(tokens)
    draw = count(mul=tokens + 1, compare=tokens + 1) + f.sum_of(tokens)
    column = f.matmul(1, d, tokens) + count(add=3 * tokens, exp=tokens, div=tokens, compare=tokens + 1, sqrt=1)
    diagonal = count(mul=tokens, add=tokens, compare=tokens)
    total: costs.Operations = norms + tilt + m * (draw + column + diagonal) + count(madd=tokens * m * (m - 1) / 2)
    return total


def _shown(problem: AttentionProblem, tokens: Array) -> Array:
    """One for queries and visible keys, zero for hidden keys, (..., n_q + n_k, 1) in the batch axes of ``tokens``."""
    xp, shape = namespace(tokens), (*tokens.shape[:-1], 1)
    if problem.key_mask is None:
        return xp.ones(shape, dtype=tokens.dtype, device=device_of(tokens))
    mask = xp.astype(problem.key_mask, tokens.dtype)[..., None]
    queries = xp.ones((*mask.shape[:-2], problem.n_q, 1), dtype=tokens.dtype, device=device_of(tokens))
    return xp.broadcast_to(xp.concat([queries, mask], axis=-2), shape)


def _enough(m: int, problem: AttentionProblem) -> None:
    xp, total = problem.xp, problem.n_q + problem.n_k
    if problem.key_mask is not None:
        total -= int(xp.max(xp.sum(xp.astype(~problem.key_mask, xp.int64), axis=-1)))
    if m > total:
        raise ValueError(f"m={m} tokens cannot be drawn from {total} queries and visible keys; pass a smaller m")


def pivot_features(x: Array, pivots: Array, inverse: Array) -> Features:
    """φ(x) = L⁻¹ (exp(x·z_s − |z_s|²/2))_s for the pivots z_s, whose products are the kernel interpolated from them.

    The factor exp(|x|²/2) of the softmax kernel is part of it, and the largest exponential of a row is taken out before
    the triangle is applied. L⁻¹ being triangular, a pivot's own feature meets no cancellation with later ones.
    """
    xp = namespace(x)
    log = x @ xp.matrix_transpose(pivots) - xp.matrix_transpose(half_square_norm(pivots))
    row = xp.max(log, axis=-1, keepdims=True)
    values = xp.exp(log - row) @ xp.matrix_transpose(inverse)
    some = values != 0
    size = xp.log(xp.where(some, xp.abs(values), xp.ones_like(values)))
    size = xp.where(some, size, xp.full_like(size, -xp.inf))
    return Features(amplitude=xp.copysign(xp.ones_like(values), values), log=size, row=row)
