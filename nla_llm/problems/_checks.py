"""What every array of a problem has to be: real, floating, finite, not empty, of one library."""

from __future__ import annotations

from typing import Any

import numpy as np

from nla_llm.backend import Array, is_array, is_real_floating, namespace

__all__ = ["check_floating", "check_matrix", "check_one_library"]


def check_floating(name: str, a: Any) -> None:
    if not is_array(a):
        raise TypeError(f"{name} must be an array, got {type(a).__name__}; pass numpy.asarray({name}, dtype=float)")
    if isinstance(a, np.matrix | np.ma.MaskedArray):  # they change what * means, or hide entries
        raise TypeError(f"{name} must be a plain array, got numpy {type(a).__name__}; pass numpy.asarray({name})")
    if not is_real_floating(a):
        raise TypeError(f"{name} must be real and floating, got dtype {a.dtype}; convert it to float32 or float64")


def check_matrix(name: str, a: Any) -> None:
    check_floating(name, a)
    if a.ndim < 2:
        raise ValueError(f"{name} must have at least two axes (..., rows, columns), got shape {a.shape}")
    if 0 in a.shape:
        raise ValueError(f"{name} has an empty axis, shape {a.shape}; at least one row and one column are needed")
    xp = namespace(a)
    if not bool(xp.all(xp.isfinite(a))):
        bad = int(xp.sum(xp.astype(~xp.isfinite(a), xp.int64)))
        raise ValueError(f"{name} has {bad} entries that are NaN or infinite; a softmax or norm of them means nothing")


def check_one_library(**arrays: Array | None) -> None:
    libraries = {name: namespace(a).__name__.rsplit(".", 1)[-1] for name, a in arrays.items() if is_array(a)}
    if len(set(libraries.values())) > 1:
        raise TypeError(f"all arrays must come from one library, got {libraries}; convert them to that of the first")
