"""Projections along the sequence: n keys replaced by m combinations of them, Gaussian, averaged or optimal."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING, ClassVar, final

from nla_llm import costs
from nla_llm.backend import (
    Array,
    by_heads,
    constant,
    device_of,
    exp_in_place,
    from_numpy,
    generator,
    namespace,
    to_numpy,
)
from nla_llm.methods.attention.floors import rank_floor, squared_norm
from nla_llm.methods.registry import Properties, one_of, register, require, settle, whole_number
from nla_llm.operators import Dense, LowRank, Operator, Product

if TYPE_CHECKING:
    import numpy as np

    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["GaussianProjection", "Linformer"]

_MIXES_ALL_KEYS = "each of the m projected keys is a combination of all keys, later ones included"
_REFUSALS = {"causal": _MIXES_ALL_KEYS, "window": _MIXES_ALL_KEYS, "bias": "a projected key has no bias of its own"}


@register("linformer")
@final
@dataclass(frozen=True)
class Linformer:
    """Attention to m combinations of the keys and the same combinations of the values: softmax(scale · q (E k)ᵀ) E v.

    Wang et al. 2020, arXiv 2006.04768, eq. 7 and section 4 with shared projections E = F. Costs 2 n m (d + d_v) madds.

    With ``projection="gaussian"`` the entries of E (m, n_k) are N(0, 1/m), as in the theorems. This is a matrix of its
    own, not an approximation of softmax attention: the softmax runs over m sums of keys with random signs, rows do not
    sum to one, and as m grows the projected logits have variance |K q|² scale²/m → 0, so the matrix tends to
    (scale · q kᵀ + 1 (Eᵀ1)ᵀ)/m, which tends to zero. Trained models learn E; this is where they start.

    With ``projection="mean"`` E averages m groups of consecutive visible keys (the pooling of section 4). Rows then sum
    to one, no entry is negative, and m = n_k gives softmax attention itself. Groups of unequal size enter the softmax
    with their number of keys, so that equal logits give equal weights; where m divides n_k that changes nothing.

    Hidden keys are removed from E, the only form in which they reach neither a projected key nor an output.

    Parameters
    ----------
    m
        Rows of E (k in the paper); with means at most n_k.
    projection
        'gaussian' or 'mean'.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.zeros((4, 1))
    >>> Linformer(2, projection="mean")(AttentionProblem(q, q)).dense()[0].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """

    m: int
    _: KW_ONLY
    projection: str = "gaussian"
    properties: ClassVar[Properties] = Properties(
        family="projection", target="projected softmax", budget="m", row_stochastic=False, deterministic=False,
        permutation_equivariant=False, supports=frozenset({"key_mask"}), refusals=_REFUSALS,
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        one_of("projection", self.projection, ("gaussian", "mean"))
        if self.projection == "mean":
            promised = replace(
                type(self).properties, target="softmax", converges=True, row_stochastic=True, nonnegative=True,
                deterministic=True, shift_invariant=True,
            )  # fmt: skip
            object.__setattr__(self, "properties", promised)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator softmax(scale · q (E k)ᵀ) E, of rank m at most."""
        require(self, problem)
        xp, means = problem.xp, self.projection == "mean"
        projection, log_sizes = self._means(problem) if means else (_gaussian_matrix(self.m, problem, rng), None)
        logits = (problem.scale * problem.q) @ xp.matrix_transpose(projection @ problem.k)
        if means:
            logits += log_sizes
        return Product(
            Dense(by_heads(_softmax_of_fresh, logits), nonnegative=True), Dense(projection, nonnegative=means)
        )

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of its rank, m: whatever the method puts into it."""
        return rank_floor(problem, self.m)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """E, its product with the keys, a softmax over m projected keys; products with both factors."""
        n_q, n_k, d, d_v = costs.symbols_of(problem)
        m, f = costs.m, costs.formulas
        if self.projection == "gaussian":
            projection = costs.Operations(draw=m * n_k, mul=m * n_k)
        else:
            projection = costs.Operations(div=m * n_k, exp=m, add=n_q * m)
        logits = f.matmul(m, n_k, d) + costs.Operations(mul=n_q * d) + f.matmul(n_q, d, m)
        softmax = n_q * (f.maximum_of(m) + costs.Operations(add=m, exp=m, div=m) + f.sum_of(m))
        return costs.Cost(prepare=projection + logits + softmax, apply=f.LowRankShape(n_q, n_k, m).apply(d_v))

    def _means(self, problem: AttentionProblem) -> tuple[Array, Array]:
        """Rows that average groups of consecutive visible keys (..., m, n_k), and the logarithms of their sizes."""
        xp, like, mask = problem.xp, problem.q, problem.key_mask
        device = device_of(like)
        if mask is None:
            mask = xp.ones((problem.n_k,), dtype=xp.bool, device=device)
        visible = xp.astype(mask, xp.int64)
        total = xp.sum(visible, axis=-1, keepdims=True)
        if self.m > problem.n_k:
            raise ValueError(f"m={self.m} groups cannot be made of n_k={problem.n_k} keys; pass m <= n_k")
        rank = xp.cumulative_sum(visible, axis=-1) - 1  # among the visible keys, so that hiding is removing
        group = xp.where(mask, rank * self.m // total, -1)
        member = group[..., None, :] == xp.arange(self.m, device=device)[:, None]
        count = xp.sum(xp.astype(member, xp.int64), axis=-1)
        sizes = xp.astype(xp.where(count > 0, count, 1), like.dtype)
        empty = constant(-xp.inf, like=like)  # where there are fewer visible keys than groups
        log_sizes = xp.where(count > 0, xp.log(sizes), empty)
        return xp.astype(member, like.dtype) / sizes[..., None], log_sizes[..., None, :]


@register("gaussian_projection")
@final
@dataclass(frozen=True)
class GaussianProjection:
    """P VVᵀ, the exact attention matrix projected onto m directions along the keys, random or the best ones.

    With ``subspace="gaussian"`` it is P RᵀR, R (m, n_k) with entries N(0, 1/m): the construction in the proof of
    Theorem 1 of Wang et al. 2020 (arXiv 2006.04768) that attention is of low rank. Unbiased, E P̂ = P, with the mean
    square error ‖P‖_F² (n_k + 1)/m: a relative error of √((n_k + 1)/m), larger than that of doing nothing until m
    exceeds n_k. With ``subspace="optimal"`` the directions are the leading right singular vectors: the best matrix of
    rank m.

    Neither is cheap: P itself is applied to m columns, 2 n² (d + m) operations (streamed, nothing n × n is held), and
    the optimal subspace costs a singular value decomposition. It shows what the theorem's construction is worth.

    Parameters
    ----------
    m
        Number of directions; at most min(n_q, n_k) with the optimal subspace.
    subspace
        'gaussian' or 'optimal'.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> problem = AttentionProblem(np.diag([9.0, 9.0, 0.0]), np.eye(3))
    >>> error = problem.exact() - GaussianProjection(2, subspace="optimal")(problem)
    >>> s = np.linalg.svd(problem.exact().dense(), compute_uv=False)
    >>> bool(np.isclose(np.linalg.norm(error.dense(), 2), s[2]))
    True
    """

    m: int
    _: KW_ONLY
    subspace: str = "gaussian"
    properties: ClassVar[Properties] = Properties(
        family="projection", budget="m", converges=True, row_stochastic=False, deterministic=False,
        shift_invariant=True, permutation_equivariant=False, supports=frozenset({"key_mask"}), refusals=_REFUSALS,
        exceptions={"beats_random_keys": "√((n + 1)/m) exceeds the √(n/m − 1) of m random keys at every m"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        one_of("subspace", self.subspace, ("gaussian", "optimal"))
        if self.subspace == "optimal":
            promised = replace(
                type(self).properties, deterministic=True, permutation_equivariant=True, exceptions={}
            )  # fmt: skip
            object.__setattr__(self, "properties", promised)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of class LowRank: P applied to the directions, and the directions."""
        require(self, problem, any_size=self.subspace == "optimal")  # which is found in float64
        if self.subspace == "gaussian":
            directions = problem.xp.matrix_transpose(_gaussian_matrix(self.m, problem, rng))
            return LowRank(problem.exact(problem.q.dtype) @ directions, directions)
        directions = self._optimal(problem, rng)
        return LowRank(problem.exact() @ directions, directions)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Root mean square error in the Frobenius norm; with the optimal subspace the error in every norm."""
        from nla_llm.theory.projections import gaussian_projection_theory  # noqa: PLC0415 - SciPy loads there
        from nla_llm.theory.yardsticks import eckart_young_theory  # noqa: PLC0415

        exact = problem.exact()
        if self.subspace == "optimal":
            values = to_numpy(exact.xp.linalg.svdvals(exact.dense()))
            return eckart_young_theory(values, self.m, exact.shape)
        mask = problem.key_mask
        keys = problem.n_k if mask is None else to_numpy(mask).sum(axis=-1)
        return gaussian_projection_theory(squared_norm(exact), keys, self.m, exact.shape)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """The directions, perhaps by a decomposition; exact attention applied to them; a product of rank m."""
        n_q, n_k, _, d_v = costs.symbols_of(problem)
        m, f = costs.m, costs.formulas
        exact = f.exact_attention(problem).operations().map(lambda x: _at_width(x, m))
        if self.subspace == "gaussian":
            directions = costs.Operations(draw=m * n_k, mul=m * n_k)
        else:
            weights = f.softmax_weights(problem) + costs.Operations(div=costs.symbols.visible_pairs(problem))
            directions = weights + f.svd(n_q, n_k)
        return costs.Cost(prepare=directions + exact, apply=f.LowRankShape(n_q, n_k, m).apply(d_v))

    def _optimal(self, problem: AttentionProblem, rng: int | np.random.Generator | None) -> Array:
        """Leading right singular vectors (..., n_k, m): densely up to n = 2048, by block Krylov iteration beyond."""
        if self.m > min(problem.n_q, problem.n_k):
            raise ValueError(
                f"m={self.m} exceeds the dimensions of the matrix, {problem.n_q} x {problem.n_k}; pass a smaller m"
            )
        exact, xp = problem.exact(), problem.xp
        if max(problem.n_q, problem.n_k) <= 2048:
            _, _, vt = xp.linalg.svd(exact.dense(), full_matrices=False)
            return xp.matrix_transpose(vt)[..., : self.m]
        from nla_llm.linalg import truncated_svd  # noqa: PLC0415 - floor 1, loaded only where it is used

        return truncated_svd(exact, self.m, rng=0 if rng is None else rng).right


def _gaussian_matrix(m: int, problem: AttentionProblem, rng: int | np.random.Generator | None) -> Array:
    """Entries N(0, 1/m), (m, n_k), zero for hidden keys, (..., m, n_k); the same for all heads."""
    drawn = from_numpy(generator(rng).standard_normal((m, problem.n_k)), like=problem.q)
    xp = namespace(drawn)
    matrix = xp.astype((1 / sqrt(m)) * drawn, problem.q.dtype)
    if problem.key_mask is None:
        return matrix
    zero = constant(0.0, like=matrix)
    return xp.where(problem.key_mask[..., None, :], matrix, zero)


def _softmax_of_fresh(logits: Array) -> Array:
    """Softmax over the last axis, in the array of the logits where that is possible."""
    xp = namespace(logits)
    logits -= xp.max(logits, axis=-1, keepdims=True)
    weights = exp_in_place(logits)
    weights /= xp.sum(weights, axis=-1, keepdims=True)
    return weights


def _at_width(x: costs.formulas.Expr, width: costs.formulas.Expr) -> costs.formulas.Expr:
    """A formula with another number of right-hand sides."""
    return x.subs(costs.symbols.d_v, width) if hasattr(x, "subs") else x
