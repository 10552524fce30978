import numpy as np
import pytest

from nla_llm.linalg import BlockKrylov
from nla_llm.operators import Dense


def space_of(matrix, columns, steps, xp=np, rider=None):
    rng = np.random.default_rng(3)
    start = xp.asarray(rng.standard_normal((*matrix.shape[:-2], matrix.shape[-1], columns)))
    space = BlockKrylov(Dense(xp.asarray(matrix)), start, rng=rng, rider=rider)
    for _ in range(steps):
        space.advance()
    return space, np.asarray(start)


def test_laws_of_the_basis(xp):
    matrix = np.random.default_rng(0).standard_normal((2, 25, 18))
    space, start = space_of(matrix, 3, 4, xp)
    basis, image, gram = (np.asarray(a) for a in (space.basis, space.image, space.gram))
    assert np.abs(np.swapaxes(basis, -1, -2) @ basis - np.eye(12)).max() < 1e-13
    assert np.abs(image - matrix @ basis).max() < 1e-12
    assert np.abs(gram - np.swapaxes(image, -1, -2) @ image).max() < 1e-11
    power = np.swapaxes(matrix, -1, -2) @ (matrix @ start)  # AᵀA X lies in the space, and so does (AᵀA)² X
    for x in (start, power, np.swapaxes(matrix, -1, -2) @ (matrix @ power)):
        assert np.abs(basis @ (np.swapaxes(basis, -1, -2) @ x) - x).max() < 1e-11 * np.abs(x).max()


def test_coupling_is_what_leaves_the_space():
    matrix = np.random.default_rng(0).standard_normal((25, 18))
    space, _ = space_of(matrix, 3, 3)
    coupling = space.coupling()
    leaving = matrix.T @ matrix @ space.basis
    leaving -= space.basis @ (space.basis.T @ leaving)
    assert np.abs(leaving[:, :-3]).max() < 1e-11
    assert np.isclose(np.linalg.norm(coupling), np.linalg.norm(leaving), rtol=1e-12)


def test_a_complete_space_holds_all_singular_values_and_refuses_to_grow():
    matrix = np.random.default_rng(0).standard_normal((12, 10))
    space, _ = space_of(matrix, 4, 3)
    assert space.complete
    assert np.allclose(space.ritz_values(), np.linalg.svd(matrix, compute_uv=False), rtol=1e-12)
    with pytest.raises(ValueError, match="already is all of"):
        space.advance()


def test_breakdown_is_survived_and_high_multiplicity_found():
    orthogonal = np.linalg.qr(np.random.default_rng(0).standard_normal((12, 12)))[0]
    space, _ = space_of(orthogonal[:, :9] @ orthogonal[:9], 2, 6)  # nine singular values of one, three of zero
    assert np.allclose(space.ritz_values(), [1] * 9 + [0] * 3, atol=1e-7)


def test_directions_that_join_are_in_the_space_and_the_coupling_still_is_what_leaves_it():
    matrix = np.diag(np.r_[np.full(6, 3.0), np.linspace(2, 1, 14)])
    space, _ = space_of(matrix, 3, 3)
    found, directions = space.outside()
    assert 2.9 < found <= 3  # three of the six vectors of the value 3 are out of reach
    assert np.abs(space.basis.T @ directions).max() < 1e-12
    space.join(directions)
    space.advance()
    assert space.size == 15
    assert np.abs(space.basis @ (space.basis.T @ directions) - directions).max() < 1e-12
    leaving = matrix.T @ matrix @ space.basis
    leaving -= space.basis @ (space.basis.T @ leaving)
    coupling = space.coupling()
    assert np.abs(leaving[:, :-6]).max() < 1e-11
    assert np.isclose(np.linalg.norm(coupling), np.linalg.norm(leaving), rtol=1e-10)
    assert np.sum(space.ritz_values() > 2.5) == 6  # without them three, whatever the number of steps


def test_the_rider_goes_through_the_power_method():
    matrix = np.abs(np.random.default_rng(0).standard_normal((9, 8)))
    space, _ = space_of(matrix, 2, 1, rider=np.ones((8, 1)))
    space.pull_back()
    assert np.allclose(space.rider_image, matrix @ np.ones((8, 1)), rtol=1e-14)
    assert np.allclose(space.rider_pulled, matrix.T @ matrix @ np.ones((8, 1)), rtol=1e-14)
