"""Spectra, stable ranks and conditioning of the heads of a model: which of them tells how wrong a method will be?"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import nla_llm as nl
from nla_llm import measures
from nla_llm.problems import embedded
from nla_llm.study import Claim, Figure, Skip, Study, Table
from nla_llm.study.correlations import rank_correlation
from nla_llm.study.frames import groups, succeeded
from nla_llm.study.measuring import attention_records, head_facts
from nla_llm.study.medians import median_text
from nla_llm.study.roster import ROSTER

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

SIZES = {"small": (128, 6, 32), "default": (256, 6, 64), "full": (1024, 12, 128)}  # tokens, draws, budget
PREDICTORS = {
    "entropy": "row entropy",
    "stable_rank": "stable rank of P",
    "rank_needed": "rank needed for 10 %",
    "norm_growth": "mean |x + y|²",
    "logit_spread": "spread of the logits",
    "sensitivity": "condition bound of q",
}
TARGET = 0.1
POINTS = 24  # singular values that are kept of each head


def cells(scale: str) -> list[dict[str, Any]]:
    """The facts of every head, and the error of every method on every head."""
    n, draws, budget = SIZES[scale]
    layers = range(embedded.embedded_model().config.num_hidden_layers)
    facts = [{"what": "facts", "layer": layer, "n": n} for layer in layers]
    return facts + [
        {
            "what": "error",
            "label": label,
            "budget": budget if entry.budget else None,
            "layer": layer,
            "n": n,
            "draws": draws,
        }
        for label, entry in ROSTER.items()
        for layer in layers
    ]


def measure(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Facts of the heads of one layer, or the errors of one method on them."""
    p = embedded.heldout_problems(cell["n"])[cell["layer"]].unmasked()  # so that every method can take part
    if cell["what"] == "facts":
        return facts(p)
    entry = ROSTER[cell["label"]]
    method = entry.make() if cell["budget"] is None else entry.make(cell["budget"])
    if entry.budget is not None and cell["budget"] > cell["n"]:
        raise Skip(f"the budget {cell['budget']} exceeds the {cell['n']} tokens")
    records = attention_records(p, method, draws=cell["draws"], seed=seed)
    return [{"method": entry.method, **record} for record in records]


def facts(p: nl.AttentionProblem) -> list[dict[str, Any]]:
    """What is known of every head, and some of its singular values."""
    exact = p.exact()
    dense = exact.dense()
    values = np.linalg.svd(dense, compute_uv=False).reshape(-1, p.n_q)
    logits = (p.scale * (p.q.astype(float) @ np.swapaxes(p.k.astype(float), -1, -2))).reshape(-1, p.n_q, p.n_k)
    stable = measures.stable_rank(nl.operators.Dense(dense))
    bound = measures.attention_condition(exact, p.q, p.k, p.v, scale=p.scale)
    left = 1 - np.cumsum(values**2, axis=-1) / np.sum(values**2, axis=-1, keepdims=True)
    points = np.unique(np.geomspace(1, p.n_q, POINTS).round().astype(int))
    records = []
    for i, (index, known) in enumerate(zip(np.ndindex(p.batch_shape), head_facts(p), strict=True)):
        record = {
            "head": i,
            **known,
            "stable_rank": stable[index],
            "rank_needed": 1 + int(np.sum(left[i] > TARGET**2)),
            "logit_spread": float(np.std(logits[i] - logits[i].mean(axis=-1, keepdims=True))),
            "sensitivity": bound.q[index],
            "sensitivity_v": bound.v[index],
        }
        records += [record] + [{"head": i, "index": int(j), "singular_value": float(values[i, j - 1])} for j in points]
    return records


# -- what the records say ----------------------------------------------------------------------------------------------


def heads(records: pd.DataFrame) -> pd.DataFrame:
    """One row for each head, with its facts."""
    ok = succeeded(records, what="facts")
    return ok.dropna(subset=["stable_rank"])


def joined(records: pd.DataFrame) -> pd.DataFrame:
    """Errors of the methods beside the facts of the heads."""
    errors = succeeded(records, what="error")[["label", "method", "layer", "head", "relative_frobenius"]]
    return errors.merge(heads(records)[["layer", "head", *PREDICTORS]], on=["layer", "head"])


