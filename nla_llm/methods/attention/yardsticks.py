"""What every approximation is compared with: doing nothing, and the best possible of a given rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, device_of, generator, namespace, to_numpy
from nla_llm.methods.attention.floors import squared_norm
from nla_llm.methods.attention.kernels.linear_attention import CHUNK, Features, kernel_attention, kernel_attention_cost
from nla_llm.methods.attention.sampled.samples import (
    draw_without_replacement,
    draw_without_replacement_cost,
    exponentials,
    exponentials_cost,
    logits_on_sample,
    logits_on_sample_cost,
    visible_in_sample,
)
from nla_llm.methods.registry import Properties, register, require, settle, whole_number
from nla_llm.operators import Dense, LowRank, Operator, Product

if TYPE_CHECKING:
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["OptimalRank", "RandomKeys", "Uniform"]


@register("uniform")
@final
@dataclass(frozen=True)
class Uniform:
    """Every query attends equally to all keys that it sees: the mean of v. Doing nothing.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.zeros((2, 1))
    >>> Uniform()(AttentionProblem(q, q)).dense().tolist()
    [[0.5, 0.5], [0.5, 0.5]]
    """

    properties: ClassVar[Properties] = Properties(
        family="uniform", target="mean", nonnegative=True, shift_invariant=True, yardstick=True,
        supports=frozenset({"causal", "key_mask"}),
    )  # fmt: skip
    chunk: ClassVar[int] = CHUNK

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of rank one, its lower triangle where the problem is causal."""
        require(self, problem, any_size=True)
        queries, keys = Features(_column_of_ones(problem.q)), Features(_column_of_ones(problem.k))
        return kernel_attention(problem, queries, keys, nonnegative=True)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Error in the Frobenius norm, from that of the exact matrix and the number of keys that each query sees."""
        from nla_llm.theory.yardsticks import uniform_theory  # noqa: PLC0415 - SciPy loads there

        exact = problem.exact()
        mask = np.ones(problem.n_k, bool) if problem.key_mask is None else to_numpy(problem.key_mask)
        seen = np.cumsum(mask, axis=-1) if problem.causal else np.sum(mask, axis=-1, keepdims=True)
        seen = np.broadcast_to(seen, (*seen.shape[:-1], problem.n_q))
        return uniform_theory(lambda: squared_norm(exact), seen, exact.shape)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """A kernel of one feature."""
        return kernel_attention_cost(problem, 1)


@register("random_keys")
@final
@dataclass(frozen=True)
class RandomKeys:
    """Softmax over m keys drawn uniformly without replacement: what the same budget buys without any idea.

    In the causal form the first key always belongs to the sample, since the first query sees no other. Masked keys are
    drawn last. The same sample serves all heads with the same mask.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.zeros((4, 1))
    >>> sorted(RandomKeys(2)(AttentionProblem(q, q), rng=0).dense()[0].tolist())
    [0.0, 0.0, 0.5, 0.5]
    """

    m: int
    properties: ClassVar[Properties] = Properties(
        family="random keys", target="mean", budget="m", nonnegative=True, deterministic=False, shift_invariant=True,
        permutation_equivariant=False, yardstick=True, supports=frozenset({"causal", "key_mask"}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of rank m: softmax on the sample, times the selection of the sample."""
        require(self, problem)
        if self.m > problem.n_k:
            raise ValueError(
                f"m={self.m} keys cannot be drawn without replacement from n_k={problem.n_k}; pass m <= n_k"
            )
        sample = draw_without_replacement(problem, self.m, generator(rng))
        weights, _ = exponentials(logits_on_sample(problem, sample, visible=visible_in_sample(problem, sample)))
        weights /= problem.xp.sum(weights, axis=-1, keepdims=True)  # a fresh array
        return Product(Dense(weights, nonnegative=True), sample)

    def theory(self, problem: AttentionProblem) -> Theory | None:
        """Root mean square error in the Frobenius norm, by quadrature; None where a query does not see all keys."""
        from nla_llm.theory.yardsticks import random_keys_theory  # noqa: PLC0415 - SciPy loads there

        if problem.causal or problem.key_mask is not None:
            return None
        exact = problem.exact()
        return random_keys_theory(lambda: to_numpy(exact.dense()), self.m, exact.shape)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """The draw, sorted; softmax on m keys, hidden ones computed and thrown away; a product with m rows of v."""
        n_q, n_k, _, d_v = costs.symbols_of(problem)
        m, f = costs.m, costs.formulas
        logits = logits_on_sample_cost(problem, m, weighted=False)
        softmax = exponentials_cost(n_q, m) + f.sum_of(m, times=n_q) + costs.Operations(div=n_q * m)
        draw = draw_without_replacement_cost(n_k)
        return costs.Cost(prepare=draw + logits + softmax, apply=f.matmul(n_q, m, d_v))


