"""Rank 32 of a float32 matrix: seconds and errors over the optimum in both norms, beside other libraries, in one run.

    python benchmarks/low_rank.py [--n 4096] [--rank 32] [--repeats 5] [--dense]
    python benchmarks/low_rank.py --embedding [--rows 200000] [--columns 4096]

(a) a power law σ_i = i^-0.5, (b) rank 16 plus noise. The optimum comes from all singular values, in float64. The second
form takes the rank-32 approximation of a large matrix alone in its process and prints the largest resident memory
over the size of the matrix. Prints a table and returns; it never fails because of a time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _timing import interleaved, load_note, machine
from rich.console import Console
from rich.table import Table
from spectral import peak_memory

import nla_llm as nl
from nla_llm.linalg import krylov_svd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

REACHED = 1.001  # of the optimum, in both norms


def matrices(n: int, cache: Path | None) -> Iterator[tuple[str, NDArray[np.float32], NDArray[np.float64]]]:
    """The two matrices and their singular values, kept in a folder if there is one: they take long."""
    for name in ("a", "b"):
        files = [] if cache is None else [cache / f"{name}.npy", cache / f"s_{name}.npy"]
        if files and all(file.exists() for file in files):
            found = [np.load(file) for file in files]
        else:
            matrix = dict(made_up(n))[name]
            wide = matrix.astype(np.float64)
            found = [matrix, np.sqrt(np.maximum(np.linalg.eigvalsh(wide.T @ wide)[::-1], 0.0))]
            for file, array in zip(files, found, strict=False):
                np.save(file, array)
        yield name, found[0], found[1]


def made_up(n: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The two matrices."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, n), dtype=np.float32))[0] for _ in range(2))
    yield "a", (u * np.arange(1, n + 1, dtype=np.float32) ** np.float32(-0.5)) @ v.T
    noise = rng.standard_normal((n, n), dtype=np.float32) / np.float32(n**0.5)
    yield "b", (u[:, :16] * np.linspace(40, 10, 16, dtype=np.float32)) @ v[:, :16].T + noise


def contenders(a: NDArray[np.float32], r: int, *, dense: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(name, function that gives two factors whose product approximates ``a``)."""
    import scipy.sparse.linalg  # noqa: PLC0415
    import torch  # noqa: PLC0415 - optional
    from sklearn.utils.extmath import randomized_svd  # noqa: PLC0415 - optional

    problem = nl.UpdateProblem(a)

    def ours(name: str, **options: Any) -> Callable[[], Any]:
        def run() -> Any:
            B = nl.method(name, rank=r, **options)(problem, rng=1)
            return B.left, B.right

        return run

    def factors(u: Any, s: Any, vt: Any) -> Any:
        order = np.argsort(-s)[:r]
        return u[:, order] * s[order], vt[order].T

    @torch.no_grad()
    def lowrank(q: int, niter: int) -> Any:
        u, s, v = torch.svd_lowrank(torch.from_numpy(a), q=q, niter=niter)
        return (u[:, :r] * s[:r]).numpy(), v[:, :r].numpy()

    @torch.no_grad()
    def full() -> Any:
        u, s, vt = torch.linalg.svd(torch.from_numpy(a), full_matrices=False)
        return factors(u.numpy(), s.numpy(), vt.numpy())

    yield "krylov_svd", ours("krylov_svd")
    yield "randomised_svd", ours("randomised_svd")
    yield "randomised_svd, 6 power steps", ours("randomised_svd", oversampling=2 * r, power_steps=6)
    yield "single_pass_svd", ours("single_pass_svd")
    yield "torch.svd_lowrank q=r niter=2", lambda: lowrank(r, 2)
    yield "torch.svd_lowrank q=4r niter=4", lambda: lowrank(4 * r, 4)
    yield "torch.svd_lowrank q=4r niter=8", lambda: lowrank(4 * r, 8)
    yield "sklearn randomized_svd n_iter=4", lambda: factors(*randomized_svd(a, r, n_iter=4, random_state=1))
    yield "scipy svds arpack", lambda: factors(*scipy.sparse.linalg.svds(a, k=r, solver="arpack", rng=1))
    yield "scipy svds propack", lambda: factors(*scipy.sparse.linalg.svds(a, k=r, solver="propack", rng=1))
    if dense:
        yield "torch.linalg.svd", full


def errors(a: NDArray[np.float32], left: Any, right: Any) -> tuple[float, float]:
    """Both norms of a − left rightᵀ in float64; the spectral one from 25 steps of a block Krylov space."""
    difference = a - left.astype(np.float64) @ right.T.astype(np.float64)
    top = krylov_svd(nl.operators.Dense(difference), 1, 0, block=8, steps=25).svd.values[0]
    return float(np.linalg.norm(difference)), float(top)


