"""Randomised attention: how far means over random directions scatter that are drawn near queries plus keys.

With x = √scale q, y = √scale k and z = x + y, the estimate e^(x·y) N(ω; z, I)/N(ω; μ, Σ) of exp(x·y), ω ~ N(μ, Σ), is
unbiased whatever μ and Σ: positive features (FAVOR+) are μ = 0, Σ = I. Everything is float64 NumPy.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from nla_llm.theory.bound import Matrix, Theory

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

__all__ = [
    "log_proposal_variance",
    "log_proposals_variance_bound",
    "proposal_theory",
    "randomised_attention_error_bound",
    "randomised_attention_moments",
    "randomised_attention_theory",
]


# -- a kernel from proposals -------------------------------------------------------------------------------------------


def log_proposal_variance(x: ArrayLike, y: ArrayLike, mu: ArrayLike, *, variance: float = 1.0, m: int = 1) -> Matrix:
    """Natural logarithm of the relative variance of exp(x·y) estimated from m draws ω ~ N(μ, variance · I), (n_q, n_k).

    (variance^d (2 variance − 1)^(−d/2) exp(|x + y − μ|²/(2 variance − 1)) − 1)/m, derived: ∫ N(ω; z, I)²/N(ω; μ, Σ) dω
    is a Gaussian integral. With unit variance exp(|z − μ|²) − 1: zero at μ = z, that of FAVOR+ at μ = 0. Infinite where
    the variance is at most ½, whatever μ.

    Parameters
    ----------
    x, y
        Scaled queries (n_q, d) and keys (n_k, d).
    mu
        Mean of the proposal, (d,).

    Examples
    --------
    >>> x, y = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> float(np.exp(log_proposal_variance(x, y, [1.0, 1.0]))[0, 0])
    0.0
    """
    distance, d = _squared_distance(x, y, mu)
    spread = 2 * variance - 1
    if spread <= 0:
        return np.full(distance.shape, np.inf)
    log_moment = d * np.log(variance) - d / 2 * np.log(spread) + distance / spread
    with np.errstate(divide="ignore"):
        return np.asarray(log_moment + np.log(-np.expm1(-log_moment)) - np.log(_whole(m)))


def log_proposals_variance_bound(x: ArrayLike, y: ArrayLike, mu: ArrayLike) -> Matrix:
    """Natural logarithm of a bound of the relative variance with one ω_s ~ N(μ_s, I) each and the balance heuristic.

    (H − 1)/m with H the harmonic mean of exp(|x + y − μ_s|²) over the m rows of ``mu``, (n_q, n_k). Derived: the
    variance is ∫ N(ω; z)²/Σ_s N(ω; μ_s) dω − Σ_s a_s² with Σ a_s = 1, so a_s² sum up to 1/m at least, and by Cauchy and
    Schwarz 1/Σ_s q_s <= Σ_s λ_s²/q_s for all λ that sum to one; λ_s ∝ exp(−|z − μ_s|²) is the best. An equality where
    all μ_s are equal. A defensive mixture is one that has zeros among the rows: if m₀ are, the bound stays below (m/m₀
    exp(|z|²) − 1)/m.

    Examples
    --------
    >>> x, y = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> one = log_proposal_variance(x, y, [0.0, 1.0], m=3)
    >>> bool(np.isclose(log_proposals_variance_bound(x, y, [[0.0, 1.0]] * 3), one)[0, 0])
    True
    """
    means = np.atleast_2d(np.asarray(mu, dtype=np.float64))
    total = np.full((np.shape(x)[-2], np.shape(y)[-2]), -np.inf)
    for row in means:
        total = np.logaddexp(total, -_squared_distance(x, y, row)[0])
    log_mean = np.log(len(means)) - total
    with np.errstate(divide="ignore"):
        return np.asarray(log_mean + np.log(-np.expm1(-np.maximum(log_mean, 0))) - np.log(len(means)))


def proposal_theory(x: Matrix, y: Matrix, mu: Matrix) -> Theory:
    """What is known of the kernel from one ω near each row of ``mu`` (..., m, d), weighed by the balance heuristic.

    Examples
    --------
    >>> promise = proposal_theory(np.ones((3, 2)), np.zeros((2, 2)), np.ones((5, 2)))
    >>> promise.relative_variance().tolist(), promise.unbiased
    ([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], True)
    """
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2], mu.shape[:-2])
    x, y, mu = (np.broadcast_to(a, (*batch, *a.shape[-2:])) for a in (x, y, mu))
    shape = (*batch, int(x.shape[-2]), int(y.shape[-2]))

    def log_variance(start: int, stop: int) -> Matrix:
        out = np.empty((*batch, stop - start, shape[-1]))
        for index in np.ndindex(batch):
            out[index] = log_proposals_variance_bound(x[index][start:stop], y[index], mu[index])
        return out

    return Theory(
        name=f"{mu.shape[-2]} proposals, balance heuristic",
        kind="bound",
        status="VB",
        source="derived from the variance of multiple importance sampling (Veach and Guibas 1995) by Cauchy and "
        "Schwarz; estimator of Zheng, Wang and Kong 2022, arXiv 2204.04667",
        shape=shape,
        mean_rows=lambda start, stop: np.ones((*batch, stop - start, shape[-1])),
        log_variance_rows=log_variance,
        assumptions=("entries of the kernel before division by the row sums", "one draw near each mean, unit variance"),
    )


# -- softmax attention itself as a mean --------------------------------------------------------------------------------


def randomised_attention_error_bound(squared_norm: ArrayLike, n_q: int, m: int) -> Matrix:
    """√((n_q − ‖P‖_F²)/m), a bound of √E ‖P̂ − P‖_F² for m draws of randomised attention: that of m keys drawn from P.

    Derived: a row of P̂ is the mean of m independent posteriors of the key l ~ P_n· given ω, and conditional
    expectation lowers the variance P_nl (1 − P_nl) of the indicator of that key (Rao and Blackwell).

    Examples
    --------
    >>> float(randomised_attention_error_bound(1.0, 5, 4))
    1.0
    """
    squared = np.maximum(n_q - np.asarray(squared_norm, dtype=np.float64), 0)  # rounding alone can make it negative
    return np.asarray(np.sqrt(squared / _whole(m)))


def randomised_attention_theory(squared_norm: ArrayLike, m: int, shape: tuple[int, ...]) -> Theory:
    """The bound of the root mean square error as a promise, in the Frobenius norm.

    Examples
    --------
    >>> float(randomised_attention_theory(1.0, 4, (5, 5)).error("frobenius"))
    1.0
    """
    randomised_attention_error_bound(squared_norm, shape[-2], m)  # bad arguments show here
    return Theory(
        name=f"{m} keys drawn from softmax attention",
        kind="bound",
        status="VB",
        source="derived by conditional expectation; estimator of Zheng, Wang and Kong 2022, arXiv 2204.04667",
        shape=shape,
        error_norm=partial(_frobenius_only, squared_norm, shape[-2], m),
        assumptions=("exact arithmetic",),
    )


def randomised_attention_moments(x: ArrayLike, y: ArrayLike, *, nodes: int = 80) -> tuple[Matrix, Matrix]:
    """Mean and variance of the entries of one draw of randomised attention, for tokens on a line, x (n_q,), y (n_k,).

    By Gauss–Hermite quadrature of softmax_j(ω y_j − y_j²/2) and of its square over ω ~ Σ_l P_nl N(x_n + y_l, 1). The
    mean is P (Zheng, Wang and Kong 2022, arXiv 2204.04667); the variance of m draws is that of one over m. With two
    keys in any dimension only the component of x along their difference matters, up to a shift of the keys.

    Examples
    --------
    >>> mean, variance = randomised_attention_moments([0.0], [-0.5, 0.5])
    >>> mean.round(12).tolist(), bool(np.all(variance < 0.25))
    ([[0.5, 0.5]], True)
    """
    queries, keys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    P = _softmax(queries[:, None] * keys)
    t, weights = np.polynomial.hermite_e.hermegauss(nodes)
    omega = queries[:, None, None] + keys[:, None] + t  # (n_q, l, nodes)
    f = _softmax(omega[..., None] * keys - keys**2 / 2)
    probability = P[..., None] * weights / weights.sum()
    mean = np.einsum("nlt,nltj->nj", probability, f)
    return mean, np.einsum("nlt,nltj->nj", probability, (f - P[:, None, None, :]) ** 2)


def _frobenius_only(squared_norm: ArrayLike, n_q: int, m: int, norm: str) -> Matrix:
    if norm != "frobenius":
        raise ValueError(f"the mean square error is known in the norm 'frobenius' only, got {norm!r}")
    return randomised_attention_error_bound(squared_norm, n_q, m)


def _softmax(logits: Matrix) -> Matrix:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=-1, keepdims=True))


def _squared_distance(x: ArrayLike, y: ArrayLike, mu: ArrayLike) -> tuple[Matrix, int]:
    """|x_i + y_j − μ|² (n_q, n_k), and d."""
    a = np.asarray(x, dtype=np.float64) - np.asarray(mu, dtype=np.float64)
    b = np.asarray(y, dtype=np.float64)
    squares = np.sum(a**2, axis=-1)[:, None] + np.sum(b**2, axis=-1) + 2 * a @ b.T
    return np.maximum(squares, 0), a.shape[-1]


def _whole(m: int) -> int:
    if isinstance(m, bool) or int(m) != m or m < 1:
        raise ValueError(f"m must be a whole number >= 1, got {m!r}")
    return int(m)
