"""Tokens become vectors: what is the spectrum of the embedding, and what does the model lose when it is truncated?"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import nla_llm as nl
from nla_llm.linalg import haar_orthogonal
from nla_llm.measures import Estimate, Spectrum, condition_number, relative_error, stable_rank
from nla_llm.problems import embedded
from nla_llm.study import Claim, Figure, Study, Table
from nla_llm.study.frames import succeeded, valued

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

RANKS = {"small": (8, 48, 192), "default": (4, 8, 16, 32, 48, 64, 96, 128, 160, 192), "full": tuple(range(4, 193, 4))}
PIECES = {"small": 4, "default": 6, "full": 8}  # held-out files; a loss is a mean over pieces with a Student-t interval
TOKENS = 512


def cells(scale: str) -> list[dict[str, Any]]:
    """The spectra, and the loss at every rank, truncated three ways."""
    config = embedded.embedded_model().config
    spectra = [{"what": "embedding"}, *({"what": "heads", "layer": i} for i in range(config.num_hidden_layers))]
    ways = [("truncated_svd", True), ("truncated_svd", False), ("random_subspace", True)]
    losses = [{"method": method, "tie": tie, "rank": r} for r in RANKS[scale] for method, tie in ways]
    losses += [
        {"method": name, "tie": True, "rank": r} for name, r in (("zero_update", 0), ("none", config.hidden_size))
    ]
    return spectra + [{"what": "loss", "pieces": PIECES[scale], "tokens": TOKENS, **loss} for loss in losses]


def measure(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Records of one cell."""
    if cell["what"] == "embedding":
        return embedding_records(seed)
    if cell["what"] == "heads":
        return head_records(cell["layer"])
    return [loss_record(cell, seed)]


def embedding_records(seed: int) -> list[dict[str, Any]]:
    """Singular values of the embedding, beside those of a Gaussian matrix of the same size and Frobenius norm."""
    matrix = embedded.embedded_model().embedding.astype(np.float64)
    noise = np.random.default_rng(seed).standard_normal(matrix.shape)
    noise *= np.linalg.norm(matrix) / np.linalg.norm(noise)
    spectrum, reference = Spectrum.dense(matrix), Spectrum.dense(noise)
    return [
        {"index": i, "singular_value": spectrum.value(i), "gaussian": float(g)}
        for i, g in enumerate(reference.values, start=1)
    ]


def head_records(layer: int) -> list[dict[str, Any]]:
    """Stable rank and conditioning of W_Qᵀ W_K, a matrix of rank at most the head dimension, of every query head."""
    model = embedded.embedded_model()
    operators = [model.query_key(layer, head) for head in range(model.config.num_attention_heads)]
    return [
        {"head": i, "rank_bound": op.rank, "stable_rank": stable_rank(op), "condition": condition_number(op)}
        for i, op in enumerate(operators)
    ]


def loss_record(cell: dict[str, Any], seed: int) -> dict[str, Any]:
    """Error of the replaced embedding in both norms beside its optimum, and the loss of the model that uses it."""
    model = embedded.embedded_model()
    problem = nl.UpdateProblem(model.embedding.astype(np.float64))
    pieces = [embedded.heldout_tokens(cell["tokens"], piece) for piece in range(cell["pieces"])]
    exact, op = problem.exact(), replacement(cell, problem, seed)
    embedding = op.dense().astype(np.float32)  # the model as it is, bit for bit, where nothing replaces it
    plain = np.array([model.loss(piece) for piece in pieces])
    losses = np.array([model.loss(piece, embedding=embedding, tie=cell["tie"]) for piece in pieces])
    return {
        "loss": Estimate.from_samples(losses),
        "increase": Estimate.from_samples(losses - plain),
        "optimum": float(Spectrum.dense(problem.delta).truncation(cell["rank"], "frobenius")),
        "relative_frobenius": relative_error(exact, op, norm="frobenius"),
        "relative_spectral": relative_error(exact, op, norm="spectral"),
    }


