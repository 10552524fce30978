"""The rank that a tolerance asks for: the tolerance holds, at nearly the least rank, without a full decomposition."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.arithmetic import CountingGenerator, counted, tally
from nla_llm.linalg import haar_orthogonal
from nla_llm.methods.update.adaptive import _growing, _Looks
from nla_llm.operators import Dense, LowRank

SPECTRA = {
    "power": np.arange(1, 121) ** -0.7,
    "exponential": 0.8 ** np.arange(120),
    "rank and noise": np.r_[np.full(7, 5.0), np.full(113, 0.05)],
    "flat": np.ones(120),
}


def with_spectrum(values, rows=130):
    n = len(values)
    return (haar_orthogonal(rows, 0)[:, :n] * values) @ haar_orthogonal(n, 1)


def least_rank(values, norm, tolerance):
    tails = np.sqrt(np.cumsum(values[::-1] ** 2)[::-1]) if norm == "frobenius" else values
    return int(np.sum(tails > tolerance * tails[0]))


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("tolerance", [0.5, 0.2, 0.03])
def test_the_tolerance_holds_at_nearly_the_least_rank(name, norm, tolerance):
    values, order = SPECTRA[name], "fro" if norm == "frobenius" else 2
    matrix = with_spectrum(values)
    least = least_rank(values, norm, tolerance)
    for dtype in (np.float32, np.float64):
        B = nl.method("adaptive_rank", tolerance=tolerance, norm=norm)(nl.UpdateProblem(matrix.astype(dtype)), rng=0)
        error = np.linalg.norm(matrix.astype(dtype) - B.left.astype(np.float64) @ B.right.T, order)
        assert error <= tolerance * np.linalg.norm(matrix, order) * (1 + 1e-6)
        assert least <= B.rank <= 1.25 * least + 2


def test_no_full_decomposition_and_no_dense_form(monkeypatch):
    """Only products with blocks: the matrix hides, and no SVD of a matrix of its size is asked for."""
    matrix = with_spectrum(SPECTRA["exponential"]).astype(np.float64)
    sizes, svd = [], np.linalg.svd

    def watched(a, *args, **options):
        sizes.append(max(a.shape[-2:]))
        return svd(a, *args, **options)

    monkeypatch.setattr(np.linalg, "svd", watched)
    nl.method("adaptive_rank", tolerance=0.05)(nl.UpdateProblem(matrix), rng=0)
    assert max(sizes) < 40


def test_adapters_are_recompressed_to_a_tolerance():
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((50, 9)) * 0.3 ** np.arange(9), rng.standard_normal((40, 9))
    B = nl.method("adaptive_rank", tolerance=0.01)(nl.UpdateProblem(LowRank(left, right)), rng=0)
    dense = left @ right.T
    assert B.rank < 9
    assert np.linalg.norm(dense - B.dense()) <= 0.01 * np.linalg.norm(dense)


def test_each_matrix_of_a_batch_finds_its_own_rank():
    deltas = np.stack([with_spectrum(SPECTRA["exponential"]), with_spectrum(SPECTRA["rank and noise"])])
    method = nl.method("adaptive_rank", tolerance=0.1)
    B = method(nl.UpdateProblem(deltas), rng=0)
    changed = method(nl.UpdateProblem(np.stack([deltas[0], 3 * deltas[0]])), rng=0)
    np.testing.assert_allclose(B.dense()[0], changed.dense()[0], rtol=0, atol=1e-12)
    errors = np.linalg.norm(deltas - B.dense(), axis=(-2, -1)) / np.linalg.norm(deltas, axis=(-2, -1))
    assert (errors <= 0.1).all()
    assert not B.left[1, :, 7:].any()  # the second matrix needs no more than its seven strong directions


def test_a_zero_update_has_rank_one_of_zeros():
    assert not nl.method("adaptive_rank", tolerance=0.1)(nl.UpdateProblem(np.zeros((5, 4))), rng=0).dense().any()


def test_a_thousand_looks_share_the_permitted_failure_and_each_has_a_confidence_below_one():
    looks = _Looks(1e-3)
    shares = [looks.next() for _ in range(1000)]
    assert 0.99e-3 < sum(shares) <= 1e-3
    assert 1.0 - min(shares) < 1.0


def test_what_rounding_hides_is_refused():
    problem = nl.UpdateProblem(np.random.default_rng(0).standard_normal((60, 50)).astype(np.float32))
    with pytest.raises(FloatingPointError, match="tolerance=1e-09 in the frobenius norm cannot be certified"):
        nl.method("adaptive_rank", tolerance=1e-9)(problem, rng=0)


@pytest.mark.parametrize("rows", [40, 14])
def test_growing_costs_what_the_formula_says(rows):
    """Multiply-adds of a basis of three blocks and its SVD, counted; certificates and looks come on top."""

    class AtTwelve:
        def look(self, captured, smallest):
            return False

        def rank(self, values):
            return 12

    method = nl.method("adaptive_rank", tolerance=0.1, block=4)
    matrix = np.random.default_rng(0).standard_normal((rows, 12))
    with tally() as counts:
        (svd,) = _growing(Dense(counted(matrix)), 4, CountingGenerator(np.random.default_rng(0)), AtTwelve())
    assert svd.values.shape == (12,)
    formula = method.cost(nl.UpdateProblem(matrix)).at(nl.UpdateProblem(matrix), method, l=12, r=1)
    assert (formula.prepare.madd, formula.prepare.draw) == (counts.madd, counts.draw)
