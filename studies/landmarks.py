"""Landmarks and projections: how far should the core be inverted, and what do published bounds say that holds?"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nla_llm.backend import parallel
from nla_llm.problems import embedded
from nla_llm.study import Claim, Figure, Study, Table
from nla_llm.study.correlations import rank_correlation
from nla_llm.study.frames import standard_error, succeeded
from nla_llm.study.medians import median_claim, median_text, medians
from nla_llm.theory.projections import linformer_published_rank

from . import _landmark_figures as pictures
from . import _landmarks as bench

if TYPE_CHECKING:
    from collections.abc import Callable

SIZES = {  # tokens, landmarks of the iteration, budgets, numbers of steps, draws of a method and of a law
    "small": (96, 24, (12, 24), (0, 2, 6, 12), 6, 40),
    "default": (256, 64, (16, 32, 64, 128), (*range(9), 10, 12, 16, 20, 24), 6, 100),
    "full": (1024, 64, (16, 32, 64, 128, 256), (*range(13), 16, 20, 24, 28, 32), 12, 400),
}
LAW = (("Gaussian, scale 1", None), ("model", 3))
STANDARD_ERRORS = 4.0  # within which a law has to be met
XIONG = "Xiong et al. 2021, arXiv 2102.03902, section 3.2"
WANG = "Wang et al. 2020, arXiv 2006.04768, Theorem 1"


def cells(scale: str) -> list[dict[str, Any]]:
    """Inverses of the core, their filters, all methods at all budgets, laws of projections, and Skyformer."""
    n, m, budgets, steps, draws, many = SIZES[scale]
    layers = range(embedded.embedded_model().config.num_hidden_layers)
    places = [(kind, layer) for kind in bench.KINDS for layer in (layers if kind == "model" else (None,))]
    heads = [{"problem": kind, "layer": layer, "n": n} for kind, layer in places]
    cores = [("iteration", j) for j in steps] + [("ridge", j) for j in steps] + [("pinv", None)]
    found = [{"what": "core", "core": core, "iterations": j, "m": m, **h} for h in heads for core, j in cores]
    found += [{"what": "filter", "iterations": j, "m": m, **h} for h in heads for j in bench.FILTERS]
    found += [
        {"what": "errors", "label": label, "m": budget, "draws": draws, **h}
        for label in bench.METHODS
        for budget in ((None,) if label == "uniform" else (*budgets, n, 2 * n) if label in bench.BEYOND else budgets)
        for h in heads
    ]
    found += [{"what": "skyformer", "m": budget, "draws": draws, **h} for budget in budgets for h in heads]
    found += [
        {"what": "law", "m": budget, "draws": many, "problem": kind, "layer": layer, "n": n}
        for kind, layer in LAW
        for budget in (*budgets, n, 2 * n)
    ]
    published = linformer_published_rank(bench.COUNTER_N, bench.EPSILON)
    return found + [
        {"what": "counter", "method": method, "m": budget, "draws": many}
        for method in ("gaussian_projection", "random_keys")
        for budget in (25, 50, 100, published, bench.COUNTER_N - 1)
    ]


def measure(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """What the cell asks for."""
    how: dict[str, Callable[[dict[str, Any], int], list[dict[str, Any]]]] = {
        "core": bench.core,
        "filter": bench.filters,
        "errors": bench.errors,
        "skyformer": bench.skyformer,
        "law": bench.law,
        "counter": bench.counter,
    }
    return parallel(partial(how[cell["what"]], seed=seed), [cell])[0]  # many small products: BLAS in one thread


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(records: pd.DataFrame) -> list[Figure]:
    """The six figures."""
    cores, methods = succeeded(records, what="core"), succeeded(records, what="errors")
    n, m = int(cores["n"].iloc[0]), int(cores["m"].iloc[0])
    square: dict[str, Any] = {"panels": (2, 2)}
    captions = {
        "iterations": f"Error of Nyströmformer with {m} landmarks against the steps of its iteration (n = {n}, medians "
        "over heads with their intervals; the model's heads without their mask), beside the ridge (4/13)ʲ ‖A‖₁‖A‖_∞ "
        "that corresponds to j steps, and what the same budget buys without landmarks. The exact pseudo-inverse is "
        "dashed, its median written where it lies above the panel. Ridge and iteration part where few steps are taken: "
        "there the ridge is not small.",
        "filter": "Left: the share up to which j steps invert a singular value a of the core, measured on one head "
        "each (markers) and by theory (dashed); grey the filter a²/(a² + λ) of the ridge at 6 steps and the constant "
        "one of the pseudo-inverse. Right: where the singular values of the cores lie; above a line its steps "
        "invert more than half of a value.",
        "condition": "Left: error of Nyströmformer on every head and budget against the condition of its core, the "
        "best matrix of that rank and random keys on the same heads in grey. Right: the condition against the number "
        "of landmarks, medians with their intervals.",
        "methods": f"Relative Frobenius error against budget, n = {n}, medians over heads with their intervals.",
        "linformer": f"Left: heads of the model, n = {n}: PRᵀR follows √((n + 1)/m), dashed, and passes the zero "
        "matrix, whose error is one, only beyond m = n. Right: root mean square of |PRᵀRw − Pw| for P = 11ᵀ/n and a "
        "unit vector w orthogonal to 1, "
        f"n = {bench.COUNTER_N}; the published bound ε|Pw| is zero there, and uniform attention is exact.",
        "skyformer": "Skyformer against its own target, the Gaussian kernel, whose best matrix of rank m is the dark "
        "line, and against softmax, to which the target itself is no nearer than the dashed line.",
    }
    return [
        Figure(
            "iterations",
            captions["iterations"],
            pictures.draw_iterations,
            pictures.iterations(cores, methods),
            size=(6.5, 6.4),
            panels=(3, 4),
        ),
        Figure(
            "filter",
            captions["filter"],
            pictures.draw_filters,
            pictures.shares(succeeded(records, what="filter")),
            size=(6.5, 3.6),
            panels=(1, 2),
        ),
        Figure(
            "condition",
            captions["condition"],
            pictures.draw_condition,
            pictures.conditions(methods),
            size=(6.5, 3.6),
            panels=(1, 2),
        ),
        Figure(
            "methods", captions["methods"], pictures.draw_methods, pictures.budgets(methods), size=(6.5, 5.6), **square
        ),
        Figure(
            "linformer",
            captions["linformer"],
            pictures.draw_linformer,
            pictures.linformer(methods, succeeded(records, what="counter")),
            size=(6.5, 3.6),
            panels=(1, 2),
        ),
        Figure(
            "skyformer",
            captions["skyformer"],
            pictures.draw_skyformer,
            pictures.skyformer(succeeded(records, what="skyformer"), methods),
            size=(6.5, 5.2),
            **square,
        ),
    ]


def tables(records: pd.DataFrame) -> list[Table]:
    """The best number of steps for each kind of head; all methods at one budget."""
    cores = succeeded(records, what="core")
    m = int(cores["m"].iloc[0])
    methods = succeeded(records, what="errors")
    at = methods[(methods["m"] == m) | methods["m"].isna()]
    rows = [
        {
            "heads": kind,
            "method": label,
            "Frobenius": median_text(part, "relative_frobenius"),
            "spectral": median_text(part, "relative_spectral"),
            "output": median_text(part, "output_error"),
        }
        for (kind, label), part in at.groupby(["problem", "label"], sort=False)
    ]
    order = {kind: i for i, kind in enumerate(bench.KINDS)}
    caption = f"Relative errors at m = {m}: medians over heads with their intervals."
    return [
        Table(
            "steps",
            f"Relative Frobenius error with {m} landmarks: the number of steps with the least median, the error "
            "there, at six steps, with the ridge of six steps and with the pseudo-inverse.",
            pd.DataFrame([steps_row(kind, part) for kind, part in cores.groupby("problem", sort=False)]),
        ),
        Table("methods", caption, pd.DataFrame(sorted(rows, key=lambda row: order[row["heads"]]))),
    ]


def steps_row(kind: str, part: pd.DataFrame) -> dict[str, Any]:
    """Best number of steps of one kind of heads, and errors there and elsewhere."""
    middle = part[part["core"] == "iteration"].groupby("iterations")["relative_frobenius"].median()
    best = int(middle.idxmin())
    named = {"best": ("iteration", best), "six steps": ("iteration", 6), "ridge": ("ridge", 6), "pinv": ("pinv", None)}
    texts = {name: median_text(with_core(part, *which), "relative_frobenius") for name, which in named.items()}
    return {"heads": kind, "steps": best, **texts, "condition": median_text(part, "condition")}


def with_core(records: pd.DataFrame, core: str, iterations: int | None) -> pd.DataFrame:
    """Records of one way to invert the core."""
    found = records[records["core"] == core]
    return found if iterations is None else found[found["iterations"] == iterations]


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(records: pd.DataFrame) -> list[partial[list[Claim]]]:
    """What the records say."""
    return [
        partial(core_claims, succeeded(records, what="core"), succeeded(records, what="filter")),
        partial(condition_claims, succeeded(records, what="errors")),
        partial(projection_claims, succeeded(records, what="law"), succeeded(records, what="counter")),
        partial(method_claims, succeeded(records, what="errors"), succeeded(records, what="skyformer")),
    ]


def core_claims(cores: pd.DataFrame, filters: pd.DataFrame) -> list[Claim]:
    """The filter, the ridge that it resembles, and what more or fewer steps do."""
    deviation = float(filters["deviation"].max())
    model = cores[cores["problem"] == "model"]
    six, more = (with_core(model, "iteration", j) for j in (6, 12))
    away = medians(six.assign(all=0), ["all"], "inverse_error").iloc[0]
    near = paired(with_core(cores, "ridge", 6), with_core(cores, "iteration", 6))
    return [
        Claim.decide(
            "The share up to which j steps invert a singular value of the core is that of the theory, within 1e-10",
            deviation,
            deviation,
            1e-10,
            "<",
            number=f"largest deviation {deviation:.2g} over {filters['deviation'].count()} cores and numbers of steps",
        ),
        median_claim(
            "Six steps act like a ridge of (4/13)⁶ ‖A‖₁‖A‖_∞: in the median the errors differ by less than 5 %",
            np.abs(near - 1),
            0.05,
            "<",
            what="|ratio − 1|",
        ),
        Claim.decide(
            "Six steps come near the pseudo-inverse of the core on the model's heads: ‖Z₆ − A⁺‖ < 0.1 ‖A⁺‖",
            away["lower"],
            away["upper"],
            0.1,
            "<",
            number="median over heads of ‖Z₆ − A⁺‖/‖A⁺‖ {median:.6g} [{lower:.6g}, {upper:.6g}]".format(**away),
            expected="refuted",
            source=f"read into {XIONG}: six steps stand for the pseudo-inverse",
        ),
        median_claim(
            "The exact pseudo-inverse gives a smaller error than six steps on the model's heads",
            paired(with_core(model, "pinv", None), six),
            1.0,
            "<",
            what="error with the pseudo-inverse over that of six steps",
            expected="refuted",
            source=f"read into {XIONG}",
        ),
        median_claim(
            "Twelve steps give a larger error than six on the model's heads: the iteration is a regulariser",
            paired(more, six),
            1.0,
            ">",
            what="error of twelve steps over that of six",
        ),
    ]


def condition_claims(methods: pd.DataFrame) -> list[Claim]:
    """Whether the condition of the core tells the error."""
    found = []
    for label, sentence in (
        ("Nyströmformer, pinv", "With the pseudo-inverse, the error grows with the condition of the core"),
        ("Nyströmformer, 6 steps", "With six steps, the error does not grow with the condition of the core"),
    ):
        part = methods[(methods["label"] == label) & np.isfinite(methods["condition"])]
        e = rank_correlation(part["condition"], part["relative_frobenius"], groups=part["m"], resamples=1000)
        number = f"rank correlation over heads, within budgets {e}"
        found.append(
            Claim.decide(
                f"{sentence}, over all heads",
                float(e.lower),
                float(e.upper),
                0.0,
                "<" if "not" in sentence else ">",
                number=number,
            )
        )
    return found


def projection_claims(law: pd.DataFrame, counter: pd.DataFrame) -> list[Claim]:
    """The true law of Linformer's construction, and the published bound."""
    found = pd.concat([law, counter[counter["promised"].notna()]])
    worst = float((abs(found["square"] - found["promised"]) / standard_error(found, "square", found["draws"])).max())
    published = linformer_published_rank(bench.COUNTER_N, bench.EPSILON)
    row = counter[(counter["method"] == "gaussian_projection") & (counter["m"] == published)].iloc[0]
    share, draws = row["within"] / row["draws"], row["draws"]
    upper = min(1.0, share + 3.7 / draws)  # 97.5 % of Clopper and Pearson where none of the draws is within
    return [
        Claim.decide(
            "The mean square error of PRᵀR is ‖P‖_F²(n + 1)/m, and that of its product with w is "
            "(‖P‖_F²|w|² + |Pw|²)/m, within 4 standard errors",
            worst,
            worst,
            STANDARD_ERRORS,
            "<",
            number=f"largest deviation {worst:.2g} standard errors over {len(found)} heads and budgets",
        ),
        Claim.decide(
            f"With 5 log n/(ε² − ε³) = {published} directions |PRᵀRw − Pw| ≤ ε|Pw| holds in most draws, for P = 11ᵀ/n "
            f"and w orthogonal to 1, n = {bench.COUNTER_N}, ε = {bench.EPSILON}",
            share,
            upper,
            0.5,
            ">",
            number=f"in {row['within']:.0f} of {draws:.0f} draws; root mean square of the error "
            f"{row['square'] ** 0.5:.3g} |w|, ε|Pw| {bench.EPSILON * row['image']:.2g} |w|",
            expected="refuted",
            source=WANG,
        ),
    ]


