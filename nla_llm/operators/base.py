"""The operator: what every method returns and the only thing that a measure knows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, final

from nla_llm.backend import Array, from_numpy, is_array, matmul, namespace, to_numpy

if TYPE_CHECKING:
    from collections.abc import Callable

    from scipy.sparse.linalg import LinearOperator

__all__ = ["Dense", "Operator", "Product", "Scaled", "Sum", "Transpose"]


class Operator(ABC):
    """Linear operator (..., n_q, n_k) with batched leading axes.

    Laws, tested for every class: ``op.dense() @ x == op @ x``; ``(op.T @ y)·x == y·(op @ x)``;
    ``op.rows(i, j) == op.dense()[..., i:j, :]``; sums, products and scalings agree with those of dense matrices.

    A subclass sets ``shape``, ``dtype`` and ``xp`` through ``__init__`` and gives ``apply`` and ``apply_transpose``.
    """

    __array_ufunc__ = None  # makes ``ndarray @ op`` come to __rmatmul__ instead of to NumPy
    nonnegative: bool = False  # True only when every entry is certainly >= 0

    def __init__(self, shape: tuple[int, ...], like: Array) -> None:
        self.shape = tuple(int(s) for s in shape)
        self.like = like  # an array of the library, device and dtype of the operator
        self.dtype = like.dtype
        self.xp = namespace(like)

    @abstractmethod
    def apply(self, x: Array) -> Array:
        """``A x`` for x (..., n_k, c)."""

    @abstractmethod
    def apply_transpose(self, y: Array) -> Array:
        """``Aᵀ y`` for y (..., n_q, c)."""

    # -- what follows from these two -------------------------------------------------------------------------------

    @property
    def ndim(self) -> int:
        """Number of axes, batch axes included."""
        return len(self.shape)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading axes: batch, heads."""
        return self.shape[:-2]

    @property
    def T(self) -> Operator:  # noqa: N802 - the name that arrays use
        """Transpose of the last two axes."""
        return Transpose(self)

    def rows(self, start: int, stop: int) -> Array:
        """Dense rows ``start:stop``, an array (..., stop − start, n_k)."""
        n = self.shape[-2]
        stop = min(stop, n)
        unit = self.xp.eye(n, stop - start, k=-start, dtype=self.dtype, device=getattr(self.like, "device", None))
        return self.xp.matrix_transpose(self.apply_transpose(unit))

    def dense(self) -> Array:
        """The matrix itself, an array of shape ``self.shape``: for small ones and for tests."""
        return self.rows(0, self.shape[-2])

    def row_sums(self) -> Array:
        """Row sums ``A 1``, an array (..., n_q)."""
        return self.apply(self._ones(self.shape[-1]))[..., 0]

    def _ones(self, n: int) -> Array:
        return self.xp.ones((n, 1), dtype=self.dtype, device=getattr(self.like, "device", None))

    def to_scipy(self) -> LinearOperator:
        """The same operator as a ``scipy.sparse.linalg.LinearOperator``.

        Raises
        ------
        ValueError
            If the operator has batch axes, which SciPy does not know.
        """
        from scipy.sparse.linalg import LinearOperator  # noqa: PLC0415 - SciPy loads only where it is asked for

        if self.ndim != 2:
            raise ValueError(f"to_scipy() needs an operator without batch axes, this one has shape {self.shape}")

        def through(apply: Any) -> Any:
            def call(x: Any) -> Any:
                columns = x[:, None] if x.ndim == 1 else x
                y = to_numpy(apply(from_numpy(columns, like=self.like, dtype=self.dtype)))
                return y[:, 0] if x.ndim == 1 else y

            return call

        forward, adjoint = through(self.apply), through(self.apply_transpose)
        return LinearOperator(
            shape=self.shape,
            dtype=to_numpy(self.like).dtype,
            matvec=forward,
            rmatvec=adjoint,
            matmat=forward,
            rmatmat=adjoint,
        )

    def map(self, function: Callable[[Array], Array]) -> Operator:  # noqa: ARG002 - for those that override it
        """The same operator with ``function`` (another dtype, another library) applied to every array that it holds.

        Raises
        ------
        TypeError
            If the operator keeps its arrays to itself.
        """
        raise TypeError(f"the arrays behind {self!r} cannot be changed; make it anew in the dtype or library wanted")

    # -- algebra ---------------------------------------------------------------------------------------------------

    def __matmul__(self, other: Any) -> Any:
        if isinstance(other, Operator):
            return Product(self, other)
        if not is_array(other):
            return NotImplemented
        vector = other.ndim == 1
        x = other[:, None] if vector else other
        if x.shape[-2] != self.shape[-1]:
            raise ValueError(f"operator of shape {self.shape} cannot be applied to an array of shape {other.shape}")
        y = self.apply(x)
        return y[..., 0] if vector else y

    def __rmatmul__(self, other: Any) -> Any:
        if not is_array(other):
            return NotImplemented
        if other.ndim == 1:
            return self.T @ other
        return self.xp.matrix_transpose(self.T @ self.xp.matrix_transpose(other))

    def __add__(self, other: Any) -> Operator:
        return Sum(self, other) if isinstance(other, Operator) else NotImplemented

    def __sub__(self, other: Any) -> Operator:
        return Sum(self, Scaled(-1.0, other)) if isinstance(other, Operator) else NotImplemented

    def __neg__(self) -> Operator:
        return Scaled(-1.0, self)

    def __mul__(self, factor: Any) -> Operator:
        if isinstance(factor, Operator):
            raise TypeError("* is multiplication by a scalar; write A @ B for the product of two operators")
        return Scaled(factor, self)

    __rmul__ = __mul__

    def __truediv__(self, factor: Any) -> Operator:
        return Scaled(1.0 / factor, self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self.shape}"


