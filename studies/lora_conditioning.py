"""How does LoRA train when the update it has to find is badly conditioned, and which rule or start helps?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import sympy

from nla_llm import costs
from nla_llm.methods.update.lora import steps as layer
from nla_llm.methods.update.lora.initialisations import INITIALISATIONS
from nla_llm.methods.update.lora.optimisers import OPTIMISERS
from nla_llm.study import Claim, Figure, Study, Table
from nla_llm.study.frames import succeeded
from nla_llm.study.medians import median_text, medians
from nla_llm.theory import low_rank_training as theory

from . import _lora_figures as drawn
from . import _lora_training as training

TARGETS = {"small": ("1", "100"), "default": ("1", "10", "100", "1000"), "full": ("1", "10", "100", "1000", "10000")}
SIZES = {  # seeds; steps of races, of starts, of streams
    "small": (3, 200, 100, 200),
    "default": (5, 2000, 800, 1000),
    "full": (10, 20_000, 3000, 10_000),
}
STARTS = ("gaussian", "pissa", "milora", "olora", "lora_ga", "lora_one", "eva", "corda")
PLACES = ("any", "leading", "trailing")


def cells(scale: str) -> list[dict[str, Any]]:
    """Races of all rules, factors near the optimum, races of all starts, and noisy streams."""
    seeds, steps, start_steps, stream_steps = SIZES[scale]
    conditions = TARGETS[scale]
    races = [
        {"what": "race", "target": target, "optimiser": rule, "seeds": seeds, "steps": steps}
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
         "steps": start_steps}
        for where in PLACES
        for name in STARTS
    ]  # fmt: skip
    streams = [
        {"what": "stream", "target": target, "optimiser": rule, "seeds": seeds, "steps": stream_steps}
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


def of(records: pd.DataFrame, what: str, record: str) -> pd.DataFrame:
    """Records of one kind of cell and of one kind."""
    found = succeeded(records, what=what)
    return found[found["record"] == record] if "record" in found.columns else found.head(0)


def figures(records: pd.DataFrame) -> list[Figure]:
    """Races, steps and factors against the condition, the bound, conditions and angles, starts, streams."""
    path, outcome = of(records, "race", "step"), of(records, "race", "outcome")
    near, factors = of(records, "local", "step"), of(records, "local", "factor")
    seeds = int(path["seeds"].iloc[0])
    keys = ["target", "optimiser", "step"]
    race = medians(path, keys, "frobenius").merge(floors(outcome), on="target")
    middle = sorted(set(path["target"]) - {"power law", "1"}, key=float)
    shown = path[path["target"] == ("100" if "100" in middle else middle[-1])]
    known = shown.dropna(subset=["kappa_A", "kappa_B", "kappa_product"])
    conditions = [
        medians(known, ["optimiser", "step"], name).assign(quantity=name)
        for name in ("kappa_A", "kappa_B", "kappa_product")
    ]
    angles = [
        medians(shown, ["optimiser", "step"], name).assign(quantity=name) for name in ("angle_left", "angle_right")
    ]
    over = f"medians over {seeds} seeds, bands from the least to the largest"
    sizes = f"{training.D_OUT} × {training.D_IN}, r = {training.RANK}"
    captions = {
        "race": f"Relative error against the step for updates ({sizes}) of rank r with the condition number κ, and for "
        f"the spectrum i^(−1/2), every rule at the best rate of its grid; {over}. Zero update: 1; grey: the truncated "
        "decomposition, where it is not exact.",
        "condition": "Left: first recorded step from which the error stays below 10⁻⁶ (crosses on the upper edge: not "
        "within the steps given). Right: distance of the factor per step from one, near the optimum, by simulation "
        "(markers) and closed form (dashed).",
        "bound": "Error over σ_r from a start at the distance 0.1 σ_r of the balanced factors: scaled gradient descent "
        "with η = 0.5 and η = 0.2, the bound of Tong, Ma and Chi 2021 (dashed), and gradient descent at its best rate; "
        "one line for each κ and seed.",
        "pair": f"Condition numbers of the factors and of their product, and largest principal angles to the column "
        f"(left) and row spaces (right) of the update, κ = {shown['target'].iloc[0]}; {over}.",
        "starts": "Relative error on the inputs against the step for starts of training, Adam at the best rate of its "
        "grid, for updates of rank r plus noise in any, the leading and the trailing singular spaces of the weight; "
        f"{over}. Grey: the truncated decomposition for these inputs.",
        "streams": f"Relative error in the last quarter of training on batches of {training.BATCH} white inputs with "
        f"noise {training.NOISE} on the outputs, at the best rate; {over}.",
    }
    streams = of(records, "stream", "outcome")
    start_path, start_outcome = of(records, "start", "step"), of(records, "start", "outcome")
    start_floor = medians(start_outcome[start_outcome["initialisation"] == "gaussian"], ["where"], "floor")
    starts = medians(start_path, ["where", "initialisation", "step"], "data")
    starts = starts.merge(start_floor.rename(columns={"median": "floor"})[["where", "floor"]], on="where")
    pair = pd.concat([*conditions, *angles], ignore_index=True)
    wide: dict[str, Any] = {"panels": (2, 3), "size": (6.5, 5.0)}
    return [
        Figure("race", captions["race"], drawn.race, race, **wide),
        Figure(
            "condition",
            captions["condition"],
            drawn.condition,
            condition_data(outcome, factors),
            size=(6.5, 3.6),
            panels=(1, 2),
        ),
        Figure("bound", captions["bound"], drawn.bound, bound_data(near), size=(6.5, 3.2), panels=(1, 3)),
        Figure("pair", captions["pair"], drawn.pair, pair, **wide),
        Figure("starts", captions["starts"], drawn.starts, starts, size=(6.5, 3.4), panels=(1, 3)),
        Figure("streams", captions["streams"], drawn.streams, medians(streams, ["target", "optimiser"], "late")),
    ]


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


def bound_data(near: pd.DataFrame) -> pd.DataFrame:
    """Errors step by step near the optimum, and the bound where it speaks."""
    scaled = near["optimiser"] == "scaled_gd"
    limit = [
        float(theory.scaled_gd_bound(t, 1.0, rate)) if is_scaled else np.nan
        for t, rate, is_scaled in zip(near["step"], near["rate"], scaled, strict=True)
    ]
    return near.assign(bound=limit)[["optimiser", "rate", "target", "seed", "step", "error", "bound"]]


def tables(records: pd.DataFrame) -> list[Table]:
    """Outcomes of races and starts, and what a step costs."""
    outcome = of(records, "race", "outcome")
    rows = []
    for (target, rule), group in outcome.groupby(["target", "optimiser"], sort=False):
        reached = group["steps_to"].notna().all()
        rows.append(
            {
                "update": f"κ = {target}" if target != "power law" else "i^(−1/2)",
                "rule": drawn.RULES[rule],
                "best rate": rate_text(group),
                "rates that diverged": f"{group['rates_diverged'].iloc[0]:.0f} of {len(training.RATES[rule])}",
                "error at the end": median_text(group, "final"),
                "optimum": f"{group['floor'].iloc[0]:.3g}",
                "steps": median_text(group, "steps_to") if reached else "not reached",
                "operations": f"{group['operations_to'].median():.2g}" if reached else "",
            }
        )
    race_caption = (
        "Races: best rate of the grid (an end of the grid is marked), error after "
        f"{outcome['steps'].iloc[0]:.0f} steps, steps and operations until the error stays within 10⁻⁶, or a "
        "thousandth of itself, above the optimum; medians with the least and the largest over seeds."
    )
    return [
        Table("races", race_caption, pd.DataFrame(rows)),
        start_table(records),
        Table("step", cost_caption(), step_table()),
    ]


def rate_text(group: pd.DataFrame) -> str:
    """The best rate, marked where it is an end of its grid; a rule without a rate has a dash."""
    if len(training.RATES[group["optimiser"].iloc[0]]) == 1:
        return "–"
    if pd.isna(group["best_rate"].iloc[0]):
        return "all diverged"
    edge = {"lower": " (lower end)", "upper": " (upper end)"}.get(group["edge"].iloc[0], "")
    return f"{group['best_rate'].iloc[0]:.3g}{edge}"


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


def cost_caption() -> str:
    """What the table of costs says."""
    return (
        "Operations of one training step of a layer (matrix products; forward and backward) by LoRA over those of a "
        "fully tuned layer, and numbers kept for Adam (parameters, gradients, moments) over those of the whole weight; "
        "formulas that are counted in the tests."
    )


def step_table() -> pd.DataFrame:
    """Costs of LoRA over full tuning for some sizes."""
    ratio = layer.lora_step_cost().matmuls() / layer.full_step_cost().matmuls()
    first = layer.lora_step_cost(inputs=False).matmuls() / layer.full_step_cost(inputs=False).matmuls()
    memory = layer.lora_memory("adam").total() / layer.full_memory("adam").total()
    rows = []
    for d in (1024, 4096):
        for rank in (4, 16, 64):
            sizes = {costs.d_in: d, costs.d_out: d, costs.r: rank}
            values = [float(sympy.simplify(x).subs(sizes)) for x in (ratio, first, memory)]
            names = ("operations", "operations, first layer", "memory for Adam")
            rows.append({"d": d, "r": rank, "r/d": f"{rank / d:.4f}"} | {
                name: f"{value:.4f}" for name, value in zip(names, values, strict=True)
            })  # fmt: skip
    return pd.DataFrame(rows)


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(records: pd.DataFrame) -> list[Claim]:
    """What the records say."""
    outcome, factors = of(records, "race", "outcome"), of(records, "local", "factor")
    found = [scaled_factor(factors), descent_factor(factors), bound_holds(of(records, "local", "step"))]
    found += [
        independence(outcome),
        dependence(outcome),
        gap_at_hundred(outcome),
        power_law(outcome),
        one_sweep(outcome),
    ]
    found += [noise(of(records, "stream", "outcome"))]
    return [*found, final_condition(records), *start_claims(of(records, "start", "outcome")), step_claim()]


def scaled_factor(factors: pd.DataFrame) -> Claim:
    """The closed form of scaled gradient descent."""
    scaled = factors[factors["optimiser"] == "scaled_gd"]
    worst = float((scaled["factor"] / scaled["promised"] - 1).abs().max())
    sentence = (
        "Near the optimum a step of scaled gradient descent multiplies the error by max(|1 − η|, |1 − 2η|) to 1 %, for "
        "every condition number"
    )
    return Claim.decide(
        sentence, worst, worst, 0.01, "<=", number=f"largest relative gap {worst:.2g}", source="derived"
    )


def descent_factor(factors: pd.DataFrame) -> Claim:
    """The closed form of gradient descent, in the distance from one."""
    plain = factors[factors["optimiser"] == "gradient_descent"]
    gaps = (1 - plain["factor"]) / (1 - plain["promised"])
    low, high = float(gaps.min()), float(gaps.max())
    sentence = (
        "Near the optimum gradient descent at its best rate multiplies the error by (2κ − 1)/(2κ + 1): 1 minus the "
        "factor is met within a fifth"
    )
    number = f"measured over promised {low:.3g} to {high:.3g}"
    inside = max(abs(low - 1), abs(high - 1))
    return Claim.decide(sentence, inside, inside, 0.2, "<=", number=number, source="derived")


def bound_holds(near: pd.DataFrame) -> Claim:
    """The published bound, step by step."""
    data = bound_data(near).dropna(subset=["bound"])
    data = data[data["error"] > 1e-9]  # below it is the rounding of κ = 1000
    worst = float((data["error"] / data["bound"]).max())
    sentence = "From within 0.1 σ_r, scaled gradient descent stays below (1 − 0.7 η)^t · 0.15 σ_r at every step"
    number = f"largest error over bound {worst:.3g}"
    source = "Tong, Ma and Chi 2021, arXiv 2005.08898"
    return Claim.decide(sentence, worst, worst, 1.0, "<=", number=number, source=source)


def reached(outcome: pd.DataFrame, rule: str, target: str) -> tuple[float, float]:
    """Least and largest number of steps over seeds, infinite where the tolerance was not reached."""
    group = outcome[(outcome["optimiser"] == rule) & (outcome["target"] == target)]
    steps = group["steps_to"].fillna(np.inf)
    return float(steps.min()), float(steps.max())


def conditions_of(outcome: pd.DataFrame) -> list[str]:
    """Condition numbers of the races, ascending."""
    return sorted(set(outcome["target"]) - {"power law"}, key=float)


def independence(outcome: pd.DataFrame) -> Claim:
    """Scaled gradient descent from a random start."""
    ends = conditions_of(outcome)
    (low1, high1), (low2, high2) = (reached(outcome, "scaled_gd", ends[i]) for i in (0, -1))
    sentence = (
        "From a random start scaled gradient descent needs at most twice as many steps to 10⁻⁶ at "
        f"κ = {ends[-1]} as at κ = 1"
    )
    number = f"{low1:.0f} to {high1:.0f} steps at κ = 1, {low2:.0f} to {high2:.0f} at κ = {ends[-1]}"
    return Claim.decide(sentence, low2 / high1, high2 / low1, 2.0, "<=", number=number,
                        source="Tong, Ma and Chi 2021, arXiv 2005.08898")  # fmt: skip


def dependence(outcome: pd.DataFrame) -> Claim:
    """Gradient descent from a random start."""
    low, high = reached(outcome, "gradient_descent", "100")
    steps = float(outcome["steps"].iloc[0])
    _, scaled = reached(outcome, "scaled_gd", "100")
    sentence = "At κ = 100 gradient descent at its best rate needs more than ten times the steps of the scaled one"
    least = min(low, steps)  # not reached: more than all steps
    text = f"{low:.0f}" if np.isfinite(low) else f"not reached in {steps:.0f}"
    number = f"{text}, against at most {scaled:.0f} steps"
    return Claim.decide(sentence, least / scaled, max(high, steps) / scaled, 10.0, ">", number=number)


def gap_at_hundred(outcome: pd.DataFrame) -> Claim:
    """Final errors at κ = 100."""
    at = outcome[outcome["target"] == "100"].groupby("optimiser")["final"]
    least, largest = at.min(), at.max()
    others = ["gradient_descent", "momentum", "adam", "lora_plus"]
    sentence = (
        "At κ = 100 gradient descent, momentum, Adam and LoRA+ at their best rates all end with an error above 10⁻³, "
        "scaled gradient descent below 10⁻¹²"
    )
    low, scaled = float(least[others].min()), float(largest["scaled_gd"])
    number = f"least of the four {low:.2g}, largest of the scaled one {scaled:.2g}"
    holds = scaled < 1e-12
    return Claim.decide(sentence, low if holds else 0.0, low if holds else 0.0, 1e-3, ">", number=number)


def power_law(outcome: pd.DataFrame) -> Claim:
    """The spectrum that falls slowly."""
    slow = outcome[outcome["target"] == "power law"]
    excess = (slow["final"] / slow["floor"] - 1).groupby(slow["optimiser"]).max()
    worst, name = float(excess.max()), str(excess.idxmax())
    sentence = "On the spectrum i^(−1/2) every rule comes within 1 % of the error of the truncated decomposition"
    number = f"largest excess {100 * worst:.2g} %, of {name.replace('_', ' ')}"
    return Claim.decide(sentence, worst, worst, 0.01, "<=", number=number)


def one_sweep(outcome: pd.DataFrame) -> Claim:
    """Alternating least squares needs no training at all."""
    sweeps = outcome[(outcome["optimiser"] == "alternating") & (outcome["target"] != "power law")]["steps_to"]
    worst = float(sweeps.fillna(np.inf).max())
    sentence = (
        "Where the update has rank r, one sweep of alternating least squares finds it, for every condition number"
    )
    return Claim.decide(sentence, worst, worst, 1.0, "<=", number=f"at most {worst:.0f} sweep")


def noise(streams: pd.DataFrame) -> Claim:
    """What is left of the advantage where steps are noisy."""
    hardest = max(set(streams["target"]), key=float)
    at = streams[streams["target"] == hardest]
    scaled = at[at["optimiser"] == "scaled_gd"]["late"]
    others = at[at["optimiser"] != "scaled_gd"].groupby("optimiser")["late"]
    low, high = float(others.min().min() / scaled.max()), float(others.max().min() / scaled.min())
    sentence = (
        f"On noisy batches too, at κ = {hardest}, every other rule at its best rate leaves a larger error than scaled "
        "gradient descent"
    )
    return Claim.decide(sentence, low, high, 1.0, ">", number=f"next best over scaled {low:.3g} to {high:.3g}")


def final_condition(records: pd.DataFrame) -> Claim:
    """Where the condition of the update goes when the product is split."""
    path = of(records, "race", "step")
    last = path[(path["target"] == "100") & (path["optimiser"] == "gradient_descent")]
    last = last[last["step"] == last["step"].max()]
    low, high = float((last["kappa_B"] / last["kappa_A"]).min()), float((last["kappa_B"] / last["kappa_A"]).max())
    sentence = (
        "From B = 0 gradient descent keeps the condition of the update in one factor: at κ = 100, κ₂(B) ends more than "
        "ten times κ₂(A)"
    )
    return Claim.decide(sentence, low, high, 10.0, ">", number=f"κ₂(B)/κ₂(A) from {low:.3g} to {high:.3g}")


def start_claims(outcome: pd.DataFrame) -> list[Claim]:
    """What starts from the weight can and cannot reach."""

    def ends(where: str, name: str, column: str) -> tuple[float, float]:
        group = outcome[(outcome["where"] == where) & (outcome["initialisation"] == name)][column]
        return float(group.min()), float(group.max())

    low, high = ends("any", "pissa", "floor")
    lead_low, lead_high = ends("leading", "pissa", "floor")
    zero_low, zero_high = ends("any", "gaussian", "floor")
    reachable = Claim.decide(
        "PiSSA of rank r can represent every update of rank r (within twice the error of a zero start)",
        low / zero_high,
        high / zero_low,
        2.0,
        "<=",
        number=f"least error {low:.2g} to {high:.2g}, of a zero start {zero_low:.2g} to {zero_high:.2g}",
        expected="refuted",
        source="read into Meng, Wang and Zhang 2024, arXiv 2404.02948",
    )
    shared = Claim.decide(
        "It can where the update lies in the leading singular spaces of the weight",
        lead_low / zero_high,
        lead_high / zero_low,
        2.0,
        "<=",
        number=f"least error {lead_low:.2g} to {lead_high:.2g}",
    )
    low, high = ends("any", "lora_one", "final")
    zero = ends("any", "gaussian", "final")
    sooner = Claim.decide(
        "Started by LoRA-One, Adam ends with a smaller error than from a zero B after as many steps",
        low / zero[1],
        high / zero[0],
        1.0,
        "<",
        number=f"{low:.2g} to {high:.2g} against {zero[0]:.2g} to {zero[1]:.2g}",
        source="Zhang, Liu and Chen 2025, arXiv 2502.01235",
    )
    return [reachable, shared, sooner]


def step_claim() -> Claim:
    """Operations of a step, by formula."""
    table = step_table()
    row = table[(table["d"] == 4096) & (table["r"] == 16)].iloc[0]
    value = float(row["operations"])
    return Claim.decide(
        "A training step with LoRA of rank 16 costs less than half of a full one at d = 4096",
        value,
        value,
        0.5,
        "<",
        number=f"{value:.3f} of it, 2/3 + 2r/d: a third is saved, not a factor of d/r",
        expected="refuted",
        source="read into Hu et al. 2021, arXiv 2106.09685, section 4.2",
    )


study = Study(
    name="lora_conditioning",
    title="Training a low-rank update that is badly conditioned",
    question="How many steps do gradient descent, Adam, LoRA+, scaled gradient descent and alternating least squares "
    "need to find a low-rank update, how does that depend on its condition number, and what do the published starts reach?",
    setup=(
        "LoRA is trained on a regression whose answer is known: the update itself, or its outputs on given inputs. Every "
        "rule runs at the best rate of its own grid, the same for all seeds, and the report says where that rate is an "
        "end of the grid. Errors stand between the zero update and the truncated singular value decomposition."
    ),
    cells=cells,
    measure=measure,
    figures=figures,
    tables=tables,
    claims=claims,
    references=(
        "E. Hu et al., LoRA: low-rank adaptation of large language models, 2021, arXiv 2106.09685.",
        "T. Tong, C. Ma and Y. Chi, Accelerating ill-conditioned low-rank matrix estimation via scaled gradient descent, "
        "2021, arXiv 2005.08898.",
        "S. Hayou, N. Ghosh and B. Yu, LoRA+: efficient low rank adaptation of large models, 2024, arXiv 2402.12354.",
        "F. Meng, Z. Wang and M. Zhang, PiSSA, 2024, arXiv 2404.02948.",
        "Y. Zhang, F. Liu and Y. Chen, LoRA-One, 2025, arXiv 2502.01235.",
    ),
    headline="default",
)
