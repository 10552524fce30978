"""A training step: gradients by differences, operations counted to the unit, memory."""

import numpy as np
import pytest
import sympy

from nla_llm import costs
from nla_llm.arithmetic import counted, tally
from nla_llm.methods.update.lora import steps
from nla_llm.methods.update.lora.factors import Factors

RNG = np.random.default_rng(2)
BATCH, D_IN, D_OUT, RANK = 5, 4, 3, 2
X, W, G = RNG.standard_normal((BATCH, D_IN)), RNG.standard_normal((D_OUT, D_IN)), RNG.standard_normal((BATCH, D_OUT))
PAIR = Factors(RNG.standard_normal((D_OUT, RANK)), RNG.standard_normal((RANK, D_IN)))
SIZES = {"b": BATCH, "d_in": D_IN, "d_out": D_OUT, "r": RANK}


def difference(loss, at, gradient):
    direction, h = RNG.standard_normal(at.shape), 1e-6
    slope = (loss(at + h * direction) - loss(at - h * direction)) / (2 * h)
    assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-7)


def test_gradients_of_the_full_step():
    step = steps.full_step(X, W, lambda y: G * y)

    def loss(x, weight):
        return 0.5 * np.sum(G * (x @ weight.T) ** 2)

    difference(lambda w: loss(X, w), W, step.parameters)
    difference(lambda x: loss(x, W), X, step.inputs)


def test_gradients_of_the_lora_step():
    step = steps.lora_step(X, W, PAIR, lambda y: G * y, scale=0.3)

    def loss(x, B, A):
        return 0.5 * np.sum(G * (x @ (W + 0.3 * B @ A).T) ** 2)

    difference(lambda B: loss(X, B, PAIR.A), PAIR.B, step.parameters.B)
    difference(lambda A: loss(X, PAIR.B, A), PAIR.A, step.parameters.A)
    difference(lambda x: loss(x, *PAIR), X, step.inputs)
    np.testing.assert_allclose(step.outputs, X @ steps.merge(W, PAIR, scale=0.3).T, rtol=0, atol=1e-13)


def counts(function):
    with tally() as t:
        function()
    return costs.Operations(**{kind: getattr(t, kind) for kind, _ in costs.Operations().items()})


def at(operations, **sizes):
    return operations.map(lambda x: int(sympy.sympify(x).subs(sizes)))


@pytest.mark.parametrize("sizes", [(5, 4, 3, 2), (7, 6, 11, 3), (1, 2, 2, 1)])
@pytest.mark.parametrize("inputs", [True, False])
def test_operations_to_the_unit(sizes, inputs):
    batch, d_in, d_out, r = sizes
    x, w, g = (counted(np.ones(s)) for s in ((batch, d_in), (d_out, d_in), (batch, d_out)))
    pair = Factors(counted(np.ones((d_out, r))), counted(np.ones((r, d_in))))
    known = dict(zip(("b", "d_in", "d_out", "r"), sizes, strict=True))
    full = counts(lambda: steps.full_step(x, w, lambda _: g, inputs=inputs))
    assert full == at(steps.full_step_cost(inputs=inputs), **known)
    adapted = counts(lambda: steps.lora_step(x, w, pair, lambda _: g, inputs=inputs))
    assert adapted == at(steps.lora_step_cost(inputs=inputs), **known)
    assert counts(lambda: steps.merge(w, pair)) == at(steps.merge_cost(), **known)


def test_the_published_formulas():
    b, d_i, d_o, r = steps.b, costs.d_in, costs.d_out, costs.r
    assert sympy.expand(steps.full_step_cost().matmuls() - 6 * b * d_i * d_o) == 0
    assert sympy.expand(steps.lora_step_cost().matmuls() - (4 * b * d_i * d_o + 6 * b * r * (d_i + d_o))) == 0
    first = steps.lora_step_cost(inputs=False).matmuls()
    assert sympy.expand(first - (2 * b * d_i * d_o + 6 * b * r * d_o + 4 * b * r * d_i)) == 0
    assert steps.merge_cost().matmuls() == 2 * d_i * d_o * r
    assert steps.merge_cost().add == d_i * d_o


def test_lora_saves_a_third_of_the_operations_and_not_a_factor_of_d_over_r():
    ratio = steps.lora_step_cost().matmuls() / steps.full_step_cost().matmuls()
    d = sympy.Symbol("d")
    square = sympy.expand(ratio.subs({costs.d_in: d, costs.d_out: d}))
    assert sympy.simplify(square - (sympy.Rational(2, 3) + 2 * costs.r / d)) == 0


@pytest.mark.torch
def test_matrix_products_against_the_counter_of_pytorch():
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    x, w, B, A = (torch.tensor(a) for a in (X, W, *PAIR))
    x.requires_grad_()
    B.requires_grad_()
    A.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        (x @ w.T + (x @ A.T) @ B.T).backward(torch.tensor(G))
    assert counter.get_total_flops() == at(costs.Operations(madd=steps.lora_step_cost().matmuls()), **SIZES).madd


def test_memory():
    assert steps.lora_memory("adam").total().subs(SIZES) == 4 * RANK * (D_IN + D_OUT)
    assert steps.full_memory("gradient_descent").total().subs(SIZES) == 2 * D_IN * D_OUT
    assert steps.lora_memory("momentum").state.subs(SIZES) == RANK * (D_IN + D_OUT)
    with pytest.raises(ValueError, match="optimiser must be one of"):
        steps.lora_memory("lion")


@pytest.mark.parametrize(("factor", "tolerance"), [(0.5, 1e-6), (0.9, 0.3), (1 / 3, 1e-10)])
def test_steps_to_a_tolerance_by_iterating(factor, tolerance):
    error, number = 1.0, 0
    while error > tolerance:
        error, number = error * factor, number + 1
    assert steps.steps_to_tolerance(tolerance, factor) == number
