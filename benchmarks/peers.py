"""Approximate attention of installable packages beside ours: time and error of the output at equal m, in one run.

    python benchmarks/peers.py [--n 4096 16384] [--heads 8] [--dim 64] [--features 256] [--repeats 5]

Prints a table and returns; it never fails because of a time.
"""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np
from _timing import interleaved, load_note, machine
from rich.console import Console
from rich.table import Table

import nla_llm as nl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PEERS = ("torch", "performer-pytorch", "nystrom-attention")
SCALES = (1.0, 0.5)  # standard deviations of q and k: where random features fail, and where they work


def contenders(q: Any, k: Any, v: Any, m: int) -> Iterator[tuple[str, str, Callable[[], Any], Callable[[], Any]]]:
    """(what, peer, ours, theirs), each giving the output (heads, n, d)."""
    import torch  # noqa: PLC0415 - optional
    from nystrom_attention import NystromAttention  # noqa: PLC0415
    from performer_pytorch import FastAttention  # noqa: PLC0415

    heads, _, d = q.shape
    problem = nl.AttentionProblem(q, k, v)
    a, b, c = (torch.from_numpy(x)[None] for x in (q, k, v))

    def ours(name: str, **options: Any) -> Callable[[], Any]:
        return lambda: nl.method(name, **options)(problem, rng=0) @ v

    @torch.no_grad()
    def exact() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(a, b, c)[0].numpy()

    performer = FastAttention(dim_heads=d, nb_features=m)

    @torch.no_grad()
    def favor() -> Any:
        return performer(a, b, c)[0].numpy()

    nystrom = NystromAttention(dim=1, dim_head=d, heads=heads, num_landmarks=m, residual=False)
    nystrom.to_qkv, nystrom.to_out = torch.nn.Identity(), torch.nn.Identity()  # q, k, v as they are given
    joined = torch.cat([x[0].permute(1, 0, 2).reshape(1, -1, heads * d) for x in (a, b, c)], dim=-1)

    @torch.no_grad()
    def landmarks() -> Any:
        return nystrom(joined)[0].reshape(-1, heads, d).permute(1, 0, 2).numpy()

    orthogonal = {"m": m, "directions": "orthogonal"}
    yield "exact (float32)", "torch SDPA", lambda: problem.exact(np.float32) @ v, exact
    yield "positive features", "performer-pytorch", ours("positive_features", **orthogonal), favor
    yield (
        "positive features, recentred",
        "performer-pytorch",
        ours("positive_features", recentre=True, **orthogonal),
        favor,
    )
    yield "uniform", "performer-pytorch", ours("uniform"), favor
    yield "Nyström, 6 iterations", "nystrom-attention", ours("nystromformer", m=m), landmarks
    yield "positive features", "torch SDPA", ours("positive_features", **orthogonal), exact
    yield "Nyström, 6 iterations", "torch SDPA", ours("nystromformer", m=m), exact


def versions() -> str:
    """Versions of the peers, or a sentence that tells what to install."""
    try:
        return " · ".join(f"{name} {version(name)}" for name in PEERS)
    except PackageNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed; pip install {' '.join(PEERS)}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="+", default=[4096, 16384], help="lengths of the sequences")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=64, help="dimension of a head")
    parser.add_argument("--features", type=int, default=256, help="features or landmarks, the same on both sides")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    console = Console(width=150)
    console.print(f"{machine()} · {versions()} · {load_note()} at the start")
    import torch  # noqa: PLC0415 - optional

    torch.set_num_threads(nl.backend.thread_count())
    torch.manual_seed(0)
    title = (
        f"float32, h={options.heads}, d={options.dim}, m={options.features}; milliseconds, min / median / max of "
        f"{options.repeats}; error: relative Frobenius, of the output"
    )
    table = Table("ours", "peer", "n", "scale", "ms, ours", "ms, theirs", "ratio", "error, ours", "theirs", title=title)
    for n in options.n:
        for scale in SCALES:
            rng = np.random.default_rng(0)
            q, k = (scale * rng.standard_normal((options.heads, n, options.dim), dtype=np.float32) for _ in range(2))
            v = rng.standard_normal((options.heads, n, options.dim), dtype=np.float32)
            reference = nl.AttentionProblem(q, k, v).exact() @ v.astype(np.float64)
            for what, peer, ours, theirs in contenders(q, k, v, options.features):
                errors = [np.linalg.norm(run() - reference) / np.linalg.norm(reference) for run in (ours, theirs)]
                times = interleaved({"ours": ours, "theirs": theirs}, options.repeats)
                ratio = times["ours"].median / times["theirs"].median
                table.add_row(
                    what, peer, str(n), f"{scale:g}", str(times["ours"]), str(times["theirs"]), f"{ratio:.2f}",
                    *(f"{error:.3g}" for error in errors),
                )  # fmt: skip
    console.print(table)
    console.print(f"{load_note()} at the end, this run included")


if __name__ == "__main__":
    main()
