"""Phase, generalised exponential and hybrid features: mean and variance of one entry of the kernel, in closed form.

Notation as in :mod:`nla_llm.theory.random_features`: x·y is the logit, SM = exp(x·y), z = x + y, t = |z|²,
s = |x − y|², C_d(τ) the covariance of two rows of a Haar-orthogonal block with χ_d norms, over SM². Variances of one
direction over SM²:

    random phase          e^s − 1 + e^(−s)/2
    exponential           R − 1,  log R = Σ_l [½ log((1 + ρ_l)²/(4ρ_l)) + ρ_l z_l²]  in the coordinates of ρ

In an orthogonal block phases have the covariance C_d(−s) of trigonometric features: averaged over independent phases,
√2 cos(ω·x + b) √2 cos(ω·y + b) is cos ω·(x − y). Exponential features with one ρ have C_d(t), that of positive ones,
whatever ρ is: exp(2A|ω|²) turns independent χ_d norms into χ_d norms times (1 − 4A)^(−1/2), and the factor
(1 − 4A)^(1/2) before ω·z undoes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nla_llm.backend import Array, to_numpy
from nla_llm.theory._confluent import pair_covariance
from nla_llm.theory.bound import Matrix, Theory
from nla_llm.theory.random_features import check_whole, pair_count, squared_norms

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

__all__ = ["exponential_theory", "log_exponential_moment", "log_phase_variance", "phase_theory"]

Ensemble = Literal["iid", "orthogonal"]


def log_phase_variance(squared_distance: ArrayLike, *, m: int, d: int, orthogonal: bool = False) -> Matrix:
    """log Var(Â)/SM² of m random-phase features at s = |x − y|², elementwise: (e^s − 1 + e^(−s)/2)/m, and C_d(−s).

    Sutherland and Schneider 2015, arXiv 1506.02785, for the Gaussian kernel.

    Examples
    --------
    >>> round(float(np.exp(log_phase_variance(0.0, m=4, d=2))), 12)  # not zero where x = y
    0.125
    """
    s = np.asarray(squared_distance, dtype=np.float64)
    single = s + np.log1p(np.expm1(-s) ** 2) - np.log(2)
    return _with_covariance(single, -s, m=m, d=d, orthogonal=orthogonal)


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


def _with_covariance(log_single: Matrix, tau: Matrix, *, m: int, d: int, orthogonal: bool) -> Matrix:
    """log of the variance over m directions from that of one and the covariance C_d(τ) within blocks."""
    pairs = pair_count(check_whole("m", m), d) if orthogonal else 0
    if not pairs:
        return np.asarray(log_single - np.log(m))
    covariance, log_size = pair_covariance(tau, d)
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

    The variance for 'iid' and 'orthogonal' directions; for other ensembles of Gaussian rows the mean alone.

    Examples
    --------
    >>> promise = phase_theory(np.zeros((3, 2)), np.zeros((4, 2)), m=2, directions="iid")
    >>> promise.relative_variance().shape, float(promise.relative_variance()[0, 0])
    ((3, 4), 0.25)
    """
    pairs, d = _pairs(x, y), int(x.shape[-1])

    def log_variance(start: int, stop: int) -> Matrix:
        s = pairs.squares(start, stop, plus=False)
        return log_phase_variance(s, m=m, d=d, orthogonal=directions == "orthogonal")

    source = "Sutherland and Schneider 2015, arXiv 1506.02785"
    source += "; covariance within a block derived" if directions == "orthogonal" else ""
    known = directions in {"iid", "orthogonal"}
    return pairs.theory("random-phase features", directions, source, log_variance if known else None)


def exponential_theory(x: Array, y: Array, *, rho: Any, m: int, directions: str) -> Theory:
    """What is known of m exponential features with ρ (one, (..., 1, 1), or for each coordinate (..., 1, d)).

    x and y are what the features see, in coordinates in which the quadratic form is diagonal. The variance is known
    for 'iid' directions, and for 'orthogonal' ones where ρ is the same for all coordinates; else the mean alone.

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
        if directions == "iid":
            return _with_covariance(single, single, m=m, d=d, orthogonal=False)
        return _with_covariance(single, pairs.squares(start, stop, plus=True), m=m, d=d, orthogonal=True)

    source = "Likhosherstov et al. 2022, arXiv 2205.15317, Theorem 3.2; 2023, arXiv 2302.00787"
    source += "; covariance within a block derived" if directions == "orthogonal" and one_for_all else ""
    known = directions == "iid" or (directions == "orthogonal" and one_for_all)
    return pairs.theory("exponential features", directions, source, log_variance if known else None)
