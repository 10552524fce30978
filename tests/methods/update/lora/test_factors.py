"""Scalings, condition numbers of the pair, angles to known subspaces."""

import numpy as np
import pytest

from nla_llm.backend import to_numpy
from nla_llm.linalg import haar_orthogonal
from nla_llm.methods.update.lora.factors import SCALINGS, Factors, largest_angle, pair_condition, product


def test_scalings():
    assert SCALINGS["standard"](8, 4) == 2
    assert SCALINGS["rank_stabilised"](8, 4) == 4


def test_product_is_the_scaled_product(xp):
    rng = np.random.default_rng(0)
    B, A = rng.standard_normal((2, 7, 3)), rng.standard_normal((2, 3, 5))
    op = product(Factors(xp.asarray(B), xp.asarray(A)), 0.25)
    np.testing.assert_allclose(to_numpy(op.dense()), 0.25 * B @ A, rtol=0, atol=1e-14)


def test_condition_of_a_product_with_known_singular_values():
    """B = U D₁ Q and A = Qᵀ D₂ Vᵀ: the product has the singular values of D₁ D₂, far from κ(A) κ(B)."""
    u, v, q = haar_orthogonal(30, 0, columns=3), haar_orthogonal(20, 1, columns=3), haar_orthogonal(3, 2)
    d_B, d_A = np.array([1.0, 1e-3, 1e-2]), np.array([1e-4, 1.0, 1e-1])
    pair = pair_condition(Factors(u * d_B @ q, q.T * d_A @ v.T))
    np.testing.assert_allclose(pair, [1e4, 1e3, 10], rtol=1e-8)  # the product has 1e-4, 1e-3 and 1e-3


def test_condition_of_a_zero_factor_is_infinite():
    pair = pair_condition(Factors(np.zeros((4, 2)), np.eye(2, 5)))
    assert (pair.A, pair.B, pair.product) == (1, np.inf, np.inf)


def test_condition_of_a_batch():
    B = np.stack([np.eye(4, 2), np.diag([3.0, 1.0, 1.0, 1.0])[:, :2]])
    np.testing.assert_allclose(pair_condition(Factors(B, np.stack([np.eye(2, 5)] * 2))).product, [1, 3])


def test_angles_against_turned_subspaces():
    turn = 1e-6
    left = np.eye(6)[:, :2]
    turned = left.copy()
    turned[:, 1] = np.cos(turn) * np.eye(6)[:, 1] + np.sin(turn) * np.eye(6)[:, 4]
    factors = Factors(turned @ np.array([[1.0, 2.0], [0.5, -1.0]]), np.eye(2, 5))
    found_left, found_right = largest_angle(factors, left, np.eye(5)[:, :2])
    assert found_left == pytest.approx(turn, rel=1e-6)
    assert found_right < 1e-14


def test_a_missing_direction_is_at_a_right_angle():
    factors = Factors(np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), np.eye(2, 4))
    angles = largest_angle(factors, np.eye(3)[:, :2], np.eye(4)[:, :2])
    assert angles == (np.pi / 2, np.pi / 2)
