"""Frobenius, nuclear, max, one and infinity norms, and the stable rank."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nla_llm.backend import generator, to_numpy
from nla_llm.linalg import (
    SMALL_ENTRIES,
    BlockKrylov,
    apply_widened,
    gaussian,
    is_small,
    low_rank_factors,
    orthonormalise,
    singular_values,
)
from nla_llm.measures.estimate import Estimate
from nla_llm.measures.spectral import check_tolerance, spectral_norm
from nla_llm.measures.streaming import entry_norms, frobenius_by_rows, rounding

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators import Operator

__all__ = ["frobenius_norm", "inf_norm", "max_norm", "nuclear_norm", "one_norm", "stable_rank"]

_AFFORDABLE_ENTRIES = 1 << 30  # a pass over so many entries of exact attention takes about half a minute on one core
_PROBES = 64  # columns of one random block
_DEFLATED = 32  # directions that are measured exactly before the rest is sampled
_DENSE_ORDER = 2048  # all singular values cost seconds there, and a bracket of the nuclear norm is a poor substitute
_NUCLEAR_COLUMNS = 128  # dimension of the Krylov space behind a nuclear norm that is only bracketed

Method = Literal["auto", "exact", "stochastic"]


def frobenius_norm(
    op: Operator,
    rtol: float = 1e-2,
    rng: int | np.random.Generator = 0,
    *,
    method: Method = "auto",
    confidence: float = 0.99,
    max_probes: int = 1024,
    certain_lower: bool = False,
) -> Estimate:
    """Square root of the sum of squared entries.

    ``exact``: from the factors of a low-rank product, else by one pass over the rows, in memory that does not
    depend on n.
    ``stochastic``: with orthonormal V of 32 columns from one power step, ‖A‖_F² = ‖AV‖_F² + ‖A(I − VVᵀ)‖_F²; the first
    term is computed, the second is the mean of ‖A(I − VVᵀ)ω‖² over s Gaussian ω, until the interval is as narrow as
    ``rtol`` or ``max_probes`` are spent. ``auto``: exact up to 2^30 entries.

    The interval is rigorous for every spectrum. With weights w_i = σ_i²/Σσ² the mean over the truth is
    X = Σ w_i χ²_s,i / s, whose log-moment function −(s/2) Σ log(1 − 2θw_i/s) is a sum of convex functions that vanish
    at w = 0, so it is largest for a single weight (rank one). Chernoff's bound for χ²_s/s therefore holds for X:
    P(X >= x) for x > 1 and P(X <= x) for x < 1 are at most (x e^{1−x})^{s/2}. The stopping rule may look at the
    interval after each 64 probes, so the failure probability is shared out among the looks.

    Parameters
    ----------
    op : Operator (..., n_q, n_k)
    rtol : float
        Relative half-width aimed at by the stochastic method.
    rng : int or numpy.random.Generator
    method : {"auto", "exact", "stochastic"}
    confidence : float
        Of the stochastic interval, for each batch element by itself.
    max_probes : int
        Most random vectors of the stochastic method.
    certain_lower : bool
        Take only what the 32 directions have seen for the lower bound of the stochastic method, which is then certain.

    Returns
    -------
    Estimate
        Of the batch shape.

    Examples
    --------
    >>> from nla_llm.operators import Dense
    >>> float(frobenius_norm(Dense(np.array([[3.0, 4.0]]))).value)
    5.0
    """
    check_tolerance(rtol, confidence)
    if method not in {"auto", "exact", "stochastic"}:
        raise ValueError(f"method must be 'auto', 'exact' or 'stochastic', got {method!r}")
    if method == "stochastic":
        return _sampled_frobenius(op, rtol, generator(rng), confidence, max_probes, certain_lower=certain_lower)
    if low_rank_factors(op) is not None:
        values = singular_values(op)
        largest = np.max(values, axis=-1, keepdims=True)  # taken out, so that no square over- or underflows
        unit = values / np.where(largest > 0, largest, 1.0)
        norm = largest[..., 0] * np.linalg.norm(unit, axis=-1)
        return Estimate.exact(norm, "from the factors", rounding=rounding(op))
    if method == "exact" or math.prod(op.shape) <= _AFFORDABLE_ENTRIES:
        return Estimate.exact(frobenius_by_rows(op), "one pass over the entries", rounding=rounding(op))
    return _sampled_frobenius(op, rtol, generator(rng), confidence, max_probes, certain_lower=certain_lower)


def _sampled_frobenius(
    op: Operator,
    rtol: float,
    rng: np.random.Generator,
    confidence: float,
    max_probes: int,
    *,
    certain_lower: bool,
) -> Estimate:
    if max_probes < 1:
        raise ValueError(f"max_probes must be at least 1, got {max_probes}")
    xp, n = op.xp, op.shape[-1]
    start = gaussian((*op.batch_shape, n, min(_DEFLATED, n)), rng, like=op.like)
    v = orthonormalise(apply_widened(op.T, apply_widened(op, start)))
    seen = _square_sum(op, apply_widened(op, v))
    total, probes = np.zeros(op.batch_shape), 0
    while True:
        width = min(_PROBES, max_probes - probes)
        omega = gaussian((*op.batch_shape, n, width), rng, like=op.like)
        omega = omega - v @ (xp.matrix_transpose(v) @ omega)
        total = total + _square_sum(op, apply_widened(op, omega))
        probes += width
        sampled = total / probes
        low, high = _chernoff_quantiles(probes, (1.0 - confidence) / _looks(max_probes))
        lower, upper = np.sqrt(seen + sampled / high), np.sqrt(seen + sampled / low)
        if probes >= max_probes or np.all(upper - lower <= 2.0 * rtol * lower):
            break
    slack = rounding(op)
    how = f"{v.shape[-1]} directions exactly, the rest by {probes} Gaussian probes (Chernoff interval)"
    value = np.sqrt(seen + sampled)
    lower = np.sqrt(seen) if certain_lower else lower
    return Estimate(value, lower * (1.0 - slack), upper * (1.0 + slack), confidence, how)


def _looks(max_probes: int) -> int:
    """How often the stopping rule may look at the interval."""
    return -(-max_probes // _PROBES)


def _square_sum(op: Operator, x: Any) -> NDArray[Any]:
    return to_numpy(op.xp.sum(x * x, axis=(-2, -1)))


def _chernoff_quantiles(probes: int, failure: float) -> tuple[float, float]:
    """The two x at which (x e^{1−x})^{s/2} is ``failure``/2: below and above one."""
    from scipy.special import lambertw  # noqa: PLC0415 - SciPy loads only where it is needed

    # x e^{−x} = exp(2 log(failure/2)/s − 1) is solved by the two real branches of Lambert's W
    argument = -math.exp(2.0 * math.log(failure / 2.0) / probes - 1.0)
    return float(-lambertw(argument, 0).real), float(-lambertw(argument, -1).real)


def nuclear_norm(op: Operator, rng: int | np.random.Generator = 0) -> Estimate:
    """Sum of the singular values.

    Exact where the smaller dimension is at most 2048 or the operator a low-rank product. Else a certain bracket from a
    Krylov basis V of 128 columns and the exact Frobenius norm: ‖AV‖_* <= ‖A‖_* <= ‖AV‖_* + √(r − |V|) ‖A(I − VVᵀ)‖_F
    with r = min(n_q, n_k). It is tight where the spectrum decays, and wide where it does not.

    Parameters
    ----------
    op : Operator (..., n_q, n_k)
    rng : int or numpy.random.Generator

    Examples
    --------
    >>> from nla_llm.operators import Dense
    >>> float(nuclear_norm(Dense(np.diag([3.0, 1.0]))).value)
    4.0
    """
    dense = min(op.shape[-2:]) <= _DENSE_ORDER and math.prod(op.shape) <= SMALL_ENTRIES
    if dense or is_small(op):
        return Estimate.exact(singular_values(op).sum(axis=-1), "dense SVD", rounding=rounding(op))
    if op.shape[-1] > op.shape[-2]:
        op = op.T
    rng = generator(rng)
    start = gaussian((*op.batch_shape, op.shape[-1], 32), rng, like=op.like)
    space = BlockKrylov(op, start, rng=rng)
    while space.size < min(_NUCLEAR_COLUMNS, op.shape[-1]):
        space.advance()
    values = to_numpy(op.xp.linalg.svdvals(space.image))  # Ritz values of the Gram matrix would lose half the digits
    total = np.square(frobenius_by_rows(op))
    slack = 2.0 * rounding(op)
    unseen = np.maximum(total * (1.0 + slack) - np.square(values).sum(axis=-1), 0.0)
    lower = values.sum(axis=-1)
    upper = lower + np.sqrt((op.shape[-1] - space.size) * unseen)
    how = f"between ‖AV‖_* for a Krylov basis of {space.size} columns and what the Frobenius norm leaves"
    return Estimate.bracket(lower * (1.0 - slack), upper * (1.0 + slack), how)


def max_norm(op: Operator) -> Estimate:
    """Largest absolute value of an entry, by one pass over the rows.

    Examples
    --------
    >>> from nla_llm.operators import Dense
    >>> float(max_norm(Dense(np.array([[1.0, -3.0]]))))
    3.0
    """
    return Estimate.exact(entry_norms(op).maximum, "one pass over the entries, no rounding of its own")


def one_norm(op: Operator) -> Estimate:
    """Largest column sum of absolute values, ‖A‖₁, by one pass over the rows.

    Examples
    --------
    >>> from nla_llm.operators import Dense
    >>> float(one_norm(Dense(np.array([[1.0, -3.0]]))).value)
    3.0
    """
    return Estimate.exact(entry_norms(op).one, "one pass over the entries", rounding=rounding(op))


def inf_norm(op: Operator) -> Estimate:
    """Largest row sum of absolute values, ‖A‖_∞, by one pass over the rows.

    Examples
    --------
    >>> from nla_llm.operators import Dense
    >>> float(inf_norm(Dense(np.array([[1.0, -3.0]]))).value)
    4.0
    """
    return Estimate.exact(entry_norms(op).inf, "one pass over the entries", rounding=rounding(op))


def stable_rank(
    op: Operator, rtol: float = 1e-2, rng: int | np.random.Generator = 0, *, confidence: float = 0.99
) -> Estimate:
    """``‖A‖_F² / ‖A‖₂²``: at least one, at most the rank.

    Parameters
    ----------
    op : Operator (..., n_q, n_k)
    rtol : float
        Relative width aimed at.
    rng : int or numpy.random.Generator
    confidence : float
        For the two norms together.

    Raises
    ------
    ZeroDivisionError
        If the operator is zero.

    Examples
    --------
    >>> from nla_llm.operators import Dense
    >>> round(float(stable_rank(Dense(np.diag([2.0, 2.0]))).value), 12)
    2.0
    """
    rng = generator(rng)
    each = 1.0 - (1.0 - confidence) / 2.0
    frobenius = frobenius_norm(op, rtol / 4.0, rng, confidence=each)
    spectral = spectral_norm(op, rtol / 4.0, rng, confidence=each)
    ratio = (frobenius / spectral) ** 2
    # what is known of every matrix narrows the interval
    lower, value = np.maximum(ratio.lower, 1.0), np.maximum(ratio.value, 1.0)
    return Estimate(value, lower, np.maximum(ratio.upper, value), ratio.confidence, ratio.how)
