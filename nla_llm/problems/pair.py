"""Two checkpoints, before and after fine-tuning: tensors matched by name and shape, read a few rows at a time."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path  # noqa: TC003 - a field of a dataclass that is pickled
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np

from nla_llm.problems.checkpoint import TensorFiles, open_safetensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

__all__ = ["FLOATING", "Kind", "Matched", "Pair", "Plan", "TensorPair", "kind_of_layer", "plan_of"]

FLOATING = ("float16", "bfloat16", "float32", "float64")
Kind = Literal["linear", "embedding", "convolution", "transposed", "vector"]
_BLOCK = 1 << 20  # entries that are read at once
_EMBEDDING = re.compile(r"(^|[._])(wte|wpe|shared|embed(?!_out)\w*|\w*embeddings?)\.weight$")
_TRANSPOSED = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")  # Conv1D of GPT-2 stores (d_in, d_out)
_HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output|score|classifier)\.weight$")


def kind_of_layer(name: str, shape: tuple[int, ...], model_type: str = "") -> Kind:
    """What kind of layer a weight belongs to, from its name and shape.

    Examples
    --------
    >>> kind_of_layer("model.embed_tokens.weight", (32000, 4096)), kind_of_layer("conv_in.weight", (320, 4, 3, 3))
    ('embedding', 'convolution')
    >>> kind_of_layer("h.0.attn.c_attn.weight", (768, 2304), "gpt2"), kind_of_layer("model.norm.weight", (4096,))
    ('transposed', 'vector')
    """
    if len(shape) < 2:
        return "vector"
    if len(shape) > 2:
        return "convolution"
    if _EMBEDDING.search(name):
        return "embedding"
    return "transposed" if model_type == "gpt2" and _TRANSPOSED.search(name) else "linear"


@final
@dataclass(frozen=True)
class Pair:
    """Two checkpoints: safetensors files, indices of shards, or directories that hold either."""

    base: Path
    tuned: Path

    def open(self, name: str) -> TensorPair:
        """The two tensors of a name."""
        return TensorPair(name, open_safetensors(self.base), open_safetensors(self.tuned))

    def stamp(self) -> str:
        """Sizes and times of all files: it changes when one of them is written."""
        files = {
            found.file(name)
            for found in (open_safetensors(self.base), open_safetensors(self.tuned))
            for name in found.names()
        }
        facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files)]
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def config(self) -> dict[str, Any]:
        """config.json of the tuned checkpoint, else of the base; empty where there is none."""
        for path in (self.tuned, self.base):
            file = (path if path.is_dir() else path.parent) / "config.json"
            if file.is_file():
                content = json.loads(file.read_text(encoding="utf-8"))
                return content if isinstance(content, dict) else {}
        return {}


@final
class TensorPair:
    """A tensor before and after, as matrices (d_out, d_in): the first axis, and all others flattened into one.

    Nothing is read before it is asked for, and then a block of rows at a time.
    """

    def __init__(self, name: str, base: TensorFiles, tuned: TensorFiles) -> None:
        self.name, self.base, self.tuned = name, base, tuned
        shape = base.shape(name)
        self.shape = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        self.stored = (base.stored_dtype(name), tuned.stored_dtype(name))
        self.dtype = np.dtype(np.float64 if "float64" in self.stored else np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of both as they are stored."""
        sizes = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
        return math.prod(self.shape) * sum(sizes[stored] for stored in self.stored)

    def blocks(self) -> Iterator[tuple[int, NDArray[Any], NDArray[Any]]]:
        """First row, base and tuned of one block of rows after another; upcast exactly to a common dtype."""
        for start, stop in self._ranges():
            b, t = (files.rows(self.name, start, stop, self.dtype) for files in (self.base, self.tuned))
            yield start, b, t

    def rows_of(self, which: Literal["base", "tuned"]) -> Iterator[tuple[int, NDArray[Any]]]:
        """First row and block of one of the two."""
        files = self.base if which == "base" else self.tuned
        for start, stop in self._ranges():
            yield start, files.rows(self.name, start, stop, self.dtype)

    def matrix(self, which: Literal["base", "tuned"]) -> NDArray[Any]:
        """One of the two as a whole."""
        whole = np.empty(self.shape, self.dtype)
        for start, rows in self.rows_of(which):
            whole[start : start + rows.shape[0]] = rows
        return whole

    def digest(self, advance: Callable[[int], None] | None = None) -> tuple[str, bool]:
        """Hash of the contents, and whether the two are equal; every entry is checked to be finite on the way.

        Raises
        ------
        CheckpointError
            If an entry is NaN or infinite.
        """
        digest = hashlib.sha256(repr((self.stored, self.shape)).encode())
        equal = True
        for start, stop in self._ranges():
            raw_base, raw_tuned = (files.raw(self.name, start, stop) for files in (self.base, self.tuned))
            for data in (raw_base, raw_tuned):
                digest.update(data.data)
                if advance is not None:
                    advance(data.size)
            if len(set(self.stored)) == 1 and np.array_equal(raw_base, raw_tuned):
                self.base.rows(self.name, start, stop)  # for the check alone
                continue
            b, t = (files.rows(self.name, start, stop, self.dtype) for files in (self.base, self.tuned))
            equal = equal and bool(np.array_equal(b, t))
        return digest.hexdigest()[:16], equal

    def _ranges(self) -> Iterator[tuple[int, int]]:
        rows, width = self.shape
        step = max(1, _BLOCK // max(width, 1))
        return ((start, min(start + step, rows)) for start in range(0, rows, step))


@dataclass(frozen=True)
class Matched:
    """A tensor that both hold: the hash of its contents, its size in bytes, and how an adapter can hold its update.

    ``barred`` says why an adapter cannot; it is empty where it can.
    """

    kind: Kind
    shape: tuple[int, ...]
    digest: str
    nbytes: int
    equal: bool
    barred: str


@dataclass(frozen=True)
class Plan:
    """Tensors to be measured, and those left out, with the reason."""

    tensors: dict[str, Matched]
    left_out: dict[str, str]


def plan_of(pair: Pair, pattern: str | None = None, advance: Callable[[int], None] | None = None) -> Plan:
    """Match the tensors of a pair by name and shape.

    Parameters
    ----------
    pair : Pair
    pattern : str, optional
        Shell pattern of the names.
    advance : callable, optional
        Is told the number of bytes read, again and again.

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
    config = pair.config()
    tied = _tied(config, base)
    found = {}
    for name in matched:
        tensor = TensorPair(name, base, tuned)
        kind = kind_of_layer(name, base.shape(name), str(config.get("model_type", "")))
        digest, equal = tensor.digest(advance)
        barred = _barred(name, kind, tied)
        found[name] = Matched(kind, base.shape(name), digest, tensor.nbytes, equal, barred)
    return Plan(found, left_out)


def _reason(name: str, base: TensorFiles, tuned: TensorFiles, pattern: str | None) -> str:
    """Why a tensor is left out; empty where it is not."""
    if pattern is not None and not fnmatchcase(name, pattern):
        return "not asked for by --tensors"
    missing = [other for files, other in ((base, "TUNED"), (tuned, "BASE")) if name not in files]
    return f"only in {missing[0]}" if missing else _unlike(name, base, tuned)


def _unlike(name: str, base: TensorFiles, tuned: TensorFiles) -> str:
    """Why two tensors of a name cannot be compared; empty where they can."""
    shapes = base.shape(name), tuned.shape(name)
    if shapes[0] != shapes[1]:
        return "of another shape in BASE than in TUNED"
    if not shapes[0] or 0 in shapes[0]:
        return "empty or a single number"
    if any(files.stored_dtype(name) not in FLOATING for files in (base, tuned)):
        return "not stored as " + ", ".join(FLOATING)
    if len(shapes[0]) == 3 and "expert" in name:
        return "a stack of the matrices of several experts"
    return ""


def _tied(config: dict[str, Any], base: TensorFiles) -> str:
    """Why the embedding must be taken as tied to the head; empty where it need not."""
    text = config.get("text_config")
    said = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else None)
    if said:
        return "the embedding is tied to the output head, and an adapter would change one of the two"
    if said is None and not any(_HEADS.search(name) for name in base.names()):
        return "no output head is stored, so that the embedding may be tied to it"
    return ""


def _barred(name: str, kind: Kind, tied: str) -> str:
    if kind == "vector":
        return "a norm or a bias, not a matrix"
    if not name.endswith(".weight"):
        return "not the weight of a module, which its name does not end with"
    return tied if kind == "embedding" or _HEADS.search(name) else ""


def _counts(left_out: dict[str, str]) -> dict[str, int]:
    return {reason: list(left_out.values()).count(reason) for reason in dict.fromkeys(left_out.values())}
