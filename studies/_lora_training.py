"""What is trained in the study of LoRA's conditioning: races, local rates, starts, streams; a record for each step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import nla_llm as nl
from nla_llm.linalg import haar_orthogonal
from nla_llm.methods.update.lora.factors import Factors
from nla_llm.methods.update.lora.initialisations import INITIALISATIONS, start
from nla_llm.methods.update.lora.objectives import regression
from nla_llm.methods.update.lora.optimisers import OPTIMISERS
from nla_llm.methods.update.lora.training import Sweep, recorded_steps, sweep
from nla_llm.problems import gallery
from nla_llm.theory import low_rank_training as theory

D_OUT, D_IN, RANK, SAMPLES = 40, 32, 4, 128
RATES = {  # powers of two; a best rate at an end of its grid is told in the report
    "gradient_descent": tuple(2.0**k for k in range(-6, 2)),
    "momentum": tuple(2.0**k for k in range(-8, 2)),
    "adam": tuple(2.0**k for k in range(-10, 2)),
    "lora_plus": tuple(2.0**k for k in range(-13, -3)),
    "scaled_gd": (*(2.0**k for k in range(-7, 0)), 2 / 3, 0.9),
    "alternating": (1.0,),  # it has none
}
STREAM_RATES = {  # noise is averaged by small rates
    rule: tuple(rates[0] / 2.0**k for k in (4, 3, 2, 1)) + rates[:-2] for rule, rates in RATES.items()
}
TOLERANCE = 1e-6
BATCH, NOISE = 16, 0.05
LOCAL_STEPS = 40
COLUMNS = ("frobenius", "data", "kappa_A", "kappa_B", "kappa_product", "angle_left", "angle_right")


# -- targets -----------------------------------------------------------------------------------------------------------


def spectrum(target: str) -> np.ndarray[Any, Any]:
    """Singular values of a target: r of them from 1 to 1/κ, or all of i^(−1/2)."""
    if target == "power law":
        return np.arange(1, D_IN + 1) ** -0.5
    return np.geomspace(1.0, 1.0 / float(target), RANK)


def stacked(target: str, seeds: int, rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Updates with one spectrum and independent singular vectors, (seeds, d_out, d_in)."""
    updates = [gallery.prescribed_spectrum_update(spectrum(target), D_OUT, D_IN, rng=rng) for _ in range(seeds)]
    return np.stack([update.delta for update in updates])


# -- the race ----------------------------------------------------------------------------------------------------------


def race(cell: dict[str, Any], _: int) -> list[dict[str, Any]]:
    """Every rate of the grid on all seeds together; the best rate step by step, and what it came to.

    The updates, like the first factors, come from the number of the problems, so that all rules see the same ones.
    """
    problem = nl.UpdateProblem(stacked(cell["target"], cell["seeds"], np.random.default_rng(cell["problems"])))
    adapter = nl.method("lora", rank=RANK, optimiser=cell["optimiser"], steps=cell["steps"])
    record = recorded_steps(cell["steps"], 60)
    found = sweep(adapter, problem, RATES[cell["optimiser"]], rng=cell["problems"], record=record)
    floor = float(np.linalg.norm(spectrum(cell["target"])[RANK:]) / np.linalg.norm(spectrum(cell["target"])))
    return _path(found) + _outcomes(found, floor, adapter, problem)


def _path(found: Sweep, columns: tuple[str, ...] = COLUMNS) -> list[dict[str, Any]]:
    """A record for each recorded step and seed; columns that are infinite, as κ of a zero factor, are left empty."""
    seen = found.trajectory
    return [
        {"record": "step", "step": step, "draw": draw}
        | {name: _finite(seen[name][row, draw]) for name in columns if name in seen.columns}
        for row, step in enumerate(seen.steps)
        for draw in range(seen["frobenius"].shape[1])
    ]


def _outcomes(found: Sweep, floor: float, adapter: Any, problem: nl.UpdateProblem) -> list[dict[str, Any]]:
    """For each seed the final error and the steps to the tolerance above the floor, with the best rate."""
    seen, records = found.trajectory, []
    for draw in range(seen["frobenius"].shape[1]):
        errors = seen["frobenius"][:, draw]
        far = np.flatnonzero(~(errors <= floor * (1 + 1e-3) + TOLERANCE))
        arrived = seen.status == "ok" and (far.size == 0 or far[-1] + 1 < errors.size)
        steps = seen.steps[far[-1] + 1 if far.size else 0] if arrived else None
        work = None
        if steps is not None:
            shorter = replace(adapter, steps=steps)
            work = int(shorter.cost(problem).at(problem, shorter).prepare.total())
        outcome = {"final": _finite(seen.final()[draw]), "floor": floor, "steps_to": steps, "operations_to": work}
        words = {"best_rate": found.best, "edge": found.edge, "training": seen.status}
        diverged = int(np.sum(~np.isfinite(found.errors)))
        records.append({"record": "outcome", "draw": draw, "rates_diverged": diverged} | outcome | words)
    return records