def replacement(cell: dict[str, Any], problem: nl.UpdateProblem, seed: int) -> Any:
    """The matrix in the place of the embedding; itself where the method is "none"."""
    if cell["method"] == "none":
        return problem.exact()
    if cell["method"] == "random_subspace":
        basis = haar_orthogonal(problem.d_in, np.random.default_rng(seed))[:, : cell["rank"]]
        return nl.operators.LowRank(problem.delta @ basis, basis)
    options = {"rank": cell["rank"]} if cell["method"] == "truncated_svd" else {}
    return nl.method(cell["method"], **options)(problem)


# -- figures -----------------------------------------------------------------------------------------------------------

NORMS = {"frobenius": "Frobenius", "spectral": "spectral"}
BAND = ("x", "value", "lower", "upper")
WAYS = {
    ("truncated_svd", True): "truncated SVD, input and output",
    ("truncated_svd", False): "truncated SVD, input only",
    ("random_subspace", True): "random subspace, input and output",
}


def draw_spectrum(fig: Canvas, data: pd.DataFrame) -> None:
    """Singular values of the embedding, and the error of its truncation."""
    from nla_llm.report import style  # noqa: PLC0415 - matplotlib loads only in the process that draws

    left, right = fig.subplots(1, 2)
    values = data[data["panel"] == "spectrum"]
    style.line(left, *(values[c] for c in BAND), family="update", label="embedding", marker="")
    label = "Gaussian matrix of the same norm"
    style.yardstick(left, values["x"], values["reference"], kind="uniform", label=label, marker="")
    style.log_axes(left, x=None)
    style.label(left, "index i", "singular value", "spectrum")
    for (method, norm), curve in data[data["panel"] == "error"].groupby(["method", "norm"], sort=False):
        band, frobenius = [curve[c] for c in BAND], norm == "frobenius"
        if method == "random_subspace":
            grey = "random_subspace" if frobenius else "uniform"
            style.yardstick(right, *band, kind=grey, label=f"random subspace, {NORMS[norm]}")
            continue
        variant = "orthogonal" if frobenius else "iid"
        style.line(right, *band, family="update", label=f"truncated SVD, {NORMS[norm]}", variant=variant)
        if frobenius:
            style.theory_line(right, curve["x"], curve["reference"], label="Eckart–Young, Frobenius")
    style.label(right, "rank r", "relative error of the embedding", "truncation")


def draw_loss(fig: Canvas, data: pd.DataFrame) -> None:
    """Loss of the model against the rank of its embedding."""
    from nla_llm.report import charts, style  # noqa: PLC0415

    ax, loss = fig.subplots(), ("loss", "loss_lower", "loss_upper")
    for (method, tie), curve in data.groupby(["method", "tie"], sort=False):
        if (method, tie) not in WAYS:
            continue
        band = [curve[c] for c in ("rank", *loss)]
        charts.draw_curve(ax, *band, method=method, label=WAYS[method, tie], variant="orthogonal" if tie else "iid")
    span = [data["rank"].min(), data["rank"].max()]
    for method, grey, text in (
        ("zero_update", "uniform", "no embedding: log of the vocabulary"),
        ("none", "optimal_rank", "the model as it is"),
    ):
        for _, level in data[data["method"] == method].head(1).iterrows():
            style.yardstick(ax, span, *(level[c] for c in loss), kind=grey, label=text, marker="")
    style.label(ax, "rank r of the embedding", "held-out loss, nats per token")


def draw_heads(fig: Canvas, data: pd.DataFrame) -> None:
    """Stable rank and condition number of every head's query-key matrix."""
    from nla_llm.report import style  # noqa: PLC0415

    left, right = fig.subplots(1, 2)
    for ax, (what, part) in zip((left, right), data.groupby("what_is_shown", sort=False), strict=True):
        x = part["layer"] + 0.1 * (part["head"] - part["head"].mean())
        bars = [part["value"] - part["lower"], part["upper"] - part["value"]]
        ax.errorbar(x, part["value"], bars, fmt="o", color=style.colour("update"), markersize=3.5, linewidth=0.8)
        ax.set_xticks(sorted(part["layer"].unique()))
        style.label(ax, "layer", what)
    right.set_yscale("log")
    span = [data["layer"].min() - 0.4, data["layer"].max() + 0.4]
    label = "largest possible: the head dimension"
    style.yardstick(left, span, data["rank_bound"].max(), kind="optimal_rank", label=label, marker="")


