"""From which length on is a cheaper attention really cheaper: by formula, by counting, and by the clock?"""

from __future__ import annotations

from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import sympy

import nla_llm as nl
from nla_llm import costs
from nla_llm.measures import Estimate
from nla_llm.problems import gallery
from nla_llm.study import Claim, Figure, Study, Table
from nla_llm.study.frames import succeeded, valued
from nla_llm.study.medians import finding

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.figure import Figure as Canvas

D, M = 64, 256
COUNTED = (64, 100, 256, 1000)  # lengths at which operations are counted; 100 and 1000 do not divide into chunks
TIMED = {
    "small": (256, 512, 1024),
    "default": (256, 512, 1024, 2048, 4096, 8192),
    "full": tuple(2**i for i in range(8, 16)),
}
NOISY = 2.0  # repeated times further apart than this say more of the machine's load than of the method
LONGEST = 12  # operations in a formula that still fits a column of the table
REPEATS = 9  # the smallest and largest of nine times enclose the median with 99.6 %
METHODS = {
    "exact": {},
    "uniform": {},
    "random_keys": {"m": 64},
    "elu_features": {},
    "positive_features": {"m": M},
}


def cells(scale: str) -> list[dict[str, Any]]:
    """Each method, with and without a causal mask, counted at some lengths and timed at others."""
    grid = [(what, n) for what, lengths in (("count", COUNTED), ("time", TIMED[scale])) for n in lengths]
    return [
        {"what": what, "method": name, "n": n, "d": D, "causal": causal, **options}
        for what, n in grid
        for causal in (False, True)
        for name, options in METHODS.items()
    ]


def problem(n: int, *, causal: bool) -> nl.AttentionProblem:
    """One Gaussian head in float32; its values do not matter here, its sizes do."""
    return gallery.gaussian(n, D, scale=0.5, causal=causal, rng=0).astype(np.float32)


def formula(name: str, p: nl.AttentionProblem) -> costs.Cost:
    """Cost of a method, or of exact attention, as formulas."""
    return costs.exact_attention(p) if name == "exact" else nl.method(name, **METHODS[name]).cost(p)


def measure(cell: dict[str, Any], seed: int) -> dict[str, Any]:
    """Operations by formula, and either their count or the time of making the operator and applying it to v."""
    name, p = cell["method"], problem(cell["n"], causal=cell["causal"])
    method = None if name == "exact" else nl.method(name, **METHODS[name])
    by_formula = formula(name, p).at(p, method)
    record = {"operations": int(by_formula.total()), "prepare": int(by_formula.prepare.total())}
    if cell["what"] == "count":
        counted = costs.count_exact(p) if method is None else costs.count(method, p, rng=seed)
        return record | {"counted": int(counted.total()), "equal": counted == by_formula}
    return record | {"seconds_used": clock(p, method, seed)}


def clock(p: nl.AttentionProblem, method: Any, seed: int) -> Estimate:
    """Median time over repeats, enclosed by the smallest and the largest."""

    def once() -> float:
        start = perf_counter()
        op = p.exact(np.float32) if method is None else method(p, rng=seed)
        op @ p.v
        return perf_counter() - start

    once()  # the first run pays for imports and for memory
    times = np.sort([once() for _ in range(REPEATS)])
    confidence = 1 - 2 * 0.5**REPEATS
    return Estimate(np.median(times), times[0], times[-1], confidence, f"median of {REPEATS} runs, smallest to largest")


# -- figures -----------------------------------------------------------------------------------------------------------


def label(name: str) -> str:
    """Name of a curve."""
    m = METHODS[name].get("m")
    return name.removesuffix("_features").replace("_", " ") + (f", m = {m}" if m else "")


def draw_panels(fig: Canvas, data: pd.DataFrame) -> None:
    """Without and with a causal mask, side by side."""
    from nla_llm.report import charts, style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    unit = data["unit"].iloc[0]
    axes = fig.subplots(1, 2, sharey=True)
    for ax, (causal, panel) in zip(axes, data.groupby("causal"), strict=True):
        for name, curve in panel.groupby("method", sort=False):
            band = (curve[c] for c in ("n", "value", "lower", "upper"))
            charts.draw_curve(ax, *band, method=name, label=label(name))
            if curve["theory"].notna().any():
                family = name if name.endswith("features") else None  # the others are black or grey
                style.theory_line(ax, curve["n"], curve["theory"], family=family, label="formula")
        style.log_axes(ax, x=2)
        style.label(ax, "tokens n", unit if ax is axes[0] else "", "causal" if causal else "no mask")


