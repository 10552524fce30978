"""Fine-tune the embedded language model on docstrings of NumPy, SciPy and SymPy: in full, and by LoRA of several ranks.

Every run sees as many tokens and changes the same matrices, the linear maps of all layers; embedding and norms stay.
A run is called ``full-SEED`` or ``lora-RANK-SEED``. Its learning rate is chosen on the validation files by short runs,
once for all seeds. Runs can be shared out over processes, which keep their results in one folder; the last call
exports.

    python studies/tiny_lm/finetune.py --work runs/                      # all of them, resumed where they stopped
    python studies/tiny_lm/finetune.py --work runs/ --runs lora-4-0 lora-4-1
    python studies/tiny_lm/finetune.py --work runs/ --export nla_llm/data/tiny_lm_updates
"""

import argparse
import json
import logging
import math
from dataclasses import asdict, replace
from pathlib import Path

import tokenizers
import torch
from docstrings import read_docstrings, split_names
from export import export
from model import evaluate, write_json
from runs import BASE, OPTIONS, RUNS, Run
from text import encode
from torch import Tensor
from train import Options, train

log = logging.getLogger("tiny_lm")

# rank -> the rank whose search sets its learning rate; with rsLoRA's scaling the best rate hardly depends on the rank
SEARCHED = {0: 0, 1: 1, 2: 4, 4: 4, 8: 4, 16: 16}
FIRST_RATE = {True: 1e-3, False: 1e-2}  # of the full fine-tuning, of LoRA: where the search begins


def read_tokens(texts: dict[str, str]) -> dict[str, dict[str, Tensor]]:
    """Return part of the split -> file -> its tokens."""
    tokenizer, parts = tokenizers.Tokenizer.from_file(str(BASE / "tokenizer.json")), split_names(texts)
    return {part: encode(tokenizer, {name: texts[name] for name in names}) for part, names in parts.items()}


def search_rate(rank: int, tokens: dict[str, Tensor], path: Path, options: Options, steps: int = 64) -> float:
    """Return the best learning rate on a grid of three a decade; the grid grows until its best is not at its edge.

    Each is judged by the validation loss after a short run of seed 0. The result is kept in the file ``path``.
    """
    found: dict[float, float] = {}
    if path.exists():
        return json.loads(path.read_text())["lr"]

    def loss(exponent: int) -> float:
        if exponent not in found:
            model, lr = Run(rank, 0).model(), rate(exponent)
            short = replace(options, steps=steps, lr=lr, seed=0, evaluate_every=steps)
            train(model, tokens["train"], short)
            found[exponent] = evaluate(model, tokens["validation"], windows=options.evaluate_windows)
            log.info(json.dumps({"rank": rank, "lr": lr, "validation": found[exponent]}))
        return found[exponent]

    def rate(exponent: int) -> float:
        return float(f"{FIRST_RATE[rank == 0] * 10 ** (exponent / 3):.2g}")

    best = 0
    while (lowest := min((best - 1, best, best + 1), key=loss)) != best:
        best = lowest
    curve = [{"lr": rate(e), "validation": found[e]} for e in sorted(found)]
    write_json(path, {"lr": rate(best), "steps": steps, "curve": curve})
    return rate(best)


def execute(run: Run, tokens: dict[str, Tensor], work: Path, options: Options) -> None:
    """Train, resumed where there is a checkpoint."""
    lr = search_rate(rank := SEARCHED[run.rank], tokens, work / f"search-{rank}.json", options)
    log.info(f"{run.name} lr {lr}")
    model, options = run.model(), replace(options, lr=lr, seed=run.seed)
    progress = train(
        model, tokens["train"], options, validation=tokens["validation"], checkpoint=work / f"{run.name}.pt"
    )
    if not math.isfinite(progress.curve[-1]["train"]):
        raise FloatingPointError(f"{run.name} diverged at learning rate {lr}")
    write_json(work / f"{run.name}.json", {"options": asdict(options)} | asdict(progress))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and results")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN")
    parser.add_argument("--export", type=Path, help="folder for what is shipped of the finished runs; trains nothing")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    texts = read_docstrings()
    files = read_tokens(texts)
    if args.export:
        export(args.work, args.export, texts, files)
        return
    tokens = {part: torch.cat([*files[part].values()]) for part in files}
    for name in args.runs:
        execute(RUNS[name], tokens, args.work, OPTIONS)


if __name__ == "__main__":
    main()
