"""Every family of approximate attention at equal cost: which reaches a given error first, on which kind of input?"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import nla_llm as nl
from nla_llm import costs
from nla_llm.problems import embedded, gallery
from nla_llm.study import Claim, Figure, Skip, Study, Table
from nla_llm.study.frames import groups, succeeded
from nla_llm.study.fronts import first_to_reach, shares_of_firsts
from nla_llm.study.heads import closer_than
from nla_llm.study.measuring import head_records
from nla_llm.study.medians import finding, medians
from nla_llm.study.roster import ROSTER, YARDSTICKS

if TYPE_CHECKING:
    from collections.abc import Sequence

SIZES = {  # tokens, draws of a random method, levels of cost as shares of exact attention, layers of the model
    "small": (128, 6, (0.25,), (0, 3)),
    "default": (256, 6, (0.125, 0.25, 0.5), (0, 1, 2, 3, 4, 5)),
    "full": (1024, 12, (0.0625, 0.125, 0.25, 0.5, 1.0), (0, 1, 2, 3, 4, 5)),
}
DIM, HEADS = 32, 4  # of the inputs that are made up; those of the model have 32 and 6
SCALES = (0.5, 1.0, 2.0)  # standard deviations of the Gaussian inputs
CLUSTERS = {"count": 16, "spread": 0.2, "scale": 1.0}
COMPARED = 0.25  # the level at which methods are compared in one picture and counted over heads
TARGETS = (0.5, 0.2, 0.1)  # errors to be reached
RESAMPLES = 1000  # of the heads, for how sure a first place is
NORMS = {"relative_frobenius": "Frobenius", "relative_spectral": "spectral", "output_error": "output"}
KINDS = ("sharp heads", "flat heads", "causal heads", *(f"Gaussian, {s:g}" for s in SCALES), "clusters")


def cells(scale: str) -> list[dict[str, Any]]:
    """Every method at every level of cost on every input; without a level where it has no budget."""
    n, draws, levels, layers = SIZES[scale]
    inputs: list[dict[str, Any]] = [
        {"input": "model", "layer": layer, "causal": causal} for causal in (False, True) for layer in layers
    ]
    inputs += [{"input": "gaussian", "scale": s, "causal": False} for s in SCALES]
    inputs += [{"input": "clusters", "causal": False}]
    return [
        {**given, "n": n, "draws": draws, "label": label, "level": level}
        for given in inputs
        for label, entry in ROSTER.items()
        if not given["causal"] or "causal" in entry.make().properties.supports
        for level in (levels if entry.budget else (None,))
    ]


def problem(cell: dict[str, Any]) -> nl.AttentionProblem:
    """The heads of a cell; those of the model also without their causal mask, for methods that have no causal form."""
    if cell["input"] == "gaussian":
        return gallery.gaussian(cell["n"], DIM, scale=cell["scale"], heads=(HEADS,), rng=0)
    if cell["input"] == "clusters":
        return gallery.clusters(cell["n"], DIM, heads=(HEADS,), rng=0, **CLUSTERS)
    layer = embedded.heldout_problems(cell["n"])[cell["layer"]]
    return layer if cell["causal"] else layer.unmasked()


@cache
def at_level(label: str, level: float | None, n: int, *, causal: bool) -> tuple[Any, float] | None:
    """The method with the largest budget that a share of the cost of exact attention buys, and the share it spends.

    None where even the smallest budget costs more. An oracle gets the budget, and the share, of the method named in the
    roster; the optimal rank, which is its own, is charged for its application alone.
    """
    x = np.zeros((n, DIM))
    shape = nl.AttentionProblem(x, x, causal=causal)
    exact = costs.exact_attention(shape).at(shape).total()
    entry = ROSTER[label]
    payer = ROSTER[entry.oracle or label]
    stage = "apply" if payer.oracle else "total"
    method = payer.make()
    if level is not None:
        method = costs.affordable(method, shape, level * exact, largest=n, stage=stage)
    if method is None:
        return None
    spent = method.cost(shape).at(shape, method)
    share = (spent.apply if payer.oracle else spent).total() / exact
    return entry.make(getattr(method, payer.budget)) if entry.oracle and payer.budget else method, float(share)


def measure(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Errors of one method on the heads of one input, at the budget that the level of cost buys."""
    bought = at_level(cell["label"], cell["level"], cell["n"], causal=cell["causal"])
    if bought is None:
        raise Skip(f"costs more than {cell['level']:g} of exact attention at any budget")
    method, share = bought
    entry, p = ROSTER[cell["label"]], problem(cell)
    records = head_records(p, method, draws=cell["draws"], seed=seed)
    facts = {
        "method": entry.method,
        "budget": None if entry.budget is None else int(getattr(method, entry.budget)),
        "oracle": bool(entry.oracle),
        "share": share,
        "target": method.properties.target,
    }
    if cell["label"] == "optimal rank":
        records = [record | found for record, found in zip(records, ranks_needed(p), strict=True)]
    return [record | facts for record in records]


