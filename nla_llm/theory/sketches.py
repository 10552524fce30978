"""Exact means and variances of estimators built from products: sketches of (x·y)^p and random series for exp(x·y).

Everything depends on three numbers of a pair: u = x·y, N = |x|²|y|² and σ = Σ_l x_l² y_l². One factor of a sketch is
(w·x)(w·y) with E = u, and independent factors multiply, so that the second moment of a product of p factors is the p-th
power of that of one. That also settles TensorSketch: its estimate is the mean over the m Fourier frequencies r of
Π_j A_j(r) with A_j(r) = (w_jr·x)(w̄_jr·y) and w_jr,l = s_j(l) exp(−2πi r h_j(l)/m), hence
E Â² = m⁻² Σ_rs (E A(r) Ā(s))^p; random hashes and signs give E A(r) Ā(s) = u² + [r = s](N − σ) + [r + s ≡ 0](u² − σ).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from scipy.special import gammaln

from nla_llm.theory.bound import Matrix, Theory
from nla_llm.theory.random_features import check_whole, scaled_pair

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

    from nla_llm.backend import Array

__all__ = [
    "Pairs",
    "SketchKind",
    "degree_law",
    "maclaurin_theory",
    "poisson_theory",
    "poly_sketch_theory",
    "product_sketch_theory",
    "tensor_sketch_theory",
]

SketchKind: TypeAlias = Literal["rademacher", "gaussian", "complex_rademacher", "complex_gaussian"]


class Pairs(NamedTuple):
    """u = x·y, N = |x|²|y|² and σ = Σ x_l² y_l² of all pairs, each (..., n_q, n_k)."""

    u: Matrix
    n: Matrix
    sigma: Matrix

    @property
    def cosine(self) -> Matrix:
        """u/√N, zero where one of the vectors is."""
        return _ratio(self.u, np.sqrt(self.n))

    @property
    def overlap(self) -> Matrix:
        """σ/N in [0, 1], zero where one of the vectors is."""
        return _ratio(self.sigma, self.n)


def pairs_of(x: Matrix, y: Matrix) -> Pairs:
    """The three numbers of all pairs of rows of x (..., n_q, d) and y (..., n_k, d)."""
    yt = np.swapaxes(y, -1, -2)
    norms = np.sum(x**2, -1)[..., :, None] * np.sum(y**2, -1)[..., None, :]
    return Pairs(x @ yt, norms, x**2 @ yt**2)


def _ratio(a: Matrix, b: Matrix) -> Matrix:
    return np.divide(a, b, out=np.zeros_like(b), where=b > 0)


# -- the promises ------------------------------------------------------------------------------------------------------


def product_sketch_theory(q: Array, k: Array, *, scale: float, m: int, degree: int, kind: SketchKind) -> Theory:
    """What is known of the mean of m independent products of ``degree`` factors as an estimate of (x·y)^degree.

    With α = (x·y)², the second moment of one draw is the power ``degree`` of N + 2(α − σ) for Rademacher and N + 2α for
    Gaussian factors; for complex ones, whose real parts are taken, it is the mean of the powers of N + α − σ and 2α − σ
    (Rademacher, from {±1, ±i}) or of N + α and 2α (Gaussian). The mean and variance of the returned promise are
    relative to exp(x·y), as for every kernel.

    Examples
    --------
    >>> q, k = np.array([[1.0, 1.0]]), np.array([[1.0, 0.0]])
    >>> promise = product_sketch_theory(q, k, scale=1.0, m=1, degree=2, kind="gaussian")
    >>> round(float(np.exp(2) * promise.relative_variance()[0, 0]), 12)  # (2 + 2)² − 1
    15.0
    """
    if kind not in get_args(SketchKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(SketchKind))}, got {kind!r}")
    m, degree = check_whole("m", m), check_whole("degree", degree)

    def variance(pairs: Pairs) -> Matrix:
        return _draw_variance(pairs.cosine**2, pairs.overlap, degree, kind) / m

    source = "Kar and Karnick 2012, arXiv 1201.6530; Wacker, Ohana and Filippone 2022, arXiv 2202.02031; derived"
    name = f"product sketch, {kind.replace('_', ' ')} factors"
    return _homogeneous(q, k, scale, degree, variance=variance, name=name, source=source)


def tensor_sketch_theory(q: Array, k: Array, *, scale: float, m: int, degree: int) -> Theory:
    """What is known of TensorSketch with m buckets, hashes and signs being random functions: its exact variance.

    Var = m⁻² [(m² − 2m + e) α^p + (m − e)((N + α − σ)^p + (2α − σ)^p) + e (N + 2α − 2σ)^p] − α^p, where e is the number
    of frequencies that are their own negatives, 1 for odd m and 2 for even. For p = 1 it is (N + α − 2σ)/m.

    Examples
    --------
    >>> q, k = np.array([[1.0, 1.0]]), np.array([[1.0, 0.0]])
    >>> promise = tensor_sketch_theory(q, k, scale=1.0, m=5, degree=1)
    >>> round(float(np.exp(2) * promise.relative_variance()[0, 0]), 12)  # (2 + 1 − 2)/5
    0.2
    """
    m, degree = check_whole("m", m), check_whole("degree", degree)

    def variance(pairs: Pairs) -> Matrix:
        return _bucket_variance(pairs.cosine**2, pairs.overlap, m, degree)

    source = "Pham and Pagh 2013; the variance is derived, by Fourier transform of the buckets"
    return _homogeneous(q, k, scale, degree, variance=variance, name="TensorSketch", source=source)


def poly_sketch_theory(q: Array, k: Array, *, scale: float, m: int, degree: int) -> Theory:
    """What is known of the square of a tree of Gaussian products of degree p/2: its mean, (x·y)^p + Var S.

    S is unbiased for (x·y)^(p/2), and squaring it makes every entry non-negative at the price of a bias towards large
    values. In a tree, E ab and E c² of the squared lengths a, b and the inner product c of two sketched vectors follow
    from those of the level below: (v² + (m − 1) w²)/m with v = E ab + 2 E c² and w the quantity itself.

    Examples
    --------
    >>> q, k = np.array([[1.0, 1.0]]), np.array([[1.0, 0.0]])
    >>> promise = poly_sketch_theory(q, k, scale=1.0, m=3, degree=4)
    >>> round(float(np.exp(1) * promise.mean()[0, 0]), 12)  # 1 + ((2 + 2)² − 1)/3
    6.0
    """
    m, degree = check_whole("m", m), check_whole("degree", degree)
    if degree < 4 or degree & (degree - 1):
        raise ValueError(f"degree must be a power of two, 4 or more, got {degree}")

    def mean(pairs: Pairs) -> Matrix:
        lengths, product = np.ones_like(pairs.n), pairs.cosine**2
        for _ in range(degree.bit_length() - 2):
            joint = (lengths + 2 * product) ** 2
            lengths, product = (joint + (m - 1) * lengths**2) / m, (joint + (m - 1) * product**2) / m
        return _times_power(product, pairs, degree)

    source = "Kacham, Mirrokni and Zhong 2023, arXiv 2310.01655; second moments of the tree derived"
    return _theory(q, k, scale, "self-tensored sketch, its mean", source, mean=mean)


def maclaurin_theory(q: Array, k: Array, *, scale: float, m: int, degree: int, stratified: bool = False) -> Theory:
    """What is known of m random Maclaurin features whose degrees are at most ``degree``.

    The mean is the power series cut after ``degree``; with a_k = 1/k!, the law p_k of the degrees and
    η = N + 2(α − σ), the second moment of one feature is Σ a_k² η^k/p_k, which is 2 I₀(2√(2η)) where no degree is cut.
    With stratified degrees the square of the mean in the variance is replaced by the mean square over the strata.

    Examples
    --------
    >>> from scipy.special import i0
    >>> q, k = np.array([[0.6, 0.0]]), np.array([[0.0, 0.8]])
    >>> promise = maclaurin_theory(q, k, scale=1.0, m=1, degree=30)
    >>> bool(np.isclose(promise.relative_variance()[0, 0], 2 * i0(2 * np.sqrt(2) * 0.48) - 1))
    True
    """
    series = _Series(check_whole("m", m), check_whole("degree", degree), stratified)
    degrees = "stratified degrees" if stratified else "independent degrees"
    source = "Kar and Karnick 2012, arXiv 1201.6530; second moment derived"
    return _theory(
        q, k, scale, f"random Maclaurin features, {degrees}", source, mean=series.mean, log_variance=series.log_variance
    )


def poisson_theory(q: Array, k: Array, *, scale: float, m: int, rate: ArrayLike) -> Theory:
    """What is known of m Poisson features of the given rate λ (..., 1, 1): unbiased, second moment exp(λd + σ/λ).

    Examples
    --------
    >>> q, k = np.array([[0.6, 0.0]]), np.array([[0.5, 0.8]])
    >>> promise = poisson_theory(q, k, scale=1.0, m=1, rate=0.2)
    >>> bool(np.isclose(promise.relative_variance()[0, 0], np.exp(0.4 + 0.09 / 0.2 - 0.6) - 1))
    True
    """
    m, d = check_whole("m", m), int(q.shape[-1])
    a = np.asarray(rate, dtype=np.float64)

    def log_variance(pairs: Pairs) -> Matrix:
        log_moment = a * d + _ratio(pairs.sigma, np.broadcast_to(a, pairs.sigma.shape)) - 2 * pairs.u
        with np.errstate(divide="ignore"):
            return np.asarray(log_moment + np.log(-np.expm1(-np.maximum(log_moment, 0.0))) - np.log(m))

    source = "Likhosherstov et al. 2022, arXiv 2205.15317; second moment derived from the Poisson generating function"
    return _theory(q, k, scale, "Poisson features", source, mean=lambda p: np.ones_like(p.u), log_variance=log_variance)


# -- moments -----------------------------------------------------------------------------------------------------------


def _draw_variance(a: Matrix, s: Matrix, p: int, kind: str) -> Matrix:
    """Variance of one product of p factors over N^p, where a = α/N and s = σ/N."""
    if kind == "rademacher":
        second = (1 + 2 * (a - s)) ** p
    elif kind == "gaussian":
        second = (1 + 2 * a) ** p
    elif kind == "complex_rademacher":  # the real part z has E z² = (E|·|² + Re E(·)²)/2
        second = ((1 + a - s) ** p + (2 * a - s) ** p) / 2
    else:
        second = ((1 + a) ** p + (2 * a) ** p) / 2
    return np.asarray(second - a**p)


def _bucket_variance(a: Matrix, s: Matrix, m: int, p: int) -> Matrix:
    """Variance of TensorSketch over N^p: pairs of frequencies that are equal, opposite, both, or neither."""
    own = 2 - m % 2
    same, opposite, both = (1 + a - s) ** p, (2 * a - s) ** p, (1 + 2 * a - 2 * s) ** p
    neither = a**p
    return np.asarray(((m - own) * (same - neither) + (m - own) * (opposite - neither) + own * (both - neither)) / m**2)


def degree_law(degree: int) -> Matrix:
    """Probabilities of the degrees 0 … ``degree`` of random Maclaurin features, proportional to 2^(−k−1).

    Examples
    --------
    >>> degree_law(1).tolist()
    [0.6666666666666666, 0.3333333333333333]
    """
    return np.asarray(0.5 ** np.arange(1, degree + 2) / (1 - 0.5 ** (degree + 1)))


@dataclass(frozen=True)
class _Series:
    """Moments of random Maclaurin features."""

    m: int
    degree: int
    stratified: bool

    def mean(self, pairs: Pairs) -> Matrix:
        """The cut series over exp(u)."""
        terms, top = self._terms(pairs.u)
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(top - pairs.u) * np.sum(terms, -1))

    def log_variance(self, pairs: Pairs) -> Matrix:
        """Logarithm of (Σ a_k² η^k/p_k − Σ C_kl t_k t_l)/m for t_k = a_k u^k/p_k, over exp(2u)."""
        law = degree_law(self.degree)
        k = np.arange(self.degree + 1)
        eta = np.maximum(pairs.n + 2 * (pairs.u**2 - pairs.sigma), 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            log_squares = np.where(k == 0, 0.0, k * np.log(eta)[..., None]) - 2 * gammaln(k + 1) - np.log(law)
        log_second = np.logaddexp.reduce(log_squares, axis=-1)
        terms, top = self._terms(pairs.u)
        t = terms / law
        with np.errstate(divide="ignore"):
            explained = np.log(np.einsum("...k,kl,...l->...", t, self._joint_law(law), t)) + 2 * top
            rest = np.log(-np.expm1(np.minimum(explained - log_second, 0.0)))
        return np.asarray(log_second + rest - np.log(self.m) - 2 * pairs.u)

    def _terms(self, u: Matrix) -> tuple[Matrix, Matrix]:
        """u^k/k! over exp(top) and top, the largest logarithm."""
        k = np.arange(self.degree + 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(k == 0, 0.0, k * np.log(np.abs(u))[..., None]) - gammaln(k + 1)
        top = np.max(logs, -1)
        return np.sign(np.where(k % 2 == 0, 1.0, u[..., None])) * np.exp(logs - top[..., None]), top

    def _joint_law(self, law: Matrix) -> Matrix:
        """C_kl: mean over the features of P(degree k) P(degree l)."""
        if not self.stratified:
            return np.outer(law, law)
        edges = np.minimum(np.concatenate([[0.0], np.cumsum(law)]), 1.0)
        edges[-1] = 1.0
        start = np.arange(self.m)[:, None] / self.m
        overlap = np.minimum(edges[1:], start + 1 / self.m) - np.maximum(edges[:-1], start)
        p = self.m * np.maximum(overlap, 0.0)
        return np.asarray(p.T @ p / self.m)


# -- what they share ---------------------------------------------------------------------------------------------------


def _homogeneous(
    q: Array, k: Array, scale: float, degree: int, *, variance: Callable[[Pairs], Matrix], name: str, source: str
) -> Theory:
    """An unbiased estimate of (x·y)^degree; ``variance`` is in units of N^degree."""

    def mean(pairs: Pairs) -> Matrix:
        return _times_power(pairs.cosine**degree, pairs, degree)

    def log_variance(pairs: Pairs) -> Matrix:
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(np.maximum(variance(pairs), 0.0)) + degree * np.log(pairs.n) - 2 * pairs.u)

    return _theory(q, k, scale, name, source, mean=mean, log_variance=log_variance)


def _times_power(value: Matrix, pairs: Pairs, degree: int) -> Matrix:
    """value · N^(degree/2) exp(−u), without overflow on the way."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.asarray(value * np.exp(degree / 2 * np.log(pairs.n) - pairs.u))


def _theory(
    q: Array,
    k: Array,
    scale: float,
    name: str,
    source: str,
    *,
    mean: Callable[[Pairs], Matrix],
    log_variance: Callable[[Pairs], Matrix] | None = None,
) -> Theory:
    x, y = scaled_pair(q, k, scale)
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])

    def rows(function: Callable[[Pairs], Matrix]) -> Callable[[int, int], Matrix]:
        return lambda start, stop: function(pairs_of(x[..., start:stop, :], y))

    return Theory(
        name=name,
        kind="closed form",
        status="VE",
        source=source,
        shape=(*batch, x.shape[-2], y.shape[-2]),
        mean_rows=rows(mean),
        log_variance_rows=None if log_variance is None else rows(log_variance),
        assumptions=(
            "entries of the kernel before division by the row sums, relative to exp(x·y)",
            "independent factors; hashes and signs are random functions",
            "exact arithmetic",
        ),
    )
