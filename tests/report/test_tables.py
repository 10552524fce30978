from types import SimpleNamespace

import numpy as np
import pandas as pd
import sympy

from nla_llm.report.tables import cell, typeset


def _texts(body):
    return [
        ["".join(run.get("text", "") for run in c["runs"]) if "runs" in c else c["math"] for c in row]
        for row in body["rows"]
    ]


def test_interval_columns_become_one_head():
    body = typeset(
        pd.DataFrame(
            {
                "m": [16, 32],
                "error": [0.5, 0.25],
                "error_lower": [0.45, 0.25],
                "error_upper": [0.55, 0.25],
                "error_confidence": [0.95, 1.0],
                "error_how": ["seeds", "exact"],
            }
        )
    )
    assert [(h.get("math") or h["runs"][0]["text"], h["span"]) for h in body["head"]] == [("m", 1), ("error", 2)]
    assert _texts(body) == [["16", "0.50", "[0.45, 0.55]"], ["32", "0.25", ""]]
    assert body["align"] == ["right", "right", "left"]


def test_missing_interval_is_said():
    body = typeset(pd.DataFrame({"value": [0.5, np.nan], "lower": [np.nan, np.nan], "upper": [np.nan, np.nan]}))
    assert _texts(body) == [["0.5", "[no interval]"], ["n/a", ""]]


def test_estimates_formulas_costs_and_odd_values():
    n = sympy.Symbol("n")
    estimate = SimpleNamespace(value=1.0, lower=0.5, upper=1.5, confidence=0.9, how="")
    cost = SimpleNamespace(prepare={}, apply={}, total=lambda: 2 * n)
    assert cell(2 * n) == cell(cost) == {"math": "2 n"}
    for value, printed in [
        (estimate, "1.0 [0.5, 1.5]"),
        (None, "n/a"),
        (np.True_, "yes"),
        (pd.NaT, "n/a"),
        (np.inf, "∞"),
        ("#x", "#x"),
    ]:
        assert cell(value) == {"runs": [{"text": printed}]}


def test_empty_frames():
    assert typeset(pd.DataFrame())["rows"] == []
    assert typeset(pd.DataFrame({"a": []}))["rows"] == []
