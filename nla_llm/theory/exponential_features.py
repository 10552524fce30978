"""Phase, generalised exponential and hybrid features: mean and variance of one entry of the kernel, in closed form.

Notation as in :mod:`nla_llm.theory.random_features`: x·y is the logit, SM = exp(x·y), z = x + y, t = |z|²,
s = |x − y|². Variances of one direction over SM²:

    random phase          e^s − 1 + e^(−s)/2
    exponential           R − 1,  log R = Σ_l [½ log((1 + ρ_l)²/(4ρ_l)) + ρ_l z_l²]  in the coordinates of ρ

    hybrid                see :func:`hybrid_variance`

In a block with χ_d norms, orthogonal or a simplex, phases have the covariance of trigonometric features: averaged over
independent phases, √2 cos(ω·x + b) √2 cos(ω·y + b) is cos ω·(x − y). Exponential features with one ρ have that of
positive ones, whatever ρ is: exp(2A|ω|²) turns independent χ_d norms into χ_d norms times (1 − 4A)^(−1/2), and the
factor (1 − 4A)^(1/2) before ω·z undoes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import Array, to_numpy
from nla_llm.theory._blocks import equiangular_covariance
from nla_llm.theory.bound import Matrix, Theory
from nla_llm.theory.random_features import block_cosine, check_whole, pair_count, squared_norms

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

__all__ = [
    "exponential_theory",
    "hybrid_theory",
    "hybrid_variance",
    "log_exponential_moment",
    "log_phase_variance",
    "phase_theory",
]

BLOCKS = ("orthogonal", "simplex")  # blocks with independent χ_d norms whose covariances are known


def log_phase_variance(squared_distance: ArrayLike, *, m: int, d: int, directions: str = "iid") -> Matrix:
    """log Var(Â)/SM² of m random-phase features at s = |x − y|², elementwise: (e^s − 1 + e^(−s)/2)/m, and covariances.

    Sutherland and Schneider 2015, arXiv 1506.02785, for the Gaussian kernel.

    Examples
    --------
    >>> round(float(np.exp(log_phase_variance(0.0, m=4, d=2))), 12)  # not zero where x = y
    0.125
    """
    s = np.asarray(squared_distance, dtype=np.float64)
    single = s + np.log1p(np.expm1(-s) ** 2) - np.log(2)
    return _with_covariance(single, "trigonometric", s, m=m, d=d, directions=directions)


def log_exponential_moment(rho: ArrayLike, t: ArrayLike, d: int = 1) -> Matrix:
    """log E f²/SM² of one exponential feature: (d/2) log((1 + ρ)²/(4ρ)) + ρt; for one ρ a coordinate, d = 1 and a sum.

    Likhosherstov et al. 2022, arXiv 2205.15317, Theorem 3.2, with ρ = 1/(1 − 8A).

    Examples
    --------
    >>> float(log_exponential_moment(1.0, 2.5, 7))
    2.5
    """
    r = np.asarray(rho, dtype=np.float64)
    if not bool(np.all((r > 0) & np.isfinite(r))):
        raise ValueError(f"rho must be positive and finite, got {rho!r}")
    return np.asarray(d / 2 * np.log1p((1 - r) ** 2 / (4 * r)) + r * np.asarray(t, dtype=np.float64))


def _with_covariance(log_single: Matrix, function: str, a: Matrix, *, m: int, d: int, directions: str) -> Matrix:
    """log of the variance over m directions from that of one, and the covariance within blocks of ``function`` at a."""
    pairs = 0 if directions == "iid" else pair_count(check_whole("m", m), d)
    if not pairs:
        return np.asarray(log_single - np.log(m))
    covariance, log_size = equiangular_covariance(function, a, d, block_cosine(directions, d))
    with np.errstate(invalid="ignore", over="ignore"):  # C = 0 beside a variance of zero, at ρ = 1 and t = 0
        ratio = np.where(covariance == 0, 0.0, covariance * np.exp(log_size - log_single))
    return np.asarray(log_single - np.log(m) + np.log1p(pairs / m * ratio))


def _log_expm1(a: Matrix) -> Matrix:
    with np.errstate(divide="ignore"):
        return np.asarray(a + np.log(-np.expm1(-a)))


@dataclass(frozen=True)
class _Pairs:
    """Queries and keys as features see them, float64, and blocks of their |x ± y|²."""

    x: Matrix
    y: Matrix

    @property
    def shape(self) -> tuple[int, ...]:
        batch = np.broadcast_shapes(self.x.shape[:-2], self.y.shape[:-2])
        return (*batch, self.x.shape[-2], self.y.shape[-2])

    def squares(self, start: int, stop: int, *, plus: bool, weights: Matrix | None = None) -> Matrix:
        x, y = self.x[..., start:stop, :], self.y
        if weights is not None:
            x, y = np.sqrt(weights) * x, np.sqrt(weights) * y
        return squared_norms(x, y, scale=1.0, plus=plus)

    def theory(
        self, name: str, directions: str, source: str, log_variance: Callable[[int, int], Matrix] | None
    ) -> Theory:
        def ones(start: int, stop: int) -> Matrix:
            return np.ones((*self.shape[:-2], stop - start, self.shape[-1]))

        return Theory(
            name=f"{name}, {directions} directions",
            kind="closed form",
            status="VE",
            source=source,
            shape=self.shape,
            mean_rows=ones,
            log_variance_rows=log_variance,
            assumptions=(
                "entries of the kernel before division by the row sums",
                f"{directions} directions, each N(0, I), independent of the data",
                "exact arithmetic",
            ),
        )


def _pairs(x: Array, y: Array) -> _Pairs:
    return _Pairs(*(to_numpy(a).astype(np.float64) for a in (x, y)))


def phase_theory(x: Array, y: Array, *, m: int, directions: str) -> Theory:
    """What is known of m random-phase features of x (..., n_q, d) and y (..., n_k, d).

    The variance for 'iid', 'orthogonal' and 'simplex' directions; for other ensembles of Gaussian rows the mean alone.

    Examples
    --------
    >>> promise = phase_theory(np.zeros((3, 2)), np.zeros((4, 2)), m=2, directions="iid")
    >>> promise.relative_variance().shape, float(promise.relative_variance()[0, 0])
    ((3, 4), 0.25)
    """
    pairs, d = _pairs(x, y), int(x.shape[-1])

    def log_variance(start: int, stop: int) -> Matrix:
        s = pairs.squares(start, stop, plus=False)
        return log_phase_variance(s, m=m, d=d, directions=directions)

    source = "Sutherland and Schneider 2015, arXiv 1506.02785"
    source += "; covariance within a block derived" if directions in BLOCKS else ""
    known = directions in {"iid", *BLOCKS}
    return pairs.theory("random-phase features", directions, source, log_variance if known else None)


def exponential_theory(x: Array, y: Array, *, rho: Any, m: int, directions: str) -> Theory:
    """What is known of m exponential features with ρ (one, (..., 1, 1), or for each coordinate (..., 1, d)).

    x and y are what the features see, in coordinates in which the quadratic form is diagonal. The variance is known
    for 'iid' directions, and for 'orthogonal' and 'simplex' ones where ρ is the same for all coordinates; else the mean
    alone.

    Examples
    --------
    >>> promise = exponential_theory(np.ones((3, 2)), np.zeros((4, 2)), rho=1.0, m=1, directions="iid")
    >>> bool(np.isclose(promise.relative_variance()[0, 0], np.expm1(2.0)))
    True
    """
    pairs, d = _pairs(x, y), int(x.shape[-1])
    weights = np.asarray(rho, dtype=np.float64)
    one_for_all = weights.ndim == 0 or weights.shape[-1] == 1
    level = log_exponential_moment(weights, 0.0, d if one_for_all else 1)
    if not one_for_all:
        level = np.sum(level, axis=-1, keepdims=True)

    def log_variance(start: int, stop: int) -> Matrix:
        single = _log_expm1(level + pairs.squares(start, stop, plus=True, weights=weights))
        t = single if directions == "iid" else pairs.squares(start, stop, plus=True)
        return _with_covariance(single, "positive", t, m=m, d=d, directions=directions)

    source = "Likhosherstov et al. 2022, arXiv 2205.15317, Theorem 3.2; 2023, arXiv 2302.00787"
    source += "; covariance within a block derived" if directions in BLOCKS and one_for_all else ""
    known = directions == "iid" or (directions in BLOCKS and one_for_all)
    return pairs.theory("exponential features", directions, source, log_variance if known else None)


# -- hybrid features ---------------------------------------------------------------------------------------------------


def angular_weight(x: Matrix, y: Matrix, *, r: int) -> tuple[Matrix, Matrix]:
    """Mean θ/π and variance of the share of r hyperplanes that separate x and y, for all pairs: the mean of r coins.

    A zero vector is on the same side of all: its angle counts as π/2.

    Examples
    --------
    >>> mean, variance = angular_weight(np.eye(2), np.eye(2)[:1], r=2)
    >>> mean.ravel().tolist(), variance.ravel().tolist()
    ([0.0, 0.5], [0.0, 0.125])
    """
    norms = [np.linalg.norm(a, axis=-1, keepdims=True) for a in (x, y)]
    u, v = (np.divide(a, n, out=np.zeros_like(a), where=n > 0) for a, n in zip((x, y), norms, strict=True))
    # twice the arctangent of |u − v|/|u + v|: accurate at both ends, where the arccosine is not
    apart, together = (np.sqrt(squared_norms(u, v, scale=1.0, plus=plus)) for plus in (False, True))
    mean = 2 / np.pi * np.arctan2(apart, together)
    known = (norms[0] > 0) & np.swapaxes(norms[1] > 0, -1, -2)
    mean = np.where(known, mean, 0.5)
    return mean, mean * (1 - mean) / r


def gaussian_weight(t: Matrix, *, r: int, width: float) -> tuple[Matrix, Matrix]:
    """Mean e^(−σ²t/2) and variance (1 − e^(−σ²t))²/(2r) of (1/r) Σ_j cos(σ τ_j·z), |z|² = t.

    Examples
    --------
    >>> [float(a) for a in gaussian_weight(np.zeros(()), r=3, width=1.0)]
    [1.0, 0.0]
    """
    square = width**2 * t
    return np.exp(-square / 2), np.expm1(-square) ** 2 / (2 * r)


def hybrid_variance(mean: Matrix, variance: Matrix, *, s: Matrix, t: Matrix, difference: Matrix, m: int) -> Matrix:
    """Var/SM² of λ̂ Â⁺ + (1 − λ̂) Âᵗ with the same m independent directions, for a weight of this mean and variance.

    E λ̂² (1 + v⁺) + E(1 − λ̂)² (1 + vᵗ) + 2 E λ̂(1 − λ̂) (1 + c) − 1, with v⁺ = (e^t − 1)/m, vᵗ = (cosh s − 1)/m and the
    covariance c = (cos(|x|² − |y|²) − 1)/m of the two estimates, from E e^(ω·z) cos ω·Δ = e^(2x·y) cos z·Δ, Δ = x − y.

    As c ≤ 0, sharing the directions does not increase the variance wherever E λ̂(1 − λ̂) ≥ 0. Derived, as is the theorem
    of Choromanski et al. 2022, arXiv 2110.04367, for angular weights. inf where it overflows.

    Examples
    --------
    >>> one, zero = np.ones(1), np.zeros(1)
    >>> hybrid_variance(one, zero, s=one, t=zero, difference=zero, m=4).tolist()  # all positive, at x = −y
    [0.0]
    """
    mixed = mean * (1 - mean) - variance
    with np.errstate(over="ignore", invalid="ignore"):
        positive = np.where(mean**2 + variance > 0, (mean**2 + variance) * np.expm1(t), 0.0)
        wave = np.where((1 - mean) ** 2 + variance > 0, ((1 - mean) ** 2 + variance) * 2 * np.sinh(s / 2) ** 2, 0.0)
    return np.asarray((positive + wave - 4 * mixed * np.sin(difference / 2) ** 2) / m)


def hybrid_theory(x: Array, y: Array, *, m: int, directions: str, weight: str, r: int, width: float) -> Theory:
    """What is known of hybrid features of x (..., n_q, d) and y (..., n_k, d): the variance for 'iid' directions.

    Examples
    --------
    >>> x = np.eye(2)
    >>> promise = hybrid_theory(x, -x, m=2, directions="iid", weight="angular", r=1, width=1.0)
    >>> bool(promise.relative_variance()[0, 0] < 1e-12)
    True
    """
    pairs = _pairs(x, y)
    square_x, square_y = (np.sum(a * a, axis=-1) for a in (pairs.x, pairs.y))

    def log_variance(start: int, stop: int) -> Matrix:
        s, t = (pairs.squares(start, stop, plus=plus) for plus in (False, True))
        if weight == "angular":
            mean, spread = angular_weight(pairs.x[..., start:stop, :], pairs.y, r=r)
        else:
            mean, spread = gaussian_weight(t, r=r, width=width)
        difference = square_x[..., start:stop, None] - square_y[..., None, :]
        with np.errstate(divide="ignore"):
            return np.log(hybrid_variance(mean, spread, s=s, t=t, difference=difference, m=m))

    source = "Choromanski et al. 2022, arXiv 2110.04367; derived"
    return pairs.theory(f"{weight} hybrid features", directions, source, log_variance if directions == "iid" else None)
