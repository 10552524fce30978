"""One safetensors file: its header, checked before anything is mapped, and its tensors."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["CheckpointError", "TensorEntry", "check_finite", "read_bytes", "read_header", "read_tensor"]

MAX_HEADER = 100_000_000  # bytes; the limit of the format

# code in the file -> (name of the dtype, bytes of an entry)
_DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "BOOL": ("bool", 1),
    "C64": ("complex64", 8),
} | {
    f"{kind}{8 * size}": (f"{name}{8 * size}", size)
    for kind, name in (("I", "int"), ("U", "uint"))
    for size in (1, 2, 4, 8)
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read as it stands; the sentence names the file and the tensor."""


@final
@dataclass(frozen=True)
class TensorEntry:
    """What a header says of one tensor: its file, dtype and shape, and where in the file it begins and ends."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read the entries of a safetensors file and check that its header is possible and agrees with its length.

    Raises
    ------
    CheckpointError
        If the header is cut short, is not JSON, or its tensors overlap, leave gaps or end beyond the file.
    """
    header, available = _header_bytes(path)
    try:
        content = json.loads(header.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its header is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is damaged: its header is a JSON {type(content).__name__}, not an object")
    content.pop("__metadata__", None)
    spans = {name: _span(path, name, entry) for name, entry in content.items()}
    _check_spans(path, spans, available)
    start = 8 + len(header)
    return {
        name: TensorEntry(
            path, _dtype_name(e["dtype"]), tuple(e["shape"]), start + spans[name][0], start + spans[name][1]
        )
        for name, e in content.items()
    }


def _header_bytes(path: Path) -> tuple[bytes, int]:
    """Return the header and the number of bytes of data behind it."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise CheckpointError(
                f"{path} is a Git LFS pointer, not the weights themselves; fetch them with git lfs pull"
            )
        length = int.from_bytes(start, "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{path} is truncated or no safetensors file: its first 8 bytes announce a header of {length} bytes, "
                f"the file has {size} bytes"
            )
        return stream.read(length), size - 8 - length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} stands in it twice")
    return dict(pairs)


def _dtype_name(code: str) -> str:
    return _DTYPES[code][0] if code in _DTYPES else code


def _span(path: Path, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor begins and ends in the data, after checking that its entry is well formed and not too short."""
    entry = entry if isinstance(entry, dict) else {}
    code, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not (isinstance(code, str) and _whole_numbers(shape) and _whole_numbers(span) and len(span) == 2):
        raise CheckpointError(
            f"{path} is damaged: its header describes tensor {name!r} by {entry}, not by dtype, shape, offsets"
        )
    begin, end = span
    if code in _DTYPES and end - begin != math.prod(shape) * _DTYPES[code][1]:
        raise CheckpointError(
            f"{path} is damaged: tensor {name!r} of shape {tuple(shape)} in {_dtype_name(code)} needs "
            f"{math.prod(shape) * _DTYPES[code][1]} bytes, its header gives it bytes {begin} to {end}"
        )
    return begin, end


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and x >= 0 for x in value)


def _check_spans(path: Path, spans: dict[str, tuple[int, int]], available: int) -> None:
    """Check that the tensors follow each other without gap or overlap and fill the data of the file."""
    position, previous = 0, ""
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if end > available:
            raise CheckpointError(
                f"{path} is truncated or its header lies: tensor {name!r} ends at byte {end} of the data, "
                f"the file has {available}"
            )
        if begin < position:
            raise CheckpointError(f"{path} is damaged: its header lets tensors {previous!r} and {name!r} overlap")
        if begin > position:
            raise CheckpointError(
                f"{path} is damaged: bytes {position} to {begin} before tensor {name!r} belong to no tensor"
            )
        position, previous = end, name
    if position != available:
        raise CheckpointError(
            f"{path} is damaged: its tensors end at byte {position} of the data, the file has {available}"
        )


def read_tensor(path: Path, name: str) -> NDArray[Any]:
    """Read one tensor as stored; the file is mapped, so nothing else of it is read."""
    try:
        with safe_open(path, framework="numpy") as file:
            return np.asarray(file.get_tensor(name))
    except SafetensorError as error:
        raise CheckpointError(f"tensor {name!r} in {path} cannot be read: {error}") from error


def read_bytes(entry: TensorEntry, start: int, stop: int) -> NDArray[np.uint8]:
    """Bytes ``start`` to ``stop`` of the data of a tensor, read into memory of their own.

    Read and not mapped: pages of a map stay in the memory of the process until the system takes them back.

    Raises
    ------
    CheckpointError
        If the file has become shorter since its header was read.
    """
    with entry.file.open("rb") as stream:
        stream.seek(entry.begin + start)
        data = np.fromfile(stream, dtype=np.uint8, count=stop - start)
    if data.size != stop - start:
        raise CheckpointError(f"{entry.file} was cut short while it was read")
    return data


def check_finite(values: NDArray[Any], name: str, file: Path) -> None:
    """Check that no entry is NaN or infinite; the extremes show it without a temporary of the size of the tensor."""
    with np.errstate(invalid="ignore"):  # NaN in a comparison
        if values.size == 0 or (math.isfinite(float(values.min())) and math.isfinite(float(values.max()))):
            return
    bad = ~np.isfinite(values.astype(np.float64, copy=False))
    place = tuple(int(i) for i in np.argwhere(bad)[0])
    raise CheckpointError(
        f"tensor {name!r} in {file} has {int(bad.sum())} entries that are NaN or infinite, the first at {list(place)}"
    )
