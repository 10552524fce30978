import pytest
import sympy
from costs.cost_rows import attention_problem

import nla_llm as nl
from nla_llm.costs import Cost, Operations, crossover, d, exact_attention, m, n


@pytest.fixture
def problem():
    return attention_problem(128, 128)


def cost(name, problem, **options):
    return nl.method(name, **options).cost(problem)


@pytest.mark.parametrize(
    ("name", "options", "closed_form"),
    [
        ("elu_features", {}, d + sympy.Rational(1, 2)),
        ("relu_features", {}, d + sympy.Rational(1, 2)),
        ("positive_features", {"m": 8}, 2 * m + m / (2 * d)),
        ("hyperbolic_features", {"m": 8}, 3 * m + m / d),
        ("random_keys", {"m": 8}, m),
        ("uniform", {}, 1 + 1 / (2 * d)),
    ],
)
def test_closed_forms_of_multiply_adds(name, options, closed_form, problem):
    found = crossover(exact_attention(problem), cost(name, problem, **options), "n", matmuls=True, d_v="d")
    assert sympy.simplify(found - closed_form) == 0


def test_features_pay_beyond_515_tokens_at_usual_sizes(problem):
    found = crossover(
        exact_attention(problem), cost("positive_features", problem, m=8), n, matmuls=True, d=64, d_v=64, m=256
    )
    assert found == 514
    exact = exact_attention(problem).subs(d=64, d_v=64).matmuls()
    features = cost("positive_features", problem, m=8).subs(d=64, d_v=64, m=256).matmuls()
    assert exact.subs(n, 514) == features.subs(n, 514)
    assert exact.subs(n, 515) > features.subs(n, 515)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("name", "options"), [("elu_features", {}), ("positive_features", {"m": 8, "orthogonal": True})]
)
def test_totals_change_order_at_the_crossover(name, options, causal):
    problem = attention_problem(128, 128, causal=causal)
    sizes = {"d": 64, "d_v": 64, "m": 256, "c": 64}
    exact, other = exact_attention(problem), cost(name, problem, **options)
    found = crossover(exact, other, **sizes)
    symbolic = crossover(exact, other, d_v="d")
    assert symbolic.free_symbols <= set(sympy.symbols("d m c"))
    assert float(symbolic.subs(sizes)) == pytest.approx(float(found), rel=1e-12)
    below = 64 * int(found / 64)  # whole chunks, where the smooth formulas are the true ones
    for tokens, cheaper in ((below, False), (below + 64, True)):
        at = {**sizes, "n": tokens}
        assert (other.subs(at).total() < exact.subs(at).total()) == cheaper


def test_two_linear_costs_cross_in_another_symbol(problem):
    elu, positive = cost("elu_features", problem), cost("positive_features", problem, m=8)
    in_n = crossover(positive, elu, "n")
    assert 0 < in_n.subs({"d": 64, "d_v": 64, "m": 256}) < 1  # the one is cheaper from the first token on
    found = float(crossover(positive, elu, "d", d_v="d", n=4096, m=256))
    assert found == pytest.approx(float(crossover(positive, elu, "d", d_v="d").subs({"n": 4096, "m": 256})))
    for size, cheaper in ((int(found), True), (int(found) + 1, False)):
        at = {"n": 4096, "m": 256, "d": size, "d_v": size}
        assert (elu.subs(at).total() < positive.subs(at).total()) == cheaper


def test_sorting_has_no_closed_form_but_a_number(problem):
    keys = cost("random_keys", problem, m=8)
    with pytest.raises(ValueError, match="give numbers to d, d_v, m"):
        crossover(exact_attention(problem), keys)
    found = float(crossover(exact_attention(problem), keys, d=64, d_v=64, m=256))
    gap = exact_attention(problem).total() - keys.total()
    signs = [gap.subs({"n": int(found * s), "d": 64, "d_v": 64, "m": 256}) > 0 for s in (0.97, 1.03)]
    assert signs == [False, True]


def test_the_optimum_never_pays(problem):
    assert crossover(exact_attention(problem), cost("optimal_rank", problem, m=8)) == 0


def test_what_cannot_cross_is_refused(problem):
    exact = exact_attention(problem)
    with pytest.raises(ValueError, match="same expression"):
        crossover(exact, exact)
    with pytest.raises(ValueError, match="does not depend on n_q"):
        crossover(exact, Cost(apply=Operations(madd=n)), "n_q")


def test_unequal_lengths_can_be_made_equal():
    wide = attention_problem(10, 20)
    found = crossover(exact_attention(wide), cost("elu_features", wide), "n", matmuls=True, n_q="n", n_k="n", d_v="d")
    assert sympy.simplify(found - d - sympy.Rational(1, 2)) == 0
