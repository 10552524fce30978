import numpy as np
import pytest

from nla_llm.linalg import extend_basis, orthonormalise


def test_orthonormal_columns_span_the_input(xp):
    x = np.random.default_rng(0).standard_normal((3, 20, 4))
    q = np.asarray(orthonormalise(xp.asarray(x)))
    assert np.abs(np.swapaxes(q, -1, -2) @ q - np.eye(4)).max() < 1e-14
    assert np.abs(q @ (np.swapaxes(q, -1, -2) @ x) - x).max() < 1e-13


def test_dependent_columns_still_give_an_orthonormal_basis():
    q = orthonormalise(np.ones((6, 3)))
    assert np.abs(q.T @ q - np.eye(3)).max() < 1e-14
    assert np.abs(q @ (q.T @ np.ones(6)) - 1).max() < 1e-14


def test_more_columns_than_rows_are_refused():
    with pytest.raises(ValueError, match="at least as many rows as columns"):
        orthonormalise(np.ones((2, 3)))


@pytest.mark.parametrize("kind", ["generic", "inside", "repeated", "zero"])
def test_an_extended_basis_is_orthonormal_whatever_the_block(xp, kind):
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.standard_normal((2, 30, 7)))[0]
    block = {
        "generic": rng.standard_normal((2, 30, 4)),
        "inside": basis[..., :4] * 1e3,
        "repeated": np.repeat(rng.standard_normal((2, 30, 1)), 4, axis=-1),
        "zero": np.zeros((2, 30, 4)),
    }[kind]
    new, residual = (np.asarray(a) for a in extend_basis(xp.asarray(basis), xp.asarray(block), rng))
    whole = np.concatenate([basis, new], axis=-1)
    assert np.abs(np.swapaxes(whole, -1, -2) @ whole - np.eye(11)).max() < 1e-13
    outside = block - basis @ (np.swapaxes(basis, -1, -2) @ block)
    assert np.abs(new @ residual - outside).max() < 1e-12 * max(1, np.abs(block).max())
