"""First-order prediction of the error of row-normalised random-feature attention.

The estimate of an entry is Â_ij = A_ij (1 + ε_ij). Dividing rows by their sums gives, up to second powers of ε,

    P̂_ij − P_ij ≈ P_ij (ε_ij − Σ_l P_il ε_il),

so the expected squared error of a row needs only Γ_jl = Cov(ε_ij, ε_il). With z_j = x_i + y_j and Δ_j = x_i − y_j
one frequency gives e^(z_j·z_l) − 1 (positive), cosh(z_j·z_l) − 1 (hyperbolic), cosh(Δ_j·Δ_l) − 1 (trigonometric);
derived as Lemma 2 of Choromanski et al. 2021 (arXiv 2009.14794), which is the case j = l. Everything is float64 NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import gammaln
from scipy.stats import t as student

from nla_llm.backend import generator, to_numpy
from nla_llm.theory._blocks import equiangular_covariance
from nla_llm.theory.random_features import (
    Features,
    block_cosine,
    check_features,
    check_whole,
    pair_count,
    scaled_pair,
)

if TYPE_CHECKING:
    from nla_llm.backend import Array
    from nla_llm.operators import Operator
    from nla_llm.theory.bound import Matrix

__all__ = ["FirstOrderError", "entry_covariance", "first_order_error", "row_error"]

_BLOCK = 1024
_LARGEST_EXPONENT = 300.0  # beyond it the prediction means nothing and its square would overflow
_VALID = 0.02


@dataclass(frozen=True)
class FirstOrderError:
    """Predicted E‖P̂ − P‖_F², with the interval that comes from looking at a sample of the rows.

    Attributes
    ----------
    value, lower, upper
        Squared Frobenius error of the whole matrix; the interval holds for the sum over all rows with ``confidence``
        (Student's, over rows), and says nothing about the terms of higher order.
    rows
        Rows looked at.
    relative_variance
        Largest Σ_j P_ij Var ε_ij over these rows: the small number of the expansion. The next order is smaller by a
        factor 1/m times the skewness of a feature, so the prediction is good only where this is far below 1.
    """

    value: float
    lower: float
    upper: float
    confidence: float
    rows: int
    relative_variance: float

    @property
    def valid(self) -> bool:
        """Whether the small number is below 0.02; simulations were then within 20 % (empirical, worst: hyperbolic)."""
        return self.relative_variance < _VALID


def first_order_error(
    q: Array,
    k: Array,
    *,
    scale: float,
    m: int,
    features: Features,
    directions: str = "iid",
    exact: Operator | None = None,
    rows: int = 32,
    rng: int | np.random.Generator = 0,
    confidence: float = 0.95,
) -> FirstOrderError:
    """E‖P̂ − P‖_F² of attention by m random frequencies, to first order in the relative variance.

    Costs O(rows · n_k² · d). The covariance within a block, orthogonal or simplex, is exact for j = l and right to
    fourth order in the norms otherwise.

    Parameters
    ----------
    q, k
        Queries (n_q, d) and keys (n_k, d) of one head, as the features see them (after recentring, if any).
    scale
        Factor of the logits, positive.
    m, features
        As for :func:`nla_llm.theory.ensembles.kernel_theory`.
    directions
        'iid', 'orthogonal' or 'simplex'; nothing is known of the others.
    exact
        Operator (n_q, n_k) of the exact attention, which carries masks; softmax(scale · q kᵀ) unless given.
    rows
        Rows to look at, drawn without replacement; all of them where there are no more.

    Raises
    ------
    ValueError
        If q or k have batch axes (take ``problem.head(index)``), or an argument is out of range.

    Examples
    --------
    >>> q, k = 0.3 * np.random.default_rng(0).standard_normal((2, 16, 4))
    >>> prediction = first_order_error(q, k, scale=0.5, m=64, features="positive", rows=16)
    >>> prediction.valid, prediction.lower == prediction.value == prediction.upper
    (True, True)
    """
    if q.ndim != 2 or k.ndim != 2:
        raise ValueError(f"q and k must be of one head, (n, d), got {q.shape} and {k.shape}; take problem.head(index)")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence!r}")
    check_features(features)
    m, rows = check_whole("m", m), min(check_whole("rows", rows), int(q.shape[0]))
    x, y = scaled_pair(q, k, scale)
    chosen = np.sort(generator(rng).permutation(len(x))[:rows])
    errors, variances = np.empty(rows), np.empty(rows)
    for place, i in enumerate(chosen):
        p = _softmax(y @ x[i]) if exact is None else to_numpy(exact.rows(int(i), int(i) + 1))[0].astype(np.float64)
        seen = p > 0
        errors[place], variances[place] = row_error(
            p[seen], x[i], y[seen], m=m, features=features, directions=directions
        )
    half = _half_width(errors, len(x), confidence)
    value = len(x) * float(errors.mean())
    return FirstOrderError(value, max(0.0, value - half), value + half, confidence, rows, float(variances.max()))


def row_error(
    p: Matrix, x: Matrix, y: Matrix, *, m: int, features: Features, directions: str = "iid"
) -> tuple[float, float]:
    """Expected squared error of one row, Σ_j P_j² (Γ_jj − 2(ΓP)_j + PᵀΓP), and Σ_j P_j Γ_jj.

    Parameters
    ----------
    p
        Row of the exact matrix (n,).
    x, y
        The query (d,) and the keys (n, d), both times √scale.

    Examples
    --------
    >>> row_error(np.ones(2) / 2, np.zeros(1), np.zeros((2, 1)), m=1, features="positive")
    (0.0, 0.0)
    """
    z = x - y if features == "trigonometric" else x + y
    if float(np.max(np.sum(z**2, axis=-1))) > _LARGEST_EXPONENT:
        return np.inf, np.inf
    covered, diagonal = np.empty(len(p)), np.empty(len(p))
    for start in range(0, len(p), _BLOCK):
        block = slice(start, start + _BLOCK)
        gamma = entry_covariance(z[block], z, m=m, features=features, directions=directions)
        covered[block] = gamma @ p
        diagonal[block] = np.diagonal(gamma, offset=start)
    return float(p**2 @ (diagonal - 2 * covered + p @ covered)), float(p @ diagonal)


def entry_covariance(a: Matrix, b: Matrix, *, m: int, features: Features, directions: str = "iid") -> Matrix:
    """Covariance (n_a, n_b) of the relative errors of entries of one row of the kernel matrix.

    Parameters
    ----------
    a, b
        Vectors z = x + y (n, d) of the entries; x − y for trigonometric features.

    Examples
    --------
    >>> z = np.asarray([[1.0]])
    >>> bool(np.isclose(entry_covariance(z, z, m=2, features="positive")[0, 0], np.expm1(1) / 2))
    True
    """
    if directions not in {"iid", "orthogonal", "simplex"}:
        raise ValueError(f"directions must be 'iid', 'orthogonal' or 'simplex' for this prediction, got {directions!r}")
    gram, d = a @ b.T, a.shape[-1]
    single = np.expm1(gram) if features == "positive" else 2 * np.sinh(gram / 2) ** 2
    pairs = 0 if directions == "iid" else pair_count(m, d)
    if not pairs:
        return np.asarray(single / m)
    squares = np.sum(a**2, axis=-1)[:, None], np.sum(b**2, axis=-1)
    return np.asarray(
        single / m + pairs / m**2 * _within_block(gram, squares, d, features, block_cosine(directions, d))
    )


def _within_block(gram: Matrix, squares: tuple[Matrix, Matrix], d: int, features: Features, cosine: float) -> Matrix:
    """Covariance of two directions of a block: that of parallel vectors, and the rest of the degrees (2, 2), (1, 3).

    With γ the cosine, degree (2, 2) of the Hermite expansion is (1 − dγ²)(|a|²|b|² − d (a·b)²)/(2(d−1)(d+2)); degrees
    (1, 3) and (3, 1), which only positive features have, are −γκ²(a·b)(|a|² + |b|²)/(2d(d+2)), κ the mean of χ_d.
    """
    size, (aa, bb) = np.abs(gram), squares
    value, log_size = equiangular_covariance(features, size, d, cosine)
    total = value * np.exp(log_size)
    if features == "positive" and cosine:
        mirrored, log_size = equiangular_covariance(features, size, d, -cosine)  # of −b, which mirrors its direction
        total = np.where(gram < 0, mirrored * np.exp(log_size), total)
        mean_square = 2 * np.exp(2 * (gammaln((d + 1) / 2) - gammaln(d / 2)))
        total -= cosine * mean_square / (2 * d * (d + 2)) * gram * (aa + bb - 2 * size)
    across = np.maximum(aa * bb - gram**2, 0) * (1 - d * cosine**2) / (2 * (d - 1) * (d + 2))
    return np.asarray(total + across)


def _softmax(logits: Matrix) -> Matrix:
    w = np.exp(logits - logits.max())
    return np.asarray(w / w.sum())


def _half_width(errors: Matrix, n: int, confidence: float) -> float:
    """Half the interval of the sum over n rows from a sample without replacement."""
    r = len(errors)
    if r == n:
        return 0.0
    if r == 1 or not np.all(np.isfinite(errors)):
        return np.inf
    deviation = float(errors.std(ddof=1)) * np.sqrt((1 - r / n) / r)
    return float(n * student.ppf((1 + confidence) / 2, r - 1) * deviation)
