"""The array-API namespace of counted arrays: the functions of ``array_api_compat.numpy``, each with what it counts as.

A function that is not here raises an ``AttributeError`` that says so: nothing is done uncounted by oversight.
"""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.arithmetic import factorisations
from nla_llm.arithmetic.counted import (
    ELEMENTWISE,
    CountedArray,
    base,
    counted,
    elementwise,
    is_floating,
    live_of,
    matmul,
    move,
    plain,
    reduction,
)
from nla_llm.arithmetic.tally import record

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["NAMESPACE", "CountingNamespace"]

_REDUCTIONS = {
    **dict.fromkeys(["sum"], "add"),
    **dict.fromkeys(["prod"], "mul"),
    **dict.fromkeys(["max", "min", "argmax", "argmin"], "compare"),
    **dict.fromkeys(["any", "all", "count_nonzero"], None),
}
_MOVES = {
    "reshape", "broadcast_to", "permute_dims", "moveaxis", "matrix_transpose", "expand_dims", "squeeze", "flip", "roll",
    "repeat", "tile",
}  # fmt: skip
_CREATIONS = {
    "zeros", "ones", "full", "empty", "eye", "arange", "linspace", "zeros_like", "ones_like", "full_like", "empty_like",
}  # fmt: skip
_TRIANGLES = {"tril", "triu"}
_CONSTANTS = {
    "inf", "nan", "pi", "e", "newaxis", "iinfo", "isdtype", "bool", "int8", "int16", "int32", "int64", "uint8",
    "uint16", "uint32", "uint64", "float32", "float64", "complex64", "complex128", "__array_namespace_info__",
}  # fmt: skip


