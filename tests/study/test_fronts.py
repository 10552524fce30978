"""Fronts of cost and error, against their definition."""

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from nla_llm.study.fronts import first_to_reach, pareto_front

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=30)


@given(POINTS)
def test_whatever_is_off_the_front_is_beaten_by_something_on_it(points):
    cost, error = np.array(points, dtype=float).T
    front = pareto_front(cost, error)
    assert front.any()
    for i, (x, y) in enumerate(points):
        better = (cost <= x) & (error <= y) & ((cost < x) | (error < y))
        assert front[i] == (not better.any())
        assert front[i] or (better & front).any()


def test_what_is_not_finite_is_never_on_the_front():
    assert pareto_front([1, 2, 3], [np.nan, np.inf, 1.0]).tolist() == [False, False, True]
    assert pareto_front([], []).tolist() == []


def test_the_cheapest_that_is_good_enough():
    table = pd.DataFrame({"label": list("abcd"), "share": [0.1, 0.4, 0.2, 0.3], "median": [0.9, 0.05, 0.1, np.nan]})
    assert first_to_reach(table, 0.1)["label"] == "c"
    assert first_to_reach(table, 0.06)["label"] == "b"
    assert first_to_reach(table, 0.01) is None
