"""The verb cost: formulas, numbers and crossovers are those of the package."""

import re

import numpy as np
import pytest
import sympy

import nla_llm as nl
from nla_llm.cli.costs import formula

LATER = """
class Mine:
    def __call__(self, problem, rng=None):
        return problem.exact()
"""


def total_of(out, name):
    line = [line for line in out.splitlines() if line.strip().startswith(name)][-1]
    return int(re.search(r"[\d,]{5,}", line)[0].replace(",", ""))


@pytest.mark.parametrize("causal", [False, True])
def test_totals_are_those_of_the_counted_run(nla, causal):
    """The number shown is what the code really does, counted; exact attention's is by its formula."""
    out = nla("cost", "elu_features", "random_keys", "--n", 48, "--d", 8, "--m", 4, *["--causal"][:causal]).out
    q, k, v = np.random.default_rng(0).standard_normal((3, 48, 8))
    problem = nl.AttentionProblem(q, k, v, causal=causal)
    for name, method in {
        "elu_features": nl.method("elu_features"),
        "random_keys": nl.method("random_keys", m=4),
    }.items():
        assert total_of(out, name) == nl.costs.count(method, problem, rng=0).total()
    assert total_of(out, "exact attention") == nl.costs.count_exact(problem).total()


def test_crossovers_as_formula_and_as_number(nla):
    out = nla("cost", "elu_features", "optimal_rank", "--d", 64).out
    line = next(line for line in out.splitlines() if line.strip().startswith("elu_features ") and "%" in line)
    assert line.rstrip().endswith("d + 1/2")
    assert " 65 " in line
    assert "never" in next(
        line for line in out.splitlines() if line.strip().startswith("optimal_rank ") and "%" in line
    )


def test_a_long_crossover_stands_below_the_table(nla):
    out = nla("cost", "elu_features", "--causal").out
    assert "see below" in out
    line = out.strip().splitlines()[-1]
    assert re.fullmatch(r"by multiply-adds, elu_features is cheaper for n > .*sqrt\(.*\).*", line)


def test_an_update_method_is_not_compared_with_attention(nla):
    out = nla("cost", "truncated_svd", "--n", 64, "--m", 4).out
    assert "exact attention" not in out
    assert "d_out = 64" in out


def test_options_in_the_name(nla):
    """A budget of its own goes before --m."""
    out = nla("cost", "random_keys:m=2", "random_keys", "--m", 8, "--n", 32, "--d", 4).out
    assert "m = 2," in out
    assert "m = 8," in out


def test_the_plot_is_drawn_into_the_file(nla, tmp_path):
    outcome = nla("cost", "elu_features", "uniform", "--n", 64, "--plot", "cost.svg")
    assert outcome.code == 0
    text = (tmp_path / "cost.svg").read_text()
    assert text.count("<path") > 10
    assert "wrote cost.svg" in outcome.out


def test_a_method_without_a_cost_is_named(nla, tmp_path):
    (tmp_path / "later_cost.py").write_text(LATER)
    assert "has no cost" in nla("cost", "later_cost:Mine").sentence


def test_formula_is_short_and_equal_to_the_expression():
    n, d = sympy.symbols("n d")
    assert formula(n**2 * d * 2 + n**12) == "2 d n² + n**12"
    assert formula(n * (n + 1) / 2) == "n (n + 1)/2"


def test_roundings_remainders_and_logarithms_are_written_as_in_a_paper():
    n, m = sympy.symbols("n m")
    assert formula(n * sympy.ceiling(n / m) ** 2) == "n ⌈n/m⌉²"
    assert formula(3 * m * sympy.Mod(n, m)) == "3 m (n mod m)"
    assert formula(sympy.Mod(n + 1, 16 * m) + 1) == "((n + 1) mod (16 m)) + 1"
    assert formula(n * sympy.floor(sympy.log(n / m, 2))) == "n ⌊lg(n/m)⌋"
    assert formula(n * sympy.log(n)) == "n log(n)"


def test_a_form_that_does_not_exist_is_refused_before_anything_is_shown(nla):
    outcome = nla("cost", "elu_features", "lara", "--causal")
    assert "lara has no form with causal" in outcome.sentence
    assert "multiply" not in outcome.out


def test_sorting_has_no_closed_form_and_still_a_number(nla):
    out = nla("cost", "hyper_attention", "--m", 16, "--n", 512).out
    line = [line for line in out.splitlines() if line.strip().startswith("hyper_attention")][-1]
    assert line.rstrip().endswith("no closed form")
    assert re.search(r"% +\d+ ", line)
