import tracemalloc

import numpy as np
import pytest

from nla_llm.linalg import haar_orthogonal
from nla_llm.measures import frobenius_norm, inf_norm, max_norm, nuclear_norm, one_norm, stable_rank
from nla_llm.measures.streaming import entry_norms, row_blocks
from nla_llm.operators import Dense, LowRank

TRUTHS = {
    frobenius_norm: lambda a: np.linalg.norm(a, axis=(-2, -1)),
    nuclear_norm: lambda a: np.linalg.norm(a, "nuc", axis=(-2, -1)),
    max_norm: lambda a: np.abs(a).max(axis=(-2, -1)),
    one_norm: lambda a: np.linalg.norm(a, 1, axis=(-2, -1)),
    inf_norm: lambda a: np.linalg.norm(a, np.inf, axis=(-2, -1)),
}


def with_spectrum(values, seed=0):
    n = len(values)
    return (haar_orthogonal(n, seed) * values) @ haar_orthogonal(n, seed + 1).T


@pytest.mark.parametrize("norm", TRUTHS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5, 8), (1, 1)])
def test_norms_agree_with_numpy(xp, norm, shape):
    matrix = np.random.default_rng(0).standard_normal(shape)
    estimate = norm(Dense(xp.asarray(matrix)))
    assert estimate.shape == shape[:-2]
    assert estimate.contains(TRUTHS[norm](matrix)).all()
    assert estimate.width.max() < 1e-13
    assert estimate.confidence == 1


def test_rows_are_taken_in_blocks_of_bounded_size(monkeypatch):
    monkeypatch.setattr("nla_llm.measures.streaming._BLOCK_ENTRIES", 100)
    matrix = np.random.default_rng(0).standard_normal((2, 33, 7))
    op = Dense(matrix)
    blocks = list(row_blocks(op))
    assert blocks[0] == (0, 7)
    assert blocks[-1] == (28, 33)
    norms = entry_norms(op)
    assert np.allclose(norms.one, TRUTHS[one_norm](matrix), rtol=1e-14)
    assert np.allclose(norms.frobenius, TRUTHS[frobenius_norm](matrix), rtol=1e-14)
    assert np.allclose(frobenius_norm(op).value, TRUTHS[frobenius_norm](matrix), rtol=1e-14)


@pytest.mark.parametrize("scale", [1e-200, 1e200, 0.0])
def test_squares_neither_overflow_nor_vanish(monkeypatch, scale):
    monkeypatch.setattr("nla_llm.measures.streaming._BLOCK_ENTRIES", 20)
    matrix = np.random.default_rng(0).standard_normal((9, 5))
    matrix[3:5] *= 1e-3
    truth = scale * np.linalg.norm(matrix)
    assert np.isclose(float(frobenius_norm(Dense(scale * matrix))), truth, rtol=1e-14)


def test_half_of_a_matrix_may_be_huge_and_the_other_tiny(monkeypatch):
    monkeypatch.setattr("nla_llm.measures.streaming._BLOCK_ENTRIES", 2)
    matrix = np.array([[1e-180, 0], [0, 0], [3e200, 4e200], [1.0, 1.0]])
    assert np.isclose(float(frobenius_norm(Dense(matrix))), 5e200, rtol=1e-14)
    assert np.isclose(float(frobenius_norm(Dense(matrix[::-1]))), 5e200, rtol=1e-14)


def test_memory_of_a_pass_does_not_grow_with_n():
    left, right = np.random.default_rng(0).standard_normal((2, 8000, 2))
    op = LowRank(left, right) - LowRank(right, left)
    tracemalloc.start()
    frobenius_norm(op, method="exact")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 8 * 2**21 < 8 * 8000**2 / 4


def test_entries_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        max_norm(Dense(np.array([[1.0, np.nan]])))


def test_a_low_rank_product_is_measured_by_its_factors():
    left, right = np.random.default_rng(0).standard_normal((2, 200_000, 3))
    op = LowRank(left, right)
    truth = np.sqrt(np.trace((left.T @ left) @ (right.T @ right)))
    assert frobenius_norm(op).contains(truth)
    assert "factors" in frobenius_norm(op).how
    assert float(nuclear_norm(op)) >= truth


