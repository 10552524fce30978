"""The law: what is counted equals the formula, as whole numbers, for every method and every shape."""

import numpy as np
import pytest
from costs.cost_rows import attention_problem, rows_of, smallest_size
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nla_llm as nl
from nla_llm.arithmetic import counted
from nla_llm.costs import Cost, Operations, UncountedWorkError, count, count_exact
from nla_llm.operators import Dense, Operator, Skeleton, SoftmaxAttention, TiledSparse

ATTENTION, UPDATE = rows_of("attention"), rows_of("update")
LAW = settings(suppress_health_check=[HealthCheck.too_slow])


@st.composite
def problems(draw, smallest, supports=frozenset({"causal", "key_mask"})):
    """Shapes, causal or not, masked or not, on both sides of a chunk of 64 rows and not divisible by it."""
    causal = "causal" in supports and draw(st.booleans())
    n_q = draw(st.integers(smallest, 150))
    n_k = n_q if causal else draw(st.integers(smallest, 150))
    d, d_v = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    return attention_problem(n_q, n_k, d, d_v, mask="key_mask" in supports and draw(st.booleans()), causal=causal)


def counted_and_formula(method, problem):
    return count(method, problem), method.cost(problem).at(problem, method)


@pytest.mark.parametrize("method", ATTENTION, ids=repr)
@LAW
@given(data=st.data())
def test_count_equals_formula(method, data):
    problem = data.draw(problems(smallest_size(method), method.properties.supports))
    really, formula = counted_and_formula(method, problem)
    assert really == formula
    assert really.total() > 0


@pytest.mark.parametrize("method", [m for m in UPDATE if "cost" not in m.properties.exceptions], ids=repr)
@LAW
@given(data=st.data())
def test_count_equals_formula_for_updates(method, data):
    shape = data.draw(st.tuples(*[st.integers(smallest_size(method), 40)] * 2))
    rng, samples = np.random.default_rng(0), data.draw(st.integers(smallest_size(method), 50))
    problem = nl.UpdateProblem(rng.standard_normal(shape), inputs=rng.standard_normal((samples, shape[1])))
    really, formula = counted_and_formula(method, problem)
    assert really == formula


@LAW
@given(
    n=st.integers(1, 60),
    window=st.none() | st.integers(1, 80),
    causal=st.booleans(),
    mask=st.booleans(),
    bias=st.booleans(),
)
def test_count_equals_formula_for_exact_attention(n, window, causal, mask, bias):
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, n, 3))
    key_mask = np.arange(n) % 3 > 0 if mask else None
    try:
        problem = nl.AttentionProblem(
            q, k, rng.standard_normal((n, 2)), causal=causal, window=window, key_mask=key_mask,
            bias=rng.standard_normal((n, n)) if bias else None,
        )  # fmt: skip
    except ValueError:  # the mask left a query without a key
        return
    assert count_exact(problem) == nl.costs.exact_attention(problem).at(problem)


@pytest.mark.parametrize("structure", [{}, {"causal": True}], ids=["full", "causal"])
def test_rows_in_several_blocks_count_the_same(monkeypatch, structure):
    problem = attention_problem(50, 50, **structure)
    whole = count_exact(problem)
    monkeypatch.setattr("nla_llm.operators.softmax._BLOCK_ENTRIES", 350)
    assert count_exact(problem) == whole


def test_every_registered_method_has_a_row_and_a_formula():
    assert {m.name for m in (*ATTENTION, *UPDATE)} >= set(nl.methods())
    assert all(hasattr(m, "cost") for m in (*ATTENTION, *UPDATE))


@pytest.mark.parametrize("method", ATTENTION, ids=repr)
@pytest.mark.parametrize("causal", [False, True])
def test_a_counted_run_has_the_values_of_the_plain_run(method, causal):
    """Equal to the last bit, but to rounding where NumPy takes a path of its own (causal, streamed, transforms)."""
    if causal and "causal" not in method.properties.supports:
        return
    problem = attention_problem(70, 70, causal=causal)
    plain = method(problem, 0)
    wrapped = problem.map(counted)
    values = (method(wrapped, 0) @ wrapped.v).array
    if not (
        causal
        or streamed(plain)
        or getattr(method, "core", "") == "optimal"
        or structured(method)
        or method.name == "gaussian_projection"
    ):  # streamed rows
        assert np.array_equal(values, plain @ problem.v)
        return
    # The features are the same numbers; sums of fewer than 70 · 32 products, then divided, may differ in their order.
    size = np.max(magnitude(plain) @ np.abs(problem.v))
    np.testing.assert_allclose(values, plain @ problem.v, rtol=0, atol=64 * np.finfo(float).eps * size)


