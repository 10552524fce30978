"""How every figure looks: one colour for a method or its family, theory dashed, yardsticks grey, intervals as bands.

A study draws with `line`, `theory_line` and `yardstick` inside `figure_style`, which the report opens for it.

The colours are those of Okabe and Ito (2008), continued by Paul Tol's muted scheme: both are made for readers with
colour vision deficiencies. Colour never stands alone: markers and line styles say the same in grey.
"""

from __future__ import annotations

import threading
import warnings
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.rcsetup import cycler
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from numpy.typing import ArrayLike, NDArray

INK = "#222222"
FAMILIES = {
    "exact": INK,
    "kernel": "#0072B2",
    "trigonometric": "#D55E00",
    "positive": "#009E73",
    "hyperbolic": "#CC79A7",
    "update": "#E69F00",
}
SPARE_COLOURS = ("#332288", "#56B4E9", "#882255", "#999933", "#AA4499", "#44AA99", "#661100", "#6699CC")

# Members of a family that is named otherwise than they are.
_MEMBERS = {"elu": "kernel", "relu": "kernel", "softmax": "exact", "truncated_svd": "update", "lora": "update"}

# variant: (line style, marker, filled); the dashes stay free for theory
_VARIANTS: dict[str, tuple[Any, str, bool]] = {
    "iid": ((0, (1.0, 1.2)), "o", False),
    "orthogonal": ("-", "s", True),
    "elu": ("-", "o", True),
    "relu": ((0, (1.0, 1.2)), "^", False),
}
_DEFAULT_VARIANT: tuple[Any, str, bool] = ("-", "o", True)

# yardstick: (grey, line style, marker)
YARDSTICKS: dict[str, tuple[str, Any, str]] = {
    "uniform": ("#7A7A7A", "-", "x"),
    "zero_update": ("#7A7A7A", "-", "x"),
    "random_keys": ("#A8A8A8", "-", "v"),
    "random_subspace": ("#A8A8A8", "-", "v"),
    "optimal_rank": ("#4A4A4A", "-", "D"),
}
_OTHER_YARDSTICK: tuple[str, Any, str] = ("#8C8C8C", "-", "+")

_DASHES = (0, (4.0, 2.0))

RC: dict[Any, Any] = {
    "axes.prop_cycle": cycler(color=SPARE_COLOURS),  # what is drawn without a family takes no family's colour
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.unicode_minus": True,
    "figure.constrained_layout.h_pad": 0.05,
    "figure.constrained_layout.w_pad": 0.06,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    # STIX is Times-like and goes with the Libertinus of the text; DejaVu fills in rare glyphs. Matplotlib ships both.
    "font.family": ["STIXGeneral", "DejaVu Serif", "DejaVu Sans"],
    "font.size": 9,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.5,
    "legend.borderaxespad": 0.2,
    "legend.columnspacing": 1.4,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.8,
    "lines.markeredgewidth": 0.9,
    "mathtext.fontset": "stix",
    "svg.fonttype": "path",  # outlines: a PDF needs no font from the machine it is read on
    "svg.hashsalt": "nla_llm",  # the same drawing gives the same bytes
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
}

_drawing = threading.RLock()  # matplotlib's settings are global: one drawing at a time


@dataclass
class Palette:
    """Colours of families: the known ones fixed, others the next free colour in order of appearance.

    Examples
    --------
    >>> palette = Palette()
    >>> palette.colour("positive_features") == palette.colour("positive") == FAMILIES["positive"]
    True
    >>> palette.colour("mine") == SPARE_COLOURS[0] == palette.colour("mine")
    True
    """

    others: dict[str, str] = field(default_factory=dict)

    def colour(self, family: str) -> str:
        """Colour of a family, or of the family to which a method of that name belongs."""
        name = family_of(family)
        if name in FAMILIES:
            return FAMILIES[name]
        if name not in self.others:
            self.others[name] = SPARE_COLOURS[len(self.others) % len(SPARE_COLOURS)]
        return self.others[name]


_palette: ContextVar[Palette] = ContextVar("palette")


