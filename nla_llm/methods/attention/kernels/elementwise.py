"""Feature maps entry by entry: elu + 1 and relu. They replace the kernel of softmax by another one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, final

from nla_llm import costs
from nla_llm.backend import Array, by_heads, constant, namespace
from nla_llm.methods.attention.floors import rank_floor
from nla_llm.methods.attention.kernels.linear_attention import CHUNK, Features, kernel_attention, kernel_attention_cost
from nla_llm.methods.registry import Properties, register, require

if TYPE_CHECKING:
    import numpy as np

    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["EluFeatures", "ReluFeatures"]


@register("elu_features")
@final
@dataclass(frozen=True)
class EluFeatures:
    """Linear attention with φ(x) = elu(x) + 1, entry by entry (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7).

    Replaces softmax by another kernel: it does not converge to it. As published, the scale of the logits is not used.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.eye(3)
    >>> EluFeatures()(AttentionProblem(q, q)).row_sums().tolist()
    [1.0, 1.0, 1.0]
    """

    properties: ClassVar[Properties] = Properties(
        family="elu", target="elu kernel", nonnegative=True, supports=frozenset({"causal", "key_mask"})
    )
    chunk: ClassVar[int] = CHUNK

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of linear attention."""
        require(self, problem)
        queries, keys = (Features(by_heads(_elu_plus_one, x)) for x in (problem.q, problem.k))
        return kernel_attention(problem, queries, keys, nonnegative=True)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of its rank, d: whatever the method puts into it."""
        return rank_floor(problem, problem.d)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Features by two comparisons, an exponential and an addition an entry; then a kernel of d features."""
        n_q, n_k, d, _ = costs.symbols_of(problem)
        features = (n_q + n_k) * d * costs.Operations(compare=2, exp=1, add=1)
        return costs.Cost(prepare=features) + kernel_attention_cost(problem, d)


@register("relu_features")
@final
@dataclass(frozen=True)
class ReluFeatures:
    """Linear attention with φ(x) = max(x, 0) (the generalised attention of Choromanski et al. 2021, arXiv 2009.14794).

    A query that shares no positive coordinate with any visible key has no weights; such data are refused with
    :class:`~nla_llm.operators.ZeroRowSumError` rather than patched with an epsilon.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.array([[1.0, 1.0], [0.0, 2.0]])
    >>> ReluFeatures()(AttentionProblem(q, q)).dense().tolist()
    [[0.5, 0.5], [0.3333333333333333, 0.6666666666666666]]
    """

    properties: ClassVar[Properties] = Properties(
        family="relu", target="relu kernel", nonnegative=True, partial=True, supports=frozenset({"causal", "key_mask"})
    )
    chunk: ClassVar[int] = CHUNK

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of linear attention."""
        require(self, problem)
        queries, keys = (Features(by_heads(_relu, x)) for x in (problem.q, problem.k))
        return kernel_attention(problem, queries, keys, nonnegative=True)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of its rank, d: whatever the method puts into it."""
        return rank_floor(problem, problem.d)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Features by one comparison an entry; then a kernel of d features."""
        n_q, n_k, d, _ = costs.symbols_of(problem)
        return costs.Cost(prepare=costs.Operations(compare=(n_q + n_k) * d)) + kernel_attention_cost(problem, d)


def _elu_plus_one(x: Array) -> Array:
    """1 + x for x > 0 and exp(x) otherwise; the exponential only ever sees the negative part."""
    xp = namespace(x)
    zero = constant(0.0, like=x)
    features = xp.exp(xp.minimum(x, zero))
    features += xp.maximum(x, zero)
    return features


def _relu(x: Array) -> Array:
    return namespace(x).maximum(x, constant(0.0, like=x))
