"""Columns, landmarks and clusters: what sampling can promise, and what an iterated inverse really inverts.

Everything is float64 NumPy; no method is known here.
"""

from __future__ import annotations

from math import ceil, log, log2
from typing import TYPE_CHECKING

import numpy as np

from nla_llm.theory.softmax import lipschitz_constant

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from nla_llm.theory.bound import Matrix

__all__ = [
    "clustering_bound",
    "effective_dimension",
    "elementary_symmetric",
    "inverted_share",
    "iteration_residual",
    "iteration_ridge",
    "nystrom_structural_bound",
    "ridge_leverage_scores",
    "rpcholesky_pivots",
    "volume_sampling_bound",
    "volume_sampling_error",
]


# -- volume sampling -----------------------------------------------------------------------------------------------


def elementary_symmetric(values: ArrayLike) -> Matrix:
    """e_0, …, e_n of n numbers: the coefficients of Π (1 + x_i t).

    Examples
    --------
    >>> elementary_symmetric([1.0, 2.0, 3.0]).tolist()
    [1.0, 6.0, 11.0, 6.0]
    """
    e = np.array([1.0])
    for x in np.asarray(values, dtype=np.float64):
        e = np.append(e, 0.0) + x * np.append(0.0, e)
    return e


def volume_sampling_error(eigenvalues: ArrayLike, k: int) -> float:
    """Mean trace error of the Nyström approximation from k columns drawn with probabilities ∝ det A_SS, an equality.

    E tr(A − A_:S A_SS⁻¹ A_S:) = (k + 1) e_{k+1}(λ)/e_k(λ). With squared singular values of any B in the place of λ it
    is the mean of ‖B − P_S B‖_F², P_S the projection on columns drawn ∝ det B_SᵀB_S. Deshpande et al. 2006; Guruswami
    and Sinop 2012; Belabbas and Wolfe 2009.

    Examples
    --------
    >>> volume_sampling_error([1.0, 1.0, 1.0], 1)
    2.0
    """
    values = _spectrum(eigenvalues, k)
    return float((k + 1) * np.exp(_log_ratio_of_symmetric(values, k))) if k < values.size else 0.0


def volume_sampling_bound(eigenvalues: ArrayLike, k: int) -> float:
    """(k + 1) Σ_{j>k} λ_j, above :func:`volume_sampling_error`: k + 1 times the error of the best matrix of rank k.

    Examples
    --------
    >>> volume_sampling_bound([4.0, 1.0, 0.5], 1)
    3.0
    """
    return float((k + 1) * np.sum(_spectrum(eigenvalues, k)[k:]))


# -- Nyström approximations of positive semi-definite matrices -----------------------------------------------------


def nystrom_structural_bound(a: ArrayLike, sketch: ArrayLike, k: int, *, norm: str = "spectral") -> float:
    """Bound of ‖A − AΩ(ΩᵀAΩ)⁺ΩᵀA‖ for one given Ω (n, s): no probability, only that Ω₁ = U₁ᵀΩ has full row rank.

    Spectral ‖Σ₂‖₂ + ‖Σ₂^½ Ω₂ Ω₁⁺‖₂², trace tr Σ₂ + ‖Σ₂^½ Ω₂ Ω₁⁺‖_F². Halko, Martinsson and Tropp 2011, arXiv
    0909.4061, theorem 9.1; Gittens and Mahoney 2013, arXiv 1303.1849. Status VB.

    Parameters
    ----------
    a : array (n, n)
        Positive semi-definite.
    sketch : array (n, s), s >= k
        Columns of the identity where columns of A are chosen.
    k
        Rank at which the spectrum is cut; any value gives a bound.
    norm
        'spectral' or 'trace'.

    Examples
    --------
    >>> nystrom_structural_bound(np.diag([4.0, 1.0]), np.eye(2)[:, :1], 1)
    1.0
    """
    if norm not in {"spectral", "trace"}:
        raise ValueError(f"norm must be 'spectral' or 'trace', got {norm!r}")
    values, vectors = np.linalg.eigh(np.asarray(a, dtype=np.float64))
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    rotated = vectors.T @ np.asarray(sketch, dtype=np.float64)
    head, tail = rotated[:k], np.sqrt(values[k:, None]) * rotated[k:]
    if np.linalg.matrix_rank(head) < k:
        raise ValueError(f"the sketch misses one of the first k={k} eigenvectors; pass a smaller k or more columns")
    through = tail @ np.linalg.pinv(head)
    if norm == "trace":
        return float(np.sum(values[k:]) + np.sum(through**2))
    return float(np.max(values[k:], initial=0.0) + (np.linalg.norm(through, 2) ** 2 if through.size else 0.0))


def ridge_leverage_scores(a: ArrayLike, ridge: float) -> Matrix:
    """ℓ_i = [A(A + λI)⁻¹]_ii of a positive semi-definite A; they sum to :func:`effective_dimension`.

    Alaoui and Mahoney 2015, arXiv 1411.0306; Musco and Musco 2017, arXiv 1605.07583.

    Examples
    --------
    >>> ridge_leverage_scores(np.diag([3.0, 1.0]), 1.0).tolist()
    [0.75, 0.5]
    """
    matrix = np.asarray(a, dtype=np.float64)
    return np.asarray(np.diag(np.linalg.solve(matrix + ridge * np.eye(len(matrix)), matrix)))


def effective_dimension(eigenvalues: ArrayLike, ridge: float) -> float:
    """Σ_j λ_j/(λ_j + λ).

    Examples
    --------
    >>> effective_dimension([3.0, 1.0], 1.0)
    1.25
    """
    values = np.asarray(eigenvalues, dtype=np.float64)
    return float(np.sum(values / (values + ridge)))


