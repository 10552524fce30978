"""Budgets within a number of operations."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.costs import affordable

PROBLEM = nl.AttentionProblem(np.zeros((96, 8)), np.zeros((96, 8)), np.zeros((96, 5)))


def cost(method, stage="total"):
    found = method.cost(PROBLEM).at(PROBLEM, method)
    return (found if stage == "total" else found.apply).total()


@pytest.mark.parametrize("stage", ["total", "apply"])
@pytest.mark.parametrize("name", ["positive_features", "trigonometric_features", "random_keys"])
def test_one_more_would_not_fit(name, stage):
    for operations in (3e4, 1e5, 3e5):
        found = affordable(nl.method(name, m=1), PROBLEM, operations, largest=10_000, stage=stage)
        assert cost(found, stage) <= operations < cost(nl.method(name, m=found.m + 1), stage)


def test_the_other_hyper_parameters_stay():
    found = affordable(nl.method("positive_features", m=7, orthogonal=True), PROBLEM, 1e6, largest=96)
    assert found.directions == "orthogonal"
    assert found.m > 7


@pytest.mark.parametrize(("name", "share"), [("monarch", 0.7), ("eva", 0.5), ("reformer", 0.3)])
def test_costs_that_fall_with_the_budget(name, share):
    """Large blocks, or few of them, are cheaper here than small ones: the first budget may fit where others do not."""
    x = np.zeros((256, 32))
    problem = nl.AttentionProblem(x, x)
    totals = {m: total_of(nl.method(name, m=m), problem) for m in range(1, 65)}
    assert min(np.diff(list(totals.values()))) < 0
    operations = share * nl.costs.exact_attention(problem).at(problem).total()
    fitting = [m for m, total in totals.items() if total <= operations]
    assert fitting
    assert affordable(nl.method(name, m=1), problem, operations, largest=64).m == fitting[-1]


def total_of(method, problem):
    return method.cost(problem).at(problem, method).total()


def test_no_more_than_the_largest():
    assert affordable(nl.method("random_keys", m=1), PROBLEM, 1e12, largest=96).m == 96


def test_what_costs_too_much_is_none():
    assert affordable(nl.method("optimal_rank", m=5), PROBLEM, 1000, largest=96) is None
    assert affordable(nl.method("optimal_rank", m=5), PROBLEM, 96 * 8 * 2 * 20, largest=96, stage="apply").m == 16


@pytest.mark.parametrize(("options", "word"), [({"stage": "prepare"}, "stage"), ({"largest": 0}, "largest")])
def test_bad_arguments_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        affordable(nl.method("elu_features"), PROBLEM, 1.0, **{"largest": 9, **options})
