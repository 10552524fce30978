"""What the study of randomised decompositions measures: engines on known spectra, and one pass given Q."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

import nla_llm as nl
from nla_llm.linalg import orthonormalise
from nla_llm.measures import Estimate
from nla_llm.operators import Operator
from nla_llm.problems import embedded, gallery
from nla_llm.problems.embedded_updates import embedded_updates
from nla_llm.study.measuring import operators
from nla_llm.theory.low_rank import single_pass_factor
from nla_llm.theory.yardsticks import eckart_young

if TYPE_CHECKING:
    from numpy.typing import NDArray

NORMS = {"frobenius": "fro", "spectral": 2}
SPARE = 10  # columns of oversampling
EMBEDDING, WEIGHT, UPDATE = "embedding", "W_down", "update of W_down"
MATRICES = ("power law", "exponential", "rank + noise", EMBEDDING, WEIGHT, UPDATE)
ENGINES: dict[str, tuple[str, dict[str, Any]]] = {
    "randomised, q = 0": ("randomised_svd", {"power_steps": 0}),
    "randomised, q = 1": ("randomised_svd", {"power_steps": 1}),
    "randomised, q = 2": ("randomised_svd", {"power_steps": 2}),
    "one pass": ("single_pass_svd", {}),
    "Krylov": ("krylov_svd", {}),
    "rank-revealing QR": ("rank_revealing_qr", {}),
    "interpolative": ("interpolative", {}),
    "CUR": ("cur_update", {}),
}


@lru_cache(maxsize=8)
def matrix(name: str, n: int) -> NDArray[np.float64]:
    """A matrix of the study, scaled to the spectral norm one."""
    if name in {EMBEDDING, WEIGHT, UPDATE}:
        model = embedded.embedded_model()
        weight = f"model.layers.{model.config.num_hidden_layers // 2}.mlp.down_proj.weight"
        sources = {
            EMBEDDING: lambda: model.embedding,
            WEIGHT: lambda: model.weights[weight],
            UPDATE: lambda: embedded_updates().full[weight],
        }
        found = np.asarray(sources[name](), dtype=np.float64)
    else:
        problems = {
            "power law": lambda: gallery.power_law_update(n, n, 0.5),
            "exponential": lambda: gallery.exponential_update(n, n, 0.1),
            "rank + noise": lambda: gallery.spiked_update(np.linspace(12, 4, 8), n, n),
        }
        found = np.asarray(problems[name]().delta)
    return found / np.linalg.norm(found, 2)


@lru_cache(maxsize=8)
def spectrum(name: str, n: int) -> NDArray[np.float64]:
    """Its singular values."""
    values: NDArray[np.float64] = np.linalg.svd(matrix(name, n), compute_uv=False)
    return values


class Watched(Operator):
    """A matrix that counts the products it is asked for and their columns."""

    def __init__(self, a: NDArray[np.float64]) -> None:
        super().__init__(a.shape, a)
        self.a, self.products, self.columns = a, 0, 0

    def apply(self, x: Any) -> Any:
        return self._count(self.a, x)

    def apply_transpose(self, y: Any) -> Any:
        return self._count(self.a.T, y)

    def rows(self, start: int, stop: int) -> Any:
        return self.a[start:stop]

    def _count(self, a: Any, x: Any) -> Any:
        self.products, self.columns = self.products + 1, self.columns + x.shape[-1]
        return a @ x


def errors(cell: dict[str, Any], seed: int) -> dict[str, Any]:
    """Errors of an engine over the optimum, the mean of the draws over its bound, products, seconds of one core."""
    name, options = ENGINES[cell["engine"]]
    method = nl.method(name, rank=cell["rank"], **options)
    return compared(method, cell, seed)


def convergence(cell: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same for a way to spend products: powers of a wide block, or Krylov spaces of wide and narrow blocks."""
    rank, steps = cell["rank"], cell["steps"]
    wide = rank + SPARE
    narrow_steps = (2 * wide * steps + 8) // 16  # the most that multiply no more columns than the powers do
    method = {
        "subspace iteration": lambda: nl.method("randomised_svd", rank=rank, oversampling=SPARE, power_steps=steps - 1),
        "Krylov, wide block": lambda: nl.method("krylov_svd", rank=rank, block=wide, steps=steps),
        "Krylov, narrow block": lambda: nl.method("krylov_svd", rank=rank, block=8, steps=narrow_steps),
    }[cell["way"]]()
    return compared(method, cell, seed)


def compared(method: Any, cell: dict[str, Any], seed: int) -> dict[str, Any]:
    """Ratios to the optimum with their intervals over draws."""
    a, values = matrix(cell["matrix"], cell["n"]), spectrum(cell["matrix"], cell["n"])
    watched = Watched(a)
    problem = nl.UpdateProblem(watched)
    start = time.thread_time()
    found = operators(problem, method, draws=cell["draws"], seed=seed)
    seconds = (time.thread_time() - start) / len(found)
    record: dict[str, Any] = {
        "products": watched.products / len(found),
        "columns": watched.columns / len(found),
        "milliseconds": 1e3 * seconds,
    }
    theory = method.theory(nl.UpdateProblem(a)) if hasattr(method, "theory") else None
    for norm, order in NORMS.items():
        best = float(eckart_young(values, cell["rank"], norm))
        measured = np.array([np.linalg.norm(a - B.left @ B.right.T, order) for B in found])
        record[f"ratio_{norm}"] = _mean(measured / best)
        record[f"zero_{norm}"] = float(eckart_young(values, 0, norm)) / best
        bound = _bound(theory, norm)
        if bound is not None:
            root = norm == "frobenius"  # promised of the mean square
            record[f"promised_{norm}"] = _mean(measured**2).sqrt() / bound if root else _mean(measured) / bound
    return record


def _mean(samples: NDArray[np.float64]) -> Estimate:
    if len(samples) == 1:
        return Estimate.exact(samples[0], "deterministic", rounding=1e-12)
    mean = Estimate.from_samples(samples)
    return Estimate(mean.value, np.maximum(mean.lower, 0.0), mean.upper, mean.confidence, mean.how)


def _bound(theory: Any, norm: str) -> float | None:
    if theory is None:
        return None
    try:
        return float(theory.error(norm))
    except ValueError:
        return None


def factor(cell: dict[str, Any], seed: int) -> dict[str, Any]:
    """Squared error of one pass over that of the projection on a fixed Q, over draws of Ψ alone, beside its mean."""
    a, rng, k, rows = matrix(cell["matrix"], cell["n"]), np.random.default_rng(seed), cell["rank"], cell["rows"]
    q = orthonormalise(a @ rng.standard_normal((a.shape[1], k)))
    outside = a - q @ (q.T @ a)
    best, ratios = float(np.sum(outside**2)), []
    for _ in range(cell["draws"]):
        psi = rng.standard_normal((rows, a.shape[0]))
        oblique = np.linalg.lstsq(psi @ q, psi @ outside)[0]  # what Ψ takes of the rest for a part of Q
        ratios.append(1 + float(np.sum(oblique**2)) / best)
    return {"factor": Estimate.from_samples(ratios, confidence=0.9999), "exact": single_pass_factor(k, rows)}