def rpcholesky_pivots(r: int, *, epsilon: float, eta: float) -> int:
    """Pivots with which E tr(A − Â) ≤ (1 + ε) tr(A − A_r) is promised to randomly pivoted Cholesky.

    k ≥ r/ε + min{r log(1/(εη)), r + r log₊(2^r/ε)}, η = tr(A − A_r)/tr(A). Chen, Epperly, Tropp and Webber 2022, arXiv
    2207.06503. Status VB: never violated in the tests, the constants are not verified.

    Examples
    --------
    >>> rpcholesky_pivots(2, epsilon=1.0, eta=0.1)
    7
    """
    if not (epsilon > 0 and 0 < eta <= 1):
        raise ValueError(f"epsilon must be positive and eta in (0, 1], got epsilon={epsilon!r}, eta={eta!r}")
    adaptive = r * max(0.0, log(1 / (epsilon * eta)))
    uniform = r + r * log(2.0) * max(0.0, r - log2(epsilon))
    return ceil(r / epsilon + min(adaptive, uniform))


# -- the iterated inverse ------------------------------------------------------------------------------------------


def iteration_residual(residual: ArrayLike, iterations: int = 1) -> Matrix:
    """R ← ¼ R³ (3 + R): what a step of Z ← ¼ Z (13 − AZ (15 − AZ (7 − AZ))) makes of an eigenvalue R of 1 − AZ.

    Put T = AZ = 1 − R into ¼ T (13 − T (15 − T (7 − T))) = ¼ (13 T − 15 T² + 7 T³ − T⁴) and expand in R: the terms of
    order one and two cancel, what is left is 1 − ¾ R³ − ¼ R⁴. All factors commute, so it holds for matrices.

    Examples
    --------
    >>> iteration_residual([1.0, 0.5, 0.0]).tolist()
    [1.0, 0.109375, 0.0]
    """
    r = np.asarray(residual, dtype=np.float64)
    for _ in range(iterations):
        r = 0.25 * r**3 * (3.0 + r)
    return r


def inverted_share(singular_values: ArrayLike, norm_product: float, iterations: int) -> Matrix:
    """a z_j(a) of each singular value a after some steps from Z₀ = Aᵀ/(‖A‖₁ ‖A‖_∞): 1 where A is inverted, 0 where not.

    Z_j has the singular vectors of A whatever A is, since Z₀ has. A singular value is inverted up to the share
    1 − r_j, r_0 = 1 − a²/(‖A‖₁‖A‖_∞) and r_{j+1} = ¼ r_j³(3 + r_j): near zero the share grows by 13/4 a step, so that
    the iteration is a filter like the ridge of :func:`iteration_ridge`.

    Examples
    --------
    >>> inverted_share([1.0, 0.1, 0.001], 1.0, 6).round(4).tolist()
    [1.0, 1.0, 0.0012]
    """
    start = np.asarray(singular_values, dtype=np.float64) ** 2 / norm_product
    share = start
    for _ in range(iterations):  # in the share itself: 1 − r would lose the small ones
        share = 0.25 * share * (13.0 - share * (15.0 - share * (7.0 - share)))
    return share


def iteration_ridge(iterations: int) -> float:
    """(4/13)^j: the ridge λ/(‖A‖₁ ‖A‖_∞) whose filter a²/(a² + λ) agrees with j steps at small singular values.

    Examples
    --------
    >>> round(iteration_ridge(6), 6)
    0.000849
    """
    return float((4 / 13) ** iterations)


# -- clusters ------------------------------------------------------------------------------------------------------


def clustering_bound(distances: ArrayLike, key_norm: ArrayLike, scale: float) -> Matrix:
    """Bound ½ |scale| |q_i − c_i| ‖K‖₂ of the Euclidean error of each row whose query is replaced by a centroid.

    Vyas, Katharopoulos and Fleuret 2020, arXiv 2007.04825, proposition 1, with the Lipschitz constant ½ of softmax
    instead of 1. The root of the sum of squares bounds the Frobenius error.

    Parameters
    ----------
    distances
        |q_i − c_i|, (..., n_q).
    key_norm
        Spectral norm of the keys, (..., ).
    scale
        Factor of the logits.

    Examples
    --------
    >>> clustering_bound([0.0, 2.0], 3.0, 0.5).tolist()
    [0.0, 1.5]
    """
    norm = np.asarray(key_norm, dtype=np.float64)[..., None]
    return np.asarray(lipschitz_constant() * abs(scale) * np.asarray(distances, dtype=np.float64) * norm)


def _log_ratio_of_symmetric(values: Matrix, k: int) -> float:
    """log e_{k+1}/e_k of numbers >= 0, through logarithms: the e of a thousand numbers leave the range of float64."""
    log_e = np.append(0.0, np.full(k + 1, -np.inf))
    with np.errstate(divide="ignore"):
        for log_x in np.log(values):
            log_e[1:] = np.logaddexp(log_e[1:], log_x + log_e[:-1])
    return float(log_e[k + 1] - log_e[k])


def _spectrum(eigenvalues: ArrayLike, k: int) -> Matrix:
    values = np.sort(np.asarray(eigenvalues, dtype=np.float64))[::-1]
    if values.size == 0 or values[-1] < 0 or values[0] == 0 or not 0 <= k <= np.count_nonzero(values):
        raise ValueError(f"k={k} columns need at least as many positive values and none below zero")
    return values
