"""Train, or go on training, a small causal language model in the Llama layout, on a CPU in less than an hour.

The text is the Python standard library unless ``--text`` names other files or folders. Everything that a reader of the
weights needs goes to ``--output``: config.json, model.safetensors, tokenizer.json, heldout.npz, training.json.

    python studies/tiny_lm/train.py --minutes 45 --checkpoint run.pt --output nla_llm/data/tiny_lm
    python studies/tiny_lm/train.py --init nla_llm/data/tiny_lm --text notes/ --steps 200 --lr 3e-4 --output tuned
"""

import argparse
import hashlib
import json
import logging
import math
import platform
import sysconfig
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import tokenizers
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, the customary name

log = logging.getLogger("tiny_lm")
END = "<|endoftext|>"  # token 0, in front of every file
SKIPPED = {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}  # encodings: tables, no language
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


@dataclass(frozen=True)
class Options:
    """How to train. With ``steps`` the schedule counts steps and is reproducible; else it follows the clock."""

    minutes: float = 45.0
    steps: int | None = None
    lr: float = 3e-3
    warmup: float = 0.02  # as a share of the run, like short_share
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    batch_tokens: int = 4096
    context: int = 1024
    short_context: int = 256
    short_share: float = 0.6
    seed: int = 0
    evaluate_every: int = 100  # steps
    evaluate_windows: int = 16
    checkpoint_every: int = 100  # steps


@dataclass
class Progress:
    """Where a run stands; stored in its checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def share(self, options: Options) -> float:
        """Return the finished share of the run, in [0, 1]."""
        done = self.seconds / (60 * options.minutes) if options.steps is None else self.step / options.steps
        return min(done, 1.0)


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


def unigram_entropy(tokens: Tensor, vocabulary: int, other: Tensor | None = None) -> float:
    """Return the entropy of tokens, or their cross-entropy under the (add-one) frequencies of other tokens."""
    p = torch.bincount(tokens, minlength=vocabulary).double()
    q = p if other is None else torch.bincount(other, minlength=vocabulary).double() + 1
    return -torch.xlogy(p / p.sum(), q / q.sum()).sum().item()


def draw_batch(tokens: Tensor, step: int, share: float, options: Options) -> Tensor:
    """Draw random windows (batch, context + 1) that depend on the seed and the step alone."""
    context = options.short_context if share < options.short_share else options.context
    context = min(context, len(tokens) - 2)
    generator = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - context, (max(1, options.batch_tokens // context),), generator=generator)
    return tokens[starts[:, None] + torch.arange(context + 1)]


def learning_rate(share: float, options: Options) -> float:
    """Return the linear warm-up followed by a cosine down to zero."""
    if share < options.warmup:
        return options.lr * max(share / options.warmup, 0.01)
    return options.lr * 0.5 * (1 + math.cos(math.pi * (share - options.warmup) / (1 - options.warmup)))


def make_optimizer(model: nn.Module, options: Options) -> torch.optim.AdamW:
    """Return AdamW over the parameters that ask for gradients; only the layers' matrices decay."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[p.ndim == 2 and "embed" not in name].append(p)
    decay = [{"params": p, "weight_decay": options.weight_decay * wanted} for wanted, p in groups.items() if p]
    return torch.optim.AdamW(decay, lr=options.lr, betas=options.betas)


