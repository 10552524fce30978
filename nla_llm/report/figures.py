"""Figures of a study as vector drawings, and their data as CSV."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from . import style

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nla_llm.study.content import Figure

_log = logging.getLogger(__name__)

MAX_WIDTH = 6.5  # inches between the margins of the page
MAX_HEIGHT = 8.0  # inches that leave room for a caption


@dataclass(frozen=True)
class Drawn:
    """A figure as the report needs it: its drawing, or the sentence that says why there is none."""

    name: str
    caption: str
    csv: bytes
    has_intervals: bool
    svg: str = ""
    trouble: str = ""
    width: float = MAX_WIDTH
    aspect: float = 0.6  # height over width


def draw(figures: Iterable[Figure], families: Iterable[str] = (), *, first_only: bool = False) -> list[Drawn]:
    """Draw every figure; one that fails becomes a sentence, and the others are drawn all the same.

    With ``first_only`` drawing ends with the first that succeeds.
    """
    drawn: list[Drawn] = []
    with style.figure_style(families):
        for figure in figures:
            drawn.append(_draw(figure))
            if first_only and drawn[-1].svg:
                break
    return drawn


def _draw(figure: Figure) -> Drawn:
    data, has_intervals = with_error_bar_column(figure.data)
    csv = data.to_csv(index=False, lineterminator="\n").encode()
    aspect = float(figure.size[1] / figure.size[0])
    width = min(float(figure.size[0]), MAX_WIDTH, MAX_HEIGHT / aspect)
    svg, trouble = "", ""
    if figure.data.empty:
        trouble = "There is no data for this figure: no cell gave a result that it shows."
    else:
        try:
            svg = _svg(figure)
        except Exception as error:  # whatever a study's own code raises must not cost the other figures
            _log.warning("figure %s could not be drawn", figure.name, exc_info=True)
            trouble = f"This figure could not be drawn: {type(error).__name__}: {error}"
    return Drawn(figure.name, figure.caption, csv, has_intervals, svg, trouble, width, aspect)


def _svg(figure: Figure) -> str:
    canvas = Canvas(figsize=figure.size, layout="constrained")
    figure.draw(canvas, figure.data)
    if not canvas.axes:
        raise ValueError("its draw function made no axes")
    if not canvas.legends and all(ax.get_legend() is None for ax in canvas.axes):
        style.legend(canvas)
    buffer = io.StringIO()
    canvas.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def interval_columns(columns: Iterable[Any]) -> list[tuple[str, str]]:
    """Pairs of columns that hold the two ends of an interval.

    Examples
    --------
    >>> interval_columns(["m", "error", "error_lower", "error_upper", "lower"])
    [('error_lower', 'error_upper')]
    """
    names = [str(column) for column in columns]
    lowers = [name for name in names if name == "lower" or name.endswith("_lower")]
    pairs = [(name, name.removesuffix("lower") + "upper") for name in lowers]
    return [pair for pair in pairs if pair[1] in names]


def with_error_bar_column(data: pd.DataFrame) -> tuple[pd.DataFrame, bool]:
    """``data`` with a column that says of each row whether it has an interval, and whether any row has one.

    The column ``error_bar`` holds "interval", "exact" (both ends are equal) or "none".
    """
    if "error_bar" in data.columns:
        return data, bool((data["error_bar"] != "none").any())
    verdict = np.full(len(data), "none", dtype=object)
    for low, high in interval_columns(data.columns):
        lower = pd.to_numeric(data[low], errors="coerce").to_numpy(dtype=float)
        upper = pd.to_numeric(data[high], errors="coerce").to_numpy(dtype=float)
        exact = (lower == upper) & (verdict == "none")
        verdict[exact] = "exact"
        verdict[lower < upper] = "interval"
    return data.assign(error_bar=verdict), bool((verdict != "none").any())