def figures(records: pd.DataFrame) -> list[Figure]:
    """Operations and times against length."""
    keys = ["method", "causal", "n"]
    counted = succeeded(records, what="count").sort_values("n", kind="stable")
    counts = dict.fromkeys(("value", "lower", "upper"), counted["counted"])
    counted = counted[keys].assign(**counts, theory=counted["operations"], unit="operations of one head")
    timed = valued(succeeded(records, what="time").sort_values("n", kind="stable"), "seconds_used", keys)
    timed = timed.assign(theory=np.nan, unit="seconds for one head")
    return [
        Figure(
            "time",
            f"Time of making the operator and applying it to v, one head, d = {D}, float32: median of "
            f"{REPEATS} runs, bands from the smallest "
            "to the largest. The formulas say where the curves must cross in the end; at short "
            "lengths overheads decide.",
            draw_panels,
            timed,
            size=(6.5, 3.7),
            panels=(1, 2),
        ),
        Figure(
            "operations",
            "Operations of the code, counted (markers), and by formula (dashed). They agree as whole "
            "numbers, so the bars have no length.",
            draw_panels,
            counted,
            size=(6.5, 3.7),
            panels=(1, 2),
        ),
    ]


def tables(records: pd.DataFrame) -> list[Table]:
    """Formulas of the multiply-adds, and crossovers against exact attention three ways."""
    timed = succeeded(records, what="time")
    formulas, crossings = [], []
    for causal in (False, True):
        p = problem(64, causal=causal)
        exact = costs.exact_attention(p).subs(d_v="d")
        for name in METHODS:
            cost = formula(name, p).subs(d_v="d")
            mask = "causal" if causal else "none"
            whole_chunks = cost.matmuls().replace(sympy.Mod, lambda *_: sympy.Integer(0))
            formulas.append({"method": label(name), "mask": mask, "multiply-adds, as operations": whole_chunks})
            if name == "exact":
                continue
            crossings.append(
                {
                    "method": label(name),
                    "mask": mask,
                    "n*, multiply-adds": closed_crossing(exact, cost, name),
                    f"n*, all operations (d = {D})": crossing_value(exact, cost, name),
                    "n*, measured time": measured_crossing(timed[timed["causal"] == causal], name),
                }
            )
    return [
        Table(
            "crossovers",
            "Length n* beyond which a method is cheaper than exact attention, with d_v = d: by "
            "multiply-adds in closed form (as a number at the sizes named where that is long), by all operations at "
            f"d = {D} and the m named, and by the clock (between which measured lengths the medians "
            "cross). Causal ones take chunks of 64 rows and read n as a real number: below 64 they mean nothing.",
            pd.DataFrame(crossings),
        ),
        Table(
            "formulas",
            "Multiply-adds of one head, two operations each, with d_v = d, n a multiple of the c = 64 rows of a chunk.",
            pd.DataFrame(formulas),
        ),
    ]


def closed_crossing(exact: costs.Cost, cost: costs.Cost, name: str) -> Any:
    """Crossover of the multiply-adds as a formula with chunks of 64 rows, as a number where that fits no column."""
    star = sympy.nsimplify(costs.crossover(exact, cost, "n", matmuls=True, c=64))
    if star.count_ops() > LONGEST:
        star = costs.crossover(exact, cost, "n", matmuls=True, c=64, d=D, m=METHODS[name].get("m", 1))
        return f"{float(star):.0f}"
    return star if star.free_symbols else "always"


def crossing_value(exact: costs.Cost, cost: costs.Cost, name: str) -> str:
    """Crossover of all operations at the sizes of the study."""
    star = costs.crossover(exact, cost, "n", d=D, m=METHODS[name].get("m", 1), c=64)
    return "always" if star == 0 else f"{float(star):.0f}"


