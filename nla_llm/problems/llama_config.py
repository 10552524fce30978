"""Shape of a Llama-layout language model, as its config.json states it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

import numpy as np

from nla_llm.problems.checkpoint import CheckpointError, read_json

if TYPE_CHECKING:
    from os import PathLike

    from numpy.typing import NDArray

__all__ = ["LlamaConfig", "Rotary"]

_ROTARY_KINDS = ("default", "linear", "llama3")


@final
@dataclass(frozen=True)
class Rotary:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): coordinates i and i + d/2 turn by position × frequency_i.

    Parameters
    ----------
    theta
        Base of the frequencies θ^(−2i/d).
    kind
        'default'; 'linear': all frequencies divided by ``factor`` (Chen et al. 2023, arXiv 2306.15595); or 'llama3':
        those whose wavelength exceeds ``original_length / low_freq_factor`` divided, those under ``original_length /
        high_freq_factor`` kept, a blend between them (Llama 3.1).
    factor, low_freq_factor, high_freq_factor, original_length
        Parameters of the kinds that use them.

    Examples
    --------
    >>> Rotary(theta=100.0).frequencies(4).tolist()
    [1.0, 0.1]
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192

    def frequencies(self, head_dim: int) -> NDArray[np.float64]:
        """Radians per position of each pair of coordinates, (head_dim / 2,), in float64."""
        frequency = np.float64(self.theta) ** (-np.arange(0, head_dim, 2) / head_dim)
        if self.kind == "linear":
            return np.asarray(frequency / self.factor)
        if self.kind == "llama3":
            turns = self.original_length * frequency / (2 * np.pi)  # of this pair over the original context
            kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
            return np.asarray((kept + (1 - kept) / self.factor) * frequency)
        return np.asarray(frequency)


@final
@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape of a model in the Llama layout; names, meanings and defaults are those of config.json.

    Examples
    --------
    >>> config = LlamaConfig(vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1,
    ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=2)
    >>> config.shapes()["model.layers.0.self_attn.k_proj.weight"]
    (2, 4)
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    rotary: Rotary = field(default_factory=Rotary)

    @classmethod
    def from_json(cls, source: str | PathLike[str] | Mapping[str, Any]) -> Self:
        """Read a config.json, or the mapping that it holds.

        Raises
        ------
        CheckpointError
            If the file is missing, describes another layout, lacks a size, or asks for what is not implemented.
        """
        if isinstance(source, Mapping):
            return cls._parse(_Source("config.json", source))
        path = Path(source)
        return cls._parse(_Source(str(path), read_json(path, missing="a model needs it beside its weights")))

    @classmethod
    def _parse(cls, source: _Source) -> Self:
        _check_layout(source)
        heads, hidden = source.size("num_attention_heads"), source.size("hidden_size")
        kv_heads = source.size("num_key_value_heads", heads)
        head_dim = source.size("head_dim", hidden // heads)
        length = source.size("max_position_embeddings", 2048)
        if heads % kv_heads:
            raise source.error(f"num_attention_heads = {heads} is no multiple of num_key_value_heads = {kv_heads}")
        if head_dim % 2:
            raise source.error(f"head_dim = {head_dim} is odd, rotary positions turn pairs of coordinates")
        return cls(
            vocab_size=source.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=source.size("intermediate_size"),
            num_hidden_layers=source.size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=length,
            rms_norm_eps=source.positive("rms_norm_eps", 1e-6),
            attention_bias=source.flag("attention_bias"),
            mlp_bias=source.flag("mlp_bias"),
            tie_word_embeddings=source.flag("tie_word_embeddings"),
            rotary=_parse_rotary(source, length),
        )

    @property
    def group(self) -> int:
        """Query heads that share a key-value head, g."""
        return self.num_attention_heads // self.num_key_value_heads

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all weights; a matrix is (outputs, inputs)."""
        hidden, inner, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
        mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{prefix}.{norm}.weight"] = (hidden,)
            for block, parts, bias in (("self_attn", attention, self.attention_bias), ("mlp", mlp, self.mlp_bias)):
                for name, shape in parts.items():
                    shapes[f"{prefix}.{block}.{name}.weight"] = shape
                    if bias:
                        shapes[f"{prefix}.{block}.{name}.bias"] = shape[:1]
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes


# -- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A mapping out of a file, and values checked on the way out of it."""

    name: str
    content: Mapping[str, Any]

    def error(self, sentence: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {sentence}")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.content.get(key)
        value = default if value is None else value
        if value is None:
            raise self.error(f"{key!r} is missing")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if type(value) is not int or value < 1:
            raise self.error(f"{key} = {value!r} is not a positive integer")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in {int, float} or not 0 < value < float("inf"):
            raise self.error(f"{key} = {value!r} is not a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise self.error(f"{key} = {value!r} is neither true nor false")
        return value


def _check_layout(source: _Source) -> None:
    """Refuse what the forward pass does not implement."""
    kind, architectures = source.content.get("model_type"), source.content.get("architectures")
    if kind != "llama" or (architectures and "LlamaForCausalLM" not in architectures):
        raise source.error(
            f"model_type = {kind!r} with architectures = {architectures!r} is not supported; "
            "model_type 'llama' with architecture 'LlamaForCausalLM' is"
        )
    if (act := source.get("hidden_act", "silu")) not in {"silu", "swish"}:
        raise source.error(f"hidden_act = {act!r} is not supported; 'silu' is")
    if source.content.get("quantization_config"):
        raise source.error("quantised weights (quantization_config) are not supported; pass the unquantised checkpoint")


def _parse_rotary(source: _Source, length: int) -> Rotary:
    """Read ``rope_parameters``, or ``rope_scaling`` with ``rope_theta`` as older files write it."""
    nested = source.content.get("rope_parameters") or source.content.get("rope_scaling") or {}
    if not isinstance(nested, Mapping):
        raise source.error(f"rope_parameters = {nested!r} is not an object")
    _check_one_rotary(source, nested)
    outer = {"rope_theta": source.content.get("rope_theta"), "original_max_position_embeddings": length}
    rope = _Source(f"{source.name}, rotary positions", outer | {k: v for k, v in nested.items() if v is not None})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in _ROTARY_KINDS:
        raise rope.error(f"type {kind!r} is not supported; {', '.join(_ROTARY_KINDS)} are")
    if rope.get("partial_rotary_factor", source.get("partial_rotary_factor", 1.0)) != 1.0:
        raise rope.error("partial_rotary_factor other than 1 is not supported")
    theta = rope.positive("rope_theta", 10000.0)
    if kind == "default":
        return Rotary(theta)
    if kind == "linear":
        return Rotary(theta, kind, rope.positive("factor"))
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if low >= high:
        raise rope.error(f"low_freq_factor = {low} is not below high_freq_factor = {high}")
    original = rope.size("original_max_position_embeddings")
    return Rotary(theta, kind, rope.positive("factor"), low, high, original)


def _check_one_rotary(source: _Source, nested: Mapping[str, Any]) -> None:
    """Refuse a file that states rotary positions twice, and differently: readers disagree on which holds."""
    if not source.content.get("rope_parameters"):
        return
    for key, twin in (("rope_scaling", dict(nested)), ("rope_theta", nested.get("rope_theta"))):
        value = source.content.get(key)
        if value is not None and twin is not None and value != twin:
            raise source.error(f"{key} = {value!r} contradicts rope_parameters = {dict(nested)!r}; remove one of them")
