"""Each rule against what is known of it: closed forms of one step, local rates, PyTorch, subspace iteration."""

from dataclasses import replace

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.linalg import haar_orthogonal
from nla_llm.methods.update.lora.factors import Factors
from nla_llm.methods.update.lora.objectives import regression
from nla_llm.methods.update.lora.optimisers import OPTIMISERS, RATIO
from nla_llm.methods.update.lora.training import train
from nla_llm.problems import gallery
from nla_llm.theory import low_rank_training as theory

RNG = np.random.default_rng(5)
DELTA = RNG.standard_normal((6, 5))
PROBLEM = nl.UpdateProblem(DELTA, inputs=RNG.standard_normal((20, 5)))
PAIR = Factors(RNG.standard_normal((6, 2)), RNG.standard_normal((2, 5)))


def run(name, steps, lr, pair=PAIR, kind="data", *, scale=0.7, problem=PROBLEM):
    loss, rule = regression(problem, kind, scale=scale), OPTIMISERS[name]
    state = rule.start(loss, pair)
    for t in range(1, steps + 1):
        pair, state = rule.step(loss, pair, state, lr, t)
    return pair


@pytest.mark.torch
@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("gradient_descent", lambda torch, p: torch.optim.SGD(p, lr=0.01)),
        ("momentum", lambda torch, p: torch.optim.SGD(p, lr=0.01, momentum=0.9)),
        ("adam", lambda torch, p: torch.optim.Adam(p, lr=0.01)),
        (
            "lora_plus",
            lambda torch, p: torch.optim.Adam([{"params": p[:1], "lr": 0.01 * RATIO}, {"params": p[1:]}], lr=0.01),
        ),
    ],
)
def test_against_pytorch(name, made):
    torch = pytest.importorskip("torch")
    B, A = (torch.tensor(f, requires_grad=True) for f in PAIR)
    x, delta = torch.tensor(PROBLEM.inputs), torch.tensor(DELTA)
    rule = made(torch, [B, A])
    for _ in range(20):
        rule.zero_grad()
        loss = 0.5 * ((x @ (0.7 * B @ A - delta).T) ** 2).sum() / len(x)
        loss.backward()
        rule.step()
    for ours, theirs in zip(run(name, 20, 0.01), (B, A), strict=True):
        np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=0, atol=1e-10)


def test_scaled_gd_does_not_see_the_basis_between_the_factors():
    """B Q, Q⁻¹ A is the same product and stays so, which gradient descent does not offer."""
    q = RNG.standard_normal((2, 2))
    turned = Factors(PAIR.B @ q, np.linalg.solve(q, PAIR.A))
    products = [np.matmul(*run("scaled_gd", 5, 0.3, pair)) for pair in (PAIR, turned)]
    np.testing.assert_allclose(*products, rtol=0, atol=1e-9)
    plain = [np.matmul(*run("gradient_descent", 5, 0.05, pair)) for pair in (PAIR, turned)]
    assert np.abs(plain[0] - plain[1]).max() > 1e-3


def test_scaled_gd_does_not_see_the_scale():
    """s·BA moves alike whatever s, from factors with the same product, and alike for a multiple of the update."""
    pairs = {s: Factors(PAIR.B / s, PAIR.A) for s in (1.0, 0.1)}
    one, tenth = (s * np.matmul(*run("scaled_gd", 5, 0.3, pair, scale=s)) for s, pair in pairs.items())
    np.testing.assert_allclose(one, tenth, rtol=0, atol=1e-9)
    large = nl.UpdateProblem(1e3 * DELTA, inputs=PROBLEM.inputs)
    moved = np.matmul(*run("scaled_gd", 5, 0.3, Factors(1e3 * PAIR.B, PAIR.A), scale=1.0, problem=large))
    np.testing.assert_allclose(moved, 1e3 * one, rtol=0, atol=1e-6)


