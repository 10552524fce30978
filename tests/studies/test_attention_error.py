"""Cells of the study of attention errors on made-up heads: which have a kernel whose variance is known."""

import math

import pytest

from nla_llm.study import catalogue


@pytest.mark.parametrize(
    ("method", "directions", "known"),
    [
        ("uniform", None, False),
        ("elu_features", None, False),
        ("random_keys", None, False),
        ("positive_features", "iid", True),
        ("trigonometric_features", "orthogonal", True),
    ],
)
def test_the_kernel_of_random_features_alone_is_held_against_its_closed_form(method, directions, known):
    m = None if method in {"uniform", "elu_features"} else 8
    cell = {"input": "gaussian", "scale": 0.25, "n": 16, "draws": 2, "method": method, "m": m, "directions": directions}
    records = catalogue.load("attention_error").measure(cell, 0)
    assert len(records) == 6
    assert all(("kernel_theory" in record) == known for record in records)
    assert all(math.isfinite(record["relative_frobenius"].value) for record in records)
