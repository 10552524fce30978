"""The only wall to array libraries: namespaces, conversion, devices, threads.

Every other module writes its mathematics against ``xp = namespace(...)``, so the same lines run on NumPy, PyTorch,
array-api-strict, and on arrays that count their operations.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

import array_api_compat
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

_WORTH_THREADS = 1 << 16  # entries below which starting threads costs more than it saves (measured)

F = TypeVar("F", bound="Callable[..., Any]")
Array = Any  # an array of any library that speaks the array API; the standard has no static type yet

__all__ = [
    "Array",
    "by_heads",
    "constant",
    "decomposable",
    "device_of",
    "eps",
    "exp_in_place",
    "from_numpy",
    "generator",
    "has_tuned_products",
    "is_array",
    "is_linalg_error",
    "is_numpy",
    "is_real_floating",
    "largest",
    "matmul",
    "matmul_where",
    "namespace",
    "number",
    "parallel",
    "single_or_wider",
    "thread_count",
    "to_numpy",
]


def namespace(*arrays: Array) -> Any:
    """Array-API namespace of the arguments.

    Examples
    --------
    >>> import numpy as np
    >>> namespace(np.zeros(3)).__name__
    'array_api_compat.numpy'
    """
    for x in arrays:
        if hasattr(x, "__array_namespace__") and not isinstance(x, np.ndarray):
            return x.__array_namespace__()  # arrays that speak the standard themselves: counted, rounded, strict
    return array_api_compat.array_namespace(*arrays)


def is_array(x: object) -> bool:
    """Tell whether ``x`` is an array of a library that this package can work with."""
    return hasattr(x, "__array_namespace__") or bool(array_api_compat.is_array_api_obj(x))


def is_linalg_error(error: Exception) -> bool:
    """Tell whether a library says so that a matrix has no factorisation: each has a class of its own for that."""
    return type(error).__name__.endswith("LinAlgError")


def is_numpy(*arrays: Array) -> bool:
    """Tell whether every argument is a plain NumPy array."""
    return all(type(x) is np.ndarray for x in arrays)


def has_tuned_products(*arrays: Array) -> bool:
    """Tell whether matrix products of the arguments run in a tuned library: plain NumPy arrays and PyTorch tensors."""
    return all(type(x) is np.ndarray or array_api_compat.is_torch_array(x) for x in arrays)


def is_real_floating(x: Array) -> bool:
    """Tell whether the entries of ``x`` are real floating numbers, narrow formats such as bfloat16 included."""
    if str(x.dtype).removeprefix("torch.").startswith(("bfloat16", "float")):  # NumPy's isdtype knows no bfloat16
        return True
    return bool(namespace(x).isdtype(x.dtype, "real floating"))


def to_numpy(x: Array) -> NDArray[Any]:
    """Copy of ``x`` as a NumPy array, from whatever library and device; wrappers give it by ``to_numpy()``."""
    if isinstance(x, np.ndarray | np.generic | float | int):
        return np.asarray(x)
    if hasattr(x, "to_numpy"):
        return np.asarray(x.to_numpy())
    if hasattr(x, "detach"):
        x = x.detach().cpu()
    return np.asarray(x)


def from_numpy(a: NDArray[Any], *, like: Array, dtype: Any = None) -> Array:
    """``a`` as an array of the library and device of ``like``; its own dtype unless ``dtype`` names another."""
    if type(like) is np.ndarray:
        return np.asarray(a, dtype=dtype)
    xp = namespace(like)
    if is_numpy(a) and not a.flags.writeable:  # PyTorch warns of memory that is read-only
        a = a.copy()
    x = xp.asarray(a, device=device_of(like))
    return x if dtype is None else xp.astype(x, dtype)


def device_of(x: Array) -> Any:
    """Device on which ``x`` lives."""
    return x.device if hasattr(x, "device") else array_api_compat.device(x)


def constant(value: float, *, like: Array) -> Array:
    """A number as an array without axes, in the library, dtype and device of ``like``: no operand widens by it.

    Examples
    --------
    >>> import numpy as np
    >>> (np.ones(2, np.float16) + constant(0.5, like=np.ones(1, np.float16))).dtype.name
    'float16'
    """
    return namespace(like).asarray(value, dtype=like.dtype, device=device_of(like))


def exp_in_place(a: Array) -> Array:
    """exp(a) of an array that nobody else holds: NumPy writes it over ``a``, other libraries into a new array.

    Examples
    --------
    >>> import numpy as np
    >>> exp_in_place(np.zeros(2)).tolist()
    [1.0, 1.0]
    """
    return np.exp(a, out=a) if is_numpy(a) else namespace(a).exp(a)


def eps(x: Array) -> float:
    """Machine epsilon of the dtype of ``x`` (an array, an operator, or anything with ``dtype`` and a namespace).

    Examples
    --------
    >>> import numpy as np
    >>> eps(np.zeros(1, dtype=np.float32)) == 2.0**-23
    True
    """
    return float(_limits(x).eps)


def largest(x: Array) -> float:
    """Largest finite number of the dtype of ``x``, that of float64 where it is larger still.

    Examples
    --------
    >>> import numpy as np
    >>> largest(np.zeros(1, dtype=np.float16))
    65504.0
    """
    return float(min(_limits(x).max, np.finfo(np.float64).max))


def _limits(x: Array) -> Any:
    if isinstance(x.dtype, np.dtype):
        return _numpy_limits(x.dtype)
    xp = x.xp if hasattr(x, "xp") else namespace(x)
    return xp.finfo(x.dtype)


def decomposable(x: Array) -> Array:
    """``x`` in a precision that has factorisations: float32 instead of a narrower one, float64 instead of a wider one.

    Examples
    --------
    >>> import numpy as np
    >>> [str(decomposable(np.ones(1, dtype=t)).dtype) for t in (np.float16, np.float32, np.longdouble)]
    ['float32', 'float32', 'float64']
    """
    x = single_or_wider(x)
    return namespace(x).astype(x, namespace(x).float64) if _limits(x).bits > 64 else x


def single_or_wider(x: Array) -> Array:
    """``x`` in float32 where its own precision is narrower."""
    return namespace(x).astype(x, namespace(x).float32) if _limits(x).bits < 32 else x


def number(x: Array) -> float:
    """The one entry of ``x`` as a Python number, also where its library follows gradients through it."""
    return float(x.detach() if hasattr(x, "detach") else x)


@cache  # a millisecond otherwise
def _numpy_limits(dtype: np.dtype[Any]) -> Any:
    from ml_dtypes import finfo  # noqa: PLC0415 - knows bfloat16 and its like, which NumPy's does not

    return finfo(dtype)  # type: ignore[no-untyped-call]


def generator(rng: int | np.random.Generator | None) -> np.random.Generator:
    """Turn the ``rng`` argument that every random function takes into a generator.

    Raises
    ------
    TypeError
        If ``rng`` is None: randomness is an argument, never a hidden state.
    ValueError
        If it is a negative number.
    """
    if isinstance(rng, np.random.Generator):
        return rng
    if isinstance(rng, int | np.integer) and not isinstance(rng, bool):
        if rng < 0:
            raise ValueError(f"rng must not be negative where it is a number, got {rng}; pass rng=0")
        return np.random.default_rng(int(rng))
    raise TypeError(f"rng must be an int or a numpy.random.Generator for a random method, got {rng!r}; pass rng=0")


def matmul(a: Array, b: Array) -> Array:
    """``a @ b`` in the wider of the two precisions, also in libraries whose products refuse to mix them."""
    if a.dtype != b.dtype and not is_numpy(a, b):
        xp = namespace(a, b)
        dtype = xp.result_type(a.dtype, b.dtype)
        a, b = xp.astype(a, dtype, copy=False), xp.astype(b, dtype, copy=False)
    return a @ b


def matmul_where(a: Array, b: Array, keep: Array, fill: float = 0.0) -> Array:
    """``a @ b`` where the mask ``keep`` is True, ``fill`` elsewhere: a product of which only some entries are wanted.

    Libraries compute the whole product; a counted array counts only the entries that are kept.
    """
    xp = namespace(a, b)
    if hasattr(xp, "matmul_where"):
        return xp.matmul_where(a, b, keep, fill)
    product = a @ b
    return xp.where(keep, product, constant(fill, like=product))


def thread_count() -> int:
    """Threads to compute with: the cores that this process may use, fewer where ``OMP_NUM_THREADS`` says so."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return min(_cores(), int(wanted)) if wanted.isdigit() and int(wanted) > 0 else _cores()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _blas_controller() -> Any:
    from threadpoolctl import ThreadpoolController  # noqa: PLC0415 - looking for libraries costs milliseconds

    return ThreadpoolController()


