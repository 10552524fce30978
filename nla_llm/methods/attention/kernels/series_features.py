"""Random features from the power series of the exponential: random Maclaurin and Poisson features.

Both draw terms of exp(x·y) = Σ (x·y)^k/k! at random and weight them by one over their probability. A feature is a
product of linear forms or of coordinates, so it takes both signs and its size ranges over many orders of magnitude: the
sign is the amplitude, and the logarithm is carried apart.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from math import ceil, lgamma, log, log2
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import (
    Array,
    by_heads,
    constant,
    device_of,
    from_numpy,
    generator,
    is_numpy,
    namespace,
    number,
    single_or_wider,
)
from nla_llm.methods.attention.kernels.linear_attention import CHUNK, Features, kernel_attention, kernel_attention_cost
from nla_llm.methods.attention.kernels.products import draw_vectors, inputs_cost, unit_rows
from nla_llm.methods.registry import Properties, Unsupported, positive, register, require, settle, whole_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["MaclaurinFeatures", "PoissonFeatures"]

_COLUMNS = 32  # products of matrices by whole blocks of columns, so that their rounding does not depend on the draw
_SPARE_DEGREES = 6  # beyond log₂ m, near the largest of m degrees: one of them is cut with probability 2^(-7) at most


@register("maclaurin_features")
@final
@dataclass(frozen=True)
class MaclaurinFeatures:
    """φ(x)_r = (m k! p_k)^(-1/2) Π_{j≤k} w_rj·x with signs w and a random degree k = N_r, P(N = k) = p_k ∝ 2^(−k−1).

    Kar and Karnick 2012, arXiv 1201.6530. The mean is the power series of exp(x·y), cut after the degree
    D = ⌈log₂ m⌉ + 6, which m features hardly ever reach: without the cut the estimate would be unbiased, but no bounded
    amount of work would do. The second moment of one feature is 2 I₀(2√(2η)) with η = N + 2(α − σ),
    N = |x|²|y|², α = (x·y)², σ = Σ x_l² y_l²: far above exp(2 x·y) wherever |x||y| is large, and largest for opposite
    vectors in comparison with the kernel. Entries and even row sums may be negative.

    A query of zeros has no weights where no feature has degree zero; such data are refused with
    :class:`~nla_llm.operators.ZeroRowSumError`.

    Parameters
    ----------
    m
        Number of features.
    stratified
        Draw the degree of feature i from the i-th of m equal parts of its law, which is not in the paper. The mean is
        the same and the variance smaller; there are at most ⌈m/2^k⌉ features of degree k or more, so that m + O(log m)
        linear forms are computed instead of m D. Independent degrees use m of these in the mean; the others are counted
        in the cost, since it may not depend on the draw, though NumPy's path leaves them out.

    Examples
    --------
    >>> from nla_llm.problems import AttentionProblem
    >>> q = 0.3 * np.eye(3)
    >>> P = MaclaurinFeatures(2000, stratified=True)(AttentionProblem(q, q), rng=0)
    >>> bool(abs(P.dense() - 1 / 3).max() < 0.1)
    True
    """

    m: int
    _: KW_ONLY
    stratified: bool = False
    properties: ClassVar[Properties] = Properties(
        family="maclaurin", budget="m", converges=True, deterministic=False, partial=True,
        supports=frozenset({"causal", "key_mask"}),
    )  # fmt: skip
    chunk: ClassVar[int] = CHUNK

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)

    @property
    def largest_degree(self) -> int:
        """D, after which the series is cut."""
        return ceil(log2(self.m)) + _SPARE_DEGREES

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator diag(Â 1)⁻¹ Â with Â_ij = φ(x_i)·φ(y_j); the same draw serves all heads."""
        require(self, problem)
        source = generator(rng)
        x, y = problem.scaled_inputs()
        degrees = self._degrees(source)
        forms = [draw_vectors("rademacher", (c, problem.d), source, like=x)[0] for c in self._capacities()]
        column = from_numpy(2 * self._log_weights(degrees), like=x, dtype=x.dtype)[None, :]
        queries, keys = (self._features(a, forms, degrees) for a in (x, y))
        return kernel_attention(problem, queries, replace(keys, column=column), log_factor=-log(self.m))

    def theory(self, problem: AttentionProblem) -> Theory:
        """Mean and variance of the entries of Â before the division by row sums, in closed form."""
        from nla_llm.theory.sketches import maclaurin_theory  # noqa: PLC0415 - SciPy loads there

        x, y = problem.scaled_inputs()
        return maclaurin_theory(x, y, scale=1.0, m=self.m, degree=self.largest_degree, stratified=self.stratified)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Unit vectors, linear forms and their products, powers of the norms; then a kernel of m features."""
        n_q, n_k, d, _ = costs.symbols_of(problem)
        m, tokens = costs.m, n_q + n_k
        forms, longer = self._form_counts()
        drawing = costs.Operations(draw=m + forms * d)
        products = costs.formulas.matmul(tokens, d, forms) + costs.Operations(mul=tokens * (longer + m))
        kernel = kernel_attention_cost(problem, m, log_width=m, amplitude=True, column=True)
        return costs.Cost(prepare=drawing + inputs_cost(problem) + products) + kernel

    def _form_counts(self) -> tuple[Any, Any]:
        """Number of linear forms of all levels, and without the first level, in the symbol m."""
        from sympy import ceiling, log  # noqa: PLC0415 - the formulas load it

        m = costs.m
        if not self.stratified:
            levels = ceiling(log(m, 2)) + _SPARE_DEGREES
            return m * levels, m * (levels - 1)
        capacities = [ceiling(m / 2**k) for k in range(1, self.largest_degree + 1)]
        return sum(capacities), sum(capacities[1:])

    def _capacities(self) -> list[int]:
        """How many features may have a k-th factor, for k = 1 … D: never more for a later one."""
        levels = range(1, self.largest_degree + 1)
        return [ceil(self.m / 2**k) if self.stratified else self.m for k in levels]

    def _degrees(self, rng: np.random.Generator) -> NDArray[np.int64]:
        """Degrees of the features by inversion of their law, largest first."""
        u = rng.random(self.m)
        if self.stratified:
            u = (np.arange(self.m) + u) / self.m
        cut = 1 - 0.5 ** (self.largest_degree + 1)
        degrees = np.floor(-np.log2(1 - cut * u)).astype(np.int64)
        return np.sort(np.minimum(degrees, self.largest_degree))[::-1]

    def _log_weights(self, degrees: NDArray[np.int64]) -> NDArray[np.float64]:
        """−½ log(k! p_k) of each feature."""
        cut = log(1 - 0.5 ** (self.largest_degree + 1))
        return np.asarray([(log(2.0) * (k + 1) + cut - lgamma(k + 1)) / 2 for k in degrees.tolist()])

    @staticmethod
    def _features(x: Array, forms: Sequence[Array], degrees: NDArray[np.int64]) -> Features:
        x, log_norm = unit_rows(x)
        amplitude = by_heads(partial(_product_to_degree, forms=forms, degrees=degrees), x)
        powers = from_numpy(degrees.astype(np.float64), like=x, dtype=x.dtype)
        return Features(amplitude, log=log_norm * powers)


def _product_to_degree(x: Array, *, forms: Sequence[Array], degrees: NDArray[np.int64]) -> Array:
    """Π_{j≤k_r} w_rj·x for each feature r, whose degrees k_r fall: from the last level to the first.

    On NumPy the forms that no feature uses are left out, which gives the same numbers.
    """
    xp = namespace(x)
    one = constant(1.0, like=x)
    product = xp.ones((*x.shape[:-1], 0), dtype=x.dtype, device=device_of(x))
    for level, w in reversed(list(enumerate(forms, start=1))):
        width = w.shape[0]
        if is_numpy(x):
            width = min(width, _COLUMNS * ceil(np.count_nonzero(degrees >= level) / _COLUMNS))
        if width == 0:
            continue
        used = from_numpy(degrees[:width] >= level, like=x)
        here = xp.where(used, x @ xp.matrix_transpose(w[:width, ...]), one)
        known = product.shape[-1]
        product = xp.concat([here[..., :known] * product, here[..., known:]], axis=-1) if known else here
    rest = degrees.size - product.shape[-1]
    if not rest:
        return product
    return xp.concat([product, xp.ones((*x.shape[:-1], rest), dtype=x.dtype, device=device_of(x))], axis=-1)


# -- Poisson -----------------------------------------------------------------------------------------------------------


@register("poisson_features")
@final
@dataclass(frozen=True)
class PoissonFeatures:
    """φ(x)_r = m^(-1/2) e^(λd/2) Π_l x_l^{ω_rl} λ^(−ω_rl/2) with ω_rl ~ Poisson(λ): powers of the coordinates.

    The Poisson features of Chefs' Random Tables (Likhosherstov et al. 2022, arXiv 2205.15317). Unbiased for every rate
    λ > 0; the second moment of one feature is exp(λd + σ/λ) with σ = Σ x_l² y_l², least at λ = √(σ/d), where it is
    exp(2√(dσ)). Negative coordinates make negative features, so entries and even row sums may be negative.

    A query whose coordinates are zero wherever a feature has a positive power of them has no weights; such data are
    refused with :class:`~nla_llm.operators.ZeroRowSumError`.

    Parameters
    ----------
    m
        Number of features.
    rate
        λ. By default √(σ̄/d) with the mean σ̄ of σ over all pairs of a query and a visible key, a number for each head;
        it looks at all keys, so there is no causal form without a given rate.

    Examples
    --------
    >>> from nla_llm.problems import AttentionProblem
    >>> q = 0.3 + 0.3 * np.eye(3)
    >>> P = PoissonFeatures(2000)(AttentionProblem(q, q), rng=0)
    >>> bool(abs(P.dense() - 1 / 3).max() < 0.1)
    True
    """

    m: int
    _: KW_ONLY
    rate: float | None = None
    properties: ClassVar[Properties] = Properties(
        family="poisson", budget="m", converges=True, unbiased=True, deterministic=False, partial=True,
        supports=frozenset({"causal", "key_mask"}),
    )  # fmt: skip
    chunk: ClassVar[int] = CHUNK

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        if self.rate is None:
            promised = type(self).properties
            why = {"causal": "its rate is a mean over all keys; pass rate=..., such as 0.5"}
            object.__setattr__(
                self, "properties", replace(promised, supports=promised.supports - {"causal"}, refusals=why)
            )
        else:
            positive("rate", self.rate, other=" or None for one from the data")

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator diag(Â 1)⁻¹ Â with Â_ij = φ(x_i)·φ(y_j); all heads share the uniform numbers behind the powers."""
        require(self, problem)
        x, y = (single_or_wider(a) for a in problem.scaled_inputs())  # powers have no room in half precision
        rate = self._rates(problem)
        powers = _poisson_quantile(generator(rng).random((self.m, problem.d)), rate)
        log_rate = np.log(np.where(rate > 0, rate, 1.0))  # without a rate there are no powers
        weights = rate * problem.d - log_rate * np.sum(powers, axis=-1, keepdims=True)
        omega = from_numpy(np.swapaxes(powers, -1, -2), like=x, dtype=x.dtype)
        column = from_numpy(np.swapaxes(weights, -1, -2), like=x, dtype=x.dtype)
        queries, keys = (Features(*by_heads(_signed_powers, a, omega)) for a in (x, y))
        return kernel_attention(problem, queries, replace(keys, column=column), log_factor=-log(self.m))

    def theory(self, problem: AttentionProblem) -> Theory:
        """Mean and variance of the entries of Â before the division by row sums, in closed form."""
        from nla_llm.theory.sketches import poisson_theory  # noqa: PLC0415 - SciPy loads there

        x, y = problem.scaled_inputs()
        return poisson_theory(x, y, scale=1.0, m=self.m, rate=self._rates(problem))

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """The rate, logarithms and signs of the inputs, their sums by the powers; then a kernel of m features."""
        n_q, n_k, d, _ = costs.symbols_of(problem)
        m, tokens = costs.m, n_q + n_k
        drawing = costs.Operations(draw=m * d) + self._rate_cost(problem)
        inputs = costs.Operations(mul=tokens * d, compare=2 * tokens * d, exp=tokens * d)
        sums = costs.formulas.matmul(tokens, d, m) * 2
        signs = costs.Operations(compare=2, add=2, mul=1) * (tokens * m)
        kernel = kernel_attention_cost(problem, m, log_width=m, amplitude=True, column=True)
        return costs.Cost(prepare=drawing + inputs + sums + signs) + kernel

    def _rates(self, problem: AttentionProblem) -> NDArray[np.float64]:
        """λ of each head (..., 1, 1), or the given one for all."""
        if self.rate is not None:
            return np.full((1, 1), float(self.rate))
        xp = problem.xp
        q, k = (_mean_square(a, mask) for a, mask in ((problem.q, None), (problem.k, problem.key_mask)))
        product = xp.sqrt(q) * xp.sqrt(k)
        size = xp.max(product, axis=-1, keepdims=True)  # squares of products of squares leave the range early
        share = product / xp.where(size > 0, size, xp.ones_like(size))
        rate = (abs(problem.scale) * size[..., 0]) * xp.sqrt(xp.sum(share * share, axis=-1) / problem.d)
        # the numbers go to the host one by one: that is where the generator and the quantiles are
        flat = [number(rate[index]) for index in np.ndindex(rate.shape)]
        if max(flat) > _WHOLE:
            raise Unsupported(
                f"poisson_features draws powers of mean {max(flat):.3g} for q and k of this size, and float64 has no "
                f"whole numbers beyond {_WHOLE:.3g}; pass rate=..., or scale q or k down"
            )
        return np.reshape(np.asarray(flat, dtype=np.float64), (*rate.shape, 1, 1))

    def _rate_cost(self, problem: AttentionProblem) -> costs.Operations:
        """Two means of squares, their inner product, a root."""
        if self.rate is not None:
            return costs.Operations()
        n_q, n_k, d, _ = costs.symbols_of(problem)
        sum_of = costs.formulas.sum_of
        means = costs.Operations(mul=(n_q + n_k) * d, div=2 * d) + sum_of(n_q, times=d) + sum_of(n_k, times=d)
        if problem.key_mask is not None:
            means += costs.Operations(mul=n_k * d) + sum_of(n_k)
        root = costs.Operations(mul=2 * d + 2, div=d + 1, sqrt=2 * d + 1, compare=1) + sum_of(d)
        return means + root + costs.formulas.maximum_of(d)


