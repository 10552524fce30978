"""A quantised matrix plus a low-rank correction: which form is closest to the matrix at equal bits, in which norm?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from nla_llm.study import Figure, Study, Table
from nla_llm.study.frames import succeeded

from . import _quantised as bench
from . import _quantised_claims as verdicts
from . import _quantised_figures as pictures
from ._quantised import RANK

SIZES: dict[str, dict[str, Any]] = {  # draws; ranks by format, for known spectra and for the model; turns; texts
    "small": {"draws": 3, "spectra": {"nf4": (16,)}, "model": {"nf4": (8,)}, "turns": 6, "pieces": 2},
    "default": {
        "draws": 5,
        "spectra": {"nf4": (4, 16, 64), "int4": (16,), "int8": (16,)},
        "model": {"nf4": (8, 32), "int3": (8, 32), "int4": (8,), "int8": (8,)},
        "turns": 10,
        "pieces": 6,
    },
    "full": {
        "draws": 20,
        "spectra": dict.fromkeys(("nf4", "int2", "int4", "int8"), (1, 2, 4, 8, 16, 32, 64)),
        "model": dict.fromkeys(("nf4", "int2", "int3", "int4", "int8"), (4, 8, 16, 32, 64)),
        "turns": 20,
        "pieces": 6,
    },
}
FORMATS = ("int2", "int3", "int4", "int5", "int6", "int7", "int8", "nf4", "nf4_double", "int4_affine")
FEW = ("int4", "int5", "nf4")  # of the small scale, where the model is concerned


def cells(scale: str) -> list[dict[str, Any]]:
    """Known spectra with and without corrections, the turns of LoftQ, and the matrices of the model."""
    size = SIZES[scale]
    draws = {"draws": size["draws"]}
    known: list[dict[str, Any]] = []
    for spectrum in bench.SPECTRA:
        known += [{"what": "alone", "spectrum": spectrum, **draws}]
        known += [{"what": "turns", "spectrum": spectrum, "form": "nf4", "rank": RANK, "turns": size["turns"], **draws}]
        known += [
            {"what": "spectrum", "spectrum": spectrum, "form": form, "rank": rank, **draws}
            for form, ranks in size["spectra"].items()
            for rank in ranks
        ]
    pairs = [(bench.ALONE, form, 0) for form in (FEW if scale == "small" else FORMATS)]
    pairs += [(label, f, rank) for f, ranks in size["model"].items() for rank in ranks for label in bench.METHODS]
    return known + [
        {"what": "model", "label": label, "form": form, "rank": rank, "pieces": size["pieces"]}
        for label, form, rank in pairs
    ]


def measure(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Records of one cell."""
    if cell["what"] == "alone":
        return bench.alone_records(cell, FORMATS, seed)
    if cell["what"] == "turns":
        return bench.turn_records(cell, seed)
    if cell["what"] == "spectrum":
        return bench.spectrum_records(cell, seed)
    return bench.model_records(cell)


def figures(records: pd.DataFrame) -> list[Figure]:
    """Ratios, errors at equal bits, turns of LoftQ, the matrices of the model and its loss."""
    loss = pictures.losses(records)
    ends = ["increase", "increase_lower", "increase_upper"]
    pieces = int(loss["pieces"].max())
    return [
        Figure(
            "errors",
            "Relative errors of 256 × 256 matrices of three spectra (columns) in three norms (rows) against the bits "
            "that are stored for an entry: NF4 in blocks of 64 with corrections of growing rank, whose factors take 16 "
            "bits, and in grey no correction but codes of more bits. Means over draws.",
            pictures.draw_errors,
            pictures.errors(records),
            size=(6.5, 6.4),
            panels=(3, 3),
        ),
        Figure(
            "ratios",
            "The ratio by which PiSSA is judged, for NF4 in blocks of 64: by how many per cent the nuclear norm of the "
            "error is below that of quantising alone; bands: 95 % Student-t intervals over draws. Dashed: what no "
            "correction of the plain Q(W) can exceed; LQER attains it, the others move Q.",
            pictures.draw_ratios,
            pictures.ratios(records),
            size=(6.5, 3.2),
            panels=(1, 3),
        ),
        Figure(
            "turns",
            f"LoftQ turn by turn (NF4, rank {RANK}): mean error over that of its first turn, in two norms, with 95 % "
            "intervals over draws. Nothing makes it fall for ever: the scale of a block is its largest modulus, "
            "whatever the error.",
            pictures.draw_turns,
            pictures.turns(records),
            size=(6.5, 2.9),
            panels=(1, 2),
        ),
        Figure(
            "model",
            "Median relative errors of the matrices of the embedded model against bits, with 95 % intervals over "
            "matrices: NF4 with corrections, and in grey no correction but codes of more bits. The output error is "
            "that on a text that no method has seen.",
            pictures.draw_model,
            pictures.model_errors(records),
            size=(6.5, 4.6),
            panels=(2, 2),
        ),
        Figure(
            "loss",
            f"Increase of the loss on {pieces} held-out texts of {bench.TOKENS} tokens when all matrices inside the "
            "layers are replaced, corrected in one format to a panel. Band: 95 % Student-t interval over texts for no "
            "correction; the other intervals are about as wide, and stand in the last table. Linear below 0.01.",
            pictures.draw_losses,
            loss[["label", "form", "rank", "bits", *ends]],
            size=(6.5, 3.6),
            panels=(1, len(pictures.corrected_formats(loss))),
        ),
    ]


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(records: pd.DataFrame) -> list[Table]:
    """Who is ahead in which norm, and what the model loses."""
    return [
        Table(
            "order",
            "QPiSSA (one turn) against LoftQ (5 turns) on the matrices of the model: share of them on which the error "
            "of QPiSSA is smaller, by norm.",
            order(records),
        ),
        Table(
            "spectra",
            f"Ratio of PiSSA in per cent at rank {RANK} on matrices of known spectra, means over draws with 95 % "
            "intervals. Published for LLaMA-2-7B at rank 128: QPiSSA 13.6 to 27.9 by kind of matrix, 19.4 on average, "
            "LoftQ 14.6 on average (Meng, Wang and Zhang 2024, Table 4).",
            spectra_table(records),
        ),
        Table(
            "model",
            "All matrices of the model replaced: bits for an entry; medians over matrices of the relative Frobenius "
            "error and of the output error on an unseen text, the latter also over the least that a correction of the "
            "plain Q(W) of this rank can have on that text; increase of the loss in nats per token.",
            model_table(records),
        ),
    ]


