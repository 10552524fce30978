"""Magnitude and direction: laws of the decomposition and its gradients."""

import numpy as np
import pytest

from nla_llm.backend import to_numpy
from nla_llm.methods.update.lora.dora import Decomposed, compose, decompose, dora_gradients, dora_weight
from nla_llm.methods.update.lora.factors import Factors

RNG = np.random.default_rng(0)
W = RNG.standard_normal((2, 5, 4))


@pytest.mark.parametrize("axis", [-1, -2])
def test_magnitude_times_direction_is_the_weight(axis, xp):
    parts = decompose(xp.asarray(W), axis)
    np.testing.assert_allclose(to_numpy(compose(parts)), W, rtol=0, atol=1e-15)
    np.testing.assert_allclose(np.linalg.norm(to_numpy(parts.direction), axis=axis), 1, rtol=1e-14)
    assert np.all(to_numpy(parts.magnitude) > 0)
    assert parts.magnitude.shape == ((2, 5, 1) if axis == -1 else (2, 1, 4))


def test_rows_of_the_transpose_are_columns():
    rows, columns = decompose(W, -1), decompose(np.swapaxes(W, -1, -2), -2)
    np.testing.assert_array_equal(rows.direction, np.swapaxes(columns.direction, -1, -2))


@pytest.mark.parametrize("axis", [-1, -2])
def test_the_start_is_the_weight_and_magnitudes_are_kept(axis):
    pair = Factors(RNG.standard_normal((2, 5, 2)), RNG.standard_normal((2, 2, 4)))
    magnitude = decompose(W, axis).magnitude
    start = dora_weight(W, Factors(0 * pair.B, pair.A), magnitude, axis=axis)
    np.testing.assert_allclose(start, W, rtol=0, atol=1e-15)
    trained = dora_weight(W, pair, magnitude, scale=3.0, axis=axis)
    np.testing.assert_allclose(decompose(trained, axis).magnitude, magnitude, rtol=1e-13)
    direction = decompose(W + 3.0 * pair.B @ pair.A, axis).direction
    np.testing.assert_allclose(decompose(trained, axis).direction, direction, rtol=0, atol=1e-14)


@pytest.mark.parametrize("axis", [-1, -2])
def test_gradients_by_central_differences(axis):
    V, target = W[0], RNG.standard_normal((5, 4))
    magnitude = RNG.uniform(0.5, 2.0, decompose(V, axis).magnitude.shape)

    def loss(m, v):
        return 0.5 * np.sum((compose(Decomposed(m, decompose(v, axis).direction)) - target) ** 2)

    g = dora_gradients(V, magnitude, magnitude * decompose(V, axis).direction - target, axis=axis)
    h = 1e-6
    for which, gradient in enumerate(g):
        move = RNG.standard_normal(gradient.shape)
        ends = [loss(magnitude + s * move * (which == 0), V + s * move * (which == 1)) for s in (h, -h)]
        assert np.sum(gradient * move) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)


def test_the_gradient_of_the_direction_is_perpendicular_to_it():
    g = dora_gradients(W, np.ones((2, 5, 1)), RNG.standard_normal(W.shape)).weight
    np.testing.assert_allclose(np.sum(g * W, axis=-1), 0, atol=1e-14)


def test_refusals():
    with pytest.raises(ValueError, match="a row of the weight is zero"):
        decompose(np.array([[1.0, 0.0], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="a column of the weight is zero"):
        decompose(np.array([[1.0, 0.0], [1.0, 0.0]]), -2)
    with pytest.raises(ValueError, match="axis must be -1"):
        decompose(W, 0)