def train(
    model: LanguageModel,
    tokens: Tensor,
    options: Options,
    *,
    validation: Tensor | None = None,
    checkpoint: Path | None = None,
) -> Progress:
    """Train model in place on tokens (n,), going on from the checkpoint where there is one.

    Only parameters with ``requires_grad`` move. With ``options.steps`` the result is the same however often it stopped.
    """
    optimizer, progress, total = make_optimizer(model, options), Progress(), 0.0
    if checkpoint is not None and checkpoint.exists():
        progress = load_checkpoint(checkpoint, model, optimizer)
    begin, since = time.monotonic() - progress.seconds, progress.step
    while (share := progress.share(options)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(share, options)
        windows = draw_batch(tokens, progress.step, share, options)
        loss = loss_on(model, windows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
        progress.step += 1
        progress.tokens += windows[:, 1:].numel()
        progress.seconds = time.monotonic() - begin
        total += loss.item()
        last = progress.share(options) >= 1
        if last or progress.step % options.evaluate_every == 0:
            record(progress, total / (progress.step - since), model, validation, options)
            total, since = 0.0, progress.step
        if checkpoint is not None and (last or progress.step % options.checkpoint_every == 0):
            save_checkpoint(checkpoint, model, optimizer, progress)
    return progress


def record(progress: Progress, loss: float, model: LanguageModel, validation: Tensor | None, options: Options) -> None:
    """Append one point to the training curve."""
    point = {"step": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 1)}
    point["train"] = round(loss, 4)
    if validation is not None:
        point["validation"] = round(evaluate(model, validation, options.context, options.evaluate_windows), 4)
    progress.curve.append(point)
    log.info(json.dumps(point))


def save_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write the state of a run; an interrupted write leaves the former file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(progress)}
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Progress:
    """Read the state of a run into model and optimizer."""
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    if optimizer is not None:
        optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])


def read_texts(roots: list[Path]) -> dict[str, str]:
    """Return name -> text of the files under roots (no roots: the standard library), names relative to their root."""
    pattern, skipped, texts = ("*", set(), {}) if roots else ("*.py", SKIPPED, {})
    for root in roots or [Path(sysconfig.get_path("stdlib"))]:
        for path in [root] if root.is_file() else root.rglob(pattern):
            name = path.relative_to(root.parent if root.is_file() else root)
            # _sysconfigdata describes the machine that Python was built on
            if path.is_file() and not skipped & set(name.parts) and not path.name.startswith("_sysconfigdata"):
                texts[name.as_posix()] = path.read_text(encoding="utf-8", errors="replace")
    return {name: texts[name] for name in sorted(texts) if texts[name].strip()}


def name_hash(name: str) -> int:
    """Return 64 bits that depend on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def heldout_names(names: Iterable[str], every: int = 32) -> list[str]:
    """Choose whole files for validation by the hash of their name: one in ``every``, and at least one."""
    ranked = sorted(names, key=name_hash)
    if len(ranked) < 2:
        raise ValueError(f"text has {len(ranked)} non-empty files; give at least two, one of them is held out")
    return sorted([name for name in ranked if name_hash(name) % every == 0] or ranked[:1])


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> tokenizers.Tokenizer:
    """Return a byte-level BPE."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: dict[str, str]) -> dict[str, Tensor]:
    """Return name -> token ids, every text led by the end-of-text token."""
    coded = tokenizer.encode_batch([END + text for text in texts.values()])
    return {name: torch.tensor(c.ids) for name, c in zip(texts, coded, strict=True)}


def heldout_pieces(heldout: dict[str, Tensor], length: int = 1024, number: int = 8) -> dict[str, Tensor]:
    """Return name -> the first ``length`` tokens of the first files by name_hash that are long enough (or longest)."""
    ranked = sorted(heldout, key=lambda name: (-min(len(heldout[name]), length), name_hash(name)))
    whole = [name for name in ranked if len(heldout[name]) >= length] or ranked[:1]
    return {name: heldout[name][:length] for name in whole[:number]}


def save_pieces(path: Path, pieces: dict[str, Tensor]) -> None:
    """Write tokens (uint16), offsets (piece i is tokens[offsets[i] : offsets[i + 1]]) and the files they begin."""
    offsets = np.cumsum([0, *map(len, pieces.values())])
    np.savez(path, tokens=torch.cat(list(pieces.values())).numpy().astype(np.uint16), offsets=offsets, files=[*pieces])


