"""Train, or go on training, a small causal language model in the Llama layout, on a CPU in less than an hour.

The text is the Python standard library unless ``--text`` names other files or folders. Everything that a reader of the
weights needs goes to ``--output``: config.json, model.safetensors, tokenizer.json, heldout.npz, training.json.

    python studies/tiny_lm/train.py --minutes 45 --checkpoint run.pt --output nla_llm/data/tiny_lm
    python studies/tiny_lm/train.py --init nla_llm/data/tiny_lm --text notes/ --steps 200 --lr 3e-4 --output tuned
"""

import argparse
import json
import logging
import math
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import tokenizers
import torch
from model import Config, LanguageModel, evaluate, head_entropies, load_model, loss_on, save_model, write_json
from text import (
    describe_text,
    encode,
    heldout_names,
    heldout_pieces,
    read_texts,
    save_pieces,
    train_tokenizer,
    unigram_entropy,
)
from torch import Tensor, nn

log = logging.getLogger("tiny_lm")


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
