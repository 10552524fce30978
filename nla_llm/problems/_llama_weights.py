"""The weights of a model: read from a checkpoint when they are first asked for, or given as a mapping."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, final

import numpy as np

from nla_llm.backend import Array, from_numpy, namespace
from nla_llm.problems._llama_arguments import check_matrix
from nla_llm.problems.checkpoint import CheckpointError

if TYPE_CHECKING:
    from nla_llm.operators import Operator
    from nla_llm.problems.checkpoint import Checkpoint
    from nla_llm.problems.llama_config import LlamaConfig

__all__ = ["EMBEDDING", "StoredWeights", "check_weights", "updated_weights"]

EMBEDDING = "model.embed_tokens.weight"


@final
class StoredWeights(Mapping[str, Array]):
    """Weights of a checkpoint as arrays of the library of ``like``, each read when it is first asked for.

    The embedding stays in memory, the others where ``keep``. Names, shapes and dtypes are checked against ``config``
    at once, from the headers.
    """

    def __init__(self, checkpoint: Checkpoint, config: LlamaConfig, *, like: Array, dtype: Any, keep: bool) -> None:
        self.checkpoint, self.like, self.dtype, self.keep = checkpoint, like, dtype, keep
        self._names = list(config.shapes())
        self._read: dict[str, Array] = {}
        for name, shape in config.shapes().items():
            checkpoint.tensors.expect(name, shape, "its config.json")
        if config.tie_word_embeddings:
            _check_tied(checkpoint)

    def __getitem__(self, name: str) -> Array:
        if name in self._read:
            return self._read[name]
        if name not in self._names:
            raise KeyError(name)
        weight = from_numpy(self.checkpoint.tensor(name, dtype=None), like=self.like, dtype=self.dtype)
        if self.keep or name == EMBEDDING:
            self._read[name] = weight
        return weight

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_tied(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose config ties embedding and head while its files hold two different matrices."""
    head = "lm_head.weight"
    if head in checkpoint and not np.array_equal(checkpoint.tensor(EMBEDDING, None), checkpoint.tensor(head, None)):
        raise CheckpointError(
            f"{checkpoint.directory / 'config.json'} ties {head} to {EMBEDDING} (tie_word_embeddings), but "
            f"{checkpoint.tensors.file(head)} holds two different matrices; set tie_word_embeddings to false"
        )


def check_weights(config: LlamaConfig, weights: Mapping[str, Array]) -> None:
    """Check names, shapes and dtypes of given weights.

    Raises
    ------
    ValueError
        If one is missing, has another shape, or another dtype than the embedding, which must be floating.
    """
    for name, shape in config.shapes().items():
        if name not in weights:
            raise ValueError(f"weights has no {name!r}, which the config asks for with shape {shape}")
        if tuple(weights[name].shape) != shape:
            raise ValueError(f"weights[{name!r}] has shape {tuple(weights[name].shape)}, the config asks for {shape}")
    embedding = weights[EMBEDDING]
    if not namespace(embedding).isdtype(embedding.dtype, "real floating"):
        raise ValueError(f"weights must be floating, got {embedding.dtype}")
    for name in config.shapes():
        if weights[name].dtype != embedding.dtype:
            raise ValueError(
                f"weights[{name!r}] is {weights[name].dtype}, the embedding is {embedding.dtype}; use one dtype"
            )


def updated_weights(weights: Mapping[str, Array], updates: Mapping[str, Array | Operator]) -> Mapping[str, Array]:
    """W + ΔW for the weights that have an update, in their dtype; the others as they are, read when asked for."""
    changed: dict[str, Array] = {}
    for name, update in updates.items():
        if name not in weights:
            raise ValueError(f"updates has {name!r}, which is no weight of the model; see config.shapes()")
        changed[name] = weights[name] + check_matrix(f"updates[{name!r}]", update, weights[name])
    return ChainMap(changed, weights)  # type: ignore[arg-type] # it writes to the first map alone
