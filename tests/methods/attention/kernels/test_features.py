"""Features that are made by rows against the same features made all at once; what is held beside the factors."""

import tracemalloc

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.methods.attention.kernels import linear_attention
from nla_llm.methods.attention.kernels.features import Features, MadeByRows
from nla_llm.methods.attention.kernels.linear_attention import kernel_attention

N, M = 300, 7


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def parts_of(seed, heads, *, spread):
    """Amplitudes, logs that grow along the tokens, and scales of rows; some features are zero for some tokens."""
    log = draw(seed, *heads, N, M) + spread * np.arange(N)[:, None]
    log[..., draw(seed + 1, N, M) > 1.5] = -np.inf
    log[..., 0] = draw(seed + 2, *heads, N)  # no row is left with nothing
    return {"amplitude": 2 + np.sin(draw(seed + 3, *heads, N, M)), "log": log, "row": draw(seed + 4, *heads, N, 1)}


def by_rows(parts, made):
    """The same features by rows; ``made`` keeps which rows were asked for."""

    def make(start, stop):
        made.append((start, stop))
        return Features(**{name: part[..., start:stop, :].copy() for name, part in parts.items()})

    return MadeByRows(parts["log"].shape, make)


@pytest.mark.parametrize("spread", [0.0, 15.0])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [((), ()), ((2,), (2,)), ((2, 1), (2, 3))])
def test_by_rows_is_the_same_as_all_at_once(monkeypatch, heads, causal, masked, spread):
    """Also where chunks have to be halved, since the features of the keys grow by e^15 from token to token."""
    monkeypatch.setattr(linear_attention, "_BLOCK_ENTRIES", 100 * M)
    queries, keys = parts_of(0, heads[1], spread=0.0), parts_of(10, heads[0], spread=spread)
    mask = (np.arange(N) % 5 != 2) if masked else None
    q, k = draw(20, *heads[1], N, 2), draw(21, *heads[0], N, 2)
    problem = nl.AttentionProblem(q, k, causal=causal, key_mask=mask)
    want = kernel_attention(problem, Features(**queries), Features(**keys), log_factor=0.3)
    made = []
    got = kernel_attention(problem, by_rows(queries, made), by_rows(keys, made), log_factor=0.3)
    assert max(stop - start for start, stop in made) < 150, "several blocks"
    if causal:
        assert got.op.chunk == want.op.chunk
        assert (want.op.chunk < 64) == (spread > 0)
    for mine, whole in ((got.op.left, want.op.left), (got.op.right, want.op.right)):
        np.testing.assert_array_equal(mine, whole)
    np.testing.assert_array_equal(got.row_scale_log, want.row_scale_log)
    np.testing.assert_array_equal(got.dense(), want.dense())
    np.testing.assert_array_equal(got.underflow_share, want.underflow_share)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("method", "features"),
    [
        (nl.method("hybrid_features", m=16, r=2), 6 * 2 * 16),
        (nl.method("hybrid_features", m=16, weight="gaussian"), 8 * 16),
        (nl.method("taylor_features", degree=2), 23 * 22 // 2),
    ],
    ids=str,
)
def test_nothing_else_of_the_size_of_the_factors_is_held(method, features, causal):
    n, d = 40000, 21
    q, k, v = (0.3 * draw(s, n, d) for s in range(3))
    problem = nl.AttentionProblem(q.astype(np.float32), k.astype(np.float32), causal=causal)
    method(nl.AttentionProblem(q[:50], k[:50], causal=causal), rng=0)  # what is loaded at the first call
    tracemalloc.start()
    try:
        _ = method(problem, rng=0) @ v.astype(np.float32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    factors = 2 * 4 * n * features
    blocks = 20e6  # of both threads, and what each token has besides
    assert factors < peak < 1.15 * factors + blocks
