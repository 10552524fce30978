"""What quantising costs on average: the mean squared error on Gaussian entries, by quadrature.

Everything is float64 NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nla_llm.theory.bound import Matrix

__all__ = ["gaussian_error"]

_LARGEST = 12.0  # no block, however long, has a larger modulus: its probability is below 4e-33 an entry


def gaussian_error(levels: Sequence[float], block: int) -> float:
    """Mean squared error of an entry of independent standard normal blocks, the scale being the largest modulus.

    Given the largest modulus m of ``block`` entries, that entry is met exactly and the others are independent normal
    ones cut to [−m, m], so the error is (1 − 1/B) E_m ∫ (x − m l(x/m))² φ(x) dx / (2Φ(m) − 1), with l(·) the nearest
    level; m has the density 2 B φ(m) (2Φ(m) − 1)^(B − 1) (derived).

    Parameters
    ----------
    levels
        Ascending, from −1 to 1, both included.
    block
        B, at least 1.

    Raises
    ------
    ValueError
        If the levels do not reach from −1 to 1, or ``block`` is below one.

    Examples
    --------
    >>> gaussian_error([-1.0, 1.0], 1)
    0.0
    >>> from nla_llm.arithmetic.quantisers import normal_float_levels
    >>> round(gaussian_error(normal_float_levels(4), 64) ** 0.5, 4)
    0.092
    """
    from scipy.integrate import quad  # noqa: PLC0415 - slow to load and only needed here
    from scipy.special import ndtr  # noqa: PLC0415 - as above

    x = np.asarray(levels, dtype=np.float64)
    if x.ndim != 1 or x.size < 2 or (x[0], x[-1]) != (-1.0, 1.0) or not bool(np.all(np.diff(x) > 0)):
        raise ValueError(f"levels must ascend from -1 to 1, got {levels!r}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block!r}")
    ends = np.concatenate([[-1.0], (x[1:] + x[:-1]) / 2, [1.0]])

    def integrand(m: float) -> float:
        inside = float(ndtr(m) - ndtr(-m))
        density = 2 * block * float(_normal(np.array(m))) * inside ** (block - 2)
        return density * _squared_error(m * ends, m * x)

    if block == 1:
        return 0.0
    return (1 - 1 / block) * float(quad(integrand, 0, _LARGEST, epsabs=1e-14, epsrel=1e-10, limit=200)[0])


def _squared_error(ends: Matrix, points: Matrix) -> float:
    """Σ_k ∫ (x − p_k)² φ(x) dx from end k to end k + 1."""
    from scipy.special import ndtr  # noqa: PLC0415 - slow to load

    def primitive(x: Matrix) -> Matrix:
        return np.asarray((1 + points**2) * ndtr(x) - (x - 2 * points) * _normal(x))

    return float(np.sum(primitive(ends[1:]) - primitive(ends[:-1])))


def _normal(x: Matrix) -> Matrix:
    return np.asarray(np.exp(-np.square(x) / 2) / np.sqrt(2 * np.pi))
