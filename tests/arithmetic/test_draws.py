import numpy as np
import pytest

from nla_llm.arithmetic import CountingGenerator, tally
from nla_llm.backend import generator

CALLS = {
    "standard_normal": ((3, 4),),
    "random": (7,),
    "normal": (0.0, 1.0, 5),
    "uniform": (0.0, 1.0, (2, 2)),
    "chisquare": (3, 6),
    "integers": (0, 10, 8),
    "choice": (10, 3),
    "permutation": (9,),
    "standard_gamma": (2.0, 4),
    "exponential": (1.0, 3),
}
DRAWN = {
    "standard_normal": 12,
    "random": 7,
    "normal": 5,
    "uniform": 4,
    "chisquare": 6,
    "integers": 8,
    "choice": 3,
    "permutation": 9,
    "standard_gamma": 4,
    "exponential": 3,
}


@pytest.mark.parametrize("name", CALLS)
def test_same_numbers_and_as_many_as_came_back(name):
    with tally() as t:
        drawn = getattr(CountingGenerator(np.random.default_rng(3)), name)(*CALLS[name])
    assert t.draw == DRAWN[name]
    assert np.array_equal(drawn, getattr(np.random.default_rng(3), name)(*CALLS[name]))


def test_it_advances_the_generator_that_it_was_made_of():
    rng = np.random.default_rng(0)
    CountingGenerator(rng).random(5)
    assert rng.random() == np.random.default_rng(0).random(6)[5]


def test_it_passes_for_a_generator():
    rng = CountingGenerator(np.random.default_rng(0))
    assert generator(rng) is rng
