"""Random rotations and orthogonal directions with the law that theory assumes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nla_llm.backend import Array, from_numpy, generator, namespace

if TYPE_CHECKING:
    import numpy as np

__all__ = ["haar_orthogonal", "orthogonal_directions"]


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
    m: int, d: int, rng: int | np.random.Generator, *, batch: tuple[int, ...] = (), like: Array | None = None
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

    Returns
    -------
    array (*batch, m, d), float64

    Examples
    --------
    >>> w = orthogonal_directions(5, 3, rng=0)
    >>> w.shape, bool(abs(w[0] @ w[1]) < 1e-14)
    ((5, 3), True)
    """
    if m < 1 or d < 1:
        raise ValueError(f"m and d must be at least 1, got m={m}, d={d}")
    rng = generator(rng)
    blocks = -(-m // d)
    rotations = haar_orthogonal(d, rng, batch=(*batch, blocks), like=like)
    xp = namespace(rotations)
    directions = xp.reshape(rotations, (*batch, blocks * d, d))[..., :m, :]
    lengths = xp.sqrt(from_numpy(rng.chisquare(d, size=(*batch, m)), like=rotations))
    return directions * lengths[..., None]
