"""Time against length, and memory at the longest, of every method of linear cost: does it grow as its formula says?

    python benchmarks/scale.py [LABEL ...] [--n 4096 8192 16384 32768 65536] [--dim 64] [--budget 256] [--repeats 3]
                               [--causal]

One head in float32; with ``--causal`` the causal forms of those that have one. By default all methods of the roster
whose operations grow more slowly than n^1.5 between the shortest and the longest length: the others, and oracles, are
named below the table. Each method runs in a process of its own, whose largest resident memory, NumPy and the
interpreter included, is that of the longest length. Prints a table and returns; it never fails because of a time.
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
LINEAR = 1.5  # largest exponent of the operations of a method that is run by default
BUDGETS = {"PolySketch, degree 4": lambda budget: int((2 * budget) ** 0.5)}  # of m(m + 1)/2 features


def made(label: str, budget: int) -> object:
    """The method, its degree as it is where the budget is a degree."""
    entry: Entry = ROSTER[label]
    method = entry.make()
    if entry.budget in {None, "degree"}:
        return method
    return replace(method, **{entry.budget: BUDGETS.get(label, int)(budget)})


def operations(method: object, n: int, d: int, *, causal: bool) -> float:
    """Operations by formula."""
    x = np.zeros((n, d), np.float32)
    problem = nl.AttentionProblem(x, x, x, causal=causal)
    return float(method.cost(problem).at(problem, method).total())


def measure(label: str, options: argparse.Namespace) -> dict[str, object]:
    """Seconds at each length, and the memory of the whole."""
    method, seconds = made(label, options.budget), []
    for n in options.n:
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal((n, options.dim), dtype=np.float32) for _ in range(3))
        problem, times = nl.AttentionProblem(0.5 * q, 0.5 * k, v, causal=options.causal), []
        for _ in range(options.repeats):
            start = time.perf_counter()
            method(problem, rng=0) @ v
            times.append(time.perf_counter() - start)
        seconds.append(statistics.median(times))
    return {"seconds": seconds, "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def exponent(lengths: list[int], values: list[float]) -> float:
    """Slope of the least-squares line through the logarithms."""
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def chosen(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Labels to be run, and those of methods that are not of linear cost."""
    run, left_out = [], []
    for label, entry in ROSTER.items():
        method = made(label, options.budget)
        if options.causal and "causal" not in method.properties.supports:
            continue
        ends = [min(options.n), max(options.n)]
        work = [operations(method, n, options.dim, causal=options.causal) for n in ends]
        dear = bool(entry.oracle) or (ends[0] < ends[1] and exponent(ends, work) > LINEAR)
        (left_out if dear else run).append(label)
    return run, left_out


def row(label: str, options: argparse.Namespace) -> list[str]:
    """Seconds, the two exponents and the memory of a method, or why there are none."""
    command = [sys.executable, __file__, label, "--alone", "--n", *map(str, options.n), "--dim", str(options.dim)]
    command += ["--budget", str(options.budget), "--repeats", str(options.repeats)]
    command += ["--causal"] if options.causal else []
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)  # noqa: S603 - our own file
    except subprocess.TimeoutExpired:
        return [*["" for _ in options.n], f"not finished in {LIMIT:.0f} s"]
    if run.returncode:
        return [*["" for _ in options.n], (run.stderr.strip().splitlines() or ["ended"])[-1][:60]]
    found, method = json.loads(run.stdout), made(label, options.budget)
    work = [operations(method, n, options.dim, causal=options.causal) for n in options.n]
    slopes = ["", ""] if len(options.n) < 2 else [f"{exponent(options.n, s):.2f}" for s in (found["seconds"], work)]
    return [*(f"{s:.3f}" for s in found["seconds"]), *slopes, f"{found['memory']:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("labels", nargs="*", metavar="LABEL", help="as in nla_llm.study.roster; all by default")
    parser.add_argument("--n", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--budget", type=int, default=256, help="features, landmarks, keys: the budget of each method")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--causal", action="store_true", help="the causal forms")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        sys.stdout.write(json.dumps(measure(options.labels[0], options)))
        return
    console = Console(width=150)
    console.print(f"{machine()} · {load_note()} at the start")
    labels, left_out = (options.labels, []) if options.labels else chosen(options)
    form = "causal, " if options.causal else ""
    title = f"{form}one head, float32, d={options.dim}, budget {options.budget}; medians of {options.repeats}"
    table = Table("method", *(f"s, n={n}" for n in options.n), "exponent", "by formula", "GB", title=title)
    for label in labels:
        table.add_row(label, *row(label, options))
    console.print(table)
    if left_out:
        console.print(f"Oracles, and dearer than n^{LINEAR:g} by formula: {'; '.join(left_out)}")
    console.print(f"{load_note()} at the end, this run included")


if __name__ == "__main__":
    main()