def order(records: pd.DataFrame) -> pd.DataFrame:
    """Shares of matrices on which QPiSSA is ahead of LoftQ."""
    rows = []
    for (form, rank), group in pictures.tensors(records).groupby(["form", "rank"], sort=False):
        pair = {label: group[group["label"] == label].set_index("tensor") for label in ("QPiSSA", "LoftQ")}
        if all(map(len, pair.values())):
            ahead = {
                pictures.WORDS[n]: f"{100 * np.mean(pair['QPiSSA'][n] < pair['LoftQ'][n]):.0f} %"
                for n in pictures.WORDS
            }
            rows.append({"format": form, "rank": rank, **ahead})
    return pd.DataFrame(rows).sort_values(["format", "rank"])


def spectra_table(records: pd.DataFrame) -> pd.DataFrame:
    """Ratios by format and spectrum at one rank, a column of estimates for each method."""
    rows = []
    known = succeeded(records, what="spectrum", rank=RANK)
    for (form, spectrum), group in known.groupby(["form", "spectrum"], sort=False):
        by_label, row = group.set_index("label"), {"format": form, "spectrum": spectrum}
        for label in bench.UNWEIGHTED:
            row |= {f"{label}{end}": by_label.loc[label, f"ratio{end}"] for end in ("", "_lower", "_upper")}
        rows.append(row)
    return pd.DataFrame(rows).sort_values(["format", "spectrum"], ascending=[False, False], kind="stable")


def model_table(records: pd.DataFrame) -> pd.DataFrame:
    """Errors and losses of the model, format by format."""
    single, rows = pictures.tensors(records), []
    for row in pictures.losses(records).sort_values(["form", "rank", "bits"]).to_dict("records"):
        mine = single[(single[["label", "form", "rank"]] == [row["label"], row["form"], row["rank"]]).all(axis=1)]
        rows.append(
            {
                "format": row["form"],
                "rank": f"{row['rank']:.0f}",
                "method": row["label"],
                "bits": f"{row['bits']:.2f}",
                "Frobenius": f"{mine['frobenius'].median():.4f}",
                "output": f"{mine['output'].median():.4f}",
                "over least": f"{mine['over_output'].median():.3f}",
                "loss": "{increase:.4f} [{increase_lower:.4f}, {increase_upper:.4f}]".format(**row),
            }
        )
    return pd.DataFrame(rows)


study = Study(
    name="quantised_updates",
    title="Quantised matrices with a low-rank correction",
    question="At equal bits, which form of a quantised matrix plus a low-rank correction is closest to the matrix, in "
    "which norm, and what does a model lose?",
    setup=(
        "A matrix W is replaced by Q + L: Q has codes of a few bits and a float32 scale for each block of 64 entries, "
        "L is a product of rank r whose factors take 16 bits (4 in CALDERA). LQER corrects Q(W) by the truncated "
        "singular value decomposition of the error, L²QER and QERA weigh it by the inputs; LoftQ and QPiSSA choose Q "
        "and L in turns, LoftQ ending with L, QPiSSA with Q; CALDERA quantises the factors as well. The yardsticks are "
        "no correction with codes of 2 to 8 bits, and for each Q(W) and rank the least error that a correction can "
        "have. Matrices are 256 × 256 of known spectra, and all those inside the layers of the embedded language "
        "model; the inputs that weigh are those on one held-out text, output errors are measured on another, losses on "
        "further ones."
    ),
    cells=cells,
    measure=measure,
    figures=figures,
    tables=tables,
    claims=verdicts.claims,
    references=(
        "T. Dettmers, A. Pagnoni, A. Holtzman and L. Zettlemoyer, QLoRA, arXiv 2305.14314, 2023.",
        "Y. Li et al., LoftQ, arXiv 2310.08659, 2023.",
        "F. Meng, Z. Wang and M. Zhang, PiSSA, arXiv 2404.02948, 2024.",
        "C. Zhang et al., LQER, arXiv 2402.02446, 2024; QERA, arXiv 2410.06040, 2024.",
        "R. Saha et al., CALDERA, arXiv 2405.18886, 2024.",
    ),
)
