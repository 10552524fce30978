"""HyperAttention: blocks of tokens that hash alike are taken exactly, the rest from a sample of the keys."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from math import log
from typing import TYPE_CHECKING, ClassVar, final

from nla_llm import costs
from nla_llm.backend import Array, constant, device_of, from_numpy, generator, namespace
from nla_llm.methods.attention.sampled.samples import (
    draw_without_replacement,
    draw_without_replacement_cost,
    exponentials,
    logits_on_sample,
    logits_on_sample_cost,
)
from nla_llm.methods.registry import Properties, register, require, settle, whole_number
from nla_llm.operators import Dense, Product, RowNormalised, SortedBlocks, Sum
from nla_llm.operators.sorted_blocks import cut_into_blocks, in_blocks

if TYPE_CHECKING:
    import numpy as np

    from nla_llm.operators import Operator, Selection
    from nla_llm.operators.sorted_blocks import Sorting
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["HyperAttention", "bucket_order"]


@register("hyper_attention")
@final
@dataclass(frozen=True)
class HyperAttention:
    """Blocks of queries and keys with like hashes exactly, all other pairs from a uniform sample of the keys.

    Han, Jayaram, Karbasi, Mirrokni, Woodruff and Zandieh 2023, arXiv 2310.05869, Algorithms 1 (sortLSH) and 3, with the
    uniform sampling of its experiments. Tokens are hashed by the signs of ``bits`` Gaussian projections and sorted in
    Gray-code order of the signs, in which neighbouring buckets differ by one sign; the sorted queries and keys are cut
    into ⌈n_k/b⌉ blocks each, of sizes that differ by one at most. A sampled key counts n/s where it is outside the
    block of the query and nothing inside, so no pair counts twice:

        Â_ij = A_ij [same block] + (n/s) A_ij [j sampled] [another block].

    Both parts share the scale of a row, so that they add without overflow or epsilon; the caps of Algorithm 2, which
    serve the proof, are left out. Unbiased, E Â = A, for any hashes; the relative variance of an entry outside the
    blocks is n/s − 1 (drawn without replacement). Where hashes find nothing, half of the budget is lost.

    The guarantee of the paper, an error below ε ‖P‖ ‖V‖ in the spectral norm, has unnamed constants, so no bound can be
    drawn from it. There is no causal form: in the published recursion on halves, queries are sorted among later ones,
    which thereby decide with which keys an earlier query shares a block.

    Parameters
    ----------
    m
        Keys that a query meets: ⌊m/2⌋ (at least one) in its block and s = ⌈m/2⌉ sampled, equal parts as published. For
        m ≥ 2 n_k the one block holds everything, and the result is exact.
    bits
        Signs in a hash.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.repeat(8 * np.eye(2), 3, axis=0)  # two clusters of three tokens
    >>> problem = AttentionProblem(q, q)
    >>> error = (problem.exact() - HyperAttention(6)(problem, rng=0)).dense()
    >>> bool(abs(error).max() < 1e-8)
    True
    """

    m: int
    _: KW_ONLY
    bits: int = 7
    properties: ClassVar[Properties] = Properties(
        family="hyper", budget="m", converges=True, unbiased=True, nonnegative=True, deterministic=False,
        permutation_equivariant=False, supports=frozenset({"key_mask"}),
        refusals={"causal": "in the published recursion later queries decide which keys an earlier one meets exactly"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        whole_number("bits", self.bits)
        if self.bits > 30:
            raise ValueError(f"bits must be at most 30, so that buckets have numbers, got {self.bits}")

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator; the same projections serve all heads, the same sample all heads with the same mask."""
        require(self, problem)
        rng, xp = generator(rng), problem.xp
        queries, keys = self._sortings(problem, rng)
        sample = draw_without_replacement(problem, min(-(-self.m // 2), problem.n_k), rng)

        logits = _block_logits(problem, queries, keys)  # (..., B, w_q, w_k)
        elsewhere = _elsewhere(queries, keys, sample)
        rest = logits_on_sample(problem, sample, log_weight=_log_weight(problem, sample), visible=elsewhere)

        top = xp.maximum(_by_query(xp.max(logits, axis=-1), queries), xp.max(rest, axis=-1))
        blocks, _ = exponentials(logits, _by_slot(top, queries, logits.shape[-3]))
        weights, _ = exponentials(rest, top)
        kernel = Sum(
            SortedBlocks(blocks, queries, keys, nonnegative=True), Product(Dense(weights, nonnegative=True), sample)
        )
        return RowNormalised(kernel, row_scale_log=top)

    def _sortings(self, problem: AttentionProblem, rng: np.random.Generator) -> tuple[Sorting, Sorting]:
        """Queries and keys by the hashes of the same projections; masked keys have no block."""
        q, k = problem.q, problem.k
        omega = from_numpy(rng.standard_normal((problem.d, self.bits)), like=q, dtype=q.dtype)
        count = -(-problem.n_k // max(1, self.m // 2))
        toward = q if problem.scale >= 0 else -q  # a large logit is a small angle
        queries = cut_into_blocks(bucket_order(toward @ omega), count, None, like=q)
        return queries, cut_into_blocks(bucket_order(k @ omega), count, problem.key_mask, like=k)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Mean one, and the relative variance of an entry outside the blocks as a bound for all."""
        from nla_llm.theory.sampling import without_replacement_bound  # noqa: PLC0415 - loaded only where it is used

        shape = (*problem.batch_shape, problem.n_q, problem.n_k)
        return without_replacement_bound(problem.n_k, min(-(-self.m // 2), problem.n_k), shape)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Hashes, the draw, logits and exponentials of blocks and sample (empty slots included), two products."""
        import sympy  # noqa: PLC0415 - loads only where a cost is asked for

        n_q, n_k, d, d_v = costs.symbols_of(problem)
        f, tokens, bits = costs.formulas, n_q + n_k, sympy.Symbol("bits")
        count = sympy.ceiling(n_k / sympy.Max(1, sympy.floor(costs.m / 2)))
        rows, width = count * sympy.ceiling(n_q / count), sympy.ceiling(n_k / count)
        s = sympy.Min(sympy.ceiling(costs.m / 2), n_k)
        signs = f.matmul(tokens, d, bits) + costs.Operations(compare=tokens * bits, draw=d * bits)
        blocks = costs.Operations(mul=n_q * d) + f.matmul(rows, d, width) + f.maximum_of(width, times=rows)
        rest = logits_on_sample_cost(problem, s, weighted=True) + f.maximum_of(s, times=n_q)
        weight = costs.Operations() if problem.key_mask is None else costs.Operations(div=1, exp=1)
        pairs = rows * width + n_q * s
        shifted = costs.Operations(compare=n_q, add=pairs, exp=pairs)
        products = costs.Operations(madd=pairs, add=n_q)
        return costs.Cost(
            prepare=signs + draw_without_replacement_cost(n_k) + blocks + rest + weight + shifted
            + products + costs.Operations(compare=2 * n_q),
            apply=d_v * products + costs.Operations(div=n_q * d_v),
        )  # fmt: skip


# -- sorting -----------------------------------------------------------------------------------------------------------


def bucket_order(projection: Array) -> Array:
    """Place of each token's bucket in Gray-code order, (..., n), from its projections (..., n, bits).

    The signs of the projections are the digits of a Gray code word; its place is the number whose digit i is the parity
    of the digits of the word from i upwards. Neighbouring places differ by one sign.

    Examples
    --------
    >>> import numpy as np
    >>> words = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])  # the first digit is the lowest
    >>> bucket_order(words).tolist()
    [0, 1, 2, 3]
    """
    xp = namespace(projection)
    word = xp.astype(projection > 0, xp.int32)
    digits = xp.flip(xp.cumulative_sum(xp.flip(word, axis=-1), axis=-1), axis=-1) % 2
    place = 2 ** xp.arange(word.shape[-1], dtype=xp.int32, device=device_of(projection))
    return xp.sum(xp.astype(digits, xp.int32) * place, axis=-1, dtype=xp.int32)


# -- the two parts -----------------------------------------------------------------------------------------------------


def _block_logits(problem: AttentionProblem, queries: Sorting, keys: Sorting) -> Array:
    """Logits within blocks, (..., B, w_q, w_k), −∞ at empty slots."""
    xp, count = problem.xp, keys.filled.shape[-2]
    q = in_blocks(queries.token.gather(problem.scale * problem.q), count)
    k = in_blocks(keys.token.gather(problem.k), count)
    logits = q @ xp.matrix_transpose(k)
    both = queries.filled[..., :, None] & keys.filled[..., None, :]
    return xp.where(both, logits, constant(-xp.inf, like=logits))


def _elsewhere(queries: Sorting, keys: Sorting, sample: Selection) -> Array:
    """Which sampled keys are visible and in another block than the query, (..., n_q, s)."""
    block = sample.gather(keys.block[..., None])[..., 0][..., None, :]
    return (block != queries.block[..., :, None]) & (block >= 0)


def _log_weight(problem: AttentionProblem, sample: Selection) -> Array | float:
    """log n'/s', n' being the visible keys and s' those of the sample: a number, or (..., 1, 1) with a mask."""
    s = sample.shape[-2]
    if problem.key_mask is None:
        return log(problem.n_k / s)
    xp, dtype = problem.xp, problem.q.dtype
    left = xp.sum(xp.astype(problem.key_mask, xp.int64), axis=-1, keepdims=True)[..., None]
    drawn = xp.where(left < s, left, xp.full_like(left, s))
    return xp.log(xp.astype(left, dtype) / xp.astype(drawn, dtype))


def _by_query(x: Array, queries: Sorting) -> Array:
    """(..., B, w_q) as (..., n_q)."""
    return queries.slot.gather(namespace(x).reshape(x, (*x.shape[:-2], -1, 1)))[..., 0]


def _by_slot(x: Array, queries: Sorting, count: int) -> Array:
    """(..., n_q) as (..., B, w_q)."""
    y = queries.token.gather(x[..., None])[..., 0]
    return namespace(y).reshape(y, (*y.shape[:-1], count, -1))
