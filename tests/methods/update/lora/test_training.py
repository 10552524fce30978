"""Trajectories against the method and known answers; divergence as a word; sweeps and their edges."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.methods.update.lora.training import QUANTITIES, recorded_steps, sweep, train
from nla_llm.problems import gallery

RANK3 = gallery.prescribed_spectrum_update([1.0, 0.5, 0.1], 12, 10)


def descent(**options):
    return nl.method("lora", rank=3, optimiser="gradient_descent", **{"lr": 0.3, "steps": 200} | options)


def test_the_last_record_is_what_the_method_returns():
    problem = nl.UpdateProblem(RANK3.delta, inputs=np.random.default_rng(0).standard_normal((30, 10)))
    trained, op = train(descent(), problem, rng=4), descent()(problem, rng=4)
    exact = problem.exact()
    assert trained.final() == pytest.approx(nl.measures.relative_error(exact, op, norm="frobenius").value, rel=1e-10)
    outputs = [problem.inputs @ m.T for m in (op.dense() - RANK3.delta, RANK3.delta)]
    assert trained.final("data") == pytest.approx(np.linalg.norm(outputs[0]) / np.linalg.norm(outputs[1]), rel=1e-10)
    assert set(trained.columns) == set(QUANTITIES)


def test_columns_at_the_optimum():
    trained = train(nl.method("lora", rank=3, steps=100), RANK3, rng=0)
    assert trained["kappa_product"][-1] == pytest.approx(10, rel=1e-9)
    assert max(trained["angle_left"][-1], trained["angle_right"][-1]) < 1e-9
    assert trained["frobenius"][0] == 1
    assert trained["kappa_B"][0] == np.inf
    assert trained["angle_left"][0] == np.pi / 2


def test_only_the_steps_asked_for_and_the_ends_are_recorded():
    assert train(descent(steps=20), RANK3, rng=0, record=(3, 7, 99)).steps == (0, 3, 7, 20)
    assert recorded_steps(0) == (0,)
    assert recorded_steps(1000, 4) == (0, 1, 10, 100, 1000)


def test_steps_to_a_tolerance():
    adapter = nl.method("lora", rank=2, optimiser="gradient_descent", lr=0.5, steps=200)
    trained = train(adapter, gallery.prescribed_spectrum_update([1.0, 0.5], 12, 10), rng=0, record=range(201))
    step = trained.steps_to(1e-3)
    assert trained["frobenius"][step] <= 1e-3 < trained["frobenius"][step - 1]
    assert trained.steps_to(1e-30) is None
    assert trained.steps_to(1.0) == 0 or trained["frobenius"][:20].max() > 1


@pytest.mark.parametrize("optimiser", ["gradient_descent", "momentum", "adam", "lora_plus", "scaled_gd"])
def test_divergence_is_a_word_and_no_nan(optimiser):
    adapter = nl.method("lora", rank=3, optimiser=optimiser, lr=1e8, steps=300)
    trained = train(adapter, RANK3, rng=0)
    assert trained.status == "diverged"
    assert "in step" in trained.reason
    assert trained.final() == np.inf
    assert trained.steps_to(1e3) is None
    assert not any(np.isnan(c).any() for c in trained.columns.values())


def test_growth_without_overflow_is_divergence_too():
    """Six records of a slowly unstable rate: numbers are finite, but the error is a million times the update."""
    trained = train(descent(lr=30.0, steps=4), RANK3, rng=0, record=range(5))
    assert trained.status == "diverged"
    assert "relative error above 1e+06" in trained.reason
    assert np.isfinite(trained["frobenius"]).all()


def test_streamed_noise_leaves_a_floor_that_falls_with_the_rate():
    x = np.random.default_rng(0).standard_normal((200, 10))
    problem = nl.UpdateProblem(RANK3.delta, inputs=x)
    floors = []
    for lr in (0.2, 0.02):
        adapter = nl.method("lora", rank=3, lr=lr, steps=600, objective="data", batch=20, noise=0.5)
        record = range(400, 601, 10)
        floors.append(np.median(train(adapter, problem, rng=1, record=record)["data"][-20:]))
    assert floors[1] < 0.6 * floors[0]
    clean = nl.method("lora", rank=3, lr=0.2, steps=600, objective="data", batch=20)
    assert train(clean, problem, rng=1).final("data") < 1e-6  # no noise, no floor: every batch agrees


def test_a_sweep_keeps_the_best_rate_and_tells_of_edges():
    found = sweep(descent(steps=60), RANK3, [0.01, 0.3, 0.1, 100.0])
    assert found.rates == (0.01, 0.1, 0.3, 100.0)
    assert found.errors[-1] == np.inf
    assert found.best == found.rates[int(np.argmin(found.errors))]
    assert found.trajectory.final() == min(found.errors)
    assert sweep(descent(steps=60), RANK3, [0.001, 0.01]).edge == "upper"
    assert sweep(descent(steps=60), RANK3, [0.3, 50.0]).edge == "lower"
    assert sweep(descent(steps=60), RANK3, [0.3]).edge == ""


def test_where_rounding_decides_the_fastest_rate_is_best():
    found = sweep(nl.method("lora", rank=3, steps=400), RANK3, [0.1, 0.6, 0.3])
    assert max(found.errors) < 1e-12
    assert found.best == 0.6


def test_a_sweep_where_all_diverge():
    found = sweep(descent(), RANK3, [1e3, 1e4])
    assert found.best is None
    assert found.trajectory.status == "diverged"


def test_refusals():
    with pytest.raises(ValueError, match="rates is empty"):
        sweep(descent(), RANK3, [])
    with pytest.raises(ValueError, match="is zero, so no error is relative to it"):
        train(descent(), nl.UpdateProblem(np.zeros((12, 10))), rng=0)


def test_batches_are_trained_together():
    both = nl.UpdateProblem(np.stack([RANK3.delta, 2 * RANK3.delta]))
    trained = train(nl.method("lora", rank=3, steps=30), both, rng=0)
    assert trained["kappa_A"].shape == (len(trained.steps), 2)
    assert trained.final().shape == (2,)