def ranks_needed(p: nl.AttentionProblem) -> list[dict[str, int]]:
    """For every head, the least rank of a matrix whose relative Frobenius error is at most each target."""
    squares = np.square(np.linalg.svd(p.exact().dense(), compute_uv=False)).reshape(-1, p.n_q)
    left = 1 - np.cumsum(squares, axis=-1) / squares.sum(axis=-1, keepdims=True)
    counts = {t: 1 + np.sum(left > t**2, axis=-1) for t in TARGETS}
    return [{f"rank_{t:g}": int(count[i]) for t, count in counts.items()} for i in range(len(squares))]


# -- what the records say ----------------------------------------------------------------------------------------------


def with_kinds(records: pd.DataFrame) -> pd.DataFrame:
    """Records that succeeded, each with its kind of input; heads of the model are sharp below the median entropy."""
    ok = succeeded(records).copy()
    plain = ok["input"].eq("model") & ~ok["causal"].astype(bool)
    middle = ok.loc[plain, "entropy"].median()
    made_up = ok["input"].where(ok["input"] != "gaussian", "Gaussian, " + ok["scale"].map("{:g}".format))
    heads = np.where(
        ok["causal"].astype(bool), "causal heads", np.where(ok["entropy"] <= middle, "sharp heads", "flat heads")
    )
    ok["kind"] = np.where(ok["input"] == "model", heads, made_up)
    return ok


def summary(ok: pd.DataFrame, column: str) -> pd.DataFrame:
    """Median error of each method at each level on each kind of input, with what it spends."""
    keys = ["kind", "label", "method", "level", "oracle"]
    found = medians(ok, keys, column)
    spent = ok.groupby(keys, dropna=False, sort=False)[["share", "budget"]].median().reset_index()
    return found.merge(spent, on=keys).assign(norm=NORMS[column])


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of one level of cost, and of the methods that have no budget."""
    levels = table["level"].dropna().unique()
    level = COMPARED if COMPARED in levels or not len(levels) else levels[0]
    return table[table["level"].eq(level) | table["level"].isna()]


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(records: pd.DataFrame) -> list[Figure]:
    """A map of all methods in each norm, then the fronts of each kind of input."""
    from nla_llm.report import fronts  # noqa: PLC0415 - matplotlib loads only in the process that draws

    ok = with_kinds(records)
    tables = {column: summary(ok, column) for column in NORMS}
    level = compared(tables["relative_frobenius"])["level"].dropna().iloc[0]
    maps = [
        Figure(
            f"map-{name.lower()}",
            f"Median relative {what} of every method at {level:g} of the cost of exact attention (methods without a "
            "budget at their own), one column for each kind of input. Colour: the ratio to uniform attention on the "
            "same input, blue better, red worse; the methods are sorted by it. An asterisk marks an oracle, which is "
            "given what it would have to look for. Intervals are in the CSV file beside this report.",
            fronts.draw_map,
            compared(tables[column]),
            size=(6.5, 0.8 + 0.158 * tables[column]["label"].nunique()),
        )
        for (column, name), what in zip(
            NORMS.items(), ("Frobenius error of P", "spectral error of P", "error of the output P v"), strict=True
        )
    ]
    return maps + [front(kind, tables) for kind in KINDS if kind in set(ok["kind"])]


def front(kind: str, tables: dict[str, pd.DataFrame]) -> Figure:
    """Error against cost on one kind of input in both norms of P."""
    from nla_llm.report import fronts  # noqa: PLC0415

    data = pd.concat([tables[c] for c in ("relative_frobenius", "relative_spectral")])
    return Figure(
        "front-" + kind.replace(", ", "-").replace(" ", "-").replace(".", "_"),
        f"{kind[0].upper() + kind[1:]}: median error against cost as a share of that of exact attention, both by "
        "formula. Line: the Pareto front, what no method beats at its cost or below. Grey: doing nothing and the "
        "best possible of that rank, below which a method may pass that is not of low rank: a window, say.",
        fronts.draw_front,
        data[data["kind"] == kind],
        size=(6.5, 3.3),
        panels=(1, 2),
    )


def tables(records: pd.DataFrame) -> list[Table]:
    """Who reaches an error first on each kind of input, who ever gets to ten per cent, heads better than nothing."""
    ok = with_kinds(records)
    table = summary(ok, "relative_frobenius")
    kinds = [kind for kind in KINDS if kind in set(ok["kind"])]
    return [
        Table(
            "first",
            "The cheapest method whose median relative Frobenius error is at most that of the column, with its "
            "budget and its cost as a share of that of exact attention; yardsticks and oracles left out. In brackets: "
            f"the share of {RESAMPLES} bootstrap samples of the heads, the same for all methods, in which that method "
            "is the first, or for 'none' in which no method gets there; a small share says that another head or two "
            "would name another method. Last "
            f"column: the least rank of any matrix with an error of {TARGETS[-1]:g}, median over heads.",
            pd.DataFrame([winners(kind, table, ok) for kind in kinds]),
            leads=True,
        ),
        Table(
            "ten-per-cent",
            f"Where each method reaches a median relative Frobenius error of {TARGETS[-1]:g}: the smallest share of "
            "the cost of exact attention among the levels tried, an asterisk for an oracle. Methods that get there "
            "on no input are left out.",
            reach(table, kinds),
        ),
        Table(
            "heads",
            "What each method replaces softmax by, and on how many heads of the trained model it is surely closer to "
            "softmax attention (whole interval over draws, Frobenius norm) than doing nothing: than uniform "
            "attention, and than as many random keys as cost the same.",
            heads(ok),
        ),
    ]


def approximations(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of methods that pay for all that they do, and less than exact attention; no yardsticks, no oracles."""
    return table[
        ~table["oracle"].astype(bool)
        & (table["share"] < 1)
        & ~table["label"].isin([entry.label for entry in YARDSTICKS])
    ]


