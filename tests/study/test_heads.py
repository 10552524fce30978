"""Methods compared over heads, against numbers worked out by hand."""

import pandas as pd
import pytest

from nla_llm.study.heads import closer_than_uniform, curves, heads_table, medians_by_norm


@pytest.fixture
def records():
    """Uniform attention and a method on three heads: surely closer, perhaps, and not."""
    rows = []
    for head, (low, value, high) in enumerate([(0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (0.7, 0.8, 0.9)]):
        where = {"layer": None, "head": head, "directions": None, "m": None, "relative_spectral": 1.0}
        level = {f"relative_frobenius{end}": 0.5 for end in ("", "_lower", "_upper")}
        rows.append({"method": "uniform", **where, "operations": 7, **level})
        error = {"relative_frobenius": value, "relative_frobenius_lower": low, "relative_frobenius_upper": high}
        rows.append({"method": "elu_features", **where, "operations": None, **error})
    return pd.DataFrame(rows)


def test_a_head_counts_surely_only_with_its_whole_interval(records):
    surely, possibly = closer_than_uniform(records, records[records["method"] == "elu_features"])
    assert (surely.tolist(), possibly.tolist()) == ([True, False, False], [True, True, False])


def test_without_uniform_attention_there_is_nothing_to_be_closer_than(records):
    part = records[records["method"] == "elu_features"]
    assert closer_than_uniform(part, part) is None
    assert "better than uniform" not in heads_table(part).columns


def test_a_row_for_each_curve_and_budget(records):
    table = heads_table(records, {"heads": lambda group: str(len(group))})
    assert table["method"].to_list() == ["uniform", "elu"]
    assert table["operations"].to_list() == [7, "unknown"]
    assert table["Frobenius"].to_list() == ["0.5 [0.5, 0.5]", "0.5 [0.2, 0.8]"]
    assert table["better than uniform"].to_list() == ["0 of 3", "1 of 3"]
    assert (table["m"].to_list(), table["heads"].to_list()) == (["", ""], ["3", "3"])


def test_labels_tell_curves_of_one_method_apart(records):
    assert [curve.label for curve in curves(records)] == ["uniform", "elu"]
    both = pd.concat([records.assign(label="a"), records.assign(label="b")])
    assert [curve.label for curve in curves(both)] == ["a", "a", "b", "b"]


def test_both_norms_one_below_the_other(records):
    found = medians_by_norm(records, ["method"])
    assert found["norm"].to_list() == ["Frobenius"] * 2 + ["spectral"] * 2
    assert found["median"].to_list() == [0.5, 0.5, 1.0, 1.0]