def parallel(function: Callable[[Any], Any], tasks: Iterable[Any], *, threads: int | None = None) -> list[Any]:
    """``[function(task) for task in tasks]`` from a pool of threads, BLAS held to one thread each.

    That holds for a single task too: tasks are made of many small products, in which the threads of BLAS wait for each
    other longer than they compute, on busy cores a hundred times as long.

    Tasks start in the given order, so put the long ones first. The first exception is raised again here.

    Examples
    --------
    >>> parallel(abs, [-1, 2])
    [1, 2]
    """
    tasks = list(tasks)
    workers = min(threads or thread_count(), len(tasks))
    with _blas_controller().limit(limits=1, user_api="blas"):
        if workers <= 1:
            return [function(task) for task in tasks]
        with ThreadPoolExecutor(workers) as pool:
            runs = [(copy_context(), task) for task in tasks]  # error states and tallies are those of the caller
            return list(pool.map(lambda run: run[0].run(function, run[1]), runs))


def on_one_thread(function: F) -> F:
    """``function`` with BLAS and LAPACK held to one thread: for many small factorisations between large products.

    Their threads gain little and wait for each other, on busy cores longer than the products take.

    Examples
    --------
    >>> on_one_thread(abs)(-1)
    1
    """

    @wraps(function)
    def held(*args: Any, **options: Any) -> Any:
        with _blas_controller().limit(limits=1, user_api="blas"):
            return function(*args, **options)

    return cast("F", held)


