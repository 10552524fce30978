"""What the study of landmarks measures: the iterated inverse, its filter and condition, projections of the keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

import nla_llm as nl
from nla_llm.linalg.inverses import norm_product, pseudo_inverse
from nla_llm.measures import Estimate
from nla_llm.operators import Dense, Skeleton
from nla_llm.problems import embedded, gallery
from nla_llm.study import Skip
from nla_llm.study.measuring import attention_records, operators, over_draws
from nla_llm.theory import columns, projections

if TYPE_CHECKING:
    from nla_llm.operators import Operator

HEADS, DIM = 6, 64  # of a made-up problem: independent draws of it
KINDS = ("Gaussian, scale 1", "Gaussian, scale ½", "clusters", "model")
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("uniform", {}),
    "random keys": ("random_keys", {}),
    "optimal rank": ("optimal_rank", {}),
    "Nyströmformer, 6 steps": ("nystromformer", {}),
    "Nyströmformer, pinv": ("nystromformer", {"core": "pinv"}),
    "RPCholesky": ("rpcholesky", {}),
    "CUR, ridge": ("cur_attention", {}),
    "CUR, optimal core": ("cur_attention", {"core": "optimal"}),
    "Linformer, means": ("linformer", {"projection": "mean"}),
    "Linformer, Gaussian": ("linformer", {}),
    "Gaussian projection": ("gaussian_projection", {}),
}
BEYOND = ("Linformer, Gaussian", "Gaussian projection")  # those that may have more directions than there are tokens
FILTERS = (2, 4, 6, 8, 12)  # numbers of steps whose filter is drawn
COUNTER_N, EPSILON = 400, 0.5  # of the example against the published bound


@cache
def problem(kind: str, layer: int | None, n: int) -> nl.AttentionProblem:
    """Heads of one kind, without a mask, in float64."""
    if kind == "model":
        return embedded.heldout_problems(n)[int(layer or 0)].unmasked().astype(np.float64)
    if kind == "clusters":
        return gallery.clusters(n, DIM, heads=(HEADS,), rng=n)
    return gallery.gaussian(n, DIM, scale=1.0 if kind.endswith("1") else 0.5, heads=(HEADS,), rng=n)


# -- the core of Nyströmformer -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Started:
    """Nyströmformer before the first step: Z₀ = Aᵀ/(‖A‖₁‖A‖_∞)."""

    m: int
    properties: ClassVar[Any] = nl.method("nystromformer", m=1).properties

    def __call__(self, p: nl.AttentionProblem) -> Skeleton:
        """Operator F Z₀ B."""
        op = nl.method("nystromformer", m=self.m)(p)
        a = op.intersection
        return Skeleton(op.left, np.swapaxes(a, -1, -2) / norm_product(a), op.right, intersection=a)


def nystromformer(cell: dict[str, Any]) -> Any:
    """The method of a cell: some number of steps, the ridge that corresponds to it, or the pseudo-inverse."""
    if cell["core"] == "iteration":
        steps = cell["iterations"]
        return nl.method("nystromformer", m=cell["m"], iterations=steps) if steps else Started(cell["m"])
    if cell["core"] == "ridge":
        return nl.method("nystromformer", m=cell["m"], core="ridge", ridge=columns.iteration_ridge(cell["iterations"]))
    return nl.method("nystromformer", m=cell["m"], core="pinv")


def core(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Errors of every head with one inverse of the core, and how far that is from the pseudo-inverse."""
    p, method = problem(cell["problem"], cell["layer"], cell["n"]), nystromformer(cell)
    op = method(p)
    inverse = pseudo_inverse(op.intersection)
    distance = np.linalg.norm(op.core - inverse, axis=(-2, -1)) / np.linalg.norm(inverse, axis=(-2, -1))
    facts = zip(np.ravel(distance), np.ravel(op.core_condition), strict=True)
    records = attention_records(p, method, draws=1, seed=seed)
    return [
        {**record, "inverse_error": float(away), "condition": float(condition)}
        for record, (away, condition) in zip(records, facts, strict=True)
    ]


