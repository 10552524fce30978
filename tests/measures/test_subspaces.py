import numpy as np
import pytest
from scipy.linalg import subspace_angles

from nla_llm.linalg import haar_orthogonal
from nla_llm.measures import principal_angles, subspace_similarity


def test_angles_of_a_known_construction(xp):
    angles = np.array([0.0, 1e-9, 1e-3, 0.7, 1.2, np.pi / 2])
    frame = haar_orthogonal(20, rng=0)
    u, w = frame[:, :6], frame[:, 6:12]
    v = u * np.cos(angles) + w * np.sin(angles)
    mixed = v @ np.random.default_rng(0).standard_normal((6, 6))
    found = principal_angles(xp.asarray(3 * u), xp.asarray(mixed))
    assert np.abs(found - angles).max() < 1e-13 * np.linalg.cond(mixed)


@pytest.mark.parametrize(("r", "s"), [(3, 5), (5, 3), (4, 4)])
def test_angles_agree_with_scipy(r, s):
    rng = np.random.default_rng(1)
    u, v = rng.standard_normal((12, r)), rng.standard_normal((12, s))
    assert np.allclose(principal_angles(u, v), subspace_angles(u, v)[::-1], rtol=1e-12)


def test_angles_are_batched_and_symmetric():
    u, v = np.random.default_rng(2).standard_normal((2, 4, 10, 3))
    assert principal_angles(u, v).shape == (4, 3)
    assert np.allclose(principal_angles(u, v), principal_angles(v, u), rtol=1e-12)
    assert np.allclose(principal_angles(u, v)[1], principal_angles(u[1], v[1]), rtol=1e-12)


def test_dependent_columns_and_unequal_rows_are_refused():
    with pytest.raises(ValueError, match="columns of V are linearly dependent"):
        principal_angles(np.eye(4)[:, :2], np.ones((4, 2)))
    with pytest.raises(ValueError, match="same number of rows"):
        principal_angles(np.eye(4), np.eye(5))


def test_similarity_is_the_mean_squared_cosine(xp):
    u, v = haar_orthogonal(15, 0)[:, :6], haar_orthogonal(15, 1)[:, :4]
    estimate = subspace_similarity(xp.asarray(u), xp.asarray(v), 5, 4)
    truth = (np.cos(subspace_angles(u[:, :5], v)) ** 2).sum() / 4
    assert estimate.contains(truth)
    assert subspace_similarity(u, u[:, :2]).contains(1.0)
    assert float(subspace_similarity(haar_orthogonal(15, 0)[:, :3], haar_orthogonal(15, 0)[:, 3:6])) < 1e-28


def test_random_spaces_have_the_mean_of_theory():
    n, i, j = 12, 3, 5
    a, b = haar_orthogonal(n, 0, batch=(2000,))[..., :i], haar_orthogonal(n, 1, batch=(2000,))[..., :j]
    values = subspace_similarity(a, b).value
    assert abs(values.mean() - max(i, j) / n) < 4 * values.std() / np.sqrt(2000)


def test_bases_that_are_not_orthonormal_are_refused():
    with pytest.raises(ValueError, match="columns of B are not orthonormal"):
        subspace_similarity(np.eye(4), 2 * np.eye(4))
    with pytest.raises(ValueError, match=r"i and j must lie in 1\.\.4"):
        subspace_similarity(np.eye(4), np.eye(4), 5, 1)


@pytest.mark.parametrize("bad", [np.full((4, 2), np.nan), np.ones((4, 0))])
def test_what_spans_no_space_is_refused(bad):
    with pytest.raises(ValueError, match=r"V (has entries that are NaN or infinite|must be \(\.\.\., n, r\))"):
        principal_angles(np.eye(4)[:, :2], bad)
