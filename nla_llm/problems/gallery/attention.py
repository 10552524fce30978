"""Attention problems: queries and keys (*heads, n, d), values (*heads, n, d_v), logits q kᵀ/√d.

Entries of q and k have standard deviation ``scale`` unless a docstring says otherwise, those of v have 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nla_llm.backend import generator
from nla_llm.linalg import haar_orthogonal
from nla_llm.problems.gallery._arguments import at_least_zero, floating, spectrum, whole
from nla_llm.problems.problem import AttentionProblem

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    Matrix = NDArray[np.float64]
    Rng = int | np.random.Generator

__all__ = [
    "clusters",
    "gaussian",
    "low_rank_logits",
    "prescribed_logit_spectrum",
    "shifted_mean",
    "unequal_key_norms",
]


def gaussian(
    n: int,
    d: int,
    *,
    scale: float = 1.0,
    d_v: int | None = None,
    heads: tuple[int, ...] = (),
    causal: bool = False,
    rng: Rng = 0,
    dtype: DTypeLike = np.float64,
) -> AttentionProblem:
    """Independent normal entries of standard deviation ``scale``: the worst case, as nothing is there to be exploited.

    Known: logits have mean 0 and variance scale⁴; t = |q + k|²/√d has mean 2 scale² √d (16 at d = 64), so the relative
    variance of positive random features, (e^t − 1)/m, is astronomic at common head dimensions.

    Parameters
    ----------
    n, d
        Tokens and head dimension.
    scale
        Standard deviation of the entries of q and k.
    d_v
        Columns of the values, d unless given.
    heads
        Leading axes; heads are independent.
    causal
        Query i sees keys j ≤ i.
    rng
        Seed or generator.
    dtype
        Floating dtype of q, k and v.

    Raises
    ------
    ValueError
        If a size is not a whole number >= 1 or ``scale`` is negative or not finite.

    Examples
    --------
    >>> problem = gaussian(16, 4, heads=(2,), rng=0)
    >>> problem.q.shape, problem.exact().shape
    ((2, 16, 4), (2, 16, 16))
    """
    shape, d_v = _sizes(n, d, d_v, heads)
    rng = generator(rng)
    q, k = (at_least_zero("scale", scale) * rng.standard_normal(shape) for _ in range(2))
    return _attention(q, k, d_v, rng, causal=causal, dtype=dtype)


def unequal_key_norms(
    n: int,
    d: int,
    *,
    spread: float = 1.0,
    scale: float = 1.0,
    d_v: int | None = None,
    heads: tuple[int, ...] = (),
    causal: bool = False,
    rng: Rng = 0,
    dtype: DTypeLike = np.float64,
) -> AttentionProblem:
    """Gaussian keys multiplied by log-normal factors e^(spread·g − spread²): a few long keys dominate.

    Known: the mean square of an entry of k stays scale²; the logarithms of the norms have standard deviation of about
    ``spread``; ``spread=0`` is :func:`gaussian`.

    Examples
    --------
    >>> norms = np.linalg.norm(unequal_key_norms(256, 16, spread=1.0).k, axis=-1)
    >>> bool(norms.max() > 10 * norms.min())
    True
    """
    shape, d_v = _sizes(n, d, d_v, heads)
    spread = at_least_zero("spread", spread)
    rng = generator(rng)
    q, k = (at_least_zero("scale", scale) * rng.standard_normal(shape) for _ in range(2))
    k = k * np.exp(spread * rng.standard_normal((*shape[:-1], 1)) - spread**2)
    return _attention(q, k, d_v, rng, causal=causal, dtype=dtype)


def shifted_mean(
    n: int,
    d: int,
    *,
    shift: float = 1.0,
    scale: float = 1.0,
    d_v: int | None = None,
    heads: tuple[int, ...] = (),
    causal: bool = False,
    rng: Rng = 0,
    dtype: DTypeLike = np.float64,
) -> AttentionProblem:
    """Gaussian queries and keys with ``shift`` added to every entry: positive features suffer, softmax hardly changes.

    Known: the shift of the keys leaves the softmax as it is; subtracting q̄ + k̄ from the keys lowers the mean of
    |q + k|²/√d by |q̄ + k̄|²/√d, about 4 shift² √d.

    Examples
    --------
    >>> bool(abs(shifted_mean(512, 8, shift=3.0).k.mean() - 3) < 0.1)
    True
    """
    shape, d_v = _sizes(n, d, d_v, heads)
    if not np.isfinite(shift):
        raise ValueError(f"shift must be finite, got {shift!r}")
    rng = generator(rng)
    q, k = (shift + at_least_zero("scale", scale) * rng.standard_normal(shape) for _ in range(2))
    return _attention(q, k, d_v, rng, causal=causal, dtype=dtype)


def clusters(
    n: int,
    d: int,
    *,
    count: int = 8,
    spread: float = 0.1,
    scale: float = 1.0,
    d_v: int | None = None,
    heads: tuple[int, ...] = (),
    causal: bool = False,
    rng: Rng = 0,
    dtype: DTypeLike = np.float64,
) -> AttentionProblem:
    """Tokens around ``count`` centres that queries and keys share; token i belongs to a random one.

    Centres have entries of standard deviation ``scale``, the deviations from them ``spread · scale``. Known: with
    ``spread=0`` the attention matrix has at most ``count`` different rows and columns, hence rank at most ``count``.

    Examples
    --------
    >>> P = clusters(64, 8, count=3, spread=0.0).exact().dense()
    >>> int(np.linalg.matrix_rank(P))
    3
    """
    shape, d_v = _sizes(n, d, d_v, heads)
    count, spread = whole("count", count), at_least_zero("spread", spread)
    rng = generator(rng)
    centres = rng.standard_normal((*heads, count, d))
    labels = rng.integers(count, size=(*heads, n))
    centre = np.take_along_axis(centres, labels[..., None], axis=-2)
    q, k = (at_least_zero("scale", scale) * (centre + spread * rng.standard_normal(shape)) for _ in range(2))
    return _attention(q, k, d_v, rng, causal=causal, dtype=dtype)


def low_rank_logits(
    n: int,
    d: int,
    rank: int,
    *,
    scale: float = 1.0,
    d_v: int | None = None,
    heads: tuple[int, ...] = (),
    causal: bool = False,
    rng: Rng = 0,
    dtype: DTypeLike = np.float64,
) -> AttentionProblem:
    """Queries and keys in one random subspace of dimension ``rank`` <= d; the mean square of an entry stays scale².

    Known: the logit matrix has rank min(rank, n); the softmax of it does not.

    Examples
    --------
    >>> problem = low_rank_logits(32, 8, rank=2)
    >>> int(np.linalg.matrix_rank(problem.q @ problem.k.T))
    2
    """
    shape, d_v = _sizes(n, d, d_v, heads)
    rank = whole("rank", rank)
    if rank > d:
        raise ValueError(f"rank must be at most d={d}, got {rank}; q and k have only d columns")
    rng = generator(rng)
    basis = haar_orthogonal(d, rng, batch=heads)[..., :rank, :] * np.sqrt(d / rank)
    q, k = (at_least_zero("scale", scale) * rng.standard_normal((*shape[:-1], rank)) @ basis for _ in range(2))
    return _attention(q, k, d_v, rng, causal=causal, dtype=dtype)


def prescribed_logit_spectrum(
    singular_values: ArrayLike,
    n: int,
    d: int | None = None,
    *,
    d_v: int | None = None,
    heads: tuple[int, ...] = (),
    causal: bool = False,
    rng: Rng = 0,
    dtype: DTypeLike = np.float64,
) -> AttentionProblem:
    """Logits q kᵀ/√d = U Σ Vᵀ with exactly these singular values and independent Haar frames U and V.

    Known: everything about the logits: their norms, rank and condition number. q and k share the square root of Σ and
    are rotated by one Haar matrix of order d, so that no coordinate is special.

    Parameters
    ----------
    singular_values
        At most min(n, d) numbers >= 0, in any order; the others are zero.
    n, d
        Tokens and head dimension; d is the number of singular values unless given.

    Raises
    ------
    ValueError
        If there are more singular values than min(n, d), or one is negative or not finite.

    Examples
    --------
    >>> problem = prescribed_logit_spectrum([8.0, 4.0, 1.0], n=16)
    >>> np.linalg.svd(problem.scale * problem.q @ problem.k.T)[1][:4].round(12).tolist()
    [8.0, 4.0, 1.0, 0.0]
    """
    s = spectrum(singular_values)
    d = s.size if d is None else d
    (*_, n, d), d_v = _sizes(n, d, d_v, heads)
    if s.size > min(n, d):
        raise ValueError(f"singular_values must be at most min(n, d)={min(n, d)} numbers, got {s.size}")
    rng = generator(rng)
    root = np.sqrt(s * np.sqrt(d))  # the logits carry 1/√d
    rotation = haar_orthogonal(d, rng, batch=heads)[..., : s.size, :]
    q, k = ((haar_orthogonal(n, rng, columns=s.size, batch=heads) * root) @ rotation for _ in range(2))
    return _attention(q, k, d_v, rng, causal=causal, dtype=dtype)


def _attention(
    q: Matrix, k: Matrix, d_v: int, rng: np.random.Generator, *, causal: bool, dtype: DTypeLike
) -> AttentionProblem:
    v = rng.standard_normal((*k.shape[:-1], d_v))
    kind = floating(dtype)
    return AttentionProblem(q.astype(kind), k.astype(kind), v.astype(kind), causal=causal)


def _sizes(n: int, d: int, d_v: int | None, heads: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    if not isinstance(heads, tuple):
        raise TypeError(f"heads must be a tuple of leading axes such as (8,), got {heads!r}")
    sizes = (*(whole("heads", h) for h in heads), whole("n", n), whole("d", d))
    return sizes, sizes[-1] if d_v is None else whole("d_v", d_v)
