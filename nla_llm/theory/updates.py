"""Low-rank updates: what chance alone gives, when a singular value means something, and how far its vectors are turned.

Everything is float64 NumPy.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from nla_llm.theory.bound import Matrix

__all__ = [
    "SpikedModel",
    "davis_kahan_bound",
    "frobenius_shrinker",
    "hard_threshold",
    "marchenko_pastur_median",
    "random_projection_norm",
    "random_subspace_similarity",
    "spiked_model",
    "wedin_bound",
]


# -- what chance alone gives -------------------------------------------------------------------------------------------


def random_projection_norm(frobenius_norm: float, rank: int, d_out: int, d_in: int) -> float:
    """‖Uᵀ W V‖_F, root mean square over Haar frames U and V of ``rank`` columns: rank · ‖W‖_F / √(d_out d_in).

    The column 'Random' of Table 7 of Hu et al. 2021 (arXiv 2106.09685), which reports 0.02 and 0.33 (derived).

    Examples
    --------
    >>> round(random_projection_norm(61.95, 64, 12288, 12288), 2)
    0.32
    """
    if not 1 <= rank <= min(d_out, d_in):
        raise ValueError(f"rank must lie between 1 and min(d_out, d_in)={min(d_out, d_in)}, got {rank!r}")
    return float(rank / np.sqrt(float(d_out) * d_in) * frobenius_norm)


def random_subspace_similarity(i: int, j: int, d: int) -> float:
    """Mean of φ = ‖U_iᵀ V_j‖_F² / min(i, j) over independent Haar frames of i and j columns: max(i, j)/d.

    Baseline of the subspace similarity of Hu et al. 2021 (arXiv 2106.09685), eq. 4 (derived).

    Examples
    --------
    >>> random_subspace_similarity(4, 8, 64)
    0.125
    """
    if not 1 <= min(i, j) <= max(i, j) <= d:
        raise ValueError(f"i and j must lie between 1 and d={d}, got {i!r} and {j!r}")
    return max(i, j) / d


# -- when a singular value means something -----------------------------------------------------------------------------


def hard_threshold(shape: tuple[int, int], *, noise: float | None = None, median: float | None = None) -> float:
    """Singular value below which truncation of a noisy low-rank matrix loses nothing, for the mean squared error.

    Known noise of standard deviation σ per entry: λ*(β) σ √n; unknown: λ*(β)/√μ_β times the median singular value. β is
    the ratio of the smaller side to the larger, n, and λ*(β)² = 2(β + 1) + 8β/((β + 1) + √(β² + 14β + 1)); λ*(1) = 4/√3
    (Gavish and Donoho 2014, arXiv 1305.5870).

    Parameters
    ----------
    shape
        Rows and columns of the data.
    noise
        σ, where it is known.
    median
        Median of the singular values of the data, where σ is not known. Give exactly one of the two.

    Examples
    --------
    >>> round(hard_threshold((100, 100), median=1.0), 6)
    2.858362
    """
    if (noise is None) == (median is None):
        raise ValueError(
            "give exactly one of noise (standard deviation of an entry) and median (of the singular values)"
        )
    small, large = sorted(int(s) for s in shape)
    if small < 1:
        raise ValueError(f"shape must be two sizes >= 1, got {shape!r}")
    ratio = small / large
    factor = np.sqrt(2 * (ratio + 1) + 8 * ratio / ((ratio + 1) + np.sqrt(ratio**2 + 14 * ratio + 1)))
    if noise is not None:
        return float(factor * noise * np.sqrt(large))
    assert median is not None  # noqa: S101 - for the type checker: one of the two was given
    return float(factor / np.sqrt(marchenko_pastur_median(ratio)) * median)


@lru_cache(maxsize=256)
def marchenko_pastur_median(ratio: float) -> float:
    """Median of the Marchenko–Pastur law of squared singular values, for noise of variance 1/n and 0 < ratio <= 1.

    Examples
    --------
    >>> round(marchenko_pastur_median(1.0), 6)
    0.652776
    """
    from scipy.integrate import quad  # noqa: PLC0415 - slow to load and only needed here
    from scipy.optimize import brentq  # noqa: PLC0415 - as above

    if not 0 < ratio <= 1:
        raise ValueError(f"ratio is the smaller side over the larger and must lie in (0, 1], got {ratio!r}")
    low, width = (1 - np.sqrt(ratio)) ** 2, 4 * np.sqrt(ratio)

    def density(half_angle: float) -> float:
        """Density in h for x = low + width·sin² h, which is smooth at both edges."""
        sine = np.sin(half_angle) ** 2
        return float(width**2 * sine * (1 - sine) / (np.pi * ratio * (low + width * sine)))

    def excess(half_angle: float) -> float:
        return float(quad(density, 0, half_angle, epsabs=1e-12, epsrel=1e-12)[0]) - 0.5

    return float(low + width * np.sin(float(brentq(excess, 1e-6, np.pi / 2, xtol=1e-14))) ** 2)


# -- how far singular vectors are turned -------------------------------------------------------------------------------


class SpikedModel(NamedTuple):
    """Limits for one spike: its singular value in the noisy matrix, squared cosines of its left and right vectors."""

    singular_value: Matrix
    left_overlap: Matrix
    right_overlap: Matrix


def spiked_model(strength: ArrayLike, ratio: float) -> SpikedModel:
    """Singular value and vectors of θ u vᵀ + noise, in the limit of large sizes.

    The matrix is m × n with m/n = ratio <= 1, noise entries have variance 1/n, u has m entries. Above θ = ratio^¼ the
    singular value is √((θ + 1/θ)(θ + ratio/θ)); below it sticks to the edge 1 + √ratio and the vectors are lost
    (Benaych-Georges and Nadakuditi 2012, arXiv 1103.2221).

    Examples
    --------
    >>> [round(float(x), 4) for x in spiked_model(2.0, 1.0)]
    [2.5, 0.75, 0.75]
    """
    theta = np.asarray(strength, dtype=np.float64)
    if not bool(np.all(np.isfinite(theta) & (theta >= 0))):
        raise ValueError(f"strength must be finite and >= 0, got {strength!r}")
    _check_ratio(ratio)
    seen = theta > ratio**0.25
    t = np.where(seen, theta, 1.0)  # any value that keeps the formulas finite
    value = np.where(seen, np.sqrt((t + 1 / t) * (t + ratio / t)), 1 + np.sqrt(ratio))
    left = np.where(seen, (t**4 - ratio) / (t**4 + ratio * t**2), 0.0)
    right = np.where(seen, (t**4 - ratio) / (t**4 + t**2), 0.0)
    return SpikedModel(value, left, right)


def frobenius_shrinker(singular_value: ArrayLike, ratio: float) -> Matrix:
    """What a noisy singular value y should be replaced by for the least Frobenius error: √((y² − β − 1)² − 4β)/y.

    Zero up to the edge 1 + √β; noise entries have variance 1/n, β = ratio <= 1 (Gavish and Donoho 2017, arXiv
    1405.7511).

    Examples
    --------
    >>> float(frobenius_shrinker(2.5, 1.0)), float(frobenius_shrinker(1.9, 1.0))
    (1.5, 0.0)
    """
    y = np.asarray(singular_value, dtype=np.float64)
    _check_ratio(ratio)
    seen = y > 1 + np.sqrt(ratio)
    z = np.where(seen, y, 1 + np.sqrt(ratio))
    return np.asarray(np.where(seen, np.sqrt(np.maximum((z**2 - ratio - 1) ** 2 - 4 * ratio, 0)) / z, 0.0))


def davis_kahan_bound(spectral: float, frobenius: float, gap: float, k: int) -> float:
    """Bound 2 min(√k ‖E‖₂, ‖E‖_F)/gap of ‖sin Θ‖_F between k eigenvectors of a symmetric matrix and of it plus E.

    The gap is that of the unperturbed eigenvalues to both sides of the k that are meant (Yu, Wang and Samworth 2015,
    arXiv 1405.0680, theorem 2).

    Examples
    --------
    >>> davis_kahan_bound(0.1, 0.2, gap=1.0, k=1)
    0.2
    """
    _check_perturbation(spectral, frobenius, gap, k)
    return float(2 * min(np.sqrt(k) * spectral, frobenius) / gap)


def wedin_bound(spectral: float, frobenius: float, singular_values: ArrayLike, k: int) -> float:
    """Bound of ‖sin Θ‖_F between the k leading singular vectors, left or right, of a matrix and of it plus E.

    2 (2σ₁ + ‖E‖₂) min(√k ‖E‖₂, ‖E‖_F)/(σ_k² − σ_{k+1}²), with the singular values of the unperturbed matrix (Yu, Wang
    and Samworth 2015, arXiv 1405.0680, theorem 3).

    Examples
    --------
    >>> round(wedin_bound(0.01, 0.01, [2.0, 1.0], 1), 4)
    0.0267
    """
    s = np.asarray(singular_values, dtype=np.float64)
    if not 1 <= k < s.size:
        raise ValueError(f"k must be between 1 and {s.size - 1}, one less than the singular values given, got {k!r}")
    gap = float(s[k - 1] ** 2 - s[k] ** 2)
    _check_perturbation(spectral, frobenius, gap, k)
    return float(2 * (2 * s[0] + spectral) * min(np.sqrt(k) * spectral, frobenius) / gap)


def _check_perturbation(spectral: float, frobenius: float, gap: float, k: int) -> None:
    if not (0 <= spectral <= frobenius and gap > 0 and k >= 1):
        raise ValueError(
            f"a perturbation has 0 <= ‖E‖₂ <= ‖E‖_F, a gap > 0 and k >= 1, got {spectral!r}, {frobenius!r}, "
            f"{gap!r} and {k!r}"
        )


def _check_ratio(ratio: float) -> None:
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio is rows over columns and must lie in (0, 1], got {ratio!r}; transpose the matrix")
