"""No method forms n × n: memory grows with the number of tokens, not with its square. One check for each row."""

import tracemalloc
from dataclasses import replace
from math import isqrt

import numpy as np
import pytest

import nla_llm as nl

SHORT, LONG = 2500, 5000


def peak(method, n):
    """Most bytes held at any time while the operator is made and applied both ways, in float32."""
    q, k, v = (0.5 * np.random.default_rng(0).standard_normal((3, n, 8))).astype(np.float32)
    if method.name == "monarch":  # n (m + n/m) entries, so that its blocks have to grow as √n
        method = replace(method, m=isqrt(n))
    if method.properties.partial:
        q, k = np.abs(q), np.abs(k)
    problem = nl.AttentionProblem(q, k, v)
    tracemalloc.start()
    try:
        op = method(problem, rng=0)
        _ = op @ v, op.T @ v
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_square_of_the_length(row):
    """Twice the tokens, less than three times the memory: n² would take four times as much."""
    method = row.make()
    if method.properties.problem != "attention" or getattr(method, "length", None) or getattr(method, "stride", None):
        pytest.skip(
            "an update is given as a matrix; a fixed length, or a stride with a budget, is the largest it takes"
        )
    peak(method, 200)  # libraries that are loaded at the first call hold memory too
    assert peak(method, LONG) < 3 * peak(method, SHORT)
