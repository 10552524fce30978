"""Random features of the softmax kernel: mean and variance of one entry of the kernel matrix, in closed form.

Notation: x = √scale · q and y = √scale · k, so that x·y is the logit and SM = exp(x·y) the entry; t = |x + y|²,
s = |x − y|². m is the number of random frequencies (trigonometric and hyperbolic features hold 2m numbers). Everything
is float64 NumPy, whatever library the arrays come from: these are references.

The three families are one formula. Write τ = t for the positive and hyperbolic, τ = −s for the trigonometric features:

    variance of one frequency / SM²          e^t − 1 (positive),  cosh τ − 1 (hyperbolic, trigonometric)
    covariance within an orthogonal block    C_d(τ) = e^(−τ) ₁F₁(d; d/2; τ/2) − 1

The first line is Lemma 2 of Choromanski et al. 2021 (arXiv 2009.14794). The second follows from |ω₁ + ω₂|² ~ χ²_{2d} in
a uniform direction, for two rows of a Haar-orthogonal block with χ_d norms; ``theory/_blocks.py`` has the other blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np
from scipy.spatial.distance import cdist

from nla_llm.backend import Array, namespace, to_numpy
from nla_llm.theory._blocks import equiangular_covariance, fixed_norm_log_variance

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from nla_llm.theory.bound import Matrix

__all__ = [
    "ISOTROPIC",
    "Features",
    "block_cosine",
    "claimed_gain",
    "crossover_angle",
    "log_optimal_positive_variance",
    "log_relative_variance",
    "optimal_rho",
    "pair_count",
    "recentring_shift",
    "relative_variance",
    "squared_norms",
    "trigonometric_to_positive",
]

ISOTROPIC = ("iid", "orthogonal", "simplex", "regularised")  # ensembles whose law is the same in every rotated frame
Features: TypeAlias = Literal["trigonometric", "positive", "hyperbolic"]


# -- arguments ---------------------------------------------------------------------------------------------------------


def squared_norms(q: Array, k: Array, *, scale: float, plus: bool = True) -> Matrix:
    """|x + y|² (``plus``) or |x − y|² of all pairs, float64 (..., n_q, n_k), from q (..., n_q, d) and k (..., n_k, d).

    Computed from the differences themselves, so that small values keep their relative accuracy.

    Raises
    ------
    ValueError
        If ``scale`` is not positive and finite: with a negative scale pass −q and |scale|, which is the same kernel.

    Examples
    --------
    >>> squared_norms(np.eye(2), np.eye(2), scale=1.0).tolist()
    [[4.0, 2.0], [2.0, 4.0]]
    """
    x, y = scaled_pair(q, k, scale)
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = np.broadcast_to(x, (*batch, *x.shape[-2:])), np.broadcast_to(y, (*batch, *y.shape[-2:]))
    out = np.empty((*batch, x.shape[-2], y.shape[-2]))
    for index in np.ndindex(batch):
        out[index] = cdist(x[index], -y[index] if plus else y[index], "sqeuclidean")
    return out


def scaled_pair(q: Array, k: Array, scale: float) -> tuple[Matrix, Matrix]:
    """x = √scale · q and y = √scale · k in float64; ValueError where ``scale`` is not positive."""
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, got {scale!r}; for a negative one pass −q and |scale|")
    root = float(np.sqrt(scale))
    return root * to_numpy(q).astype(np.float64), root * to_numpy(k).astype(np.float64)


def check_whole(name: str, value: int) -> int:
    """``value`` as an int, or a ValueError that names the argument."""
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return int(value)


def check_features(features: str) -> None:
    """ValueError where ``features`` is not one of the three families."""
    if features not in get_args(Features):
        raise ValueError(f"features must be one of {', '.join(get_args(Features))}, got {features!r}")


def _nonnegative(name: str, a: ArrayLike) -> Matrix:
    x = np.asarray(a, dtype=np.float64)
    if not bool(np.all(np.isfinite(x) & (x >= 0))):
        raise ValueError(f"{name} must be finite and >= 0, it is a squared norm; got values down to {np.min(x)!r}")
    return x


# -- variance of one entry ---------------------------------------------------------------------------------------------


def pair_count(m: int, d: int) -> int:
    """Ordered pairs of frequencies that share an orthogonal block, for blocks of d and one remainder.

    Examples
    --------
    >>> pair_count(5, 2)  # two blocks of two and one row alone
    4
    """
    full, rest = divmod(check_whole("m", m), check_whole("d", d))
    return full * d * (d - 1) + rest * (rest - 1)


def log_relative_variance(
    features: Features, squared_norm: ArrayLike, *, m: int, d: int | None = None, directions: str = "iid"
) -> Matrix:
    """Natural logarithm of Var(Â)/A² of one entry of the kernel estimate, elementwise; −inf where it is zero.

    Independent frequencies: (e^t − 1)/m, (cosh t − 1)/m, (cosh s − 1)/m for positive, hyperbolic and trigonometric
    features. Blocks of d rows (m may be any number: full blocks and a remainder; blocks are independent of one
    another) add N C/m², with N ordered pairs within blocks and the covariance C of a pair; N/m² is 1 − 1/m for m ≤ d.

    Parameters
    ----------
    features
        'trigonometric', 'positive' or 'hyperbolic'.
    squared_norm
        t = |x + y|² for positive and hyperbolic, s = |x − y|² for trigonometric features; any shape, >= 0.
    m, d
        Frequencies and head dimension; d is only needed for blocks.
    directions
        'iid'; 'orthogonal' or 'simplex' blocks with χ_d norms; 'regularised', orthogonal blocks with norms √d, of which
        it is the variance around a mean that is not A (:func:`nla_llm.theory.ensembles.fixed_norm_mean`).

    References
    ----------
    Choromanski et al. 2021, arXiv 2009.14794, Lemma 2 (independent); Reid et al. 2023, arXiv 2301.13856 (simplex, as a
    series); the covariances as they stand here are derived in the header of ``theory/_blocks.py``.

    Examples
    --------
    >>> v = [float(np.exp(log_relative_variance("positive", 1.0, m=4, d=4, directions=e))) for e in ISOTROPIC]
    >>> (v / np.expm1(1.0) * 4).round(4).tolist()
    [1.0, 0.8866, 0.5103, 0.4161]
    """
    check_features(features)
    m = check_whole("m", m)
    a = _nonnegative("squared_norm", squared_norm)
    if directions not in ISOTROPIC:
        raise ValueError(f"of the directions one of {', '.join(ISOTROPIC)} has such a variance, got {directions!r}")
    if d is None and directions != "iid":
        raise ValueError(f"directions={directions!r} needs d, the head dimension, which is the size of a block")
    pairs = 0 if d is None or directions == "iid" else pair_count(m, d)
    if directions == "regularised" and d is not None:
        return fixed_norm_log_variance(features, a, d, m=m, pairs=pairs)
    with np.errstate(divide="ignore"):
        log_single = _log_single(features, a)
        if not pairs or d is None:
            return np.asarray(log_single - np.log(m))
        # Covariance over variance stays bounded although both overflow; below 1e-100 it has reached its limit at zero.
        b = np.maximum(a, 1e-100)
        covariance, log_size = equiangular_covariance(features, b, d, block_cosine(directions, d))
        ratio = covariance * np.exp(log_size - _log_single(features, b))
        return np.asarray(log_single - np.log(m) + np.log1p(pairs / m * ratio))


def relative_variance(
    features: Features, squared_norm: ArrayLike, *, m: int, d: int | None = None, directions: str = "iid"
) -> Matrix:
    """Var(Â)/A² of one entry: the exponential of :func:`log_relative_variance`; inf where it overflows.

    Examples
    --------
    >>> bool(np.isclose(relative_variance("positive", 2.0, m=10), np.expm1(2.0) / 10))
    True
    """
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(log_relative_variance(features, squared_norm, m=m, d=d, directions=directions)))


def block_cosine(directions: str, d: int) -> float:
    """Cosine of the angle between two directions of a block: 0, or −1/(d − 1) in a regular simplex.

    Examples
    --------
    >>> block_cosine("simplex", 5)
    -0.25
    """
    return -1 / (d - 1) if directions == "simplex" and d > 1 else 0.0


def claimed_gain(t: ArrayLike, *, m: int, d: int) -> Matrix:
    """Lower bound of the gain of orthogonal positive features, (MSE(independent) − MSE(orthogonal))/A², for m ≤ d.

    2(m − 1)/(m(d + 2)) · (1 − e^(−t/2))² (Choromanski et al. 2021, arXiv 2009.14794, Theorem 2). The true gain, −(1 −
    1/m) C_d(t), is this one to leading order in t, so that the constant 2/(d + 2) cannot be improved.

    Examples
    --------
    >>> independent, orthogonal = (relative_variance("positive", 1.0, m=8, d=8, directions=e) for e in ISOTROPIC[:2])
    >>> bool(independent - orthogonal > claimed_gain(1.0, m=8, d=8))
    True
    """
    a, m, d = _nonnegative("t", t), check_whole("m", m), check_whole("d", d)
    if m > d:
        raise ValueError(f"the theorem speaks of one block, m <= d={d}, got m={m}")
    return np.asarray(2 * (m - 1) / (m * (d + 2)) * np.expm1(-a / 2) ** 2)


def _log_single(features: str, a: Matrix) -> Matrix:
    """log(e^a − 1) or log(cosh a − 1) = log(2 sinh²(a/2)), without overflow."""
    if features == "positive":
        return np.asarray(a + np.log(-np.expm1(-a)))
    return np.asarray(a + 2 * np.log(-np.expm1(-a)) - np.log(2))


# -- comparisons -------------------------------------------------------------------------------------------------------


def trigonometric_to_positive(norm: ArrayLike, angle: ArrayLike) -> Matrix:
    """Mean squared error of trigonometric over that of positive features at |x| = |y| = norm, per frequency.

    (cosh s − 1)/(e^t − 1), the function of Fig. 2 of Choromanski et al. 2021 (arXiv
    2009.14794); at the angle π/2 it is ½(1 − e^(−2 norm²)) < ½.

    Examples
    --------
    >>> round(float(trigonometric_to_positive(1.0, np.pi / 2)), 4)
    0.4323
    """
    squared, cosine = np.asarray(norm, dtype=np.float64) ** 2, np.cos(np.asarray(angle, dtype=np.float64))
    s, t = 2 * squared * (1 - cosine), 2 * squared * (1 + cosine)
    with np.errstate(divide="ignore"):
        return np.asarray(np.exp(_log_single("trigonometric", s) - _log_single("positive", t)))


def crossover_angle(norm: float) -> float:
    """Angle between x and y, in radians, above which positive features beat trigonometric ones (|x| = |y| = norm).

    Examples
    --------
    >>> round(crossover_angle(1.0), 4)
    1.7426
    """
    from scipy.optimize import brentq  # noqa: PLC0415 - scipy.optimize is slow to load and only needed here

    if not (np.isfinite(norm) and norm > 0):
        raise ValueError(f"norm must be positive and finite, got {norm!r}")
    return float(
        brentq(lambda a: float(np.log(trigonometric_to_positive(norm, a))), np.pi / 2, np.pi - 1e-9, xtol=1e-13)
    )


def optimal_rho(t: ArrayLike, d: int) -> Matrix:
    """Parameter ρ* in (0, 1] of the positive features of least variance; A* = (1 − 1/ρ*)/8, and ρ = 1 is FAVOR+.

    ρ* = 2d / (√((2t + d)² + 8dt) + 2t + d), with t = |x + y|² or its mean over all pairs (Likhosherstov et al. 2022,
    arXiv 2205.15317; the form used here is free of cancellation).

    Examples
    --------
    >>> round(float(optimal_rho(4.0, 16)), 6)
    0.561553
    """
    a, d = _nonnegative("t", t), check_whole("d", d)
    return np.asarray(2 * d / (np.sqrt((2 * a + d) ** 2 + 8 * d * a) + 2 * a + d))


def log_optimal_positive_variance(t: ArrayLike, d: int, *, m: int = 1, rho: ArrayLike | None = None) -> Matrix:
    """Natural logarithm of the relative variance (R(ρ) − 1)/m, R(ρ) = ((1 + ρ)²/(4ρ))^(d/2) e^(ρt), at ρ* unless given.

    For large t it grows as t^(d/2) instead of e^t (Likhosherstov et al. 2022, arXiv 2205.15317; ρ = 1 gives FAVOR+).

    Examples
    --------
    >>> round(float(log_optimal_positive_variance(64.0, 64) / np.log(10)), 3)
    13.069
    """
    a, d = _nonnegative("t", t), check_whole("d", d)
    r = optimal_rho(a, d) if rho is None else np.asarray(rho, dtype=np.float64)
    if not bool(np.all(r > 0)):
        raise ValueError(f"rho must be positive (A < 1/8 is the range of finite variance), got {rho!r}")
    log_moment = d / 2 * np.log1p((1 - r) ** 2 / (4 * r)) + r * a
    with np.errstate(divide="ignore"):
        return np.asarray(log_moment + np.log(-np.expm1(-log_moment)) - np.log(check_whole("m", m)))


# -- recentring --------------------------------------------------------------------------------------------------------


def recentring_shift(q: Array, k: Array) -> Array:
    """Shift c (..., 1, d) of the keys, k + c, that makes the mean of |x + y|² over all pairs least: c = −(q̄ + k̄).

    Softmax does not change when one vector is added to all keys, positive features do. The mean of |x + y|² drops by
    exactly scale · |q̄ + k̄|². For trigonometric features, whose variance grows with |x − y|², it is the wrong one:
    there c = q̄ − k̄ is the best. The factor √scale stands on both sides alike, so c is in the units of k. In the array
    namespace of q and k. Derived from the mean of a squared distance.

    Examples
    --------
    >>> recentring_shift(np.ones((3, 2)), np.zeros((4, 2))).tolist()
    [[-1.0, -1.0]]
    """
    xp = namespace(q, k)
    return -(xp.mean(q, axis=-2, keepdims=True) + xp.mean(k, axis=-2, keepdims=True))
