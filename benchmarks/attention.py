"""Times of exact, kernel and random-feature attention: against their floors, and against PyTorch in the same run.

    python benchmarks/attention.py [--n 4096 16384] [--heads 8] [--dim 64] [--repeats 5]

Prints a table and returns; it never fails because of a time.
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from _timing import Rates, interleaved, load_note, machine
from rich.console import Console
from rich.table import Table

import nla_llm as nl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

M = 256  # random features


@dataclass(frozen=True)
class Case:
    """One row: what runs, the least that any code must do for it, and what is asked of us."""

    name: str
    n: int
    ours: Callable[[], object]
    theirs: Callable[[], object] | None
    flops: float  # of matrix products, a multiply-add being two
    exps: float
    numbers: float  # float32 numbers that have to be read or written at least once
    target: str = ""

    def floor(self, rates: Rates) -> float:
        """Seconds below which nothing can go that computes what it is asked for.

        Products and exponentials run on the same cores, one after the other; memory moves at the same time.
        """
        return max(self.flops / rates.gemm + self.exps / rates.exp, 4 * self.numbers / rates.bandwidth)


def cases(n: int, heads: int, d: int, m: int, torch: Any) -> Iterator[Case]:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((heads, n, d), dtype=np.float32) for _ in range(3))
    inputs = 4.0 * heads * n * d  # q, k, v and the output
    for causal in (False, True):
        problem = nl.AttentionProblem(q, k, v, causal=causal)
        pairs = heads * (n * (n + 1) / 2 if causal else float(n) ** 2)
        word = "causal" if causal else "full"
        yield Case(
            f"exact, {word}",
            n,
            lambda problem=problem: problem.exact(np.float32) @ v,
            _sdpa(torch, q, k, v, causal=causal),
            flops=4 * pairs * d,
            exps=pairs,
            numbers=inputs,
            target="≤ 1.3 × PyTorch",
        )
    for causal in (False, True):
        problem = nl.AttentionProblem(q, k, v, causal=causal)
        word = "causal" if causal else "full"
        yield Case(
            f"elu + 1, {word}",
            n,
            lambda problem=problem: nl.method("elu_features")(problem) @ v,
            None if causal else _linear(torch, q, k, v),
            flops=heads * n * 4 * d * d,
            exps=2 * heads * n * d,
            numbers=inputs,
            target="≤ 30 ms at n=4096, h=8, d=64" if causal else "",
        )
        yield Case(
            f"FAVOR+, m={m}, {word}",
            n,
            lambda problem=problem: nl.method("positive_features", m=m)(problem, rng=0) @ v,
            None,
            flops=heads * n * (4 * m * d + 4 * m * d),  # two projections, two products
            exps=2 * heads * n * m,
            numbers=inputs,
        )


def _sdpa(torch: Any, q: Any, k: Any, v: Any, *, causal: bool) -> Callable[[], object] | None:
    if torch is None:
        return None
    a, b, c = (torch.from_numpy(x)[None] for x in (q, k, v))
    return lambda: torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=causal)


def _linear(torch: Any, q: Any, k: Any, v: Any) -> Callable[[], object] | None:
    """The three lines that one writes in PyTorch for linear attention without causality."""
    if torch is None:
        return None
    a, b, c = (torch.from_numpy(x) for x in (q, k, v))

    def run() -> object:
        x, y = torch.nn.functional.elu(a) + 1, torch.nn.functional.elu(b) + 1
        return x @ (y.mT @ c) / (x @ y.sum(-2)[..., None])

    return run


def load_torch(threads: int) -> Any:
    if importlib.util.find_spec("torch") is None:
        return None
    import torch  # noqa: PLC0415 - optional

    torch.set_num_threads(threads)
    return torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="+", default=[4096, 16384], help="lengths of the sequences")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64, help="dimension of a head")
    parser.add_argument("--features", type=int, default=M, help="random features of FAVOR+")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    console = Console(width=150)
    torch = load_torch(nl.backend.thread_count())
    console.print(machine() + (f" · PyTorch {torch.__version__}" if torch else ""))
    if torch is None:
        console.print("PyTorch is not installed, so its times are left out: pip install 'nla-llm[torch]'")
    rates = Rates.measure()
    console.print(f"{rates} · {load_note()} at the start")
    title = f"float32, h={options.heads}, d={options.dim}; milliseconds, min / median / max of {options.repeats}"
    table = Table("attention", "n", "floor", "ours", "PyTorch", "ours / PyTorch", "ours / floor", "target", title=title)
    for n in options.n:
        for case in cases(n, options.heads, options.dim, options.features, torch):
            contenders = {"ours": case.ours} | ({"theirs": case.theirs} if case.theirs else {})
            times = interleaved(contenders, options.repeats)
            ours, theirs, floor = times["ours"], times.get("theirs"), case.floor(rates)
            table.add_row(
                case.name,
                str(n),
                f"{1e3 * floor:.1f}",
                str(ours),
                str(theirs or "–"),
                f"{ours.median / theirs.median:.2f}" if theirs else "–",
                f"{ours.median / floor:.2f}",
                case.target,
            )
    console.print(table)
    console.print(f"{load_note()} at the end, this run included")


if __name__ == "__main__":
    main()
