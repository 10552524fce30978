"""Weight matrices of two checkpoints, one before and one after fine-tuning, matched by name and shape."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nla_llm.problems import open_safetensors

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from nla_llm.problems.checkpoint import TensorFiles

__all__ = ["Matrices", "Pair", "Plan", "plan_of"]


@dataclass(frozen=True)
class Pair:
    """Two checkpoints: safetensors files, indices of shards, or directories that hold either."""

    base: Path
    tuned: Path


@dataclass(frozen=True)
class Plan:
    """Tensors to be measured, with the hash of their contents, and those left out, with the reason."""

    tensors: dict[str, str]
    left_out: dict[str, str]


def plan_of(pair: Pair, pattern: str | None = None) -> Plan:
    """Match the tensors of a pair by name and shape.

    Raises
    ------
    CheckpointError
        If a checkpoint cannot be read, or a matched tensor holds a NaN.
    ValueError
        If nothing is left to measure; the sentence says why.
    """
    base, tuned = open_safetensors(pair.base), open_safetensors(pair.tuned)
    names = sorted({*base.names(), *tuned.names()})
    left_out = {name: reason for name in names if (reason := _reason(name, base, tuned, pattern))}
    matched = [name for name in names if name not in left_out]
    if not matched:
        reasons = "; ".join(f"{count} {reason}" for reason, count in _counts(left_out).items()) or "they hold none"
        raise ValueError(f"no tensor of {pair.base.name} and {pair.tuned.name} can be compared: {reasons}")
    return Plan({name: Matrices.read(name, pair).digest() for name in matched}, left_out)


def _reason(name: str, base: TensorFiles, tuned: TensorFiles, pattern: str | None) -> str:
    """Why a tensor is left out; empty where it is not."""
    if pattern is not None and not fnmatchcase(name, pattern):
        return "not asked for by --tensors"
    for files, other in ((base, "TUNED"), (tuned, "BASE")):
        if name not in files:
            return f"only in {other}"
    shapes = base.shape(name), tuned.shape(name)
    if shapes[0] != shapes[1]:
        return "of another shape in BASE than in TUNED"
    if len(shapes[0]) != 2 or 0 in shapes[0]:
        return "not a matrix"
    floating = ("float16", "bfloat16", "float32", "float64")
    if any(files.stored_dtype(name) not in floating for files in (base, tuned)):
        return "not stored as " + ", ".join(floating)
    return ""


def _counts(left_out: dict[str, str]) -> dict[str, int]:
    return {reason: list(left_out.values()).count(reason) for reason in dict.fromkeys(left_out.values())}


class Matrices(NamedTuple):
    """A matrix before and after, and the dtypes in which the two are stored."""

    base: NDArray[Any]
    tuned: NDArray[Any]
    stored: tuple[str, str]

    @classmethod
    def read(cls, name: str, pair: Pair) -> Matrices:
        """The two of a name, each upcast exactly."""
        base, tuned = open_safetensors(pair.base), open_safetensors(pair.tuned)
        stored = base.stored_dtype(name), tuned.stored_dtype(name)
        return cls(base.tensor(name, None), tuned.tensor(name, None), stored)

    def digest(self) -> str:
        """Hash of the contents."""
        digest = hashlib.sha256(repr((self.stored, self.base.shape)).encode())
        for values in (self.base, self.tuned):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()[:16]