def family_of(method: str) -> str:
    """Family of a method by its registered name; a name that no family claims is a family of its own.

    Examples
    --------
    >>> family_of("relu_features"), family_of("positive_features"), family_of("nystrom")
    ('kernel', 'positive', 'nystrom')
    """
    name = method.removesuffix("_features")
    return _MEMBERS.get(name, name)


def colour(family: str) -> str:
    """Colour of a family of methods, the same in all figures drawn under one `figure_style`."""
    palette = _palette.get(None)
    if palette is None:  # outside a style, as in a notebook: one palette per thread, made when it is first needed
        palette = Palette()
        _palette.set(palette)
    return palette.colour(family)


@contextmanager
def figure_style(families: Iterable[str] = ()) -> Iterator[Palette]:
    """Draw in the style of the reports; settings and colours are as before when it ends.

    Parameters
    ----------
    families : iterable of str
        Names for which colours are taken in this order, so that they do not depend on which is drawn first. A method
        of somebody else has no colour of its own; it gets the next free one.
    """
    palette = Palette()
    for family in families:
        if family not in YARDSTICKS:
            palette.colour(family)
    with _drawing, mpl.rc_context(RC), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)  # drawn as a box
        token = _palette.set(palette)
        try:
            yield palette
        finally:
            _palette.reset(token)


def line(  # noqa: PLR0917 - in the order in which a curve is told
    ax: Axes,
    x: ArrayLike,
    y: ArrayLike,
    lower: ArrayLike | None = None,
    upper: ArrayLike | None = None,
    family: str = "exact",
    label: str | None = None,
    *,
    variant: str | None = None,
    marker: str | None = None,
) -> Line2D:
    """Measured curve with its interval as a band; a lone point gets a bar.

    Parameters
    ----------
    ax : matplotlib.axes.Axes
    x, y, lower, upper : array_like (points,)
        Non-finite points are left out. Give ``lower`` and ``upper`` both, or neither.
    family : str
        Family or name of the method: it chooses the colour.
    label : str, optional
        What the legend says.
    variant : {"iid", "orthogonal", "elu", "relu"}, optional
        Member of the family: it chooses line style and marker.
    marker : str, optional
        Marker instead of that of the variant; ``""`` for none, as for a long spectrum.

    Raises
    ------
    ValueError
        If only one end of the interval is given, lengths differ or the variant is unknown.

    Examples
    --------
    >>> from matplotlib.figure import Figure
    >>> with figure_style():
    ...     ax = Figure().subplots()
    ...     curve = line(ax, [16, 32], [0.5, 0.4], [0.4, 0.3], [0.6, 0.5], "positive", "FAVOR+", variant="orthogonal")
    >>> curve.get_color() == FAMILIES["positive"]
    True
    """
    if variant is not None and variant not in _VARIANTS:
        raise ValueError(f"variant must be one of {sorted(_VARIANTS)} or None, got {variant!r}")
    short = family.removesuffix("_features")
    linestyle, sign, filled = _VARIANTS.get(variant or short, _DEFAULT_VARIANT)
    look = {"linestyle": linestyle, "marker": sign if marker is None else marker}
    look["markerfacecolor"] = None if filled else "white"
    return _curve(ax, x, y, lower, upper, colour=colour(family), label=label, look=look)


def yardstick(  # noqa: PLR0917 - as line
    ax: Axes,
    x: ArrayLike,
    y: ArrayLike,
    lower: ArrayLike | None = None,
    upper: ArrayLike | None = None,
    kind: str = "uniform",
    label: str | None = None,
    *,
    marker: str | None = None,
) -> Line2D:
    """Grey curve of a yardstick: one of `YARDSTICKS` or another name.

    Parameters are those of `line`; a scalar ``y`` is a level over all ``x``.
    """
    grey, linestyle, sign = YARDSTICKS.get(kind, _OTHER_YARDSTICK)
    name = kind.replace("_", " ") if label is None else label
    look = {"linestyle": linestyle, "marker": sign if marker is None else marker, "linewidth": 1.1, "zorder": 1.8}
    return _curve(ax, x, y, lower, upper, colour=grey, label=name, look=look)


