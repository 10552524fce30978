"""MonarchAttention: the Monarch matrix that comes nearest to softmax, by alternating maximisation."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, constant, device_of, namespace
from nla_llm.methods.attention.floors import block_rank_floor
from nla_llm.methods.attention.sparse.tiles import enough_keys
from nla_llm.methods.registry import Properties, register, require, settle, whole_number
from nla_llm.operators import MonarchMatrix
from nla_llm.operators.hierarchy import by_heads_of_blocks, in_rows, swap_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["MonarchAttention"]


@register("monarch")
@final
@dataclass(frozen=True)
class MonarchAttention:
    """P̂ = the Monarch matrix of greatest Σ P̂ ∘ logits + entropy that alternating maximisation finds in some steps.

    Yaras et al. 2025, arXiv 2505.18698. Keys stand in blocks k of m tokens i, queries in blocks l of J = min(m, n_q)
    tokens j, and P̂_(l,j),(k,i) = L_jkl R_kji. Each row of P maximises ⟨p, s⟩ + H(p) over the simplex (Gibbs), with the
    value log Σ exp(s); over P̂ of this form, either factor has a closed form when the other is fixed:

        R_kj = softmax_i(α_kj · k_ki / c_kj),      α_kj = Σ_l L_jkl q_lj,   c_kj = Σ_l L_jkl
        L_jl = softmax_k(β_jk · q_lj + H(R_kj)),   β_jk = Σ_i R_kji k_ki,   H the entropy

    so the value never falls; what is missing of log Σ exp(s), summed up over the rows, is the Kullback–Leibler
    divergence Σ KL(P̂‖P). It starts from L = identity: every block of keys by the queries of the block of its number (of
    the last one where there are fewer). O(n_q n_k (m⁻¹ + m/n_q) d) operations a step, O(n √n d) at m = √n.

    Rows sum to one, entries are nonnegative. It does not converge to softmax as m grows: it is exact at m = 1 and where
    one block holds all queries, m >= n_q, and most economical between. Tokens that fill up the last blocks have no
    weight.

    Parameters
    ----------
    m
        Keys of a block, at most n_k.
    steps
        Updates of R and then of L.

    Examples
    --------
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.random.default_rng(0).standard_normal((9, 2))
    >>> problem = AttentionProblem(q, q)
    >>> [bool(abs((MonarchAttention(m)(problem) - problem.exact()).dense()).max() < 1e-12) for m in (1, 3, 9)]
    [True, False, True]
    """

    m: int
    _: KW_ONLY
    steps: int = 3
    properties: ClassVar[Properties] = Properties(
        family="monarch", target="nearest Monarch matrix", budget="m", nonnegative=True, shift_invariant=True,
        permutation_equivariant=False, supports=frozenset({"key_mask"}),
        refusals={
            "causal": "queries of all blocks share the weights within a block of keys, so none of them can be cut off",
            "window": "queries of all blocks share the weights within a block of keys",
            "bias": "a bias belongs to pairs of tokens, and the factors know their means only",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        whole_number("steps", self.steps)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of class MonarchMatrix."""
        require(self, problem)
        enough_keys(self.m, problem)
        xp, (a, j, c, i) = problem.xp, _sizes(problem.n_q, problem.n_k, self.m)
        device = device_of(problem.q)
        queries, keys = in_rows(problem.scale * problem.q, a, j), in_rows(problem.k, c, i)
        real = xp.asarray(_inside(problem.n_q, a, j).T[:, None, :], device=device)  # (J, 1, A)
        shown = xp.asarray(_inside(problem.n_k, c, i)[:, None, :], device=device)  # (C, 1, I)
        if problem.key_mask is not None:
            mask = in_rows(problem.key_mask[..., None], c, i)[..., 0]
            shown = shown & mask[..., None, :]
        mean, left = _first_queries(queries, problem.n_q, c), None
        for _ in range(self.steps):
            if left is not None:
                mean = by_heads_of_blocks(_means, left, queries, real)
            right, beta, entropy = by_heads_of_blocks(_right, mean, keys, shown)
            left = by_heads_of_blocks(_left, beta, entropy, queries)
        assert left is not None  # noqa: S101 - for the type checker: there is a step at least
        shape = (*np.broadcast_shapes(problem.batch_shape, right.shape[:-3]), problem.n_q, problem.n_k)
        return MonarchMatrix(by_heads_of_blocks(xp.exp, left), right, shape, nonnegative=True)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of all Monarch matrices: queries of the same place in their blocks have rank one on a block of keys."""
        _, j, c, i = _sizes(problem.n_q, problem.n_k, self.m)
        blocks = [(slice(row, None, j), slice(b * i, (b + 1) * i)) for row in range(j) for b in range(c)]
        return block_rank_floor(problem, blocks, 1, name="no Monarch matrix")

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """In each step two softmaxes and four products of blocks; then the two products of a Monarch matrix."""
        from sympy import Min, ceiling  # noqa: PLC0415 - SymPy loads with the first formula

        n_q, n_k, d, d_v = costs.symbols_of(problem)
        f, count, i = costs.formulas, costs.Operations, costs.m
        j, c = Min(i, n_q), ceiling(n_k / i)
        a = ceiling(n_q / j)
        inner, outer = c * j * i, j * c * a  # entries of R and of L
        right = count(madd=2 * inner * d, add=inner + c * j, exp=inner + c * j, div=inner, mul=inner, compare=2 * c * j)
        right += f.maximum_of(i, times=c * j) + 2 * f.sum_of(i, times=c * j)
        left = count(madd=outer * d, add=3 * outer, exp=outer + j * a)
        left += f.maximum_of(c, times=j * a) + f.sum_of(c, times=j * a)
        means = count(madd=outer * d, add=outer, exp=outer, div=j * c * d, compare=2 * j * c)
        means += f.maximum_of(a, times=j * c) + f.sum_of(a, times=j * c)
        prepare = self.steps * (right + left) + (self.steps - 1) * means + count(mul=n_q * d, exp=outer)
        return costs.Cost(prepare=prepare, apply=count(madd=(inner + outer) * d_v))


def _sizes(n_q: int, n_k: int, m: int) -> tuple[int, int, int, int]:
    """A blocks of J queries and C blocks of I keys."""
    j = min(m, n_q)
    return -(-n_q // j), j, -(-n_k // m), m


def _inside(n: int, blocks: int, size: int) -> NDArray[np.bool_]:
    """Which slots of the blocks hold a token, (blocks, size)."""
    return np.arange(blocks * size).reshape(blocks, size) < n


def _first_queries(queries: Array, n_q: int, c: int) -> Array:
    """The queries that each block of keys begins with, (..., C, J, d): L = identity, where that names a query.

    Blocks of keys beyond the last block of queries begin with that one, empty slots with a query of the first block.
    """
    xp, (a, j) = namespace(queries), queries.shape[-3:-1]
    block = np.minimum(np.arange(c), a - 1)
    picked = xp.take(queries, xp.asarray(block, device=device_of(queries)), axis=-3)
    real = xp.asarray(_inside(n_q, a, j)[block][..., None], device=device_of(queries))
    return xp.where(real, picked, queries[..., :1, :, :])


def _right(mean: Array, keys: Array, shown: Array) -> tuple[Array, Array, Array]:
    """R (..., C, J, I), β (..., C, J, d) and the entropies (..., C, J, 1), −∞ where a mask hides a whole block."""
    xp = namespace(mean)
    logits = _visible(mean @ xp.matrix_transpose(keys), shown)
    logits -= _finite(xp.max(logits, axis=-1, keepdims=True))
    right = xp.exp(logits)
    total = xp.sum(right, axis=-1, keepdims=True)
    some = total > 0
    total = xp.where(some, total, xp.ones_like(total))
    right /= total
    shift = xp.where(shown, logits, constant(0.0, like=logits))
    entropy = xp.log(total) - xp.sum(right * shift, axis=-1, keepdims=True)
    return right, right @ keys, xp.where(some, entropy, xp.full_like(entropy, -xp.inf))


def _left(beta: Array, entropy: Array, queries: Array) -> Array:
    """log L (..., J, C, A)."""
    xp = namespace(beta)
    logits = swap_blocks(beta) @ xp.matrix_transpose(swap_blocks(queries))
    logits += swap_blocks(entropy)
    logits -= xp.max(logits, axis=-2, keepdims=True)
    logits -= xp.log(xp.sum(xp.exp(logits), axis=-2, keepdims=True))
    return logits


def _means(left: Array, queries: Array, real: Array) -> Array:
    """α/c (..., C, J, d) from log L: weights relative to the largest, so that no block of keys runs out of queries."""
    xp = namespace(left)
    logits = _visible(left, real)
    weights = xp.exp(logits - _finite(xp.max(logits, axis=-1, keepdims=True)))
    total = xp.sum(weights, axis=-1, keepdims=True)
    return swap_blocks(weights @ swap_blocks(queries) / xp.where(total > 0, total, xp.ones_like(total)))


def _visible(logits: Array, shown: Array) -> Array:
    xp = namespace(logits)
    return xp.where(shown, logits, constant(-xp.inf, like=logits))


def _finite(top: Array) -> Array:
    """A shift that can be taken off: 0 where all is hidden."""
    xp = namespace(top)
    return xp.where(top > -xp.inf, top, xp.zeros_like(top))
