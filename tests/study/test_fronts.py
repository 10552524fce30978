"""Fronts of cost and error, against their definition."""

from math import comb

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

from nla_llm.study.fronts import first_to_reach, pareto_front, shares_of_firsts

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


def heads_of(errors, share):
    """Records of labels a, b, …: errors (labels, heads)."""
    rows = [
        (label, spent, head, e)
        for label, spent, row in zip("abc", share, errors, strict=False)
        for head, e in enumerate(row)
    ]
    return pd.DataFrame(rows, columns=["label", "share", "head", "error"]).assign(layer=np.nan, level=np.nan)


def test_a_method_that_is_first_on_every_head_is_first_for_sure():
    errors = [[0.05] * 8, [0.01] * 8, [0.2] * 8]
    assert shares_of_firsts(heads_of(errors, [0.3, 0.2, 0.1]), 0.1, column="error") == {"b": 1.0}
    assert shares_of_firsts(heads_of(errors, [0.3, 0.2, 0.1]), 0.001, column="error") == {"none": 1.0}
    assert shares_of_firsts(heads_of([], []), 0.1, column="error") == {"none": 1.0}


def test_the_share_is_that_of_a_binomial():
    """The cheap method reaches the error on three of five heads, and its median on most of five drawn ones."""
    errors = [[0.05] * 5, [0.0, 0.0, 0.0, 1.0, 1.0]]
    found = shares_of_firsts(heads_of(errors, [0.3, 0.2]), 0.1, column="error", resamples=4000)
    expected = sum(comb(5, k) * 0.6**k * 0.4 ** (5 - k) for k in (3, 4, 5))
    assert abs(found["b"] - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000)
    assert found["a"] + found["b"] == 1


def test_a_head_that_failed_reaches_nothing():
    records = heads_of([[0.05] * 4], [0.3]).iloc[:1]
    other = heads_of([[0.9] * 4], [0.5]).replace("a", "b")
    found = shares_of_firsts(pd.concat([records, other]), 0.1, column="error")
    assert found["none"] > 0.5


def test_of_equally_cheap_methods_the_nearest_is_first():
    records = heads_of([[0.05] * 4, [0.01] * 4], [0.3, 0.3])
    assert shares_of_firsts(records, 0.1, column="error") == {"b": 1.0}
    assert first_to_reach(records.rename(columns={"error": "median"}), 0.1)["label"] == "b"