def write_json(path: Path, content: dict) -> None:
    """Write content as indented JSON."""
    path.write_text(json.dumps(content, indent=1) + "\n")


def describe_text(texts: dict[str, str], train_tokens: Tensor, heldout: dict[str, Tensor]) -> dict[str, object]:
    """Return what identifies the text: its listing has a line "sha256  name" per file, in the order of the names."""
    listing = "".join(f"{hashlib.sha256(t.encode()).hexdigest()}  {name}\n" for name, t in texts.items())
    result = {"files": len(texts), "bytes": sum(len(t.encode()) for t in texts.values())}
    result |= {"listing_sha256": hashlib.sha256(listing.encode()).hexdigest(), "validation_files": [*heldout]}
    return result | {"train_tokens": len(train_tokens), "validation_tokens": sum(map(len, heldout.values()))}


def measure(model: LanguageModel, rounded: LanguageModel, train_tokens: Tensor, heldout: dict[str, Tensor]) -> dict:
    """Return the losses of a trained model and of its rounded copy, which is the one that is stored."""
    validation, size, pieces = torch.cat([*heldout.values()]), model.config.vocab_size, heldout_pieces(heldout)
    entropies = np.mean([head_entropies(rounded, piece) for piece in pieces.values()], axis=0)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation_loss_before_cast": evaluate(model, validation),
        "validation_loss": evaluate(rounded, validation),
        "validation_unigram_entropy": unigram_entropy(validation, size),
        "validation_cross_entropy_under_train_unigrams": unigram_entropy(validation, size, train_tokens),
        "heldout_losses": {name: round(evaluate(rounded, piece), 4) for name, piece in pieces.items()},
        "relative_row_entropy": entropies.round(4).tolist(),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; every field of Options is an option."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--text", nargs="+", type=Path, default=[], help="files or folders (default: the standard library)")
    add("--output", type=Path, required=True, help="folder for the model")
    add("--init", type=Path, help="folder of a model, tokenizer included, to go on from")
    add("--checkpoint", type=Path, help="file for the state of the run, which is resumed where it exists")
    add("--export-only", action="store_true", help="write the output from the checkpoint, without training")
    add("--threads", type=int, default=2)
    for name, value in asdict(Options()).items():
        kind = {"type": int if name == "steps" else type(value)} if name != "betas" else {"type": float, "nargs": 2}
        add("--" + name.replace("_", "-"), default=value, **kind, help=f"(default: {value})")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    options = Options(**{name: getattr(args, name) for name in Options.__dataclass_fields__})
    texts = read_texts(args.text)
    apart = heldout_names(texts)
    kept = {name: text for name, text in texts.items() if name not in apart}
    if args.init:
        tokenizer, model = tokenizers.Tokenizer.from_file(str(args.init / "tokenizer.json")), load_model(args.init)
    else:
        model = LanguageModel(Config()).initialise(options.seed)
        tokenizer = train_tokenizer(kept.values(), model.config.vocab_size)
    heldout, tokens = encode(tokenizer, {n: texts[n] for n in apart}), torch.cat(list(encode(tokenizer, kept).values()))
    if args.export_only:
        progress = load_checkpoint(args.checkpoint, model)
    else:
        validation = torch.cat([*heldout.values()])
        progress = train(model, tokens, options, validation=validation, checkpoint=args.checkpoint)
    save_model(model, args.output)
    tokenizer.save(str(args.output / "tokenizer.json"))
    save_pieces(args.output / "heldout.npz", heldout_pieces(heldout))
    report = measure(model, load_model(args.output), tokens, heldout)
    log.info(json.dumps(report))
    versions = {m.__name__: m.__version__.split("+")[0] for m in (torch, tokenizers, np)}
    report |= {"versions": versions | {"python": platform.python_version()}, "options": asdict(options)}
    report |= {"text": describe_text(texts, tokens, heldout)} | asdict(progress)
    write_json(args.output / "training.json", report)


if __name__ == "__main__":
    main()
