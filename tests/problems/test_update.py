"""Updates as arrays and as operators: sizes, precision, copies, refusals."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.operators import Dense, LowRank, Operator, SoftmaxAttention

EYE = np.eye(3)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def operators(xp):
    """Every class of which the arrays can be changed, each 6 x 5."""
    a, b, c = (xp.asarray(draw(s, *shape)) for s, shape in enumerate([(6, 5), (6, 2), (5, 2)]))
    dense, low = Dense(a), LowRank(b, c)
    return [dense, low, Dense(xp.matrix_transpose(a)).T, 2.0 * low, dense - low, dense @ (low.T @ dense)]


def test_update_between_two_matrices(xp):
    base, tuned = xp.asarray(draw(0, 5, 4)), xp.asarray(draw(1, 5, 4))
    problem = nl.UpdateProblem.between(base, tuned, inputs=xp.asarray(draw(2, 7, 4)))
    np.testing.assert_array_equal(to_numpy(problem.exact().dense()), draw(1, 5, 4) - draw(0, 5, 4))
    assert (problem.d_out, problem.d_in, problem.batch_shape, problem.structure) == (5, 4, (), frozenset())
    assert problem.exact().dtype == xp.float64
    single = problem.astype(xp.float32)
    assert all(a.dtype == xp.float32 for a in (single.delta, single.base, single.inputs))
    assert single.exact().dtype == xp.float64
    assert single.exact(xp.float32).dtype == xp.float32


def test_update_map_keeps_what_is_absent():
    doubled = nl.UpdateProblem(EYE, base=3 * EYE).map(lambda a: 2 * a)
    np.testing.assert_array_equal(doubled.exact().dense(), 2 * EYE)
    np.testing.assert_array_equal(doubled.base, 6 * EYE)
    assert doubled.inputs is None


def test_an_operator_is_taken_as_it_is(xp):
    for op in operators(xp):
        problem = nl.UpdateProblem(op, base=xp.asarray(draw(3, 6, 5)), inputs=Dense(xp.asarray(draw(4, 7, 5))))
        assert problem.operator is op
        assert (problem.d_out, problem.d_in, problem.batch_shape) == (6, 5, ())
        single = problem.astype(xp.float32)
        assert single.delta.dtype == single.base.dtype == single.inputs.dtype == xp.float32
        reference = single.exact()
        assert reference.dtype == xp.float64
        np.testing.assert_allclose(to_numpy(reference.dense()), to_numpy(op.dense()), rtol=0, atol=2e-5)
        np.testing.assert_array_equal(to_numpy(problem.exact(xp.float32).dense()), to_numpy(single.delta.dense()))


def test_references_of_operators_compute_in_float64():
    """Products in float32 would show: each entry of the reference is right to far more digits than they have."""
    for op in operators(np):
        narrow = op.map(lambda a: a.astype(np.float32))
        same = narrow.map(lambda a: a.astype(np.float64)).dense()
        wide = nl.UpdateProblem(narrow).exact()
        np.testing.assert_allclose(wide @ np.eye(5), same, rtol=0, atol=1e-13)
        np.testing.assert_allclose(wide.T @ np.eye(6), same.T, rtol=0, atol=1e-13)
        np.testing.assert_allclose(wide.rows(1, 4), same[1:4], rtol=0, atol=1e-13)


class Forbidding(Operator):
    """An operator that nobody may form."""

    def __init__(self, op):
        super().__init__(op.shape, op.like)
        self.op = op

    def apply(self, x):
        return self.op.apply(x)

    def apply_transpose(self, y):
        return self.op.apply_transpose(y)

    def rows(self, start, stop):
        raise AssertionError("formed")


def test_nothing_of_an_operator_is_formed():
    problem = nl.UpdateProblem(Forbidding(Dense(EYE)), inputs=Forbidding(Dense(EYE)))
    assert problem.exact().shape == (3, 3)
    assert problem.exact() is problem.delta  # it keeps its arrays to itself, so its precision is its own


def test_operators_that_cannot_be_changed_say_so():
    attention = SoftmaxAttention(EYE, EYE, scale=1.0)
    with pytest.raises(TypeError, match="the arrays behind SoftmaxAttention"):
        nl.UpdateProblem(attention).astype(np.float32)


def test_an_operator_has_to_fit():
    with pytest.raises(ValueError, match="base must have the shape of delta"):
        nl.UpdateProblem(Dense(EYE), base=np.eye(2))
    with pytest.raises(ValueError, match=r"inputs must be \(samples, d_in=3\)"):
        nl.UpdateProblem(Dense(EYE), inputs=Dense(np.eye(2)))
    with pytest.raises(ValueError, match="delta has an empty axis"):
        nl.UpdateProblem(LowRank(np.ones((0, 1)), np.ones((3, 1))))
