import threading
import warnings

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from nla_llm.report import style

X = np.array([16, 32, 64, 128])


@pytest.fixture
def ax():
    with style.figure_style():
        yield Figure(layout="constrained").subplots()


def _luminance(colour):
    channels = np.array(mpl.colors.to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_one_colour_for_a_family_in_all_figures():
    with style.figure_style(["zeta", "positive_features", "uniform", "alpha"]) as first:
        colours = {name: style.colour(name) for name in ("alpha", "zeta", "positive", "elu_features", "relu_features")}
    assert colours["elu_features"] == colours["relu_features"]
    assert len(set(colours.values())) == 4
    assert first.others == {"zeta": style.SPARE_COLOURS[0], "alpha": style.SPARE_COLOURS[1]}
    with style.figure_style(["zeta", "alpha"]):
        assert style.colour("alpha") == colours["alpha"]


def test_colours_differ_and_stand_out_from_paper():
    colours = [*style.FAMILIES.values(), *style.SPARE_COLOURS]
    assert len(set(colours)) == len(colours)
    assert all((1.05) / (_luminance(colour) + 0.05) > 2 for colour in colours)  # contrast with white


def test_yardsticks_are_grey_and_theory_is_dashed(ax):
    for kind in (*style.YARDSTICKS, "other"):
        red, green, blue = mpl.colors.to_rgb(style.yardstick(ax, X, 0.5, kind=kind).get_color())
        assert red == green == blue
    theory = style.theory_line(ax, X, 1 / X, "positive")
    measured = [style.line(ax, X, 1 / X, family="positive", variant=name) for name in ("iid", "orthogonal")]
    assert theory.is_dashed()
    assert theory.get_linestyle() == "--"
    assert {line.get_color() for line in (*measured, theory)} == {style.FAMILIES["positive"]}
    assert measured[0].get_marker() != measured[1].get_marker()


def test_interval_is_drawn_as_band_or_bar(ax):
    style.line(ax, X, 1 / X, 0.5 / X, 2 / X, "positive")
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    assert corners[:, 1].max() == 2 / X[0]
    assert corners[:, 1].min() == 0.5 / X[-1]
    style.line(ax, [200], [1.0], [0.5], [3.0], "kernel")
    (bar,) = ax.collections[1].get_segments()
    np.testing.assert_allclose(bar[:, 1], [0.5, 3.0])


def test_points_that_are_not_finite_leave_a_gap(ax):
    line = style.line(ax, X, [1, np.nan, np.inf, 2], [1, 1, 1, 1], [2, 2, 2, np.inf])
    assert np.isfinite(line.get_ydata()).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda ax: style.line(ax, X, X, lower=X), "two ends"),
        (lambda ax: style.line(ax, X, X[:2]), "as many points"),
        (lambda ax: style.line(ax, X, X, variant="odd"), "variant must be"),
    ],
)
def test_bad_input_gets_a_sentence(ax, call, words):
    with pytest.raises(ValueError, match=words):
        call(ax)


def test_legend_lies_outside_of_the_data_and_inside_of_the_figure():
    with style.figure_style():
        figure = Figure((6.5, 3.7), layout="constrained")
        axes = figure.subplots(1, 2)
        for ax in axes:
            for number in range(9):
                style.line(ax, X, X * number, family=f"family {number}", label=f"a rather long name, number {number}")
            style.label(ax, "x", "y", "title")
        style.legend(figure)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent()
        assert len(legend.get_texts()) == 9
        assert all(not box.overlaps(ax.get_window_extent()) for ax in axes)
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert figure.bbox.y0 <= box.y0


def test_axes_of_base_two_show_plain_integers(ax):
    style.line(ax, X, 1 / X)
    style.log_axes(ax, x=2)
    ax.figure.draw_without_rendering()
    assert [t.get_text() for t in ax.get_xticklabels()][1:-1] == ["16", "32", "64", "128"]
    assert ax.get_yscale() == "log"


def test_settings_are_as_before_afterwards():
    before = dict(mpl.rcParams)
    with style.figure_style():
        assert mpl.rcParams["svg.fonttype"] == "path"
    assert dict(mpl.rcParams) == before


def test_threads_draw_without_warning():
    failures = []

    def draw(number):
        try:
            with style.figure_style([f"own {number}"]):
                style.line(Figure().subplots(), X, X, family=f"own {number}")
                assert style.colour(f"own {number}") == style.SPARE_COLOURS[0]
        except Exception as error:
            failures.append(error)

    with warnings.catch_warnings(record=True) as caught:
        threads = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert not caught
