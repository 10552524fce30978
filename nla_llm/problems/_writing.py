"""Files that are there in full or not at all: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import json
import math
import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["STORAGE", "check_free", "published", "write_file", "write_safetensors"]

# name of a dtype -> the dtype and its code in a safetensors file
STORAGE = {
    "float32": (np.dtype(np.float32), "F32"),
    "float16": (np.dtype(np.float16), "F16"),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
    "float64": (np.dtype(np.float64), "F64"),
}


def check_free(directory: Path, *, force: bool) -> None:
    """Refuse to write over what is there, unless told to.

    Raises
    ------
    FileExistsError
        If the path exists and ``force`` is False, or it is a file.
    """
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"-o {directory} is a file; name a directory that does not exist yet")
    if directory.exists() and any(directory.iterdir()) and not force:
        raise FileExistsError(f"-o {directory} exists and is not empty; name another directory or pass --force")


@contextmanager
def published(directory: Path, *, force: bool = False) -> Iterator[Path]:
    """A directory to write into, which takes the name ``directory`` once the block has ended well.

    Whatever goes wrong before that, a full disk or an exception, leaves nothing under that name, or what was there. A
    kill leaves a directory whose name begins with a dot, which the next call removes.

    Raises
    ------
    FileExistsError
        See `check_free`.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    for stale in directory.parent.glob(f".{directory.name}.*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    check_free(directory, force=force)
    aside = directory.parent / f".{directory.name}.{os.getpid()}.partial"
    aside.mkdir()
    try:
        yield aside
        _flush(aside)
        check_free(directory, force=force)
        old = directory.parent / f".{directory.name}.{os.getpid()}.old.partial"
        if directory.exists():
            directory.rename(old)
        aside.rename(directory)
        _flush(directory.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_file(path: Path, write: Callable[[Any], None]) -> None:
    """Call ``write(stream)`` on a file beside ``path``, flush it to the disk, and rename it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[tuple[int, ...], str]],
    tensor: Callable[[str], NDArray[Any]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file, one tensor in memory at a time.

    Parameters
    ----------
    path : Path
    shapes : mapping
        Name to shape and name of the dtype.
    tensor : callable
        ``tensor(name)`` gives the values, which are rounded to that dtype.
    metadata : mapping of str, optional
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, (shape, dtype) in shapes.items():
        end = position + math.prod(shape) * STORAGE[dtype][0].itemsize
        header[name] = {"dtype": STORAGE[dtype][1], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(stream: Any) -> None:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, dtype) in shapes.items():
            values = np.asarray(tensor(name), order="C").astype(STORAGE[dtype][0], copy=False)
            if values.shape != shape:
                raise ValueError(f"tensor {name!r} was announced as {shape} and is {values.shape}")
            stream.write(values.tobytes())

    write_file(path, write)


def _flush(directory: Path) -> None:
    """Ask the system to put the entries of a directory on the disk; where it has no such call, do without."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