class CountingNamespace:
    """What ``namespace(x)`` is for a counted array; its functions have the names and meanings of the standard.

    Examples
    --------
    >>> from nla_llm.arithmetic import tally
    >>> xp = counted(np.zeros(1)).__array_namespace__()
    >>> with tally() as t:
    ...     y = xp.sum(xp.exp(xp.zeros((3, 4))), axis=-1)
    >>> t.exp, t.add
    (12, 9)
    """

    __name__ = "nla_llm.arithmetic.namespace"

    def __getattr__(self, name: str) -> Any:
        if name in ELEMENTWISE:
            return partial(elementwise, name)
        if name in _REDUCTIONS:
            return partial(_reduce, name)
        if name in _MOVES:
            return partial(_move, name)
        if name in _CREATIONS:
            return partial(_create, name)
        if name in _TRIANGLES:
            return partial(_triangle, name)
        if name in _CONSTANTS:
            return getattr(base, name)
        raise AttributeError(
            f"counted arrays have no function {name!r}; nla_llm/arithmetic/namespace.py has to say what it counts as"
        )

    # -- products --------------------------------------------------------------------------------------------------

    def matmul(self, x1: CountedArray, x2: CountedArray, /) -> CountedArray:
        """Matrix product."""
        return matmul(x1, x2)

    def matmul_where(self, a: CountedArray, b: CountedArray, keep: CountedArray, fill: float = 0.0) -> CountedArray:
        """``a @ b`` where ``keep`` is True, dead entries of the value ``fill`` elsewhere."""
        product = matmul(a, b, keep.array)
        values = np.where(keep.array, product.array, np.asarray(fill, dtype=product.dtype))
        return CountedArray(values, product.live)

    def vecdot(self, x1: CountedArray, x2: CountedArray, /, *, axis: int = -1) -> CountedArray:
        """Inner products along one axis: a multiply-add for each pair of live entries."""
        result = np.asarray(base.vecdot(x1.array, x2.array, axis=axis))
        pairs = np.broadcast_to(x1.live_mask() & x2.live_mask(), np.broadcast_shapes(x1.shape, x2.shape))
        record("madd", np.count_nonzero(pairs))
        return CountedArray(result, np.asarray(pairs.any(axis=axis)))

    # -- reductions that are more than one class -------------------------------------------------------------------

    def mean(self, x: CountedArray, /, *, axis: Any = None, keepdims: bool = False) -> CountedArray:
        """A sum and a division."""
        result = reduction(base.mean, "add", x, axis=axis, keepdims=keepdims)
        record("div", result.size)
        return result

    def cumulative_sum(self, x: CountedArray, /, *, axis: int | None = None, **options: Any) -> CountedArray:
        """Running sums along one axis: L − 1 additions for L live entries; before the first there is nothing."""
        axis = 0 if axis is None else axis
        result = np.asarray(base.cumulative_sum(x.array, axis=axis, **options))
        terms = np.cumsum(x.live_mask(), axis=axis)
        if is_floating(x.array):
            record("add", np.count_nonzero(x.live_mask() & (terms > 1)))
        return CountedArray(result, terms > 0)

    def clip(self, x: CountedArray, /, min: Any = None, max: Any = None) -> CountedArray:  # noqa: A002 - the standard's names
        """A comparison for each bound."""
        for name, bound in (("maximum", min), ("minimum", max)):
            if bound is not None:
                x = elementwise(name, x, bound)
        return x

    # -- order -----------------------------------------------------------------------------------------------------

    def sort(self, x: CountedArray, /, **options: Any) -> CountedArray:
        """Sorted along one axis: the comparisons of merge sort."""
        return _sort(base.sort, x, **options)

    def argsort(self, x: CountedArray, /, **options: Any) -> CountedArray:
        """Indices that sort: the comparisons of merge sort."""
        return _sort(base.argsort, x, **options)

    def searchsorted(self, x1: CountedArray, x2: CountedArray, /, *, side: Any = "left") -> CountedArray:
        """Places of entries among sorted numbers: the comparisons of a bisection, ⌈lg(n + 1)⌉ for each entry."""
        if is_floating(x2.array):
            record("compare", x2.size * x1.size.bit_length())
        return counted(base.searchsorted(x1.array, x2.array, side=side))

    # -- moving ----------------------------------------------------------------------------------------------------

    def concat(self, arrays: Any, /, *, axis: int | None = 0) -> CountedArray:
        """Joined along an axis."""
        return move(lambda *a: base.concat(a, axis=axis), *arrays)

    def stack(self, arrays: Any, /, *, axis: int = 0) -> CountedArray:
        """Joined along a new axis."""
        return move(lambda *a: base.stack(a, axis=axis), *arrays)

    def broadcast_arrays(self, *arrays: CountedArray) -> list[CountedArray]:
        """All of the same shape."""
        shape = np.broadcast_shapes(*(x.shape for x in arrays))
        return [self.broadcast_to(x, shape) for x in arrays]

    def take(self, x: CountedArray, indices: CountedArray, /, *, axis: int | None = None) -> CountedArray:
        """Entries at given places of an axis."""
        return move(lambda a: base.take(a, indices.array, axis=axis), x)

    def take_along_axis(self, x: CountedArray, indices: CountedArray, /, *, axis: int = -1) -> CountedArray:
        """Entries at places that differ from row to row."""
        return move(lambda a: base.take_along_axis(a, indices.array, axis=axis), x)

    def where(self, condition: CountedArray, x1: Any, x2: Any, /) -> CountedArray:
        """A choice; the comparison that made the condition has been counted, and so has what is thrown away."""
        values = np.asarray(base.where(condition.array, plain(x1), plain(x2)))
        if live_of(x1) is None and live_of(x2) is None:
            return CountedArray(values)
        first, second = (np.asarray(True if live_of(x) is None else live_of(x)) for x in (x1, x2))
        return CountedArray(values, np.broadcast_to(np.where(condition.array, first, second), values.shape))

    def nonzero(self, x: CountedArray, /) -> tuple[CountedArray, ...]:
        """Places of the entries that are not zero."""
        return tuple(counted(i) for i in base.nonzero(x.array))

    def astype(self, x: CountedArray, dtype: Any, /, *, copy: bool = True, device: Any = None) -> CountedArray:
        """Another type of number."""
        return CountedArray(np.asarray(base.astype(x.array, dtype, copy=copy, device=device)), x.live)

    def asarray(self, x: Any, /, *, dtype: Any = None, device: Any = None, copy: bool | None = None) -> CountedArray:
        """A counted array of anything; what is counted already stays as live as it was."""
        values = base.asarray(plain(x), dtype=dtype, device=device, copy=copy)
        return CountedArray(values, live_of(x))

    # -- types -----------------------------------------------------------------------------------------------------

    def result_type(self, *operands: Any) -> Any:
        """Type that the operands promote to."""
        return base.result_type(*(plain(x) for x in operands))

    def finfo(self, type: Any, /) -> Any:  # noqa: A002 - the standard's name
        """Limits of a floating type."""
        return base.finfo(plain(type))

    def can_cast(self, from_: Any, to: Any, /) -> bool:
        """Whether a type promotes to another."""
        return bool(base.can_cast(plain(from_), to))

    @property
    def linalg(self) -> SimpleNamespace:
        """The functions of the standard's ``linalg`` that are counted."""
        return _LINALG


