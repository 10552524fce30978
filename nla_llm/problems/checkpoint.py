"""Weights on disk: one tensor at a time from safetensors files, single or sharded, and sentences for broken ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import ml_dtypes
import numpy as np

from nla_llm.problems._safetensors import (
    CheckpointError,
    TensorEntry,
    check_finite,
    read_bytes,
    read_header,
    read_tensor,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

    from numpy.typing import DTypeLike, NDArray

__all__ = ["Checkpoint", "CheckpointError", "TensorFiles", "open_safetensors", "read_json"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# name of a stored dtype -> dtypes that hold each of its values exactly: the narrowest for computing first, its own last
_EXACT: dict[str, tuple[np.dtype[Any], ...]] = {
    "float16": (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)),
    "bfloat16": (np.dtype(np.float32), np.dtype(np.float64), np.dtype(ml_dtypes.bfloat16)),
    "float32": (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float32)),
    "float64": (np.dtype(np.float64),),
}


def _stored(dtype: str) -> np.dtype[Any]:
    return _EXACT[dtype][-1]


def _holds_exactly(name: str, entry: TensorEntry, dtype: DTypeLike | None) -> np.dtype[Any]:
    """Return ``dtype``, or the narrowest that is computed with, after checking that it holds every stored value."""
    exact = _EXACT.get(entry.dtype)
    if exact is None:
        raise CheckpointError(
            f"tensor {name!r} in {entry.file} is stored as {entry.dtype}; "
            f"only {', '.join(_EXACT)} are read: convert it to one of them"
        )
    wanted = exact[0] if dtype is None else np.dtype(dtype)
    if wanted not in exact:
        raise CheckpointError(
            f"tensor {name!r} in {entry.file} is stored as {entry.dtype}, which {wanted} does not hold exactly; "
            f"pass dtype={exact[0]} and round it yourself"
        )
    return wanted


@final
class TensorFiles:
    """Tensors by name, in one safetensors file or several; each is read from disk when it is asked for.

    No file stays open between two readings, so the object can be copied to other processes.
    """

    def __init__(self, path: Path, entries: dict[str, TensorEntry]) -> None:
        self.path = path
        self._entries = entries

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"TensorFiles({str(self.path)!r}, {len(self)} tensors)"

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return self._entry(name).shape

    def stored_dtype(self, name: str) -> str:
        """Name of the dtype in which a tensor is stored, as 'float16' or 'bfloat16', from the header alone."""
        return self._entry(name).dtype

    def file(self, name: str) -> Path:
        """File that holds a tensor."""
        return self._entry(name).file

    def tensor(self, name: str, dtype: DTypeLike | None = np.float32) -> NDArray[Any]:
        """One tensor, upcast exactly to ``dtype``.

        Parameters
        ----------
        name
            A name out of :meth:`names`.
        dtype
            A dtype that holds every stored value exactly, or None for the narrower of float32 and float64 that does.

        Raises
        ------
        CheckpointError
            If there is no such tensor, it is not floating, ``dtype`` would round it, or an entry is NaN or infinite.
        """
        entry = self._entry(name)
        wanted = _holds_exactly(name, entry, dtype)
        values = read_tensor(entry.file, name).astype(wanted, copy=False)
        check_finite(values, name, entry.file)
        return values

    def rows(self, name: str, start: int, stop: int, dtype: DTypeLike | None = None) -> NDArray[Any]:
        """Rows ``start:stop`` along the first axis, the others flattened into one; nothing else of the file is read.

        Parameters and errors are those of :meth:`tensor`.

        Examples
        --------
        >>> from nla_llm.problems.embedded import embedded_directory
        >>> files = open_safetensors(embedded_directory())
        >>> files.rows("model.embed_tokens.weight", 5, 8).shape
        (3, 192)
        """
        entry = self._entry(name)
        wanted = _holds_exactly(name, entry, dtype)
        width = math.prod(entry.shape[1:])
        stored = self.raw(name, start, stop).view(_stored(entry.dtype)).reshape(-1, width)
        values = stored.astype(wanted, copy=False)
        check_finite(values, name, entry.file)
        return values

    def raw(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes of rows ``start:stop`` along the first axis, as they are stored."""
        entry = self._entry(name)
        row = (entry.end - entry.begin) // max(entry.shape[0], 1)
        return read_bytes(entry, start * row, min(stop, entry.shape[0]) * row)

    def expect(self, name: str, shape: tuple[int, ...], reason: str) -> None:
        """Check that a tensor is there with this shape and a floating dtype, from the header alone.

        Raises
        ------
        CheckpointError
            If it is not; ``reason`` says what asks for it, as 'hidden_size = 192 in config.json'.
        """
        entry = self._entry(name)
        if entry.shape != shape:
            raise CheckpointError(f"tensor {name!r} in {entry.file} has shape {entry.shape}, {reason} asks for {shape}")
        if entry.dtype not in _EXACT:
            raise CheckpointError(
                f"tensor {name!r} in {entry.file} is stored as {entry.dtype}; weights are read from {', '.join(_EXACT)}"
            )

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._entries[name]
        except KeyError:
            raise CheckpointError(f"{self.path} holds no tensor {name!r}{_nearest(name, self._entries)}") from None


