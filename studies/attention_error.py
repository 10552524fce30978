"""How wrong is approximate attention on the heads of a trained model, between doing nothing and the best possible?"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import nla_llm as nl
from nla_llm.problems import embedded, gallery
from nla_llm.study import Claim, Figure, Study, Table
from nla_llm.study.measuring import attention_records, head_facts, kernel_error
from nla_llm.study.medians import median_interval, median_text, medians

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.figure import Figure as Canvas

SIZES = {  # tokens, draws of a random method, budgets, scales of the Gaussian sweep
    "small": (128, 3, (16, 64), (0.25, 1.0)),
    "default": (320, 5, (16, 64, 256), (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)),
    "full": (1024, 20, (16, 32, 64, 128, 256, 512), (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)),
}
GAUSSIAN_HEADS, GAUSSIAN_DIM, GAUSSIAN_BUDGET = 6, 32, 64
PLAIN = ("uniform", "elu_features", "relu_features")
BUDGETED = (
    ("optimal_rank", {}),
    ("random_keys", {}),
    ("positive_features", {"directions": "iid"}),
    ("positive_features", {"directions": "orthogonal"}),
    ("hyperbolic_features", {"directions": "iid"}),
    ("trigonometric_features", {"directions": "iid"}),
    ("trigonometric_features", {"directions": "orthogonal"}),
)
KERNEL_DRAWS = 8  # draws of a kernel for one of an operator: it is cheap to measure and heavy-tailed
YARDSTICKS = ("uniform", "random_keys", "optimal_rank")
TOP = 4.0  # errors beyond are named in the figures, not drawn: they would squeeze all others into a line
READABLE = 1e4  # kernel errors beyond are left out of the figure: no number of draws measures them
CURVE = ("method", "directions")  # what makes a curve


def methods(budgets: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Methods of the study as the entries of a cell."""
    for name in PLAIN:
        yield {"method": name, "m": None, "directions": None}
    for name, options in BUDGETED:
        for m in budgets:
            yield {"method": name, "m": m, "directions": options.get("directions")}


def cells(scale: str) -> list[dict[str, Any]]:
    """Every method on every layer of the model, and on Gaussian heads of growing scale."""
    n, draws, budgets, sweep = SIZES[scale]
    model = [
        {"input": "model", "layer": layer, "n": n, "draws": draws, **method}
        for layer in range(embedded.embedded_model().config.num_hidden_layers)
        for method in methods(tuple(m for m in budgets if m <= n))
    ]
    gaussian = [
        {"input": "gaussian", "scale": s, "n": n, "draws": draws, **method}
        for s in sweep
        for method in methods((GAUSSIAN_BUDGET,))
    ]
    return model + gaussian


@cache
def problems(n: int) -> list[nl.AttentionProblem]:
    """Attention problems of all layers of the embedded model on held-out text."""
    return embedded.embedded_model().capture(embedded.heldout_tokens(n))


def problem(cell: dict[str, Any]) -> nl.AttentionProblem:
    """The heads of a cell."""
    if cell["input"] == "model":
        return problems(cell["n"])[cell["layer"]]
    return gallery.gaussian(cell["n"], GAUSSIAN_DIM, scale=cell["scale"], heads=(GAUSSIAN_HEADS,), rng=0)


