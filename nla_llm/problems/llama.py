"""Language models in the Llama layout: a forward pass in which any method can replace the attention of any layer."""

from __future__ import annotations

import math
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from nla_llm.backend import Array, from_numpy, namespace, to_numpy
from nla_llm.operators import LowRank, Operator
from nla_llm.problems._llama_arguments import (
    Change,
    Method,
    apply_method,
    check_attention,
    check_layer,
    check_matrix,
    check_seed,
    check_tokens,
    library_dtype,
)
from nla_llm.problems._llama_functions import cross_entropy, merge_heads, rms_norm, rotate, silu, split_heads, wide
from nla_llm.problems._llama_weights import EMBEDDING, StoredWeights, check_weights, updated_weights
from nla_llm.problems.checkpoint import Checkpoint
from nla_llm.problems.llama_config import LlamaConfig, Rotary
from nla_llm.problems.problem import AttentionProblem

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from os import PathLike

    from numpy.typing import NDArray

__all__ = ["LlamaConfig", "LlamaModel", "Rotary", "load_llama"]

Tokens = Any  # (n,) or (batch, n) integers, as an array or nested lists; or a text


@final
class LlamaModel:
    """Causal language model: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    The architecture is that of Touvron et al. 2023, arXiv 2302.13971. Everything is computed in the library, on the
    device and in the dtype of the weights. Sequences of a batch have one length and no padding.

    Parameters
    ----------
    config
        Shape of the model.
    weights
        Name → array for the names and shapes of ``config.shapes()``.
    directory
        Where tokenizer.json lies, for texts; token ids need none.

    Raises
    ------
    ValueError
        If a weight is missing or has another shape.

    Examples
    --------
    >>> from nla_llm.problems.embedded import embedded_model, heldout_tokens
    >>> model, tokens = embedded_model(), heldout_tokens(64)
    >>> model.logits(tokens).shape
    (64, 2048)
    >>> problem = model.capture(tokens, layers=[2])[0]
    >>> problem.q.shape, problem.k.shape
    ((2, 3, 64, 32), (2, 1, 64, 32))
    """

    def __init__(
        self, config: LlamaConfig, weights: Mapping[str, Array], *, directory: str | PathLike[str] | None = None
    ) -> None:
        self.config = config
        self.weights = weights
        self._biases = frozenset(name for name in config.shapes() if name.endswith(".bias"))
        self.directory = None if directory is None else Path(directory)
        if not isinstance(weights, StoredWeights):  # those were checked against the headers
            check_weights(config, weights)

    def __repr__(self) -> str:
        c = self.config
        return (
            f"LlamaModel({c.num_hidden_layers} layers, {c.num_attention_heads} heads of {c.head_dim} over "
            f"{c.num_key_value_heads} key-value heads, hidden {c.hidden_size}, vocabulary {c.vocab_size})"
        )

    # -- weights ---------------------------------------------------------------------------------------------------

    @property
    def xp(self) -> Any:
        """Array namespace of the weights."""
        return namespace(self.embedding)

    @property
    def dtype(self) -> Any:
        """Dtype of the weights, in which the model computes."""
        return self.embedding.dtype

    @property
    def embedding(self) -> Array:
        """Embedding matrix (vocab_size, hidden_size), a row per token."""
        return self.weights[EMBEDDING]

    @property
    def head(self) -> Array:
        """Output matrix (vocab_size, hidden_size); the embedding where the two are tied."""
        return self.embedding if self.config.tie_word_embeddings else self.weights["lm_head.weight"]

    def query_key(self, layer: int, head: int) -> LowRank:
        """W_Qᵀ W_K of a query head and the key head that it reads, (hidden_size, hidden_size) of rank ≤ head_dim.

        The logit of normalised inputs x_i, x_j at the same position is x_iᵀ W_Qᵀ W_K x_j / √head_dim: the scale, the
        rotation, biases and the gain of the norm are left out.

        Examples
        --------
        >>> from nla_llm.problems.embedded import embedded_model
        >>> embedded_model().query_key(0, 5)
        LowRank(192, 192)
        """
        c = self.config
        check_layer(layer, self.config)
        if not 0 <= head < c.num_attention_heads:
            raise ValueError(f"head must be in 0 ... {c.num_attention_heads - 1}, got {head}")
        d = c.head_dim
        kv = head // c.group
        w_q = self.weights[f"model.layers.{layer}.self_attn.q_proj.weight"][head * d : (head + 1) * d, :]
        w_k = self.weights[f"model.layers.{layer}.self_attn.k_proj.weight"][kv * d : (kv + 1) * d, :]
        xp = namespace(w_q)
        return LowRank(xp.matrix_transpose(w_q), xp.matrix_transpose(w_k))

    def updated(self, updates: Mapping[str, Array | Operator]) -> LlamaModel:
        """The model with W + ΔW in the place of the named weights; all others are shared with this one.

        Parameters
        ----------
        updates
            Name of a weight → its update, an array or an operator of its shape. The sum is formed in the dtype of the
            weights.

        Raises
        ------
        ValueError
            If the model has no such weight, or an update has another shape or entries that are not finite.

        Examples
        --------
        >>> from nla_llm.problems.embedded import embedded_model, heldout_tokens
        >>> from nla_llm.problems.embedded_updates import embedded_updates
        >>> tuned = embedded_model().updated(embedded_updates().full)
        >>> tuned.loss(heldout_tokens(64)) != embedded_model().loss(heldout_tokens(64))
        True
        """
        model = copy(self)
        model.weights = updated_weights(self.weights, updates)
        return model

    # -- what it is asked ------------------------------------------------------------------------------------------

    def logits(
        self,
        tokens: Tokens,
        *,
        attention: Mapping[int, Method] | None = None,
        rng: int | None = None,
        embedding: Array | Operator | None = None,
        tie: bool = True,
    ) -> Array:
        """Logits of the next token, (n, vocab_size) or (batch, n, vocab_size).

        Parameters
        ----------
        tokens
            Token ids (n,) or (batch, n), or a text (needs ``tokenizers``).
        attention
            Layer → method that replaces exact attention there: a callable ``method(problem, rng=...)`` that returns an
            operator for a causal problem with q (batch, h_kv, g, n, d) and k (batch, h_kv, 1, n, d).
        rng
            Seed for methods that draw; the generator of a layer depends on it and the layer alone.
        embedding
            Matrix (vocab_size, hidden_size) in the place of the embedding, as an array or an operator.
        tie
            Whether ``embedding`` also replaces the output matrix of a model whose two are tied.

        Raises
        ------
        ValueError, TypeError
            If tokens, layers or the embedding do not fit the model.
        FloatingPointError
            If a replaced attention returned a NaN or an infinity; it names the layer.
        """
        change = self._change(attention, rng, embedding, tie)
        return self._trunk(self._token_ids(tokens), change) @ self.xp.matrix_transpose(change.head)

    def loss(
        self,
        tokens: Tokens,
        *,
        attention: Mapping[int, Method] | None = None,
        rng: int | None = None,
        embedding: Array | Operator | None = None,
        tie: bool = True,
        per_token: bool = False,
    ) -> Any:
        """Cross-entropy of tokens 1 ... n − 1 given those before them, in nats per token.

        Takes the arguments of :meth:`logits`. Returns the mean, a float; with ``per_token`` the loss of each token,
        an array (n − 1,) or (batch, n − 1).

        Examples
        --------
        >>> from nla_llm.problems.embedded import embedded_model, heldout_tokens
        >>> embedded_model().loss(heldout_tokens(256)) < 6.0  # log 2048 = 7.6 without knowing anything
        True
        """
        ids = self._token_ids(tokens, targets=1)
        if ids.shape[-1] < 2:
            raise ValueError("the loss needs at least two tokens: it scores each token given those before it")
        change = self._change(attention, rng, embedding, tie)
        hidden = self._trunk(ids[..., :-1], change)
        values = cross_entropy(hidden, ids[..., 1:], change.head)
        return values if per_token else float(np.mean(to_numpy(values), dtype=np.float64))

    def perplexity(self, tokens: Tokens, **options: Any) -> float:
        """exp of the mean :meth:`loss`, with its arguments."""
        return math.exp(self.loss(tokens, **options))

    def capture(self, tokens: Tokens, layers: Iterable[int] | None = None) -> list[AttentionProblem]:
        """The attention problems that exact attention solves on some tokens, one per layer.

        Parameters
        ----------
        tokens
            Token ids (n,) or (batch, n), or a text (needs ``tokenizers``).
        layers
            Which layers, in this order; all unless given. Layers above the highest are not computed.

        Returns
        -------
        list of AttentionProblem
            Causal, q (h_kv, g, n, d) and k (h_kv, 1, n, d) after rotation, v (h_kv, 1, n, d); a batch axis comes first.
            Query head i of the model is q[i // g, i % g].
        """
        wanted = list(range(self.config.num_hidden_layers)) if layers is None else list(layers)
        for layer in wanted:
            check_layer(layer, self.config)
        found: dict[int, AttentionProblem] = {}
        change = self._change(None, None, None, tie=True)
        ids = self._token_ids(tokens)
        x, rotation = self._embed(ids, change), self._rotation(ids.shape[-1])
        for layer in range(max(wanted, default=-1) + 1):
            problem = self._problem(layer, x, rotation)
            if layer in wanted:
                found[layer] = problem
            if layer < max(wanted):
                x = x + self._attention(layer, problem, change)
                x = x + self._mlp(layer, x)
        return [found[layer] for layer in wanted]

    def linear_inputs(self, tokens: Tokens) -> dict[str, Array]:
        """Name of each weight of a linear map inside the layers → what the map is applied to, (tokens, d_in).

        Calibration inputs of an :class:`~nla_llm.problems.UpdateProblem` for that weight. Maps that read the same
        hidden states share one array.

        Examples
        --------
        >>> from nla_llm.problems.embedded import embedded_model, heldout_tokens
        >>> embedded_model().linear_inputs(heldout_tokens(64))["model.layers.0.mlp.down_proj.weight"].shape
        (64, 512)
        """
        found: dict[str, Array] = {}

        def linear(x: Array, name: str) -> Array:
            found[f"{name}.weight"] = self.xp.reshape(x, (-1, x.shape[-1]))
            return self._linear(x, name)

        recorder = copy(self)
        recorder._linear = linear  # type: ignore[method-assign]  # noqa: SLF001 - a copy of itself
        recorder._trunk(self._token_ids(tokens), self._change(None, None, None, tie=True))  # noqa: SLF001 - as above
        return found

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids (n,) of a text, by the tokenizer.json beside the weights.

        A first token that marks the beginning is there only where tokenizer.json itself adds it.

        Raises
        ------
        ImportError
            If ``tokenizers`` is not installed.
        ValueError
            If the model has no tokenizer.
        """
        path = None if self.directory is None else self.directory / "tokenizer.json"
        if path is None or not path.is_file():
            raise ValueError(f"no tokenizer.json beside the weights (directory {self.directory}); pass token ids")
        try:
            import tokenizers  # noqa: PLC0415 - optional
        except ImportError as error:
            raise ImportError(
                "a text needs the package tokenizers: pip install tokenizers; token ids work without it"
            ) from error
        return np.asarray(tokenizers.Tokenizer.from_file(str(path)).encode(text).ids, dtype=np.int64)

    # -- forward pass ----------------------------------------------------------------------------------------------

    def _trunk(self, ids: Array, change: Change) -> Array:
        """Hidden states after the last norm, (..., n, hidden_size)."""
        x, rotation = self._embed(ids, change), self._rotation(ids.shape[-1])
        for layer in range(self.config.num_hidden_layers):
            x = x + self._attention(layer, self._problem(layer, x, rotation), change)
            x = x + self._mlp(layer, x)
        return self._norm(x, "model.norm")

    def _embed(self, ids: Array, change: Change) -> Array:
        xp = self.xp
        rows = xp.take(change.embedding, xp.reshape(ids, (-1,)), axis=0)
        return xp.reshape(rows, (*ids.shape, self.config.hidden_size))

    def _rotation(self, n: int) -> tuple[Array, Array]:
        """Cosines and sines (n, head_dim / 2) of the rotary positions, computed in float64."""
        angle = np.outer(np.arange(n), self.config.rotary.frequencies(self.config.head_dim))
        cos, sin = (from_numpy(f(angle), like=self.embedding, dtype=self.dtype) for f in (np.cos, np.sin))
        return cos, sin

    def _problem(self, layer: int, x: Array, rotation: tuple[Array, Array]) -> AttentionProblem:
        """Attention problem of a layer whose input is x (..., n, hidden_size)."""
        c, name = self.config, f"model.layers.{layer}.self_attn"
        x = self._norm(x, f"model.layers.{layer}.input_layernorm")
        q = split_heads(self._linear(x, f"{name}.q_proj"), c.num_key_value_heads, c.group)
        k = split_heads(self._linear(x, f"{name}.k_proj"), c.num_key_value_heads, 1)
        v = split_heads(self._linear(x, f"{name}.v_proj"), c.num_key_value_heads, 1)
        return AttentionProblem(rotate(q, *rotation), rotate(k, *rotation), v, scale=c.head_dim**-0.5, causal=True)

    def _attention(self, layer: int, problem: AttentionProblem, change: Change) -> Array:
        """What the attention of a layer adds, (..., n, hidden_size)."""
        xp, method = self.xp, change.attention.get(layer)
        if method is None:
            heads = problem.exact(dtype=wide(problem.q)) @ xp.astype(problem.v, wide(problem.v), copy=False)
        else:
            heads = apply_method(method, problem, layer, change.generator(layer))
        heads = merge_heads(xp.astype(heads, self.dtype, copy=False))
        return self._linear(heads, f"model.layers.{layer}.self_attn.o_proj")

    def _mlp(self, layer: int, x: Array) -> Array:
        """What the feed-forward part of a layer adds, down(silu(gate x) · up x) (Shazeer 2020, arXiv 2002.05202)."""
        name = f"model.layers.{layer}"
        x = self._norm(x, f"{name}.post_attention_layernorm")
        inner = silu(self._linear(x, f"{name}.mlp.gate_proj")) * self._linear(x, f"{name}.mlp.up_proj")
        return self._linear(inner, f"{name}.mlp.down_proj")

    def _linear(self, x: Array, name: str) -> Array:
        y = x @ self.xp.matrix_transpose(self.weights[f"{name}.weight"])
        bias = f"{name}.bias"
        return y + self.weights[bias] if bias in self._biases else y

    def _norm(self, x: Array, name: str) -> Array:
        return rms_norm(x, self.weights[f"{name}.weight"], self.config.rms_norm_eps)

    # -- arguments -------------------------------------------------------------------------------------------------

    def _token_ids(self, tokens: Tokens, targets: int = 0) -> Array:
        """Token ids, validated, in the model's library; the last ``targets`` of them are not read by the model."""
        ids = self.encode(tokens) if isinstance(tokens, str) else tokens
        return from_numpy(check_tokens(ids, self.config, targets), like=self.embedding)

    def _change(
        self,
        attention: Mapping[int, Method] | None,
        rng: int | None,
        embedding: Array | Operator | None,
        tie: bool,
    ) -> Change:
        attention = check_attention(attention, self.config)
        if embedding is None:
            return Change(self.embedding, self.head, attention, check_seed(rng))
        matrix = check_matrix("embedding", embedding, self.embedding)
        head = matrix if tie and self.config.tie_word_embeddings else self.head
        return Change(matrix, head, attention, check_seed(rng))


