"""What is asked of a language model, checked at the border."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from nla_llm.backend import Array, from_numpy, namespace, to_numpy
from nla_llm.operators import Operator

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.problems.llama_config import LlamaConfig
    from nla_llm.problems.problem import AttentionProblem

__all__ = [
    "Change",
    "Method",
    "apply_method",
    "check_attention",
    "check_layer",
    "check_matrix",
    "check_seed",
    "check_tokens",
    "library_dtype",
]

Method = Callable[..., Operator]  # method(problem, rng=...) -> Operator


@final
@dataclass(frozen=True)
class Change:
    """What a call puts in the place of the model's own parts."""

    embedding: Array
    head: Array
    attention: Mapping[int, Method]
    seed: int | None

    def generator(self, layer: int) -> np.random.Generator | None:
        """Generator of a layer; it depends on the seed and the layer alone."""
        return None if self.seed is None else np.random.default_rng([self.seed, layer])


def apply_method(method: Method, problem: AttentionProblem, layer: int, generator: np.random.Generator | None) -> Array:
    """Output (..., h_kv, g, n, d) of a method in the place of exact attention.

    Raises
    ------
    ValueError
        If its operator has not the shape of the attention matrix, up to broadcasting.
    FloatingPointError
        If an output is NaN or infinite.
    """
    operator, xp = method(problem, rng=generator), problem.xp
    shape = (*problem.batch_shape, problem.n_q, problem.n_k)
    if tuple(operator.shape[-2:]) != shape[-2:] or len(operator.shape) > len(shape):
        raise ValueError(f"{method!r} in layer {layer} gave an operator {tuple(operator.shape)}, attention is {shape}")
    output = operator @ xp.astype(problem.v, operator.dtype, copy=False)
    if not bool(xp.all(xp.isfinite(output))):
        raise FloatingPointError(f"{method!r} in layer {layer} gave NaN or infinite outputs")
    return xp.broadcast_to(output, (*shape[:-1], problem.d_v))


def check_tokens(tokens: Any, config: LlamaConfig, targets: int) -> NDArray[np.int64]:
    """Token ids (n,) or (batch, n) as integers in range; the model reads all but the last ``targets`` of them."""
    ids = to_numpy(tokens) if hasattr(tokens, "shape") else np.asarray(tokens)
    if ids.ndim not in {1, 2} or ids.size == 0:
        raise ValueError(f"tokens must have shape (n,) or (batch, n) and not be empty, got shape {ids.shape}")
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"tokens must be integers, got {ids.dtype}")
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"tokens must lie in 0 ... {config.vocab_size - 1}, got {ids.min()} ... {ids.max()}")
    limit = config.max_position_embeddings
    if ids.shape[-1] - targets > limit:
        raise ValueError(
            f"got {ids.shape[-1]} tokens, the model takes at most {limit + targets} "
            f"(max_position_embeddings = {limit}); pass fewer"
        )
    return ids.astype(np.int64)


def check_layer(layer: int, config: LlamaConfig) -> None:
    """Check that a model has this layer."""
    if isinstance(layer, bool) or not isinstance(layer, int | np.integer):
        raise TypeError(f"a layer must be an integer, got {layer!r}")
    if not 0 <= layer < config.num_hidden_layers:
        raise ValueError(f"layer must be in 0 ... {config.num_hidden_layers - 1}, got {layer}")


def check_attention(attention: Mapping[int, Method] | None, config: LlamaConfig) -> Mapping[int, Method]:
    """Check a mapping from layers to methods."""
    if attention is None:
        return {}
    if not isinstance(attention, Mapping):
        raise TypeError(f"attention must map layers to methods, got {attention!r}; pass {{layer: method}}")
    for layer, method in attention.items():
        check_layer(layer, config)
        if not callable(method):
            raise TypeError(f"attention[{layer}] must be a method, a callable, got {method!r}")
    return dict(attention)


def check_seed(rng: int | None) -> int | None:
    """Check a seed from which every layer derives its own generator."""
    if rng is None:
        return None
    if isinstance(rng, bool) or not isinstance(rng, int | np.integer):
        raise TypeError(f"rng must be an integer, from which each layer derives its generator, or None, got {rng!r}")
    if rng < 0:
        raise ValueError(f"rng must not be negative, got {rng}")
    return int(rng)


def check_matrix(name: str, given: Array | Operator, like: Array) -> Array:
    """Matrix, or the matrix of an operator, of the shape, library and dtype of ``like``."""
    matrix = given.dense() if isinstance(given, Operator) else given
    if tuple(matrix.shape) != tuple(like.shape):
        raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(matrix.shape)}")
    xp = namespace(like)
    if namespace(matrix) is not xp:
        matrix = from_numpy(to_numpy(matrix), like=like)
    if not bool(xp.all(xp.isfinite(matrix))):
        raise ValueError(f"{name} has entries that are NaN or infinite")
    return xp.astype(matrix, like.dtype, copy=False)


def library_dtype(like: Array, dtype: Any) -> Any:
    """Dtype of the library of ``like`` by name, by NumPy dtype, or as it is."""
    xp = namespace(like)
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name if isinstance(dtype, type | np.dtype) else None
    found = dtype if name is None else getattr(xp, name, None)
    if found is None or not xp.isdtype(found, "real floating"):
        raise TypeError(f"dtype must be a floating dtype of {xp.__name__}, got {dtype!r}; pass 'float32' or 'float64'")
    return found
