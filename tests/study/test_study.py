import subprocess
import sys

import pandas as pd
import pytest

from nla_llm.study import Figure, Study, Table, catalogue


def make(**parts):
    given = {"cells": lambda scale: [{"n": 1}, {"n": 2}, {"n": 1}], "measure": lambda cell, seed: {}}
    return Study(**({"name": "made", "title": "t", "question": "q", "setup": "s"} | given | parts))


def test_the_grid_has_every_cell_once_with_the_name_of_the_study():
    assert make().grid() == [{"study": "made", "n": 1}, {"study": "made", "n": 2}]


def test_unknown_scales_are_refused():
    with pytest.raises(ValueError, match="scale must be one of"):
        make().grid("tiny")


@pytest.mark.parametrize("name", ["", "../up", "a b", "-dash", "a/b"])
def test_names_must_do_as_file_names(name):
    data = pd.DataFrame()
    for build in (lambda: make(name=name), lambda: Table(name, "c", data), lambda: Figure(name, "c", print, data)):
        with pytest.raises(ValueError, match="file name"):
            build()


def test_the_toy_study_draws_what_it_measured(toy):
    from matplotlib.figure import Figure as Canvas

    study = catalogue.load(toy)
    records = pd.DataFrame([study.measure(cell, 1) | cell for cell in study.grid("small")])
    (figure,), (table,) = study.figures(records), study.tables(records)
    canvas = Canvas(figsize=figure.size)
    figure.draw(canvas, figure.data.assign(mean=0.5))
    assert len(canvas.axes[0].lines[0].get_xdata()) == len(table.data) == 6


def test_the_floor_is_light_to_import():
    heavy = "pandas matplotlib sympy rich scipy pyarrow distributed"
    code = f"import sys, nla_llm.study; print([m for m in {heavy.split()!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603 - fixed
    assert done.stdout.strip() == "[]"
