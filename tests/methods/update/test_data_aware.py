"""Truncation for the inputs that a layer sees: the optimum of its outputs, whatever the rank of the data."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.linalg import triangular_factor
from nla_llm.operators import Dense, LowRank

RANK = 3


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


DATA = {
    "many": lambda: draw(1, 200, 9) * np.arange(1, 10.0) ** 2,
    "deficient": lambda: draw(1, 200, 4) @ draw(2, 4, 9),
    "few": lambda: draw(1, 2, 9),
    "ill conditioned": lambda: draw(1, 200, 9) * 10.0 ** -np.arange(0, 18, 2.0),
}


def optimum(inputs, delta, rank):
    return np.linalg.norm(np.linalg.svd(inputs @ delta.T, compute_uv=False)[rank:])


@pytest.mark.parametrize("name", DATA)
def test_the_error_of_the_outputs_is_the_least(name, xp):
    inputs, delta = DATA[name](), draw(0, 7, 9)
    problem = nl.UpdateProblem(xp.asarray(delta), inputs=xp.asarray(inputs))
    method = nl.method("data_aware_svd", rank=RANK)
    B = to_numpy(method(problem).dense())
    error, best = np.linalg.norm(inputs @ (delta - B).T), optimum(inputs, delta, RANK)
    scale = np.linalg.norm(inputs @ delta.T)
    assert abs(error - best) < 1e-13 * scale
    assert abs(float(method.theory(problem).error("outputs")) - best) < 1e-13 * scale
    assert np.linalg.matrix_rank(B, tol=1e-10) <= RANK


def test_full_column_rank_agrees_with_the_whitened_form():
    """S⁻¹[S ΔWᵀ]_r with the Cholesky factor S of XᵀX: another route, possible here."""
    inputs, delta = DATA["many"](), draw(0, 7, 9)
    s = np.linalg.cholesky(inputs.T @ inputs).T
    u, sigma, vt = np.linalg.svd(s @ delta.T)
    expected = np.linalg.solve(s, (u[:, :RANK] * sigma[:RANK]) @ vt[:RANK]).T
    B = nl.method("data_aware_svd", rank=RANK)(nl.UpdateProblem(delta, inputs=inputs))
    np.testing.assert_allclose(B.dense(), expected, rtol=0, atol=1e-11)


def test_cholesky_would_fail_where_this_does_not():
    inputs = DATA["deficient"]().astype(np.float32)
    with pytest.raises(np.linalg.LinAlgError):
        np.linalg.cholesky(inputs.T @ inputs)
    B = nl.method("data_aware_svd", rank=RANK)(nl.UpdateProblem(draw(0, 7, 9).astype(np.float32), inputs=inputs))
    assert B.dtype == np.float32
    assert np.isfinite(B.dense()).all()


def test_rank_that_the_data_do_not_use_goes_to_the_rest():
    """Two inputs, rank five: the outputs are exact, and the remaining three directions are the best for ΔW itself."""
    inputs, delta = DATA["few"](), draw(0, 7, 9)
    B = nl.method("data_aware_svd", rank=5)(nl.UpdateProblem(delta, inputs=inputs)).dense()
    np.testing.assert_allclose(inputs @ B.T, inputs @ delta.T, rtol=0, atol=1e-13)
    u = np.linalg.qr(delta @ inputs.T)[0]
    rest = delta - u @ (u.T @ delta)
    np.testing.assert_allclose(
        np.linalg.norm(delta - B), np.linalg.norm(np.linalg.svd(rest, compute_uv=False)[3:]), rtol=1e-12
    )


def test_streams_operators_and_arrays_are_the_same_inputs():
    inputs, delta = draw(1, 300, 9), draw(0, 7, 9)
    method = nl.method("data_aware_svd", rank=RANK)
    whole = method(nl.UpdateProblem(delta, inputs=inputs)).dense()
    factor = triangular_factor(inputs[i : i + 50] for i in range(0, 300, 50))
    for other in (factor, Dense(inputs), LowRank(inputs, np.eye(9))):
        np.testing.assert_allclose(method(nl.UpdateProblem(delta, inputs=other)).dense(), whole, rtol=0, atol=1e-12)


def test_plain_truncation_is_worse_for_these_inputs():
    inputs, delta = DATA["many"](), draw(0, 7, 9)
    problem = nl.UpdateProblem(delta, inputs=inputs)
    plain = nl.method("truncated_svd", rank=RANK)(problem).dense()
    assert np.linalg.norm(inputs @ (delta - plain).T) > 1.5 * optimum(inputs, delta, RANK)


def test_missing_inputs_are_asked_for():
    problem = nl.UpdateProblem(np.eye(4))
    with pytest.raises(ValueError, match="needs calibration inputs; pass UpdateProblem"):
        nl.method("data_aware_svd", rank=2)(problem)
    with pytest.raises(ValueError, match="number of calibration inputs"):
        nl.method("data_aware_svd", rank=2).cost(problem)
