"""Truncated updates against prescribed spectra; the update of zero."""

import numpy as np
import pytest
from scipy.stats import ortho_group

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.operators import LowRank

SPECTRUM = 0.5 ** np.arange(8)


def prescribed(d_out=12, d_in=8, spectrum=SPECTRUM):
    u, v = ortho_group.rvs(d_out, random_state=0), ortho_group.rvs(d_in, random_state=1)
    return u[:, : len(spectrum)] * spectrum @ v[:, : len(spectrum)].T


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_errors_are_the_discarded_singular_values(rank, dtype, xp):
    delta = xp.astype(xp.asarray(prescribed()), getattr(xp, dtype))
    B = nl.method("truncated_svd", rank=rank)(nl.UpdateProblem(delta))
    assert isinstance(B, LowRank)
    assert B.dtype == delta.dtype
    assert (tuple(B.left.shape), tuple(B.right.shape)) == ((12, rank), (8, rank))
    error = np.linalg.svd(to_numpy(delta) - to_numpy(B.dense()), compute_uv=False)
    want = np.concatenate([SPECTRUM[rank:], np.zeros(rank)])
    np.testing.assert_allclose(error, want, rtol=0, atol=50 * np.finfo(dtype).eps)


def test_factors_are_as_documented():
    """left = U Σ has orthogonal columns of the lengths σ_i, right = V orthonormal ones."""
    B = nl.method("truncated_svd", rank=4)(nl.UpdateProblem(prescribed()))
    np.testing.assert_allclose(B.left.T @ B.left, np.diag(SPECTRUM[:4] ** 2), rtol=0, atol=1e-14)
    np.testing.assert_allclose(B.right.T @ B.right, np.eye(4), rtol=0, atol=1e-14)


def test_wide_and_batched_updates():
    deltas = np.stack([prescribed(8, 12), 3 * prescribed(8, 12)])
    B = nl.method("truncated_svd", rank=2)(nl.UpdateProblem(deltas))
    assert B.shape == (2, 8, 12)
    for delta, approximation in zip(deltas, B.dense(), strict=True):
        alone = nl.method("truncated_svd", rank=2)(nl.UpdateProblem(delta)).dense()
        np.testing.assert_allclose(approximation, alone, rtol=0, atol=1e-13)


def test_deterministic_whatever_the_seed():
    problem = nl.UpdateProblem(prescribed())
    method = nl.method("truncated_svd", rank=2)
    np.testing.assert_array_equal(method(problem).dense(), method(problem, rng=7).dense())


def test_rank_above_the_dimensions_is_refused():
    with pytest.raises(ValueError, match="rank=9 exceeds the dimensions of the update, 12 x 8"):
        nl.method("truncated_svd", rank=9)(nl.UpdateProblem(prescribed()))


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, None])
def test_rank_must_be_a_whole_number(rank):
    with pytest.raises(ValueError, match="rank must be a whole number >= 1"):
        nl.method("truncated_svd", rank=rank)


@pytest.mark.parametrize("method", ["truncated_svd", "zero_update"])
def test_zero_updates(method):
    options = {"rank": 2} if method == "truncated_svd" else {}
    B = nl.method(method, **options)(nl.UpdateProblem(np.zeros((5, 4))))
    assert not B.dense().any()


def test_zero_update_keeps_shape_and_dtype(xp):
    delta = xp.astype(xp.asarray(np.stack([prescribed()] * 3)), xp.float32)
    B = nl.method("zero_update")(nl.UpdateProblem(delta))
    assert B.shape == (3, 12, 8)
    assert B.dtype == xp.float32
    assert not to_numpy(B @ xp.ones((8, 2), dtype=xp.float32)).any()
    assert B.nonnegative


def test_doing_nothing_has_relative_error_one():
    problem = nl.UpdateProblem(prescribed())
    B = nl.method("zero_update")(problem)
    for norm in ("spectral", "frobenius"):
        estimate = nl.measures.relative_error(problem.exact(), B, norm=norm)
        assert abs(float(estimate.value) - 1) < 1e-12


@pytest.mark.parametrize("dtype", [">f8", np.longdouble])
def test_wide_precisions_are_not_narrowed(dtype):
    truncated = nl.method("truncated_svd", rank=3)(nl.UpdateProblem(prescribed().astype(dtype)))
    assert truncated.dtype == np.float64
    np.testing.assert_allclose(np.linalg.svd(truncated.dense())[1][:3], SPECTRUM[:3], rtol=1e-14)
