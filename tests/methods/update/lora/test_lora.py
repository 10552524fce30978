"""The method: what it refuses, what it returns, costs of every start, divergence."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.methods.update import LowRankUpdate
from nla_llm.methods.update.lora.initialisations import INITIALISATIONS
from nla_llm.operators import Dense, LowRank
from nla_llm.problems import gallery

RNG = np.random.default_rng(1)
PROBLEM = nl.UpdateProblem(
    RNG.standard_normal((7, 6)), base=RNG.standard_normal((7, 6)), inputs=RNG.standard_normal((15, 6))
)


@pytest.mark.parametrize("shape", [(7, 6), (6, 7)])
@pytest.mark.parametrize("objective", ["frobenius", "data"])
@pytest.mark.parametrize("name", INITIALISATIONS)
def test_cost_is_the_count_for_every_start(name, objective, shape):
    problem = PROBLEM
    if shape == (6, 7):
        inputs = RNG.standard_normal((15, 7))
        problem = nl.UpdateProblem(PROBLEM.delta.T.copy(), base=PROBLEM.base.T.copy(), inputs=inputs)
    adapter = nl.method("lora", rank=2, initialisation=name, objective=objective, steps=2, lr=0.1)
    assert nl.costs.count(adapter, problem) == adapter.cost(problem).at(problem, adapter)


def test_it_finds_the_truncated_decomposition():
    problem = gallery.low_rank_plus_noise_update(20, 15, 3, noise=0.01)
    trained = nl.method("lora", rank=3)(problem, rng=0)
    assert isinstance(trained, LowRankUpdate)
    best = nl.method("truncated_svd", rank=3)(problem)
    np.testing.assert_allclose(trained.dense(), best.dense(), rtol=0, atol=1e-6)


def test_updates_and_inputs_may_be_operators():
    held = nl.UpdateProblem(Dense(PROBLEM.delta), inputs=LowRank(PROBLEM.inputs, np.eye(6)))
    adapter = nl.method("lora", rank=2, objective="data", steps=5, lr=0.1)
    np.testing.assert_allclose(adapter(held, rng=0).dense(), adapter(PROBLEM, rng=0).dense(), rtol=0, atol=1e-12)


def test_what_is_random_needs_a_generator_and_what_is_not_does_not():
    with pytest.raises(TypeError, match="rng=0"):
        nl.method("lora", rank=2)(PROBLEM)
    adapter = nl.method("lora", rank=2, initialisation="pissa", steps=3, lr=0.1)
    assert adapter.properties.deterministic
    np.testing.assert_array_equal(adapter(PROBLEM).dense(), adapter(PROBLEM, rng=3).dense())
    assert not nl.method("lora", rank=2, initialisation="pissa", noise=0.1).properties.deterministic


def test_a_start_from_the_weight_reaches_the_update_only_as_far_as_the_sum_has_rank_r():
    """With PiSSA the floor is the tail of ΔW + W_r, though ΔW has rank r itself; a zero start reaches it."""
    problem = gallery.prescribed_spectrum_update([1.0, 0.8], 7, 6)
    problem = nl.UpdateProblem(problem.delta, base=PROBLEM.base)
    u, s, vt = np.linalg.svd(PROBLEM.base)
    floor = np.linalg.norm(np.linalg.svd(problem.delta + u[:, :2] * s[:2] @ vt[:2], compute_uv=False)[2:])
    op = nl.method("lora", rank=2, initialisation="pissa", steps=400)(problem)
    assert op.rank == 4
    assert np.linalg.norm(op.dense() - problem.delta) == pytest.approx(floor, rel=1e-6)
    assert floor > 0.1
    assert np.linalg.norm(nl.method("lora", rank=2)(problem, rng=0).dense() - problem.delta) < 1e-10


def test_divergence_is_an_error_of_the_method_with_a_sentence():
    adapter = nl.method("lora", rank=2, optimiser="gradient_descent", lr=10.0)
    with pytest.raises(
        FloatingPointError, match=r"gradient_descent with lr=10 diverged in step \d+ of 100; take a lower"
    ):
        adapter(PROBLEM, rng=0)


def test_scale_follows_the_rank():
    assert nl.method("lora", rank=4).scale == 1
    assert nl.method("lora", rank=4, alpha=8).scale == 2
    assert nl.method("lora", rank=4, alpha=8, scaling="rank_stabilised").scale == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number >= 1"),
        ({"rank": 2, "steps": -1}, "steps must be a whole number >= 0"),
        ({"rank": 2, "batch": 0}, "batch must be a whole number >= 1"),
        ({"rank": 2, "optimiser": "sgd"}, "optimiser must be one of gradient_descent, momentum"),
        ({"rank": 2, "initialisation": "zero"}, "initialisation must be one of gaussian, kaiming"),
        ({"rank": 2, "scaling": "rs"}, "scaling must be one of standard, rank_stabilised"),
        ({"rank": 2, "objective": "l1"}, "objective must be one of frobenius, data"),
        ({"rank": 2, "lr": 0}, "lr must be a number > 0"),
        ({"rank": 2, "lr": float("nan")}, "lr must be a number > 0"),
        ({"rank": 2, "alpha": -1}, "alpha must be a number > 0 or None"),
        ({"rank": 2, "noise": -1}, "noise must be a number > 0 or 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        nl.method("lora", **options)
