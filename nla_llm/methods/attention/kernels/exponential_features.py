"""Random features with parameters from the data: generalised exponential features and their relatives.

With ρ > 0, A = (1 − 1/ρ)/8 and directions ω ~ N(0, I) the features

    φ(x) = (1 − 4A)^(d/4) exp(A|ω|² + √(1 − 4A) ω·x − |x|²/2)

have E φ(x)·φ(y) = exp(x·y) for every ρ; ρ = 1 gives the positive features of FAVOR+. The constant of |x|² is −1/2: the
−1 of the papers belongs to the Gaussian kernel. Parameters that are read off the data leave the mean alone, since
directions are drawn independently of the data; but they look at all keys, so there is no causal form with them.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, replace
from math import log, pi, sqrt
from typing import TYPE_CHECKING, Any, ClassVar, final

from nla_llm import costs
from nla_llm.backend import (
    Array,
    by_heads,
    constant,
    decomposable,
    device_of,
    from_numpy,
    generator,
    namespace,
    to_numpy,
)
from nla_llm.methods.attention.kernels.directions import ENSEMBLES, Directions
from nla_llm.methods.attention.kernels.linear_attention import Features, half_square_norm, kernel_attention_cost
from nla_llm.methods.attention.kernels.random_features import RandomFeatures, mean_of_tokens, promises
from nla_llm.methods.registry import Properties, positive, register

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy as np

    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

    Rng: TypeAlias = np.random.Generator | None

__all__ = ["GerfFeatures", "PhaseFeatures", "SaderfFeatures", "SderfFeatures"]

OPTIMAL = "optimal"


@register("phase_features")
@final
@dataclass(frozen=True)
class PhaseFeatures(RandomFeatures):
    """φ(x) = √(2/m) exp(|x|²/2) cos(ω·x + b) with phases b uniform on [0, 2π): one number for each direction.

    Rahimi and Recht 2007 (the other of their two maps); Sutherland and Schneider 2015, arXiv 1506.02785, compare them.
    Unbiased; relative variance (e^s − 1 + e^(−s)/2)/m, s = |x − y|², with i.i.d. directions: 1/(2m) even for x = y,
    where cosines and sines of the same directions are exact. Entries and row sums may be negative.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = 0.1 * np.eye(3)
    >>> P = PhaseFeatures(64)(AttentionProblem(q, q), rng=0)
    >>> P.shape, P.nonnegative
    ((3, 3), False)
    """

    properties: ClassVar[Properties] = promises("trigonometric", nonnegative=False)
    centre: ClassVar[int] = 1

    @property
    def log_factor(self) -> float:
        """Logarithm of 2/m."""
        return log(2 / self.m)

    def feature_pair(
        self, x: Array, y: Array, omega: Directions, *, mask: Array | None = None, rng: Rng = None
    ) -> tuple[Features, Features]:
        """A cosine for each direction, with the norm as a logarithmic scale of the row."""
        del mask
        phase = from_numpy(generator(rng).uniform(0, 2 * pi, self.m), like=x)
        phase = namespace(x).astype(phase, x.dtype)

        def one(a: Array) -> Features:
            return Features(amplitude=by_heads(_shifted_cosine, omega.project(a), phase), row=half_square_norm(a))

        return one(x), one(y)

    def theory(self, problem: AttentionProblem) -> Theory | None:
        """Mean and variance of the entries before the division by row sums."""
        from nla_llm.theory.exponential_features import phase_theory  # noqa: PLC0415 - SciPy loads there

        if not ENSEMBLES[self.directions].gaussian:
            return None
        return phase_theory(*self._scaled(problem), m=self.m, directions=self.directions)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """As for the other functions, and the draw of the phases."""
        return super().cost(problem) + costs.Cost(prepare=costs.Operations(draw=costs.m))

    @staticmethod
    def _kernel_cost(problem: AttentionProblem) -> costs.Cost:
        n_q, n_k, _, _ = costs.symbols_of(problem)
        waves = costs.Operations(add=1, exp=1) * ((n_q + n_k) * costs.m)
        return costs.Cost(prepare=waves) + kernel_attention_cost(problem, costs.m, amplitude=True, row=True)


def _shifted_cosine(projection: Array, phase: Array) -> Array:
    return namespace(projection).cos(projection + phase)


# -- generalised exponential features ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _OneRho(RandomFeatures):
    """What the features with one ρ for all coordinates share.

    Parameters
    ----------
    rho
        ρ > 0, or 'optimal': of each head, the value that is best for its mean of |x + y|².
    """

    _: KW_ONLY
    rho: float | str = OPTIMAL
    balanced: ClassVar[bool]

    def __post_init__(self, orthogonal: bool) -> None:
        super().__post_init__(orthogonal)
        if not (isinstance(self.rho, str) and self.rho == OPTIMAL):
            positive("rho", self.rho, other=f" or {OPTIMAL!r}")
        if self.rho == OPTIMAL and not self.balanced:
            object.__setattr__(self, "properties", _without_causal(self.properties, "rho='optimal'"))

    @abstractmethod
    def _balance(self, x: Array, y: Array, mask: Array | None) -> tuple[Array, Array]:
        """Queries and keys with the same inner products, for which ρ is chosen."""

    def feature_pair(
        self, x: Array, y: Array, omega: Directions, *, mask: Array | None = None, rng: Rng = None
    ) -> tuple[Features, Features]:
        """One exponential for each direction."""
        del rng
        xp = namespace(x)
        x, y = self._balance(x, y, mask)
        half_x, half_y = half_square_norm(x), half_square_norm(y)
        rho = self._rho(x, y, half_x, half_y, mask)
        square = 0.5 + 0.5 / rho  # 1 − 4A
        stretch = xp.sqrt(square) if self.rho == OPTIMAL else sqrt(square)
        log_square = xp.log(square) if self.rho == OPTIMAL else log(square)
        lengths = xp.sum(_coordinates(omega, x) ** 2, axis=-2, keepdims=True)
        queries = Features(log=omega.project(stretch * x), row=x.shape[-1] / 2 * log_square - half_x)
        column = (0.25 - 0.25 / rho) * lengths  # 2A|ω|²: that of queries and of keys
        return queries, Features(log=omega.project(stretch * y), row=-half_y, column=column)

    def _rho(self, x: Array, y: Array, half_x: Array, half_y: Array, mask: Array | None) -> Any:
        """ρ, a number or (..., 1, 1)."""
        if self.rho != OPTIMAL:
            return float(self.rho)
        centres = namespace(x).sum(mean_of_tokens(x, None) * mean_of_tokens(y, mask), axis=-1, keepdims=True)
        t = 2.0 * (mean_of_tokens(half_x, None) + mean_of_tokens(half_y, mask) + centres)
        return optimal_rho(t, x.shape[-1])

    def theory(self, problem: AttentionProblem) -> Theory | None:
        """Mean and variance of the entries before the division by row sums, given the parameters read off the data."""
        from nla_llm.theory.exponential_features import exponential_theory  # noqa: PLC0415 - SciPy loads there

        if not ENSEMBLES[self.directions].gaussian:
            return None
        x, y = self._balance(*self._scaled(problem), problem.key_mask)
        rho = self._rho(x, y, half_square_norm(x), half_square_norm(y), problem.key_mask)
        return exponential_theory(x, y, rho=to_numpy(rho), m=self.m, directions=self.directions)

    def _norms_cost(self, problem: AttentionProblem) -> costs.Operations:  # type: ignore[override]
        """½|x|², the parameters of each head, stretched inputs, lengths of directions."""
        n_q, n_k, d, _ = costs.symbols_of(problem)
        coordinates = ENSEMBLES[self.directions].project_cost(d, costs.m, d)
        lengths = costs.Operations(mul=(d + 1) * costs.m) + costs.formulas.sum_of(d, times=costs.m)
        rows = costs.Operations(add=n_q, mul=(n_q + n_k) * d)
        return super()._norms_cost(problem) + self._parameters_cost(problem) + coordinates + lengths + rows

    def _parameters_cost(self, problem: AttentionProblem) -> costs.Operations:
        if self.rho != OPTIMAL:
            return costs.Operations()
        n_q, n_k, d, _ = costs.symbols_of(problem)
        means = _mean_cost(n_q, 1 + d) + _mean_cost(n_k, 1 + d, masked=problem.key_mask is not None, means=2)
        t = costs.Operations(mul=d + 1, add=2) + costs.formulas.sum_of(d)
        powers = costs.Operations(add=2, div=2, sqrt=1, exp=1, mul=1)
        return means + t + _optimal_rho_cost(1) + powers

    @staticmethod
    def _kernel_cost(problem: AttentionProblem) -> costs.Cost:
        return kernel_attention_cost(problem, costs.m, log_width=costs.m, row=True, column=True)


@register("gerf_features")
@final
@dataclass(frozen=True)
class GerfFeatures(_OneRho):
    """Generalised exponential random features; with the optimal ρ the optimal positive features of FAVOR++.

    φ(x) = m^(-1/2) (1 − 4A)^(d/4) exp(A|ω|² + √(1 − 4A) ω·x − |x|²/2), A = (1 − 1/ρ)/8.

    Likhosherstov et al. 2022, arXiv 2205.15317, Theorems 3.1–3.3. Unbiased; relative variance (R(ρ) − 1)/m with
    R(ρ) = ((1 + ρ)²/(4ρ))^(d/2) e^(ρt), t = |x + y|², with i.i.d. directions. For ρ < 1 the features are bounded.
    ρ* = 2d/(√((2t + d)² + 8dt) + 2t + d), for which R grows as t^(d/2), takes t from the mean over all pairs,
    mean|x|² + mean|y|² + 2x̄·ȳ over the visible tokens of each head.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = 0.1 * np.eye(3)
    >>> P = GerfFeatures(64, orthogonal=True)(AttentionProblem(q, q), rng=0)
    >>> P.shape, P.nonnegative
    ((3, 3), True)
    >>> "causal" in GerfFeatures(64).properties.supports, "causal" in GerfFeatures(64, rho=0.5).properties.supports
    (False, True)
    """

    properties: ClassVar[Properties] = promises("exponential", nonnegative=True)
    balanced: ClassVar[bool] = False

    def _balance(self, x: Array, y: Array, mask: Array | None) -> tuple[Array, Array]:
        return x, y


@register("saderf_features")
@final
@dataclass(frozen=True)
class SaderfFeatures(_OneRho):
    """Generalised exponential features of Ψx and Ψ⁻¹y with a diagonal Ψ, Ψ_l⁴ = mean_j y_jl² / mean_i x_il².

    Likhosherstov et al. 2023, arXiv 2302.00787, simplified asymmetric dense-exponential features (SADERF). Ψ balances
    queries and keys coordinate by coordinate: no diagonal makes mean |Ψx + Ψ⁻¹y|² smaller. A coordinate in which all
    queries or all keys vanish adds nothing to a logit and keeps Ψ_l = 1. Unbiased; variance as for ``gerf_features``
    with t = |Ψx + Ψ⁻¹y|².

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = 0.1 * np.eye(3)
    >>> SaderfFeatures(64)(AttentionProblem(q, 5 * q), rng=0).shape
    (3, 3)
    """

    properties: ClassVar[Properties] = replace(
        promises("exponential", nonnegative=True),
        supports=frozenset({"key_mask"}),
        refusals={"causal": "the balance of queries and keys is read off all keys"},
    )
    balanced: ClassVar[bool] = True

    def _balance(self, x: Array, y: Array, mask: Array | None) -> tuple[Array, Array]:
        xp = namespace(x)
        square_x, square_y = mean_of_tokens(x * x, None), mean_of_tokens(y * y, mask)
        one = constant(1.0, like=x)
        both = (square_x > 0) & (square_y > 0)
        ratio = xp.sqrt(xp.where(both, square_y, one)) / xp.sqrt(xp.where(both, square_x, one))
        psi = xp.sqrt(ratio)
        return psi * x, y / psi

    def _parameters_cost(self, problem: AttentionProblem) -> costs.Operations:
        """Squares and their means, two roots, Ψx and Ψ⁻¹y; then ρ."""
        n_q, n_k, d, _ = costs.symbols_of(problem)
        means = _mean_cost(n_q, d) + _mean_cost(n_k, d, masked=problem.key_mask is not None)
        psi = costs.Operations(compare=2 * d, div=d, sqrt=3 * d)
        inputs = costs.Operations(mul=(n_q + n_k) * d + n_q * d, div=n_k * d)
        return means + psi + inputs + super()._parameters_cost(problem)


@register("sderf_features")
@final
@dataclass(frozen=True)
class SderfFeatures(RandomFeatures):
    """Generalised exponential features with a ρ for each eigenvector of the mean of (x + y)(x + y)ᵀ.

    φ(x) = m^(-1/2) det(I − 4𝐀)^(1/4) exp(ωᵀ𝐀ω + ω·(I − 4𝐀)^(1/2) x − |x|²/2), where 𝐀 = Q A Qᵀ,
    M = mean_ij (x_i + y_j)(x_i + y_j)ᵀ = Q Λ Qᵀ and A_l = (1 − 1/ρ_l)/8 with the optimal ρ_l for t = Λ_l, d = 1.

    Likhosherstov et al. 2023, arXiv 2302.00787, symmetric dense-exponential features (SDERF), with ω turned by Q, which
    has the same law and depends on neither signs nor order of the eigenvectors. Unbiased; relative variance (R − 1)/m
    with log R = Σ_l [½ log((1 + ρ_l)²/(4ρ_l)) + ρ_l (Qᵀ(x + y))_l²] with i.i.d. directions. Among all 𝐀 it has the
    least mean of log R over the pairs.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = 0.1 * np.eye(3)
    >>> SderfFeatures(64)(AttentionProblem(q, q), rng=0).shape
    (3, 3)
    """

    properties: ClassVar[Properties] = replace(
        promises("exponential", nonnegative=True),
        supports=frozenset({"key_mask"}),
        refusals={"causal": "the matrix of the exponent is read off all keys"},
    )

    def feature_pair(
        self, x: Array, y: Array, omega: Directions, *, mask: Array | None = None, rng: Rng = None
    ) -> tuple[Features, Features]:
        """One exponential for each direction."""
        del rng
        xp = namespace(x)
        rho, basis = self._axes(x, y, mask)
        basis_t = xp.matrix_transpose(basis)
        square = 0.5 + 0.5 / rho  # 1 − 4A
        stretch = (basis * xp.sqrt(square)[..., None, :]) @ basis_t
        log_determinant = 0.5 * xp.sum(xp.log(square), axis=-1)[..., None, None]
        components = omega.project(basis_t)  # of each direction along the eigenvectors, (..., d, m)
        column = xp.sum((0.25 - 0.25 / rho)[..., None] * components**2, axis=-2, keepdims=True)
        queries = Features(log=omega.project(x @ stretch), row=log_determinant - half_square_norm(x))
        return queries, Features(log=omega.project(y @ stretch), row=-half_square_norm(y), column=column)

    @staticmethod
    def _axes(x: Array, y: Array, mask: Array | None) -> tuple[Array, Array]:
        """ρ (..., d) and the eigenvectors Q (..., d, d)."""
        xp, dtype = namespace(x), x.dtype
        x, y = decomposable(x), decomposable(y)
        mean_x, mean_y = mean_of_tokens(x, None), mean_of_tokens(y, mask)
        mixed = xp.matrix_transpose(mean_x) * mean_y
        moment = _second_moment(x, None) + _second_moment(y, mask) + mixed + xp.matrix_transpose(mixed)
        eigenvalues, basis = xp.linalg.eigh(moment)
        zero = constant(0.0, like=x)
        rho = optimal_rho(xp.maximum(eigenvalues, zero), 1)  # negative ones are rounding: M is semidefinite
        return xp.astype(rho, dtype, copy=False), xp.astype(basis, dtype, copy=False)

    def theory(self, problem: AttentionProblem) -> Theory | None:
        """Mean and variance of the entries before the division by row sums, given the parameters read off the data."""
        from nla_llm.theory.exponential_features import exponential_theory  # noqa: PLC0415 - SciPy loads there

        if not ENSEMBLES[self.directions].gaussian:
            return None
        x, y = self._scaled(problem)
        rho, basis = self._axes(x, y, problem.key_mask)
        return exponential_theory(
            x @ basis, y @ basis, rho=to_numpy(rho)[..., None, :], m=self.m, directions=self.directions
        )

    def _norms_cost(self, problem: AttentionProblem) -> costs.Operations:  # type: ignore[override]
        """½|x|², the eigenvectors of each head, stretched inputs, the quadratic form of directions."""
        n_q, n_k, d, _ = costs.symbols_of(problem)
        f, m = costs.formulas, costs.m
        masked = problem.key_mask is not None
        means = _mean_cost(n_q, d) + _mean_cost(n_k, d, masked=masked)
        products = f.matmul(d, n_q + n_k, d) + costs.Operations(div=n_q * d)
        products += costs.Operations(div=n_k, mul=n_k * d) + f.sum_of(n_k) if masked else costs.Operations(div=n_k * d)
        moment = means + products + costs.Operations(mul=d**2, add=3 * d**2)
        rho = f.eigh(d) + costs.Operations(compare=d) + _optimal_rho_cost(d)
        stretch = costs.Operations(div=2 * d, add=2 * d, sqrt=d, mul=d**2, exp=d) + f.matmul(d, d, d)
        determinant = f.sum_of(d) + costs.Operations(mul=1, add=n_q)
        form = ENSEMBLES[self.directions].project_cost(d, m, d) + costs.Operations(mul=2 * d * m) + f.sum_of(d, times=m)
        inputs = f.matmul(n_q + n_k, d, d)
        return super()._norms_cost(problem) + moment + rho + stretch + determinant + form + inputs

    @staticmethod
    def _kernel_cost(problem: AttentionProblem) -> costs.Cost:
        return kernel_attention_cost(problem, costs.m, log_width=costs.m, row=True, column=True)


# -- parameters --------------------------------------------------------------------------------------------------------


def optimal_rho(t: Array, d: int) -> Array:
    """ρ* = 2d / (√((2t + d)² + 8dt) + 2t + d), entry by entry, free of cancellation and of squares of t."""
    a = 2.0 * t + d
    share = d / a
    return 2.0 * share / (namespace(t).sqrt(1.0 + 8.0 * share * (t / a)) + 1.0)


def _optimal_rho_cost(entries: Any) -> costs.Operations:
    return costs.Operations(mul=4 * entries, add=3 * entries, sqrt=entries, div=3 * entries)


def _coordinates(omega: Directions, x: Array) -> Array:
    """Coordinates of the directions as columns, (d, m), through their own projection, whatever their structure."""
    return omega.project(namespace(x).eye(x.shape[-1], dtype=x.dtype, device=device_of(x)))


def _second_moment(x: Array, mask: Array | None) -> Array:
    """Mean of x xᵀ over the visible tokens, (..., d, d)."""
    xp = namespace(x)
    if mask is None:
        return xp.matrix_transpose(x / x.shape[-2]) @ x
    weights = xp.astype(mask, x.dtype)[..., None]
    return xp.matrix_transpose(weights / xp.sum(weights, axis=-2, keepdims=True) * x) @ x


def _mean_cost(tokens: Any, columns: Any, *, masked: bool = False, means: int = 1) -> costs.Operations:
    """``means`` means over the tokens, of ``columns`` columns together; masked ones are weighted by the mask."""
    cost: costs.Operations = costs.formulas.sum_of(tokens, times=columns)
    if not masked:
        return cost + costs.Operations(div=columns)
    return cost + costs.Operations(mul=tokens * columns, div=means * tokens) + means * costs.formulas.sum_of(tokens)


def _without_causal(properties: Properties, what: str) -> Properties:
    refusals = {**properties.refusals, "causal": f"{what} is read off all keys; pass a number"}
    return replace(properties, supports=properties.supports - {"causal"}, refusals=refusals)
