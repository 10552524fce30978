"""Hybrid random features: a random weight, itself a product of features, between two estimates of exp(x·y)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from math import log
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final, get_args

from nla_llm import costs
from nla_llm.backend import Array, from_numpy, generator, namespace
from nla_llm.methods.attention.kernels.directions import ENSEMBLES, Directions
from nla_llm.methods.attention.kernels.features import Features, MadeByRows, half_square_norm
from nla_llm.methods.attention.kernels.linear_attention import kernel_attention_cost
from nla_llm.methods.attention.kernels.random_features import RandomFeatures, promises, waves
from nla_llm.methods.registry import Properties, one_of, positive, register, whole_number

if TYPE_CHECKING:
    import numpy as np

    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["HybridFeatures"]

Weight = Literal["angular", "gaussian"]


@register("hybrid_features")
@final
@dataclass(frozen=True)
class HybridFeatures(RandomFeatures):
    """λ̂(x, y) Â⁺(x, y) + (1 − λ̂(x, y)) Âᵗ(x, y), a weighted mean of positive and trigonometric features.

    Both estimates use the same m directions. λ̂ comes from r other directions τ ~ N(0, I), independent of them:

    - ``weight="angular"``: ½ − (1/2r) Σ_j sgn(τ_j·x) sgn(τ_j·y), the share of the τ_j whose hyperplanes separate x and
      y, of mean θ/π, θ the angle between x and y;
    - ``weight="gaussian"``: (1/r) Σ_j cos(σ τ_j·(x + y)), of mean exp(−σ²|x + y|²/2), σ = ``width``.

    A product of features is a feature, so that there are 6rm of them, or (6r + 2)m, and memory to match: two factors of
    as many numbers a token, nothing else of that size. As λ̂ is
    independent of the directions the estimate is unbiased, whatever λ̂ is. Positive features are exact at x = −y,
    trigonometric ones at x = y, and so is the hybrid where λ̂ is exact: at both ends with angular weights, at x = −y
    with Gaussian ones. Entries and row sums may be negative. Where the weight leaves only positive features to a row
    and these underflow beside its trigonometric ones (logits beyond a few hundred), the row is refused.

    Choromanski et al. 2022, arXiv 2110.04367, as we read it: the hybrid of two base estimators with shared directions;
    its angular weight is that of the paper, whose base estimators include complex and hyperbolic ones that are not used
    here. The form of the Gaussian weight with ``width`` and r directions is our reading too.

    Parameters
    ----------
    weight
        'angular' or 'gaussian'.
    r
        Directions of the weight.
    width
        σ of Gaussian weights.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.eye(3)
    >>> P = HybridFeatures(64)(AttentionProblem(q, -q, scale=1.0), rng=0)
    >>> kernel = np.exp(P.row_scale_log)[:, None] * P.op.dense()
    >>> bool(np.allclose(np.diag(kernel), np.exp(-1)))  # exact where y = −x
    True
    """

    _: KW_ONLY
    weight: str = "angular"
    r: int = 1
    width: float = 1.0
    properties: ClassVar[Properties] = replace(promises("hybrid", nonnegative=False), partial=True)
    centre: ClassVar[int] = 0

    def __post_init__(self, orthogonal: bool) -> None:
        super().__post_init__(orthogonal)
        whole_number("r", self.r)
        one_of("weight", self.weight, get_args(Weight))
        positive("width", self.width)

    @property
    def log_factor(self) -> float:
        """Logarithm of 1/(m r)."""
        return -log(self.m * self.r)

    def feature_pair(
        self,
        x: Array,
        y: Array,
        omega: Directions,
        *,
        mask: Array | None = None,
        rng: np.random.Generator | None = None,
    ) -> tuple[MadeByRows, MadeByRows]:
        """Products of the features of the weight with positive and with trigonometric features."""
        del mask
        xp = namespace(x)
        drawn = generator(rng).standard_normal((self.r, x.shape[-1]))
        tau = xp.astype(from_numpy(drawn if self.weight == "angular" else self.width * drawn, like=x), x.dtype)
        tau_t = xp.matrix_transpose(tau)
        angular = self.weight == "angular"
        combine, width = (_separated, 6 * self.r) if angular else (_waves_of_weight, 6 * self.r + 2)

        def by_rows(tokens: Array, *, of_queries: bool) -> MadeByRows:
            parts = tokens, omega.project(tokens), tokens @ tau_t

            def make(start: int, stop: int) -> Features:
                return combine(*(part[..., start:stop, :] for part in parts), of_queries=of_queries)

            return MadeByRows((*tokens.shape[:-1], width * self.m), make, zeros=0.5 if angular else 0.0)

        return by_rows(x, of_queries=True), by_rows(y, of_queries=False)

    def theory(self, problem: AttentionProblem) -> Theory | None:
        """Mean and, with i.i.d. directions, variance of the entries before the division by row sums."""
        from nla_llm.theory.exponential_features import hybrid_theory  # noqa: PLC0415 - SciPy loads there

        if not ENSEMBLES[self.directions].gaussian:
            return None
        x, y = self._scaled(problem)
        ensemble, weight = self.directions, self.weight
        return hybrid_theory(x, y, m=self.m, directions=ensemble, weight=weight, r=self.r, width=self.width)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """As for the other functions, and the directions of the weight."""
        return super().cost(problem) + costs.Cost(prepare=costs.Operations(draw=self.r * costs.d))

    def _kernel_cost(self, problem: AttentionProblem) -> costs.Cost:  # type: ignore[override]
        n_q, n_k, d, _ = costs.symbols_of(problem)
        r, m, tokens = self.r, costs.m, n_q + n_k
        if self.weight == "angular":
            own = costs.Operations(compare=r, add=2 * r * m) * tokens
            features = 6 * r * m
        else:
            own = costs.Operations(exp=2 * r, mul=2 * m * (2 * r + 1)) * tokens + costs.Operations(mul=n_q)
            features = (6 * r + 2) * m
        shared = costs.Operations(exp=2 * m, add=m, mul=1) * tokens + costs.formulas.matmul(tokens, d, r)
        return costs.Cost(prepare=own + shared) + kernel_attention_cost(
            problem, features, log_width=features, amplitude=True, row=True
        )


def _separated(x: Array, projection: Array, side: Array, *, of_queries: bool) -> Features:
    """Each feature twice for each τ, for one side of its hyperplane: elsewhere it is zero, and its log −inf.

    Positive features of one side meet those of the other, trigonometric ones those of their own; nothing cancels.
    """
    xp = namespace(x)
    m, r = projection.shape[-1], side.shape[-1]
    zero = xp.zeros_like(side)
    beyond = xp.full_like(side, -xp.inf)
    above = side >= 0
    own = xp.concat([xp.where(above, zero, beyond), xp.where(above, beyond, zero)], axis=-1)  # (..., n, 2r)
    other = own if of_queries else xp.concat([own[..., r:], own[..., :r]], axis=-1)
    half, wave = half_square_norm(x), waves(projection)
    log_positive = _flat(other[..., None] + (projection - 2.0 * half)[..., None, :])
    log_wave = _flat(xp.broadcast_to(own[..., None], (*own.shape, 2 * m)))
    amplitudes = [xp.ones_like(log_positive)] + [wave] * (2 * r)
    logs = [log_positive, log_wave]
    return Features(xp.concat(amplitudes, axis=-1), xp.concat(logs, axis=-1), row=half)


def _waves_of_weight(x: Array, projection: Array, angle: Array, *, of_queries: bool) -> Features:
    """Each positive feature times cosine and sine of each τ; each trigonometric one times these and times one."""
    xp = namespace(x)
    m, r = projection.shape[-1], angle.shape[-1]
    weight, one = waves(angle), xp.ones_like(angle[..., :1])
    rest = weight
    if of_queries:  # r λ̂ = Σ (cos cos − sin sin), and r (1 − λ̂) = r − r λ̂
        weight = xp.concat([weight[..., :r], -weight[..., r:]], axis=-1)
        rest, one = -weight, float(r) * one
    rest = xp.concat([one, rest], axis=-1)
    half, wave = half_square_norm(x), waves(projection)
    positive = _flat(xp.broadcast_to(weight[..., None], (*weight.shape, m)))
    trigonometric = _flat(rest[..., None] * wave[..., None, :])
    logs = [projection - 2.0 * half] * (2 * r) + [xp.zeros_like(trigonometric)]
    return Features(xp.concat([positive, trigonometric], axis=-1), xp.concat(logs, axis=-1), row=half)


def _flat(a: Array) -> Any:
    """The last two axes as one."""
    return namespace(a).reshape(a, (*a.shape[:-2], a.shape[-2] * a.shape[-1]))