def winners(kind: str, table: pd.DataFrame, ok: pd.DataFrame) -> dict[str, str]:
    """A line of the first table."""
    row = {"input": kind}
    mine = approximations(table[table["kind"] == kind])
    heads_of_kind = approximations(ok[ok["kind"] == kind])
    for target in TARGETS:
        best = first_to_reach(mine, target)
        firsts = shares_of_firsts(heads_of_kind, target, column="relative_frobenius", resamples=RESAMPLES)
        sure = f" ({100 * firsts.get('none' if best is None else best['label'], 0.0):.0f} %)"
        budget = "" if best is None or pd.isna(best["budget"]) else f", m = {best['budget']:.0f}"
        name = "none" if best is None else f"{best['label']}{budget}: {best['share']:.2g}"
        row[f"to {100 * target:g} %"] = name + sure
    floor = ok[ok["kind"].eq(kind) & ok["label"].eq("optimal rank")]
    return row | {"rank": f"{floor[f'rank_{TARGETS[-1]:g}'].median():.0f}"}


def reach(table: pd.DataFrame, kinds: Sequence[str]) -> pd.DataFrame:
    """Share of cost at which each method reaches the last target, on each kind of input."""
    rows = []
    for (label,), group in groups(table, ["label"]):
        found = {kind: first_to_reach(group[group["kind"] == kind], TARGETS[-1]) for kind in kinds}
        if any(best is not None for best in found.values()):
            stars = {k: "" if b is None else f"{b['share']:.2g}{'*' if b['oracle'] else ''}" for k, b in found.items()}
            rows.append({"method": label} | stars)
    return pd.DataFrame(rows, columns=["method", *kinds])


def heads(ok: pd.DataFrame) -> pd.DataFrame:
    """How many heads of the model each method surely serves better than uniform attention and than random keys."""
    model = ok[ok["input"] == "model"]
    rows = []
    for (label,), group in groups(compared(model), ["label"]):
        row = {"method": label, "target": group["target"].iloc[0]}
        for name, causal in (("", False), (", causal", True)):
            part, rivals = (t[t["causal"].eq(causal)] for t in (group, model))
            row["beats uniform" + name] = count(closer_than(rivals[rivals["label"] == "uniform"], part))
            row["beats random keys" + name] = count(closer_than(keys_at_cost(rivals, part), part))
        rows.append(row)
    return pd.DataFrame(rows)