def compare(options: argparse.Namespace, console: Console) -> None:
    """The table of both matrices."""
    import torch  # noqa: PLC0415 - optional

    torch.set_num_threads(nl.backend.thread_count())
    torch.manual_seed(0)
    r = options.rank
    table = Table(
        "matrix", "engine", "ms, min / median / max", "Frobenius / optimum", "spectral / optimum", "reached",
        title=f"rank {r} of {options.n} x {options.n}, float32; reached: both within {REACHED} of the optimum",
    )  # fmt: skip
    for name, a, spectrum in matrices(options.n, options.cache):
        best = float(np.linalg.norm(spectrum[r:])), float(spectrum[r])
        found, runs = {}, dict(contenders(a, r, dense=options.dense))
        for engine in list(runs):
            console.print(f"({name}) {engine}", style="dim")
            try:
                found[engine] = [e / b for e, b in zip(errors(a, *runs[engine]()), best, strict=True)]
            except Exception as failure:  # a peer that fails has no time
                table.add_row(name, engine, f"failed: {type(failure).__name__}", "", "", "")
                del runs[engine]
        slow = {k: runs.pop(k) for k in ("torch.linalg.svd",) if k in runs}
        times = interleaved(runs, options.repeats) | (interleaved(slow, 1) if slow else {})
        for engine, (frobenius, spectral) in found.items():
            reached = "yes" if max(frobenius, spectral) <= REACHED else ""
            table.add_row(name, engine, str(times[engine]), f"{frobenius:.5f}", f"{spectral:.5f}", reached)
        rivals = {k: times[k].median for k, ratios in found.items() if max(ratios) <= REACHED}
        peers = {k: t for k, t in rivals.items() if k.startswith(("torch", "sklearn", "scipy"))}
        if peers and "krylov_svd" in rivals:
            fastest = min(peers, key=lambda k: peers[k])
            ratio = rivals["krylov_svd"] / peers[fastest]
            console.print(
                f"({name}) krylov_svd takes {ratio:.2f} of the time of {fastest}, the fastest that reaches it"
            )
    console.print(table)


def embedding(options: argparse.Namespace, console: Console) -> None:
    """Seconds and memory of one engine on a matrix that takes up most of what there is."""
    rng, rows, columns, r = np.random.default_rng(0), options.rows, options.columns, options.rank
    a = np.empty((rows, columns), np.float32)
    right = (rng.standard_normal((200, columns)) / columns**0.5).astype(np.float32)
    for start in range(0, rows, 4096):
        part = a[start : start + 4096]
        weights = rng.standard_normal((len(part), 200), dtype=np.float32)
        weights *= np.arange(1, 201, dtype=np.float32) ** -0.7
        np.matmul(weights, right, out=part)
        part += 0.002 * rng.standard_normal(part.shape, dtype=np.float32)
    size, before = a.nbytes / 1e9, peak_memory()
    table = Table("step", "seconds", "peak memory, GB", "over the matrix", title=f"{rows} x {columns}, {size:.2f} GB")
    start = time.perf_counter()
    problem = nl.UpdateProblem(a)
    B = nl.method(options.engine, rank=r)(problem, rng=0)
    table.add_row(options.engine, f"{time.perf_counter() - start:.1f}", *_memory(size))
    for norm in ("frobenius", "spectral"):
        start = time.perf_counter()
        estimate = B.remaining(norm, rng=0)
        table.add_row(f"remaining {norm}: {estimate}", f"{time.perf_counter() - start:.1f}", *_memory(size))
    console.print(table, f"{before:.2f} GB before the first engine" if before else "")


def _memory(size: float) -> tuple[str, str]:
    peak = peak_memory()
    return ("–", "–") if peak is None else (f"{peak:.2f}", f"{peak / size:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4096, help="order of the matrix")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cache", type=Path, help="folder that keeps the matrices and their spectra between runs")
    parser.add_argument("--dense", action="store_true", help="time the full decomposition of PyTorch too, once")
    parser.add_argument("--embedding", action="store_true", help="memory on a large matrix instead")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--engine", default="krylov_svd")
    options = parser.parse_args()
    console = Console(width=150)
    console.print(machine(), load_note(), sep=" · ")
    (embedding if options.embedding else compare)(options, console)
    console.print(f"{load_note()} at the end, this run included")


if __name__ == "__main__":
    main()
