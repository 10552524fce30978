"""What gradient methods do to a low-rank product s·B·A: first steps, flows, local rates of convergence.

Losses are ½ ‖s·BA − T‖_F², T of rank r or the best of that rank; singular values σ₁ ≥ … ≥ σ_r. Everything is float64
NumPy. Sources are named where a statement is somebody's; "derived" ones are short enough to be checked in the tests by
brute force.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

    from nla_llm.theory.bound import Matrix

__all__ = [
    "DescentRate",
    "alternating_factor",
    "balanced_mode",
    "first_step",
    "gradient_descent_rate",
    "kaiming_variance",
    "linear_network_floor",
    "local_spectrum",
    "offset_floor",
    "scaled_gd_bound",
    "scaled_gd_factor",
]


# -- the first step ----------------------------------------------------------------------------------------------------


def kaiming_variance(d_in: int) -> float:
    """Variance of the entries of a Kaiming-uniform A with a = √5, uniform within ± d_in^(−1/2): 1/(3 d_in).

    Examples
    --------
    >>> round(kaiming_variance(4), 4)
    0.0833
    """
    return 1.0 / (3.0 * d_in)


def first_step(gradient: ArrayLike, *, lr: float, scale: float, rank: int, variance: float) -> Matrix:
    """Mean of the first change of s·BA by gradient descent from B = 0: −η s² r σ_A² G.

    G is the gradient of the full weight; the mean is over A with independent entries of mean zero and variance σ_A².
    The step changes B alone, since the gradient of A is s·BᵀG = 0. With s = α/r it falls as 1/r, with s = α/√r it does
    not depend on r (Kalajdzievski 2023, arXiv 2312.03732; this form derived).

    Examples
    --------
    >>> [float(first_step([[1.0]], lr=1.0, scale=8 / r, rank=r, variance=1.0)[0, 0]) for r in (1, 4)]
    [-64.0, -16.0]
    >>> [float(first_step([[1.0]], lr=1.0, scale=8 / r**0.5, rank=r, variance=1.0)[0, 0]) for r in (1, 4)]
    [-64.0, -64.0]
    """
    return -lr * scale**2 * rank * variance * np.asarray(gradient, dtype=np.float64)


# -- gradient flow -----------------------------------------------------------------------------------------------------


def balanced_mode(t: ArrayLike, strength: float, start: float, *, scale: float = 1.0) -> Matrix:
    """A singular value u(t) of s·BA under gradient flow, where B and A are balanced and aligned with T.

    u(t) = σ e^{2sσt}/(e^{2sσt} − 1 + σ/u₀): a logistic curve, so that modes are learned one after the other, large ones
    first (Saxe, McClelland and Ganguli 2013, arXiv 1312.6120, for s = 1). Balanced means AAᵀ = BᵀB, of which the
    difference gradient flow conserves.

    Parameters
    ----------
    t : array_like
        Times >= 0; a step of rate η is η of it.
    strength : float
        σ > 0, the singular value of T.
    start : float
        u₀ > 0.
    scale : float
        s.

    Examples
    --------
    >>> float(balanced_mode(0.0, 2.0, 0.01)), round(float(balanced_mode(10.0, 2.0, 0.01)), 6)
    (0.01, 2.0)
    """
    if not (strength > 0 and start > 0 and scale > 0):
        raise ValueError(f"strength, start and scale must be > 0, got {strength!r}, {start!r} and {scale!r}")
    decay = np.exp(-2.0 * scale * strength * np.asarray(t, dtype=np.float64))
    return np.asarray(strength / (1.0 + (strength / start - 1.0) * decay))


# -- local rates -------------------------------------------------------------------------------------------------------


def local_spectrum(
    singular_values: ArrayLike, d_out: int, d_in: int, *, scale: float = 1.0, imbalance: float = 0.0
) -> Matrix:
    """Eigenvalues of the Hessian at a minimiser s·BA = T, descending, without the r² zeros of the gauge.

    With AAᵀ − BᵀB = δ I, which gradient flow conserves, A and B have the squared singular values
    a_i² = (δ + √(δ² + 4σ_i²/s²))/2 and b_i² = a_i² − δ. The eigenvalues are s²(a_j² + b_i²) for i, j ≤ r, s² a_j² each
    d_out − r times, and s² b_i² each d_in − r times (derived). Balanced, δ = 0: s(σ_i + σ_j) and sσ_j, so
    that their condition number is 2κ. From B = 0 and rows of A with norm a, δ = a²:
    for a² ≫ σ/s it grows to (s a²/σ_r)².

    Examples
    --------
    >>> local_spectrum([2.0, 1.0], 3, 2).tolist()
    [4.0, 3.0, 3.0, 2.0, 2.0, 1.0]
    """
    s = np.asarray(singular_values, dtype=np.float64)
    if s.ndim != 1 or not 1 <= s.size <= min(d_out, d_in) or not np.all(s > 0):
        raise ValueError(f"singular_values must be 1 to {min(d_out, d_in)} numbers > 0, got {singular_values!r}")
    root = np.sqrt(imbalance**2 + 4.0 * (s / scale) ** 2)
    large, small = (root + abs(imbalance)) / 2, 2.0 * (s / scale) ** 2 / (root + abs(imbalance))
    a, b = (large, small) if imbalance >= 0 else (small, large)
    inner = (a[:, None] + b[None, :]).ravel()
    values = np.concatenate([inner, np.repeat(a, d_out - s.size), np.repeat(b, d_in - s.size)])
    return np.sort(scale**2 * values)[::-1]


class DescentRate(NamedTuple):
    """Rates of gradient descent near a minimiser, and the factor by which a step multiplies the error."""

    best: float
    factor: float
    critical: float


def gradient_descent_rate(spectrum: ArrayLike) -> DescentRate:
    """Best rate 2/(λ₁ + λ_min), its factor (λ₁ − λ_min)/(λ₁ + λ_min), and the rate 2/λ₁ from which descent is unstable.

    Of the non-zero eigenvalues λ of the Hessian. For balanced factors and r < max(d_out, d_in) the factor is
    (2κ − 1)/(2κ + 1), κ = σ₁/σ_r.

    Examples
    --------
    >>> rate = gradient_descent_rate(local_spectrum([10.0, 1.0], 3, 3))
    >>> round(rate.factor, 6), round(19 / 21, 6), rate.critical
    (0.904762, 0.904762, 0.1)
    """
    values = np.asarray(spectrum, dtype=np.float64)
    first, last = float(values.max()), float(values.min())
    return DescentRate(2 / (first + last), (first - last) / (first + last), 2 / first)


def scaled_gd_factor(lr: float) -> float:
    """Factor by which a step of scaled gradient descent multiplies the error near a minimiser: max(|1 − η|, |1 − 2η|).

    Components of the error in one of the two spaces of T are multiplied by 1 − η, those in both by 1 − 2η, whatever the
    singular values (derived): best at η = 2/3, where it is 1/3, and stable for η < 1.

    Examples
    --------
    >>> scaled_gd_factor(0.5), scaled_gd_factor(1.0)
    (0.5, 1.0)
    """
    return max(abs(1.0 - lr), abs(1.0 - 2.0 * lr))


def scaled_gd_bound(t: ArrayLike, smallest: float, lr: float) -> Matrix:
    """Bound (1 − 0.7 η)^t · 0.15 σ_r of ‖B_t A_t − T‖_F for scaled gradient descent with 0 < η ≤ 2/3 and s = 1.

    It holds from a start within 0.1 σ_r of the balanced factors of T, in the distance
    (‖(B₀Q − B)Σ^½‖_F² + ‖Σ^½(Q⁻¹A₀ − A)‖_F²)^½, least over invertible Q (Tong, Ma and Chi 2021, arXiv 2005.08898,
    theorem 1). Any B₀A₀ of rank r with ‖B₀A₀ − T‖_F ≤ 0.1 σ_r/(√2 + 1)^½ is near enough (ibidem, as we read it).

    Examples
    --------
    >>> scaled_gd_bound([0, 1], 1.0, 0.5).round(4).tolist()
    [0.15, 0.0975]
    """
    if not 0 < lr <= 2 / 3:
        raise ValueError(f"the theorem needs 0 < lr <= 2/3, got {lr!r}")
    return np.asarray((1 - 0.7 * lr) ** np.asarray(t, dtype=np.float64) * 0.15 * smallest)


def alternating_factor(singular_values: ArrayLike, rank: int) -> float:
    """(σ_{r+1}/σ_r)², by which one sweep of alternating least squares multiplies the tangent of the largest angle.

    Without inputs a sweep multiplies the row space by TᵀT: subspace iteration (Golub and Van Loan, section 8.2.4). Zero
    where T has rank r: one sweep is exact.

    Examples
    --------
    >>> alternating_factor([2.0, 1.0], 1)
    0.25
    """
    s = np.asarray(singular_values, dtype=np.float64)
    if not 1 <= rank <= s.size or s[rank - 1] == 0:
        raise ValueError(f"rank must be between 1 and the number of non-zero singular values, got {rank!r}")
    return float((s[rank] / s[rank - 1]) ** 2) if rank < s.size else 0.0


# -- starts that are subtracted from the weight ------------------------------------------------------------------------


def offset_floor(target: ArrayLike, start: ArrayLike, rank: int) -> float:
    """Least ‖s(BA − B₀A₀) − T‖_F over B and A of rank r: the tail (Σ_{j>r} σ_j²(T + s·B₀A₀))^½.

    A start from the weight that is subtracted from it (PiSSA, MiLoRA, OLoRA, CorDA) so reaches an update of rank r only
    in part. For a start that is large beside T only what shares a space with it is reached: the floor tends to
    ‖(I − UUᵀ) T (I − VVᵀ)‖_F, U and V the column and row spaces of B₀A₀ (derived).

    Parameters
    ----------
    target : array_like (d_out, d_in)
        T.
    start : array_like (d_out, d_in)
        s·B₀A₀.
    rank : int
        r.

    Examples
    --------
    >>> offset_floor(np.diag([0.0, 1.0]), np.diag([5.0, 0.0]), 1)
    1.0
    """
    values = np.linalg.svd(np.asarray(target, dtype=np.float64) + np.asarray(start, dtype=np.float64), compute_uv=False)
    return float(np.linalg.norm(values[rank:]))


# -- several layers ----------------------------------------------------------------------------------------------------


def linear_network_floor(target: ArrayLike, layers: Sequence[ArrayLike], ranks: Sequence[int]) -> float:
    """Least ‖Π(W_l + ΔW_l) − target‖₂ over updates of rank R_l: σ_{ΣR_l + 1}(target − Π W_l).

    For generic square layers W_L … W_1, given from the last to the first; no update of these ranks can do better
    whatever the layers are (Zeng and Lee 2024, arXiv 2310.17513; the lower bound is Eckart–Young, since the two
    products differ by a matrix of rank at most ΣR_l).

    Examples
    --------
    >>> linear_network_floor(np.diag([3.0, 2.0, 1.0]), [np.eye(3), np.zeros((3, 3))], [1, 1])
    1.0
    """
    if len(ranks) != len(layers):
        raise ValueError(f"give one rank for each of the {len(layers)} layers, got {len(ranks)}")
    product = np.asarray(layers[0], dtype=np.float64)
    for layer in layers[1:]:
        product = product @ np.asarray(layer, dtype=np.float64)
    values = np.linalg.svd(np.asarray(target, dtype=np.float64) - product, compute_uv=False)
    total = int(sum(ranks))
    return float(values[total]) if total < values.size else 0.0
