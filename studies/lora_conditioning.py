"""How does LoRA train when the update it has to find is badly conditioned, and which rule or start helps?"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nla_llm.methods.update.lora.initialisations import INITIALISATIONS
from nla_llm.methods.update.lora.optimisers import OPTIMISERS
from nla_llm.study import Figure, Study, Table
from nla_llm.study.medians import median_text, medians

from . import _lora_claims as claims
from . import _lora_figures as drawn
from . import _lora_training as training
from ._lora_claims import bound_data, of, step_costs

if TYPE_CHECKING:
    from collections.abc import Callable

SHOWN = "100"  # the condition number of which factors and angles are drawn
CONDITIONS = ("kappa_A", "kappa_B", "kappa_product")
TARGETS = {"small": ("1", "100"), "default": ("1", "10", "100", "1000"), "full": ("1", "10", "100", "1000", "10000")}
SIZES = {  # seeds; steps of races, of starts, of streams
    "small": (3, 200, 100, 200),
    "default": (5, 1500, 600, 800),
    "full": (10, 20_000, 3000, 10_000),
}
STARTS = ("gaussian", "pissa", "milora", "olora", "lora_ga", "lora_one", "eva", "corda")
PLACES = ("any", "leading", "trailing")


def cells(scale: str) -> list[dict[str, Any]]:
    """Races of all rules, factors near the optimum, races of all starts, and noisy streams."""
    seeds, steps, start_steps, stream_steps = SIZES[scale]
    conditions = TARGETS[scale]
    races = [
        {"what": "race", "target": target, "optimiser": rule, "problems": 0, "seeds": seeds, "steps": steps}
        for target in (*conditions, "power law")
        for rule in OPTIMISERS
    ]
    local = [
        {"what": "local", "target": target, "optimiser": rule, "rate": rate, "seed": seed}
        for target in conditions
        for rule, rate in (("gradient_descent", None), ("scaled_gd", 0.5), ("scaled_gd", 0.2))
        for seed in range(seeds)
    ]
    starts = [
        {"what": "start", "where": where, "initialisation": name, "optimiser": "adam", "seeds": seeds,
         "problems": 1, "steps": start_steps}
        for where in PLACES
        for name in STARTS
    ]  # fmt: skip
    streams = [
        {"what": "stream", "target": target, "optimiser": rule, "problems": 2, "seeds": seeds, "steps": stream_steps}
        for target in conditions
        for rule, row in OPTIMISERS.items()
        if row.stochastic
    ]
    return races + local + starts + streams


def measure(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Records of one cell."""
    work = {"race": training.race, "local": training.local, "start": training.starts, "stream": training.stream}
    return work[cell["what"]](cell, seed)


# -- figures and tables ------------------------------------------------------------------------------------------------


def figures(records: pd.DataFrame) -> list[Figure | Callable[[], Figure]]:
    """Races, steps and factors against the condition, the bound, conditions and angles, starts, streams."""
    makers = (race_figure, condition_figure, bound_figure, pair_figure, starts_figure, streams_figure)
    return [partial(make, records) for make in makers]


def spread(records: pd.DataFrame) -> str:
    """How medians over the seeds are shown."""
    return f"medians over {int(records['seeds'].dropna().iloc[0])} seeds, bands from the least to the largest"


def race_figure(records: pd.DataFrame) -> Figure:
    """Error against the step for every rule."""
    data = medians(of(records, "race", "step"), ["target", "optimiser", "step"], "frobenius")
    data = data.merge(floors(of(records, "race", "outcome")), on="target")
    caption = (
        f"Relative error against the step for updates ({training.D_OUT} × {training.D_IN}) of rank r = {training.RANK} "
        "with the condition number κ, and for the spectrum i^(−1/2), every rule at the best rate of its grid; "
        f"{spread(records)}. Zero update: 1; grey: the truncated decomposition, where it is not exact."
    )
    return Figure("race", caption, drawn.race, data, panels=(2, 3), size=(6.5, 5.0))


def condition_figure(records: pd.DataFrame) -> Figure:
    """Steps to the tolerance, and the factor per step, against the condition."""
    caption = (
        "Left: first recorded step from which the error stays below 10⁻⁶ (crosses above the dotted line: not within "
        f"the steps given); {spread(records)}. Right: distance of the factor per step from one, near the optimum, "
        "measured (markers) and by closed form (dashed)."
    )
    data = condition_data(of(records, "race", "outcome"), of(records, "local", "factor"))
    return Figure("condition", caption, drawn.condition, data, size=(6.5, 3.6), panels=(1, 2))


