"""What does the model lose when its attention is replaced, and which norm of the error tells so beforehand?"""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import nla_llm as nl
from nla_llm import measures
from nla_llm.measures import Estimate
from nla_llm.problems import embedded
from nla_llm.study import Claim, Figure, Skip, Study, Table
from nla_llm.study.correlations import rank_correlation, rank_correlation_difference
from nla_llm.study.frames import succeeded
from nla_llm.study.roster import ROSTER

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

SIZES = {"small": (2, 128, (32,)), "default": (6, 256, (32, 128)), "full": (8, 512, (16, 32, 64, 128, 256))}
DRAWS = 3  # of a random method for the errors of the operator; the losses are means over pieces, each with its own draw
PREDICTORS = {
    "frobenius": "relative Frobenius error of P",
    "spectral": "relative spectral error of P",
    "total_variation": "mean total variation of the rows",
    "output": "relative Frobenius error of P v",
}
RESAMPLES = 2000
COMPARISONS = 150  # methods and budgets held against uniform attention, at most: Bonferroni for the best of them


def cells(scale: str) -> list[dict[str, Any]]:
    """Every causal method at every budget in each layer alone, and in all layers."""
    pieces, n, budgets = SIZES[scale]
    layers = range(embedded.embedded_model().config.num_hidden_layers)
    return [
        {"label": label, "budget": budget, "layer": layer, "pieces": pieces, "n": n}
        for label, entry in ROSTER.items()
        if "causal" in entry.make().properties.supports and label != "optimal rank"
        for budget in (budgets if entry.budget == "m" else (None,))
        for layer in (*layers, None)
    ]


def measure(cell: dict[str, Any], seed: int) -> dict[str, Any]:
    """Loss with the attention of one layer replaced, or of all, and the error of the operators there."""
    entry, model = ROSTER[cell["label"]], embedded.embedded_model()
    method = entry.make() if cell["budget"] is None else entry.make(cell["budget"])
    layers = range(model.config.num_hidden_layers) if cell["layer"] is None else (cell["layer"],)
    if cell["budget"] is not None and cell["budget"] > cell["n"]:
        raise Skip(f"the budget {cell['budget']} exceeds the {cell['n']} tokens")
    pieces = [embedded.heldout_tokens(cell["n"], i) for i in range(cell["pieces"])]
    replaced = dict.fromkeys(layers, method)
    losses = np.array([model.loss(p, attention=replaced, rng=(seed + i) % 2**32) for i, p in enumerate(pieces)])
    plain = np.array([plain_loss(cell["n"], i) for i in range(cell["pieces"])])
    found = {
        "method": entry.method,
        "loss": Estimate.from_samples(losses),
        "increase": Estimate.from_samples(losses - plain),
    }
    if cell["layer"] is None:
        uniform = np.array([uniform_loss(cell["n"], i) for i in range(cell["pieces"])])
        found["over_uniform"] = Estimate.from_samples(losses - uniform, confidence=1 - 0.05 / COMPARISONS)
    if cell["layer"] is not None:
        found |= errors(embedded.heldout_problems(cell["n"])[cell["layer"]], method, seed)
    return found


@cache
def plain_loss(n: int, piece: int) -> float:
    """Loss of the model as it is."""
    return float(embedded.embedded_model().loss(embedded.heldout_tokens(n, piece)))


@cache
def uniform_loss(n: int, piece: int) -> float:
    """Loss with uniform attention in all layers: what other methods are held against, piece by piece."""
    model, tokens = embedded.embedded_model(), embedded.heldout_tokens(n, piece)
    return float(
        model.loss(tokens, attention=dict.fromkeys(range(model.config.num_hidden_layers), nl.method("uniform")))
    )


def errors(p: nl.AttentionProblem, method: Any, seed: int) -> dict[str, float]:
    """Errors of the operators of one layer: means over its heads and over draws."""
    exact = nl.operators.Dense(p.exact().dense(), nonnegative=True)
    draws = 1 if method.properties.deterministic else DRAWS
    rows = []
    for draw in range(draws):
        op = nl.operators.Dense(method(p, rng=seed + draw).dense())
        rows.append(
            {
                "frobenius": measures.relative_error(exact, op, norm="frobenius"),
                "spectral": measures.relative_error(exact, op, norm="spectral"),
                "total_variation": measures.row_divergence(exact, op, kind="tv"),
                "output": measures.output_error(exact, op, p.v, norm="frobenius"),
            }
        )
    return {name: float(np.mean([np.mean(row[name].value) for row in rows])) for name in PREDICTORS}


# -- what the records say ----------------------------------------------------------------------------------------------


