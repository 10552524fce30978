"""An array that counts: a NumPy array, and which of its entries are really there.

Every operation calls the function of the same name of ``array_api_compat.numpy`` and then records what it did, so the
values are those of the plain run to the last bit. What a function counts as stands in :mod:`nla_llm.costs.cost`.

Entries that a structure (causality, a window, a mask of keys) removes are *dead*: they hold a constant, 0 or −∞, that
nobody has to compute, and no operation on them counts. Only :func:`nla_llm.backend.matmul_where`, ``tril`` and ``triu``
make entries dead; elementwise functions, reductions and products hand it on. ``where`` does not: what it throws away
has been computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, final

import numpy as np
from array_api_compat import numpy as _compat

from nla_llm.arithmetic.tally import record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    Live = NDArray[np.bool_] | None

base: Any = _compat  # the functions that do the work; untyped

__all__ = ["ELEMENTWISE", "CountedArray", "base", "counted", "elementwise", "matmul", "move", "reduction"]

ELEMENTWISE: dict[str, str | None] = {
    **dict.fromkeys(["add", "subtract"], "add"),
    **dict.fromkeys(["multiply", "square"], "mul"),
    **dict.fromkeys(["divide", "reciprocal", "floor_divide", "remainder"], "div"),
    **dict.fromkeys(["exp", "expm1", "log", "log1p", "log2", "log10"], "exp"),
    **dict.fromkeys(["sin", "cos", "tan", "asin", "acos", "atan", "atan2"], "exp"),
    **dict.fromkeys(["sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "pow"], "exp"),
    **dict.fromkeys(["sqrt"], "sqrt"),
    **dict.fromkeys(["maximum", "minimum", "sign", "floor", "ceil", "round", "trunc"], "compare"),
    **dict.fromkeys(["equal", "not_equal", "less", "less_equal", "greater", "greater_equal"], "compare"),
    **dict.fromkeys(["isfinite", "isinf", "isnan"], "compare"),
    **dict.fromkeys(["abs", "negative", "positive", "copysign", "signbit"], None),  # a sign bit
    **dict.fromkeys(["logical_and", "logical_or", "logical_not", "logical_xor"], None),  # logic
    **dict.fromkeys(["bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_invert"], None),
}


@final
class CountedArray:
    """A NumPy array whose operations are tallied, with the operators and attributes of the array-API standard.

    Mixing it with a plain NumPy array is refused: half of the work would go uncounted.

    Attributes
    ----------
    array : ndarray
        The values.
    live : ndarray of bool, or None
        Entries that are really there; None where all are.

    Raises
    ------
    TypeError
        When it meets a plain array, or when NumPy tries to convert it.

    Examples
    --------
    >>> from nla_llm.arithmetic import tally
    >>> x = counted(np.array([1.0, 2.0]))
    >>> with tally() as t:
    ...     y = 2.0 * x + x
    >>> y.to_numpy().tolist(), t.mul, t.add
    ([3.0, 6.0], 2, 2)
    """

    __array_ufunc__ = None  # ndarray ∘ counted comes to the reflected operators here, which refuse it
    device = "cpu"

    def __init__(self, array: NDArray[Any], live: Live = None) -> None:
        self.array = array
        self.live = None if live is None or live.all() else live

    # -- what the standard asks of an array ------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        return self.array.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.array.ndim

    @property
    def size(self) -> int:
        """Number of entries, dead ones included."""
        return self.array.size

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the entries."""
        return self.array.dtype

    @property
    def mT(self) -> CountedArray:  # noqa: N802 - the name in the standard
        """Last two axes exchanged."""
        return move(base.matrix_transpose, self)

    @property
    def T(self) -> CountedArray:  # noqa: N802 - the name in the standard
        """Transpose of a matrix."""
        return self.mT

    def live_mask(self) -> NDArray[np.bool_]:
        """Liveness of every entry, written out."""
        return np.ones(self.shape, bool) if self.live is None else self.live

    def to_device(self, device: str, /, *, stream: Any = None) -> Self:  # noqa: ARG002 - the standard's signature
        """The array itself: there is one device."""
        if device != "cpu":
            raise ValueError(f"counted arrays live on the device 'cpu', got {device!r}")
        return self

    def __array_namespace__(self, *, api_version: str | None = None) -> Any:
        from nla_llm.arithmetic.namespace import NAMESPACE  # noqa: PLC0415 - the namespace is built on this class

        return NAMESPACE

    def to_numpy(self) -> NDArray[Any]:
        """The values as a plain array; what is done with them from here on escapes the count, and the tally says so."""
        record("escaped", self.size)
        return self.array

    def __array__(self, *_: Any, **__: Any) -> NDArray[Any]:
        raise TypeError(
            "a counted array was handed to NumPy, which cannot count; call the function of xp = namespace(x) instead, "
            "or nla_llm.backend.to_numpy where the work is not part of the method"
        )

    def __bool__(self) -> bool:
        return bool(self.array)

    def __int__(self) -> int:
        return int(self.array)

    def __float__(self) -> float:
        return float(self.array)

    def __index__(self) -> int:
        return self.array.__index__()

    def __len__(self) -> int:
        return len(self.array)

    def __iter__(self) -> Iterator[CountedArray]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"CountedArray({self.array!r})"

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, key: Any) -> CountedArray:
        key = tuple(plain(k) for k in key) if isinstance(key, tuple) else plain(key)
        return move(lambda a: np.asarray(a[key]), self)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Entries written over, for a buffer that is filled step by step; all of them have to be live."""
        if self.live is not None or live_of(value) is not None:
            raise NotImplementedError("entries of a counted array can only be written where all of them are live")
        key = tuple(plain(k) for k in key) if isinstance(key, tuple) else plain(key)
        self.array[key] = plain(value)

    # -- operators -------------------------------------------------------------------------------------------------

    def __matmul__(self, other: Any) -> CountedArray:
        return matmul(self, other) if isinstance(other, CountedArray) else NotImplemented

    def __neg__(self) -> CountedArray:
        return elementwise("negative", self)

    def __pos__(self) -> CountedArray:
        return elementwise("positive", self)

    def __abs__(self) -> CountedArray:
        return elementwise("abs", self)

    def __invert__(self) -> CountedArray:
        return elementwise("bitwise_invert", self)


def _operator(name: str, *, reflected: bool = False) -> Callable[[CountedArray, Any], Any]:
    def method(self: CountedArray, other: Any) -> Any:
        if not _is_operand(other):
            return NotImplemented
        return elementwise(name, other, self) if reflected else elementwise(name, self, other)

    return method


for _symbol, _name in {
    "add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "floordiv": "floor_divide",
    "mod": "remainder", "pow": "pow", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor",
}.items():  # fmt: skip
    setattr(CountedArray, f"__{_symbol}__", _operator(_name))
    setattr(CountedArray, f"__r{_symbol}__", _operator(_name, reflected=True))
for _symbol, _name in {
    "eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal",
}.items():  # fmt: skip
    setattr(CountedArray, f"__{_symbol}__", _operator(_name))


def counted(array: Any) -> CountedArray:
    """``array`` as a counted array, all of it live."""
    return CountedArray(np.asarray(array))


def elementwise(name: str, *operands: Any, **options: Any) -> CountedArray:
    """An elementwise function: one operation of its class for each live entry of the result.

    Arithmetic of integers and booleans is bookkeeping and does not count. Adding a dead zero is a copy.
    """
    values = [plain(x) for x in operands]
    result = np.asarray(getattr(base, name)(*values, **options))
    live = _all_live([live_of(x) for x in operands], result.shape)
    kind = _class_of(name, values)
    if kind is not None and is_floating(result, *values):
        record(kind, result.size if live is None else np.count_nonzero(live))
    if live is not None and name in {"add", "subtract"}:
        live = live | _copied(operands, result.shape)
    return CountedArray(result, live)


def matmul(a: CountedArray, b: CountedArray, keep: NDArray[np.bool_] | None = None) -> CountedArray:
    """Matrix product: one multiply-add for each product of two live entries that goes into a wanted entry."""
    result = np.asarray(a.array @ b.array)
    live = None
    if a.live is None and b.live is None:
        if keep is not None:
            live = np.broadcast_to(keep, result.shape)
        number = a.shape[-1] * (result.size if live is None else np.count_nonzero(live))
    else:
        terms = _as_weights(a) @ _as_weights(b)
        if keep is not None:
            terms = np.where(keep, terms, 0.0)
        number, live = int(terms.sum()), terms > 0
    if is_floating(result):
        record("madd", number)
    return CountedArray(result, live)


def reduction(
    function: Callable[..., Any],
    kind: str | None,
    x: CountedArray,
    *,
    axis: Any,
    keepdims: bool = False,
    **options: Any,
) -> CountedArray:
    """A reduction: L − 1 operations where L live entries meet in one."""
    result = np.asarray(function(x.array, axis=axis, keepdims=keepdims, **options))
    live = x.live_mask()
    terms = np.asarray(np.count_nonzero(live, axis=axis, keepdims=keepdims))
    if kind is not None and is_floating(x.array):
        record(kind, int(np.maximum(terms - 1, 0).sum()))
    return CountedArray(result, np.broadcast_to(terms > 0, result.shape))


def move(function: Callable[..., Any], *arrays: CountedArray) -> CountedArray:
    """A function that only moves entries: nothing counts, and liveness moves with them."""
    result = np.asarray(function(*(x.array for x in arrays)))
    live = None
    if any(x.live is not None for x in arrays):
        live = np.asarray(function(*(x.live_mask() for x in arrays)))
    return CountedArray(result, live)


def _is_operand(x: Any) -> bool:
    return isinstance(x, CountedArray | bool | int | float | complex | np.generic)


def plain(x: Any) -> Any:
    """The NumPy array inside a counted array, anything else as it is."""
    return x.array if isinstance(x, CountedArray) else x


def live_of(x: Any) -> Live:
    """Liveness of an operand; None where all of it is live, as a number is."""
    return x.live if isinstance(x, CountedArray) else None


def _all_live(masks: list[Live], shape: tuple[int, ...]) -> Live:
    present = [m for m in masks if m is not None]
    if not present:
        return None
    return np.broadcast_to(np.logical_and.reduce(np.broadcast_arrays(*present)), shape)


def _copied(operands: tuple[Any, ...], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Entries of a sum where the one operand is a dead zero and the other is live: the sum is the other."""
    copied = np.zeros(shape, bool)
    for i, x in enumerate(operands):
        if isinstance(x, CountedArray) and x.live is not None:
            others = _all_live([live_of(y) for j, y in enumerate(operands) if j != i], shape)
            copied |= ~x.live & (x.array == 0) & (True if others is None else others)
    return copied


def _as_weights(x: CountedArray) -> NDArray[np.float64]:
    """Liveness as 0 and 1 in float64, whose matrix product is exact below 2^53 and has a fast routine."""
    return np.ones(x.shape) if x.live is None else x.live.astype(np.float64)


def is_floating(*values: Any) -> bool:
    """Whether any value is floating; a Python number is not the reason, its partner is."""
    return any(isinstance(v, np.ndarray | np.generic) and v.dtype.kind not in "biu" for v in values)


def _class_of(name: str, values: list[Any]) -> str | None:
    """Class of an operation; powers with the exponents 2 and 1/2 are a multiplication and a square root."""
    if name == "pow" and isinstance(values[1], int | float) and values[1] in {2, 0.5}:
        return "mul" if values[1] == 2 else "sqrt"
    return ELEMENTWISE[name]
