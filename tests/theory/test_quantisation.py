"""The promised error of a quantised Gaussian matrix against draws, and in cases that can be done by hand."""

import numpy as np
import pytest

from nla_llm.arithmetic.quantisers import quantiser
from nla_llm.theory.quantisation import gaussian_error


@pytest.mark.parametrize("block", [2, 16, 64, 1000])
@pytest.mark.parametrize("name", ["nf4", "int4", "int8", "int2"])
def test_error_on_gaussian_entries(name, block):
    q, x = quantiser(name, block), np.random.default_rng(0).standard_normal((200, 1000))
    means = np.mean((q(x).matrix - x) ** 2, axis=1)  # a row is a whole number of blocks, or its end touches the next
    deviation = (means.mean() - gaussian_error(q.levels, block)) / (means.std(ddof=1) / np.sqrt(means.size))
    assert abs(deviation) < 4


def test_two_entries_and_two_levels():
    """The smaller modulus of two normal entries is rounded up to the larger: E (|x| − |y|)²/2 = 1 − 2/π."""
    assert abs(gaussian_error([-1.0, 1.0], 2) - (1 - 2 / np.pi)) < 1e-9


def test_many_levels_leave_the_error_of_uniform_rounding():
    """Gap²/12 with the mean squared scale, as for numbers far apart compared with the gap."""
    block, m = 64, np.abs(np.random.default_rng(1).standard_normal((100_000, 64))).max(axis=1)
    levels = np.linspace(-1, 1, 2**12 + 1)
    want = (1 - 1 / block) * np.mean(m**2) * (2 / 2**12) ** 2 / 12
    assert abs(gaussian_error(levels, block) / want - 1) < 5e-3


@pytest.mark.parametrize(
    ("levels", "block", "sentence"),
    [
        ([-1.0, 0.5], 4, "levels must ascend from -1 to 1"),
        ([-1.0, 0.5, 0.5, 1.0], 4, "levels must ascend from -1 to 1"),
        ([-1.0, 1.0], 0, "block must be at least 1"),
    ],
)
def test_refusals(levels, block, sentence):
    with pytest.raises(ValueError, match=sentence):
        gaussian_error(levels, block)
