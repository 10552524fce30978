"""Figure 4 of Choromanski et al. 2021, drawn again with the yardsticks that it lacks."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

import nla_llm as nl
from nla_llm.study import Claim
from nla_llm.study.measuring import operators, over_draws

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.figure import Figure as Canvas

DIM = 16
INPUTS = {"N(0, 1)": None, "|q| = |k| = 0.5": 0.5, "|q| = |k| = 1": 1.0}  # normalisations of Figure 4, after scaling
CURVES = (
    ("positive_features", "iid"),
    ("positive_features", "orthogonal"),
    ("trigonometric_features", "iid"),
    ("trigonometric_features", "orthogonal"),
)
SOURCE = "Choromanski et al. 2021, arXiv 2009.14794, Figure 4"


def cells(n: int, draws: int, features: Sequence[int]) -> list[dict[str, Any]]:
    """Curves and yardsticks on every normalisation of the inputs."""
    found = []
    for name in INPUTS:
        given = {"what": "figure 4", "n": n, "d": DIM, "draws": draws, "input": name}
        curves = [{"method": method, "directions": kind} for method, kind in CURVES]
        curves += [{"method": "random_keys"}, {"method": "optimal_rank"}]
        found += [{**given, **curve, "m": m} for curve in curves for m in features]
        found.append({**given, "method": "uniform"})
    return found


def measure(cell: dict[str, Any], seed: int) -> dict[str, Any]:
    """Mean square error of the output, over all entries, as a median over draws."""
    norm = INPUTS[cell["input"]]
    rng = np.random.default_rng(cell["n"])
    q, k, v = rng.standard_normal((3, cell["n"], cell["d"]))
    if norm is not None:  # after multiplication by d^(-1/4)
        q, k = (norm * cell["d"] ** 0.25 * a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    p = nl.AttentionProblem(q, k, v)
    exact = p.exact() @ v
    method = nl.method(cell["method"], **{name: cell[name] for name in ("m", "directions") if name in cell})
    made = operators(p, method, draws=cell["draws"], seed=seed)
    errors = [nl.measures.Estimate.exact(np.mean((op @ v - exact) ** 2), "mean over entries") for op in made]
    return {"error": over_draws(errors)}


def draw(fig: Canvas, data: pd.DataFrame) -> None:
    """Performer's Figure 4 between the yardsticks, a panel for each normalisation of the inputs."""
    from nla_llm.report import charts, style  # noqa: PLC0415

    panels = list(data.groupby("input", sort=False))
    for ax, (name, part) in zip(fig.subplots(1, len(panels)), panels, strict=True):
        charts.draw_curves(ax, part, "m")
        style.log_axes(ax, x=2)
        style.label(ax, "m", "mean square error of the output" if name == panels[0][0] else "", name)


def data(ok: pd.DataFrame) -> pd.DataFrame:
    """Curves of the figure, as its drawing wants them."""
    names = {"error": "median", "error_lower": "lower", "error_upper": "upper"}
    part = ok[ok["what"] == "figure 4"].rename(columns=names)
    if "directions" not in part.columns:
        part = part.assign(directions=None)
    return part[["input", "method", "directions", "m", *names.values()]]


def claims(ok: pd.DataFrame) -> list[partial[Claim]]:
    """What the published figure says, on each normalisation of the inputs at the largest number of features."""
    found = data(ok)
    return [claim for name in INPUTS for claim in _claims(found[found["input"] == name], name)]


def _claims(part: pd.DataFrame, name: str) -> list[partial[Claim]]:
    largest, small = part["m"].max(), INPUTS[name] is not None

    def row(method: str, directions: str | None = None) -> pd.Series:
        kind = part["directions"].isna() if directions is None else part["directions"].eq(directions)
        size = part["m"].isna() if method == "uniform" else part["m"].eq(largest)
        return part[part["method"].eq(method) & kind & size].iloc[0]

    def smaller_error(sentence: str, of: tuple[str, ...], than: tuple[str, ...], expected: Any) -> Claim:
        a, b = row(*of), row(*than)
        low, high = float(a["lower"] / b["upper"]), float(a["upper"] / b["lower"])
        number = f"ratio of the medians {a['median'] / b['median']:.3g}, {low:.3g} to {high:.3g}"
        sentence = f"{sentence} ({name}, m = {largest:.0f})"
        return Claim.decide(sentence, low, high, 1.0, "<", number=number, expected=expected, source=SOURCE)

    positive, orthogonal = (("positive_features", kind) for kind in ("iid", "orthogonal"))
    waves, mean = ("trigonometric_features", "iid"), ("uniform",)
    usual, doubtful = ("refuted", "confirmed") if small else ("confirmed", "refuted")
    asked = (
        ("Positive features have a smaller output error than trigonometric ones", positive, waves, usual),
        ("Orthogonal directions lower the output error of positive features", orthogonal, positive, "confirmed"),
        ("Positive features have a smaller output error than the mean of v", positive, mean, doubtful),
    )
    return [partial(smaller_error, *question) for question in asked]
