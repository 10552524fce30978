"""What each ensemble of directions does to the estimate of exp(scale · q kᵀ): means, variances, biases.

Ensembles that look the same in every rotated frame are those of :mod:`nla_llm.theory.random_features`. Rows of signs,
ω = ε∘h for the rows h of a Hadamard matrix and one vector ε of independent signs, know coordinates: with z = x + y,

    mean  e^(−|z|²/2) Π_l cosh z_l,    E f(ω_i) f(ω_j) = e^(−|z|²) Π_{l: h_il = h_jl} cosh 2z_l

for positive features, as (ω_i + ω_j)_l is 2ε_l h_il or 0. The set of l depends on i ⊕ j alone, and log Π is half of the
sum of all log cosh 2z_l plus their Walsh–Hadamard transform at i ⊕ j. Hyperbolic features take the mean of this and of
the product over the other l; trigonometric ones have cosines of x − y and the sign of the exponents reversed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import hadamard

from nla_llm.theory._blocks import oscillating_hyp0f1
from nla_llm.theory._confluent import poisson_mean, rising_ratio
from nla_llm.theory.bound import Theory
from nla_llm.theory.random_features import (
    Features,
    check_features,
    check_whole,
    log_relative_variance,
    scaled_pair,
    squared_norms,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import ArrayLike

    from nla_llm.backend import Array
    from nla_llm.theory.bound import Matrix

__all__ = ["fixed_norm_mean", "hadamard_mean", "kernel_theory", "sign_log_variance", "sign_mean"]

_LEMMA = "Choromanski et al. 2021, arXiv 2009.14794, Lemma 2"
_ENSEMBLES = {  # what the directions are, and from where the formula is
    "iid": ("independent Gaussian directions", _LEMMA),
    "orthogonal": (
        "Haar-orthogonal blocks with chi norms",
        _LEMMA + "; covariance within a block derived from |ω₁ + ω₂|² ~ χ²_{2d}",
    ),
    "simplex": (
        "simplex blocks with chi norms",
        _LEMMA + "; Reid et al. 2023, arXiv 2301.13856, the series of its simplex estimator summed up",
    ),
    "regularised": (
        "Haar-orthogonal blocks with fixed norms",
        "mean: Choromanski et al. 2021, arXiv 2009.14794, Theorem 1; variance derived",
    ),
    "hadamard": (
        "three Hadamard factors with chi norms",
        "derived from the fourth moments of a row; sixth order in x ± y is left out",
    ),
    "hadamard1": ("Hadamard rows with one diagonal of signs", "derived, E over independent signs"),
    "sobol": ("scrambled Sobol points", "each point by itself is uniform; no variance is known"),
}


def kernel_theory(q: Array, k: Array, *, scale: float, features: Features, m: int, directions: str = "iid") -> Theory:
    """What is known of the estimate of exp(scale · q kᵀ) by m random frequencies: its mean, and mostly its variance.

    Mean and variance in closed form for 'iid', 'orthogonal', 'simplex' (unbiased), 'regularised' and 'hadamard1'
    (biased). For 'sobol' the mean alone, which is exact; for 'hadamard' the mean alone, to fourth order in x ± y.

    Parameters
    ----------
    q, k
        Queries (..., n_q, d) and keys (..., n_k, d), as the features see them (after recentring, if any).
    directions
        Name of the ensemble.

    Examples
    --------
    >>> q, k = np.ones((3, 4)), np.zeros((2, 4))
    >>> promise = kernel_theory(q, k, scale=0.5, features="positive", m=8)
    >>> promise.relative_variance().shape, promise.unbiased
    ((3, 2), True)
    >>> sorted(kernel_theory(q, k, scale=0.5, features="positive", m=8, directions="sobol").covers)
    ['mean']
    """
    check_features(features)
    scaled_pair(q[..., :1, :], k[..., :1, :], scale)
    if directions not in _ENSEMBLES:
        raise ValueError(f"directions must be one of {', '.join(_ENSEMBLES)}, got {directions!r}")
    words, source = _ENSEMBLES[directions]
    entries = _Entries(q, k, scale, features, check_whole("m", m), directions)
    batch = np.broadcast_shapes(q.shape[:-2], k.shape[:-2])
    return Theory(
        name=f"{features} features, {words}",
        kind="first order" if directions == "hadamard" else "closed form",
        status="VE",
        source=source,
        shape=(*batch, int(q.shape[-2]), int(k.shape[-2])),
        mean_rows=entries.mean,
        log_variance_rows=None if directions in {"sobol", "hadamard"} else entries.log_variance,
        assumptions=("entries of the kernel before division by the row sums", words, "exact arithmetic"),
    )


@dataclass(frozen=True)
class _Entries:
    """Means and variances of the entries, row block by row block."""

    q: Array
    k: Array
    scale: float
    features: Features
    m: int
    directions: str

    def log_variance(self, start: int, stop: int) -> Matrix:
        if self.directions == "hadamard1":
            return self._by_vectors(start, stop, lambda z: sign_log_variance(self.features, z, m=self.m))
        d = int(self.q.shape[-1])
        return log_relative_variance(
            self.features, self._squares(start, stop), m=self.m, d=d, directions=self.directions
        )

    def mean(self, start: int, stop: int) -> Matrix:
        if self.directions == "hadamard1":
            return self._by_vectors(start, stop, lambda z: sign_mean(self.features, z))
        if self.directions == "hadamard":
            return self._by_vectors(start, stop, hadamard_mean)
        if self.directions == "regularised":
            return fixed_norm_mean(self._squares(start, stop), int(self.q.shape[-1]), features=self.features)
        batch = np.broadcast_shapes(self.q.shape[:-2], self.k.shape[:-2])
        return np.ones((*batch, stop - start, self.k.shape[-2]))

    def _squares(self, start: int, stop: int) -> Matrix:
        plus = self.features != "trigonometric"
        return squared_norms(self.q[..., start:stop, :], self.k, scale=self.scale, plus=plus)

    def _by_vectors(self, start: int, stop: int, function: Callable[[Matrix], Matrix]) -> Matrix:
        """``function`` of the vectors x ± y (n_k, d) of one query after another."""
        x, y = scaled_pair(self.q[..., start:stop, :], self.k, self.scale)
        batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
        x, y = np.broadcast_to(x, (*batch, *x.shape[-2:])), np.broadcast_to(y, (*batch, *y.shape[-2:]))
        sign = -1 if self.features == "trigonometric" else 1
        out = np.empty((*batch, stop - start, y.shape[-2]))
        for index in np.ndindex(*batch, stop - start):
            out[index] = function(x[index] + sign * y[index[:-1]])
        return out


# -- fixed norms -------------------------------------------------------------------------------------------------------


def fixed_norm_mean(squared_norm: ArrayLike, d: int, *, features: Features = "positive") -> Matrix:
    """E Â/A for directions of norm √d, uniform on the sphere: e^(−τ/2) ₀F₁(; d/2; dτ/4), τ = t or −s; a bias.

    1 − τ²/(4(d + 2)) + O(τ³), at most 1 for positive and hyperbolic features, any sign for trigonometric ones
    (Choromanski et al. 2021, arXiv 2009.14794, the kernel SMREG of Theorem 1).

    Examples
    --------
    >>> round(float(fixed_norm_mean(8.0, 64)), 6)
    0.8098
    """
    check_features(features)
    d = check_whole("d", d)
    a = np.asarray(squared_norm, dtype=np.float64)
    if not bool(np.all(np.isfinite(a) & (a >= 0))):
        raise ValueError(f"squared_norm must be finite and >= 0, got values down to {np.min(a)!r}")
    if features == "trigonometric":
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(a / 2) * oscillating_hyp0f1(d, d * a / 4))
    return poisson_mean(lambda count: np.exp(rising_ratio(d, count)), a / 2)


# -- signs -------------------------------------------------------------------------------------------------------------


def sign_mean(features: Features, z: ArrayLike) -> Matrix:
    """E Â/A for directions with independent entries ±1: e^(−|z|²/2) Π cosh z_l, for cosines e^(|z|²/2) Π cos z_l.

    A bias. Signs are the rows of one Hadamard matrix times a diagonal of signs, whatever is cut off them.

    Parameters
    ----------
    z
        x + y, for trigonometric features x − y: (..., d).

    Examples
    --------
    >>> round(float(sign_mean("positive", [1.0, 1.0])), 6)  # (cosh 1)²/e
    0.875957
    """
    check_features(features)
    a = np.asarray(z, dtype=np.float64)
    norm = np.sum(a**2, axis=-1)
    if features == "trigonometric":
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(norm / 2) * np.prod(np.cos(a), axis=-1))
    return np.asarray(np.exp(np.sum(_log_cosh(a), axis=-1) - norm / 2))


def sign_log_variance(features: Features, z: ArrayLike, *, m: int) -> Matrix:
    """Natural logarithm of Var(Â)/A² for m rows of Hadamard matrices times diagonals of signs, in blocks of D rows.

    Derived in the header of this module; D is the power of two from d on, each block has a diagonal of its own.
    The first column of a Hadamard matrix holds ones, so all rows of a block agree in the first coordinate: positive
    features of z along it do not improve with the rows of a block, while along other axes a block has no linear error.

    Parameters
    ----------
    z
        x + y, for trigonometric features x − y: (..., d).

    Examples
    --------
    >>> round(float(sign_log_variance("positive", [1.0], m=1)), 6)  # log((cosh 2 − cosh² 1)/e)
    -0.677121
    """
    check_features(features)
    a, m = np.asarray(z, dtype=np.float64), check_whole("m", m)
    d = a.shape[-1]
    size = 1 << (d - 1).bit_length()
    characters = hadamard(size)[:d].astype(np.float64)
    counts = _offset_counts(m, size) / m**2
    norm = np.sum(a**2, axis=-1)
    with np.errstate(divide="ignore"):
        if features == "trigonometric":
            pair, square = _cosine_pairs(a, characters), np.prod(np.cos(a), axis=-1, keepdims=True) ** 2
            return np.asarray(np.log(np.maximum((pair - square) @ counts, 0)) + norm)
        logs = _log_cosh(2 * a)
        total, transform = np.sum(logs, axis=-1, keepdims=True), logs @ characters
        pair = (total + transform) / 2 if features == "positive" else total / 2 + _log_cosh(transform / 2)
        square = 2 * np.sum(_log_cosh(a), axis=-1, keepdims=True)
        top = pair[..., :1]
        near = np.minimum(pair - square, 1.0)
        terms = np.where(
            pair - square < 1, np.exp(square - top) * np.expm1(near), np.exp(pair - top) - np.exp(square - top)
        )
        return np.asarray(np.log(np.maximum(terms @ counts, 0)) + top[..., 0] - norm)


def _offset_counts(m: int, size: int) -> Matrix:
    """Ordered pairs (i, j) within blocks, i = j included, for each i ⊕ j."""
    full, rest = divmod(m, size)
    r = np.arange(rest)
    return np.asarray(full * size + np.bincount((r[:, None] ^ r).ravel(), minlength=size), dtype=np.float64)


def _cosine_pairs(a: Matrix, characters: Matrix) -> Matrix:
    """½(Π_S cos 2a_l + Π_{not S} cos 2a_l) for the sets S where a character is +1, through logarithms and signs."""
    c = np.cos(2 * a)
    logs, negative = np.log(np.maximum(np.abs(c), np.finfo(np.float64).tiny)), (c < 0).astype(np.float64)
    products = []
    for sign in (1, -1):
        inside = (1 + sign * characters) / 2
        parity = np.rint(negative @ inside) % 2
        products.append((1 - 2 * parity) * np.exp(logs @ inside))
    return np.asarray((products[0] + products[1]) / 2)


def _log_cosh(x: Matrix) -> Matrix:
    """log cosh x to relative accuracy."""
    size = np.abs(x)
    small = np.minimum(size, 1.0)
    return np.asarray(
        np.where(size < 1, np.log1p(2 * np.sinh(small / 2) ** 2), size + np.log1p(np.expm1(-2 * size) / 2))
    )


def hadamard_mean(z: ArrayLike) -> Matrix:
    """E Â/A to fourth order for rows of H D₃ H D₂ H D₁ with χ_D norms: 1 + |z|⁴/D³ − (1 + 2/D) Σ z_l⁴/(3D²).

    Derived: a row s of the product of three has E s_l⁴ = (3 − 6/D + 4/D²)/D² and E s_l² s_k² = (1 − 2/D + 4/D²)/D²
    where a uniform direction has 3 and 1 times 1/(D(D + 2)), odd moments vanish, and E r⁴ = D(D + 2). The same for the
    three feature functions; the mean over directions of z is exact. What is left out is of sixth order in z: by
    enumeration of all signs the bias at |z| = 1 is −1.0 % along an axis and 1.0 % along the diagonal at D = 4, −0.36 %
    and 0.13 % at D = 8. It falls as 1/D², that of norms √D as 1/D, and that of one factor not at all along an axis.

    Parameters
    ----------
    z
        x + y, for trigonometric features x − y: (..., d), with D the power of two from d on.

    Examples
    --------
    >>> float(hadamard_mean([0.0, 0.0]))
    1.0
    """
    a = np.asarray(z, dtype=np.float64)
    size = 1 << (a.shape[-1] - 1).bit_length()
    squares = a * a
    fourth = np.sum(squares, axis=-1) ** 2 / size**3 - (1 + 2 / size) * np.sum(squares**2, axis=-1) / (3 * size**2)
    return np.asarray(1 + fourth)