def filters(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:  # noqa: ARG001 - called like the others
    """Shares u_iᵀ A Z u_i up to which the singular values of a core are inverted, measured and by theory."""
    op = nystromformer({**cell, "core": "iteration"})(problem(cell["problem"], cell["layer"], cell["n"]))
    a, z = (x.reshape(-1, cell["m"], cell["m"]) for x in (op.intersection, op.core))
    records = []
    for head, (matrix, inverse) in enumerate(zip(a, z, strict=True)):
        u, s, _ = np.linalg.svd(matrix)
        measured, size = np.sum(u * (matrix @ inverse @ u), axis=0), float(norm_product(matrix)[0, 0])
        theory = columns.inverted_share(s, size, cell["iterations"])
        records.append({"head": head, "deviation": float(np.max(np.abs(measured - theory)))})
        if head == 0:
            shares = zip(s / size**0.5, measured, theory, strict=True)
            records += [
                {"head": head, "value": float(x), "share": float(y), "promised": float(t)} for x, y, t in shares
            ]
    return records


# -- all methods -------------------------------------------------------------------------------------------------------


def errors(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Errors of one method on every head, and the condition of its core where it has one."""
    name, options = METHODS[cell["label"]]
    m, n = cell["m"], cell["n"]
    if m is not None and m > n and cell["label"] not in BEYOND:
        raise Skip(f"the budget {m} exceeds the {n} tokens")
    method = nl.method(name, **options) if m is None else nl.method(name, m=m, **options)
    p = problem(cell["problem"], cell["layer"], n)
    records = attention_records(p, method, draws=cell["draws"], seed=seed)
    if name != "nystromformer":
        return records
    condition = np.ravel(method(p).core_condition)
    return [{**record, "condition": float(c)} for record, c in zip(records, condition, strict=True)]


def skyformer(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Skyformer against the Gaussian kernel that it aims at and against softmax, and the target against softmax."""
    p, method = problem(cell["problem"], cell["layer"], cell["n"]), nl.method("skyformer", m=cell["m"])
    target, softmax = Dense(method.target(p).dense()), Dense(p.exact().dense())
    made = operators(p, method, draws=cell["draws"], seed=seed)
    found = {
        "to_target": over_draws([distance(target, op) for op in made]),
        "to_softmax": over_draws([distance(softmax, op) for op in made]),
        "target_to_softmax": distance(softmax, target),
        "floor": floor(target, cell["m"]),
    }
    return [
        {"head": head, **{name: e[index] for name, e in found.items()}}
        for head, index in enumerate(np.ndindex(p.batch_shape))
    ]


def distance(exact: Operator, op: Operator) -> Estimate:
    """Relative Frobenius error of every head."""
    away = np.linalg.norm(exact.dense() - op.dense(), axis=(-2, -1)) / np.linalg.norm(exact.dense(), axis=(-2, -1))
    return Estimate.exact(away, "dense", rounding=1e-12)


def floor(exact: Operator, m: int) -> Estimate:
    """Relative Frobenius error of the best matrix of rank m."""
    s = np.linalg.svd(exact.dense(), compute_uv=False)
    left = np.sqrt(np.sum(s[..., m:] ** 2, axis=-1) / np.sum(s**2, axis=-1))
    return Estimate.exact(left, "singular values", rounding=1e-12)


# -- Linformer ---------------------------------------------------------------------------------------------------------


def law(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """‖PRᵀR − P‖_F²/‖P‖_F², its mean over draws for every head, beside (n + 1)/m."""
    p, method = problem(cell["problem"], cell["layer"], cell["n"]), nl.method("gaussian_projection", m=cell["m"])
    exact = Dense(p.exact().dense())
    made = operators(p, method, draws=cell["draws"], seed=seed)
    squares = Estimate.from_samples(np.stack([distance(exact, op).value ** 2 for op in made]))
    promised = float(projections.gaussian_projection_error(1.0, cell["n"], cell["m"]) ** 2)
    return [
        {"head": head, "square": squares[index], "promised": promised}
        for head, index in enumerate(np.ndindex(p.batch_shape))
    ]


def counter(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """|P̂w − Pw|² for P = 11ᵀ/n and a unit vector w orthogonal to 1, and how often it is below ε² |Pw|²."""
    n = COUNTER_N
    p = nl.AttentionProblem(np.zeros((n, 1)), np.zeros((n, 1)))
    w = np.random.default_rng(n).standard_normal(n)
    w -= w.mean()
    w /= np.linalg.norm(w)
    image = p.exact() @ w
    method = nl.method(cell["method"], m=cell["m"])
    made = operators(p, method, draws=cell["draws"], seed=seed)
    lengths = np.array([np.linalg.norm(op @ w - image) for op in made])
    promised = projections.gaussian_projection_vector_error(p.exact().dense(), w, cell["m"])
    record = {
        "square": Estimate.from_samples(lengths**2),
        "promised": float(promised) if cell["method"] == "gaussian_projection" else None,
        "image": float(np.linalg.norm(image)),
        "within": int(np.sum(lengths <= EPSILON * np.linalg.norm(image))),
    }
    return [record]