@pytest.mark.parametrize("spectrum", ["rank one", "rank three", "flat", "decaying"])
@pytest.mark.parametrize("deflated", [1, 4])
def test_the_stochastic_interval_covers_the_truth_as_often_as_it_says(monkeypatch, spectrum, deflated):
    monkeypatch.setattr("nla_llm.measures.norms._DEFLATED", deflated)
    values = {
        "rank one": np.eye(1, 40)[0],
        "rank three": np.r_[np.ones(3), np.zeros(37)],
        "flat": np.ones(40),
        "decaying": 1.0 / np.arange(1, 41),
    }[spectrum]
    op, truth = Dense(np.diag(values)), np.linalg.norm(values)
    found = [
        frobenius_norm(op, rng=seed, method="stochastic", confidence=0.8, max_probes=6).contains(truth)
        for seed in range(200)
    ]
    assert np.mean(found) >= 0.8 - 3 * np.sqrt(0.8 * 0.2 / 200)


def test_without_deflation_rank_one_is_the_worst_case_and_still_covered(monkeypatch):
    """With V orthogonal to the only singular vector the mean of the probes is exactly χ²_s/s."""
    monkeypatch.setattr("nla_llm.measures.norms.orthonormalise", lambda x: np.eye(*x.shape, k=-1))
    op = Dense(np.eye(50, 50) * np.r_[1.0, np.zeros(49)])
    estimates = [frobenius_norm(op, rng=s, method="stochastic", confidence=0.8, max_probes=4) for s in range(400)]
    covered = np.mean([e.contains(1.0) for e in estimates])
    assert 0.8 <= covered < 1.0
    assert np.std([float(e) ** 2 for e in estimates]) == pytest.approx(np.sqrt(2 / 4), rel=0.15)


def test_the_stochastic_norm_stops_at_its_tolerance(xp):
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((2, 60, 50)) @ np.diag(0.5 ** np.arange(50))
    estimate = frobenius_norm(Dense(xp.asarray(matrix)), rtol=1e-3, method="stochastic")
    assert estimate.contains(TRUTHS[frobenius_norm](matrix)).all()
    assert np.all(estimate.width <= 2.1e-3 * estimate.value)
    assert "64 Gaussian probes" in estimate.how


@pytest.mark.parametrize("values", [0.8 ** np.arange(600), np.arange(1, 601.0) ** -0.5])
def test_a_large_nuclear_norm_is_bracketed(monkeypatch, values):
    monkeypatch.setattr("nla_llm.measures.norms._DENSE_ORDER", 0)
    estimate = nuclear_norm(Dense(with_spectrum(values)[:, :598]))
    truth = np.linalg.norm(with_spectrum(values)[:, :598], "nuc")
    assert estimate.confidence == 1
    assert estimate.contains(truth)
    assert float(estimate.upper / estimate.lower) < (1.001 if values[1] == 0.8 else 3)


def test_stable_rank_of_known_spectra():
    assert stable_rank(Dense(np.eye(6))).contains(6.0)
    assert stable_rank(Dense(np.ones((3, 700)))).contains(1.0)
    values = np.arange(1, 601.0) ** -0.5
    estimate = stable_rank(Dense(with_spectrum(values)))
    assert estimate.contains((values**2).sum())
    assert float(estimate.upper / estimate.lower) < 1.02
    with pytest.raises(ZeroDivisionError, match="zero"):
        stable_rank(Dense(np.zeros((3, 3))))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"method": "guess"}, "method"), ({"rtol": 0.0}, "rtol"), ({"confidence": 1.0}, "confidence")],
)
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        frobenius_norm(Dense(np.eye(2)), **arguments)


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e160, 1e300])
def test_frobenius_from_factors_neither_over_nor_underflows(size):
    op = LowRank(np.full((30, 1), size), np.ones((20, 1)))
    estimate = frobenius_norm(op)
    assert estimate.how == "from the factors"
    assert estimate.value == pytest.approx(size * np.sqrt(600.0), rel=1e-13)
    assert frobenius_norm(0.0 * op).upper == 0.0
