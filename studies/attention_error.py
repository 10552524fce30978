"""How wrong is approximate attention on the heads of a trained model, between doing nothing and the best possible?"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import nla_llm as nl
from nla_llm.problems import embedded, gallery
from nla_llm.study import Claim, Figure, Study, Table
from nla_llm.study.frames import standard_error, succeeded, valued
from nla_llm.study.heads import closer_than_uniform, heads_table, medians_by_norm
from nla_llm.study.measuring import first_order_error, head_records, kernel_error
from nla_llm.study.medians import medians

if TYPE_CHECKING:
    from collections.abc import Iterable

    from matplotlib.figure import Figure as Canvas

SIZES = {  # tokens, draws of a random method, budgets, scales of the Gaussian sweep
    "small": (128, 6, (16, 64), (0.25, 1.0)),
    "default": (320, 6, (16, 32, 64, 128), (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)),
    "full": (1024, 20, (16, 32, 64, 128, 256, 512), (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)),
}
GAUSSIAN_HEADS, GAUSSIAN_DIM, GAUSSIAN_BUDGET = 6, 32, 64
PLAIN = ("uniform", "elu_features", "relu_features")
BUDGETED = (  # with their directions
    ("optimal_rank", None),
    ("random_keys", None),
    ("positive_features", "iid"),
    ("positive_features", "orthogonal"),
    ("hyperbolic_features", "iid"),
    ("trigonometric_features", "iid"),
    ("trigonometric_features", "orthogonal"),
)
KERNEL_DRAWS = 8  # draws of a kernel for one of an operator: it is cheap to measure and heavy-tailed
TOP = 4.0  # errors beyond are named in the figures, not drawn: they would squeeze all others into a line
READABLE = 1e4  # kernel errors beyond are left out of the figure: no number of draws measures them
CURVE = ("method", "directions")  # what makes a curve


def methods(budgets: Iterable[int]) -> list[dict[str, Any]]:
    """Methods of the study as the entries of a cell."""
    plain = [{"method": name, "m": None, "directions": None} for name in PLAIN]
    return plain + [{"method": name, "m": m, "directions": kind} for name, kind in BUDGETED for m in budgets]


def cells(scale: str) -> list[dict[str, Any]]:
    """Every method on every layer of the model, and on Gaussian heads of growing scale."""
    n, draws, budgets, sweep = SIZES[scale]
    model = [
        {"input": "model", "layer": layer, "n": n, "draws": draws, **method}
        for layer in range(embedded.embedded_model().config.num_hidden_layers)
        for method in methods([m for m in budgets if m <= n])
    ]
    gaussian = [
        {"input": "gaussian", "scale": s, "n": n, "draws": draws, **method}
        for s in sweep
        for method in methods((GAUSSIAN_BUDGET,))
    ]
    return model + gaussian


def problem(cell: dict[str, Any]) -> nl.AttentionProblem:
    """The heads of a cell."""
    if cell["input"] == "model":
        return embedded.heldout_problems(cell["n"])[cell["layer"]]
    return gallery.gaussian(cell["n"], GAUSSIAN_DIM, scale=cell["scale"], heads=(GAUSSIAN_HEADS,), rng=0)


def measure(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Errors of one method on the heads of one layer, its cost, and what kind of heads they are."""
    p = problem(cell)
    options = {name: cell[name] for name in ("m", "directions") if cell[name] is not None}
    method = nl.method(cell["method"], **options)
    records = head_records(p, method, draws=cell["draws"], seed=seed)
    if cell["input"] == "gaussian" and cell["directions"] is not None:  # random features: theory knows their variance
        measured, promised = kernel_error(p, method, draws=KERNEL_DRAWS * cell["draws"], seed=seed)
        for i, record in enumerate(records):
            record.update(kernel_error=measured[i], kernel_theory=float(promised[i]))
            record.update(first_order_error(p.head(i), method))
    return records


# -- figures -----------------------------------------------------------------------------------------------------------


def draw_sweep(fig: Canvas, data: pd.DataFrame) -> None:
    """Gaussian heads: error of P beside that of the kernel, whose closed form is dashed."""
    from nla_llm.report import charts, style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    panels = (
        ("P", "relative Frobenius error of P", f"after normalisation, m = {GAUSSIAN_BUDGET}"),
        ("kernel", "relative mean square error of exp(logits)", "before normalisation"),
    )
    for ax, (what, measured, title) in zip(fig.subplots(1, 2), panels, strict=True):
        part = data[data["what"] == what]
        charts.draw_curves(ax, part, "scale")
        charts.draw_theory(ax, part, "scale")
        style.log_axes(ax, x=None)
        style.label(ax, "standard deviation of q and k", measured, title)


