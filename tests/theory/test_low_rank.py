"""Mean errors of randomised low-rank approximation: bounds against simulation, and the equality of one pass."""

import numpy as np
import pytest

from nla_llm.linalg import generalised_nystrom, haar_orthogonal, krylov_svd, orthonormalise, randomised_svd
from nla_llm.operators import Dense
from nla_llm.theory import low_rank

N, K, P = 40, 5, 4
SPECTRA = {
    "power": np.arange(1, N + 1) ** -0.5,
    "exponential": 0.8 ** np.arange(N),
    "step": np.r_[np.full(8, 10.0), np.ones(N - 8)],
    "flat": np.ones(N),
    "rank and noise": np.r_[np.full(3, 5.0), np.full(N - 3, 0.1)],
    "one": np.r_[1.0, np.zeros(N - 1)],
}
DRAWS = 60


def with_spectrum(values, rows=N + 5):
    n = len(values)
    return (haar_orthogonal(rows, 0)[:, :n] * values) @ haar_orthogonal(n, 1)


def ranges(matrix, columns, q=0):
    """Bases from plain power iteration, for many draws: no step is shared with the package."""
    for seed in range(DRAWS):
        y = matrix @ np.random.default_rng(seed).standard_normal((matrix.shape[1], columns))
        for _ in range(q):
            y = matrix @ (matrix.T @ np.linalg.qr(y)[0])
        yield np.linalg.qr(y)[0]


def below(samples, bound):
    """The mean is below the bound: never by more than three standard errors above it."""
    samples = np.asarray(samples)
    assert samples.mean() <= bound * (1 + 1e-10) + 3 * samples.std() / np.sqrt(len(samples)) + 1e-13


@pytest.mark.parametrize("name", SPECTRA)
def test_range_finder_stays_below_its_bounds(name):
    s, matrix = SPECTRA[name], with_spectrum(SPECTRA[name])
    for q in (0, 1, 3):
        errors = [matrix - basis @ (basis.T @ matrix) for basis in ranges(matrix, K + P, q)]
        spectral = [np.linalg.norm(e, 2) for e in errors]
        below(spectral, float(low_rank.halko_power(s, K, P, q)))
        if q == 0:
            squares = [np.sum(e**2) for e in errors]
            below(squares, float(low_rank.halko_frobenius(s, K, P)) ** 2)
            below(spectral, float(low_rank.halko_spectral(s, K, P)))
            for norm, found in (("frobenius", np.sqrt(squares)), ("spectral", spectral)):
                bound, failure = low_rank.halko_deviation(s, K, P, t=3.0, u=3.0, norm=norm)
                assert np.mean(found > bound * (1 + 1e-10) + 1e-13) <= failure


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("q", [0, 1, 2])
def test_truncated_randomised_svd_stays_below_its_bounds(name, q):
    s, matrix = SPECTRA[name], with_spectrum(SPECTRA[name])
    theory = low_rank.randomised_svd_theory(s, K, P, q, matrix.shape)
    frobenius, spectral = [], []
    for seed in range(DRAWS):
        u, values, v = randomised_svd(Dense(matrix), K, seed, oversampling=P, power_steps=q)
        error = matrix - (u * values) @ v.T
        frobenius.append(np.sum(error**2))
        spectral.append(np.linalg.norm(error, 2))
    below(frobenius, float(theory.error("frobenius")) ** 2)
    below(spectral, float(theory.error("spectral")))


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_krylov_spaces_stay_below_their_bound(name, steps):
    s, matrix = SPECTRA[name], with_spectrum(SPECTRA[name])
    bound = float(low_rank.krylov_svd_theory(s, K, P, steps, matrix.shape).error("frobenius"))
    squares = []
    for seed in range(DRAWS):
        u, values, v = krylov_svd(Dense(matrix), K, seed, block=K + P, steps=steps).svd
        squares.append(np.sum((matrix - (u * values) @ v.T) ** 2))
    below(squares, bound**2)


