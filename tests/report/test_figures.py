import numpy as np
import pandas as pd
import pytest

from nla_llm.report import figures, style
from nla_llm.study.content import Figure

DATA = pd.DataFrame({"x": [1.0, 2.0], "y": [1.0, 2.0]})


def _plain(figure, data):
    style.line(figure.subplots(), data.x, data.y, label="curve")


def test_drawing_is_vector_without_fonts_date_or_background():
    (drawn,) = figures.draw([Figure("a", "A.", _plain, DATA, (4, 2))])
    assert drawn.svg.startswith("<?xml")
    assert "<text" not in drawn.svg
    assert "<image" not in drawn.svg
    assert "<dc:date>" not in drawn.svg
    assert (drawn.trouble, drawn.width, drawn.aspect) == ("", 4.0, 0.5)


def test_drawing_is_reproducible():
    first, second = (figures.draw([Figure("a", "A.", _plain, DATA)])[0].svg for _ in range(2))
    assert first == second


def test_labelled_curves_get_a_legend():
    labelled, bare = figures.draw(
        [
            Figure("a", "A.", _plain, DATA),
            Figure("b", "B.", lambda f, d: style.line(f.subplots(), d.x, d.y), DATA),
        ]
    )
    assert 'id="legend_1"' in labelled.svg
    assert 'id="legend_1"' not in bare.svg


def test_drawings_fit_the_page():
    tall, wide = figures.draw([Figure("a", "", _plain, DATA, (6, 16)), Figure("b", "", _plain, DATA, (20, 4))])
    assert tall.width * tall.aspect <= figures.MAX_HEIGHT + 1e-12
    assert wide.width == figures.MAX_WIDTH


def test_only_the_first_that_can_be_drawn():
    bad = Figure("bad", "", lambda f, d: 1 / 0, DATA)
    drawn = figures.draw([bad, Figure("a", "", _plain, DATA), Figure("b", "", _plain, DATA)], first_only=True)
    assert [d.name for d in drawn] == ["bad", "a"]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"lower": [1, 1, np.nan], "upper": [2, 1, 3]}, ["interval", "exact", "none"]),
        ({"e_lower": [1, 1, None], "e_upper": [2, 1, None]}, ["interval", "exact", "none"]),
        (
            {"a_lower": [1, 1, 1], "a_upper": [1, 1, 1], "b_lower": [1, 2, 2], "b_upper": [2, 2, 1]},
            ["interval", "exact", "exact"],
        ),
        ({"e_lower": [1, 1, 1]}, ["none"] * 3),
        ({"error_bar": ["mine"] * 3}, ["mine"] * 3),
    ],
)
def test_error_bar_column(columns, expected):
    data, has_intervals = figures.with_error_bar_column(pd.DataFrame(columns))
    assert list(data["error_bar"]) == expected
    assert has_intervals == (set(expected) != {"none"})
