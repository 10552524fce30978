"""Losses: gradients against finite differences, the identity of inputs, draws of batches and noise."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.methods.update.lora.factors import Factors
from nla_llm.methods.update.lora.objectives import Regression, regression

RNG = np.random.default_rng(0)
DELTA, X = RNG.standard_normal((5, 4)), RNG.standard_normal((9, 4))
PAIR = Factors(RNG.standard_normal((5, 2)), RNG.standard_normal((2, 4)))


def value(kind, B, A, scale):
    error = scale * B @ A - DELTA
    return 0.5 * np.sum(error**2) if kind == "frobenius" else 0.5 * np.sum((X @ error.T) ** 2) / len(X)


@pytest.mark.parametrize("kind", ["frobenius", "data"])
def test_gradients_by_central_differences(kind):
    g = regression(nl.UpdateProblem(DELTA, inputs=X), kind, scale=0.7).gradients(PAIR)
    for which, gradient in enumerate(g):
        moved = RNG.standard_normal(gradient.shape)
        h = 1e-6
        ends = [
            value(kind, *(f + sign * h * moved if i == which else f for i, f in enumerate(PAIR)), 0.7)
            for sign in (1, -1)
        ]
        assert np.sum(gradient * moved) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-7)


def test_no_inputs_is_the_identity_as_inputs():
    without = regression(nl.UpdateProblem(DELTA), "frobenius")
    with_identity = Regression(np.eye(4), DELTA.T)
    for a, b in zip(without.gradients(PAIR), with_identity.gradients(PAIR), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)
    np.testing.assert_allclose(without.descent(), DELTA)


@pytest.mark.parametrize("kind", ["frobenius", "data"])
def test_a_shifted_loss_counts_from_the_start(kind):
    loss = regression(nl.UpdateProblem(DELTA, inputs=X), kind, scale=0.7)
    target = nl.UpdateProblem(DELTA + 0.7 * PAIR.B @ PAIR.A, inputs=X)
    np.testing.assert_allclose(loss.shifted(PAIR).y, regression(target, kind).y, rtol=0, atol=1e-13)


def test_descent_is_minus_the_gradient_of_a_full_update_at_none():
    loss = regression(nl.UpdateProblem(DELTA, inputs=X), "data")
    np.testing.assert_allclose(loss.descent(), DELTA @ X.T @ X / len(X), rtol=0, atol=1e-13)


def test_gradients_of_batches_and_noise_are_unbiased():
    loss = regression(nl.UpdateProblem(DELTA, inputs=X), "data", batch=3, noise=0.5)
    rng, draws = np.random.default_rng(1), 4000
    sample = np.array([loss.draw(rng).gradients(PAIR).B for _ in range(draws)])
    want = regression(nl.UpdateProblem(DELTA, inputs=X), "data").gradients(PAIR).B
    z = (sample.mean(0) - want) / (sample.std(0) / np.sqrt(draws))
    assert np.abs(z).max() < 4
    assert np.ptp(sample, axis=0).min() > 0.1  # they are random


def test_a_batch_is_drawn_without_replacement():
    loss = regression(nl.UpdateProblem(DELTA, inputs=X), "data", batch=9)
    drawn = loss.draw(np.random.default_rng(0))
    assert sorted(drawn.x[:, 0]) == sorted(X[:, 0])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("data", {}, "needs a problem with inputs"),
        ("frobenius", {"batch": 2}, "needs samples to draw from"),
        ("spectral", {}, "objective must be one of frobenius, data"),
    ],
)
def test_refusals(kind, options, message):
    with pytest.raises(ValueError, match=message):
        regression(nl.UpdateProblem(DELTA), kind, **options)


def test_a_batch_beyond_the_samples_is_refused():
    with pytest.raises(ValueError, match="batch=10 exceeds the 9 samples"):
        regression(nl.UpdateProblem(DELTA, inputs=X), "data", batch=10)