def figures(records: pd.DataFrame) -> list[Figure]:
    """The four figures."""
    from nla_llm.report import charts  # noqa: PLC0415

    model, gaussian = (succeeded(records, input=name) for name in ("model", "gaussian"))
    n, heads = int(model["n"].iloc[0]), model.groupby(["layer", "head"]).ngroups
    m = int(model["m"].dropna().unique()[min(1, model["m"].nunique() - 1)])
    cost = medians_by_norm(model, [*CURVE, "operations"])
    cost = cost.assign(exact_operations=int(model["exact_operations"].iloc[0]))
    sweep = pd.concat([after_normalisation(gaussian), before_normalisation(gaussian)])
    against_budget, against_cost = (
        partial(charts.draw_against_budget, top=TOP),
        partial(charts.draw_against_cost, top=TOP),
    )
    wide: dict[str, Any] = {"size": (6.5, 3.5), "panels": (1, 2)}
    captions = {
        "budget": f"Median over the {heads} heads of the embedded model, split by the entropy of their rows (n = {n}, "
        "causal); bands: 95 % intervals of the median over heads. Grey: doing nothing (uniform, random keys) and "
        "the best possible of that rank.",
        "cost": "The same errors in both norms against operations, counted by formula; the vertical line is exact "
        "causal attention. The optimal rank is left out: it costs more than what it replaces.",
        "gaussian": f"Gaussian heads (d = {GAUSSIAN_DIM}, n = {n}) of growing scale. Left: medians over "
        f"{GAUSSIAN_HEADS} heads; dashed, the first-order prediction where its small parameter is small. Right: the "
        "mean square error of the kernel before normalisation with its 95 % interval over draws, and dashed the "
        "closed form of Performer's Lemma 2 and of its orthogonal extension, up to the scale where no number of draws "
        "measures it.",
        "heads": f"Every head of the embedded model, m = {m}; bars: 95 % intervals over draws. Trigonometric "
        "features lie far above and are left out.",
    }
    return [
        Figure("budget", captions["budget"], against_budget, by_kind(model), size=(6.5, 3.2), panels=(1, 2)),
        Figure("cost", captions["cost"], against_cost, cost, **wide),
        Figure("gaussian", captions["gaussian"], draw_sweep, sweep, **wide),
        Figure("heads", captions["heads"], charts.draw_against_entropy, by_head(model, m), size=(6.5, 3.3)),
    ]


def by_kind(model: pd.DataFrame) -> pd.DataFrame:
    """Medians over the half of the heads with the smaller entropy, 'sharp', and over the others, 'flat'."""
    kind = np.where(model["entropy"] <= model["entropy"].median(), "sharp", "flat")
    found = medians(model.assign(kind=kind), [*CURVE, "m", "kind"], "relative_frobenius")
    return found.sort_values("kind", ascending=False, kind="stable")


def by_head(model: pd.DataFrame, budget: int) -> pd.DataFrame:
    """Errors of every head at one budget, directions orthogonal where there is a choice."""
    shown = model[((model["m"] == budget) | model["m"].isna()) & model["directions"].ne("iid")]
    points = valued(shown, "relative_frobenius", [*CURVE, "m", "layer", "head", "entropy", "norm_growth"])
    return points[points["method"] != "trigonometric_features"]


def after_normalisation(gaussian: pd.DataFrame) -> pd.DataFrame:
    """Median errors of P by scale, and the first-order prediction where it may be trusted."""
    keys = [*CURVE, "scale"]
    trusted = gaussian[gaussian["first_order_valid"].eq(True)]
    theory = trusted.groupby(keys, sort=False)["first_order"].median().rename("theory").reset_index()
    return medians(gaussian, keys, "relative_frobenius").assign(what="P").merge(theory, on=keys, how="left")


def before_normalisation(gaussian: pd.DataFrame) -> pd.DataFrame:
    """Errors of the kernel by scale.

    Means over heads: they share their directions, so their errors are not independent and intervals are averaged.
    """
    names = {"kernel_error": "median", "kernel_error_lower": "lower", "kernel_error_upper": "upper"}
    names["kernel_theory"] = "theory"
    known = gaussian.dropna(subset=["kernel_error"]).groupby([*CURVE, "scale"], sort=False)
    kernel = known[list(names)].mean().rename(columns=names).reset_index().assign(what="kernel")
    return kernel[kernel["theory"] < READABLE]


