"""Quantisers: matrices whose entries are codes of a few bits, with a scale for each block of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, final

import numpy as np

from nla_llm.backend import Array, from_numpy, is_real_floating, namespace

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Quantised", "Quantiser", "integer_levels", "normal_float_levels", "quantiser"]

SCALE_BITS = 32  # a scale is a float32 number, as in bitsandbytes and GGML
NESTED = 256  # scales in a block of scales (Dettmers et al. 2023, section 3)
_SMALLEST, _LARGEST = (float(x) for x in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
_FORMAT = re.compile(r"(nf|int)([2-8])(|_affine|_double)")


class Quantised(NamedTuple):
    """A quantised matrix.

    Attributes
    ----------
    matrix : array (..., rows, columns)
        What the codes stand for: level[code] · scale, plus the offset where there is one.
    codes : array (..., rows, columns) of integers
    scales : array (..., blocks)
    offsets : array (..., blocks), or None
    """

    matrix: Array
    codes: Array
    scales: Array
    offsets: Array | None


@final
@dataclass(frozen=True)
class Quantiser:
    """Blocks of entries divided by a scale and rounded to the nearest of a few levels.

    A matrix is cut, row after row, into blocks of ``block`` entries, the last one perhaps shorter; the scale of a block
    is its largest modulus. An affine quantiser takes the least entry off first, and its scale is the range. Scales and
    offsets are rounded to float32.

    Laws: no entry is off by more than half the widest gap between levels times the scale, and rounding; where −1 and 1
    are among the levels, quantising the result again gives the same codes and the same numbers, to the last bit
    (to rounding for an affine quantiser). With ``nested`` the scales are quantised themselves, to 8 bits: an entry
    beyond its scale so rounded is cut there, and quantising again need not give the same, as another entry may then be
    the largest.

    Parameters
    ----------
    levels
        Ascending numbers between −1 and 1; between 0 and 1, both of them included, for an affine quantiser.
    bits
        Of a code.
    block
        Entries in a block, or None for a block to each row.
    affine
        Whether the least entry of each block is stored.
    nested
        Whether the scales are quantised, in blocks of 256 with one float32 scale each (double quantisation of Dettmers
        et al. 2023, arXiv 2305.14314, section 3; they take the mean of the scales off before and round to 8-bit
        floating point).

    Raises
    ------
    ValueError
        If the levels, bits and block do not fit one another.

    Examples
    --------
    >>> import numpy as np
    >>> ternary = Quantiser((-1.0, 0.0, 1.0), bits=2, block=2)
    >>> q = ternary(np.array([[0.4, -1.0], [0.6, 1.0]]))
    >>> q.matrix.tolist(), ternary.bits_per_entry((2, 2))
    ([[0.0, -1.0], [1.0, 1.0]], Fraction(18, 1))
    """

    levels: tuple[float, ...]
    bits: int
    block: int | None = 64
    affine: bool = False
    nested: bool = False

    def __post_init__(self) -> None:
        low = 0.0 if self.affine else -1.0
        ascending = all(a < b for a, b in pairwise(self.levels))
        if len(self.levels) < 2 or not ascending or not (low <= self.levels[0] and self.levels[-1] <= 1.0):
            raise ValueError(f"levels must be at least two ascending numbers between {low:g} and 1, got {self.levels}")
        if self.affine and (self.levels[0], self.levels[-1]) != (0.0, 1.0):
            raise ValueError(f"levels of an affine quantiser must begin with 0 and end with 1, got {self.levels}")
        if self.affine and self.nested:
            raise ValueError(
                "an affine quantiser cannot be nested: its offsets have no quantised form; drop one of them"
            )
        if len(self.levels) > 2**self.bits:
            raise ValueError(
                f"bits={self.bits} cannot number {len(self.levels)} levels; pass more bits or fewer levels"
            )
        whole = isinstance(self.block, int | np.integer) and not isinstance(self.block, bool)
        if self.block is not None and (not whole or self.block < 1):
            raise ValueError(f"block must be a whole number >= 1, or None for a block to each row, got {self.block!r}")

    def __call__(self, matrix: Array) -> Quantised:
        """Quantise a matrix (..., rows, columns), in its precision; in float32 where that is a half precision.

        Raises
        ------
        TypeError
            If it is not real and floating.
        ValueError
            If it has no entries, one that is not finite, or a block whose scale float32 cannot hold.
        """
        if not is_real_floating(matrix) or matrix.ndim < 2:
            raise TypeError(
                f"matrix must be real and floating, (..., rows, columns), got {matrix.dtype} {matrix.shape}"
            )
        if 0 in matrix.shape:
            raise ValueError(f"matrix has an empty axis, shape {tuple(matrix.shape)}; there is nothing to quantise")
        xp = namespace(matrix)
        if matrix.dtype not in (xp.float32, xp.float64):
            matrix = xp.astype(matrix, xp.float32 if matrix.dtype.itemsize <= 4 else xp.float64)
        batch, (rows, columns) = tuple(matrix.shape[:-2]), matrix.shape[-2:]
        x = _blocked(xp.reshape(matrix, (*batch, rows * columns)), self._block(rows, columns))
        scales, offsets = self._scales(x)
        if offsets is not None:
            x = x - offsets[..., None]
        codes = self._nearest(x / xp.where(scales > 0, scales, 1.0)[..., None])
        levels = xp.take(_constants(self.levels, matrix), xp.reshape(codes, (-1,)), axis=0)
        x = xp.reshape(levels, codes.shape) * scales[..., None]
        if offsets is not None:
            x = x + offsets[..., None]

        def unblocked(a: Array) -> Array:
            return xp.reshape(xp.reshape(a, (*batch, -1))[..., : rows * columns], matrix.shape)

        return Quantised(unblocked(x), unblocked(codes), scales, offsets)

    def _scales(self, x: Array) -> tuple[Array, Array | None]:
        """Scale of each block, and its least entry where that is stored."""
        xp = namespace(x)
        if self.affine:
            least = xp.min(x, axis=-1)
            return _stored(xp.max(x, axis=-1) - least), _stored(least)
        scales = _stored(xp.max(xp.abs(x), axis=-1))
        return _nested(scales) if self.nested else scales, None

    def bits_per_entry(self, shape: tuple[int, ...]) -> Fraction:
        """Bits that are stored for an entry of a matrix of this shape (batch axes do not matter), as an exact number.

        Examples
        --------
        >>> [float(quantiser(name).bits_per_entry((256, 256))) for name in ("nf4", "nf4_double", "int4_affine")]
        [4.5, 4.126953125, 5.0]
        """
        rows, columns = shape[-2:]
        blocks = _ceiling(rows * columns, self._block(rows, columns))
        words = SCALE_BITS * blocks * (2 if self.affine else 1)
        if self.nested:
            words = 8 * blocks + SCALE_BITS * _ceiling(blocks, NESTED)
        return self.bits + Fraction(words, rows * columns)

    def _block(self, rows: int, columns: int) -> int:
        return columns if self.block is None else min(int(self.block), rows * columns)

    def _nearest(self, x: Array) -> Array:
        """Number of the nearest level, of the lower one at a tie."""
        xp = namespace(x)
        middles = _constants([(a + b) / 2 for a, b in pairwise(self.levels)], x)
        return xp.searchsorted(middles, x)


def integer_levels(bits: int, *, affine: bool = False) -> tuple[float, ...]:
    """Equidistant levels: −m/m, …, m/m for m = 2^(bits−1) − 1; 0, …, 1 in steps of 1/(2^bits − 1) where affine.

    Examples
    --------
    >>> integer_levels(2), len(integer_levels(8)), integer_levels(2, affine=True)[1]
    ((-1.0, 0.0, 1.0), 255, 0.3333333333333333)
    """
    top = 2**bits - 1 if affine else 2 ** (bits - 1) - 1
    return tuple(k / top for k in range(0 if affine else -top, top + 1))


@cache
def normal_float_levels(bits: int = 4) -> tuple[float, ...]:
    """Levels of the data type NormalFloat: quantiles of the normal law, with 0 and ±1 among them.

    2^(bits−1) positive and 2^(bits−1) − 1 negative ones, at equal steps of probability from ½ up to 1 − δ, where
    δ = (1/2^(bits+1) + 1/(2^(bits+1) − 2))/2, divided by the largest (Dettmers et al. 2023, arXiv 2305.14314, section 3
    and appendix E, for 4 bits; bitsandbytes rounds 1 − δ to 0.9677083).

    Examples
    --------
    >>> [round(x, 4) for x in normal_float_levels(4)[6:10]]
    [-0.091, 0.0, 0.0796, 0.1609]
    """
    from scipy.special import ndtri  # noqa: PLC0415 - SciPy loads only where it is needed

    half = 2 ** (bits - 1)
    last = 1 - (1 / (4 * half) + 1 / (4 * half - 2)) / 2
    above, below = (ndtri(np.linspace(0.5, last, count + 1)[1:]) for count in (half, half - 1))
    levels = np.concatenate([-below[::-1], [0.0], above]) / above[-1]
    return tuple(levels.tolist())


def quantiser(name: str, block: int | None = 64) -> Quantiser:
    """The quantiser of a format: "nf4", "int8", …, with 2 to 8 bits, and "_affine" or "_double" behind.

    "nf" has the levels of :func:`normal_float_levels`, "int" equidistant ones; "_affine" stores the least entry of each
    block as well (as the format Q4_1 of GGML does), "_double" quantises the scales.

    Raises
    ------
    ValueError
        If there is no such format.

    Examples
    --------
    >>> quantiser("int4").levels[-1], quantiser("nf4_double").nested, quantiser("int8", block=None).bits
    (1.0, True, 8)
    """
    found = _FORMAT.fullmatch(name) if isinstance(name, str) else None
    if found is None or (found[1], found[3]) == ("nf", "_affine"):
        raise ValueError(
            f"format must be nf or int with 2 to 8 bits, perhaps with _double, or int with _affine, such as "
            f"'nf4', 'int8' or 'int4_affine', got {name!r}"
        )
    bits, affine = int(found[2]), found[3] == "_affine"
    levels = normal_float_levels(bits) if found[1] == "nf" else integer_levels(bits, affine=affine)
    return Quantiser(levels, bits, block, affine=affine, nested=found[3] == "_double")


def _blocked(flat: Array, block: int) -> Array:
    """Entries (..., size) as (..., blocks, block); the last block is filled up with its last entry."""
    xp, size = namespace(flat), flat.shape[-1]
    missing = -size % block
    if missing:
        last = xp.broadcast_to(flat[..., -1:], (*flat.shape[:-1], missing))
        flat = xp.concat([flat, last], axis=-1)
    return xp.reshape(flat, (*flat.shape[:-1], (size + missing) // block, block))


def _stored(numbers: Array) -> Array:
    """Scales or offsets as float32 holds them, refused where it cannot."""
    xp = namespace(numbers)
    size = xp.abs(numbers)
    if not bool(xp.all((size <= _LARGEST) & ((size >= _SMALLEST) | (size == 0)))):
        raise ValueError(
            f"matrix has entries that are not finite, or a block whose scale lies outside the {_SMALLEST:.3g} to "
            f"{_LARGEST:.3g} of float32, in which it is stored; scale the matrix"
        )
    return xp.astype(xp.astype(numbers, xp.float32), numbers.dtype)


def _nested(scales: Array) -> Array:
    """Scales (..., blocks) rounded to k/255 of the largest in each block of scales."""
    xp, count = namespace(scales), scales.shape[-1]
    x = _blocked(scales, min(NESTED, count))
    top = xp.max(x, axis=-1, keepdims=True)
    x = xp.round(x / xp.where(top > 0, top, 1.0) * 255) / 255 * top
    return xp.reshape(x, (*scales.shape[:-1], -1))[..., :count]


def _constants(numbers: Sequence[float], like: Array) -> Array:
    """Numbers as an array of the library, device and dtype of another."""
    return from_numpy(np.asarray(numbers), like=like, dtype=like.dtype)


def _ceiling(a: int, b: int) -> int:
    return -(-a // b)
