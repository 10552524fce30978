"""Softmax bounds on random and adversarial instances, and attained where they claim to be sharp."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nla_llm.theory import softmax as theory

logits = arrays(np.float64, st.integers(2, 8), elements=st.floats(-30, 30))


def softmax(x):
    w = np.exp(x - x.max(axis=-1, keepdims=True))
    return w / w.sum(axis=-1, keepdims=True)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(logits)
def test_jacobian_norms(x):
    p = softmax(x)
    J = np.diag(p) - np.outer(p, p)
    top = np.linalg.eigvalsh(J)[-1]
    lower, upper = theory.jacobian_spectral_bounds(p)
    assert lower - 1e-14 <= top <= upper + 1e-14
    assert upper <= 0.5
    np.testing.assert_allclose(theory.jacobian_infinity_norm(p), np.linalg.norm(J, np.inf), rtol=1e-12, atol=1e-15)


def test_jacobian_bound_is_attained_by_two_equal_probabilities():
    lower, upper = theory.jacobian_spectral_bounds([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    np.testing.assert_array_equal(lower, [0.5, 0.0])
    np.testing.assert_array_equal(upper, [0.5, 0.0])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_lipschitz_constant_holds_and_is_sharp(temperature):
    rng = np.random.default_rng(0)
    x = 3 * rng.standard_normal((2000, 2, 5))
    change = np.linalg.norm(softmax(x[:, 0] / temperature) - softmax(x[:, 1] / temperature), axis=-1)
    constant = theory.lipschitz_constant(temperature)
    assert np.all(change <= constant * np.linalg.norm(x[:, 0] - x[:, 1], axis=-1))
    h = 1e-5
    pair = np.array([[h, -h, -1e4], [-h, h, -1e4]])
    sharp = np.linalg.norm(np.diff(softmax(pair / temperature), axis=0)) / np.linalg.norm(np.diff(pair, axis=0))
    assert sharp == pytest.approx(constant, rel=1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 20))
def test_total_variation_bound(seed, width):
    rng = np.random.default_rng(seed)
    x, h = 5 * rng.standard_normal((2, 6))
    h = h * width / (h.max() - h.min())
    distance = np.abs(softmax(x) - softmax(x + h)).sum() / 2
    assert distance <= theory.total_variation_bound(width) * (1 + 1e-12)


def test_total_variation_bound_is_attained():
    for width in (0.1, 1.0, 5.0):
        x, h = np.array([0.0, width / 2]), np.array([width, 0.0])  # equal and opposite around one half
        assert np.abs(softmax(x) - softmax(x + h)).sum() / 2 == pytest.approx(
            theory.total_variation_bound(width), rel=1e-12
        )


def test_attention_perturbation():
    rng = np.random.default_rng(1)
    worst = 0.0
    for size in np.geomspace(1e-3, 10, 200):
        s, e, v = rng.standard_normal((5, 6)), size * rng.standard_normal((5, 6)), rng.standard_normal((6, 3))
        bound = theory.attention_perturbation_bound(np.linalg.norm(e), np.linalg.norm(v, 2))
        worst = max(worst, np.linalg.norm((softmax(s + e) - softmax(s)) @ v) / bound)
    assert 0.05 < worst <= 1
    # sharp for one row, two keys and values ±1
    e, v = np.array([[1e-6, -1e-6]]), np.array([[1.0], [-1.0]])
    change = np.linalg.norm((softmax(e) - softmax(0 * e)) @ v)
    assert change == pytest.approx(theory.attention_perturbation_bound(np.linalg.norm(e), np.sqrt(2)), rel=1e-6)


def recursive_sum(x):
    total = x.dtype.type(0)
    for value in x:
        total = x.dtype.type(total + value)
    return total


@pytest.mark.parametrize("n", [2, 16, 128])
@pytest.mark.parametrize("shifted", [False, True])
def test_rounding_bounds_in_single_precision(n, shifted):
    rng, u = np.random.default_rng(n), 2.0**-24
    worst = worst_lse = 0.0
    for _ in range(60):
        x = rng.uniform(-4, 4, n).astype(np.float32)
        y = x - x.max() if shifted else x
        w = np.exp(y.astype(np.float64)).astype(np.float32)  # an exponential rounded correctly
        total = recursive_sum(w)
        error = np.abs((w / total).astype(np.float64) / softmax(x.astype(np.float64)) - 1).max()
        bound = theory.softmax_rounding_bound(n, u, spread=float(x.max() - x.min()) if shifted else None)
        worst = max(worst, error / bound)
        exact = np.log(np.sum(np.exp(x.astype(np.float64))))
        rounded = float(np.float32(np.log(np.float64(total))))
        if not shifted:
            worst_lse = max(worst_lse, abs(rounded - exact) / theory.log_sum_exp_rounding_bound(exact, n, u))
    assert 0.005 < worst < 1
    assert worst_lse < 1


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_norms_of_row_stochastic_matrices(n_q, n_k, seed):
    p = softmax(4 * np.random.default_rng(seed).standard_normal((n_q, n_k)))
    lower, upper = theory.row_stochastic_spectral_bounds(p.sum(axis=0), n_q)
    assert lower * (1 - 1e-13) <= np.linalg.norm(p, 2) <= upper * (1 + 1e-13)
    assert upper <= np.sqrt(n_q) * (1 + 1e-13)
    lower, upper = theory.row_stochastic_frobenius_bounds(n_q, n_k)
    assert lower * (1 - 1e-13) <= np.linalg.norm(p) <= upper * (1 + 1e-13)


def test_norm_bounds_are_attained():
    n = 6
    shift = np.roll(np.eye(n), 1, axis=0)
    one_key = np.eye(n)[np.zeros(n, int)]
    assert theory.row_stochastic_spectral_bounds(shift.sum(0), n).upper == np.linalg.norm(shift, 2)
    assert theory.row_stochastic_spectral_bounds(one_key.sum(0), n).upper == pytest.approx(np.linalg.norm(one_key, 2))
    assert theory.row_stochastic_frobenius_bounds(n, n).lower == pytest.approx(np.linalg.norm(np.full((n, n), 1 / n)))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: theory.lipschitz_constant(0.0), "temperature must be positive"),
        (lambda: theory.jacobian_infinity_norm([0.5, 0.6]), "sum to one"),
        (lambda: theory.total_variation_bound(-1.0), "oscillation is max"),
        (lambda: theory.attention_perturbation_bound(-1.0, 1.0), "logit_error is a norm"),
        (lambda: theory.softmax_rounding_bound(0, 1e-8), "n must be"),
        (lambda: theory.softmax_rounding_bound(3, 2.0), "unit_roundoff must lie"),
        (lambda: theory.softmax_rounding_bound(3, 1e-8, spread=-1), "spread is max x"),
        (lambda: theory.row_stochastic_spectral_bounds([1.0, 2.0], 2), "must add up to n_q=2"),
    ],
)
def test_bad_input(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