def test_the_power_bound_without_the_number_left_is_false():
    """The corollary as it circulates, (1 + √(k/(p−1)) + e√(k+p)/p)^{1/(2q+1)} σ_{k+1}, is passed by a mean."""
    s = np.r_[np.full(8, 10.0), np.ones(52)]
    matrix, k, p = with_spectrum(s, 60), 8, 8
    mean = np.mean([np.linalg.norm(matrix - q @ (q.T @ matrix), 2) for q in ranges(matrix, k + p)])
    false = 1 + np.sqrt(k / (p - 1)) + np.e * np.sqrt(k + p) / p
    assert mean > 1.1 * false
    assert mean < float(low_rank.halko_power(s, k, p, 0))


@pytest.mark.parametrize(("k", "rows"), [(3, 7), (5, 20), (8, 12)])
def test_one_pass_costs_exactly_its_factor(k, rows):
    """E4, an equality: given Q, the mean square over Ψ alone."""
    matrix, rng = with_spectrum(SPECTRA["power"]), np.random.default_rng(0)
    q = orthonormalise(matrix @ rng.standard_normal((N, k)))
    best = np.sum((matrix - q @ (q.T @ matrix)) ** 2)
    ratios = []
    for _ in range(1500):
        psi = rng.standard_normal((rows, matrix.shape[0]))
        ratios.append(np.sum((matrix - q @ (np.linalg.pinv(psi @ q) @ (psi @ matrix))) ** 2) / best)
    error = np.std(ratios) / np.sqrt(len(ratios))
    assert abs(np.mean(ratios) - low_rank.single_pass_factor(k, rows)) < 4 * error
    assert error < 0.1


@pytest.mark.parametrize("name", SPECTRA)
def test_one_pass_stays_below_its_bound(name):
    s, matrix = SPECTRA[name], with_spectrum(SPECTRA[name])
    bound = float(low_rank.single_pass_theory(s, 6, 15, matrix.shape).error("frobenius"))
    squares = []
    for seed in range(DRAWS):
        left, right = generalised_nystrom(Dense(matrix), 6, 15, seed)
        squares.append(np.sum((matrix - left @ right.T) ** 2))
    below(squares, bound**2)


@pytest.mark.parametrize("name", SPECTRA)
def test_nystrom_of_semidefinite_matrices(name):
    values = SPECTRA[name]
    v = haar_orthogonal(N, 3)
    a = (v * values) @ v.T
    traces, norms = [], []
    for seed in range(DRAWS):
        y = a @ np.random.default_rng(seed).standard_normal((N, 8))
        omega = np.random.default_rng(seed).standard_normal((N, 8))
        error = a - y @ np.linalg.pinv(omega.T @ y, rcond=1e-13) @ y.T
        traces.append(np.trace(error))
        norms.append(np.linalg.norm(error, 2))
    below(traces, float(low_rank.nystrom_trace(values, 8)))
    below(norms, float(low_rank.nystrom_spectral(values, 8)))


def test_bounds_are_batched_and_sorted():
    s = np.stack([SPECTRA["power"], SPECTRA["exponential"]])
    shuffled = s[:, ::-1]
    for bound in (low_rank.halko_frobenius, low_rank.halko_spectral):
        np.testing.assert_allclose(bound(shuffled, K, P), [bound(row, K, P) for row in s], rtol=1e-14)
    for bound in (low_rank.powered_frobenius, low_rank.krylov_frobenius):
        np.testing.assert_allclose(bound(shuffled, K, P, 2), [bound(row, K, P, 2) for row in s], rtol=1e-14)


def test_infinite_bounds_are_refused():
    with pytest.raises(ValueError, match="p at least 2"):
        low_rank.halko_frobenius([1.0], 1, 1)
    with pytest.raises(ValueError, match="rows must be at least k"):
        low_rank.single_pass_factor(3, 4)
    with pytest.raises(ValueError, match="speaks of outputs only"):
        low_rank.data_aware_theory([1.0], 1, (1, 1)).error("frobenius")
