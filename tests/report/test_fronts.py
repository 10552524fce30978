"""The map and the front as drawings: what is written and drawn is what the table says."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nla_llm.report import fronts, style


def table():
    rows = [
        ("uniform", "uniform", None, 0.01, 0.8),
        ("good", "positive_features", 0.25, 0.25, 0.1),
        ("bad", "elu_features", None, 1.5, 6.4),
        ("middle", "relu_features", 0.25, 0.2, 0.7),
    ]
    frame = pd.DataFrame(rows, columns=["label", "method", "level", "share", "median"])
    frame = frame.assign(lower=0.9 * frame["median"], upper=1.1 * frame["median"], oracle=False, norm="Frobenius")
    other = frame[frame["label"] != "bad"].assign(kind="flat heads", median=frame["median"] / 2)
    return pd.concat([frame.assign(kind="clusters"), other])


def draw(function, data):
    with style.figure_style():
        figure = Figure(figsize=(6, 3))
        function(figure, data)
    return figure


def test_the_map_writes_every_error_and_sorts_by_the_ratio_to_uniform():
    (ax,) = draw(fronts.draw_map, table()).axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["good", "middle", "uniform", "bad, at 1.5 × exact"]
    colours = np.asarray(ax.images[0].get_array())
    np.testing.assert_allclose(colours[:3, 0], np.log2([0.125, 0.875, 1.0]) / 3)  # three octaves take the last colour
    written = {tuple(map(round, text.get_position())): text.get_text() for text in ax.texts}
    assert written[0, 0] == ".1"
    assert written[0, 3] == "6.4"
    assert written[1, 3] == ""  # no number there


def test_the_front_names_the_methods_on_it():
    (ax,) = draw(fronts.draw_front, table()[table()["kind"] == "clusters"]).axes
    assert {text.get_text() for text in ax.texts} == {"middle", "good"}  # the other costs more than exact attention
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_the_front_is_drawn_where_uniform_attention_failed():
    data = table()
    (ax,) = draw(fronts.draw_front, data[(data["kind"] == "clusters") & (data["method"] != "uniform")]).axes
    assert {text.get_text() for text in ax.texts} == {"middle", "good"}
    assert "uniform" not in " ".join(line.get_label() for line in ax.lines)


def test_correlations_are_grey_where_zero_is_possible():
    rows = [("a", "entropy", 0.9, 0.8, 0.95), ("a", "rank", -0.2, -0.5, 0.1), ("b", "entropy", -0.7, -0.9, -0.2)]
    rows += [("b", "rank", 0.6, 0.3, 0.8)]
    data = pd.DataFrame(rows, columns=["label", "fact", "value", "lower", "upper"])
    (ax,) = draw(fronts.draw_correlations, data).axes
    colours = np.ma.filled(np.ma.asarray(ax.images[0].get_array(), dtype=float), np.nan)
    np.testing.assert_array_equal(colours, [[0.9, np.nan], [-0.7, 0.6]])
    assert [text.get_text() for text in ax.texts] == ["+0.90", "-0.20", "-0.70", "+0.60"]
