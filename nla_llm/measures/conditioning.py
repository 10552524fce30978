"""How errors in the data grow: condition numbers of operators, features, normalisers, softmax and attention."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nla_llm.backend import Array, eps, namespace, to_numpy
from nla_llm.linalg import SMALL_ENTRIES, apply_widened, is_small, low_rank_factors, singular_values, widen
from nla_llm.measures.estimate import Estimate
from nla_llm.measures.norms import frobenius_norm
from nla_llm.measures.spectral import spectral_norm
from nla_llm.measures.streaming import rounding
from nla_llm.operators import Dense

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators import Operator

__all__ = [
    "AttentionCondition",
    "NormaliserCondition",
    "attention_condition",
    "condition_number",
    "gram_condition",
    "normaliser_condition",
    "softmax_condition",
]


def condition_number(
    op: Operator, rank: int | None = None, *, rtol: float = 1e-2, rng: int | np.random.Generator = 0
) -> Estimate:
    """κ₂ = σ_1 / σ_r, the ratio of the largest to the r-th singular value.

    ``rank=None`` takes r = min(n_q, n_k), or the number of columns of the factors for a low-rank product, which would
    otherwise have an infinite condition number by construction. From the singular values where the matrix has at
    most 2^24 entries; σ_r is then known to ± rounding · σ_1, and the upper end is infinite where that includes zero. Of
    a larger matrix only ``lower`` is informative, since no product with A bounds σ_min from below.

    Parameters
    ----------
    op : Operator (..., n_q, n_k)
    rank : int, optional
        r, at least 1.
    rtol, rng
        As in ``spectral_norm``, for large operators.

    Examples
    --------
    >>> float(condition_number(Dense(np.diag([4.0, 2.0, 0.5]))).value)
    8.0
    >>> float(condition_number(Dense(np.diag([4.0, 2.0, 0.0])), rank=2).value)
    2.0
    """
    factors = low_rank_factors(op)
    order = min(op.shape[-2:]) if factors is None else int(factors[0].shape[-1])
    r = order if rank is None else rank
    if not 1 <= r <= order:
        raise ValueError(f"rank must be between 1 and {order} for {op!r}, got {rank}")
    if is_small(op) or math.prod(op.shape) <= SMALL_ENTRIES:
        return _ratio_of_extremes(singular_values(op)[..., :r], rounding(op), f"σ_1/σ_{r} from the singular values")
    top = spectral_norm(op, rtol, rng)
    columns = op.xp.eye(op.shape[-1], 1, dtype=op.dtype)
    shortest = np.linalg.norm(to_numpy(apply_widened(op, columns)), axis=(-2, -1)) if r == op.shape[-1] else top.upper
    lower = np.where(shortest > 0, top.lower / np.where(shortest > 0, shortest, 1.0), np.inf)
    return Estimate.bracket(np.maximum(lower, 1.0), np.full(top.shape, np.inf), f"σ_{r} not bounded below; {top.how}")


def gram_condition(features: Array) -> Estimate:
    """κ₂ of the Gram matrix ΦᵀΦ of features Φ (..., n, m): the square of that of Φ, from its singular values.

    Examples
    --------
    >>> float(gram_condition(np.diag([3.0, 1.0])).value)
    9.0
    """
    if features.ndim < 2 or features.shape[-1] > features.shape[-2]:
        raise ValueError(f"features must be (..., n, m) with m <= n for ΦᵀΦ to be regular, got {tuple(features.shape)}")
    op = Dense(features)
    return _ratio_of_extremes(singular_values(op), rounding(op), "singular values of the features, squared") ** 2


def _ratio_of_extremes(values: NDArray[Any], slack: float, how: str) -> Estimate:
    """σ_first/σ_last with both known to ± slack σ_first; infinite where the last is zero."""
    first, last = values[..., 0], values[..., -1]
    if np.any(first == 0):
        raise ZeroDivisionError("the operator is zero, so its condition number is not defined")
    with np.errstate(divide="ignore"):
        value = first / last
        lower = np.maximum(first * (1.0 - slack) / (last + slack * first), 1.0)
        upper = first * (1.0 + slack) / np.maximum(last - slack * first, 0.0)
    value = np.maximum(value, 1.0)
    return Estimate(value, np.minimum(lower, value), np.maximum(upper, value), 1.0, how)


class NormaliserCondition(NamedTuple):
    """What can go wrong in dividing by row sums."""

    ratio: Estimate  # max |row sum| / min |row sum|
    negative_share: Estimate  # share of rows with a negative sum


def normaliser_condition(row_sums: Array) -> NormaliserCondition:
    """Spread and sign of the denominators of a normalised kernel.

    Parameters
    ----------
    row_sums : array (..., n_q)

    Returns
    -------
    NormaliserCondition
        ``ratio``, max |s_i| / min |s_i|, infinite where some s_i is zero, and ``negative_share``.

    Examples
    --------
    >>> c = normaliser_condition(np.array([1.0, -4.0, 2.0, 2.0]))
    >>> float(c.ratio), float(c.negative_share)
    (4.0, 0.25)
    """
    sums = np.asarray(to_numpy(row_sums), dtype=np.float64)
    if sums.ndim < 1 or sums.shape[-1] == 0 or not np.isfinite(sums).all():
        raise ValueError(f"row_sums must be finite and (..., n_q) with n_q >= 1, got shape {sums.shape}")
    sizes = np.abs(sums)
    largest, smallest = sizes.max(axis=-1), sizes.min(axis=-1)
    ratio = np.where(smallest > 0, largest / np.where(smallest > 0, smallest, 1.0), np.inf)
    how = "of the row sums as given"
    return NormaliserCondition(Estimate.exact(ratio, how), Estimate.exact((sums < 0).mean(axis=-1), how))


def softmax_condition(logits: Array) -> Estimate:
    """κ_∞ of x ↦ softmax(x) at the given logits: 2 (1 − p_max) ‖x‖_∞, one number for each row.

    From ‖J‖_∞ = 2 p_max (1 − p_max) for the Jacobian J = diag(p) − ppᵀ, and ‖p‖_∞ = p_max. A logit of −inf
    is a removed key.

    Parameters
    ----------
    logits : array (..., n)

    Returns
    -------
    Estimate
        Of shape (...,).

    Examples
    --------
    >>> float(softmax_condition(np.array([3.0, 3.0])).value)
    3.0
    """
    xp = namespace(logits)
    x = widen(logits)
    top = xp.max(x, axis=-1, keepdims=True)
    if not bool(xp.all(xp.isfinite(top))) or bool(xp.any(xp.isnan(x))):
        raise ValueError("logits must hold a finite largest entry in each row and no NaN; drop fully masked rows")
    # 1 − p_max is summed over the other keys: as a difference it would cancel in sharp rows
    keys = xp.arange(x.shape[-1], device=getattr(x, "device", None))
    others = xp.where(keys == xp.argmax(x, axis=-1, keepdims=True), xp.zeros_like(x), xp.exp(x - top))
    rest = xp.sum(others, axis=-1)
    size = xp.max(xp.where(xp.isfinite(x), xp.abs(x), xp.zeros_like(x)), axis=-1)
    value = to_numpy(2.0 * rest / (1.0 + rest) * size)
    spread = float(xp.max(size))  # exp(x) inherits a relative error of |x| eps
    slack = (4.0 * math.sqrt(x.shape[-1]) + 2.0 * spread) * eps(x)
    return Estimate.exact(value, "2 (1 − p_max) ‖x‖_∞", rounding=slack)


class AttentionCondition(NamedTuple):
    """Upper bounds of the relative condition numbers of O = softmax(QKᵀ/√d) V in the Frobenius norm."""

    q: Estimate
    k: Estimate
    v: Estimate


def attention_condition(P: Operator, q: Array, k: Array, v: Array, *, scale: float | None = None) -> AttentionCondition:
    """Bounds of how much a relative change of q, k or v can change the output O = P v, relatively.

    Since softmax has the Lipschitz constant ½ in the 2-norm, κ_Q <= s ‖Q‖_F ‖K‖₂ ‖V‖₂ / (2 ‖O‖_F),
    κ_K <= s ‖Q‖₂ ‖K‖_F ‖V‖₂ / (2 ‖O‖_F) and κ_V <= ‖P‖₂ ‖V‖_F / ‖O‖_F, with s the scale of the logits.

    Parameters
    ----------
    P : Operator (..., n_q, n_k)
        The exact attention of q and k.
    q, k, v : array (..., n_q, d), (..., n_k, d), (..., n_k, d_v)
    scale : float, optional
        Factor of the logits, 1/√d by default.

    Returns
    -------
    AttentionCondition
        Estimates **of the bounds**, which the condition numbers themselves need not reach.

    Examples
    --------
    >>> q = k = v = np.eye(2)
    >>> bound = attention_condition(Dense(np.full((2, 2), 0.5)), q, k, v)
    >>> round(float(bound.v.value), 4), round(float(bound.q.value), 4)
    (1.4142, 0.5)
    """
    factor = 0.5 * (1.0 / math.sqrt(q.shape[-1]) if scale is None else abs(scale))
    output = frobenius_norm(Dense(apply_widened(P, v)))
    (q2, qf), (k2, kf), (v2, vf) = ((spectral_norm(Dense(x)), frobenius_norm(Dense(x))) for x in (q, k, v))
    return AttentionCondition(
        factor * (qf * k2 * v2) / output,
        factor * (q2 * kf * v2) / output,
        spectral_norm(P) * vf / output,
    )
