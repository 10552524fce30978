"""What the records of the study of quantised matrices say."""

from __future__ import annotations

import numpy as np
import pandas as pd

from nla_llm.measures import Estimate
from nla_llm.study import Claim
from nla_llm.study.frames import succeeded
from nla_llm.study.medians import finding, median_interval, median_text

from . import _quantised as bench
from . import _quantised_figures as pictures
from ._quantised import RANK

MENG, LI, ZHANG = (
    "Meng, Wang and Zhang 2024, arXiv 2404.02948, Table 4",
    "Li et al. 2023, arXiv 2310.08659",
    "Zhang et al. 2024, arXiv 2410.06040",
)


def claims(records: pd.DataFrame) -> list[Claim]:
    """What the records say."""
    known = succeeded(records, what="spectrum", form="nf4", rank=RANK)
    return [
        *(lead_claim(known, spectrum) for spectrum in bench.SPECTRA),
        *model_order(records),
        floor_claim(records),
        gaussian_claim(records),
        monotone_claim(records),
        unseen_claim(records),
        *(spectrum_bits(known, succeeded(records, what="alone"), spectrum) for spectrum in bench.SPECTRA),
        *model_bits(records),
    ]


def lead_claim(known: pd.DataFrame, spectrum: str) -> Claim:
    """QPiSSA against LoftQ in the nuclear norm, on matrices of one spectrum."""
    part = known[known["spectrum"] == spectrum].set_index("label")
    low, high = (float(part.loc["QPiSSA", f"lead_{end}"]) for end in ("lower", "upper"))
    ratios = " and ".join(f"{label} {part.loc[label, 'ratio']:.1f}" for label in ("QPiSSA", "LoftQ"))
    sentence = f"QPiSSA has a larger ratio than LoftQ at rank {RANK} in NF4 where {spectrum}"
    if spectrum == "independent entries":
        sentence = f"QPiSSA has a larger ratio than LoftQ at rank {RANK} in NF4 on matrices of {spectrum}"
    expected = "refuted" if spectrum == "independent entries" else "confirmed"
    number = f"{ratios} per cent, lead {low:.1f} to {high:.1f}"
    return Claim.decide(sentence, low, high, 0.0, ">", number=number, expected=expected, source=MENG)  # type: ignore[arg-type]


def model_order(records: pd.DataFrame) -> list[Claim]:
    """The same comparison on the matrices of the model, in two norms and at every rank: whichever way it goes."""
    single, found = pictures.tensors(records), []
    single = single[single["form"] == "nf4"]
    for norm in ("nuclear", "spectral"):
        for rank in sorted(single.loc[single["label"] == "LoftQ", "rank"].unique()):
            here = single[single["rank"] == rank]
            loftq, qpissa = (here[here["label"] == x].set_index("tensor")[norm] for x in ("LoftQ", "QPiSSA"))
            quotient = pd.DataFrame({"quotient": loftq / qpissa})
            sentence = f"{{}} has the smaller {norm} error on the median matrix of the model at rank {rank:.0f} in NF4"
            ahead = f"QPiSSA ahead on {np.mean(quotient['quotient'] > 1):.0%} of {len(quotient)}"
            claim = finding(
                sentence.format("QPiSSA"),
                sentence.format("LoftQ"),
                *ends_of_median(quotient["quotient"]),
                1.0,
                number=f"LoftQ over QPiSSA {median_text(quotient, 'quotient')}, {ahead}",
            )
            found.append(claim)
    return found


def ends_of_median(values: pd.Series) -> tuple[float, float]:
    """Interval of the median over matrices."""
    ranked = np.sort(values.to_numpy(dtype=float))
    low, high = median_interval(len(ranked))
    return float(ranked[low]), float(ranked[high])


def floor_claim(records: pd.DataFrame) -> Claim:
    """LQER against Eckart–Young."""
    lqer = pictures.tensors(records)
    over = lqer.loc[lqer["label"] == "LQER", [f"over_{n}" for n in bench.NORMS]]
    gap = float((over - 1).abs().to_numpy().max())
    sentence = (
        "LQER attains the Eckart–Young optimum for its Q(W) in the nuclear, Frobenius and spectral norms to within "
        "0.1 %, its factors rounded to 16 bits, on every matrix of the model"
    )
    return Claim.decide(sentence, gap, gap, 1e-3, "<", number=f"largest relative gap {gap:.1e}", source="Mirsky 1960")


def gaussian_claim(records: pd.DataFrame) -> Claim:
    """Quantising independent normal entries against quadrature."""
    alone = succeeded(records, what="alone").dropna(subset=["promised"])
    relative = alone["frobenius"] / alone["promised"] - 1
    worst = float(relative.abs().max())
    sentence = "Quantising independent normal entries costs what quadrature says, within 2 %, in every format"
    number = f"largest relative deviation {worst:.1e} over {len(alone)} formats"
    return Claim.decide(sentence, worst, worst, 0.02, "<", number=number, source="derived")