def figures(records: pd.DataFrame) -> list[Figure]:
    """Loss against rank, spectrum and truncation error, query-key matrices."""
    loss = losses(records)
    ends = [f"{name}{end}" for name in ("loss", "increase") for end in ("", "_lower", "_upper")]
    loss_caption = (
        f"Loss of the model on {int(loss['pieces'].iloc[0])} held-out pieces of {TOKENS} tokens when its embedding "
        "is replaced by a matrix of rank r; bands: 95 % Student-t intervals over pieces, which differ more among "
        "themselves than the curves do."
    )
    spectrum_caption = (
        "Left: singular values of the embedding matrix, beside those of a Gaussian matrix of the same size and "
        "norm. Right: relative error of replacing it by rank r; bars for rounding are invisible at this scale."
    )
    heads_caption = (
        "Query-key matrices of every head: stable rank (grey line: largest possible) and condition number on "
        "their rank."
    )
    return [
        Figure("loss", loss_caption, draw_loss, loss[["method", "tie", "rank", *ends, "optimum"]]),
        Figure("spectrum", spectrum_caption, draw_spectrum, spectrum_data(records), size=(6.5, 3.7), panels=(1, 2)),
        Figure("heads", heads_caption, draw_heads, heads_data(records), size=(6.5, 3.2), panels=(1, 2)),
    ]


def losses(records: pd.DataFrame) -> pd.DataFrame:
    """Records of the replaced embedding, by rank."""
    return succeeded(records, what="loss").sort_values("rank", kind="stable")


def spectrum_data(records: pd.DataFrame) -> pd.DataFrame:
    """Data of the two panels in one long table."""
    names = {"index": "x", "gaussian": "reference"}
    values = valued(succeeded(records, what="embedding"), "singular_value", names).rename(columns=names)
    cut = losses(records)
    cut = cut[cut["tie"].astype(bool) & cut["method"].isin(["truncated_svd", "random_subspace"])]
    names = {"rank": "x", "optimum": "reference"}
    errors = [
        valued(cut, f"relative_{norm}", ["method", *names]).rename(columns=names).assign(panel="error", norm=norm)
        for norm in NORMS
    ]
    data = pd.concat([values.assign(panel="spectrum"), *errors], ignore_index=True)
    return data[["panel", *BAND, "reference", "method", "norm"]]


def heads_data(records: pd.DataFrame) -> pd.DataFrame:
    """Both measures in one long table."""
    heads = succeeded(records, what="heads")
    names = {"stable_rank": "stable rank of W_Qᵀ W_K", "condition": "condition number of W_Qᵀ W_K on its rank"}
    parts = [
        valued(heads, name, ["layer", "head", "rank_bound"]).assign(what_is_shown=text) for name, text in names.items()
    ]
    return pd.concat(parts)[["what_is_shown", "layer", "head", "value", "lower", "upper", "rank_bound"]]


def tables(records: pd.DataFrame) -> list[Table]:
    """Truncations beside the optimum and what they cost in loss."""
    rows = [
        {
            "replaced by": WAYS.get((row["method"], row["tie"]), row["method"].replace("_", " ")),
            "rank": row["rank"],
            "Frobenius": f"{row['relative_frobenius']:.4g}",
            "optimum": f"{row['optimum']:.4g}",
            "spectral": f"{row['relative_spectral']:.4g}",
            "loss increase, nats": f"{row['increase']:.3g} [{row['increase_lower']:.3g}, {row['increase_upper']:.3g}]",
        }
        for row in losses(records).to_dict("records")
    ]
    caption = (
        "The embedding replaced by a matrix of rank r: relative errors beside the Eckart–Young optimum "
        "(Frobenius), and the increase of the held-out loss, paired over pieces, with its 95 % interval."
    )
    return [Table("truncation", caption, pd.DataFrame(rows))]


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(records: pd.DataFrame) -> list[partial[Claim]]:
    """What the records say."""
    loss = losses(records)
    svd = loss[(loss["method"] == "truncated_svd") & loss["tie"].astype(bool)]
    return [
        partial(attained, svd),
        partial(learned, loss),
        partial(half_rank, svd),
        partial(better_than_random, loss),
    ]