def load_llama(
    directory: str | PathLike[str], *, dtype: Any = np.float32, like: Array | None = None, keep: bool = True
) -> LlamaModel:
    """Open a checkpoint directory in the Llama layout: config.json and safetensors weights, single or sharded.

    Names, shapes and stored dtypes are checked at once; a weight is read, and checked to be finite, when a computation
    first needs it.

    Parameters
    ----------
    directory
        Directory with config.json, the weights and, for texts, tokenizer.json.
    dtype
        In which the model computes: a name, a NumPy dtype or one of the library of ``like``. Float16 and bfloat16
        weights fit float32 exactly; a narrower ``dtype`` rounds them to nearest.
    like
        An array of the library and on the device that shall hold the weights; NumPy unless given.
    keep
        Whether weights stay in memory once read. False reads all but the embedding anew in each forward pass, for a
        model that is larger than the memory.

    Raises
    ------
    CheckpointError
        If the checkpoint is missing, broken, pickled or of another layout; the sentence names the file and the tensor.
    TypeError
        If ``dtype`` is not floating in that library.

    Examples
    --------
    >>> from nla_llm.problems.embedded import embedded_directory
    >>> load_llama(embedded_directory(), dtype="float64").dtype
    dtype('float64')
    """
    checkpoint = Checkpoint(directory)
    config = LlamaConfig.from_json(checkpoint.directory / "config.json")
    like = np.empty(0) if like is None else like
    weights = StoredWeights(checkpoint, config, like=like, dtype=library_dtype(like, dtype), keep=keep)
    return LlamaModel(config, weights, directory=checkpoint.directory)
