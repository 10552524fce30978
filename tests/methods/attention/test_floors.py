"""Floors of methods: no draw falls below, in any structure; and they are no trifles where they can be had exactly."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods import Unsupported


def problems(n=60):
    q, k, v = 0.8 * np.random.default_rng(0).standard_normal((3, 2, n, 4))
    q[:, :, 0], k[:, :, 0] = abs(q[:, :, 0]), abs(k[:, :, 0])  # some share of positive coordinates for every pair
    hidden = np.arange(n) % 5 == 1
    yield nl.AttentionProblem(q, k, v)
    yield nl.AttentionProblem(q, k, v, causal=True)
    yield nl.AttentionProblem(q, k, v, key_mask=~hidden)
    yield nl.AttentionProblem(q[0], k[0], v[0])


def test_no_draw_falls_below(row):
    method = row.make()
    if method.properties.problem != "attention" or not hasattr(method, "theory"):
        pytest.skip("no theory of an attention method")
    for p in problems():
        try:
            draws = [method(p, rng=seed) for seed in range(3)]
        except Unsupported:
            continue
        promise = method.theory(p)
        if promise is None or promise.kind != "floor":
            continue
        exact, floor = p.exact().dense(), promise.error("frobenius")
        for op in draws:
            error = np.linalg.norm(to_numpy(op.dense()) - exact, axis=(-2, -1))
            assert np.all(error >= floor * (1 - 1e-9) - 1e-12)


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [("h_matrix", {"m": 4}, 0.02), ("eva", {"m": 6}, 0.1), ("monarch", {"m": 6}, 0.2), ("nystromformer", {"m": 4}, 0.3),
     ("linformer", {"m": 4, "projection": "mean"}, 0.3), ("bigbird", {"m": 9}, 0.1), ("reformer", {"m": 9}, 0.3),
     ("clustered_attention", {"m": 4}, 0.3)],
)  # fmt: skip
def test_the_share_of_the_error_that_no_choice_could_avoid(name, options, least):
    """Measured; a floor that were zero, or of another matrix, would show here."""
    p = next(iter(problems()))
    method = nl.method(name, **options)
    error = np.linalg.norm(to_numpy(method(p, rng=0).dense()) - p.exact().dense(), axis=(-2, -1))
    share = method.theory(p).error("frobenius") / error
    assert np.all((share > least) & (share <= 1)), share


def test_an_order_of_the_projection_is_that_of_one_head():
    several, _, _, single = problems()
    method = nl.method("h_matrix", m=4, order="projection")
    assert method.theory(several) is None
    assert method.theory(single).error("frobenius") > 0