@final
class Dense(Operator):
    """A matrix held as an array (..., n_q, n_k).

    Examples
    --------
    >>> import numpy as np
    >>> op = Dense(np.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> (op.T @ np.ones(2)).tolist()
    [4.0, 6.0]
    """

    def __init__(self, matrix: Array, *, nonnegative: bool = False) -> None:
        super().__init__(matrix.shape, matrix)
        self.matrix = matrix
        self.nonnegative = nonnegative

    def apply(self, x: Array) -> Array:
        return matmul(self.matrix, x)

    def apply_transpose(self, y: Array) -> Array:
        return matmul(self.xp.matrix_transpose(self.matrix), y)

    def rows(self, start: int, stop: int) -> Array:
        return self.matrix[..., start:stop, :]

    def map(self, function: Callable[[Array], Array]) -> Operator:
        return Dense(function(self.matrix), nonnegative=self.nonnegative)


@final
class Transpose(Operator):
    """Aᵀ, the last two axes exchanged."""

    def __init__(self, op: Operator) -> None:
        super().__init__((*op.batch_shape, op.shape[-1], op.shape[-2]), op.like)
        self.op = op
        self.nonnegative = op.nonnegative

    @property
    def T(self) -> Operator:  # noqa: N802
        return self.op

    def apply(self, x: Array) -> Array:
        return self.op.apply_transpose(x)

    def apply_transpose(self, y: Array) -> Array:
        return self.op.apply(y)

    def dense(self) -> Array:
        return self.xp.matrix_transpose(self.op.dense())

    def map(self, function: Callable[[Array], Array]) -> Operator:
        return self.op.map(function).T


