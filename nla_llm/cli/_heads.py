"""Attention problems out of somebody's own files: tensors q, k, v, or a language model that reads a text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.problems import AttentionProblem, load_llama, open_safetensors

if TYPE_CHECKING:
    from nla_llm.problems import LlamaModel
    from nla_llm.problems.checkpoint import TensorFiles

__all__ = ["Heads", "ModelHeads", "TensorHeads", "numbers", "problems_of", "stack"]

TOKENS = 1024  # of a text that the model reads unless told otherwise


@dataclass(frozen=True)
class TensorHeads:
    """Heads of a safetensors file: tensors q, k and, if there is one, v, (..., n, d) each, and a mask of keys.

    ``n`` keeps the first tokens only. The tensor of the mask must be there if it is named.
    """

    path: Path
    q: str = "q"
    k: str = "k"
    v: str = "v"
    key_mask: str | None = None
    causal: bool = False
    scale: float | None = None
    n: int | None = None

    def problems(self) -> dict[int | None, AttentionProblem]:
        """The one problem that the file holds.

        Raises
        ------
        CheckpointError
            If the file or a tensor is missing, or broken.
        ValueError
            If the tensors make no attention problem.
        """
        files = open_safetensors(self.path)
        names = [self.q, self.k, *([self.v] if self.v in files or self.v != "v" else [])]
        arrays = [files.tensor(name, None) for name in names]
        wide = np.result_type(*(a.dtype for a in arrays))
        mask = _mask(files, self.key_mask)
        try:
            problem = AttentionProblem(
                *(a.astype(wide, copy=False) for a in arrays), scale=self.scale, causal=self.causal, key_mask=mask
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path.name}: {error}") from error
        return {None: problem if self.n is None else _first(problem, self.n)}

    def files(self) -> list[Path]:
        """Files that the heads come from."""
        return [self.path]

    def digest(self) -> str:
        """Hash of the content of the file and of what is read from it, wherever it lies."""
        return _digest(self.files(), repr(replace(self, path=Path())))

    def describe(self) -> str:
        """Sentence of a report."""
        stored = open_safetensors(self.path)
        names = ", ".join(
            f"{name} ({stored.stored_dtype(name)})" for name in (self.q, self.k, self.v) if name in stored
        )
        return f"Tensors {names} of the file {self.path.name}."


@dataclass(frozen=True)
class ModelHeads:
    """Heads of a Llama-layout checkpoint that reads a text, or token ids; causal attention after rotation."""

    directory: Path
    text: Path | None = None
    tokens: Path | None = None
    layers: tuple[int, ...] | None = None
    n: int | None = None

    def problems(self) -> dict[int | None, AttentionProblem]:
        """Problems by layer.

        Raises
        ------
        CheckpointError
            If the checkpoint is missing or broken.
        ValueError, ImportError
            If the text or the layers do not fit, or ``tokenizers`` is not installed.
        """
        model = load_llama(self.directory)
        layers = list(range(model.config.num_hidden_layers)) if self.layers is None else list(self.layers)
        ids = self._ids(model)
        return dict(zip(layers, model.capture(ids, layers), strict=True))

    def _ids(self, model: LlamaModel) -> Any:
        if self.tokens is not None:
            ids = _load_ids(self.tokens)
        else:
            assert self.text is not None  # noqa: S101 - the verb sees to it
            try:
                ids = model.encode(self.text.read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.text} is not text in UTF-8: {error}") from error
        if self.n is not None and self.n > len(ids):
            raise ValueError(f"--n {self.n} asks for more tokens than the text has, {len(ids)}")
        return ids[: TOKENS if self.n is None else self.n]

    def files(self) -> list[Path]:
        """Files that the heads come from: weights, configuration, tokenizer, text."""
        weights = open_safetensors(self.directory)
        shards = sorted({weights.file(name) for name in weights.names()})
        more = [self.directory / name for name in ("config.json", "tokenizer.json")]
        read = [path for path in (self.text, self.tokens) if path is not None]
        return [*shards, *(path for path in more if path.is_file()), *read]

    def digest(self) -> str:
        """Hash of the contents of the files and of what is read from them, wherever they lie."""
        return _digest(self.files(), repr((self.layers, self.n)))

    def describe(self) -> str:
        """Sentence of a report."""
        read = self.text or self.tokens
        name = self.directory.resolve().name
        return f"The model {name} reads {read.name if read else 'nothing'}; queries and keys are taken after rotation."


Heads = TensorHeads | ModelHeads


def problems_of(source: Heads, digest: str) -> dict[int | None, AttentionProblem]:
    """Problems of a source by layer, read once in a process, or again where a file has changed.

    Raises
    ------
    RuntimeError
        If the content is no longer that of ``digest``.
    """
    stamps = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in source.files())
    problems, found = _read(source, stamps)
    if found != digest:
        raise RuntimeError("the data were changed during the run: start it again")
    return problems


@lru_cache(maxsize=1)
def _read(source: Heads, _stamps: tuple[Any, ...]) -> tuple[dict[int | None, AttentionProblem], str]:
    return source.problems(), source.digest()


def stack(problem: AttentionProblem, first: int, last: int) -> AttentionProblem:
    """Heads ``first`` to ``last`` of a problem, counted over its flattened batch axes, on one batch axis.

    Examples
    --------
    >>> q, k = np.zeros((2, 3, 5, 4)), np.zeros((2, 1, 5, 4))
    >>> stack(AttentionProblem(q, k), 1, 4).k.shape
    (3, 5, 4)
    """
    indices = list(np.ndindex(problem.batch_shape))[first:last]
    heads = [problem.head(index) for index in indices]

    def column(name: str) -> Any:
        return None if getattr(problem, name) is None else np.stack([getattr(head, name) for head in heads])

    arrays = {name: column(name) for name in ("q", "k", "v", "key_mask")}
    return AttentionProblem(**arrays, scale=problem.scale, causal=problem.causal)


def numbers(text: str | None) -> tuple[int, ...] | None:
    """Whole numbers out of text like 0,3,5-7.

    Raises
    ------
    ValueError
        If it is of another form.

    Examples
    --------
    >>> numbers("0,3,5-7")
    (0, 3, 5, 6, 7)
    """
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise ValueError(f"layers are given as in 0,3,5-7; got {text!r}")
        found += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(found))


def _first(problem: AttentionProblem, n: int) -> AttentionProblem:
    """Problem of the first n queries and keys."""
    if n > min(problem.n_q, problem.n_k):
        raise ValueError(f"--n {n} asks for more tokens than there are, {min(problem.n_q, problem.n_k)}")
    v = None if problem.v is None else problem.v[..., :n, :]
    mask = None if problem.key_mask is None else problem.key_mask[..., :n]
    q, k = problem.q[..., :n, :], problem.k[..., :n, :]
    return AttentionProblem(q, k, v, scale=problem.scale, causal=problem.causal, key_mask=mask)


def _mask(files: TensorFiles, name: str | None) -> Any:
    """Mask of keys as booleans, from a tensor of booleans or of zeros and ones."""
    if name is None:
        return None
    from safetensors import safe_open  # noqa: PLC0415 - weights are floating, so the reader of checkpoints has no masks

    with safe_open(files.file(name), framework="numpy") as stream:
        mask = stream.get_tensor(name)
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(f"tensor {name!r} must hold booleans, or zeros and ones, True = keep; got dtype {mask.dtype}")
    return mask.astype(bool)


def _load_ids(path: Path) -> Any:
    try:
        ids = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is no NumPy file of token ids: {error}") from error
    if not isinstance(ids, np.ndarray) or ids.ndim != 1:
        raise ValueError(f"{path} must hold token ids of shape (n,), got {getattr(ids, 'shape', 'several arrays')}")
    return ids


def _digest(paths: list[Path], options: str) -> str:
    digest = hashlib.sha256(options.encode())
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
