"""The language model that is trained: a small Transformer in the Llama layout, its files and its loss."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, the customary name

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "attention_bias": False}
LLAMA |= {"mlp_bias": False, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0}


@dataclass(frozen=True)
class Config:
    """Shape of the model, with the names and meanings of transformers' LlamaConfig."""

    vocab_size: int = 2048
    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 512
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


def rotate(x: Tensor, theta: float) -> Tensor:
    """Apply rotary positions to x (..., n, d): coordinate i is paired with i + d/2 (the "rotate half" convention)."""
    n, half = x.shape[-2], x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float32, device=x.device) / half)
    angle = torch.outer(torch.arange(n, dtype=torch.float32, device=x.device), frequency)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def linear_maps(**shapes: tuple[int, int]) -> nn.ModuleDict:
    """Return named matrices without bias, from (inputs, outputs)."""
    return nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})


class Layer(nn.Module):
    """One pre-norm Transformer layer: causal grouped-query attention, then SwiGLU."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c, n, m = c, c.hidden_size, c.intermediate_size
        query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.self_attn = linear_maps(q_proj=(n, query), k_proj=(n, key), v_proj=(n, key), o_proj=(query, n))
        self.mlp = linear_maps(gate_proj=(n, m), up_proj=(n, m), down_proj=(m, n))
        self.input_layernorm = nn.RMSNorm(n, c.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(n, c.rms_norm_eps)

    def queries_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return q and k with their positions, both (batch, query heads, n, head_dim), from x after its norm."""
        q, k = self._heads(self.self_attn.q_proj(x)), self._heads(self.self_attn.k_proj(x))
        return rotate(q, self.c.rope_theta), rotate(k, self.c.rope_theta)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (batch, n, hidden) to the same shape."""
        y = self.input_layernorm(x)
        (q, k), v = self.queries_keys(y), self._heads(self.self_attn.v_proj(y))
        x = x + self.self_attn.o_proj(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )
        y = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(y)) * self.mlp.up_proj(y))

    def _heads(self, x: Tensor) -> Tensor:
        """Split into heads; those of keys and values are repeated for all the queries they serve."""
        x = x.unflatten(-1, (-1, self.c.head_dim)).transpose(1, 2)
        return x.repeat_interleave(self.c.num_attention_heads // x.shape[1], dim=1)


class LanguageModel(nn.Module):
    """The whole model; its output matrix is the embedding."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size)})
        self.model["layers"] = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.model["norm"] = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def initialise(self, seed: int) -> "LanguageModel":
        """Draw all matrices anew; what is added to the residual stream starts smaller, by the number of additions."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.05 if "embed" in name else p.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * self.config.num_hidden_layers)
                nn.init.normal_(p, std=std, generator=generator)
        return self

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids (batch, n) to logits (batch, n, vocabulary)."""
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = layer(x)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def save_model(model: LanguageModel, directory: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write config.json and model.safetensors, which transformers.LlamaForCausalLM reads."""
    directory.mkdir(parents=True, exist_ok=True)
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": model.config.rope_theta}}
    dtype_name = {"dtype": str(dtype).removeprefix("torch.")}
    write_json(directory / "config.json", LLAMA | asdict(model.config) | rope | dtype_name)
    state = {name: t.detach().to("cpu", dtype).contiguous() for name, t in model.state_dict().items()}
    safetensors.torch.save_file(state, directory / "model.safetensors", metadata={"format": "pt"})


def load_model(directory: Path, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Read what save_model wrote; the stored weights are converted to dtype."""
    stored = json.loads((directory / "config.json").read_text())
    model = LanguageModel(Config(**{name: stored[name] for name in Config.__dataclass_fields__})).to(dtype)
    model.load_state_dict(safetensors.torch.load_file(directory / "model.safetensors"))
    return model


def loss_on(model: LanguageModel, windows: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per token of windows (batch, context + 1)."""
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LanguageModel, tokens: Tensor, context: int = 1024, windows: int | None = None) -> float:
    """Return the loss on disjoint windows of tokens (n,): all of them, or the given number evenly spread."""
    context = min(context, len(tokens) - 1)
    starts = range(0, len(tokens) - context, context)
    chosen = starts if windows is None else [starts[i * len(starts) // windows] for i in range(windows)]
    values = [loss_on(model, tokens[None, s : s + context + 1]).item() for s in chosen]
    return float(np.mean(values))


@torch.no_grad()
def head_entropies(model: LanguageModel, tokens: Tensor) -> list[list[float]]:
    """Return, per layer and head, the mean over rows of entropy / log(visible keys), for tokens (n,)."""
    n, x, result = len(tokens), model.model.embed_tokens(tokens[None]), []
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
    for layer in model.model.layers:
        q, k = layer.queries_keys(layer.input_layernorm(x))
        p = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf).softmax(-1).double()
        entropy = torch.special.entr(p).sum(-1)[..., 1:] / torch.arange(2, n + 1).log()
        result.append(entropy.mean((0, 2)).tolist())
        x = layer(x)
    return result


def write_json(path: Path, content: dict) -> None:
    """Write content as indented JSON."""
    path.write_text(json.dumps(content, indent=1) + "\n")
