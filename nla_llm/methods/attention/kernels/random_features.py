"""Random features for exp(q·k): a feature function composed with an ensemble of directions.

With x = √scale q and y = √scale k every function here satisfies E φ(x)·φ(y) = exp(x·y) for directions ω ~ N(0, I),
and its variance is known in closed form (:mod:`nla_llm.theory.random_features`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, InitVar, dataclass, replace
from math import log
from typing import TYPE_CHECKING, ClassVar, Literal, final

from nla_llm import costs
from nla_llm.backend import Array, by_heads, generator, namespace
from nla_llm.methods.attention.kernels.directions import ENSEMBLES, Directions, check_ensemble, draw_directions
from nla_llm.methods.attention.kernels.features import (
    Features,
    MadeByRows,
    half_square_norm,
    half_square_norm_cost,
)
from nla_llm.methods.attention.kernels.linear_attention import (
    CHUNK,
    kernel_attention,
    kernel_attention_cost,
)
from nla_llm.methods.registry import Properties, Unsupported, register, require, settle, switch, whole_number

if TYPE_CHECKING:
    import numpy as np

    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["HyperbolicFeatures", "PositiveFeatures", "RandomFeatures", "TrigonometricFeatures"]


@dataclass(frozen=True)
class RandomFeatures(ABC):
    """What the feature functions share: the draw of directions, recentring, normalisation.

    Parameters
    ----------
    m
        Number of directions drawn. Trigonometric and hyperbolic functions make two features of each.
    directions
        Name of an ensemble: with 'iid', 'orthogonal', 'simplex' or 'sobol' the kernel is unbiased; with 'regularised',
        'hadamard' or 'hadamard1' it is not: they estimate another kernel, whatever m.
    orthogonal
        ``orthogonal=True`` is short for ``directions="orthogonal"``.
    recentre
        Shift all keys by one constant, which leaves softmax unchanged, to where the exponent of the variance is least
        in the mean: by −mean(k) − mean(q) for functions whose variance grows with |x + y|², which drops by exactly
        |mean(x) + mean(y)|² in the mean, by −mean(k) + mean(q) for trigonometric ones and random phases, whose variance
        grows with |x − y|², and by −mean(k) for hybrid ones, which have both. It looks at all keys, so there is no
        causal form.
    """

    m: int
    _: KW_ONLY
    directions: str = "iid"
    recentre: bool = False
    orthogonal: InitVar[bool] = False

    def __post_init__(self, orthogonal: bool) -> None:
        settle(self)
        whole_number("m", self.m)
        switch("orthogonal", orthogonal)
        if orthogonal:
            if self.directions not in {"iid", "orthogonal"}:
                raise ValueError(f"orthogonal=True and directions={self.directions!r} contradict each other; pass one")
            object.__setattr__(self, "directions", "orthogonal")
        check_ensemble(self.directions)
        promised = type(self).properties  # from which those of this object may differ
        if self.recentre:
            promised = replace(promised, shift_invariant=True, supports=promised.supports - {"causal"})
        if not ENSEMBLES[self.directions].gaussian:
            target = f"kernel of {self.directions} directions"
            promised = replace(promised, unbiased=False, converges=False, target=target)
        if promised is not type(self).properties:
            object.__setattr__(self, "properties", promised)

    features_per_direction: ClassVar[int] = 1
    centre: ClassVar[int] = -1  # mean of recentred keys over that of queries: where mean |x + y|² or |x − y|² is least
    chunk: ClassVar[int] = CHUNK
    properties: ClassVar[Properties]
    function: ClassVar[Literal["positive", "hyperbolic", "trigonometric"]]

    @staticmethod
    def features(x: Array, projection: Array) -> Features:
        """Features of x (..., n, d) from its projections ω·x (..., n, m), without the factor m^(-1/2)."""
        raise NotImplementedError  # by a function that has a feature_pair of its own

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator diag(Â 1)⁻¹ Â with Â_ij = φ(x_i)·φ(y_j); the same directions serve all heads."""
        require(self, problem)
        x, y = self._scaled(problem)
        source = generator(rng)
        omega = draw_directions(self.directions, self.m, problem.d, source, like=x)
        queries, keys = self.feature_pair(x, y, omega, mask=problem.key_mask, rng=source)
        return kernel_attention(
            problem,
            queries,
            keys,
            log_factor=self.log_factor,
            nonnegative=self.properties.nonnegative,
            overwrite=True,
        )

    @property
    def log_factor(self) -> float:
        """Logarithm of the factor of the sum over all features, which makes it a mean over directions."""
        return -log(self.m * self.features_per_direction)

    def feature_pair(
        self,
        x: Array,
        y: Array,
        omega: Directions,
        *,
        mask: Array | None = None,
        rng: np.random.Generator | None = None,
    ) -> tuple[Features | MadeByRows, Features | MadeByRows]:
        """Features of queries and of keys.

        A function whose parameters come from the data overrides this and looks at the keys that ``mask`` shows; one
        that draws more than directions draws it from ``rng``.
        """
        del mask, rng
        return self.features(x, omega.project(x)), self.features(y, omega.project(y))

    def theory(self, problem: AttentionProblem) -> Theory | None:
        """Mean and, where it is known, variance of the entries of Â before the division by row sums."""
        from nla_llm.theory import kernel_theory  # noqa: PLC0415 - SciPy loads there

        x, y = self._scaled(problem)
        return kernel_theory(x, y, scale=1.0, features=self.function, m=self.m, directions=self.directions)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Directions, scaled inputs, their projections and norms, the features; then a kernel of m or 2m features."""
        n_q, n_k, d, _ = costs.symbols_of(problem)
        ensemble, tokens = ENSEMBLES[self.directions], n_q + n_k
        drawn = ensemble.draw_cost(costs.m, d) + ensemble.project_cost(tokens, costs.m, d)
        inputs = costs.Operations(mul=tokens * d) + self._recentre_cost(problem)
        return costs.Cost(prepare=drawn + inputs + self._norms_cost(problem)) + self._kernel_cost(problem)

    @staticmethod
    def _norms_cost(problem: AttentionProblem) -> costs.Operations:
        """½|x|² of every token."""
        n_q, n_k, d, _ = costs.symbols_of(problem)
        return half_square_norm_cost(n_q + n_k, d)

    @staticmethod
    @abstractmethod
    def _kernel_cost(problem: AttentionProblem) -> costs.Cost:
        """Cost of ``features`` from projections and norms, and of the kernel attention that follows."""

    def _recentre_cost(self, problem: AttentionProblem) -> costs.Operations:
        """Two means and two shifts of the keys, or one of each where the centre is zero."""
        if not self.recentre:
            return costs.Operations()
        n_q, n_k, d, _ = costs.symbols_of(problem)
        sum_of = costs.formulas.sum_of
        means = sum_of(n_k, times=d) + costs.Operations(div=d, add=n_k * d)
        if problem.key_mask is not None:  # weighted by the mask over its sum
            means += costs.Operations(mul=n_k * d, div=n_k - d) + sum_of(n_k)
        return means + (
            sum_of(n_q, times=d) + costs.Operations(div=d, add=n_k * d) if self.centre else costs.Operations()
        )

    def _scaled(self, problem: AttentionProblem) -> tuple[Array, Array]:
        """x and y with x·y equal to the logits, up to a constant of each row where the keys are recentred."""
        x, y = problem.scaled_inputs()
        if not self.recentre:
            return x, y
        if problem.causal:
            raise Unsupported("recentre=True shifts keys by the mean of all of them, which a causal method may not see")
        moved = y - mean_of_tokens(y, problem.key_mask)
        if not self.centre:
            return x, moved
        return x, moved + mean_of_tokens(x, None) if self.centre > 0 else moved - mean_of_tokens(x, None)


def mean_of_tokens(x: Array, mask: Array | None) -> Array:
    """Mean over the visible tokens of x (..., n, c): an array (..., 1, c)."""
    xp = namespace(x)
    if mask is None:
        return xp.mean(x, axis=-2, keepdims=True)
    weights = xp.astype(mask, x.dtype)[..., None]
    return xp.sum(weights / xp.sum(weights, axis=-2, keepdims=True) * x, axis=-2, keepdims=True)


def waves(angle: Array) -> Array:
    """Cosines, then sines, along the last axis."""
    xp = namespace(angle)
    return xp.concat([xp.cos(angle), xp.sin(angle)], axis=-1)


def promises(family: str, *, nonnegative: bool) -> Properties:
    """What unbiased random features promise."""
    return Properties(
        family=family,
        budget="m",
        converges=True,
        unbiased=True,
        deterministic=False,
        nonnegative=nonnegative,
        supports=frozenset({"causal", "key_mask"}),
    )


@register("positive_features")
@final
@dataclass(frozen=True)
class PositiveFeatures(RandomFeatures):
    """φ(x) = m^(-1/2) exp(ω·x − |x|²/2), the positive features of FAVOR+.

    Choromanski et al. 2021, arXiv 2009.14794, Lemma 1. Unbiased, E φ(x)·φ(y) = exp(x·y);
    relative variance (exp(|x+y|²) − 1)/m with i.i.d. directions (Lemma 2).

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = 0.1 * np.eye(3)
    >>> P = PositiveFeatures(64, orthogonal=True)(AttentionProblem(q, q), rng=0)
    >>> P.shape, P.nonnegative
    ((3, 3), True)
    """

    properties: ClassVar[Properties] = promises("positive", nonnegative=True)
    function = "positive"

    @staticmethod
    def features(x: Array, projection: Array) -> Features:
        """One exponential for each direction."""
        return Features(log=projection, row=-half_square_norm(x))

    @staticmethod
    def _kernel_cost(problem: AttentionProblem) -> costs.Cost:
        return kernel_attention_cost(problem, costs.m, log_width=costs.m, row=True)


@register("hyperbolic_features")
@final
@dataclass(frozen=True)
class HyperbolicFeatures(RandomFeatures):
    """φ(x) = (2m)^(-1/2) exp(−|x|²/2) [exp(ω·x), exp(−ω·x)] (Choromanski et al. 2021, arXiv 2009.14794, Lemma 1).

    Unbiased; relative variance (cosh |x+y|² − 1)/m with i.i.d. directions (Lemma 2).

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = 0.1 * np.eye(3)
    >>> HyperbolicFeatures(64)(AttentionProblem(q, q), rng=0).nonnegative
    True
    """

    properties: ClassVar[Properties] = promises("hyperbolic", nonnegative=True)
    function = "hyperbolic"
    features_per_direction: ClassVar[int] = 2

    @staticmethod
    def features(x: Array, projection: Array) -> Features:
        """Two exponentials for each direction."""
        return Features(log=namespace(x).concat([projection, -projection], axis=-1), row=-half_square_norm(x))

    @staticmethod
    def _kernel_cost(problem: AttentionProblem) -> costs.Cost:
        return kernel_attention_cost(problem, 2 * costs.m, log_width=2 * costs.m, row=True)


@register("trigonometric_features")
@final
@dataclass(frozen=True)
class TrigonometricFeatures(RandomFeatures):
    """φ(x) = m^(-1/2) exp(|x|²/2) [cos ω·x, sin ω·x] for x of norm |x|.

    Rahimi and Recht 2007; for softmax Choromanski et al. 2021, arXiv 2009.14794, eq. 4. Unbiased;
    relative variance exp(|x−y|²)(1 − exp(−|x−y|²))²/(2m) with i.i.d. directions (Lemma 2). Entries and even row sums
    may be negative; the share of negative row sums is reported by the operator.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = 0.1 * np.eye(3)
    >>> P = TrigonometricFeatures(64)(AttentionProblem(q, q), rng=0)
    >>> P.nonnegative, bool(abs(P.dense() - 1 / 3).max() < 0.1)
    (False, True)
    """

    properties: ClassVar[Properties] = promises("trigonometric", nonnegative=False)
    function = "trigonometric"
    centre: ClassVar[int] = 1

    @staticmethod
    def features(x: Array, projection: Array) -> Features:
        """A cosine and a sine for each direction, with the norm as a logarithmic scale of the row."""
        return Features(amplitude=by_heads(waves, projection), row=half_square_norm(x))

    @staticmethod
    def _kernel_cost(problem: AttentionProblem) -> costs.Cost:
        n_q, n_k, _, _ = costs.symbols_of(problem)
        cosines = costs.Operations(exp=(n_q + n_k) * 2 * costs.m)
        return costs.Cost(prepare=cosines) + kernel_attention_cost(problem, 2 * costs.m, amplitude=True, row=True)
