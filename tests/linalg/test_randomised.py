"""Range finders and one-pass sketches against prescribed spectra; the leave-one-out estimate is unbiased."""

import numpy as np
import pytest

from nla_llm.backend import to_numpy
from nla_llm.linalg import (
    generalised_nystrom,
    haar_orthogonal,
    least_squares,
    leave_one_out,
    randomised_svd,
    range_finder,
    triangular_factor,
)
from nla_llm.operators import Dense


def with_spectrum(values, rows, seed=0):
    n = len(values)
    u, v = haar_orthogonal(rows, seed)[:, :n], haar_orthogonal(n, seed + 1)
    return (u * values) @ v.T


def test_range_finder_captures_a_decaying_range(xp):
    values = 0.3 ** np.arange(40)
    matrix = with_spectrum(values, 50)
    q = to_numpy(range_finder(Dense(xp.asarray(matrix)), 8, rng=0, power_steps=2))
    assert np.linalg.norm(matrix - q @ (q.T @ matrix), 2) < 1.5 * values[8]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("wide", [False, True])
def test_randomised_svd_is_an_svd_in_the_precision_of_the_operator(dtype, wide, xp):
    values = np.r_[[8.0, 4.0, 2.0], np.full(27, 1e-3)]
    matrix = with_spectrum(values, 40).astype(dtype)
    op = Dense(xp.asarray(matrix.T if wide else matrix))
    svd = randomised_svd(op, 3, rng=0, oversampling=5, power_steps=1)
    assert svd.left.dtype == svd.right.dtype == op.dtype
    u, s, v = (to_numpy(a) for a in svd)
    tolerance = 50 * np.finfo(dtype).eps
    np.testing.assert_allclose(s, values[:3], rtol=1e-5)
    np.testing.assert_allclose(u.T @ u, np.eye(3), rtol=0, atol=tolerance)
    np.testing.assert_allclose(v.T @ v, np.eye(3), rtol=0, atol=tolerance)


def test_powers_keep_small_singular_values():
    """Twelve orders below the largest, where (AAᵀ)^q without orthonormalisation has nothing left."""
    values = 10.0 ** -np.arange(0, 20, 2.0)
    matrix = with_spectrum(values, 30)
    s = randomised_svd(Dense(matrix), 7, rng=0, oversampling=2, power_steps=4).values
    np.testing.assert_allclose(s, values[:7], rtol=1e-3)


def test_one_pass_is_the_generalised_nystrom_formula():
    """Q(ΨQ)⁺ΨA = AX (YᵀAX)⁺ YᵀA for the same sketches: a formula that shares no step with the code."""
    matrix = with_spectrum(0.7 ** np.arange(20), 25)
    left, right = generalised_nystrom(Dense(matrix), 4, 9, rng=3)
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((20, 4)), rng.standard_normal((25, 9))
    expected = matrix @ x @ np.linalg.pinv(y.T @ matrix @ x) @ y.T @ matrix
    np.testing.assert_allclose(left @ right.T, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(left.T @ left, np.eye(4), rtol=0, atol=1e-14)


def test_least_squares_against_numpy(xp):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 9, 4)), rng.standard_normal((2, 9, 3))
    got = to_numpy(least_squares(xp.asarray(a), xp.asarray(b)))
    for i in range(2):
        np.testing.assert_allclose(got[i], np.linalg.lstsq(a[i], b[i])[0], rtol=0, atol=1e-13)


def test_leave_one_out_by_its_definition(xp):
    """Distances of each column from the span of the others, by least squares."""
    y = np.random.default_rng(0).standard_normal((12, 5))
    distances = []
    for i in range(5):
        others = np.delete(y, i, axis=1)
        distances.append(np.sum((y[:, i] - others @ np.linalg.lstsq(others, y[:, i])[0]) ** 2))
    r = xp.asarray(np.linalg.qr(y)[1])
    np.testing.assert_allclose(float(leave_one_out(r)), np.mean(distances), rtol=1e-12)


def test_leave_one_out_is_unbiased():
    """Its mean is the mean squared error with one column less; both sampled, within four standard errors."""
    matrix, rng = with_spectrum(np.arange(1, 31) ** -1.0, 30), np.random.default_rng(0)
    estimates, errors = [], []
    for _ in range(400):
        estimates.append(float(leave_one_out(np.linalg.qr(matrix @ rng.standard_normal((30, 6)))[1])))
        q = np.linalg.qr(matrix @ rng.standard_normal((30, 5)))[0]
        errors.append(np.sum((matrix - q @ (q.T @ matrix)) ** 2))
    spread = np.hypot(np.std(estimates), np.std(errors)) / np.sqrt(400)
    assert abs(np.mean(estimates) - np.mean(errors)) < 4 * spread
    assert spread < 0.02 * np.mean(errors)


@pytest.mark.parametrize("columns", [0, 10])
def test_impossible_numbers_of_columns_are_refused(columns):
    with pytest.raises(ValueError, match="columns must be between 1 and 9"):
        range_finder(Dense(np.eye(9)), columns, rng=0)


def test_triangular_factor_of_a_stream(xp):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((50, 3)) @ rng.standard_normal((3, 7))).astype(np.float32)  # rank deficient
    pieces = (xp.asarray(x[i : i + 8]) for i in range(0, 50, 8))
    r = to_numpy(triangular_factor(pieces))
    assert r.shape == (7, 7)
    assert r.dtype == np.float64
    wide = x.astype(np.float64)
    np.testing.assert_allclose(r.T @ r, wide.T @ wide, rtol=0, atol=1e-12 * np.linalg.norm(wide) ** 2)
    short = to_numpy(triangular_factor([xp.asarray(x[:4])]))
    np.testing.assert_array_equal(short, wide[:4])


def test_an_empty_stream_is_refused():
    with pytest.raises(ValueError, match="blocks is empty"):
        triangular_factor([])