def _mean_square(a: Array, mask: Array | None) -> Array:
    """Mean over the visible tokens of the squared coordinates, (..., d), in float64 so that no rounding of the rate
    changes a draw.
    """  # noqa: D205 - one sentence
    xp = namespace(a)
    a = xp.astype(a, xp.float64)
    if mask is None:
        return xp.mean(a * a, axis=-2)
    weights = xp.astype(mask, a.dtype)[..., None]
    return xp.sum(weights * (a * a), axis=-2) / xp.sum(weights, axis=-2)


def _poisson_quantile(u: NDArray[np.float64], rate: NDArray[np.float64]) -> NDArray[np.float64]:
    """The least k with P(Poisson(rate) ≤ k) ≥ u, entry by entry."""
    from scipy.special import pdtr, pdtrik  # noqa: PLC0415 - loads only where it is used

    u, rate = np.broadcast_arrays(u, rate)
    positive = np.where(rate > 0, rate, 1.0)
    k = np.ceil(np.nan_to_num(pdtrik(u, positive), nan=0.0))
    before = np.maximum(k - 1, 0)
    k = np.where(pdtr(before, positive) >= u, before, k)
    return np.where(rate > 0, k, 0.0)


_WHOLE = 2.0**53  # where float64 begins to leave out whole numbers
_DEAD = 2.0**20  # half a sum of powers stays below, and sums of halves are exact beside it


def _signed_powers(x: Array, omega: Array) -> tuple[Array, Array]:
    """Sign and logarithm of Π_l x_l^{ω_l} for x (..., n, d) and powers ω (..., d, m); the sign is 0 where a factor is.

    Signs come from the parity of the powers of negative coordinates: a sum of halves is whole where it is even.
    """
    xp = namespace(x)
    one, half, zero, dead = (constant(c, like=x) for c in (1.0, 0.5, 0.0, _DEAD))
    present = x != zero
    log = xp.log(xp.where(present, xp.abs(x), one)) @ omega
    halves = xp.where(present, xp.where(x < zero, half, zero), dead) @ omega
    sign = halves - xp.floor(halves)
    sign *= -4.0
    sign += 1.0
    return xp.where(halves < dead, sign, zero), log