def method_claims(methods: pd.DataFrame, sky: pd.DataFrame) -> list[Claim]:
    """Against doing nothing and against each other, at the largest budget that all share."""
    largest = methods.loc[methods["label"] == "optimal rank", "m"].max()
    at = methods[(methods["m"] == largest) | methods["m"].isna()]
    model, clusters = (dict(iter(at[at["problem"] == kind].groupby("label"))) for kind in ("model", "clusters"))
    skies = sky[(sky["problem"] == "model") & (sky["m"] == largest)].assign(relative_frobenius=lambda x: x.to_softmax)
    six = "Nyströmformer, 6 steps"
    rivals = {six: "Nyströmformer with six steps", "uniform": "uniform attention"}
    places = {id(model): f"on the model's heads, m = {largest:.0f}", id(clusters): f"on clusters, m = {largest:.0f}"}
    asked = (
        ("Nyströmformer with six steps", model[six], model, "uniform", "confirmed", ""),
        (
            "Linformer with Gaussian projections",
            model["Linformer, Gaussian"],
            model,
            "uniform",
            "refuted",
            f"read into {WANG}",
        ),
        ("Skyformer", skies, model, "uniform", "refuted", "read into Chen et al. 2021, arXiv 2111.00035"),
        ("CUR with the optimal core", model["CUR, optimal core"], model, six, "confirmed", ""),
        ("Randomly pivoted Cholesky", clusters["RPCholesky"], clusters, six, "confirmed", ""),
        ("Randomly pivoted Cholesky", model["RPCholesky"], model, six, "refuted", ""),
    )
    return [
        median_claim(
            f"{name} is nearer to softmax than {rivals[rival]}, {places[id(others)]}",
            paired(part, others[rival]),
            1.0,
            "<",
            what=f"error over that of {rivals[rival]}",
            expected=expected,
            source=source,
        )
        for name, part, others, rival, expected, source in asked
    ]