def bound_figure(records: pd.DataFrame) -> Figure:
    """Errors near the optimum and the published bound."""
    caption = (
        "Error over σ_r from a start at the distance 0.1 σ_r of the balanced factors: scaled gradient descent with "
        "η = 0.5 and η = 0.2, the bound of Tong, Ma and Chi 2021 (dashed), and gradient descent at its best rate; one "
        "line for each κ and seed."
    )
    data = bound_data(of(records, "local", "step"))
    return Figure("bound", caption, drawn.bound, data, size=(6.5, 3.2), panels=(1, 3))


def pair_figure(records: pd.DataFrame) -> Figure:
    """Condition numbers of the factors and angles of their spaces against the step."""
    path = of(records, "race", "step")
    shown = path[path["target"] == SHOWN]
    known = shown.dropna(subset=list(CONDITIONS))
    curves = [(known, name) for name in CONDITIONS] + [(shown, name) for name in ("angle_left", "angle_right")]
    data = [medians(part, ["optimiser", "step"], name).assign(quantity=name) for part, name in curves]
    caption = (
        "Condition numbers of the factors and of their product, and largest principal angles to the column and row "
        f"spaces of the update, κ = {SHOWN}; {spread(records)}."
    )
    joined = pd.concat(data, ignore_index=True)
    return Figure("pair", caption, drawn.pair, joined, panels=(2, 3), size=(6.5, 5.0))


def starts_figure(records: pd.DataFrame) -> Figure:
    """Errors on the inputs against the step for every start."""
    outcome = of(records, "start", "outcome")
    least = medians(outcome[outcome["initialisation"] == "gaussian"], ["where"], "floor")
    data = medians(of(records, "start", "step"), ["where", "initialisation", "step"], "data")
    data = data.merge(least.rename(columns={"median": "floor"})[["where", "floor"]], on="where")
    caption = (
        "Relative error on the inputs against the step for starts of training, Adam at the best rate of its grid, for "
        "updates of rank r plus noise in any, the leading and the trailing singular spaces of the weight; "
        f"{spread(records)}. Grey: the truncated decomposition for these inputs."
    )
    return Figure("starts", caption, drawn.starts, data, size=(6.5, 3.4), panels=(1, 3))


def streams_figure(records: pd.DataFrame) -> Figure:
    """Errors at the end of noisy training against the condition."""
    caption = (
        f"Relative error in the last quarter of training on batches of {training.BATCH} white inputs with noise "
        f"{training.NOISE} on the outputs, at the best rate; {spread(records)}."
    )
    data = medians(of(records, "stream", "outcome"), ["target", "optimiser"], "late")
    return Figure("streams", caption, drawn.streams, data)


def floors(outcome: pd.DataFrame) -> pd.DataFrame:
    """The error of the truncated decomposition for each target."""
    return outcome.groupby("target", sort=False)["floor"].first().reset_index()


def condition_data(outcome: pd.DataFrame, factors: pd.DataFrame) -> pd.DataFrame:
    """Steps to the tolerance, and factors with their closed forms, against the condition."""
    ranked = outcome[outcome["target"] != "power law"]
    ranked = ranked.assign(reached=ranked["steps_to"].fillna(np.inf))
    steps = medians(ranked, ["target", "optimiser", "steps"], "reached").assign(panel="steps")
    gaps = factors.assign(gap=1 - factors["factor"], theory=1 - factors["promised"])
    gaps["optimiser"] = gaps["optimiser"] + gaps["rate"].map(lambda r: "" if pd.isna(r) else f", η = {r:g}")
    factor = medians(gaps, ["target", "optimiser", "theory"], "gap").assign(panel="factor")
    data = pd.concat([steps, factor], ignore_index=True)
    return data.assign(condition=data["target"].astype(float))


def tables(records: pd.DataFrame) -> list[Table | Callable[[], Table]]:
    """Outcomes of races and starts, and what a step costs."""
    return [*(partial(table, records) for table in (race_table, stream_table, start_table)), cost_table]


def race_table(records: pd.DataFrame) -> Table:
    """Best rates, errors, steps and operations."""
    outcome, rows = of(records, "race", "outcome"), []
    for (target, rule), group in outcome.groupby(["target", "optimiser"], sort=False):
        reached = group["steps_to"].notna().all()
        rows.append(
            {
                "update": f"κ = {target}" if target != "power law" else "i^(−1/2)",
                "rule": drawn.SHORT[rule],
                "best rate": rate_text(group),
                "diverged": f"{group['rates_diverged'].iloc[0]:.0f} of {len(training.RATES[rule])}",
                "error at the end": median_text(group, "final"),
                "optimum": f"{group['floor'].iloc[0]:.3g}",
                "steps": median_text(group, "steps_to") if reached else "not reached",
                "operations": f"{group['operations_to'].median():.2g}" if reached else "",
            }
        )
    caption = (
        "Races (GD: gradient descent, ALS: alternating least squares): best rate of the grid, an end of it marked, how "
        "many rates diverged, error after "
        f"{outcome['steps'].iloc[0]:.0f} steps, steps and operations until the error stays within 10⁻⁶, or a "
        "thousandth of itself, above the optimum; medians with the least and the largest over seeds."
    )
    return Table("races", caption, pd.DataFrame(rows))


