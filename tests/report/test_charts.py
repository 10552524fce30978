"""Drawings that studies share: every method is a curve, a level or a point, in the colour of its family."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nla_llm.report import charts, style


@pytest.fixture
def data():
    """Two budgets of a method drawn two ways, and a yardstick that has no budget."""
    curves = [{"directions": kind, "m": m} for kind in ("iid", "orthogonal") for m in (4, 8)]
    levels = ("median", 0.1), ("lower", 0.05), ("upper", 0.2)
    rows = [{"method": "positive_features", **c, **{name: x * c["m"] for name, x in levels}} for c in curves]
    rows.append({"method": "uniform", "directions": None, "m": None, "median": 0.7, "lower": 0.6, "upper": 0.8})
    return pd.DataFrame(rows).assign(operations=lambda d: d["m"].fillna(2) * 100.0, exact_operations=1000)


def test_curves_and_levels(data):
    with style.figure_style():
        ax = Figure().subplots()
        charts.draw_curves(ax, data, "m")
    curves = {line.get_label(): line for line in ax.get_lines()}
    assert set(curves) == {"positive i.i.d.", "positive orthogonal", "uniform"}
    np.testing.assert_allclose(curves["positive orthogonal"].get_ydata(), [0.4, 0.8])
    np.testing.assert_allclose(curves["uniform"].get_xdata(), [4, 8])  # a level over all budgets
    np.testing.assert_allclose(curves["uniform"].get_ydata(), [0.7, 0.7])
    assert curves["positive i.i.d."].get_color() == style.FAMILIES["positive"] != curves["uniform"].get_color()


def test_labels_of_a_study_tell_curves_of_one_method_apart(data):
    part = data[data["directions"] == "iid"]
    both = pd.concat([part.assign(label="a"), part.assign(label="b")])
    with style.figure_style():
        ax = Figure().subplots()
        charts.draw_curves(ax, both, "m")
    assert [line.get_label() for line in ax.get_lines()] == ["a", "b"]


def test_against_cost_leaves_the_optimal_rank_out_and_marks_exact_attention(data):
    floor = data[data["directions"] == "iid"].assign(method="optimal_rank", directions=None)
    figure = Figure()
    with style.figure_style():
        charts.draw_against_cost(figure, pd.concat([data, floor]).assign(norm="Frobenius"))
    (ax,) = figure.axes
    assert "optimal rank" not in {line.get_label() for line in ax.get_lines()}
    assert any(list(line.get_xdata()) == [1000, 1000] for line in ax.get_lines())
    assert len(ax.get_xticks(minor=True)) < 12


def test_against_entropy_draws_every_head(data):
    heads = data.assign(entropy=0.5, value=data["median"])
    figure = Figure()
    with style.figure_style():
        charts.draw_against_entropy(figure, heads)
    points = sum(len(container.lines[0].get_xdata()) for container in figure.axes[0].containers)
    assert points == len(data)


def test_against_budget_has_a_panel_for_each_norm_or_kind(data):
    norms, kinds = Figure(), Figure()
    with style.figure_style():
        charts.draw_against_budget(norms, pd.concat([data.assign(norm=n) for n in ("Frobenius", "spectral")]))
        charts.draw_against_budget(kinds, pd.concat([data.assign(kind=k) for k in ("sharp", "flat")]))
    assert [ax.get_ylabel() for ax in norms.axes] == [f"relative {n} error of P" for n in ("Frobenius", "spectral")]
    assert [ax.get_title(loc="left") for ax in kinds.axes] == ["sharp heads", "flat heads"]
    assert [ax.get_ylabel() for ax in kinds.axes] == ["relative Frobenius error of P", ""]


def test_theory_is_dashed_in_the_colour_of_its_method(data):
    with style.figure_style():
        ax = Figure().subplots()
        charts.draw_theory(ax, data.assign(theory=data["m"]), "m")
    dashed = ax.get_lines()
    assert len(dashed) == 2  # the level has none
    assert {line.get_color() for line in dashed} == {style.FAMILIES["positive"]}