def _reduce(name: str, x: CountedArray, /, *, axis: Any = None, keepdims: bool = False, **options: Any) -> CountedArray:
    return reduction(getattr(base, name), _REDUCTIONS[name], x, axis=axis, keepdims=keepdims, **options)


def _move(name: str, x: CountedArray, /, *args: Any, **options: Any) -> CountedArray:
    function = getattr(base, name)
    return move(lambda a: function(a, *args, **options), x)


def _create(name: str, *args: Any, **options: Any) -> CountedArray:
    return counted(getattr(base, name)(*(plain(a) for a in args), **options))


def _triangle(name: str, x: CountedArray, /, *, k: int = 0) -> CountedArray:
    function = getattr(base, name)
    return CountedArray(np.asarray(function(x.array, k=k)), function(x.live_mask(), k=k))


def _sort(function: Callable[..., Any], x: CountedArray, *, axis: int = -1, **options: Any) -> CountedArray:
    length = x.shape[axis]
    if is_floating(x.array):
        record("compare", (x.size // length) * factorisations.merge_sort(length))
    return counted(function(x.array, axis=axis, **options))


# -- linear algebra ------------------------------------------------------------------------------------------------


def _factorisation(function: Callable[..., Any], madds: Callable[[int, int], int]) -> Callable[..., Any]:
    def call(x: CountedArray, /, **options: Any) -> Any:
        long, short = max(x.shape[-2:]), min(x.shape[-2:])
        record("madd", math.prod(x.shape[:-2]) * madds(long, short))
        result = function(x.array, **options)
        if isinstance(result, np.ndarray):
            return counted(result)
        return type(result)(*(counted(factor) for factor in result))

    return call


def _solve(a: CountedArray, b: CountedArray, /) -> CountedArray:
    result = np.asarray(base.linalg.solve(a.array, b.array))
    record("madd", math.prod(result.shape[:-2]) * factorisations.solve(a.shape[-1], b.shape[-1]))
    return counted(result)


def _vector_norm(x: CountedArray, /, *, axis: Any = None, keepdims: bool = False, ord: float = 2) -> CountedArray:  # noqa: A002
    result = np.asarray(base.linalg.vector_norm(x.array, axis=axis, keepdims=keepdims, ord=ord))
    if ord == 2:
        record("madd", x.size)
        record("sqrt", result.size)
    elif ord in {1, math.inf, -math.inf}:
        record("add" if ord == 1 else "compare", x.size - result.size)
    else:
        raise NotImplementedError(f"vector_norm of counted arrays knows ord=1, 2, inf and -inf, got {ord!r}")
    return counted(result)


def _diagonal(x: CountedArray, /, *, offset: int = 0) -> CountedArray:
    return move(lambda a: base.linalg.diagonal(a, offset=offset), x)


NAMESPACE = CountingNamespace()
_LINALG = SimpleNamespace(
    qr=_factorisation(base.linalg.qr, factorisations.qr),
    svd=_factorisation(base.linalg.svd, factorisations.svd),
    svdvals=_factorisation(base.linalg.svdvals, factorisations.svdvals),
    eigh=_factorisation(base.linalg.eigh, lambda order, _: factorisations.eigh(order)),
    solve=_solve,
    vector_norm=_vector_norm,
    diagonal=_diagonal,
    matmul=NAMESPACE.matmul,
    vecdot=NAMESPACE.vecdot,
    matrix_transpose=partial(_move, "matrix_transpose"),
)
