"""Leading triplets of a large matrix by block Lanczos."""

import numpy as np
import pytest

from nla_llm.linalg.lanczos import largest_cosines, leading_triplets


def prescribed(s, m, n, seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((k, len(s))))[0] for k in (m, n))
    return (u * s) @ v.T


@pytest.mark.parametrize("shape", [(300, 120), (120, 300), (120, 120)])
def test_a_prescribed_spectrum_is_found(shape):
    s = 2.0 ** -np.arange(40.0)
    a = prescribed(s, *shape)
    u, values, v = leading_triplets(a, 6, np.random.default_rng(1), rtol=1e-8, max_steps=30)
    assert np.allclose(values, s[:6], rtol=1e-10)
    for basis in (u, v):
        assert np.allclose(basis.T @ basis, np.eye(6), atol=1e-12)
    assert np.allclose(a @ v, u * values, atol=1e-12)


def test_values_are_lower_bounds_and_the_error_is_near_the_optimum():
    """On a slowly falling spectrum, in the few steps that are the default."""
    s = np.arange(1, 201) ** -0.5
    a = prescribed(s, 400, 200)
    u, values, v = leading_triplets(a, 16, np.random.default_rng(2))
    assert np.all(values <= s[:16] * (1 + 1e-12))
    assert np.linalg.norm(a - (u * values) @ v.T, 2) < 1.02 * s[16]


@pytest.mark.parametrize("true", [0, 1, 3])
def test_fewer_directions_than_asked_for(true):
    """The basis is filled up; nothing divides by zero."""
    a = prescribed(np.ones(true), 60, 50) if true else np.zeros((60, 50))
    u, values, v = leading_triplets(a, 5, np.random.default_rng(0))
    assert np.allclose(values[:true], 1)
    assert np.allclose(values[true:], 0, atol=1e-7)
    assert u.shape == (60, 5)
    assert np.allclose(v.T @ v, np.eye(5), atol=1e-10)


def test_float32_is_as_good_as_its_products():
    s = 2.0 ** -np.arange(30.0)
    a = prescribed(s, 90, 70).astype(np.float32)
    values = leading_triplets(a, 8, np.random.default_rng(0), rtol=1e-4, max_steps=20).values
    assert np.allclose(values, s[:8], rtol=2e-5)


def test_the_whole_order_may_be_asked_for():
    a = prescribed(np.arange(8, 0, -1.0), 9, 8)
    assert np.allclose(leading_triplets(a, 8, np.random.default_rng(0)).values, np.arange(8, 0, -1))
    with pytest.raises(ValueError, match="between 1 and 8"):
        leading_triplets(a, 9, np.random.default_rng(0))


@pytest.mark.parametrize("steps", [1, 3, 8, 20])
def test_the_largest_cosine_is_bounded(steps):
    """Against all singular vectors: mixed over the bulk, near two of them, and one of them."""
    rng = np.random.default_rng(5)
    a = rng.standard_normal((60, 80))
    u = np.linalg.svd(a)[0]
    mixed = u @ np.ones(60) / np.sqrt(60)
    vectors = np.stack([u[:, 0], mixed, 0.8 * u[:, 5] + 0.6 * u[:, 40], u[:, 30]], axis=1)
    true = np.abs(u.T @ vectors).max(axis=0)
    found = largest_cosines(a, vectors, steps=steps)
    assert np.all(found >= true * (1 - 1e-6))
    assert np.all(found <= 1)
    if steps == 20:
        assert found[1] < 0.6  # certainly an intruder
        assert found[2] < 0.95


def test_an_invariant_start_ends_the_steps():
    found = largest_cosines(np.diag([3.0, 2.0, 1.0]), np.array([[1.0, 0.6], [0.0, 0.8], [0.0, 0.0]]))
    assert np.allclose(found, [1.0, 0.8], atol=1e-6)
