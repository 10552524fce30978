import numpy as np
import pytest
from scipy.linalg import hadamard

from nla_llm.backend import to_numpy
from nla_llm.linalg import next_power_of_two, walsh_hadamard
from nla_llm.linalg.hadamard import _in_chunks

EPS = np.finfo(np.float64).eps


@pytest.mark.parametrize("size", [1, 2, 4, 8, 64, 256])
def test_transform_is_the_product_with_sylvesters_matrix(size):
    x = np.random.default_rng(0).standard_normal((3, 5, size))
    kept = x.copy()
    got = walsh_hadamard(x)
    assert np.abs(got - x @ hadamard(size)).max() < 20 * EPS * np.linalg.norm(x, axis=-1).max() * np.sqrt(size)
    np.testing.assert_array_equal(x, kept)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_libraries_do_the_same_additions_in_the_same_order(dtype, xp):
    x = np.random.default_rng(1).standard_normal((700, 64)).astype(dtype)  # several chunks, the last one shorter
    want = walsh_hadamard(x)
    got = walsh_hadamard(xp.asarray(x))
    assert to_numpy(got).dtype == want.dtype == dtype
    np.testing.assert_array_equal(to_numpy(got), want)


def test_lengths_beyond_a_chunk():
    x = np.zeros((2, 1 << 15))
    x[1, 5] = 1.0
    got = _in_chunks(x)
    assert not got[0].any()
    signs = np.array([(-1) ** (i & 5).bit_count() for i in range(1 << 15)])
    np.testing.assert_array_equal(got[1], signs)


def test_twice_is_the_length():
    x = np.random.default_rng(2).standard_normal((4, 32))
    np.testing.assert_allclose(walsh_hadamard(walsh_hadamard(x)), 32 * x, rtol=0, atol=100 * EPS * 32)


def test_additions_are_counted():
    from nla_llm.arithmetic import counted, tally

    with tally() as t:
        walsh_hadamard(counted(np.ones((3, 16))))
    assert (t.add, t.mul, t.madd) == (3 * 16 * 4, 0, 0)


@pytest.mark.parametrize("size", [0, 3, 12])
def test_other_lengths_are_refused(size):
    with pytest.raises(ValueError, match=f"power of two as its length, got {size}"):
        walsh_hadamard(np.zeros((2, size)))


def test_powers_of_two():
    assert [next_power_of_two(n) for n in (1, 2, 3, 5, 8, 1000)] == [1, 2, 4, 8, 8, 1024]
    with pytest.raises(ValueError, match="n must be at least 1"):
        next_power_of_two(0)