def measure(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Errors of one method on the heads of one layer, its cost, and what kind of heads they are."""
    p = problem(cell)
    options = {name: cell[name] for name in ("m", "directions") if cell[name] is not None}
    method = nl.method(cell["method"], **options)
    records = attention_records(p, method, draws=cell["draws"], seed=seed)
    operations = int(method.cost(p).at(p, method).total())
    for record, facts in zip(records, head_facts(p), strict=True):
        record |= {"operations": operations, **facts}
    if cell["input"] == "gaussian" and hasattr(method, "theory") and cell["method"] not in YARDSTICKS:
        measured, promised = kernel_error(p, method, draws=KERNEL_DRAWS * cell["draws"], seed=seed)
        for i, record in enumerate(records):
            record |= {
                "kernel_error": measured[i],
                "kernel_theory": float(promised[i]),
                **first_order(p.head(i), method),
            }
    return records


def first_order(head: nl.AttentionProblem, method: Any) -> dict[str, Any]:
    """Relative Frobenius error of P that theory promises to first order, and whether it may be trusted there."""
    promise = nl.theory.first_order_error(
        head.q,
        head.k,
        scale=head.scale,
        m=method.m,
        features=method.function,
        orthogonal=method.directions == "orthogonal",
    )
    size = float(nl.measures.frobenius_norm(head.exact()))
    return {"first_order": float(np.sqrt(promise.value)) / size, "first_order_valid": promise.valid}


# -- figures -----------------------------------------------------------------------------------------------------------


def draw_by_kind(fig: Canvas, data: pd.DataFrame) -> None:
    """Error against budget, sharp heads beside flat ones."""
    from nla_llm.report import charts, style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    axes = fig.subplots(1, 2, sharey=True)
    for ax, (kind, part) in zip(axes, data.groupby("kind", sort=False), strict=True):
        charts.draw_curves(ax, part, "m", top=TOP)
        style.log_axes(ax, x=2)
        style.label(ax, "budget m", "" if ax is axes[1] else "relative Frobenius error of P", f"{kind} heads")


def draw_sweep(fig: Canvas, data: pd.DataFrame) -> None:
    """Gaussian heads: error of P beside that of the kernel, whose closed form is dashed."""
    from nla_llm.report import charts, style  # noqa: PLC0415

    left, right = fig.subplots(1, 2)
    after = data[data["what"] == "P"]
    charts.draw_curves(left, after, "scale")
    for (method, _), curve in after.groupby(["method", "directions"], sort=False):
        if curve["theory"].notna().any():
            style.theory_line(left, curve["scale"], curve["theory"], family=method, label="theory")
    style.log_axes(left, x=None)
    style.label(
        left,
        "standard deviation of q and k",
        "relative Frobenius error of P",
        f"after normalisation, m = {GAUSSIAN_BUDGET}",
    )
    kernel = data[data["what"] == "kernel"]
    for (method, directions), curve in kernel.groupby(["method", "directions"], sort=False):
        style.line(
            right,
            curve["scale"],
            curve["median"],
            curve["lower"],
            curve["upper"],
            family=method,
            label=charts.curve_label(method, directions),
            variant=directions,
        )
        style.theory_line(right, curve["scale"], curve["theory"], family=method, label="theory")
    style.log_axes(right, x=None)
    style.label(
        right, "standard deviation of q and k", "relative mean square error of exp(logits)", "before normalisation"
    )


def kinds(model: pd.DataFrame) -> pd.Series:
    """'sharp' for the half of the heads with the smaller entropy, 'flat' for the others."""
    return np.where(model["entropy"] <= model["entropy"].median(), "sharp", "flat")


def figures(records: pd.DataFrame) -> list[Figure]:
    """The four figures."""
    from nla_llm.report import charts  # noqa: PLC0415

    ok = records[records["status"] == "ok"]
    model, gaussian = ok[ok["input"] == "model"], ok[ok["input"] == "gaussian"]
    model = model.assign(kind=kinds(model))
    heads = model.groupby(["layer", "head"]).ngroups
    n = int(ok["n"].iloc[0])
    by_kind = medians(model, [*CURVE, "m", "kind"], "relative_frobenius").sort_values(
        "kind", ascending=False, kind="stable"
    )
    p = problems(n)[0]
    exact = int(nl.costs.exact_attention(p).at(p).total())
    cost = pd.concat(
        [
            medians(model, [*CURVE, "operations"], f"relative_{norm}").assign(norm=norm, exact_operations=exact)
            for norm in ("frobenius", "spectral")
        ]
    )
    after = medians(gaussian, [*CURVE, "scale"], "relative_frobenius").assign(what="P")
    trusted = gaussian[gaussian["first_order_valid"].eq(True)]
    theory = trusted.groupby([*CURVE, "scale"], sort=False)["first_order"].median().rename("theory").reset_index()
    after = after.merge(theory, on=[*CURVE, "scale"], how="left")
    before = gaussian.dropna(subset=["kernel_error"]).groupby(["method", "directions", "scale"], sort=False)
    kernel = before.apply(pool_kernel, include_groups=False).reset_index().assign(what="kernel")
    kernel = kernel[kernel["theory"] < READABLE]
    budget = int(model["m"].dropna().unique()[min(1, model["m"].nunique() - 1)])
    shown = model[((model["m"] == budget) | model["m"].isna()) & model["directions"].ne("iid")]
    points = shown.assign(
        value=shown["relative_frobenius"],
        lower=shown["relative_frobenius_lower"],
        upper=shown["relative_frobenius_upper"],
    )
    points = points[["method", "directions", "m", "layer", "head", "entropy", "norm_growth", "value", "lower", "upper"]]
    return [
        Figure(
            "budget",
            f"Median over the {heads} heads of the embedded model, split by the entropy of their rows "
            f"(n = {n}, causal); bands: "
            "95 % intervals of the median over heads. Grey: doing nothing (uniform, random keys) and "
            "the best possible "
            "of that rank.",
            draw_by_kind,
            by_kind,
            size=(6.5, 3.2),
            panels=(1, 2),
        ),
        Figure(
            "cost",
            "The same errors in both norms against operations, counted by formula; the vertical line "
            "is exact causal attention. "
            "The optimal rank is left out: it costs more than what it replaces.",
            partial(charts.draw_against_cost, top=TOP),
            cost,
            size=(6.5, 3.5),
            panels=(1, 2),
        ),
        Figure(
            "gaussian",
            f"Gaussian heads (d = {GAUSSIAN_DIM}, n = {n}) of growing scale. Left: medians over "
            f"{GAUSSIAN_HEADS} heads; "
            "dashed, the first-order prediction where its small parameter is small. Right: the mean square "
            "error of the kernel before normalisation with its 95 % interval over draws, and dashed "
            "the closed form of Performer's Lemma 2 "
            "and of its orthogonal extension, up to the scale where no number of draws measures it.",
            draw_sweep,
            pd.concat([after, kernel]),
            size=(6.5, 3.5),
            panels=(1, 2),
        ),
        Figure(
            "heads",
            f"Every head of the embedded model, m = {budget}; bars: 95 % intervals over draws. Trigonometric "
            "features lie far above and are left out.",
            charts.draw_against_entropy,
            points[points["method"] != "trigonometric_features"],
            size=(6.5, 3.3),
        ),
    ]


def pool_kernel(group: pd.DataFrame) -> pd.Series:
    """Mean over heads: they share their directions, so their errors are not independent and intervals are averaged."""
    return pd.Series(
        {
            "median": group["kernel_error"].mean(),
            "lower": group["kernel_error_lower"].mean(),
            "upper": group["kernel_error_upper"].mean(),
            "theory": group["kernel_theory"].mean(),
        }
    )


def tables(records: pd.DataFrame) -> list[Table]:
    """Medians over the heads of the model and the share of heads on which a method beats doing nothing."""
    from nla_llm.report.charts import curve_label  # noqa: PLC0415

    ok = records[(records["status"] == "ok") & (records["input"] == "model")]
    uniform = ok[ok["method"] == "uniform"].set_index(["layer", "head"])["relative_frobenius"]
    rows = []
    for (method, directions, m), group in ok.groupby(["method", "directions", "m"], dropna=False, sort=False):
        better = (
            group["relative_frobenius_upper"].to_numpy()
            < uniform.loc[list(zip(group["layer"], group["head"], strict=True))].to_numpy()
        )
        rows.append(
            {
                "method": curve_label(method, directions if isinstance(directions, str) else None),
                "m": "" if pd.isna(m) else int(m),
                "operations": int(group["operations"].iloc[0]),
                "Frobenius": median_text(group, "relative_frobenius"),
                "spectral": median_text(group, "relative_spectral"),
                "output": median_text(group, "output_error"),
                "better than uniform": f"{better.sum()} of {len(better)}",
                "negative sums": f"{100 * group['negative_share'].mean():.1f} %",
            }
        )
    caption = (
        "Heads of the embedded model: medians over heads of the relative errors with their 95 % "
        "intervals, the number of heads on which the "
        "whole interval over draws lies below uniform attention, and the share of negative row "
        "sums."
    )
    return [Table("heads", caption, pd.DataFrame(rows))]


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(records: pd.DataFrame) -> list[Claim]:
    """What the records say."""
    ok = records[records["status"] == "ok"]
    model = ok[ok["input"] == "model"]
    largest = model["m"].max()
    return [
        floor_claim(ok),
        closed_form_claim(ok.dropna(subset=["kernel_error"])),
        share_claim(
            model,
            "elu_features",
            None,
            "elu + 1 attention is closer to softmax than uniform attention on most heads",
        ),
        share_claim(
            model,
            "positive_features",
            largest,
            f"positive orthogonal features with m = {largest:.0f} are closer to softmax than uniform "
            "attention on most heads",
            expected="refuted",
            source="read into the accurate estimation that Choromanski et al. 2021, arXiv 2009.14794, promise",
        ),
        accuracy_claim(model, largest),
    ]


def floor_claim(ok: pd.DataFrame) -> Claim:
    """No operator of rank m is below the Eckart–Young floor, in either norm.

    Softmax on m random keys has rank m, and so has positive attention without a causal mask; the lower triangle of a
    product of rank m has full rank, and two features for each direction make rank 2m.
    """
    keys = ["input", "scale", "layer", "head", "m"]
    ok = ok.assign(**{key: ok[key].fillna(-1) for key in ("scale", "layer")})
    floor = ok[ok["method"] == "optimal_rank"][[*keys, "relative_frobenius", "relative_spectral"]]
    of_rank_m = (ok["method"] == "random_keys") | ((ok["method"] == "positive_features") & (ok["input"] == "gaussian"))
    both = ok[of_rank_m].merge(floor, on=keys, suffixes=("", "_floor"))
    ratios = [both[f"relative_{norm}"] / both[f"relative_{norm}_floor"] for norm in ("frobenius", "spectral")]
    worst = float(min(ratio.min() for ratio in ratios))
    return Claim.decide(
        "No method of rank m comes below the Eckart–Young floor, in the Frobenius or the spectral norm",
        worst,
        worst,
        1.0,
        ">=",
        number=f"smallest ratio to the floor {worst:.4g} over {len(both)} heads, methods and budgets",
        source="Eckart and Young 1936; Mirsky 1960",
    )


def closed_form_claim(kernel: pd.DataFrame) -> Claim:
    """The closed form of the kernel's variance agrees with the measurement, where the fourth moment allows a test."""
    from scipy.special import stdtrit  # noqa: PLC0415 - only where claims are judged

    light = kernel[kernel["scale"] == kernel["scale"].min()]  # at larger scales the variance of the variance explodes
    draws = KERNEL_DRAWS * light["draws"].to_numpy()
    error = (light["kernel_error_upper"] - light["kernel_error"]).to_numpy() / stdtrit(draws - 1, 0.975)
    worst = float(np.max(np.abs(light["kernel_error"].to_numpy() - light["kernel_theory"].to_numpy()) / error))
    return Claim.decide(
        "The mean square error of the kernel before normalisation equals its closed form within "
        f"4 standard errors, at scale {light['scale'].iloc[0]:g}",
        worst,
        worst,
        4.0,
        "<",
        number=f"largest deviation {worst:.2g} standard errors over {len(light)} heads and methods",
        source="Choromanski et al. 2021, arXiv 2009.14794, Lemma 2; orthogonal blocks derived",
    )


def share_claim(
    model: pd.DataFrame, method: str, m: float | None, sentence: str, *, expected: Any = "confirmed", source: str = ""
) -> Claim:
    """On most heads a method beats uniform attention; heads whose interval straddles it count for neither."""
    uniform = model[model["method"] == "uniform"].set_index(["layer", "head"])["relative_frobenius"]
    part = model[(model["method"] == method) & (model["m"].isna() if m is None else model["m"] == m)]
    if m is not None:
        part = part[part["directions"] == "orthogonal"]
    reference = uniform.loc[list(zip(part["layer"], part["head"], strict=True))].to_numpy()
    surely = float(np.mean(part["relative_frobenius_upper"].to_numpy() < reference))
    possibly = float(np.mean(part["relative_frobenius_lower"].to_numpy() < reference))
    number = f"{100 * surely:.0f} % of {len(part)} heads surely, {100 * possibly:.0f} % at most"
    return Claim.decide(sentence, surely, possibly, 0.5, ">", number=number, expected=expected, source=source)


def accuracy_claim(model: pd.DataFrame, m: float) -> Claim:
    """The published claim of accuracy, as a number."""
    part = model[(model["method"] == "positive_features") & (model["directions"] == "orthogonal") & (model["m"] == m)]
    values = np.sort(part["relative_frobenius"].to_numpy(dtype=float))
    low, high = median_interval(len(values))
    return Claim.decide(
        f"Positive orthogonal features with m = {m:.0f} approximate the attention of a trained head to 10 %",
        float(values[low]),
        float(values[high]),
        0.1,
        "<",
        expected="refuted",
        number=f"median relative Frobenius error {np.median(values):.3g}, 95 % interval "
        f"{values[low]:.3g} to {values[high]:.3g}",
        source="the accuracy that Choromanski et al. 2021, arXiv 2009.14794, title and abstract promise, read as 10 %",
    )


study = Study(
    name="attention_error",
    title="How wrong is approximate attention?",
    question="On the heads of a trained language model, how far are cheaper attentions from softmax "
    "attention, between doing nothing and the best possible, and at what cost?",
    setup=(
        "The embedded language model reads held-out text; every head gives queries, keys (after "
        "rotation) and values of a causal attention problem. The second input "
        "are Gaussian heads, without a mask, whose logits grow with the scale. The reference is "
        "exact attention in float64; errors are relative, of the "
        "matrix P and of the output P v. Random methods are drawn several times. Costs are "
        "formulas, for one head, in operations "
        "(a multiply-add is two)."
    ),
    cells=cells,
    measure=measure,
    figures=figures,
    tables=tables,
    claims=claims,
    references=(
        "K. Choromanski et al., Rethinking attention with Performers, 2021, arXiv 2009.14794.",
        "A. Katharopoulos et al., Transformers are RNNs: fast autoregressive Transformers with "
        "linear attention, 2020, arXiv 2006.16236.",
        "C. Eckart and G. Young, The approximation of one matrix by another of lower rank, Psychometrika 1, 1936.",
        "Y. Saad, The linear algebra of Large Language Models, survey talk, CIRM, 2024.",
    ),
    headline=True,
)
