"""How far an approximation is from what it approximates: relative errors and divergences."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nla_llm.backend import Array, eps, generator, is_array, is_real_floating, namespace, to_numpy
from nla_llm.linalg import apply_widened, widen
from nla_llm.measures.estimate import Estimate
from nla_llm.measures.norms import frobenius_norm, max_norm, nuclear_norm
from nla_llm.measures.spectral import check_tolerance, krylov_steps, spectral_norm
from nla_llm.measures.streaming import rounding, row_blocks
from nla_llm.operators import Dense

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from nla_llm.operators import Operator

__all__ = ["NORMS", "output_error", "relative_error", "row_divergence"]

NORMS = ("spectral", "frobenius", "nuclear", "max")
Norm = Literal["spectral", "frobenius", "nuclear", "max"]


def relative_error(
    P: Operator,
    Phat: Operator,
    norm: Norm = "spectral",
    *,
    rtol: float = 2e-2,
    rng: int | np.random.Generator = 0,
    confidence: float = 0.99,
    reference: Estimate | None = None,
) -> Estimate:
    """``‖P − P̂‖ / ‖P‖`` in the spectral, Frobenius, nuclear or max norm.

    Parameters
    ----------
    P, Phat : Operator (..., n_q, n_k)
        The reference and its approximation.
    norm : {"spectral", "frobenius", "nuclear", "max"}
    rtol : float
        Relative width of the bracket of the quotient that the spectral norm aims at.
    rng : int or numpy.random.Generator
    confidence : float
        For numerator and denominator together.
    reference : Estimate, optional
        ‖P‖ in the same norm where it is known already, for instance from another approximation of the same P.

    Raises
    ------
    ValueError
        If the norm is unknown or the shapes do not fit.
    ZeroDivisionError
        If ``P`` is zero.

    Examples
    --------
    >>> P, Phat = Dense(np.diag([4.0, 2.0])), Dense(np.diag([4.0, 1.0]))
    >>> float(relative_error(P, Phat, norm="spectral").value)
    0.25
    """
    check_tolerance(rtol, confidence)
    if P.shape[-2:] != Phat.shape[-2:]:
        raise ValueError(f"P and Phat must have the same matrix shape, got {P.shape} and {Phat.shape}")
    rng = generator(rng)
    error, failure = P - Phat, 1.0 - confidence
    if norm == "max":
        return max_norm(error) / (reference or max_norm(P))
    if norm == "nuclear":
        return nuclear_norm(error, rng) / (reference or nuclear_norm(P, rng))
    if norm == "frobenius":
        below = reference or frobenius_norm(P, rtol / 2.0, rng, confidence=1.0 - failure / 2.0)
        left = _confidence_left(failure, below)
        return frobenius_norm(error, rtol / 2.0, rng, confidence=left) / below
    if norm == "spectral":
        below = reference or _spectral_reference(P, rtol, rng, 1.0 - failure / 2.0)
        left = _confidence_left(failure, below)
        room = _room(below, rtol)
        return spectral_norm(error, room, rng, confidence=left) / below
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")


def _confidence_left(failure: float, below: Estimate) -> float:
    """Confidence of the numerator: what ‖P‖ leaves of the failure probability, half of it where that is less."""
    return 1.0 - max(failure - (1.0 - below.confidence), failure / 2.0)


def _spectral_reference(P: Operator, rtol: float, rng: np.random.Generator, confidence: float) -> Estimate:
    """‖P‖₂ to a quarter of ``rtol`` where a certain bound brings that cheaply, else to half of it."""
    steps = krylov_steps(min(P.shape[-2:]), rtol / 2.0, confidence=confidence)
    return spectral_norm(P, rtol / 4.0, rng, confidence=confidence, max_steps=steps)


def _room(below: Estimate, rtol: float) -> float:
    """Tolerance left for the numerator, at least a quarter of the whole."""
    known = below.lower > 0
    widest = float(np.max(np.where(known, below.upper, 1.0) / np.where(known, below.lower, 1.0)))
    return max((1.0 + rtol) / widest - 1.0, rtol / 4.0) if math.isfinite(widest) else rtol / 4.0


def output_error(P: Operator, Phat: Operator, v: Array, *, norm: Norm = "frobenius") -> Estimate:
    """``‖P v − P̂ v‖ / ‖P v‖``: what the layer's output feels. It depends on v; the matrix error is the primary measure.

    Parameters
    ----------
    P, Phat : Operator (..., n_q, n_k)
    v : array (..., n_k, d_v)
    norm : {"spectral", "frobenius", "nuclear", "max"}

    Raises
    ------
    ValueError
        If the norm is unknown.
    ZeroDivisionError
        If ``P v`` is zero.

    Examples
    --------
    >>> P, Phat = Dense(np.eye(2)), Dense(np.diag([1.0, 0.5]))
    >>> float(output_error(P, Phat, np.array([[3.0], [4.0]])).value)
    0.4
    """
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")
    if not is_array(v) or not is_real_floating(v):
        got = getattr(v, "dtype", type(v).__name__)
        raise TypeError(f"v must be a real floating array, got {got}; pass numpy.asarray(v, dtype=float)")
    if v.ndim < 2 or v.shape[-2] != P.shape[-1] or 0 in v.shape:
        raise ValueError(f"v must be (..., {P.shape[-1]}, d_v) for operators {P.shape}, got {tuple(v.shape)}")
    output, approximate = apply_widened(P, v), apply_widened(Phat, v)
    measures: dict[str, Callable[[Operator], Estimate]] = {
        "spectral": spectral_norm,
        "frobenius": frobenius_norm,
        "nuclear": nuclear_norm,
        "max": max_norm,
    }
    measure = measures[norm]
    below, error = measure(Dense(output)), measure(Dense(output - approximate))
    # both products are rounded before they are subtracted: relative to their size, not to that of the difference
    slack = rounding(P) * below.upper + rounding(Phat) * measure(Dense(approximate)).upper
    widened = Estimate(
        error.value, np.maximum(error.lower - slack, 0.0), error.upper + slack, error.confidence, error.how
    )
    return widened / below


def row_divergence(
    P: Operator,
    Phat: Operator,
    kind: Literal["tv", "kl"] = "tv",
    *,
    reduce: Literal["mean", "max"] = "mean",
) -> Estimate:
    """Total variation or Kullback–Leibler divergence between the rows of P and P̂, their mean or maximum over rows.

    ``tv``: ½ Σ_j |p_ij − p̂_ij|. ``kl``: Σ_j p_ij log(p_ij/p̂_ij) in nats; infinite where some p̂_ij <= 0 < p_ij, and
    ``how`` then tells the share of such entries. Neither normalises P̂: where its rows do not sum to one, KL may be
    negative. Exact, by one pass over the rows.

    Parameters
    ----------
    P, Phat : Operator (..., n_q, n_k)
    kind : {"tv", "kl"}
    reduce : {"mean", "max"}

    Examples
    --------
    >>> P, Phat = Dense(np.array([[0.5, 0.5]])), Dense(np.array([[0.25, 0.75]]))
    >>> float(row_divergence(P, Phat, kind="tv").value)
    0.25
    """
    if kind not in {"tv", "kl"} or reduce not in {"mean", "max"}:
        raise ValueError(f"kind must be 'tv' or 'kl' and reduce 'mean' or 'max', got {kind!r} and {reduce!r}")
    if P.shape[-2:] != Phat.shape[-2:]:
        raise ValueError(f"P and Phat must have the same matrix shape, got {P.shape} and {Phat.shape}")
    batch = np.broadcast_shapes(P.batch_shape, Phat.batch_shape)
    rows, size, refused = [], np.zeros(batch), 0
    for start, stop in row_blocks(P - Phat):
        p, phat = widen(P.rows(start, stop)), widen(Phat.rows(start, stop))
        value, magnitude, bad = _total_variation(p, phat) if kind == "tv" else _kullback_leibler(p, phat)
        rows.append(np.broadcast_to(value, (*batch, stop - start)))
        size = np.maximum(size, magnitude.max(axis=-1))
        refused += bad
    by_row = np.concatenate(rows, axis=-1)
    value = by_row.mean(axis=-1) if reduce == "mean" else by_row.max(axis=-1)
    how = f"{reduce} over rows, one pass over the entries"
    if refused:
        how += f"; {refused / math.prod((*batch, *P.shape[-2:])):.3%} of the entries have P̂ <= 0 < P"
    # the terms of a row may cancel in KL, so rounding is relative to the sum of their magnitudes
    slack = 4.0 * math.sqrt(P.shape[-1]) * max(eps(P), eps(Phat)) * size
    return Estimate(value, value - slack, value + slack, 1.0, how)


def _total_variation(p: Array, phat: Array) -> tuple[NDArray[Any], NDArray[Any], int]:
    xp = namespace(p, phat)
    value = to_numpy(0.5 * xp.sum(xp.abs(p - phat), axis=-1))
    return value, value, 0


def _kullback_leibler(p: Array, phat: Array) -> tuple[NDArray[Any], NDArray[Any], int]:
    xp = namespace(p, phat)
    support, bad = p > 0, (p > 0) & (phat <= 0)
    usable = support & (phat > 0)
    one = xp.ones_like(p)
    terms = p * (xp.log(xp.where(usable, p, one)) - xp.log(xp.where(usable, phat, xp.ones_like(phat))))
    terms = xp.where(usable, terms, xp.zeros_like(terms))
    value = xp.where(xp.any(bad, axis=-1), xp.asarray(xp.inf, dtype=terms.dtype), xp.sum(terms, axis=-1))
    return to_numpy(value), to_numpy(xp.sum(xp.abs(terms), axis=-1)), int(xp.sum(xp.astype(bad, xp.int64)))
