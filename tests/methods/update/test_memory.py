"""A tall matrix is approximated within its own memory again, never a copy of it in a wider precision."""

import tracemalloc

import numpy as np
import pytest

import nla_llm as nl

ROWS, COLUMNS = 40_000, 256  # 41 MB in float32, in the proportions of an embedding


@pytest.fixture(scope="module")
def matrix():
    rng = np.random.default_rng(0)
    left = rng.standard_normal((ROWS, 20), dtype=np.float32) * np.arange(1, 21, dtype=np.float32) ** -0.5
    return left @ rng.standard_normal((20, COLUMNS), dtype=np.float32)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("krylov_svd", {"rank": 8, "block": 8, "steps": 4}),
        ("randomised_svd", {"rank": 8}),
        ("single_pass_svd", {"rank": 8}),
        ("interpolative", {"rank": 8}),
    ],
)
def test_engines_hold_no_copy_of_the_matrix(name, options, matrix):
    """All that is allocated, validation included, is less than the matrix: less than twice it in all."""
    nl.method(name, **options)(nl.UpdateProblem(matrix[:500]), rng=0)  # what libraries load at the first call
    tracemalloc.start()
    try:
        B = nl.method(name, **options)(nl.UpdateProblem(matrix), rng=0)
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < matrix.nbytes
        tracemalloc.reset_peak()
        B.remaining("frobenius")
        assert tracemalloc.get_traced_memory()[1] < 2 * matrix.nbytes
    finally:
        tracemalloc.stop()
