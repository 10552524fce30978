import numpy as np
import pytest
from costs.cost_rows import attention_problem, rows_of

import nla_llm as nl
from nla_llm.costs import count, count_exact, table


@pytest.mark.parametrize("causal", [False, True])
def test_rows_are_the_counts(causal):
    problem = attention_problem(80, 80, causal=causal)
    methods = {repr(m): m for m in rows_of("attention")[::4] if problem.structure <= m.properties.supports}
    rows = list(table(methods, problem))
    assert [row.name for row in rows] == ["exact", *methods]
    assert rows[0].value == count_exact(problem)
    for row in rows[1:]:
        assert row.value == count(methods[row.name], problem)


def test_beyond_the_crossover_it_is_cheaper_than_exact_attention():
    problem = attention_problem(200, 200, 8, 8)
    rows = {row.name: row for row in table([nl.method("elu_features"), nl.method("optimal_rank", m=2)], problem)}
    assert rows["exact"].crossover is None
    assert rows["optimal_rank"].crossover is None
    beyond = int(rows["elu_features"].crossover) + 1
    for n, cheaper in ((beyond, True), (beyond - 1, False)):
        values = {"n": n, "d": 8, "d_v": 8}
        assert (rows["elu_features"].cost.subs(values).total() < rows["exact"].cost.subs(values).total()) == cheaper


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("method", rows_of("attention"), ids=repr)
def test_crossovers_are_those_of_the_numbers_however_short_the_problem(method, causal):
    """A problem shorter than a chunk has the crossover of a longer one."""
    problem = attention_problem(24, 24, causal=causal)
    if not problem.structure <= method.properties.supports:
        return
    exact, row = table([method], problem)
    longer = table([method], attention_problem(96, 96, causal=causal)).rows[1]
    assert row.crossover == longer.crossover

    def cheaper(n):
        there = attention_problem(n, n, causal=causal)
        return method.cost(there).at(there, method).total() < exact.cost.at(there).total()

    if row.crossover is None:
        assert not cheaper(10**5)
        return
    beyond = int(row.crossover)
    assert all(cheaper(n) for n in (2 * beyond + 128, 10 * beyond + 10**4))
    assert beyond <= 128 or not cheaper(beyond // 2)


def test_a_bias_is_added_on_both_sides():
    n = 12
    problem = attention_problem(n, n, bias=np.zeros((n, n)))
    beyond = table([nl.method("top_k", m=2)], problem).rows[1].crossover
    assert beyond == table([nl.method("top_k", m=2)], attention_problem(n, n)).rows[1].crossover


def test_what_a_method_has_no_form_of_is_refused():
    with pytest.raises(ValueError, match="lara has no form with causal"):
        table([nl.method("elu_features"), nl.method("lara", m=4)], attention_problem(20, 20, causal=True))


def test_what_costs_the_same_is_never_cheaper():
    class Exact:
        def cost(self, problem):
            return nl.costs.exact_attention(problem)

    assert table([Exact()], attention_problem(20, 20)).rows[1].crossover is None


def test_a_symbol_without_a_value_is_named():
    class Open:
        def cost(self, problem):
            return nl.costs.Cost(apply=nl.costs.Operations(madd=nl.costs.c * nl.costs.n))

    with pytest.raises(ValueError, match="no value for c"):
        table([Open()], attention_problem(20, 20))


def test_a_mask_of_keys_has_no_crossover_in_n():
    row = table([nl.method("elu_features")], attention_problem(20, 20, mask=True)).rows[1]
    assert row.crossover is None


FIXED = [m for m in rows_of("update") if "cost" not in m.properties.exceptions]  # whose size is known beforehand


def test_updates_have_no_exact_row():
    rows = table(FIXED, nl.UpdateProblem(np.ones((6, 5)), inputs=np.ones((7, 5)))).rows
    assert {row.name for row in rows} == {method.name for method in FIXED}


def test_displays():
    shown = table([nl.method("elu_features")], attention_problem(64, 64))
    lines = str(shown).splitlines()
    assert len(lines) == len(shown) + 1 == 3
    assert len({len(line) for line in lines}) == 1
    assert f"{shown.rows[1].value.total():,}" in lines[2]
    assert shown._repr_html_().count("<tr>") == 3