def rate_text(group: pd.DataFrame) -> str:
    """The best rate, marked where it is an end of its grid; a rule without a rate has a dash."""
    if len(training.RATES[group["optimiser"].iloc[0]]) == 1:
        return "–"
    if pd.isna(group["best_rate"].iloc[0]):
        return "all diverged"
    edge = {"lower": " (lower end)", "upper": " (upper end)"}.get(group["edge"].iloc[0], "")
    return f"{group['best_rate'].iloc[0]:.3g}{edge}"


def stream_table(records: pd.DataFrame) -> Table:
    """Errors of noisy training with the rates at which they were had."""
    outcome, rows = of(records, "stream", "outcome"), []
    for (target, rule), group in outcome.groupby(["target", "optimiser"], sort=False):
        row = {"update": f"κ = {target}", "rule": drawn.SHORT[rule], "best rate": rate_text(group)}
        rows.append(row | {"error in the last quarter": median_text(group, "late")})
    caption = (
        f"Noisy batches: best rate of the grid and error in the last quarter of {outcome['steps'].iloc[0]:.0f} steps; "
        "medians with the least and the largest over seeds."
    )
    return Table("streams", caption, pd.DataFrame(rows))


def start_table(records: pd.DataFrame) -> Table:
    """Final errors of the starts beside the least that each can reach."""
    outcome, rows = of(records, "start", "outcome"), []
    for (where, name), group in outcome.groupby(["where", "initialisation"], sort=False):
        row = {"update in": f"{where} spaces", "start": drawn.STARTS[name], "best rate": rate_text(group)}
        found = {"error at the end": median_text(group, "final"), "least of this start": median_text(group, "floor")}
        rows.append(row | found | {"subtracted": "yes" if INITIALISATIONS[name].offset else "no"})
    caption = (
        "Starts: relative error on the inputs after "
        f"{outcome['steps'].iloc[0]:.0f} steps of Adam, and the least that training from this start can reach: where "
        "s·B₀A₀ is subtracted from the weight, ΔW + s·B₀A₀ would have to be of rank r."
    )
    return Table("starts", caption, pd.DataFrame(rows))


def cost_table() -> Table:
    """What a step and its memory cost, by formula."""
    caption = (
        "Operations of one training step of a layer (matrix products; forward and backward) by LoRA over those of a "
        "fully tuned layer, and numbers kept for Adam (parameters, gradients, moments) over those of the whole weight; "
        "formulas that are counted in the tests."
    )
    rows = [{"d": d, "r": r, "r/d": f"{r / d:.4f}"} | step_costs(d, r) for d in (1024, 4096) for r in (4, 16, 64)]
    return Table("step", caption, pd.DataFrame(rows))


study = Study(
    name="lora_conditioning",
    title="Training a low-rank update that is badly conditioned",
    question="How many steps do gradient descent, Adam, LoRA+, scaled gradient descent and alternating least squares "
    "need to find a low-rank update, how does that depend on its condition number, and what do the published starts "
    "reach?",
    setup=(
        "LoRA is trained on a regression whose answer is known: the update itself, or its outputs on given inputs. "
        "Every rule runs at the best rate of its own grid, the same for all seeds, and the report says where that rate "
        "is an end of the grid. Errors stand between the zero update and the truncated singular value decomposition."
    ),
    cells=cells,
    measure=measure,
    figures=figures,
    tables=tables,
    claims=claims.claims,
    references=(
        "E. Hu et al., LoRA: low-rank adaptation of large language models, 2021, arXiv 2106.09685.",
        "T. Tong, C. Ma and Y. Chi, Accelerating ill-conditioned low-rank matrix estimation via scaled gradient "
        "descent, 2021, arXiv 2005.08898.",
        "S. Hayou, N. Ghosh and B. Yu, LoRA+: efficient low rank adaptation of large models, 2024, arXiv 2402.12354.",
        "F. Meng, Z. Wang and M. Zhang, PiSSA, 2024, arXiv 2404.02948.",
        "Y. Zhang, F. Liu and Y. Chen, LoRA-One, 2025, arXiv 2502.01235.",
    ),
    headline="small",
)
