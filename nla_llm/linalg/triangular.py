"""The triangular factor of a tall matrix that arrives block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nla_llm.backend import Array, namespace
from nla_llm.linalg.basis import widen

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["triangular_factor"]


def triangular_factor(blocks: Iterable[Array]) -> Array:
    """R (min(samples, n), n) with RᵀR = XᵀX for the rows X of all blocks, by successive QR; X may be rank deficient.

    The Gram matrix XᵀX, whose condition is the square of that of X, is never made. Memory is that of one block and of
    R, whatever the number of blocks.

    Parameters
    ----------
    blocks
        Arrays (..., samples, n), n the same in all; a generator will do.

    Returns
    -------
    array (..., at most n, n), float64

    Raises
    ------
    ValueError
        If there is no block.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((50, 3))
    >>> r = triangular_factor(x[i : i + 10] for i in range(0, 50, 10))
    >>> r.shape, bool(np.allclose(r.T @ r, x.T @ x))
    ((3, 3), True)
    """
    r: Array = None
    for given in blocks:
        block = widen(given)
        xp = namespace(block)
        stacked = block if r is None else xp.concat([r, block], axis=-2)
        r = stacked if stacked.shape[-2] <= stacked.shape[-1] else xp.linalg.qr(stacked)[1]
    if r is None:
        raise ValueError("blocks is empty: there is no input to calibrate with; pass arrays (samples, d_in)")
    return r
