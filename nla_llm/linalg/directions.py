"""Random rotations and orthogonal directions with the law that theory assumes."""

from __future__ import annotations

from inspect import signature
from math import sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import Array, from_numpy, generator, namespace

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SOBOL_SEEDS", "haar_orthogonal", "orthogonal_directions", "simplex_directions", "sobol_directions"]

SOBOL_SEEDS = 4  # random words that seed a scrambling
_BITS = 32


def haar_orthogonal(
    n: int,
    rng: int | np.random.Generator,
    *,
    columns: int | None = None,
    batch: tuple[int, ...] = (),
    like: Array | None = None,
) -> Array:
    """Orthogonal matrices, or some orthonormal columns, drawn from the Haar (uniform) measure.

    The Q of a QR factorisation is Haar only after the signs of the diagonal of R are moved into Q (Mezzadri 2007,
    arXiv math-ph/0609050, section 5): LAPACK's own signs depend on the input, and estimators become biased.

    Parameters
    ----------
    n : int
        Order, at least 1.
    rng : int or numpy.random.Generator
    columns : int, optional
        How many columns, at most n; n unless given.
    batch : tuple of int
        Leading axes, independent draws.
    like : array, optional
        The numbers are drawn by NumPy; the rest is done in the library and on the device of this array.

    Returns
    -------
    array (*batch, n, columns), float64

    Raises
    ------
    ValueError
        If n is below 1, or ``columns`` is not between 1 and n.

    Examples
    --------
    >>> import numpy as np
    >>> q = haar_orthogonal(3, rng=0)
    >>> bool(np.allclose(q @ q.T, np.eye(3)))
    True
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    columns = n if columns is None else columns
    if not 1 <= columns <= n:
        raise ValueError(f"columns must be between 1 and n={n}, got {columns}")
    gaussian = generator(rng).standard_normal((*batch, n, columns))
    if like is not None:
        gaussian = from_numpy(gaussian, like=like)
    xp = namespace(gaussian)
    q, r = xp.linalg.qr(gaussian)
    return xp.where((xp.linalg.diagonal(r) < 0)[..., None, :], -q, q)


def orthogonal_directions(
    m: int,
    d: int,
    rng: int | np.random.Generator,
    *,
    batch: tuple[int, ...] = (),
    like: Array | None = None,
    fixed_norms: bool = False,
) -> Array:
    """Directions ω_1 … ω_m with the law N(0, I_d) each, orthogonal within blocks of d.

    Each block is a Haar orthogonal matrix whose rows get independent χ_d lengths (Yu et al. 2016, arXiv 1610.09072,
    section 3; Choromanski et al. 2020, arXiv 2009.14794). The last block is cut where d does not divide m.

    Parameters
    ----------
    m, d : int
        Number of directions and their dimension, at least 1.
    rng : int or numpy.random.Generator
    batch : tuple of int
        Leading axes, independent draws.
    like : array, optional
        The numbers are drawn by NumPy; the rest is done in the library and on the device of this array.
    fixed_norms : bool
        All lengths are √d instead: E ω ωᵀ = I still, but a row is uniform on a sphere and not Gaussian.

    Returns
    -------
    array (*batch, m, d), float64

    Examples
    --------
    >>> w = orthogonal_directions(5, 3, rng=0)
    >>> w.shape, bool(abs(w[0] @ w[1]) < 1e-14)
    ((5, 3), True)
    """
    rng = generator(rng)
    rotations = _rotations(m, d, rng, batch, like)
    directions = _first_rows(rotations, m)
    return directions * sqrt(d) if fixed_norms else directions * _lengths(m, d, rng, batch, rotations)


def simplex_directions(
    m: int, d: int, rng: int | np.random.Generator, *, batch: tuple[int, ...] = (), like: Array | None = None
) -> Array:
    """Directions with the law N(0, I_d) each that, within blocks of d, enclose equal obtuse angles.

    Each block is a regular simplex, u_i·u_j = −1/(d − 1), the rows of √(d/(d−1)) (I − 11ᵀ/d) R for a Haar orthogonal R,
    with independent χ_d lengths (Reid, Choromanski, Likhosherstov and Weller 2023, arXiv 2301.13856, section 3). The
    last block is cut where d does not divide m. In one dimension a block is one direction, ±1 times its length.

    Parameters
    ----------
    m, d : int
        Number of directions and their dimension, at least 1.
    rng : int or numpy.random.Generator
    batch : tuple of int
        Leading axes, independent draws.
    like : array, optional
        The numbers are drawn by NumPy; the rest is done in the library and on the device of this array.

    Returns
    -------
    array (*batch, m, d), float64

    Examples
    --------
    >>> w = simplex_directions(3, 3, rng=0)
    >>> cosine = w[0] @ w[1] / (w[0] @ w[0] * w[1] @ w[1]) ** 0.5
    >>> round(float(cosine), 12)
    -0.5
    """
    rng = generator(rng)
    rotations = _rotations(m, d, rng, batch, like)
    xp = namespace(rotations)
    # Taking off the centre of one vector would leave nothing: in one dimension it stays where it is.
    share, stretch = (1 / d, sqrt(d / (d - 1))) if d > 1 else (0.0, 1.0)
    centred = rotations - share * xp.sum(rotations, axis=-2, keepdims=True)
    return _first_rows(centred, m) * (stretch * _lengths(m, d, rng, batch, rotations))


def sobol_directions(m: int, d: int, rng: int | np.random.Generator) -> NDArray[np.float64]:
    """Directions Φ⁻¹(u_1) … Φ⁻¹(u_m) for the first m points of a scrambled Sobol sequence in d dimensions.

    The scrambling (a random linear matrix and a digital shift in each coordinate; Matoušek 1998) makes each point by
    itself uniform, so each row is N(0, I_d) by itself; all m of them together fill the space evenly. The sequence has
    32 binary digits; those that follow are drawn independently, so that neither 0 nor 1 nor a grid occurs.

    Examples
    --------
    >>> sobol_directions(5, 3, rng=0).shape
    (5, 3)
    """
    from scipy.special import ndtri  # noqa: PLC0415 - SciPy loads where it is used
    from scipy.stats.qmc import Sobol  # noqa: PLC0415

    _check_sizes(m, d)
    rng = generator(rng)
    words = rng.integers(0, 2**32, size=SOBOL_SEEDS, dtype=np.uint64)
    keyword = "rng" if "rng" in signature(Sobol.__init__).parameters else "seed"  # renamed in SciPy 1.15
    seeded: dict[str, Any] = {keyword: np.random.default_rng(words)}
    sequence = Sobol(d, scramble=True, bits=_BITS, **seeded)
    points = sequence.random_base2((m - 1).bit_length())[:m]  # asked for m alone, SciPy warns of lost balance
    lower = points < 0.5
    cells = np.where(lower, points, (1 - 2.0**-_BITS) - points)  # to the nearer end, without rounding
    distance = cells + (1 - rng.random((m, d))) * 2.0**-_BITS
    return np.asarray(np.where(lower, 1.0, -1.0) * ndtri(distance))


def _rotations(m: int, d: int, rng: np.random.Generator, batch: tuple[int, ...], like: Array | None) -> Array:
    """Haar matrices (*batch, ⌈m/d⌉, d, d)."""
    _check_sizes(m, d)
    return haar_orthogonal(d, rng, batch=(*batch, -(-m // d)), like=like)


def _first_rows(blocks: Array, m: int) -> Array:
    """The first m rows of blocks (..., blocks, d, d), one under the other."""
    *batch, number, rows, d = blocks.shape
    return namespace(blocks).reshape(blocks, (*batch, number * rows, d))[..., :m, :]


def _lengths(m: int, d: int, rng: np.random.Generator, batch: tuple[int, ...], like: Array) -> Array:
    """χ_d numbers (*batch, m, 1)."""
    return namespace(like).sqrt(from_numpy(rng.chisquare(d, size=(*batch, m, 1)), like=like))


def _check_sizes(m: int, d: int) -> None:
    if m < 1 or d < 1:
        raise ValueError(f"m and d must be at least 1, got m={m}, d={d}")