def by_heads(function: Callable[..., Any], *arrays: Array, overwrite: bool = False) -> Any:
    """``function(*arrays)``, on NumPy head by head from threads, for a function that treats heads independently.

    The arrays are (heads, ..., rows, columns); one whose leading axis is 1 or absent goes whole to every head. The
    function returns an array or a tuple of arrays; with ``overwrite`` the first of them is the first argument, which it
    has changed in place. Working head by head also keeps temporaries in the cache, where
    whole arrays would fault fresh pages in at every step.

    Examples
    --------
    >>> import numpy as np
    >>> by_heads(np.exp, np.zeros((2, 3, 4))).shape
    (2, 3, 4)
    """
    axes = max(a.ndim for a in arrays)
    heads = max(a.shape[0] for a in arrays if a.ndim == axes)
    if not is_numpy(*arrays) or axes < 3 or heads < 2 or max(a.size for a in arrays) < _WORTH_THREADS:
        return function(*arrays)
    lock = threading.Lock()
    out: list[NDArray[Any]] = []
    several = False

    def head(i: int) -> None:
        nonlocal several
        result = function(*(a[i : i + 1] if a.ndim == axes and a.shape[0] > 1 else a for a in arrays))
        parts = result if isinstance(result, tuple) else (result,)
        with lock:
            if not out:
                several = isinstance(result, tuple)
                out.extend(arrays[:1] if overwrite else ())
                out.extend(np.empty((heads, *part.shape[1:]), part.dtype) for part in parts[len(out) :])
        for whole, part in zip(out, parts, strict=True):
            if part.ctypes.data != whole[i : i + 1].ctypes.data:
                whole[i] = part[0]

    parallel(head, range(heads))
    return tuple(out) if several else out[0]
