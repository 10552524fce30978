"""Time against length, and memory at 65 536 tokens, of every method: does it grow as its formula says?

    python benchmarks/scale.py [LABEL ...] [--n 4096 8192 16384 32768 65536] [--dim 64] [--budget 256] [--repeats 3]

One head in float32. Each method runs in a process of its own, whose largest resident memory is that of the longest
length. Prints a table and returns; it never fails because of a time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
from _timing import load_note, machine
from rich.console import Console
from rich.table import Table

import nla_llm as nl
from nla_llm.study.roster import ROSTER, Entry

LIMIT = 900.0  # seconds for one method at all lengths


def made(entry: Entry, budget: int) -> object:
    """The method, its degree as it is where the budget is a degree."""
    method = entry.make()
    return method if entry.budget in {None, "degree"} else replace(method, **{entry.budget: budget})


def measure(label: str, lengths: list[int], d: int, budget: int, repeats: int) -> dict[str, object]:
    """Seconds and operations at each length, and the memory of the whole."""
    method, seconds, operations = made(ROSTER[label], budget), [], []
    for n in lengths:
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((n, d), dtype=np.float32) for _ in range(3))
        problem, times = nl.AttentionProblem(0.5 * q, 0.5 * k, v), []
        for _ in range(repeats):
            start = time.perf_counter()
            method(problem, rng=0) @ v
            times.append(time.perf_counter() - start)
        seconds.append(statistics.median(times))
        operations.append(float(method.cost(problem).at(problem, method).total()))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"seconds": seconds, "operations": operations, "memory": memory}


def exponent(lengths: list[int], values: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", nargs="*", metavar="LABEL", help="as in nla_llm.study.roster; all by default")
    parser.add_argument("--n", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--budget", type=int, default=256, help="features, landmarks, keys: the budget of each method")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        found = measure(options.labels[0], options.n, options.dim, options.budget, options.repeats)
        sys.stdout.write(json.dumps(found))
        return
    console = Console(width=150)
    console.print(f"{machine()} · {load_note()} at the start")
    title = f"one head, float32, d={options.dim}, budget {options.budget}; medians of {options.repeats}"
    table = Table("method", *(f"s, n={n}" for n in options.n), "exponent", "by formula", "GB", title=title)
    for label in options.labels or ROSTER:
        command = [sys.executable, __file__, label, "--alone", "--n", *map(str, options.n)]
        command += ["--dim", str(options.dim), "--budget", str(options.budget), "--repeats", str(options.repeats)]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)  # noqa: S603 - our own file
        except subprocess.TimeoutExpired:
            table.add_row(label, *["" for _ in options.n], f"not finished in {LIMIT:.0f} s")
            continue
        if run.returncode:
            table.add_row(label, *["" for _ in options.n], (run.stderr.strip().splitlines() or ["ended"])[-1][:60])
            continue
        found = json.loads(run.stdout)
        slopes = (exponent(options.n, found[what]) for what in ("seconds", "operations"))
        table.add_row(
            label, *(f"{s:.3f}" for s in found["seconds"]), *(f"{s:.2f}" for s in slopes), f"{found['memory']:.2f}"
        )
    console.print(table)
    console.print(f"{load_note()} at the end, this run included")


if __name__ == "__main__":
    main()