def paired(records: pd.DataFrame, rivals: pd.DataFrame, *, by: tuple[str, ...] = ()) -> pd.Series:
    """Ratios of the Frobenius errors on the same heads."""
    keys = ["problem", "layer", "head", *by]
    both = records.merge(rivals, on=keys, suffixes=("", "_rival"))
    return both["relative_frobenius"] / both["relative_frobenius_rival"]


study = Study(
    name="landmarks",
    title="Landmarks and projections along the sequence",
    question="How far should Nyströmformer invert its core, does the condition of the core tell the error, and what "
    "are the bounds of methods worth that replace tokens by a few combinations of them?",
    setup=(
        "Heads without a mask: independent Gaussian tokens of dimension 64 at two scales, tokens around eight centres, "
        "and all heads of the embedded model on held-out text, in float64. Nyströmformer's iteration is run for any "
        "number of steps and compared with its exact filter, with a ridge and with the pseudo-inverse. Projections "
        "are drawn many times against the exact mean of their square error."
    ),
    cells=cells,
    measure=measure,
    figures=figures,
    tables=tables,
    claims=claims,
    references=(
        "Y. Xiong et al., Nyströmformer, 2021, arXiv 2102.03902.",
        "S. Wang et al., Linformer, 2020, arXiv 2006.04768.",
        "Y. Chen, Q. Zeng, H. Ji and Y. Yang, Skyformer, 2021, arXiv 2111.00035.",
        "Y. Chen, E. Epperly, J. Tropp and R. Webber, Randomly pivoted Cholesky, 2022, arXiv 2207.06503.",
    ),
)