@final
class Checkpoint:
    """A directory in the layout of Hugging Face: config.json and weights in safetensors files, single or sharded.

    Headers are read and checked at once, tensors when they are asked for. Where there are a single file and an index of
    shards, the single file is taken; in a sharded checkpoint the index says which tensors belong to it.

    Parameters
    ----------
    directory
        Directory with config.json and model.safetensors, or model.safetensors.index.json and its shards.

    Raises
    ------
    CheckpointError
        If a file is missing, truncated, pickled or contradicts itself; the sentence names the file and the tensor.

    Examples
    --------
    >>> from nla_llm.problems.embedded import embedded_directory
    >>> checkpoint = Checkpoint(embedded_directory())
    >>> checkpoint.shape("model.embed_tokens.weight"), checkpoint.stored_dtype("model.embed_tokens.weight")
    ((2048, 192), 'float16')
    >>> checkpoint.tensor("model.norm.weight").dtype
    dtype('float32')
    """

    def __init__(self, directory: str | PathLike[str]) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            _refuse_pickle(self.directory)
            what = "is a file" if self.directory.exists() else "does not exist"
            raise CheckpointError(f"{self.directory} {what}; pass the directory that holds config.json and the weights")
        self.config = read_json(self.directory / "config.json", missing="a checkpoint needs it beside its weights")
        self.tensors = open_safetensors(self.directory)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.directory)!r}, {len(self.tensors)} tensors)"

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return self.tensors.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return self.tensors.shape(name)

    def stored_dtype(self, name: str) -> str:
        """Name of the dtype in which a tensor is stored."""
        return self.tensors.stored_dtype(name)

    def tensor(self, name: str, dtype: DTypeLike | None = np.float32) -> NDArray[Any]:
        """One tensor, upcast exactly; see :meth:`TensorFiles.tensor`."""
        return self.tensors.tensor(name, dtype)


def open_safetensors(path: str | PathLike[str]) -> TensorFiles:
    """Tensors of a safetensors file, of an index of shards (``*.index.json``), or of a directory that holds either.

    Raises
    ------
    CheckpointError
        If there are no such weights, or they are pickled, truncated or contradict themselves.

    Examples
    --------
    >>> from nla_llm.problems.embedded import embedded_directory
    >>> files = open_safetensors(embedded_directory() / "model.safetensors")
    >>> [name for name in files.names() if name.endswith("k_proj.weight")][0]
    'model.layers.0.self_attn.k_proj.weight'
    """
    path = Path(path)
    if path.is_dir():
        return open_safetensors(_weights_in(path))
    _refuse_pickle(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.name.endswith(".json"):
        return TensorFiles(path, _read_index(path))
    return TensorFiles(path, read_header(path))


def read_json(path: Path, *, missing: str) -> dict[str, Any]:
    """Read a JSON object; ``missing`` ends the sentence where there is no such file.

    Raises
    ------
    CheckpointError
        If the file is not there or does not hold a JSON object.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}: {missing}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, not an object")
    return content


# -- which files ---------------------------------------------------------------------------------------------------


def _weights_in(directory: Path) -> Path:
    """Find the file to open in a directory: the single file, else the index."""
    for name in (SINGLE, INDEX):
        if (directory / name).is_file():
            return directory / name
    found = sorted(directory.glob("*.safetensors"))
    if found:
        raise CheckpointError(
            f"{directory} has neither {SINGLE} nor {INDEX}, but {found[0].name}"
            f"{f' and {len(found) - 1} more' if len(found) > 1 else ''}; the index that names the shards is missing"
        )
    for file in sorted(directory.iterdir()):
        _refuse_pickle(file)
    raise CheckpointError(f"{directory} has neither {SINGLE} nor {INDEX}: there are no weights to read")


def _refuse_pickle(path: Path) -> None:
    if path.suffix.lower() not in PICKLED:
        return
    new = path.with_suffix(".safetensors").name.replace("pytorch_model", "model")
    raise CheckpointError(
        f"{path} holds pickled weights, which can run any code when they are read; convert them once with\n"
        f"    import safetensors.torch, torch; weights = torch.load({path.name!r}, weights_only=True)\n"
        f"    safetensors.torch.save_file({{name: t.clone() for name, t in weights.items()}}, {new!r})"
    )


def _read_index(path: Path) -> dict[str, TensorEntry]:
    """Entries of the tensors that an index of shards lists."""
    weight_map = read_json(path, missing="it names the shards").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no 'weight_map' from tensors to shards")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise CheckpointError(
                f"{path} puts tensor {name!r} into {shard!r}, which is not the name of a file beside it"
            )
    headers: dict[str, dict[str, TensorEntry]] = {}
    for shard in sorted(set(weight_map.values())):
        if not (path.parent / shard).is_file():
            names = sorted(name for name, s in weight_map.items() if s == shard)
            raise CheckpointError(
                f"shard {path.parent / shard} is missing; {path.name} puts {names[0]!r} "
                f"and {len(names) - 1} other tensors into it"
            )
        _refuse_pickle(path.parent / shard)
        headers[shard] = read_header(path.parent / shard)
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise CheckpointError(
                f"{path.name} puts tensor {name!r} into {path.parent / shard}, which does not hold it"
            )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _nearest(name: str, names: Iterable[str]) -> str:
    """Hint at the names most like ``name``."""
    from difflib import get_close_matches  # noqa: PLC0415 - only for a message

    close = get_close_matches(name, list(names), n=3)
    return f"; the nearest are {', '.join(map(repr, close))}" if close else ""