def theory_line(
    ax: Axes, x: ArrayLike, y: ArrayLike, family: str | None = None, label: str | None = "theory"
) -> Line2D:
    """Dashed curve of a theorem or closed form, in the colour of its family, or in ink where it has none."""
    look = {"linestyle": _DASHES, "marker": "", "linewidth": 1.1, "zorder": 2.2}
    tint = INK if family is None else colour(family)
    return _curve(ax, x, y, None, None, colour=tint, label=label, look=look)


def _curve(
    ax: Axes,
    x: ArrayLike,
    y: ArrayLike,
    lower: ArrayLike | None,
    upper: ArrayLike | None,
    *,
    colour: str,
    label: str | None,
    look: dict[str, Any],
) -> Line2D:
    if (lower is None) != (upper is None):
        raise ValueError("an interval has two ends: give lower and upper both, or neither")
    xs, ys = _finite(x), _finite(y)
    ys = np.broadcast_to(ys, xs.shape) if ys.size == 1 else ys
    if xs.shape != ys.shape:
        raise ValueError(f"x and y must have as many points, got {xs.size} and {ys.size}")
    (curve,) = ax.plot(xs, ys, color=colour, label=label, **look)
    if lower is not None and upper is not None:
        low, high = (np.broadcast_to(_finite(end), ys.shape) for end in (lower, upper))
        _interval(ax, xs, ys, (low, high), colour)
    return curve


def _interval(ax: Axes, x: NDArray[Any], y: NDArray[Any], ends: tuple[NDArray[Any], NDArray[Any]], colour: str) -> None:
    lower, upper = ends
    known = np.isfinite(x + y + lower + upper)
    neighbours = np.concatenate([[False], known[:-1]]) | np.concatenate([known[1:], [False]])
    if (known & neighbours).any():
        ax.fill_between(x, lower, upper, where=known, color=colour, alpha=0.18, linewidth=0, zorder=1.5)
    alone = known & ~neighbours  # a band over one point has no width and would not be seen
    if alone.any():
        reach = np.abs(np.stack([y - lower, upper - y])[:, alone])
        ax.errorbar(x[alone], y[alone], reach, fmt="none", ecolor=colour, elinewidth=1.0, capsize=2.0, zorder=1.9)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.atleast_1d(np.array(values, dtype=np.float64)).ravel()
    array[~np.isfinite(array)] = np.nan  # a gap in the curve
    return array


def log_axes(ax: Axes, *, x: int | None = 10, y: int | None = 10) -> None:
    """Logarithmic axes of the given bases (None: leave that axis as it is); base 2 is labelled by plain integers."""
    for axis, base in ((ax.xaxis, x), (ax.yaxis, y)):
        if base is None:
            continue
        getattr(ax, f"set_{axis.axis_name}scale")("log", base=base)
        if base == 2:
            axis.set_major_locator(LogLocator(base=2, numticks=12))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(
                FuncFormatter(lambda value, _: f"{value:g}" if value < 1e5 else f"$2^{{{np.log2(value):.0f}}}$")
            )


def label(ax: Axes, x: str, y: str, title: str | None = None) -> None:
    """Names of the axes, and of the panel."""
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if title is not None:
        ax.set_title(title)


def legend(figure: Figure, *, where: Literal["below", "right"] = "below", columns: int | None = None) -> None:
    """One legend for all panels, outside of the data; a label that several curves share appears once.

    The report calls it for a figure that has labelled curves and no legend yet.
    """
    entries: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, text in zip(*ax.get_legend_handles_labels(), strict=True):
            entries.setdefault(text, handle)
    if not entries:
        return
    if where == "right":
        figure.legend(entries.values(), entries.keys(), loc="outside right center", ncols=columns or 1)
        return
    widest = max(len(text) for text in entries) + 10  # the handle and the gaps are about ten letters wide
    fits = int(figure.get_figwidth() * 18 / widest)  # about 18 letters to the inch at 8.5 points
    columns = columns or max(1, min(fits, len(entries)))
    columns = -(-len(entries) // -(-len(entries) // columns))  # rows of equal length
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns)
