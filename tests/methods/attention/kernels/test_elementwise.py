"""Feature maps entry by entry against their dense definitions."""

import numpy as np
import pytest
from methods.attention.kernels.written_out import close, dense_attention, draw, mask

import nla_llm as nl
from nla_llm.methods.attention.kernels.elementwise import _elu_plus_one
from nla_llm.operators import ZeroRowSumError


def elu_plus_one(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def relu(x):
    return np.where(x > 0, x, 0)


FEATURE_MAPS = {"elu_features": elu_plus_one, "relu_features": relu}


@pytest.fixture(params=FEATURE_MAPS)
def name(request):
    return request.param


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 150])
def test_definition(name, n, causal, masked, xp):
    """ReLU kernels need positive coordinates in common: one coordinate is always positive."""
    q, k = draw(0, 2, n, 6), draw(1, 2, n, 6)
    q[..., 0], k[..., 0] = abs(q[..., 0]), abs(k[..., 0])
    key_mask = mask(n) if masked and n > 4 else None
    phi = FEATURE_MAPS[name]
    want = dense_attention(phi(q) @ np.swapaxes(phi(k), -1, -2), causal=causal, key_mask=key_mask)
    visible = None if key_mask is None else xp.asarray(key_mask)
    problem = nl.AttentionProblem(xp.asarray(q), xp.asarray(k), causal=causal, key_mask=visible)
    P = nl.method(name)(problem)
    close(P.dense(), want)
    close(P @ xp.asarray(draw(2, 2, n, 3)), want @ draw(2, 2, n, 3))
    close(P.T @ xp.asarray(draw(3, 2, n, 3)), np.swapaxes(want, -1, -2) @ draw(3, 2, n, 3))


@pytest.mark.parametrize("causal", [False, True])
def test_the_scale_of_the_logits_is_not_used(name, causal):
    q, k = abs(draw(0, 30, 4)), abs(draw(1, 30, 4))
    a = nl.method(name)(nl.AttentionProblem(q, k, causal=causal))
    b = nl.method(name)(nl.AttentionProblem(q, k, causal=causal, scale=7.0))
    np.testing.assert_array_equal(a.dense(), b.dense())


def test_elu_does_not_overflow():
    x = np.array([-1e4, -1.0, 0.0, 1.0, 1e4], dtype=np.float32)
    np.testing.assert_allclose(_elu_plus_one(x), [0, np.exp(-1), 1, 2, 10001], rtol=1e-6)


def test_a_query_without_a_common_coordinate_is_refused():
    q, k = np.array([[1.0, -1.0], [1.0, 1.0]]), np.array([[-1.0, 1.0], [-1.0, 2.0]])
    with pytest.raises(ZeroRowSumError, match=r"50\.00% of the rows"):
        nl.method("relu_features")(nl.AttentionProblem(q, k))


def test_rectangular():
    q, k = draw(0, 7, 3), draw(1, 11, 3)
    P = nl.method("elu_features")(nl.AttentionProblem(q, k))
    close(P.dense(), dense_attention(elu_plus_one(q) @ elu_plus_one(k).T))
