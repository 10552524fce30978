"""What the study of LoRA's conditioning claims, and the data that claims and figures share."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import sympy

from nla_llm import costs
from nla_llm.methods.update.lora import steps as layer
from nla_llm.study import Claim
from nla_llm.study.frames import succeeded
from nla_llm.theory import low_rank_training as theory

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd


ENDS = ("final", "late")  # columns of errors at the end of training


def of(records: pd.DataFrame, what: str, record: str) -> pd.DataFrame:
    """Records of one kind of cell and of one kind."""
    found = succeeded(records, what=what)
    return found[found["record"] == record] if "record" in found.columns else found.head(0)


def judged(outcome: pd.DataFrame) -> pd.DataFrame:
    """Outcomes in which an error that is missing, because training diverged, is infinite: else nobody would see it."""
    known = [name for name in ENDS if name in outcome.columns]
    return outcome.assign(**{name: outcome[name].astype(float).fillna(np.inf) for name in known})


def bound_data(near: pd.DataFrame) -> pd.DataFrame:
    """Errors step by step near the optimum, and the bound where it speaks."""
    scaled = near["optimiser"] == "scaled_gd"
    limit = [
        float(theory.scaled_gd_bound(t, 1.0, rate)) if is_scaled else np.nan
        for t, rate, is_scaled in zip(near["step"], near["rate"], scaled, strict=True)
    ]
    return near.assign(bound=limit)[["optimiser", "rate", "target", "seed", "step", "error", "bound"]]


def claims(records: pd.DataFrame) -> list[Callable[[], Claim]]:
    """What the records say."""
    outcome, factors = judged(of(records, "race", "outcome")), of(records, "local", "factor")
    start = judged(of(records, "start", "outcome"))
    pairs = (
        (scaled_factor, factors),
        (descent_factor, factors),
        (bound_holds, of(records, "local", "step")),
        (independence, outcome),
        (dependence, outcome),
        (gap_at_hundred, outcome),
        (power_law, outcome),
        (one_sweep, outcome),
        (noise, judged(of(records, "stream", "outcome"))),
        (final_condition, of(records, "race", "step")),
        (representable, start),
        (shared_spaces, start),
        (gradient_start, start),
    )
    return [*(partial(claim, data) for claim, data in pairs), step_claim]


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
        "At κ = 100 gradient descent, momentum, Adam and LoRA+ at their best rates all end with an error above 10⁻⁵, "
        "scaled gradient descent below 10⁻¹²"
    )
    low, scaled = float(least[others].min()), float(largest["scaled_gd"])
    number = f"least of the four {low:.2g}, largest of the scaled one {scaled:.2g}"
    holds = scaled < 1e-12
    return Claim.decide(sentence, low if holds else 0.0, low if holds else 0.0, 1e-5, ">", number=number)


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


def final_condition(path: pd.DataFrame) -> Claim:
    """Where the condition of the update goes when the product is split."""
    last = path[(path["target"] == "100") & (path["optimiser"] == "gradient_descent")]
    last = last[last["step"] == last["step"].max()]
    low, high = float((last["kappa_B"] / last["kappa_A"]).min()), float((last["kappa_B"] / last["kappa_A"]).max())
    sentence = (
        "From B = 0 gradient descent keeps the condition of the update in one factor: at κ = 100, κ₂(B) ends more than "
        "ten times κ₂(A)"
    )
    return Claim.decide(sentence, low, high, 10.0, ">", number=f"κ₂(B)/κ₂(A) from {low:.3g} to {high:.3g}")


class Start(NamedTuple):
    """A column of one start over seeds, beside that of a zero start: least and largest values, and of the quotient."""

    low: float
    high: float
    zero_low: float
    zero_high: float

    @classmethod
    def of(cls, outcome: pd.DataFrame, where: str, name: str, column: str) -> Start:
        values = outcome[outcome["where"] == where].groupby("initialisation")[column].agg(["min", "max"])
        return cls(*map(float, values.loc[name]), *map(float, values.loc["gaussian"]))

    def against(self, sentence: str, most: float, relation: str, **more: Any) -> Claim:
        """A claim about the quotient."""
        return Claim.decide(sentence, self.low / self.zero_high, self.high / self.zero_low, most, relation, **more)


def representable(outcome: pd.DataFrame) -> Claim:
    """What a start that is subtracted from the weight can reach."""
    pissa = Start.of(outcome, "any", "pissa", "floor")
    return pissa.against(
        "PiSSA of rank r can represent every update of rank r (within twice the error of a zero start)",
        2.0,
        "<=",
        number=f"least error {pissa.low:.2g} to {pissa.high:.2g}, of a zero start {pissa.zero_low:.2g} to "
        f"{pissa.zero_high:.2g}",
        expected="refuted",
        source="read into Meng, Wang and Zhang 2024, arXiv 2404.02948",
    )


def shared_spaces(outcome: pd.DataFrame) -> Claim:
    """Where it can."""
    pissa = Start.of(outcome, "leading", "pissa", "floor")
    return pissa.against(
        "PiSSA can (within twice that error) where the update lies in the leading singular spaces of the weight",
        2.0,
        "<=",
        number=f"least error {pissa.low:.2g} to {pissa.high:.2g}",
    )


def gradient_start(outcome: pd.DataFrame) -> Claim:
    """What knowing the gradient is worth."""
    one = Start.of(outcome, "any", "lora_one", "final")
    return one.against(
        "Started by LoRA-One, Adam ends with a smaller error than from a zero B after as many steps",
        1.0,
        "<",
        number=f"{one.low:.2g} to {one.high:.2g} against {one.zero_low:.2g} to {one.zero_high:.2g}",
        source="Zhang, Liu and Chen 2025, arXiv 2502.01235",
    )


def step_claim() -> Claim:
    """Operations of a step, by formula."""
    value = float(step_costs(4096, 16)["operations"])
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


def step_costs(d: int, rank: int) -> dict[str, str]:
    """LoRA over full tuning of a d × d layer: operations of a step, those of a first layer, memory with Adam."""
    parts = {
        "operations": (layer.lora_step_cost().matmuls(), layer.full_step_cost().matmuls()),
        "operations, first layer": (
            layer.lora_step_cost(inputs=False).matmuls(),
            layer.full_step_cost(inputs=False).matmuls(),
        ),
        "memory for Adam": (layer.lora_memory("adam").total(), layer.full_memory("adam").total()),
    }
    sizes = {costs.d_in: d, costs.d_out: d, costs.r: rank}
    return {name: f"{float(sympy.simplify(a / b).subs(sizes)):.4f}" for name, (a, b) in parts.items()}