def tables(records: pd.DataFrame) -> list[Table]:
    """Medians over the heads of the model and the share of heads on which a method beats doing nothing."""
    caption = (
        "Heads of the embedded model: medians over heads of the relative errors with their 95 % intervals, the number "
        "of heads on which the whole interval over draws lies below uniform attention, and the share of negative row "
        "sums."
    )
    negative = {"negative sums": lambda group: f"{100 * group['negative_share'].mean():.1f} %"}
    return [Table("heads", caption, heads_table(succeeded(records, input="model"), negative))]


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(records: pd.DataFrame) -> list[partial[Claim]]:
    """What the records say."""
    ok, model = succeeded(records), succeeded(records, input="model")
    largest = model["m"].max()
    elu = model[model["method"] == "elu_features"]
    positive = model[model["method"].eq("positive_features") & model["directions"].eq("orthogonal")]
    positive = positive[positive["m"] == largest]
    name = f"Positive orthogonal features with m = {largest:.0f}"
    published = f"{name} are closer to softmax than uniform attention on most heads"
    beaten = "Attention with elu + 1 is closer to softmax than uniform attention on most heads"
    source = "read into the accurate estimation that Choromanski et al. 2021, arXiv 2009.14794, promise"
    return [
        partial(floor_claim, ok),
        partial(closed_form_claim, ok),
        partial(share_claim, model, elu, beaten),
        partial(share_claim, model, positive, published, expected="refuted", source=source),
        partial(accuracy_claim, positive, largest),
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
    sentence = "No method of rank m comes below the Eckart–Young floor, in the Frobenius or the spectral norm"
    number = f"smallest ratio to the floor {worst:.4g} over {len(both)} heads, methods and budgets"
    source = "Eckart and Young 1936; Mirsky 1960"
    return Claim.decide(sentence, worst, worst, 1.0, ">=", number=number, source=source)


def closed_form_claim(kernel: pd.DataFrame) -> Claim:
    """The closed form of the kernel's variance agrees with the measurement, where the fourth moment allows a test."""
    kernel = kernel.dropna(subset=["kernel_error"])
    light = kernel[kernel["scale"] == kernel["scale"].min()]  # at larger scales the variance of the variance explodes
    error = standard_error(light, "kernel_error", KERNEL_DRAWS * light["draws"])
    worst = float(((light["kernel_error"] - light["kernel_theory"]).abs() / error).max())
    sentence = (
        "The mean square error of the kernel before normalisation equals its closed form within 4 standard errors, at "
        f"scale {light['scale'].iloc[0]:g}"
    )
    number = f"largest deviation {worst:.2g} standard errors over {len(light)} heads and methods"
    source = "Choromanski et al. 2021, arXiv 2009.14794, Lemma 2; orthogonal blocks derived"
    return Claim.decide(sentence, worst, worst, 4.0, "<", number=number, source=source)


def share_claim(
    model: pd.DataFrame, part: pd.DataFrame, sentence: str, *, expected: Any = "confirmed", source: str = ""
) -> Claim:
    """On most heads a method beats uniform attention; heads whose interval straddles it count for neither."""
    surely, possibly = (int(np.sum(better)) for better in closer_than_uniform(model, part))
    number = f"surely on {surely} of {len(part)} heads, possibly on {possibly}"
    return Claim.decide(
        sentence, surely / len(part), possibly / len(part), 0.5, ">", number=number, expected=expected, source=source
    )


def accuracy_claim(positive: pd.DataFrame, m: float) -> Claim:
    """The published claim of accuracy, as a number."""
    error = medians(positive, ["m"], "relative_frobenius").iloc[0]
    sentence = f"Positive orthogonal features with m = {m:.0f} approximate the attention of a trained head to 10 %"
    number = "median relative Frobenius error {median:.3g}, 95 % interval {lower:.3g} to {upper:.3g}".format(**error)
    source = "the accuracy that Choromanski et al. 2021, arXiv 2009.14794, title and abstract promise, read as 10 %"
    low, high = error["lower"], error["upper"]
    return Claim.decide(sentence, low, high, 0.1, "<", number=number, expected="refuted", source=source)


study = Study(
    name="attention_error",
    title="How wrong is approximate attention?",
    question="On the heads of a trained language model, how far are cheaper attentions from softmax "
    "attention, between doing nothing and the best possible, and at what cost?",
    setup=(
        "The embedded language model reads held-out text; every head gives queries, keys (after rotation) and values "
        "of a causal attention problem. The second inputs are Gaussian heads, without a mask, whose logits grow with "
        "the scale. The reference is exact attention in float64; errors are relative, of the matrix P and of the "
        "output P v. Random methods are drawn several times. Costs are formulas, for one head, in operations (a "
        "multiply-add is two)."
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
    headline="default",
)
