"""Running sums: the laws stand in the table of laws; here entries by their definition, and rows that see nothing."""

import numpy as np
import pytest

from nla_llm.operators import Step, SteppedLowRank

STEPS = [Step(0, 2, 0, 0), Step(2, 5, 0, 3), Step(5, 6, 3, 3), Step(6, 9, 3, 7)]


def factors(batch=(), seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((*batch, 9, 2), (*batch, 8, 2), (*batch, 2, 2))
    return [rng.random(shape) + 0.5 for shape in shapes]


def written_out(left, right, decay, steps):
    """Entry by entry: the decays of the steps with keys after that at which j entered, up to that at which i reads."""
    dense = np.zeros((left.shape[-2], right.shape[-2]))
    for i in range(len(left)):
        reading = next(t for t, s in enumerate(steps) if s.first_row <= i < s.last_row)
        for j in range(len(right)):
            entering = [t for t, s in enumerate(steps) if s.first_key <= j < s.last_key]
            if entering and entering[0] <= reading:
                moments = [t for t, s in enumerate(steps) if s.enters]
                later = [decay[e] for e, t in enumerate(moments) if entering[0] < t <= reading]
                dense[i, j] = np.sum(left[i] * right[j] * np.prod(later, axis=0) if later else left[i] * right[j])
    return dense


def test_entries_are_those_of_the_definition():
    left, right, decay = factors()
    op = SteppedLowRank(left, right, decay, STEPS, nonnegative=True)
    expected = written_out(left, right, decay, STEPS)
    assert np.count_nonzero(expected) == 4 * 3 + 3 * 7
    np.testing.assert_allclose(op.dense(), expected, rtol=1e-14)
    np.testing.assert_allclose(op @ np.eye(8), expected, rtol=1e-14)


def test_other_libraries_and_heads_of_either_side():
    strict = pytest.importorskip("array_api_strict")
    left, right, decay = factors((2, 3))
    op = SteppedLowRank(left, right[:, :1], decay, STEPS)
    other = SteppedLowRank(*(strict.asarray(a) for a in (left, right[:, :1], decay)), STEPS)
    x = np.random.default_rng(1).standard_normal((2, 1, 8, 4))
    for index in np.ndindex(2, 3):
        expected = written_out(left[index], right[index[0], 0], decay[index], STEPS)
        np.testing.assert_allclose(op.dense()[index], expected, rtol=1e-14)
        np.testing.assert_allclose((op @ x)[index], expected @ x[index[0], 0], atol=1e-13)
    np.testing.assert_allclose(np.asarray(other @ strict.asarray(x)), op @ x, atol=1e-13)


def test_without_keys_it_is_zero():
    left, right, decay = factors()
    op = SteppedLowRank(left, right, decay, [Step(0, 9, 0, 0)])
    assert op.dense().shape == (9, 8)
    assert not op.dense().any()
    assert not (op @ np.ones(8)).any()
