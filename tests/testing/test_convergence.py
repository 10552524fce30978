"""The rule of the ladder of budgets: who stops short of the target is rejected, who only takes long is not."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.methods import Properties
from nla_llm.operators import Dense
from nla_llm.testing.checks import convergence
from nla_llm.testing.checks.convergence import CONVERGENCE, LADDER
from nla_llm.testing.subject import Subject


@dataclass(frozen=True)
class Mixture:
    """Exact attention with a share of uniform attention in it, which depends on the budget: its relative error."""

    share: object
    m: int = 8
    largest: int = LADDER[-1]
    smallest: int = 1
    properties: ClassVar[Properties] = Properties(budget="m", converges=True, nonnegative=True)

    def __call__(self, problem, rng=None):
        if not self.smallest <= self.m <= self.largest:
            raise ValueError(f"m={self.m} is refused")
        wrong, uniform = self.share(self.m), nl.method("uniform")(problem).dense()
        return Dense((1 - wrong) * problem.exact().dense() + wrong * uniform)


@dataclass(frozen=True)
class Noisy(Mixture):
    """The same share in the mean, with a coin for each draw that makes it up to a fifth larger or smaller."""

    properties: ClassVar[Properties] = Properties(budget="m", converges=True, deterministic=False)

    def __call__(self, problem, rng=None):
        factor = 1.2 ** np.random.default_rng(rng).uniform(-1, 1)
        return Mixture(lambda m: min(1.0, factor * self.share(m)), self.m)(problem)


def verdicts(method):
    """Whether each check of convergence holds; the sentence where it cannot be made."""
    found = {}
    for check in CONVERGENCE[:2]:
        try:
            found[check.name] = check.run(Subject(method)).holds
        except AssertionError as broken:
            found[check.name] = str(broken)
    return found


SLOW = {
    "fourth root": lambda m: m**-0.25,
    "logarithm": lambda m: 1 / np.log2(2 * m),
    "root": lambda m: m**-0.5,
}
STUCK = {
    "far": lambda m: max(m**-0.5, 0.3),
    "near": lambda m: max(m**-0.5, 0.15),  # below the fifth of doing nothing, but it does not fall
    "never begins": lambda m: 1.0,
    "comes back": lambda m: 0.02 if m < 1000 else 0.15,
}


@pytest.mark.parametrize("kind", [Mixture, Noisy])
@pytest.mark.parametrize("name", SLOW)
def test_slow_is_accepted(kind, name):
    assert verdicts(kind(SLOW[name])) == {"converges": True, "error_falls": True}


@pytest.mark.parametrize("kind", [Mixture, Noisy])
@pytest.mark.parametrize("name", STUCK)
def test_what_stops_short_is_rejected(kind, name):
    found = verdicts(kind(STUCK[name]))
    assert False in found.values(), found
    assert found["converges"] == (name not in {"far", "never begins"})


def test_refused_budgets_are_left_out():
    """A ladder that ends at the number of tokens is enough where the method is exact there, and not where it is not."""
    n = convergence.TOKENS
    assert verdicts(Mixture(lambda m: 1 - m / n, largest=n)) == {"converges": True, "error_falls": True}
    assert verdicts(Mixture(lambda m: 1 - 0.5 * m / n, largest=n)) == {"converges": False, "error_falls": False}
    assert "was accepted, so nothing can fall" in verdicts(Mixture(lambda m: 0.1, largest=8))["error_falls"]
    assert "every budget" in verdicts(Mixture(lambda m: 0.1, largest=0))["converges"]


def test_the_ladder_ends_where_a_call_might_cost_too_much():
    """By the declared cost alone: with ten operations for each pair and unit it ends before the highest budget."""

    class Dear(Mixture):
        def cost(self, problem):
            pairs = nl.costs.symbols_of(problem).n_q ** 2
            return nl.costs.Cost(apply=nl.costs.Operations(add=10 * pairs * nl.costs.m))

    tried = []

    class Watched(Dear):
        def __call__(self, problem, rng=None):
            tried.append(self.m)
            return super().__call__(problem, rng)

    verdicts(Watched(lambda m: m**-0.25))
    assert max(tried) == 1024 < LADDER[-1]
    assert 10 * 37**2 * 1024 * 16**2 > convergence.MOST_OPERATIONS > 10 * 37**2 * 64 * 16**2


def test_arriving_at_rounding_is_enough():
    """Nothing has to fall from there, and no higher budget is tried."""
    tried = []

    class Watched(Mixture):
        def __call__(self, problem, rng=None):
            tried.append(self.m)
            return super().__call__(problem, rng)

    assert verdicts(Watched(lambda m: 1e-12)) == {"converges": True, "error_falls": True}
    assert set(tried) == {LADDER[0]}
