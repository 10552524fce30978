"""Clocks, rates of the machine, and tables, shared by the benchmarks."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_info

from nla_llm.backend import parallel, thread_count

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PAUSE = 0.05  # seconds
TILE = 1 << 17  # a float32 tile of half a MiB, as in the streamed softmax

__all__ = ["Rates", "Times", "interleaved", "load_note", "machine"]


@dataclass(frozen=True)
class Times:
    """Seconds of the repeats of one contender."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        low, high = 1e3 * min(self.seconds), 1e3 * max(self.seconds)
        return f"{low:.1f} / {1e3 * self.median:.1f} / {high:.1f}"


def interleaved(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Times]:
    """Run the contenders in turns, so that whatever else the machine does meets all of them alike.

    One round before the first is thrown away: it pays for page faults, thread pools and code that is compiled. A pause
    before each run lets the threads of the contender before go to sleep: OpenMP's spin for a while.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: Times(tuple(values)) for name, values in seconds.items()}


@dataclass(frozen=True)
class Rates:
    """What the machine does at best, measured in the same run: the floors are made of these."""

    gemm: float  # multiply-add operations a second in float32, two operations each
    exp: float  # exponentials a second in float32
    bandwidth: float  # bytes a second, read and written, of a copy that no cache holds

    @classmethod
    def measure(cls, repeats: int = 7) -> Rates:
        rng, n, cores = np.random.default_rng(0), 2048, thread_count()
        a, b, c = (rng.standard_normal((n, n), dtype=np.float32) for _ in range(3))
        tiles = [np.full(TILE, -1.0, np.float32) for _ in range(cores)]
        source = np.ones((cores, 1 << 25), np.float32)  # 128 MiB a core
        target = np.empty_like(source)

        def exps(i: int) -> None:
            out = np.empty_like(tiles[i])
            for _ in range(200):
                np.exp(tiles[i], out=out)

        times = interleaved(
            {
                "gemm": lambda: np.matmul(a, b, out=c),
                "exp": lambda: parallel(exps, range(cores)),
                "copy": lambda: parallel(lambda i: np.copyto(target[i], source[i]), range(cores)),
            },
            repeats,
        )
        best = {name: min(t.seconds) for name, t in times.items()}
        return cls(2 * n**3 / best["gemm"], 200 * cores * TILE / best["exp"], 2 * source.nbytes / best["copy"])

    def __str__(self) -> str:
        return (
            f"sgemm {self.gemm / 1e9:.0f} Gflop/s · exp {self.exp / 1e9:.2f} G/s · copy {self.bandwidth / 1e9:.1f} GB/s"
        )


def machine() -> str:
    """Threads, BLAS and load, without which no time means anything."""
    blas = ", ".join(
        f"{pool['internal_api']} {pool.get('version')} ({pool.get('architecture')}, {pool['num_threads']} threads)"
        for pool in threadpool_info()
        if pool["user_api"] == "blas"
    )
    return f"{thread_count()} threads · NumPy {np.__version__} · {blas}"


def load_note() -> str:
    """Load of the machine, with a warning where other work shares the cores."""
    if not hasattr(os, "getloadavg"):
        return "load unknown"
    load, cores = os.getloadavg()[0], thread_count()
    return f"load average {load:.1f} on {cores} cores" + (": times are inflated" if load > 1.2 * cores else "")
