"""Made-up problems of which something is known in closed form. Same seed, same problem.

Attention: queries and keys (*heads, n, d), values (*heads, n, d_v), logits q kᵀ/√d. Entries of q and k have standard
deviation ``scale`` unless a docstring says otherwise, those of v have 1. Everything is drawn in float64 and rounded to
``dtype`` at the end, so problems of one seed in two precisions are the same problem. Arrays are NumPy's; for another
library use ``problem.map``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import generator
from nla_llm.linalg.directions import haar_orthogonal
from nla_llm.problems.problem import AttentionProblem, UpdateProblem

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, DTypeLike, NDArray

    Matrix = NDArray[np.float64]
    Rng = int | np.random.Generator

__all__ = [
    "clusters",
    "exponential_update",
    "gaussian",
    "low_rank_logits",
    "low_rank_plus_noise_update",
    "power_law_update",
    "prescribed_logit_spectrum",
    "prescribed_spectrum_update",
    "shifted_mean",
    "spiked_update",
    "unequal_key_norms",
]


# -- attention ---------------------------------------------------------------------------------------------------------


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
    q, k = (_at_least_zero("scale", scale) * rng.standard_normal(shape) for _ in range(2))
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
    spread = _at_least_zero("spread", spread)
    rng = generator(rng)
    q, k = (_at_least_zero("scale", scale) * rng.standard_normal(shape) for _ in range(2))
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
    q, k = (shift + _at_least_zero("scale", scale) * rng.standard_normal(shape) for _ in range(2))
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
    count, spread = _whole("count", count), _at_least_zero("spread", spread)
    rng = generator(rng)
    centres = rng.standard_normal((*heads, count, d))
    labels = rng.integers(count, size=(*heads, n))
    centre = np.take_along_axis(centres, labels[..., None], axis=-2)
    q, k = (_at_least_zero("scale", scale) * (centre + spread * rng.standard_normal(shape)) for _ in range(2))
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
    rank = _whole("rank", rank)
    if rank > d:
        raise ValueError(f"rank must be at most d={d}, got {rank}; q and k have only d columns")
    rng = generator(rng)
    basis = haar_orthogonal(d, rng, batch=heads)[..., :rank, :] * np.sqrt(d / rank)
    q, k = (_at_least_zero("scale", scale) * rng.standard_normal((*shape[:-1], rank)) @ basis for _ in range(2))
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
    s = _spectrum(singular_values)
    d = s.size if d is None else d
    (*_, n, d), d_v = _sizes(n, d, d_v, heads)
    if s.size > min(n, d):
        raise ValueError(f"singular_values must be at most min(n, d)={min(n, d)} numbers, got {s.size}")
    rng = generator(rng)
    root = np.sqrt(s * np.sqrt(d))  # the logits carry 1/√d
    rotation = haar_orthogonal(d, rng, batch=heads)[..., : s.size, :]
    q, k = ((_haar_frame(n, s.size, rng, heads) * root) @ rotation for _ in range(2))
    return _attention(q, k, d_v, rng, causal=causal, dtype=dtype)


# -- updates -----------------------------------------------------------------------------------------------------------


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
    s = _spectrum(singular_values)
    d_out, d_in = _whole("d_out", d_out), _whole("d_in", d_in)
    if s.size > min(d_out, d_in):
        raise ValueError(f"singular_values must be at most min(d_out, d_in)={min(d_out, d_in)} numbers, got {s.size}")
    rng = generator(rng)
    left, right = _haar_frame(d_out, s.size, rng), _haar_frame(d_in, s.size, rng)
    return UpdateProblem(((left * s) @ right.T).astype(_floating(dtype)))


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
    return prescribed_spectrum_update(i ** -_at_least_zero("exponent", exponent), d_out, d_in, rng=rng, dtype=dtype)


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
    return prescribed_spectrum_update(np.exp(-_at_least_zero("rate", rate) * i), d_out, d_in, rng=rng, dtype=dtype)


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
    smaller, rank = _smaller(d_out, d_in), _whole("rank", rank)
    if rank > smaller:
        raise ValueError(f"rank must be at most min(d_out, d_in)={smaller}, got {rank}")
    s = np.where(np.arange(smaller) < rank, 1.0, _at_least_zero("noise", noise))
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
    return UpdateProblem((signal + noise).astype(_floating(dtype)))


# -- shared ------------------------------------------------------------------------------------------------------------


def _attention(
    q: Matrix, k: Matrix, d_v: int, rng: np.random.Generator, *, causal: bool, dtype: DTypeLike
) -> AttentionProblem:
    v = rng.standard_normal((*k.shape[:-1], d_v))
    kind = _floating(dtype)
    return AttentionProblem(q.astype(kind), k.astype(kind), v.astype(kind), causal=causal)


def _haar_frame(n: int, r: int, rng: np.random.Generator, batch: tuple[int, ...] = ()) -> Matrix:
    """Orthonormal columns (*batch, n, r) in a uniform position: thin QR with the signs of R moved into Q."""
    q, triangle = np.linalg.qr(rng.standard_normal((*batch, n, r)))
    signs = np.where(np.diagonal(triangle, axis1=-2, axis2=-1) < 0, -1.0, 1.0)
    return np.asarray(q * signs[..., None, :])


def _sizes(n: int, d: int, d_v: int | None, heads: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    if not isinstance(heads, tuple):
        raise TypeError(f"heads must be a tuple of leading axes such as (8,), got {heads!r}")
    sizes = (*(_whole("heads", h) for h in heads), _whole("n", n), _whole("d", d))
    return sizes, sizes[-1] if d_v is None else _whole("d_v", d_v)


def _smaller(d_out: int, d_in: int) -> int:
    return min(_whole("d_out", d_out), _whole("d_in", d_in))


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")
    return int(value)


def _at_least_zero(name: str, value: float) -> float:
    if not (np.ndim(value) == 0 and np.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be one finite number >= 0, got {value!r}")
    return float(value)


def _spectrum(values: ArrayLike) -> Matrix:
    s = np.asarray(values, dtype=np.float64)
    if s.ndim != 1 or s.size == 0:
        raise ValueError(f"singular_values must be a list of at least one number, got shape {s.shape}")
    if not bool(np.all(np.isfinite(s) & (s >= 0))):
        raise ValueError(f"singular_values must be finite and >= 0, got values between {s.min()!r} and {s.max()!r}")
    return s


def _floating(dtype: DTypeLike) -> np.dtype[Any]:
    kind = np.dtype(dtype)
    if kind.kind != "f":
        raise TypeError(f"dtype must be floating, such as numpy.float32, got {kind}")
    return kind
