"""Is LoRA a truncated SVD of the full update? Norms, subspaces, losses and costs of both, on one fine-tuned model."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from nla_llm.problems.embedded_updates import embedded_updates
from nla_llm.study import Figure, Study, Table
from nla_llm.study.medians import median_text

from . import _lora_vs_svd as bench
from . import _lora_vs_svd_figures as draw
from . import _lora_vs_svd_findings as findings

# ranks, pieces of the new and of the old domain, tokens of each, layers, tokens of a calibration piece
SIZES = {
    "small": ((1, 4), 3, 3, 128, (0, 3), 128),
    "default": ((1, 2, 4, 8, 16), 8, 5, 512, tuple(range(6)), 512),
    "full": ((1, 2, 4, 8, 16), 16, 8, 1024, tuple(range(6)), 1024),
}
TEST_PIECES = 4  # of the new domain, on which the errors of the outputs are taken
BAND = ["value", "lower", "upper"]
SPREAD = "Medians over the matrices, for LoRA over matrices and seeds, with 95 % intervals."


def cells(scale: str) -> list[dict[str, Any]]:
    """The losses under every update, and the errors of all updates of every matrix."""
    ranks, new, old, n, layers, calibration = SIZES[scale]
    sizes = {"n": n, "new_pieces": new, "old_pieces": old, "calibration": calibration}
    kinds = [(update, None, None) for update in bench.WITHOUT_RANK]
    for rank in ranks:
        kinds += [("truncated_svd", rank, None), ("data_aware_svd", rank, None)]
        kinds += [(update, rank, seed) for update, seed in bench.lora_seeds(rank)]
    losses = [{"what": "loss", "update": u, "rank": r, "seed": s} | sizes for u, r, s in kinds]
    names = [name for name in embedded_updates().full if int(name.split(".")[2]) in layers]
    matrices = [{"what": "matrix", "name": name, "ranks": list_text(ranks), "n": calibration} for name in names]
    return losses + matrices


def list_text(ranks: tuple[int, ...]) -> str:
    """Ranks as one scalar, as cells want it."""
    return " ".join(map(str, ranks))


def measure(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:  # noqa: ARG001 - nothing here is random
    """Losses of the pieces, or errors of the updates of one matrix."""
    if cell["what"] == "loss":
        return bench.loss_records(cell)
    ranks = [int(rank) for rank in cell["ranks"].split()]
    return list(bench.matrix_records(cell["name"], ranks, cell["n"], TEST_PIECES))


# -- figures and tables ------------------------------------------------------------------------------------------------


def figures(records: pd.DataFrame) -> list[partial[Figure]]:
    """Losses, norms, one against the other, subspaces, conditioning."""
    made = (losses_figure, norms_figure, trade_figure, subspaces_figure, conditioning_figure)
    return [partial(figure, records) for figure in made]


def losses_figure(records: pd.DataFrame) -> Figure:
    """Loss against rank on both domains."""
    pieces = findings.piecewise(records, "new").shape[0]
    return Figure(
        "losses",
        f"Held-out loss with an update of rank r in every matrix. Left: on the new domain ({pieces} pieces), above "
        "that of the full update. Right: on the old domain, above that of the base model. Bands: 95 % Student-t "
        "intervals of the difference, paired over pieces; LoRA is the mean of its seeds.",
        draw.draw_losses,
        findings.changes(records)[["domain", "update", "rank", "loss", *BAND]],
        panels=(1, 2),
    )


def norms_figure(records: pd.DataFrame) -> Figure:
    """Distances of single matrices."""
    return Figure(
        "norms",
        f"Relative distance from the full update, for each matrix by itself. {SPREAD} Grey: no update, and a second "
        "full fine-tuning, which differs from the first in its batches alone.",
        draw.draw_norms,
        findings.norms(records)[["norm", "update", "rank", *BAND]],
        panels=(1, 3),
    )


def trade_figure(records: pd.DataFrame) -> Figure:
    """Distance, gain and forgetting."""
    change = findings.changes(records)
    new, old = (change[change["domain"] == domain] for domain in ("new", "old"))
    data = new.merge(old[["update", "rank", "value"]].rename(columns={"value": "forgotten"}), on=["update", "rank"])
    return Figure(
        "trade",
        "Loss on the new domain against the distance from the full update (left) and against what is forgotten of "
        "the old domain (right). Each mark is an update, with its rank; intervals stand in the first figure.",
        draw.draw_trade,
        data[["update", "rank", "total_frobenius", "forgotten", *BAND]],
        panels=(1, 2),
    )


def subspaces_figure(records: pd.DataFrame) -> Figure:
    """Similarity of spaces."""
    return Figure(
        "subspaces",
        "Similarity φ of the column and row spaces of an update of rank r with the spaces of the r leading singular "
        "vectors of the full update (Hu et al. 2021, eq. 4, i = j = r), 1 where they agree; of the spaces that LoRA "
        f"finds from two seeds; and its mean r/d for random spaces, dashed. {SPREAD}",
        draw.draw_subspaces,
        findings.similarities(records)[["side", "update", "rank", *BAND]],
        panels=(1, 2),
    )


def conditioning_figure(records: pd.DataFrame) -> Figure:
    """Condition numbers of products and factors."""
    return Figure(
        "conditioning",
        "Condition number σ₁/σᵣ of the update and of its two factors: U Σ and V for the truncated SVD, the trained B "
        f"and A for LoRA. {SPREAD}",
        draw.draw_conditioning,
        findings.conditions(records)[["factor", "update", "rank", *BAND]],
        panels=(1, 3),
    )


def tables(records: pd.DataFrame) -> list[partial[Table]]:
    """Losses, costs of training, spaces, amplification."""
    return [partial(table, records) for table in (loss_table, cost_table, space_table, amplification_table)]


def loss_table(records: pd.DataFrame) -> Table:
    """Both domains side by side."""
    rows, change = [], findings.changes(records)
    new, old = (change[change["domain"] == d].set_index(["update", "rank"]) for d in ("new", "old"))
    order = {update: place for place, update in enumerate(bench.UPDATES)}
    for update, rank in sorted(new.index, key=lambda key: (order[key[0]], key[1])):
        here, there = new.loc[(update, rank)], old.loc[(update, rank)]
        rows.append(
            {
                "update": bench.UPDATES[update],
                "rank": rank or "",
                "norm": f"{here['total_size']:.3g}",
                "distance": f"{here['total_frobenius']:.3g}",
                "new: loss": f"{here['loss']:.3f}",
                "above the full update": interval(here),
                "old: loss": f"{there['loss']:.3f}",
                "above the base": interval(there),
            }
        )
    caption = (
        "Losses in nats per token on held-out text of both domains; norm of the update and its distance from the full "
        "one, in the Frobenius norm of all matrices together, relative to the norm of the full one; and differences of "
        "losses, paired over pieces, with 95 % intervals."
    )
    return Table("losses", caption, pd.DataFrame(rows))


def interval(row: pd.Series) -> str:
    """A difference with its interval."""
    return f"{row['value']:.3f} [{row['lower']:.3f}, {row['upper']:.3f}]"


def cost_table(_: pd.DataFrame) -> Table:
    """Costs beside those of the full fine-tuning."""
    found = findings.costs()
    full = found[found["rank"] == 0].iloc[0]
    rows = [
        {
            "training": "full" if row["rank"] == 0 else f"LoRA, r = {row['rank']:.0f}",
            "trained": f"{row['parameters']:,.0f} (1/{full['parameters'] / row['parameters']:.3g})",
            "memory, MB": f"{12 * row['parameters'] / 1e6:.3g}",
            "Mflop, matrices": f"{row['operations'] / 1e6:.3g} ({row['operations'] / full['operations']:.3f})",
            "Mflop, model": f"{row['whole'] / 1e6:.3g} ({row['whole'] / full['whole']:.3f})",
            "seconds": "{seconds_median:.3f} [{seconds_least:.3f}, {seconds_most:.3f}]".format(**row),
        }
        for row in found.to_dict("records")
    ]
    caption = (
        "One training step: trained numbers; memory for their gradients and Adam's two moments in float32; "
        "operations for a token in the adapted matrices (closed form) and in the whole model, attention and output "
        "matrix included; processor seconds of a step of 1024 tokens on one core, median, least and most of twelve, "
        "as recorded when the updates were made. In brackets: share of the full fine-tuning."
    )
    return Table("costs", caption, pd.DataFrame(rows))


def space_table(records: pd.DataFrame) -> Table:
    """Similarities and angles of the spaces of LoRA."""
    lora = findings.matrices(records)
    rows = []
    for rank, group in lora[lora["update"] == "lora"].groupby("rank"):
        row: dict[str, Any] = {"rank": rank}
        for side, words in (("left", "columns"), ("right", "rows")):
            row[f"{words}: φ"] = median_text(group, f"similarity_{side}")
            degrees = group.assign(angle=np.degrees(group[f"smallest_angle_{side}"].astype(float)))
            row[f"{words}: angle"] = median_text(degrees, "angle")
        rows.append(row | {"random φ": median_text(group, "random_left").split()[0]})
    caption = (
        "Column and row spaces of LoRA beside those of the leading singular vectors of the full update: similarity "
        "φ, that of random spaces in expectation, and the smallest principal angle in degrees. Medians over matrices "
        "and seeds."
    )
    return Table("spaces", caption, pd.DataFrame(rows))


def amplification_table(records: pd.DataFrame) -> Table:
    """Amplification factors by update and rank."""
    part = findings.matrices(records)
    rows = [
        {
            "update": "full" if update == "full" else "LoRA",
            "rank": rank,
            "amplification": median_text(group, "amplification"),
            "random directions": median_text(group, "amplification_random"),
            "directions of W": median_text(group, "amplification_own"),
            "‖Uᵀ W V‖ over random": median_text(group, "projection_over_random"),
        }
        for (update, rank), group in part[part["update"].isin(["full", "lora"])].groupby(["update", "rank"])
    ]
    caption = (
        "Amplification ‖ΔW‖_F/‖Uᵀ W V‖_F (Hu et al. 2021, Table 7) for the r leading singular directions U, V of the "
        "update, beside the same quotient for random directions (in expectation) and for the leading ones of W; "
        "medians over the matrices."
    )
    return Table("amplification", caption, pd.DataFrame(rows))


study = Study(
    name="lora_vs_svd",
    title="LoRA and the truncated SVD of a fine-tuning update",
    question="Does LoRA of rank r find what the best approximation of rank r keeps of the full update, and which of "
    "the two serves the model better, at what cost?",
    setup=(
        "The embedded language model was fine-tuned on docstrings of NumPy, SciPy and SymPy: once in full, all linear "
        "maps of its layers, and by LoRA of rank 1 to 16 on the same maps, by Adam on as many tokens and with a "
        "learning rate of its own, searched on validation text, from two seeds. Every update of rank r stands beside "
        "the truncated SVD of the full update (Eckart, Young and Mirsky: the nearest of that rank in both norms) and "
        "its data-aware truncation, which is nearest on the inputs of the matrix; all are added to the weights, and "
        "the model reads held-out text of the new domain and of the old."
    ),
    cells=cells,
    measure=measure,
    figures=figures,
    tables=tables,
    claims=findings.claims,
    references=(
        "E. J. Hu et al., LoRA: low-rank adaptation of large language models, 2021, arXiv 2106.09685.",
        "D. Kalajdzievski, A rank stabilization scaling factor for fine-tuning with LoRA, 2023, arXiv 2312.03732.",
        "X. Wang et al., SVD-LLM: truncation-aware singular value decomposition for large language model compression, "
        "2024, arXiv 2403.07378.",
        "D. Biderman et al., LoRA learns less and forgets less, 2024, arXiv 2405.09673.",
        "C. Eckart and G. Young, The approximation of one matrix by another of lower rank, Psychometrika 1, 1936.",
        "Y. Saad, The linear algebra of Large Language Models, survey talk, CIRM, 2024.",
    ),
    headline="default",
)
