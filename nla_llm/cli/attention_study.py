"""The study behind ``nla-llm attention``: methods measured on somebody's own heads."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nla_llm.cli._heads import Heads, problems_of, stack
from nla_llm.cli._methods import code_of, found, make, parse
from nla_llm.methods import Unsupported, properties_of
from nla_llm.study import Claim, Figure, Skip, Study, Table
from nla_llm.study.frames import groups, succeeded, valued
from nla_llm.study.heads import closer_than_uniform, curve_label, heads_table, medians_by_norm
from nla_llm.study.measuring import head_records
from nla_llm.study.medians import finding, median_text

if TYPE_CHECKING:
    from nla_llm.study import Cell

__all__ = ["BUDGETS", "METHODS", "attention_study"]

METHODS = ("elu_features", "positive_features:directions=orthogonal")  # beside the yardsticks
BUDGETS = (16, 64, 256)
YARDSTICKS = ("uniform", "random_keys", "optimal_rank")
SURE = 5  # heads beyond which order statistics enclose the median with 95 %
CURVE = ["method", "directions", "label"]
_ENTRIES = 1 << 24  # of the attention matrices measured in one cell; more heads than that make several cells


@dataclass(frozen=True)
class Chosen:
    """A method as it was named, with what its records are called."""

    where: str
    options: str
    budget: str | None
    directions: str | None
    label: str
    code: str | None

    @classmethod
    def named(cls, text: str) -> Chosen:
        """Find the method that ``text`` names, and see whether it can be made.

        Raises
        ------
        ValueError
            If there is none, it is no method for attention, or its options are wrong.
        """
        where, options = parse(text)
        made = make(where, options, budget=BUDGETS[0])
        properties = properties_of(made)
        if properties.problem != "attention":
            raise ValueError(f"{where} is no method for attention but for an {properties.problem}")
        budget = None if properties.budget in options or not isinstance(found(where), type) else properties.budget
        directions = getattr(made, "directions", None)
        directions = directions if directions in {"iid", "orthogonal"} else None
        label = _label(where, options, directions)
        return cls(where, json.dumps(options, sort_keys=True), budget, directions, label, code_of(made))

    def cells(self, budgets: tuple[int, ...]) -> list[dict[str, Any]]:
        """Entries of the cells: one for each budget, or one where it has none."""
        entries = {"method": self.where, "options": self.options, "directions": self.directions, "label": self.label}
        return [{**entries, "m": m, "code": self.code} for m in (budgets if self.budget else (None,))]


def _label(where: str, options: dict[str, Any], directions: str | None) -> str:
    told = {"directions", "orthogonal"} if directions else set()
    rest = ", ".join(f"{name} = {value}" for name, value in options.items() if name not in told)
    return curve_label(where, directions) + (f", {rest}" if rest else "")


def attention_study(
    name: str, source: Heads, methods: list[str] | None = None, budgets: list[int] | None = None, draws: int = 6
) -> Study:
    """Study of methods on the heads of a source, to be run like any other.

    Parameters
    ----------
    name : str
        Name of the report.
    source : TensorHeads or ModelHeads
    methods : list of str, optional
        As on the command line, NAME:option=value,...; measured beside the yardsticks, which are always there.
    budgets : list of int, optional
        Budgets of the methods that have one; by default 16, 64 and 256, as far as there are so many keys.
    draws : int
        Draws of a random method.

    Raises
    ------
    ValueError
        If the heads or a method cannot be had, or two methods are the same.
    """
    own = [text for text in methods or METHODS if text not in YARDSTICKS]
    chosen = [Chosen.named(text) for text in (*YARDSTICKS, *own)]
    twice = [c.label for i, c in enumerate(chosen) if c in chosen[:i]]
    if twice:
        raise ValueError(f"--method names {twice[0]} twice")
    problems, digest = source.problems(), source.digest()
    first = next(iter(problems.values()))
    sizes = tuple(dict.fromkeys(budgets or (m for m in BUDGETS if m <= first.n_k)))
    if any(m < 1 for m in sizes):
        raise ValueError(f"--m must be at least 1, got {min(sizes)}")
    grid = [
        {"data": digest, **part, **entry, "draws": draws}
        for part in _parts(problems)
        for method in chosen
        for entry in method.cells(sizes or (first.n_k,))
    ]
    return Study(
        name=name,
        title=f"Approximate attention on {name.removeprefix('attention-')}",
        question=(
            "How far are cheaper attentions from softmax attention on these heads, between doing nothing and the best "
            "possible, and at what cost?"
        ),
        setup=_setup(source, problems, draws),
        cells=partial(_cells, grid),
        measure=partial(_measure, source),
        figures=_figures,
        tables=_tables,
        claims=_claims,
        references=(
            "C. Eckart and G. Young, The approximation of one matrix by another of lower rank, Psychometrika 1, 1936.",
        ),
    )


def _parts(problems: dict[int | None, Any]) -> list[dict[str, Any]]:
    """Heads that are measured together."""
    parts = []
    for layer, problem in problems.items():
        heads = int(np.prod(problem.batch_shape, dtype=int))
        step = max(1, _ENTRIES // (problem.n_q * problem.n_k))
        parts += [
            {"layer": layer, "first": i, "last": min(i + step, heads), "n": problem.n_k} for i in range(0, heads, step)
        ]
    return parts


def _setup(source: Heads, problems: dict[int | None, Any], draws: int) -> str:
    p = next(iter(problems.values()))
    heads = sum(int(np.prod(q.batch_shape, dtype=int)) for q in problems.values())
    structure = ", ".join(sorted(name.replace("_", " ") for name in p.structure)) or "no mask"
    layers = f" in {len(problems)} layers" if len(problems) > 1 else ""
    size = f"{p.n_k} tokens" if p.n_q == p.n_k else f"{p.n_q} queries and {p.n_k} keys"
    count = f"{heads} {'head' if heads == 1 else 'heads'}{layers}"
    values = "" if p.v is not None else " There are no values, so no error of the output."
    return (
        f"{source.describe()} That makes {count} of dimension {p.d} on {size}, {structure}, "
        f"logits scaled by {p.scale:.6g}.{values} "
        "The reference is exact attention in float64; errors are relative, of the matrix P and of the output P v. "
        f"Random methods are drawn {draws} times. "
        "Costs are formulas, for one head, in operations (a multiply-add is two)."
    )


def _cells(grid: list[dict[str, Any]], _scale: str) -> list[dict[str, Any]]:
    return grid


def _measure(source: Heads, cell: Cell, seed: int) -> list[dict[str, Any]]:
    """Errors of one method on some heads of one layer, its cost, and what kind of heads they are."""
    layer: Any = cell["layer"]
    problem = stack(problems_of(source, str(cell["data"]))[layer], *(int(cell[end] or 0) for end in ("first", "last")))
    m = cell["m"]
    method = make(str(cell["method"]), json.loads(str(cell["options"])), budget=None if m is None else int(m))
    if m is not None and properties_of(method).yardstick and int(m) > min(problem.n_q, problem.n_k):
        raise Skip(f"m = {m} exceeds the {min(problem.n_q, problem.n_k)} tokens")
    try:
        records = head_records(problem, method, draws=int(cell["draws"] or 1), seed=seed)
    except Unsupported as reason:
        raise Skip(str(reason)) from reason
    first = int(cell["first"] or 0)
    return [record | {"head": first + i} for i, record in enumerate(records)]


# -- figures and tables ------------------------------------------------------------------------------------------------


def _figures(records: pd.DataFrame) -> list[Figure]:
    """Error against budget, against cost, and by head."""
    from nla_llm.report import charts  # noqa: PLC0415 - matplotlib loads only in the process that draws

    ok = succeeded(records)
    if ok.empty:
        return []
    wide: dict[str, Any] = {"size": (6.5, 3.9), "panels": (1, 2)}
    found_figures = []
    if ok["m"].nunique() > 1:
        caption = f"{_over(ok)}. Grey: doing nothing (uniform, random keys) and the best possible of that rank."
        found_figures.append(
            Figure("budget", caption, charts.draw_against_budget, medians_by_norm(ok, [*CURVE, "m"]), **wide)
        )
    costed = ok.dropna(subset=["operations"])
    if len(costed):
        cost = medians_by_norm(costed, [*CURVE, "operations"]).assign(
            exact_operations=int(ok["exact_operations"].iloc[0])
        )
        caption = (
            f"{_over(ok)}, against operations by formula; the vertical line is exact attention. "
            "The optimal rank is left out: it costs more than what it replaces."
        )
        found_figures.append(Figure("cost", caption, charts.draw_against_cost, cost, **wide))
    points = valued(_largest(ok), "relative_frobenius", [*CURVE, "m", "layer", "head", "entropy", "norm_growth"])
    caption = (
        "Every head against the entropy of its rows, each method at its largest budget; "
        "bars: 95 % intervals over draws."
    )
    return [*found_figures, Figure("heads", caption, charts.draw_against_entropy, points, size=(6.5, 3.7))]


def _over(ok: pd.DataFrame) -> str:
    """What a curve is the median of, and what its band is."""
    heads = ok.groupby(["layer", "head"], dropna=False).ngroups
    if heads == 1:
        return "The one head; bands: 95 % intervals over draws"
    band = "95 % intervals of it" if heads > SURE else "from the smallest to the largest"
    return f"Median over {heads} heads; bands: {band}"


def _largest(ok: pd.DataFrame) -> pd.DataFrame:
    """Each method at its largest budget."""
    largest = ok.groupby(CURVE, dropna=False)["m"].transform("max")
    return ok[ok["m"].isna() | (ok["m"] == largest)]


def _tables(records: pd.DataFrame) -> list[Table]:
    ok = succeeded(records)
    if ok.empty:
        return []
    caption = (
        f"Relative errors: {_over(ok)[0].lower()}{_over(ok)[1:].replace('bands', 'brackets')}. Better than uniform are "
        "heads on which the whole interval over draws lies below uniform attention."
    )
    return [Table("heads", caption, heads_table(ok))]


# -- findings ----------------------------------------------------------------------------------------------------------


def _claims(records: pd.DataFrame) -> list[Claim]:
    """For each method at its largest budget, whether it beats doing nothing on most heads."""
    ok = succeeded(records)
    found_claims = []
    for (method, _, name, m), group in groups(_largest(ok), [*CURVE, "m"]):
        better = closer_than_uniform(ok, group)
        if better is None or method in YARDSTICKS:
            continue
        surely, possibly = (int(b.sum()) for b in better)
        where = "on most heads" if len(group) > 1 else "on this head"
        who = name[:1].upper() + name[1:] + ("" if pd.isna(m) else f", m = {m:.0f},")
        holds, fails = (
            f"{who} is {word}closer to softmax attention than uniform attention {where}" for word in ("", "not ")
        )
        error = median_text(group, "relative_frobenius")
        number = f"{surely} of {len(group)} heads surely, {possibly} at most; median error {error}"
        found_claims.append(finding(holds, fails, surely / len(group), possibly / len(group), 0.5, number=number))
    return found_claims