@register("optimal_rank")
@final
@dataclass(frozen=True)
class OptimalRank:
    """The best matrix of rank m in every unitarily invariant norm: the truncated singular value decomposition of P.

    Eckart and Young 1936, Mirsky 1960. Not a method but a floor: it costs more than what it replaces. Computed in
    float64 from the exact matrix, densely up to n = 2048 and by block Krylov iteration beyond.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> problem = AttentionProblem(np.diag([9.0, 9.0, 0.0]), np.eye(3))
    >>> error = problem.exact() - OptimalRank(2)(problem)
    >>> s = np.linalg.svd(problem.exact().dense(), compute_uv=False)
    >>> bool(np.isclose(np.linalg.norm(error.dense(), 2), s[2]))
    True
    """

    m: int
    properties: ClassVar[Properties] = Properties(
        family="optimal rank", budget="m", converges=True, row_stochastic=False, shift_invariant=True, yardstick=True,
        supports=frozenset({"causal", "window", "key_mask", "bias"}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of class LowRank."""
        require(self, problem, any_size=True)  # float64 in any case
        if self.m > min(problem.n_q, problem.n_k):
            raise ValueError(
                f"m={self.m} exceeds the dimensions of the matrix, {problem.n_q} x {problem.n_k}; pass a smaller m"
            )
        exact = problem.exact()
        xp = problem.xp
        if max(problem.n_q, problem.n_k) <= 2048:
            u, s, vt = xp.linalg.svd(exact.dense(), full_matrices=False)
            v = xp.matrix_transpose(vt)
        else:
            from nla_llm.linalg import truncated_svd  # noqa: PLC0415 - floor 1, loaded only where it is used

            u, s, v = truncated_svd(exact, self.m, rng=0 if rng is None else rng)
        m = self.m
        return LowRank(u[..., :, :m] * s[..., None, :m], v[..., :, :m])

    def theory(self, problem: AttentionProblem) -> Theory:
        """Error in every unitarily invariant norm, from the singular values of the exact matrix."""
        from nla_llm.theory.yardsticks import eckart_young_theory  # noqa: PLC0415 - SciPy loads there

        exact = problem.exact()
        return eckart_young_theory(to_numpy(exact.xp.linalg.svdvals(exact.dense())), self.m, exact.shape)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """The exact matrix and its dense decomposition, also where Krylov replaces it; a product of rank m."""
        n_q, n_k, _, d_v = costs.symbols_of(problem)
        f, m = costs.formulas, costs.m
        matrix = f.softmax_weights(problem) + costs.Operations(div=costs.symbols.visible_pairs(problem))
        factors = f.svd(n_q, n_k) + costs.Operations(mul=n_q * m)
        return costs.Cost(prepare=matrix + factors, apply=f.LowRankShape(n_q, n_k, m).apply(d_v))


def _column_of_ones(x: Array) -> Array:
    xp = namespace(x)
    return xp.ones((*x.shape[:-1], 1), dtype=x.dtype, device=device_of(x))
