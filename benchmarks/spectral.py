"""Relative spectral error of FAVOR+ at a length where nothing n × n fits: seconds, memory, bracket, products.

    python benchmarks/spectral.py [--n 16384] [--dim 64] [--features 256] [--rtol 0.02] [--scale 1.0]

One head, queries and keys from N(0, scale² I), everything in float64. Asked for at the defaults on two cores: under
60 s and under 1.5 GB. Prints a table and returns; it never fails because of a time.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from _timing import load_note, machine
from rich.console import Console
from rich.table import Table

import nla_llm as nl

if TYPE_CHECKING:
    from nla_llm.measures import Estimate


class Watched(nl.operators.Operator):
    """An operator that remembers how often it was asked for a product, for how many columns and for how many rows."""

    def __init__(self, op: nl.operators.Operator) -> None:
        super().__init__(op.shape, op.like)
        self.op, self.nonnegative = op, op.nonnegative
        self.products = self.columns = self.rows_read = 0
        self.seconds = 0.0

    def apply(self, x: Any) -> Any:
        return self._note(self.op.apply, x)

    def apply_transpose(self, y: Any) -> Any:
        return self._note(self.op.apply_transpose, y)

    def rows(self, start: int, stop: int) -> Any:
        self.rows_read += stop - start
        return self.op.rows(start, stop)

    def row_sums(self) -> Any:
        return self.op.row_sums()

    def _note(self, product: Any, x: Any) -> Any:
        self.products += 1
        self.columns += x.shape[-1]
        start = time.perf_counter()
        y = product(x)
        self.seconds += time.perf_counter() - start
        return y


def peak_memory() -> float | None:
    """Largest resident memory of this process so far, in GB; None where the system does not tell."""
    try:
        import resource  # noqa: PLC0415 - absent from Windows
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=16384, help="length of the sequence")
    parser.add_argument("--dim", type=int, default=64, help="dimension of the head")
    parser.add_argument("--features", type=int, default=256, help="random features m")
    parser.add_argument("--rtol", type=float, default=0.02, help="relative width of the bracket")
    parser.add_argument("--scale", type=float, default=1.0, help="standard deviation of the entries of q and k")
    parser.add_argument("--causal", action="store_true")
    options = parser.parse_args()

    console = Console(width=120)
    console.print(machine(), load_note(), sep=" · ")
    before = peak_memory()
    rng = np.random.default_rng(0)
    q, k = options.scale * rng.standard_normal((2, options.n, options.dim))
    problem = nl.AttentionProblem(q, k, causal=options.causal)

    start = time.perf_counter()
    P, Phat = Watched(problem.exact()), Watched(nl.method("positive_features", m=options.features)(problem, rng=0))
    error: Estimate = nl.measures.relative_error(P, Phat, norm="spectral", rtol=options.rtol, rng=0)
    seconds, memory = time.perf_counter() - start, peak_memory()

    width = float(error.upper / error.lower) - 1
    table = Table("what", "measured", "asked for", title=f"‖P − P̂‖₂/‖P‖₂, n={options.n}, m={options.features}")
    table.add_row("relative error", f"{float(error.value):.6g}")
    table.add_row("bracket", f"[{float(error.lower):.6g}, {float(error.upper):.6g}], confidence {error.confidence:.4g}")
    table.add_row("width of the bracket", f"{width:.3%}", f"≤ {options.rtol:.1%}")
    table.add_row("how", str(error.how))
    table.add_row("seconds", f"{seconds:.1f}", "< 60 at the defaults, 2 cores")
    table.add_row("peak memory", "–" if memory is None else f"{memory:.2f} GB, {before:.2f} GB before", "< 1.5 GB")
    for name, op in (("P", P), ("P̂", Phat)):
        table.add_row(
            f"products with {name}",
            f"{op.products} of {op.columns} columns in all, {op.seconds:.1f} s; {op.rows_read} rows read",
        )
    console.print(table)


if __name__ == "__main__":
    main()
