import numpy as np
import pytest
from scipy.linalg import subspace_angles

from nla_llm.linalg import haar_orthogonal
from nla_llm.measures import amplification, intruder_dimensions, principal_angles, subspace_similarity
from nla_llm.theory.updates import random_projection_norm


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


# -- directions of an update -------------------------------------------------------------------------------------------


def test_intruders_are_counted_against_all_vectors_of_the_base():
    """Mixed at known angles: the largest cosine is compared, whichever vector of the base has it."""
    base = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))[0]
    cosines = np.array([0.95, 0.7, 0.5])
    mixed = base[:, [7, 2, 4]] * cosines + base[:, [8, 9, 10]] * np.sqrt(1 - cosines**2)
    for threshold, expected in ((0.4, 0), (0.6, 0), (0.75, 1), (0.9, 2), (0.96, 3)):
        best = np.maximum(cosines, np.sqrt(1 - cosines**2))
        assert np.sum(best < threshold) == expected
        assert intruder_dimensions(mixed, base, threshold) == (expected, expected)


def test_a_part_of_the_base_gives_a_range():
    base = np.eye(6)
    assert intruder_dimensions(base[:, :2], base[:, :1]) == (0, 1)
    assert intruder_dimensions(base[:, :3], base[:, :1], bound=np.array([1.0, 0.5, 0.7])) == (1, 2)
    with pytest.raises(ValueError, match="not orthonormal"):
        intruder_dimensions(2 * base[:, :2], base)


def test_amplification_of_random_directions_is_that_of_the_theory():
    """Root mean square over draws of ‖UᵀWV‖_F, beside r‖W‖_F/√(d_out d_in)."""
    rng = np.random.default_rng(1)
    w = rng.standard_normal((40, 60)) * np.logspace(0, -1, 60)
    within = []
    for _ in range(400):
        u, v = (np.linalg.qr(rng.standard_normal((n, 3)))[0] for n in w.shape)
        within.append(1.0 / amplification(1.0, u, v, w))
    expected = random_projection_norm(float(np.linalg.norm(w)), 3, *w.shape)
    assert np.sqrt(np.mean(np.square(within))) == pytest.approx(expected, rel=0.05)
    assert amplification(1.0, np.eye(3)[:, :1], np.eye(3)[:, :1], np.zeros((3, 3))) == np.inf
