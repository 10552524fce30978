"""Angles between subspaces."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nla_llm.backend import Array, to_numpy
from nla_llm.measures.estimate import Estimate

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Intruders", "amplification", "intruder_dimensions", "principal_angles", "subspace_similarity"]


def principal_angles(U: Array, V: Array) -> NDArray[Any]:
    """Principal angles between the column spaces of U and V, ascending, in radians.

    Cosines from UᵀV for large angles and sines from (I − UUᵀ)V for small ones (Björck and Golub 1973), so that small
    angles are accurate to rounding and not to its square root.

    Parameters
    ----------
    U, V : array (..., n, r), (..., n, s)
        Full column rank; the columns need not be orthonormal.

    Returns
    -------
    ndarray (..., min(r, s)), float64

    Raises
    ------
    ValueError
        If the rows do not match or the columns are linearly dependent.

    Examples
    --------
    >>> angles = principal_angles(np.eye(3)[:, :2], np.eye(3)[:, 1:])
    >>> angles.round(4).tolist()
    [0.0, 1.5708]
    """
    u, v = _basis("U", U), _basis("V", V)
    if u.shape[-2] != v.shape[-2]:
        raise ValueError(f"U and V must have the same number of rows, got {u.shape} and {v.shape}")
    if u.shape[-1] < v.shape[-1]:
        u, v = v, u
    overlap = np.swapaxes(u, -1, -2) @ v
    cosines = np.linalg.svd(overlap, compute_uv=False)
    sines = np.linalg.svd(v - u @ overlap, compute_uv=False)[..., ::-1]
    small = cosines**2 >= 0.5
    angles = np.where(small, np.arcsin(np.minimum(sines, 1.0)), np.arccos(np.minimum(cosines, 1.0)))
    return np.asarray(angles)


def subspace_similarity(A: Array, B: Array, i: int | None = None, j: int | None = None) -> Estimate:
    """φ = ‖A_iᵀ B_j‖_F² / min(i, j) for the first i and j columns of two orthonormal bases, between 0 and 1.

    Hu et al. 2021 (arXiv 2106.09685), equation (4): 1 where one space contains the other. Random spaces have
    the mean max(i, j)/n.

    Parameters
    ----------
    A, B : array (..., n, r), (..., n, s)
        Orthonormal columns, for instance singular vectors.
    i, j : int, optional
        Leading columns to use; all by default.

    Raises
    ------
    ValueError
        If the columns are not orthonormal or i, j are out of range.

    Examples
    --------
    >>> float(subspace_similarity(np.eye(4)[:, :2], np.eye(4)[:, 1:3]).value)
    0.5
    """
    a, b = (np.asarray(to_numpy(x), dtype=np.float64) for x in (A, B))
    i, j = a.shape[-1] if i is None else i, b.shape[-1] if j is None else j
    if not (1 <= i <= a.shape[-1] and 1 <= j <= b.shape[-1]):
        raise ValueError(f"i and j must lie in 1..{a.shape[-1]} and 1..{b.shape[-1]}, got {i} and {j}")
    a, b = a[..., :i], b[..., :j]
    slack = max(_defect("A", a, A), _defect("B", b, B))
    value = np.square(np.swapaxes(a, -1, -2) @ b).sum(axis=(-2, -1)) / min(i, j)
    how = "from the two bases, up to their departure from orthonormality"
    return Estimate(value, np.maximum(value - slack, 0.0), value + slack, 1.0, how)


class Intruders(NamedTuple):
    """How many of the leading left singular vectors of the tuned matrix are intruders: a range, ends included."""

    low: int
    high: int


def intruder_dimensions(
    tuned: Array, base: Array, threshold: float = 0.6, *, bound: NDArray[Any] | None = None
) -> Intruders:
    """Leading left singular vectors of a tuned matrix that resemble none of the base (Shuttleworth et al. 2024).

    A vector is an intruder where the largest |cosine| with any left singular vector of the base is below ``threshold``
    (arXiv 2410.21228, algorithm 1, where the threshold is varied; LoRA has intruders, full fine-tuning hardly any).
    Where only some vectors of the base are given, those that resemble none of them may resemble another: the count is
    then a range, from the number of those that certainly do not.

    Parameters
    ----------
    tuned : array (d_out, k)
        Leading left singular vectors after fine-tuning.
    base : array (d_out, l)
        Those before; all of them where l = d_out.
    bound : array (k,), optional
        Bound of the |cosine| with any vector of the base; see ``nla_llm.linalg.lanczos.largest_cosines``.

    Examples
    --------
    >>> base = np.eye(8)[:, :4]
    >>> tuned = np.stack([base[:, 1], (1 - np.eye(8)[1]) / np.sqrt(7)], axis=1)
    >>> intruder_dimensions(tuned, base)
    Intruders(low=0, high=1)
    >>> intruder_dimensions(tuned, np.eye(8))
    Intruders(low=1, high=1)
    """
    t, b = (np.asarray(to_numpy(x), dtype=np.float64) for x in (tuned, base))
    for name, x, given in (("tuned", t, tuned), ("base", b, base)):
        _defect(name, x, given)
    cosines = np.abs(b.T @ t)
    best = cosines.max(axis=0)
    count = int(np.sum(best < threshold))
    if b.shape[1] == b.shape[0]:
        return Intruders(count, count)
    certain = 0 if bound is None else int(np.sum(np.maximum(best, bound) < threshold))
    return Intruders(certain, count)


def amplification(size: float, left: Array, right: Array, base: Array) -> float:
    """‖ΔW‖_F / ‖UᵀWV‖_F: how much an update adds along its own directions to what the base has there.

    Hu et al. 2021 (arXiv 2106.09685), section 7.3 and Table 7: 21.5 at rank 4 and 1.9 at rank 64 in layer 48 of GPT-3.
    Its baseline, random directions, is in ``nla_llm.theory.updates.random_projection_norm``. Infinite where the base
    has nothing there.

    Parameters
    ----------
    size : float
        ‖ΔW‖_F.
    left, right : array (d_out, r), (d_in, r)
        Leading singular vectors of ΔW.
    base : array (d_out, d_in)

    Examples
    --------
    >>> amplification(6.0, np.eye(3)[:, :1], np.eye(3)[:, :1], np.diag([2.0, 5.0, 7.0]))
    3.0
    """
    within = float(np.linalg.norm(left.T @ np.asarray(base @ right.astype(base.dtype), dtype=np.float64)))
    return size / within if within > 0 else math.inf


def _basis(name: str, x: Array) -> NDArray[Any]:
    x = np.asarray(to_numpy(x), dtype=np.float64)
    if x.ndim < 2 or not 1 <= x.shape[-1] <= x.shape[-2]:
        raise ValueError(f"{name} must be (..., n, r) with 1 <= r <= n, got {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} has entries that are NaN or infinite, so its columns span no space")
    u, s, _ = np.linalg.svd(x, full_matrices=False)
    if np.any(s[..., -1] <= x.shape[-2] * np.finfo(float).eps * s[..., 0]):
        raise ValueError(
            f"the columns of {name} are linearly dependent, so they span no space of dimension {x.shape[-1]}"
        )
    return np.asarray(u)


def _defect(name: str, x: NDArray[Any], given: Array) -> float:
    """2 max ‖xᵀx − I‖_F plus rounding, after checking that it is rounding of the dtype that was given."""
    unit = float(np.finfo(to_numpy(given).dtype).eps)
    defect = float(np.linalg.norm(np.swapaxes(x, -1, -2) @ x - np.eye(x.shape[-1]), axis=(-2, -1)).max())
    if not defect <= 1e2 * x.shape[-2] * unit:
        raise ValueError(
            f"the columns of {name} are not orthonormal (‖xᵀx − I‖ = {defect:.2g}); orthonormalise them first"
        )
    return 2.0 * defect + 4.0 * math.sqrt(x.shape[-2]) * unit