def measured_crossing(timed: pd.DataFrame, name: str) -> str:
    """Between which lengths a method's median time falls below that of exact attention, for good."""
    table = timed.pivot_table(index="n", columns="method", values="seconds_used")
    if not {name, "exact"} <= set(table.columns):
        return "not measured"
    faster = (table[name] < table["exact"]).to_numpy()
    lengths = table.index.to_list()
    if faster.all():
        return f"below {lengths[0]}"
    if not faster[-1]:
        return f"above {lengths[-1]}"
    last = int(np.flatnonzero(~faster)[-1])
    return f"{lengths[last]} to {lengths[last + 1]}"


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(records: pd.DataFrame) -> list[Callable[[], Any]]:
    """What the records say."""
    timed = succeeded(records, what="time")
    return [
        partial(counts_equal, succeeded(records, what="count")),
        closed_forms,
        partial(growth, timed, "exact", "The time of exact attention"),
        partial(growth, timed, "elu_features", "The time of elu + 1 attention"),
    ]


def counts_equal(counted: pd.DataFrame) -> Claim:
    """Formulas against counts."""
    equal = float(counted["equal"].astype(bool).mean())
    return Claim.decide(
        "The cost formula of every method equals the count of what its code does, class by class, as whole numbers",
        equal,
        equal,
        1.0,
        ">=",
        number=f"{int(counted['equal'].astype(bool).sum())} of {len(counted)} counts equal",
    )


def closed_forms() -> list[Claim]:
    """From which length on the formulas cross."""
    p = problem(64, causal=False)
    exact = costs.exact_attention(p).subs(d_v="d")
    closed = {
        "elu_features": (costs.d + sympy.Rational(1, 2), "n > d + 1/2"),
        "positive_features": (2 * costs.m + costs.m / (2 * costs.d), "n > 2m + m/(2d)"),
    }
    found = []
    for name, (expected, text) in closed.items():
        star = costs.crossover(exact, formula(name, p).subs(d_v="d"), "n", matmuls=True)
        same = float(sympy.simplify(star - expected) == 0)
        found.append(
            Claim.decide(
                f"By multiply-adds, {label(name).split(',')[0]} attention without a mask is cheaper than "
                f"exact attention for {text}",
                same,
                same,
                1.0,
                ">=",
                number=f"n* = {star}",
            )
        )
    return found


def growth(timed: pd.DataFrame, name: str, what: str) -> Claim:
    """Growth exponent between the longest length and one quarter of it, from the intervals of both times.

    A finding, not a claim with an expectation: times belong to a machine and to what else it does.
    """
    curve = timed[(timed["method"] == name) & ~timed["causal"].astype(bool)].sort_values("n")
    last = curve.iloc[-1]
    first = curve[curve["n"] <= last["n"] / 4].iloc[-1] if (curve["n"] <= last["n"] / 4).any() else curve.iloc[0]
    ratio = np.log(last["n"] / first["n"])
    ends = [
        np.log(last[f"seconds_used_{a}"] / first[f"seconds_used_{b}"]) / ratio
        for a, b in (("lower", "upper"), ("upper", "lower"))
    ]
    number = f"exponent {ends[0]:.2f} to {ends[1]:.2f} between n = {first['n']} and {last['n']}"
    spread = max(end["seconds_used_upper"] / end["seconds_used_lower"] for end in (first, last))
    if spread > NOISY or ends[0] < 0:
        sentence = f"How the time of {name.removesuffix('_features')} attention grows, without a mask"
        return Claim(sentence, "open", f"too noisy to tell: repeated times differ by a factor {spread:.1f}; {number}")
    holds, fails = (f"{what}, without a mask, grows {how} than n^1.5" for how in ("faster", "no faster"))
    return finding(holds, fails, float(ends[0]), float(ends[1]), 1.5, number=number)


study = Study(
    name="cost_crossover",
    title="When is cheaper attention cheaper?",
    question="From which number of tokens on do linear attention and random features cost less than "
    "exact attention: by formula, by counting, and by the clock?",
    setup=(
        f"One head of dimension {D} with Gaussian queries, keys and values in float32. Operations "
        "are counted by running the same code on arrays that tally "
        "every operation, and compared with the formulas as whole numbers. Times are medians of "
        "repeated runs, one cell at a time, with all cores; "
        "they include making the operator. Times belong to the machine named below; operations do not."
    ),
    cells=cells,
    measure=measure,
    figures=figures,
    tables=tables,
    claims=claims,
    references=(
        "A. Katharopoulos et al., Transformers are RNNs: fast autoregressive Transformers with "
        "linear attention, 2020, arXiv 2006.16236.",
        "K. Choromanski et al., Rethinking attention with Performers, 2021, arXiv 2009.14794.",
        "G. Golub and C. Van Loan, Matrix Computations, fourth edition, 2013.",
    ),
    headline="default",
    exclusive=True,
)
