"""Inverses of small matrices against NumPy's, and their independence of the rest of a batch."""

import numpy as np
import pytest

from nla_llm.backend import to_numpy
from nla_llm.linalg.inverses import iterated_inverse, norm_product, pseudo_inverse, ridge_inverse

EPS = np.finfo(np.float64).eps


def matrix(condition, m=7, batch=(), seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((*batch, m, m)))[0] for _ in range(2))
    return (u * np.geomspace(1, 1 / condition, m)) @ np.swapaxes(v, -1, -2)


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e6])
def test_pseudo_inverse_of_regular_matrices(condition, xp):
    a = matrix(condition, batch=(2,))
    got = to_numpy(pseudo_inverse(xp.asarray(a)))
    np.testing.assert_allclose(got @ a, np.broadcast_to(np.eye(7), (2, 7, 7)), rtol=0, atol=100 * EPS * condition)


def test_pseudo_inverse_of_a_singular_matrix_satisfies_the_four_conditions():
    a = matrix(10.0)[:, :4] @ matrix(10.0)[:4]
    z = pseudo_inverse(a)
    for got, want in ((a @ z @ a, a), (z @ a @ z, z), ((a @ z).T, a @ z), ((z @ a).T, z @ a)):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e4 * EPS)


def test_pseudo_inverse_of_a_wide_matrix_in_single_precision():
    a = matrix(10.0)[:3].astype(np.float32)
    z = pseudo_inverse(a)
    assert z.dtype == np.float32
    np.testing.assert_allclose(a @ z, np.eye(3), rtol=0, atol=1e3 * np.finfo(np.float32).eps)


def test_ridge_inverse_solves_the_normal_equations(xp):
    a, ridge = matrix(1e3, batch=(2,)), np.array([0.1, 0.3])[:, None, None]
    got = to_numpy(ridge_inverse(xp.asarray(a), xp.asarray(ridge)))
    at = np.swapaxes(a, -1, -2)
    np.testing.assert_allclose(got, np.linalg.solve(at @ a + ridge * np.eye(7), at), rtol=0, atol=1e3 * EPS)


def test_iteration_tends_to_the_inverse(xp):
    a = matrix(20.0, batch=(3,))
    got = to_numpy(iterated_inverse(xp.asarray(a), 20))
    np.testing.assert_allclose(got, np.linalg.inv(a), rtol=0, atol=1e4 * EPS)
    assert np.abs(iterated_inverse(a, 2) - np.linalg.inv(a)).max() > 0.1  # and has not arrived after two steps


def test_norms_are_of_each_matrix_alone():
    """A norm maximised over the batch would make the first Z of one head depend on the others."""
    a = matrix(5.0, batch=(2,))
    a[1] *= 1e3
    both = iterated_inverse(a, 3)
    np.testing.assert_array_equal(both[0], iterated_inverse(a[0], 3))
    want = [np.linalg.norm(x, 1) * np.linalg.norm(x, np.inf) for x in a]
    np.testing.assert_allclose(norm_product(a)[:, 0, 0], want, rtol=10 * EPS)


def test_iteration_from_the_identity():
    """For eigenvalues in (0, 1] the identity is a start."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))
    a = (q * np.linspace(0.2, 1, 5)) @ q.T
    got = iterated_inverse(a, 8, start=np.eye(5))
    np.testing.assert_allclose(got, np.linalg.inv(a), rtol=0, atol=1e3 * EPS)