def test_scaled_gd_from_zero_projects_on_the_row_space_first():
    pair = run("scaled_gd", 1, 1.0, Factors(np.zeros((6, 2)), PAIR.A), "frobenius")
    projector = np.linalg.pinv(PAIR.A) @ PAIR.A
    np.testing.assert_allclose(0.7 * np.matmul(*pair), DELTA @ projector, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(pair.A, PAIR.A)


@pytest.mark.parametrize("condition", [1.0, 10.0, 1000.0])
def test_local_factor_of_scaled_gd(condition):
    """Once near, every step multiplies the error by max(|1 − η|, |1 − 2η|), whatever the condition."""
    problem = gallery.prescribed_spectrum_update(np.geomspace(1, 1 / condition, 3), 12, 10)
    adapter = nl.method("lora", rank=3, lr=0.4, steps=50)
    errors = train(adapter, problem, rng=0, record=(40, 50))["frobenius"]
    assert (errors[-1] / errors[-2]) ** 0.1 == pytest.approx(theory.scaled_gd_factor(0.4), rel=5e-3)


def test_alternating_without_inputs_is_subspace_iteration():
    problem = gallery.prescribed_spectrum_update([4.0, 3.0, 1.0, 0.5], 12, 10)
    adapter = nl.method("lora", rank=2, optimiser="alternating", steps=8)
    trained = train(adapter, problem, rng=0, record=range(9))
    slopes = np.tan(trained["angle_right"])
    assert slopes[8] / slopes[7] == pytest.approx(theory.alternating_factor([4.0, 3.0, 1.0, 0.5], 2), rel=1e-3)
    tail = np.hypot(1.0, 0.5) / np.linalg.norm([4.0, 3.0, 1.0, 0.5])
    assert trained.final() == pytest.approx(tail, rel=1e-6)


def test_one_sweep_solves_a_problem_of_exact_rank():
    problem = gallery.prescribed_spectrum_update([1.0, 1e-6], 12, 10)
    assert train(nl.method("lora", rank=2, optimiser="alternating", steps=1), problem, rng=0).final() < 1e-14


def test_alternating_reaches_the_optimum_of_the_data_norm():
    """The optimum is the truncated decomposition of ΔW R for X = QR (theory of data-aware truncation)."""
    trained = train(
        nl.method("lora", rank=2, optimiser="alternating", objective="data", alpha=1.0, steps=300), PROBLEM, rng=0
    )
    s = np.linalg.svd(PROBLEM.inputs @ DELTA.T, compute_uv=False)
    assert trained.final("data") == pytest.approx(np.linalg.norm(s[2:]) / np.linalg.norm(s), rel=1e-10)


def test_alternating_with_dependent_inputs():
    flat = nl.UpdateProblem(DELTA, inputs=PROBLEM.inputs[:, :1] @ np.ones((1, 5)))
    trained = train(nl.method("lora", rank=2, optimiser="alternating", objective="data", steps=3), flat, rng=0)
    assert trained.final("data") < 1e-12


@pytest.mark.parametrize("name", OPTIMISERS)
def test_every_rule_comes_near_the_optimum_of_an_easy_problem(name):
    rates = {"gradient_descent": 0.3, "momentum": 0.05, "adam": 0.03, "lora_plus": 0.003, "scaled_gd": 0.5}
    problem = gallery.prescribed_spectrum_update([1.0, 0.5], 12, 10)
    adapter = nl.method("lora", rank=2, optimiser=name, lr=rates.get(name, 1.0), steps=400)
    assert train(adapter, problem, rng=0).final() < 1e-3


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_batch_is_the_entries_one_by_one(name):
    deltas = np.stack([DELTA, 3 * DELTA[::-1]])
    pairs = [PAIR, Factors(PAIR.B[::-1].copy(), PAIR.A)]
    both = run(
        name,
        3,
        0.01,
        Factors(*map(np.stack, zip(*pairs, strict=True))),
        "frobenius",
        scale=1.0,
        problem=nl.UpdateProblem(deltas),
    )
    for i, pair in enumerate(pairs):
        alone = run(name, 3, 0.01, pair, "frobenius", scale=1.0, problem=nl.UpdateProblem(deltas[i]))
        np.testing.assert_allclose(both.B[i] @ both.A[i], alone.B @ alone.A, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_costs_with_and_without_inputs(name, inputs):
    """The registry's rows count the Frobenius norm; here every rule with inputs, batches, noise and every start."""
    adapter = nl.method("lora", rank=2, optimiser=name, lr=1e-3, steps=3, objective="data" if inputs else "frobenius")
    assert nl.costs.count(adapter, PROBLEM) == adapter.cost(PROBLEM).at(PROBLEM, adapter)
    if inputs and OPTIMISERS[name].stochastic:
        noisy = replace(adapter, batch=4, noise=0.1)
        assert nl.costs.count(noisy, PROBLEM) == noisy.cost(PROBLEM).at(PROBLEM, noisy)


def test_a_rule_for_all_data_refuses_batches():
    with pytest.raises(ValueError, match="optimiser='alternating' needs all data in every step"):
        nl.method("lora", rank=2, optimiser="alternating", noise=0.1)


def test_orthonormal_start_is_conserved_in_the_flow():
    """Small steps of gradient descent keep AAᵀ − BᵀB up to the square of the rate times the number of steps."""
    A = haar_orthogonal(5, 0, columns=2).T
    steps, rate = 200, 1e-3
    B1, A1 = run("gradient_descent", steps, rate, Factors(np.zeros((6, 2)), A), "frobenius", scale=1.0)
    drift = np.abs(A1 @ A1.T - B1.T @ B1 - A @ A.T).max()
    assert drift < steps * rate**2 * np.linalg.norm(DELTA, 2) ** 2 * 2
    assert np.abs(B1).max() > 0.1
