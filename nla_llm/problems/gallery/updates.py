"""Update problems (d_out, d_in) of which the singular values are known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nla_llm.backend import generator
from nla_llm.linalg import haar_orthogonal
from nla_llm.problems.gallery._arguments import at_least_zero, floating, spectrum, whole
from nla_llm.problems.update import UpdateProblem

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    Matrix = NDArray[np.float64]
    Rng = int | np.random.Generator

__all__ = [
    "exponential_update",
    "low_rank_plus_noise_update",
    "power_law_update",
    "prescribed_spectrum_update",
    "spiked_update",
]


def prescribed_spectrum_update(
    singular_values: ArrayLike, d_out: int, d_in: int, *, rng: Rng = 0, dtype: DTypeLike = np.float64
) -> UpdateProblem:
    """Update U Σ Vᵀ with exactly these singular values and independent Haar frames U and V.

    Known: the best error at rank r is (Σ_{i>r} σ_i²)^½ in the Frobenius and σ_{r+1} in the spectral norm.

    Parameters
    ----------
    singular_values
        At most min(d_out, d_in) numbers >= 0, in any order; the others are zero.
    d_out, d_in
        Rows and columns of the update.
    rng
        Seed or generator.
    dtype
        Floating dtype of the update; the spectrum is exact to a small multiple of its epsilon.

    Raises
    ------
    ValueError
        If there are more singular values than min(d_out, d_in), or one is negative or not finite.

    Examples
    --------
    >>> update = prescribed_spectrum_update([3.0, 1.0], 6, 4)
    >>> np.linalg.svd(update.delta)[1].round(12).tolist()
    [3.0, 1.0, 0.0, 0.0]
    """
    s = spectrum(singular_values)
    d_out, d_in = whole("d_out", d_out), whole("d_in", d_in)
    if s.size > min(d_out, d_in):
        raise ValueError(f"singular_values must be at most min(d_out, d_in)={min(d_out, d_in)} numbers, got {s.size}")
    rng = generator(rng)
    left, right = (haar_orthogonal(n, rng, columns=s.size) for n in (d_out, d_in))
    return UpdateProblem(((left * s) @ right.T).astype(floating(dtype)))


def power_law_update(
    d_out: int, d_in: int, exponent: float = 1.0, *, rng: Rng = 0, dtype: DTypeLike = np.float64
) -> UpdateProblem:
    """Update with singular values σ_i = i^(−exponent), i = 1 … min(d_out, d_in).

    Known: the tail at rank r is about r^(½ − exponent)/√(2·exponent − 1) in the Frobenius norm for exponent > ½; at
    exponent ½ or below no fixed rank holds a fixed share of the energy as the matrix grows.

    Examples
    --------
    >>> np.linalg.svd(power_law_update(4, 6, exponent=1.0).delta)[1].round(4).tolist()
    [1.0, 0.5, 0.3333, 0.25]
    """
    i = np.arange(1, _smaller(d_out, d_in) + 1)
    return prescribed_spectrum_update(i ** -at_least_zero("exponent", exponent), d_out, d_in, rng=rng, dtype=dtype)


def exponential_update(
    d_out: int, d_in: int, rate: float = 0.1, *, rng: Rng = 0, dtype: DTypeLike = np.float64
) -> UpdateProblem:
    """Update with singular values σ_i = e^(−rate (i − 1)), i = 1 … min(d_out, d_in).

    Known: every further rank multiplies the best error by e^(−rate), in both norms.

    Examples
    --------
    >>> np.linalg.svd(exponential_update(3, 3, rate=1.0).delta)[1].round(4).tolist()
    [1.0, 0.3679, 0.1353]
    """
    i = np.arange(_smaller(d_out, d_in))
    return prescribed_spectrum_update(np.exp(-at_least_zero("rate", rate) * i), d_out, d_in, rng=rng, dtype=dtype)


def low_rank_plus_noise_update(
    d_out: int, d_in: int, rank: int, noise: float = 1e-2, *, rng: Rng = 0, dtype: DTypeLike = np.float64
) -> UpdateProblem:
    """Update with ``rank`` singular values 1 and all others equal to ``noise``: exact rank plus a flat floor.

    Known: the best error at that rank is noise in the spectral and noise·√(min(d_out, d_in) − rank) in the Frobenius
    norm. With ``noise=0`` the rank is exact.

    Examples
    --------
    >>> np.linalg.svd(low_rank_plus_noise_update(4, 4, rank=2, noise=0.1).delta)[1].round(12).tolist()
    [1.0, 1.0, 0.1, 0.1]
    """
    smaller, rank = _smaller(d_out, d_in), whole("rank", rank)
    if rank > smaller:
        raise ValueError(f"rank must be at most min(d_out, d_in)={smaller}, got {rank}")
    s = np.where(np.arange(smaller) < rank, 1.0, at_least_zero("noise", noise))
    return prescribed_spectrum_update(s, d_out, d_in, rng=rng, dtype=dtype)


def spiked_update(
    strengths: ArrayLike, d_out: int, d_in: int, *, rng: Rng = 0, dtype: DTypeLike = np.float64
) -> UpdateProblem:
    """Spikes θ_i u_i v_iᵀ in Gaussian noise with entries of variance 1/max(d_out, d_in).

    Known, for growing sizes: a spike shows above the bulk edge 1 + √β only if θ > β^¼, β the ratio of the sides; where
    it then stands and how far its vectors turn is given by ``nla_llm.theory.updates.spiked_model``.

    Examples
    --------
    >>> bool(np.linalg.svd(spiked_update([4.0], 200, 400).delta)[1][0] > 4)
    True
    """
    rng = generator(rng)
    signal = prescribed_spectrum_update(strengths, d_out, d_in, rng=rng).delta
    noise = rng.standard_normal((d_out, d_in)) / np.sqrt(max(d_out, d_in))
    return UpdateProblem((signal + noise).astype(floating(dtype)))


def _smaller(d_out: int, d_in: int) -> int:
    return min(whole("d_out", d_out), whole("d_in", d_in))