def structured(method):
    """Whether fast transforms are a matrix product on NumPy."""
    return str(getattr(method, "directions", "")).startswith("hadamard")


def streamed(op):
    """Whether exact softmax rows are among the factors."""
    parts = [
        *getattr(op, "factors", ()),
        *getattr(op, "parts", ()),
        getattr(op, "left", None),
        getattr(op, "right", None),
    ]
    parts += [*getattr(op, "terms", ()), getattr(op, "op", None)]
    return isinstance(op, SoftmaxAttention | TiledSparse) or any(
        streamed(part) for part in parts if isinstance(part, Operator)
    )


def magnitude(op):
    """Sizes of the products that are summed up in the entries."""
    if isinstance(op, Skeleton):
        return op.left.dense() @ np.abs(op.core) @ op.right.dense()
    return np.abs(op.dense())


@pytest.mark.parametrize("causal", [False, True])
def test_a_counted_run_of_exact_attention_has_the_values_of_the_generic_run(causal):
    strict = pytest.importorskip("array_api_strict")
    problem = attention_problem(70, 70, causal=causal)
    other = problem.map(strict.asarray)
    wrapped = problem.map(counted)
    assert np.array_equal((wrapped.exact() @ wrapped.v).array, np.asarray(other.exact() @ other.v))


@pytest.mark.parametrize("method", ATTENTION[:3], ids=repr)
def test_costs_are_per_head(method):
    many = attention_problem(20, 20, batch=(2, 3))
    assert count(method, many) == count(method, many.head((1, 2)))
    assert method.cost(many).at(many, method) == count(method, many)


def test_the_count_does_not_depend_on_the_draw():
    method, problem = nl.method("positive_features", m=5, orthogonal=True), attention_problem(9, 11)
    assert count(method, problem, rng=0) == count(method, problem, rng=np.random.default_rng(7))


def test_values_shared_by_all_heads_of_v_alone_are_counted_once():
    q, v = np.ones((6, 2)), np.ones((4, 6, 3))
    assert count_exact(nl.AttentionProblem(q, q, v)).apply.madd == 36 * (2 + 3)


def test_without_values_it_applies_to_as_many_columns_as_d():
    q = np.ones((6, 2))
    assert count_exact(nl.AttentionProblem(q, q)).apply.madd == 36 * (2 + 2)


def test_a_method_that_leaves_for_numpy_is_not_believed():
    def sneaky(problem, rng):
        q, k = (nl.backend.to_numpy(x) for x in (problem.q, problem.k))
        return Dense(nl.backend.from_numpy(np.exp(q @ k.T), like=problem.q))

    problem = attention_problem(5, 5)
    with pytest.raises(UncountedWorkError, match="40 array entries"):
        count(sneaky, problem)
    assert count(sneaky, problem, partial=True) == Cost(apply=Operations(madd=75))


def test_a_method_of_somebody_else_needs_no_formula():
    def mine(problem, rng):
        return Dense(problem.q @ problem.xp.matrix_transpose(problem.k))

    assert count(mine, attention_problem(5, 6, 4, 3)).prepare == Operations(madd=120)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("elu_features", {}),
        ("positive_features", {"m": 7}),
        ("trigonometric_features", {"m": 7}),
        ("hyperbolic_features", {"m": 7}),
        ("random_keys", {"m": 7}),
    ],
)
def test_multiply_adds_are_those_that_torch_counts(name, options):
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    problem, method = attention_problem(20, 30), nl.method(name, **options)
    tensors = problem.map(torch.from_numpy)
    with FlopCounterMode(display=False) as counter:
        method(tensors, 0) @ tensors.v
    assert counter.get_total_flops() == count(method, problem).matmuls()
