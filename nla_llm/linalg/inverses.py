"""Inverses of small matrices that may be singular: by iteration, by singular values, or regularised by a ridge."""

from __future__ import annotations

from nla_llm.backend import Array, device_of, eps, namespace

__all__ = ["iterated_inverse", "norm_product", "pseudo_inverse", "ridge_inverse"]


def norm_product(a: Array) -> Array:
    """‖A‖₁ ‖A‖_∞ of each matrix of a batch, (..., 1, 1): an upper bound of ‖A‖₂².

    Examples
    --------
    >>> import numpy as np
    >>> norm_product(np.array([[1.0, 2.0], [0.0, 1.0]])).tolist()
    [[9.0]]
    """
    xp = namespace(a)
    size = xp.abs(a)
    columns = xp.max(xp.sum(size, axis=-2), axis=-1)
    rows = xp.max(xp.sum(size, axis=-1), axis=-1)
    return (columns * rows)[..., None, None]


def iterated_inverse(a: Array, iterations: int, *, start: Array | None = None) -> Array:
    """Z after some steps of Z ← ¼ Z (13 I − A Z (15 I − A Z (7 I − A Z))), from Aᵀ/(‖A‖₁ ‖A‖_∞) of each matrix.

    The residual R = I − A Z obeys R ← ¼ R³ (3 I + R) exactly, so Z tends to the pseudo-inverse with order three;
    a singular value a of A with a² ≪ ‖A‖₁ ‖A‖_∞ is only inverted up to the factor (13/4)^j a²/(‖A‖₁ ‖A‖_∞) after j
    steps. Razavi et al. 2014, in the form of Xiong et al. 2021, arXiv 2102.03902, section 3.2.

    Parameters
    ----------
    a : array (..., r, r)
    iterations
        Number of steps.
    start : array (..., r, r), optional
        The first Z, which must commute with A up to the order of the factors (Aᵀ times a number, or the identity for a
        matrix with eigenvalues in (0, 1]).

    Examples
    --------
    >>> import numpy as np
    >>> bool(np.allclose(iterated_inverse(np.diag([1.0, 0.25]), 8), np.diag([1.0, 4.0])))
    True
    """
    xp = namespace(a)
    z = xp.matrix_transpose(a) / norm_product(a) if start is None else start
    eye = xp.eye(a.shape[-1], dtype=a.dtype, device=device_of(a))
    seven, fifteen, thirteen = 7.0 * eye, 15.0 * eye, 13.0 * eye
    for _ in range(iterations):
        az = a @ z
        z = 0.25 * (z @ (thirteen - az @ (fifteen - az @ (seven - az))))
    return z


def pseudo_inverse(a: Array) -> Array:
    """A⁺ (..., s, r) of a (..., r, s); singular values below max(r, s) eps σ₁ are taken for zeros.

    Examples
    --------
    >>> import numpy as np
    >>> pseudo_inverse(np.diag([2.0, 0.0])).tolist()
    [[0.5, 0.0], [0.0, 0.0]]
    """
    u, s, vt = namespace(a).linalg.svd(a, full_matrices=False)
    xp = namespace(s)
    keep = s > max(a.shape[-2:]) * eps(a) * s[..., :1]
    inverse = 1.0 / xp.where(keep, s, xp.ones_like(s))
    return _from_factors(u, xp.where(keep, inverse, xp.zeros_like(s)), vt)


def ridge_inverse(a: Array, ridge: Array) -> Array:
    """(AᵀA + λI)⁻¹ Aᵀ for λ (..., 1, 1), from the singular values, so that their squares lose no digits.

    Examples
    --------
    >>> import numpy as np
    >>> ridge_inverse(np.diag([2.0, 1.0]), np.ones((1, 1))).tolist()
    [[0.4, 0.0], [0.0, 0.5]]
    """
    u, s, vt = namespace(a).linalg.svd(a, full_matrices=False)
    return _from_factors(u, s / (s * s + ridge[..., 0]), vt)


def _from_factors(u: Array, values: Array, vt: Array) -> Array:
    """V diag(values) Uᵀ."""
    transpose = namespace(u).matrix_transpose
    return (transpose(vt) * values[..., None, :]) @ transpose(u)