def correlations(records: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation over heads of each fact with the error of each method."""
    rows = []
    for (label,), part in groups(joined(records), ["label"]):
        if part["relative_frobenius"].nunique() < 3 or not np.isfinite(part["relative_frobenius"]).all():
            continue
        for name, words in PREDICTORS.items():
            e = rank_correlation(part[name].astype(float), part["relative_frobenius"], resamples=500)
            rows.append(
                {
                    "label": label,
                    "fact": words,
                    "value": float(e.value),
                    "lower": float(e.lower),
                    "upper": float(e.upper),
                }
            )
    return pd.DataFrame(rows)


def draw_spectra(fig: Canvas, data: pd.DataFrame) -> None:
    """Singular values of every head, one colour for each layer."""
    from nla_llm.report import style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    ax = fig.subplots()
    for (layer, _), curve in data.groupby(["layer", "head"]):
        ax.plot(
            curve["index"],
            curve["singular_value"],
            color=style.SPARE_COLOURS[int(layer)],
            linewidth=0.8,
            label=f"layer {layer:g}",
        )
    style.log_axes(ax)
    ax.set_ylim(bottom=1e-6)
    style.label(ax, "index", "singular value of P")


def draw_correlations(fig: Canvas, data: pd.DataFrame) -> None:
    """A table of correlations in colour, methods by facts; an interval that includes zero is set in grey."""
    from nla_llm.report import fronts  # noqa: PLC0415 - as above

    fronts.draw_correlations(fig, data)


def figures(records: pd.DataFrame) -> list[Figure]:
    """The spectra, and what predicts the errors."""
    ok = succeeded(records, what="facts")
    spectra = ok.dropna(subset=["singular_value"])[["layer", "head", "index", "singular_value"]]
    found = correlations(records)
    n, budget = int(records["n"].iloc[0]), records["budget"].dropna().iloc[0]
    return [
        Figure(
            "spectra",
            f"Singular values of softmax attention without its causal mask, all heads of the embedded model, n = {n}.",
            draw_spectra,
            spectra,
            size=(6.5, 3.3),
        ),
        Figure(
            "correlations",
            "Rank correlation, over the heads of the model, of a fact about the head with the relative Frobenius "
            f"error of a method (budget {budget:.0f}); grey where the 95 % bootstrap interval includes zero. Red: the "
            "larger the fact, the larger the error.",
            draw_correlations,
            found,
            size=(6.5, 0.8 + 0.158 * found["label"].nunique()),
        ),
    ]


def tables(records: pd.DataFrame) -> list[Table]:
    """Facts by layer."""
    rows = [
        {"layer": int(layer), **{PREDICTORS[name]: median_text(part, name) for name in PREDICTORS}}
        for layer, part in heads(records).groupby("layer")
    ]
    caption = (
        "Facts about the heads of each layer: medians over heads with their intervals, the extremes for few heads."
    )
    return [Table("facts", caption, pd.DataFrame(rows))]


def claims(records: pd.DataFrame) -> list[partial[Claim]]:
    """What the records say."""
    found = correlations(records)
    asked = (
        (
            "positive, orthogonal",
            "norm_growth",
            "The error of positive random features grows with the mean of |x + y|² over heads",
        ),
        ("uniform", "entropy", "The error of uniform attention falls with the entropy of the rows"),
        ("optimal rank", "stable_rank", "The error of the best matrix of a rank grows with the stable rank"),
    )
    return [partial(flatter_heads, records), *(partial(foretold, found, *question) for question in asked)]


def flatter_heads(records: pd.DataFrame) -> Claim:
    """The rank that a head needs against the entropy of its rows."""
    known = heads(records)
    entropy = rank_correlation(known["entropy"], known["rank_needed"].astype(float), resamples=1000)
    low, high, number = float(entropy.lower), float(entropy.upper), f"rank correlation {entropy}"
    return Claim.decide("Heads with flatter rows need a smaller rank", low, high, 0.0, "<", number=number)


def foretold(found: pd.DataFrame, label: str, fact: str, sentence: str) -> Claim:
    """The error of a method against a fact about the head."""
    row = found.set_index(["label", "fact"]).loc[(label, PREDICTORS[fact])]
    sense = "<" if "falls" in sentence else ">"
    number = "rank correlation {value:.2f} [{lower:.2f}, {upper:.2f}]".format(**row)
    return Claim.decide(sentence, row["lower"], row["upper"], 0.0, sense, number=number)


study = Study(
    name="attention_spectra",
    title="Spectra of attention, and what they foretell",
    question="How fast do the singular values of trained attention heads decay, how well conditioned is their output, "
    "and which fact about a head tells how wrong an approximation of it will be?",
    setup=(
        "All heads of the embedded language model on held-out text, without their causal mask so that every method "
        "can take part. Every method of the atlas runs at one budget; the facts about a head are correlated, over "
        "heads, with its error. The condition bound of q is the largest relative change of the output for a relative "
        "change of the queries, by the Lipschitz constant ½ of softmax. All intervals are over the heads of this one "
        "model, which share its training and its text: they say nothing of other models."
    ),
    cells=cells,
    measure=measure,
    figures=figures,
    tables=tables,
    claims=claims,
)