def keys_at_cost(rivals: pd.DataFrame, part: pd.DataFrame) -> pd.DataFrame:
    """Random keys at the largest level that costs no more than a method; at the smallest where none is as cheap."""
    keys = rivals[rivals["label"] == "random keys"]
    shares = np.sort(keys["share"].unique())
    if part.empty or not shares.size:
        return keys.head(0)
    affordable = shares[shares <= 1.05 * part["share"].median()]
    return keys[keys["share"] == (affordable[-1] if affordable.size else shares[0])]


def count(better: tuple[Any, Any] | None) -> str:
    """How many heads surely, of how many."""
    return "" if better is None or not len(better[0]) else f"{better[0].sum()} of {len(better[0])}"


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(records: pd.DataFrame) -> list[partial[Claim]]:
    """What the records say."""
    ok = with_kinds(records)
    table = summary(ok, "relative_frobenius")
    plain = compared(ok[ok["input"].eq("model") & ~ok["causal"].astype(bool)])
    kinds = [kind for kind in KINDS if kind in set(ok["kind"])]
    return [
        *(partial(ten_per_cent, kind, table) for kind in kinds),
        partial(head_finding, plain, "elu + 1", "uniform"),
        partial(head_finding, plain, "positive, orthogonal", "uniform"),
        partial(head_finding, plain, "positive, orthogonal, recentred", "positive, orthogonal"),
    ]


def ten_per_cent(kind: str, table: pd.DataFrame) -> Claim:
    """Whether any method that pays for all that it does comes to ten per cent for less than exact attention."""
    mine = approximations(table[table["kind"] == kind])
    best = mine.loc[mine["median"].idxmin()]
    where = f"on {kind}" if "heads" in kind else f"on the input '{kind}'"
    holds = f"No method in the atlas that costs less than exact attention has an error below 10 % {where}"
    fails = f"Some method that costs less than exact attention has an error below 10 % {where}"
    interval = f"{best['median']:.3g} [{best['lower']:.3g}, {best['upper']:.3g}]"
    number = f"least median {interval}, {best['label']} at {best['share']:.2g} of the cost"
    return finding(holds, fails, best["lower"], best["upper"], 0.1, number=number)


def head_finding(plain: pd.DataFrame, label: str, rival: str) -> Claim:
    """On how many heads one method is closer to softmax attention than another, and by how much in the median."""
    mine, theirs = (plain[plain["label"] == name] for name in (label, rival))
    better = closer_than(theirs, mine)
    if better is None or not len(better[0]):
        return Claim(f"{label} against {rival}", "open", "one of them has no records")
    surely, possibly = (int(np.sum(b)) for b in better)
    both = mine.merge(theirs, on=["layer", "head"], suffixes=("", "_rival"))
    ratio = float((both["relative_frobenius"] / both["relative_frobenius_rival"]).median())
    number = f"surely on {surely} of {len(mine)} heads, possibly on {possibly}; median ratio of the errors {ratio:.3g}"
    holds, fails = (
        f"{label} is closer to softmax than {rival} on {part} of the trained heads" for part in ("most", "at most half")
    )
    return finding(holds, fails, surely / len(mine), possibly / len(mine), 0.5, number=number)


study = Study(
    name="atlas",
    title="Every approximate attention in one atlas",
    question="At equal cost, which approximation of softmax attention is the most accurate, on which kind of input, "
    "and which ones merely replace softmax by something else?",
    setup=(
        "Inputs: the heads of the embedded language model on held-out text, without and with their causal mask "
        "(sharp heads have a row entropy below the median of all, flat ones above); Gaussian queries and keys of "
        "three standard deviations; clusters. A method gets the largest budget that a given share of the operations "
        "of exact attention pays for, by its formula, which equals the count of its code. The reference is exact "
        "attention in float64. Random methods are drawn several times; numbers are medians over heads of medians "
        "over draws. By the rule of the counts whole numbers cost nothing: hashing into buckets, sorting them and "
        "looking tokens up is free, which flatters HyperAttention and Reformer, whose work is just that; their "
        "projections onto random directions are charged."
    ),
    cells=cells,
    measure=measure,
    figures=figures,
    tables=tables,
    claims=claims,
    headline="small",
)
