import numpy as np
import pytest
from costs.cost_rows import attention_problem, rows_of

import nla_llm as nl
from nla_llm.costs import count, count_exact, table


@pytest.mark.parametrize("causal", [False, True])
def test_rows_are_the_counts(causal):
    problem = attention_problem(80, 80, causal=causal)
    methods = {repr(m): m for m in rows_of("attention") if not (causal and getattr(m, "recentre", False))}
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


def test_a_mask_of_keys_has_no_crossover_in_n():
    row = table([nl.method("elu_features")], attention_problem(20, 20, mask=True)).rows[1]
    assert row.crossover is None


def test_updates_have_no_exact_row():
    rows = table(rows_of("update"), nl.UpdateProblem(np.ones((6, 5)))).rows
    assert [row.name for row in rows] == ["truncated_svd", "zero_update"]


def test_displays():
    shown = table([nl.method("elu_features")], attention_problem(64, 64))
    lines = str(shown).splitlines()
    assert len(lines) == len(shown) + 1 == 3
    assert len({len(line) for line in lines}) == 1
    assert f"{shown.rows[1].value.total():,}" in lines[2]
    assert shown._repr_html_().count("<tr>") == 3
