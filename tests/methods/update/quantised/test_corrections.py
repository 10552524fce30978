"""The best correction of a quantised matrix, with and without weights."""

import numpy as np
import pytest

from nla_llm.methods.update.quantised.corrections import best_correction, square_root
from nla_llm.problems import UpdateProblem


def test_weighted_correction_is_the_truncation_in_the_weighted_norm():
    """[E M]_r M⁻¹, computed with the inverse that the code avoids."""
    rng = np.random.default_rng(0)
    residual, root = rng.standard_normal((9, 7)), rng.standard_normal((7, 7)) + 3 * np.eye(7)
    u, s, vt = np.linalg.svd(residual @ root)
    for rank in (1, 3, 7):
        want = (u[:, :rank] * s[:rank]) @ vt[:rank] @ np.linalg.inv(root)
        got = best_correction(residual, rank, residual @ root)
        assert got.rank == rank
        np.testing.assert_allclose(got.dense(), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("samples", [3, 7, 40])
def test_square_root_of_the_second_moment(samples):
    inputs = np.random.default_rng(1).standard_normal((samples, 7))
    root = square_root(UpdateProblem(np.ones((2, 7)), inputs=inputs), np.float64)
    assert root.shape == (7, min(samples, 7))
    np.testing.assert_allclose(root @ root.T, inputs.T @ inputs, rtol=0, atol=1e-13 * np.linalg.norm(inputs) ** 2)


def test_square_root_of_inputs_whose_squares_vanish():
    """Singular values 1 and 1e-9: the second moment in float64 has lost the smaller, the triangle has not."""
    u, _ = np.linalg.qr(np.random.default_rng(2).standard_normal((50, 2)))
    root = square_root(UpdateProblem(np.ones((2, 2)), inputs=u * [1.0, 1e-9]), np.float64)
    np.testing.assert_allclose(np.linalg.svd(root)[1], [1.0, 1e-9], rtol=1e-6)


def test_no_inputs():
    with pytest.raises(ValueError, match=r"needs calibration inputs, and the problem has none; pass UpdateProblem\("):
        square_root(UpdateProblem(np.ones((2, 2))), np.float64)
