"""Block Krylov spaces of AᵀA, the kernel of the spectral norm and of the truncated SVD."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import Array, namespace, on_one_thread, to_numpy
from nla_llm.linalg.basis import extend_basis, gaussian, orthonormalise, widen, working

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators import Operator

_EXPONENTS = 200, 1000  # powers of two up to which float64 holds fourth powers of norms, and up to which it scales
_NARROW_EXPONENTS = 24, 120  # those of float32

__all__ = ["BlockKrylov", "apply_as", "apply_widened"]


class BlockKrylov:
    """The space span{X, AᵀA X, …, (AᵀA)^{k−1} X}, grown one block at a time, full reorthogonalisation.

    Laws: the columns of ``basis`` are orthonormal; ``image == A @ basis``; ``gram == imageᵀ image``, so its
    eigenvalues are the squared Ritz values, never above the squared singular values of A; after ``pull_back``,
    ``AᵀA basis`` lies in the span of ``basis`` and of the next block. All batch elements go in lockstep.

    Basis and image are in the precision of ``start``, in which A is multiplied; ``gram`` is summed in float64, so that
    squaring costs no digits beyond those of the products.

    Parameters
    ----------
    op : Operator (..., n_q, n_k)
    start : array (..., n_k, b)
        First block; its batch axes are those of ``op``.
    rng : numpy.random.Generator
        Source of fresh columns after a breakdown.
    rider : array (..., n_k, c), optional
        Columns that go through plain power iteration on AᵀA beside the block. They share its products with A, which
        for exact attention cost the same for one column as for ten.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.operators import Dense
    >>> op, rng = Dense(np.diag([3.0, 2.0, 1.0, 0.5])), np.random.default_rng(0)
    >>> space = BlockKrylov(op, rng.standard_normal((4, 2)), rng=rng)
    >>> space.advance(); space.advance()
    >>> space.ritz_values().round(6).tolist()
    [3.0, 2.0, 1.0, 0.5]
    """

    def __init__(self, op: Operator, start: Array, *, rng: np.random.Generator, rider: Array | None = None) -> None:
        self.op = op
        self.steps = 0
        self.basis: Array = None
        self.image: Array = None
        self.gram: Array = None
        self.rider = rider
        self.rider_image: Array = None
        self.rider_pulled: Array = None  # AᵀA rider
        self._rng = rng
        self._width = int(start.shape[-1])
        self._new = orthonormalise(working(start))
        self._new_image: Array = None
        self._pulled: Array = None  # AᵀA of the newest block
        self._coupling: Array = None

    @property
    def size(self) -> int:
        """Dimension of the space so far."""
        return 0 if self.basis is None else int(self.basis.shape[-1])

    @property
    def complete(self) -> bool:
        """Whether the space is all of R^{n_k}: every Ritz value is then a singular value."""
        return self.size == self.op.shape[-1]

    def advance(self) -> None:
        """Add the next block: one product with A, and one with Aᵀ unless ``pull_back`` has made it.

        Raises
        ------
        ValueError
            If the space is complete, or a product is not finite.
        """
        if self.complete:
            raise ValueError(f"the Krylov space already is all of R^{self.size}; check `complete` before advance()")
        if self.basis is not None:
            self.pull_back()
        stacked = self._with_rider(self._new, self.rider)
        image = apply_as(self.op, stacked)
        self._new_image, self.rider_image = self._split(image, int(self._new.shape[-1]))
        self._append()
        self._pulled = self.rider_pulled = None
        self.steps += 1

    def pull_back(self) -> None:
        """Multiply the newest image by Aᵀ and prepare the next block; does nothing when that is done already."""
        if self._pulled is not None:
            return
        width = int(self._new_image.shape[-1])
        pulled = apply_as(self.op.T, self._with_rider(self._new_image, self.rider_image))
        self._pulled, self.rider_pulled = self._split(pulled, width)
        room = self.op.shape[-1] - self.size
        self._coupling = None
        if room == 0:
            return
        columns = min(width, room)
        # with too little room the block is cut: the new columns then complete the space whatever they are
        self._new, residual = extend_basis(self.basis, self._pulled[..., :columns], self._rng)
        self._coupling = residual if columns == width else None

    def next_rider(self, rider: Array) -> None:
        """Set the columns that ride along in the next step."""
        self.rider = rider

    def coupling(self) -> NDArray[Any]:
        """``(I − VVᵀ) AᵀA V`` in coordinates: an array (..., c, b) that acts on the last b coordinates of V."""
        self.pull_back()
        if self.complete:
            return np.zeros((*self.op.batch_shape, 1, int(self._new_image.shape[-1])))
        if self._coupling is None:
            self._coupling = namespace(self._new).matrix_transpose(self._new) @ self._pulled
        return to_numpy(self._coupling)

    def exponent(self) -> int:
        """Power of two of the image where AᵀA, or a square of it, may leave the numbers of the dtype; else 0.

        Results are wrong then, without a sign of it: scale the operator by that power and start anew.
        """
        largest = float(np.max(np.abs(to_numpy(self.image))))
        digits, most = _EXPONENTS if self.op.dtype == self.op.xp.float64 else _NARROW_EXPONENTS
        if largest == 0 or (power := abs(round(math.log2(largest)))) <= digits:
            return 0
        return int(math.copysign(min(power, most), math.log2(largest)))

    def outside(self) -> tuple[NDArray[Any], Array]:
        """A lower bound of ``‖A (I − VVᵀ)‖₂``, and the directions (..., n_k, c) outside the space on which it rests.

        One power step from random columns orthogonal to the basis: it finds what no Krylov space of this block can
        reach, singular values that are repeated more often than the block has columns.
        """
        columns = min(self._width, self.op.shape[-1] - self.size)
        start = gaussian((*self.basis.shape[:-1], columns), self._rng, like=self.basis, dtype=self.basis.dtype)
        start = extend_basis(self.basis, start, self._rng)[0]
        pulled = apply_as(self.op.T, apply_as(self.op, start))
        directions = extend_basis(self.basis, pulled, self._rng)[0]
        found = namespace(start).linalg.svdvals(apply_as(self.op, directions))[..., 0]
        return np.asarray(to_numpy(found), dtype=np.float64), directions

    def join(self, directions: Array) -> None:
        """Let the next block, and all that follow, hold these orthonormal columns (..., n_k, c) too."""
        self.pull_back()
        xp, width = namespace(self._pulled), int(self._pulled.shape[-1])
        room = self.op.shape[-1] - self.size
        # as long as the longest of the others, beside which they would pass for rounding
        length = xp.max(xp.linalg.vector_norm(self._pulled, axis=-2), axis=-1)[..., None, None]
        wider = xp.concat([self._pulled, length * directions], axis=-1)[..., :room]
        self._new, residual = extend_basis(self.basis, wider, self._rng)
        self._coupling = residual[..., :width] if room >= width else None

    @on_one_thread
    def ritz(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Squared Ritz values, descending (..., size), and their coordinates in ``basis`` (..., size, size)."""
        squares, vectors = np.linalg.eigh(to_numpy(self.gram))
        return np.maximum(squares[..., ::-1], 0.0), vectors[..., ::-1]

    def ritz_values(self) -> NDArray[Any]:
        """Ritz values, descending (..., size): lower bounds of the singular values of A, up to rounding."""
        values: NDArray[Any] = np.sqrt(self.ritz()[0])
        return values

    @on_one_thread
    def _append(self) -> None:
        xp, fresh = namespace(self._new), widen(self._new_image)
        corner = xp.matrix_transpose(fresh) @ fresh
        if not bool(xp.all(xp.isfinite(corner))):
            raise ValueError(
                f"a product with {self.op!r} is not finite: the operator holds NaN or infinity, or overflows"
            )
        if self.basis is None:
            self.basis, self.image, self.gram = self._new, self._new_image, corner
            return
        cross = xp.matrix_transpose(widen(self.image)) @ fresh
        top = xp.concat([self.gram, cross], axis=-1)
        bottom = xp.concat([xp.matrix_transpose(cross), corner], axis=-1)
        self.gram = xp.concat([top, bottom], axis=-2)
        self.basis = xp.concat([self.basis, self._new], axis=-1)
        self.image = xp.concat([self.image, self._new_image], axis=-1)

    @staticmethod
    def _with_rider(block: Array, rider: Array | None) -> Array:
        return block if rider is None else namespace(block).concat([block, rider], axis=-1)

    def _split(self, product: Array, width: int) -> tuple[Array, Array]:
        return product[..., :width], None if self.rider is None else product[..., width:]


def apply_as(op: Operator, x: Array) -> Array:
    """``A x`` in the dtype of x whatever that of the operator, in which it is multiplied."""
    if x.dtype == op.dtype:
        return op @ x
    xp = namespace(x)
    return xp.astype(op @ xp.astype(x, op.dtype), x.dtype)


def apply_widened(op: Operator, x: Array) -> Array:
    """``A x`` in float64 whatever the dtype of the operator; x is rounded to that dtype first."""
    xp = namespace(x)
    return widen(op @ (x if x.dtype == op.dtype else xp.astype(x, op.dtype)))