def single_layers(records: pd.DataFrame) -> pd.DataFrame:
    """Records in which one layer was replaced and everything is finite."""
    ok = succeeded(records).dropna(subset=["layer"])
    return ok[np.isfinite(ok[[*PREDICTORS, "increase"]].astype(float)).all(axis=1)]


def correlations(single: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of each error with the increase of the loss, within layers, and its lead over the first."""
    rows = []
    base = next(iter(PREDICTORS))
    for name, words in PREDICTORS.items():
        e = rank_correlation(single[name], single["increase"], **dependence(single))
        row = {"error": words, "correlation": e.value, "correlation_lower": e.lower, "correlation_upper": e.upper}
        if name != base:
            lead = rank_correlation_difference(single[name], single[base], single["increase"], **dependence(single))
            row |= {"lead": lead.value, "lead_lower": lead.lower, "lead_upper": lead.upper}
        rows.append({key: float(x) if key != "error" else x for key, x in row.items()})
    return pd.DataFrame(rows)


def dependence(single: pd.DataFrame) -> dict[str, Any]:
    """Ranks within layers; a method is one thing, in all layers and at all budgets, so methods are resampled."""
    return {"groups": single["layer"], "clusters": single["label"], "resamples": RESAMPLES}


def least_lead(single: pd.DataFrame, best: str) -> Estimate:
    """Lead of an error over that one of the others whose lower end is the least."""
    others = [name for name in PREDICTORS if name != best]
    leads = [
        rank_correlation_difference(single[best], single[name], single["increase"], **dependence(single))
        for name in others
    ]
    return min(leads, key=lambda lead: float(lead.lower))


def draw_predictors(fig: Canvas, data: pd.DataFrame) -> None:
    """Increase of the loss against each error, one colour for each layer."""
    from nla_llm.report import style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    for ax, (name, words) in zip(fig.subplots(2, 2, sharey=True).flat, PREDICTORS.items(), strict=True):
        for layer, part in data.groupby("layer"):
            ax.plot(
                part[name],
                part["increase"],
                "o",
                markersize=2.6,
                color=style.SPARE_COLOURS[int(layer)],
                label=f"layer {layer:g}",
            )
        style.log_axes(ax, x=10, y=None)
        ax.set_yscale("symlog", linthresh=0.01)
        style.label(ax, words, "increase of the loss in nats" if ax.get_subplotspec().is_first_col() else "")


def draw_losses(fig: Canvas, data: pd.DataFrame) -> None:
    """Increase of the loss with the attention of all layers replaced, between none and the unigram entropy."""
    from nla_llm.report import style  # noqa: PLC0415

    ax = fig.subplots()
    places = range(len(data))
    value = data["increase"]
    bars = np.abs(np.stack([value - data["increase_lower"], data["increase_upper"] - value]))
    grey = data["method"].isin(["uniform", "random_keys"])
    for these, colour in ((~grey, style.FAMILIES["kernel"]), (grey, "#7A7A7A")):
        here = np.flatnonzero(these)
        ax.errorbar(value.iloc[here], here, xerr=bars[:, here], fmt="o", color=colour, markersize=3.5, elinewidth=0.9)
    ignorance = data["unigram"].iloc[0] - data["plain"].iloc[0]
    for where, words in ((0.0, " the model as it is"), (ignorance, " unigram entropy")):
        ax.axvline(where, color=style.INK, linewidth=0.9)
        ax.text(where, len(data) - 0.2, words, ha="left", va="center", fontsize=7.5)
    ax.set_yticks(places, data["name"], fontsize=7.5)
    ax.set_ylim(-0.7, len(data) + 0.3)
    style.label(ax, "increase of the loss in nats per token, attention of all layers replaced", "")


def everywhere(records: pd.DataFrame) -> pd.DataFrame:
    """Records in which all layers were replaced, best below, with the loss of the model as it is."""
    ok = succeeded(records)
    whole = ok[ok["layer"].isna()].sort_values("loss", ascending=False)
    m = whole["budget"].map(lambda b: "" if pd.isna(b) else f", m = {b:.0f}")
    plain = (whole["loss"] - whole["increase"]).median()
    unigram = embedded.training_record()["validation_unigram_entropy"]
    return whole.assign(name=whole["label"] + m, plain=plain, unigram=unigram)


def figures(records: pd.DataFrame) -> list[Figure]:
    """The predictors, and the losses."""
    single, whole = single_layers(records), everywhere(records)
    columns = ["name", "method", "increase", "increase_lower", "increase_upper", "plain", "unigram"]
    return [
        Figure(
            "predictors",
            "Increase of the loss when the attention of one layer is replaced, against four errors of its operators "
            "(means over the heads of the layer); each point is a method at a budget.",
            draw_predictors,
            single[["label", "budget", "layer", "increase", "increase_lower", "increase_upper", *PREDICTORS]],
            size=(6.5, 4.8),
            panels=(2, 2),
        ),
        Figure(
            "losses",
            "Increase of the loss of the model when a method replaces the attention of all layers, without any "
            "retraining; bars: 95 % intervals over pieces of held-out text. Grey: doing nothing (uniform attention, "
            "random keys).",
            draw_losses,
            whole[columns],
            size=(6.5, 0.9 + 0.15 * len(whole)),
        ),
    ]


def tables(records: pd.DataFrame) -> list[Table]:
    """Which error predicts the loss; what each method costs the model."""
    single, whole = single_layers(records), everywhere(records)
    medians = single.groupby(["label", "budget"], dropna=False)["increase"].agg(["median", "min", "max"]).reset_index()
    rows = whole.merge(medians, on=["label", "budget"], how="left").iloc[::-1]
    losses = pd.DataFrame(
        {
            "method": rows["name"],
            "one layer: median increase": rows["median"],
            "least": rows["min"],
            "most": rows["max"],
            "all layers: loss": rows["loss"],
            "all layers: loss_lower": rows["loss_lower"],
            "all layers: loss_upper": rows["loss_upper"],
            "perplexity": np.exp(rows["loss"].astype(float)),
        }
    )
    return [
        Table(
            "correlations",
            "Rank correlation of each error with the increase of the loss when one layer is replaced, ranks taken "
            "within layers, and how far it leads the Frobenius norm; 95 % bootstrap intervals over methods, each with "
            "all its layers and budgets.",
            correlations(single),
        ),
        Table(
            "losses",
            "Increase of the loss in nats per token when one layer is replaced (median, least and most over layers), "
            "and the loss and perplexity when all are.",
            losses,
        ),
    ]


def claims(records: pd.DataFrame) -> list[partial[Claim]]:
    """What the records say."""
    single, whole = single_layers(records), everywhere(records)
    found = correlations(single).set_index("error")
    return [partial(largest, single, found), partial(output_leads, found), partial(kept, whole)]


def largest(single: pd.DataFrame, found: pd.DataFrame) -> Claim:
    """The error that goes best with the loss."""
    best = found["correlation"].idxmax()
    ahead = least_lead(single, next(name for name, words in PREDICTORS.items() if words == best))
    return Claim.decide(
        f"Of the four errors, the {best} has the largest rank correlation with the loss",
        float(ahead.lower),
        float(ahead.upper),
        0.0,
        ">",
        number="{correlation:.3g} [{correlation_lower:.3g}, {correlation_upper:.3g}]".format(**found.loc[best])
        + f", lead over the others at least {float(ahead.value):.3g} "
        f"[{float(ahead.lower):.3g}, {float(ahead.upper):.3g}]",
    )


def output_leads(found: pd.DataFrame) -> Claim:
    """The error of the output against that of the matrix."""
    lead = found.loc[PREDICTORS["output"]]
    return Claim.decide(
        "The error of the output predicts the loss better than the Frobenius error of the matrix",
        float(lead["lead_lower"]),
        float(lead["lead_upper"]),
        0.0,
        ">",
        number="lead {lead:.3g} [{lead_lower:.3g}, {lead_upper:.3g}]".format(**lead),
    )


def kept(whole: pd.DataFrame) -> Claim:
    """The best method in all layers against doing nothing."""
    uniform = whole[whole["label"] == "uniform"].iloc[0]
    others = whole[~whole["method"].isin(["uniform", "random_keys"])]
    best = others.loc[others["over_uniform"].idxmin()]
    return Claim.decide(
        "Some method that replaces the attention of all layers without retraining keeps the loss below that of "
        "uniform attention",
        float(best["over_uniform_lower"]),
        float(best["over_uniform_upper"]),
        0.0,
        "<",
        number=f"{best['name']}: {best['loss']:.3g} nats, uniform {uniform['loss']:.3g}, the model "
        f"{whole['plain'].iloc[0]:.3g}; difference on the same pieces of text {best['over_uniform']:.3g} "
        f"[{best['over_uniform_lower']:.3g}, {best['over_uniform_upper']:.3g}], Bonferroni for {COMPARISONS} methods",
    )


study = Study(
    name="end_to_end",
    title="What approximate attention costs a language model",
    question="When the attention of one layer or of all layers is replaced without retraining, how much loss does the "
    "model incur, and which norm of the error tells so beforehand?",
    setup=(
        "The embedded language model reads pieces of held-out text; the causal attention of one layer, or of all "
        "six, is computed by another method. The loss is the cross-entropy of the next token. Errors are those of "
        "the operators that the layer's heads get from the unchanged layers below. Only methods with a true causal "
        "form can take part: the others would let a token see its successors."
    ),
    cells=cells,
    measure=measure,
    figures=figures,
    tables=tables,
    claims=claims,
)