def attained(svd: pd.DataFrame) -> Claim:
    """The best possible error, by another route."""
    inner = svd[svd["rank"] < svd["rank"].max()]
    gap = float(np.max(np.abs(inner["relative_frobenius"] / inner["optimum"] - 1)))
    sentence = (
        "The truncated SVD attains the Eckart–Young optimum in the Frobenius norm at every rank below full, to rounding"
    )
    number, source = f"largest relative gap {gap:.1e}", "Eckart and Young 1936"
    return Claim.decide(sentence, gap, gap, 1e-10, "<", number=number, source=source)


def learned(loss: pd.DataFrame) -> Claim:
    """The model as it is against knowing the frequencies of the tokens alone."""
    whole, entropy = loss[loss["method"] == "none"].iloc[0], embedded.training_record()["validation_unigram_entropy"]
    sentence = f"The model has learned: its loss is 2 nats per token below the unigram entropy of {entropy:.2f} nats"
    low, high = (float(entropy - whole[f"loss_{end}"]) for end in ("upper", "lower"))
    return Claim.decide(sentence, low, high, 2.0, ">=", number=f"{low:.2f} to {high:.2f} nats below")


def half_rank(svd: pd.DataFrame) -> Claim:
    """Half of the rank is not free."""
    half = svd.iloc[(svd["rank"] - svd["rank"].max() / 2).abs().argmin()]
    sentence = (
        f"Truncating the embedding to rank {half['rank']:.0f}, half of its columns, costs more than 0.1 nats per token"
    )
    return Claim.decide(sentence, float(half["increase_lower"]), float(half["increase_upper"]), 0.1, ">")


def better_than_random(loss: pd.DataFrame) -> Claim:
    """Singular vectors against a random subspace of the same rank."""
    tied = loss[loss["tie"].astype(bool)].set_index("rank")
    svd, random = (tied[tied["method"] == name] for name in ("truncated_svd", "random_subspace"))
    middle = sorted(set(svd.index))[len(set(svd.index)) // 2]
    low = float(random.loc[middle, "increase_lower"] - svd.loc[middle, "increase_upper"])
    high = float(random.loc[middle, "increase_upper"] - svd.loc[middle, "increase_lower"])
    sentence = f"At rank {middle:.0f} the leading singular vectors keep more of the model than a random subspace does"
    number = f"loss increases differ by {low:.2f} to {high:.2f} nats"
    return Claim.decide(sentence, low, high, 0.0, ">", number=number)


study = Study(
    name="embedding_spectrum",
    title="Tokens become vectors: the spectrum of an embedding",
    question="How fast do the singular values of a trained embedding decay, how well conditioned are the query-key "
    "matrices behind it, and what does the model lose when the embedding is truncated?",
    setup=(
        "The embedding of the embedded language model, a row per token, which also serves as its output matrix, is "
        "replaced by a matrix of rank r: its truncated singular value decomposition, on both sides of the model or on "
        "the input side alone, or its projection on a random subspace. The loss is the cross-entropy of the next token "
        "on held-out text; the yardsticks are the model as it is and a zero embedding, which knows nothing."
    ),
    cells=cells,
    measure=measure,
    figures=figures,
    tables=tables,
    claims=claims,
    references=(
        "C. Eckart and G. Young, The approximation of one matrix by another of lower rank, Psychometrika 1, 1936.",
        "L. Mirsky, Symmetric gauge functions and unitarily invariant norms, Quarterly Journal "
        "of Mathematics 11, 1960.",
        "Y. Saad, The linear algebra of Large Language Models, survey talk, CIRM, 2024.",
    ),
    headline="default",
)