def _finite(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


# -- near the optimum --------------------------------------------------------------------------------------------------


def local(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """From 0.1 σ_r beside the balanced factors of the update: the error step by step, and the factor that remains."""
    rng, s = np.random.default_rng(seed), spectrum(cell["target"])
    problem, factors, smallest = _near(s, rng)
    if cell["optimiser"] == "scaled_gd":
        rate, promised = float(cell["rate"]), theory.scaled_gd_factor(cell["rate"])
    else:
        known = theory.gradient_descent_rate(theory.local_spectrum(s, D_OUT, D_IN))
        rate, promised = known.best, known.factor
    steps = int(np.ceil(max(LOCAL_STEPS, 6.0 / (1.0 - promised))))
    loss, rule, errors = regression(problem, "frobenius"), OPTIMISERS[cell["optimiser"]], []
    for t in range(1, steps + 1):
        errors.append(float(np.linalg.norm(factors.B @ factors.A - problem.delta)))
        factors, _ = rule.step(loss, factors, (), rate, t)
    seen = np.flatnonzero(np.array(errors) > 1e-10 * smallest)[-1]  # what is below is rounding
    half = int(seen) // 2
    factor = (errors[seen] / errors[half]) ** (1.0 / (seen - half))
    path = [{"record": "step", "step": t, "error": e / smallest} for t, e in enumerate(errors[: LOCAL_STEPS + 1])]
    return [*path, {"record": "factor", "factor": factor, "promised": promised, "rate_used": rate}]


def _near(s: np.ndarray[Any, Any], rng: np.random.Generator) -> tuple[nl.UpdateProblem, Factors, float]:
    """An update U Σ Vᵀ, factors at the distance 0.1 σ_r of its balanced ones, and σ_r."""
    left, right = (haar_orthogonal(n, rng, columns=s.size) * s**0.5 for n in (D_OUT, D_IN))
    moves = [rng.standard_normal(f.shape) for f in (left, right)]
    distance = np.sqrt(sum(np.sum((move * s**0.5) ** 2) for move in moves))
    B, A = (f + 0.1 * s[-1] / distance * move for f, move in zip((left, right), moves, strict=True))
    return nl.UpdateProblem(left @ right.T), Factors(B, A.T), float(s[-1])


# -- starts ------------------------------------------------------------------------------------------------------------


def starts(cell: dict[str, Any], _: int) -> list[dict[str, Any]]:
    """One initialisation, trained on inputs whose covariance has the condition 100, and the floor of that start."""
    name = cell["initialisation"]
    problem = start_problem(cell["where"], cell["seeds"], np.random.default_rng(cell["problems"]))
    options = {"objective": "data", "initialisation": name, "optimiser": cell["optimiser"], "steps": cell["steps"]}
    adapter = nl.method("lora", rank=RANK, **options)
    record = recorded_steps(cell["steps"], 40)
    found = sweep(adapter, problem, RATES[cell["optimiser"]], rng=cell["problems"], by="data", record=record)
    whole = np.linalg.norm(problem.inputs @ np.swapaxes(problem.delta, -1, -2), axis=(-2, -1))
    offset = np.zeros_like(problem.delta)
    if INITIALISATIONS[name].offset:
        offset = np.matmul(*start(name, problem, adapter.loss(problem), RANK, np.random.default_rng(0)))
    words = {"best_rate": found.best, "edge": found.edge, "training": found.trajectory.status}
    outcomes = [
        {
            "record": "outcome",
            "draw": draw,
            "final": _finite(found.trajectory.final("data")[draw]),
            "floor": theory.offset_floor(problem.inputs @ problem.delta[draw].T, problem.inputs @ offset[draw].T, RANK)
            / float(whole[draw]),
        }
        for draw in range(cell["seeds"])
    ]
    return _path(found, ("frobenius", "data")) + [outcome | words for outcome in outcomes]


def start_problem(where: str, seeds: int, rng: np.random.Generator) -> nl.UpdateProblem:
    """Weights ten times the update; updates of rank r plus noise in their leading, their trailing or any spaces."""
    bases, deltas = [], []
    for _ in range(seeds):
        u, v = haar_orthogonal(D_OUT, rng), haar_orthogonal(D_IN, rng)
        values = np.arange(1, D_IN + 1) ** -0.5
        kept = {"leading": slice(None, RANK), "trailing": slice(D_IN - RANK, D_IN)}.get(where)
        left, right = (haar_orthogonal(n, rng, columns=RANK) for n in (D_OUT, D_IN))
        if kept is not None:
            left, right = (frame[:, kept] @ haar_orthogonal(RANK, rng) for frame in (u, v))
        s = np.geomspace(1.0, 0.1, RANK)
        noise = rng.standard_normal((D_OUT, D_IN)) * 1e-3 / np.sqrt(D_OUT)
        deltas.append(left * s @ right.T + noise)
        bases.append(u[:, :D_IN] * (10 * np.linalg.norm(s) / np.linalg.norm(values) * values) @ v.T)
    x = rng.standard_normal((SAMPLES, D_IN)) * np.geomspace(1.0, 0.1, D_IN) @ haar_orthogonal(D_IN, rng)
    return nl.UpdateProblem(np.stack(deltas), base=np.stack(bases), inputs=x / np.linalg.norm(x, 2) * SAMPLES**0.5)


# -- streams -----------------------------------------------------------------------------------------------------------


def stream(cell: dict[str, Any], _: int) -> list[dict[str, Any]]:
    """Batches of white inputs with noisy outputs: the error in the last quarter of the steps, at the best rate."""
    rng = np.random.default_rng(cell["problems"])
    delta = stacked(cell["target"], cell["seeds"], rng)
    x = haar_orthogonal(SAMPLES, rng, columns=D_IN) * SAMPLES**0.5
    options = {"objective": "data", "batch": BATCH, "noise": NOISE, "steps": cell["steps"]}
    adapter = nl.method("lora", rank=RANK, optimiser=cell["optimiser"], **options)
    last = range(3 * cell["steps"] // 4, cell["steps"], max(1, cell["steps"] // 40))
    problem = nl.UpdateProblem(delta, inputs=x)
    found = sweep(adapter, problem, STREAM_RATES[cell["optimiser"]], rng=cell["problems"], record=last)
    late = np.median(found.trajectory["frobenius"][1:], axis=0)
    words = {"best_rate": found.best, "edge": found.edge, "training": found.trajectory.status}
    return [{"record": "outcome", "draw": draw, "late": _finite(e)} | words for draw, e in enumerate(late)]