@final
class Scaled(Operator):
    """c A for a scalar c, or an array c that broadcasts against the batch axes."""

    def __init__(self, factor: Any, op: Operator) -> None:
        super().__init__(op.shape, op.like)
        if is_array(factor) and factor.ndim:
            factor = factor[..., None, None]
            batch = namespace(factor).broadcast_to(factor, (*op.batch_shape, 1, 1)) if op.batch_shape else factor
            self.shape = (*batch.shape[:-2], *op.shape[-2:])
        else:
            factor = float(factor)
            self.nonnegative = op.nonnegative and factor >= 0
        self.factor = factor
        self.op = op

    def apply(self, x: Array) -> Array:
        return self.factor * self.op.apply(x)

    def apply_transpose(self, y: Array) -> Array:
        return self.factor * self.op.apply_transpose(y)

    def rows(self, start: int, stop: int) -> Array:
        return self.factor * self.op.rows(start, stop)

    def map(self, function: Callable[[Array], Array]) -> Operator:
        factor = function(self.factor[..., 0, 0]) if is_array(self.factor) else self.factor
        return Scaled(factor, self.op.map(function))


@final
class Sum(Operator):
    """A + B, with batch axes broadcast."""

    def __init__(self, a: Operator, b: Operator) -> None:
        if a.shape[-2:] != b.shape[-2:]:
            raise ValueError(f"operators of shapes {a.shape} and {b.shape} cannot be added")
        self.terms = (a, b)
        super().__init__(_joint_shape(a, b, *a.shape[-2:]), _wider(a, b))
        self.nonnegative = a.nonnegative and b.nonnegative

    def apply(self, x: Array) -> Array:
        a, b = self.terms
        return a.apply(x) + b.apply(x)

    def apply_transpose(self, y: Array) -> Array:
        a, b = self.terms
        return a.apply_transpose(y) + b.apply_transpose(y)

    def rows(self, start: int, stop: int) -> Array:
        a, b = self.terms
        return a.rows(start, stop) + b.rows(start, stop)

    def map(self, function: Callable[[Array], Array]) -> Operator:
        return Sum(*(term.map(function) for term in self.terms))


@final
class Product(Operator):
    """A B, applied from the right, never formed."""

    def __init__(self, a: Operator, b: Operator) -> None:
        if a.shape[-1] != b.shape[-2]:
            raise ValueError(f"operators of shapes {a.shape} and {b.shape} cannot be multiplied")
        self.factors = (a, b)
        super().__init__(_joint_shape(a, b, a.shape[-2], b.shape[-1]), _wider(a, b))
        self.nonnegative = a.nonnegative and b.nonnegative

    def apply(self, x: Array) -> Array:
        a, b = self.factors
        return a.apply(b.apply(x))

    def apply_transpose(self, y: Array) -> Array:
        a, b = self.factors
        return b.apply_transpose(a.apply_transpose(y))

    def rows(self, start: int, stop: int) -> Array:
        a, b = self.factors
        block = self.xp.matrix_transpose(a.rows(start, stop))
        return self.xp.matrix_transpose(b.apply_transpose(block))

    def map(self, function: Callable[[Array], Array]) -> Operator:
        return Product(*(factor.map(function) for factor in self.factors))


def _joint_shape(a: Operator, b: Operator, rows: int, columns: int) -> tuple[int, ...]:
    """Batch axes of ``a`` and ``b`` broadcast, then (rows, columns)."""
    batch: list[int] = []
    for i in range(1, max(len(a.batch_shape), len(b.batch_shape)) + 1):
        s = a.batch_shape[-i] if i <= len(a.batch_shape) else 1
        t = b.batch_shape[-i] if i <= len(b.batch_shape) else 1
        if s != t and 1 not in {s, t}:
            raise ValueError(f"batch axes of operators of shapes {a.shape} and {b.shape} do not broadcast")
        batch.append(t if s == 1 else s)
    return (*reversed(batch), rows, columns)


def _wider(a: Operator, b: Operator) -> Array:
    """The ``like`` of whichever operator has the wider dtype."""
    return a.like if a.xp.result_type(a.dtype, b.dtype) == a.dtype else b.like
