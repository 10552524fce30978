"""The language model that comes with the package, a few million parameters trained on Python's standard library."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla_llm.problems._heldout import Heldout
from nla_llm.problems.checkpoint import read_json
from nla_llm.problems.llama import LlamaModel, load_llama

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from nla_llm.problems.problem import AttentionProblem

__all__ = [
    "embedded_directory",
    "embedded_model",
    "heldout_files",
    "heldout_problems",
    "heldout_tokens",
    "training_record",
]


def embedded_directory() -> Path:
    """Directory of the shipped model: config.json, model.safetensors, tokenizer.json, heldout.npz, training.json.

    Examples
    --------
    >>> (embedded_directory() / "model.safetensors").is_file()
    True
    """
    return Path(str(files("nla_llm") / "data" / "tiny_lm"))


@cache
def embedded_model() -> LlamaModel:
    """The shipped model, in float32 from float16 weights, exactly; the same object at every call.

    Examples
    --------
    >>> embedded_model()
    LlamaModel(6 layers, 6 heads of 32 over 2 key-value heads, hidden 192, vocabulary 2048)
    """
    return load_llama(embedded_directory())


def heldout_tokens(n: int | None = None, piece: int = 0) -> NDArray[np.int64]:
    """The first n token ids (n,) of a text that the model was not trained on; the whole piece unless n is given.

    Raises
    ------
    ValueError
        If there is no such piece or it is shorter than n.

    Examples
    --------
    >>> heldout_tokens(16).shape, heldout_tokens(piece=1).shape
    ((16,), (1024,))
    """
    return _heldout().piece(piece, n)


@cache
def heldout_problems(n: int, piece: int = 0) -> tuple[AttentionProblem, ...]:
    """Attention problems that the heads of the shipped model solve on :func:`heldout_tokens`, one for each layer.

    Examples
    --------
    >>> [problem.batch_shape for problem in heldout_problems(16)] == 6 * [(2, 3)]
    True
    """
    return tuple(embedded_model().capture(heldout_tokens(n, piece)))


def heldout_files() -> list[str]:
    """Names of the held-out files, one per piece of :func:`heldout_tokens`.

    Examples
    --------
    >>> all(name.endswith(".py") for name in heldout_files())
    True
    """
    return list(_heldout().files)


def training_record() -> dict[str, Any]:
    """How the shipped model was trained: options, seed, data listing, versions, training curve, final losses.

    Examples
    --------
    >>> training_record()["parameters"]
    2755008
    """
    return read_json(embedded_directory() / "training.json", missing="the record of the training is gone")


@cache
def _heldout() -> Heldout:
    return Heldout(embedded_directory() / "heldout.npz")
