"""What is shipped of the fine-tuning: the full update, the adapters, held-out text, and a record with their losses."""

import json
import platform
import statistics
import time
from dataclasses import asdict
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from docstrings import PACKAGES
from lora import linear_maps, load_adapters, merge_adapters, save_adapters
from model import LanguageModel, evaluate, load_model, loss_on, write_json
from runs import ALPHA, BASE, OPTIONS, RANKS, RUNS, Run
from text import describe_text, heldout_pieces, save_pieces
from torch import Tensor
from train import draw_batch, load_checkpoint, make_optimizer

PIECES = 24  # of 1024 tokens, of the new domain


def full_update(tuned: LanguageModel, base: LanguageModel) -> dict[str, Tensor]:
    """Return name -> tuned weight - base weight of every linear map of the layers."""
    before = {name: holder[key].weight.detach() for name, holder, key in linear_maps(base)}
    return {name: holder[key].weight.detach() - before[name] for name, holder, key in linear_maps(tuned)}


def add_update(model: LanguageModel, update: dict[str, Tensor]) -> LanguageModel:
    """Add an update to the weights, in place."""
    for name, holder, key in linear_maps(model):
        holder[key].weight.data += update[name].float()
    return model


def save_update(update: dict[str, Tensor], path: Path) -> None:
    """Write an update in float16."""
    stored = {name: change.half().contiguous() for name, change in update.items()}
    safetensors.torch.save_file(stored, path, metadata={"format": "pt"})


def load_update(path: Path) -> dict[str, Tensor]:
    """Read what save_update wrote."""
    return safetensors.torch.load_file(path)


def losses(model: LanguageModel, domains: dict[str, list[Tensor]]) -> dict[str, dict]:
    """Return the losses on the pieces of every domain, and their means."""
    found = {domain: [evaluate(model, tokens) for tokens in pieces] for domain, pieces in domains.items()}
    means = {domain: round(statistics.fmean(values), 5) for domain, values in found.items()}
    return {"loss": means, "losses": {domain: [round(v, 5) for v in values] for domain, values in found.items()}}


def export_run(run: Run, work: Path, output: Path, domains: dict[str, list[Tensor]]) -> dict[str, object]:
    """Write what a run has learned, in float16, and return its record; ``loss`` is that of what was written.

    Of full fine-tunings, the first alone goes to the output, the others beside their checkpoints.
    """
    model = run.model()
    load_checkpoint(work / f"{run.name}.pt", model)
    if run.rank:
        save_adapters(model, output / run.name, ALPHA)
        stored = merge_adapters(load_adapters(load_model(BASE), output / run.name))
    else:
        path = (work if run.seed else output) / f"{run.name}.safetensors"
        save_update(full_update(model, load_model(BASE)), path)
        stored = add_update(load_model(BASE), load_update(path))
    result = json.loads((work / f"{run.name}.json").read_text())
    trained = sum(p.numel() for p in run.model().parameters() if p.requires_grad)
    record = {"rank": run.rank, "seed": run.seed, "lr": result["options"]["lr"], "trained_parameters": trained}
    record |= losses(stored, domains) | {"loss_before_cast": losses(model, {"new": domains["new"]})["loss"]}
    return record | {key: result[key] for key in ("step", "tokens", "seconds", "curve")}


def export(work: Path, output: Path, texts: dict[str, str], files: dict[str, dict[str, Tensor]]) -> None:
    """Write the folder that is shipped, of the runs that are finished."""
    finished = [run for run in RUNS.values() if (work / f"{run.name}.json").exists()]
    output.mkdir(parents=True, exist_ok=True)
    pieces, train_tokens = heldout_pieces(files["heldout"], number=PIECES), torch.cat([*files["train"].values()])
    save_pieces(output / "heldout.npz", pieces)
    domains = {"new": [*pieces.values()], "old": read_pieces(BASE / "heldout.npz")}
    record: dict[str, object] = {"base": losses(load_model(BASE), domains)}
    record["runs"] = {run.name: export_run(run, work, output, domains) for run in finished}
    if Run(0, 1) in finished:
        first, second = load_update(output / "full-0.safetensors"), load_update(work / "full-1.safetensors")
        record["second_full_update"] = distances(first, second)
    record["step_processor_seconds"] = step_seconds([Run(rank, 0) for rank in (0, *RANKS)], train_tokens)
    record["searches"] = {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("search-*.json"))}
    record["options"] = {key: value for key, value in asdict(OPTIONS).items() if key not in {"lr", "seed", "minutes"}}
    record["text"] = describe(texts, files, train_tokens)
    record["versions"] = versions()
    write_json(output / "training.json", record)


def describe(texts: dict[str, str], files: dict[str, dict[str, Tensor]], train_tokens: Tensor) -> dict[str, object]:
    """Return what identifies the text and its split."""
    found = describe_text(texts, train_tokens, files["validation"])
    heldout = {"heldout_files": [*files["heldout"]], "heldout_tokens": sum(map(len, files["heldout"].values()))}
    return found | heldout


def read_pieces(path: Path) -> list[Tensor]:
    """Return the tokens of every piece that save_pieces wrote."""
    with np.load(path) as held:
        tokens, offsets = torch.from_numpy(held["tokens"].astype(np.int64)), held["offsets"].tolist()
    return [tokens[a:b] for a, b in pairwise(offsets)]


def distances(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Return, matrix by matrix, how far a second full update is from the first: what other batches alone change."""
    norm = torch.linalg.matrix_norm
    return {
        name: {
            word: round((norm((second[name] - a).double(), kind) / norm(a.double(), kind)).item(), 5)
            for word, kind in {"frobenius": "fro", "spectral": 2}.items()
        }
        for name, a in first.items()
    }


def step_seconds(runs: list[Run], tokens: Tensor, steps: int = 12) -> dict[str, dict[str, float]]:
    """Return the processor seconds of a training step of each run, which take turns: median, least and most."""
    models = {run.name: run.model() for run in runs}
    optimizers = {name: make_optimizer(model, OPTIONS) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for step in range(steps + 1):
        for name, model in models.items():
            windows, begin = draw_batch(tokens, step, 0.0, OPTIONS), time.process_time()
            optimizers[name].zero_grad()
            loss_on(model, windows).backward()
            optimizers[name].step()
            if step:  # the first one allocates
                seconds[name].append(time.process_time() - begin)
    ends = {"median": statistics.median, "least": min, "most": max}
    return {name: {word: round(f(s), 4) for word, f in ends.items()} for name, s in seconds.items()}


def versions() -> dict[str, str]:
    """Return the versions of what trained and of the packages whose docstrings were read."""
    found = {name: version(name).split("+")[0] for name in ("torch", "tokenizers", *PACKAGES)}
    return found | {"python": platform.python_version()}
