"""Failure probabilities and variances against simulation, and against exact moments by enumeration of signs."""

from itertools import product

import numpy as np
import pytest

from nla_llm.theory import certificates

DIAGONALS = {
    "decay": np.arange(1, 61) ** -1.0,
    "gap": np.r_[1.0, np.full(59, 0.9)],
    "flat end": np.linspace(1, 0, 60) ** 0.25,
}


def test_rank_one_images_fail_exactly_as_often():
    rng, factor, vectors, draws = np.random.default_rng(0), 2.0, 5, 200_000
    largest = np.abs(rng.standard_normal((draws, vectors))).max(axis=1)
    failed = np.mean(factor * np.sqrt(2 / np.pi) * largest < 1)
    exact = certificates.largest_image_failure(factor, vectors, rank_one=True)
    assert abs(failed - exact) < 4 * np.sqrt(exact / draws)
    assert exact < certificates.largest_image_failure(factor, vectors)


@pytest.mark.parametrize("spectrum", [np.r_[1.0, 0.9, 0.1], np.ones(20), np.arange(1, 30) ** -1.0])
def test_no_spectrum_fails_more_often_than_rank_one(spectrum):
    rng, draws, vectors = np.random.default_rng(1), 20_000, 3
    images = np.sqrt(rng.standard_normal((draws, vectors, len(spectrum))) ** 2 @ spectrum**2).max(axis=1)
    failed = np.mean(spectrum[0] > 1.5 * np.sqrt(2 / np.pi) * images)
    assert failed <= certificates.largest_image_failure(1.5, vectors, rank_one=True) + 4 * np.sqrt(0.25 / draws)


def ritz_shortfalls(values, steps, draws):
    """Relative errors of the largest Ritz value and of the power method, by their definitions."""
    rng, krylov, power = np.random.default_rng(2), [], []
    for _ in range(draws):
        x = rng.standard_normal(len(values))
        basis = [x / np.linalg.norm(x)]
        for _ in range(steps - 1):
            y = values * basis[-1]
            for _ in range(2):
                y = y - np.array(basis).T @ (np.array(basis) @ y)
            basis.append(y / np.linalg.norm(y))
        v = np.array(basis)
        krylov.append(1 - np.linalg.eigvalsh((v * values) @ v.T)[-1] / values.max())
        y = values ** (steps - 1) * x  # step k is the Rayleigh quotient of A^{k−1} x
        power.append(1 - y @ (values * y) / (y @ y) / values.max())
    return np.array(krylov), np.array(power)


@pytest.mark.parametrize("name", DIAGONALS)
@pytest.mark.parametrize("steps", [4, 8])
def test_krylov_and_power_iteration_keep_their_bounds(name, steps):
    values, draws = DIAGONALS[name], 150
    krylov, power = ritz_shortfalls(values, steps, draws)
    assert krylov.mean() <= certificates.krylov_mean_error(60, steps)
    assert power.mean() <= certificates.power_mean_error(60, steps)
    for epsilon in (0.01, 0.05, 0.2):
        assert np.mean(krylov > epsilon) <= certificates.krylov_failure(60, steps, epsilon) + 0.5 / draws
        assert np.mean(power > epsilon) <= certificates.power_failure(60, steps, epsilon) + 0.5 / draws


def test_variance_of_signs_by_enumeration():
    a = np.random.default_rng(0).standard_normal((7, 7))
    a = a + a.T
    signs = np.array(list(product([-1.0, 1.0], repeat=7)))
    values = np.einsum("si,ij,sj->s", signs, a, signs)
    assert np.isclose(values.var(), certificates.trace_variance(a, "rademacher"), rtol=1e-12)
    assert np.isclose(values.mean(), np.trace(a), rtol=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "sphere"])
def test_variance_of_other_vectors(kind):
    rng, draws = np.random.default_rng(0), 200_000
    a = np.diag([3.0, 1.0, -0.5, 0.2])
    x = rng.standard_normal((draws, 4))
    if kind == "sphere":
        x *= 2.0 / np.linalg.norm(x, axis=1, keepdims=True)
    values = (x**2) @ np.diag(a)
    deviations = (values - values.mean()) ** 2
    standard_error = deviations.std() / np.sqrt(draws)
    assert abs(deviations.mean() - certificates.trace_variance(a, kind)) < 4 * standard_error


def test_variance_of_square_images():
    rng, s = np.random.default_rng(0), np.array([2.0, 1.0, 0.5])
    squares = rng.standard_normal((200_000, 3)) ** 2 @ s**2
    deviations = (squares - squares.mean()) ** 2
    assert abs(deviations.mean() - certificates.square_image_variance(s)) < 4 * deviations.std() / np.sqrt(200_000)
    assert abs(squares.mean() - np.sum(s**2)) < 4 * squares.std() / np.sqrt(200_000)


def test_bad_arguments():
    with pytest.raises(ValueError, match="kind must be one of"):
        certificates.trace_variance(np.eye(2), "cauchy")
    with pytest.raises(ValueError, match="symmetric matrix"):
        certificates.trace_variance(np.triu(np.ones((3, 3))), "gaussian")
    with pytest.raises(ValueError, match="factor must be above 1"):
        certificates.largest_image_failure(1.0, 3)