def monotone_claim(records: pd.DataFrame) -> Claim:
    """Whether more turns of LoftQ are always better."""
    data = succeeded(records, what="turns")
    rises = data.groupby("spectrum", sort=False)["rises"].sum()
    number = ", ".join(f"{name}: {int(count)} rises" for name, count in rises.items())
    turns, draws = int(data["turns"].max()), int(data["draws"].max())
    verdict = "confirmed" if rises.sum() == 0 else "refuted"
    sentence = (
        f"The Frobenius error of LoftQ falls with every turn, in {draws} draws of {turns} turns for each spectrum"
    )
    expected = "refuted" if turns > 6 else verdict  # it rises late, if at all
    return Claim(sentence, verdict, number, expected=expected, source=LI)  # type: ignore[arg-type]


def unseen_claim(records: pd.DataFrame) -> Claim:
    """The exact solution of QERA on inputs that it has not seen, against the singular value decomposition."""
    single = pictures.tensors(records)
    keys = ["tensor", "form", "rank"]
    pair = [single[single["label"] == label].set_index(keys)["output"].sort_index() for label in ("QERA", "LQER")]
    # formats and ranks are no further matrices: each matrix counts once, or the interval would be too narrow
    quotient = pd.DataFrame({"quotient": (pair[0] / pair[1]).groupby("tensor").median()})
    low, high = ends_of_median(quotient["quotient"])
    sentence = "The correction of QERA has a smaller output error than that of LQER on a text that neither has seen"
    share = f"below one on {np.mean(quotient < 1):.0%} of {len(quotient)} matrices"
    number = f"median quotient {median_text(quotient, 'quotient')}, {share}"
    return Claim.decide(sentence, low, high, 1.0, "<", number=number, source=ZHANG)


def spectrum_bits(known: pd.DataFrame, alone: pd.DataFrame, spectrum: str) -> Claim:
    """NF4 with a correction of rank 16 against integers of 6 bits, both of 6.5 bits, on matrices of one spectrum."""
    part = known[(known["spectrum"] == spectrum) & known["label"].isin(bench.UNWEIGHTED)]
    best = part.loc[part["frobenius"].idxmin()]
    finer = alone[(alone["spectrum"] == spectrum) & (alone["form"] == "int6")].iloc[0]
    low = float(finer["frobenius_lower"] / best["frobenius_upper"])
    high = float(finer["frobenius_upper"] / best["frobenius_lower"])
    sides = f"{finer['bits']:.3g} bits: NF4 with rank {RANK} or integers of 6 bits alone"
    place = "independent entries" if spectrum == "independent entries" else f"spectrum {spectrum}"
    return finding(
        f"The correction is closer in the Frobenius norm for the same {sides}, {place}",
        f"The finer codes are closer in the Frobenius norm for the same {sides}, {place}",
        low,
        high,
        1.0,
        number=f"errors {best['frobenius']:.4f} ({best['label']}) and {finer['frobenius']:.4f}",
    )


def model_bits(records: pd.DataFrame) -> list[Claim]:
    """A correction of NF4 against one more bit in every code, on the model; the best correction is taken."""
    loss, single = pictures.losses(records), pictures.tensors(records)
    rank = loss.loc[(loss["form"] == "nf4") & (loss["label"] == "LoftQ"), "rank"].min()

    def chosen(data: pd.DataFrame) -> pd.DataFrame:
        return data[(data["form"] == "nf4") & (data["rank"] == rank) & (data["label"] != bench.ALONE)]

    def finer(data: pd.DataFrame) -> pd.DataFrame:
        return data[(data["label"] == bench.ALONE) & (data["form"] == "int5")]

    least = chosen(single).groupby("tensor")["frobenius"].min().sort_index()
    quotient = pd.DataFrame({"quotient": finer(single).set_index("tensor")["frobenius"].sort_index() / least})
    best, codes = chosen(loss).loc[chosen(loss)["increase"].idxmin()], finer(loss).iloc[0]
    names = [f"piece_{i}" for i in range(int(loss["pieces"].max()))]
    change = Estimate.from_samples((codes[names] - best[names]).to_numpy(dtype=float))
    most = chosen(loss)["bits"].max()
    sides = f"5-bit integers ({codes['bits']:.2f} bits) and NF4 with rank {rank:.0f} (up to {most:.2f} bits)"
    return [
        finding(
            f"Of {sides}, the correction is closer to the matrices of the model in the Frobenius norm",
            f"Of {sides}, the finer codes are closer to the matrices of the model in the Frobenius norm",
            *ends_of_median(quotient["quotient"]),
            1.0,
            number=f"median error of the finer codes over the best correction: {median_text(quotient, 'quotient')}",
        ),
        finding(
            f"Of {sides}, the correction costs the model less loss",
            f"Of {sides}, the finer codes cost the model no more loss",
            float(change.lower),
            float(change.upper),
            0.0,
            number=f"{codes['increase']:.4f} and {best['increase']:.4f} nats ({best['label']}), difference {change}",
        ),
    ]
