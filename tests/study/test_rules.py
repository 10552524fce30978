"""Rules for the rank of an update, on pairs of which the rank is known."""

import ml_dtypes
import numpy as np
import pytest

from nla_llm.measures import Spectrum, leading
from nla_llm.measures.storage import count_binades, spacings
from nla_llm.study import rules
from nla_llm.study.rules import median_noise, rank_rules, stored_update


def pair(size, history, dtype, *, shape=(360, 480), rank=8, seed=0):
    """Base and tuned as they are stored, and the update that was trained."""
    rng = np.random.default_rng(seed)
    start = (0.02 * rng.standard_normal(shape)).astype(np.float32)
    base = start.astype(dtype).astype(np.float64)
    start = base if history == "stored" else start.astype(np.float64)
    update = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    update *= size * np.linalg.norm(start) / np.linalg.norm(update)
    return base, (start + update).astype(np.float32).astype(dtype).astype(np.float64), update


def fit(base, tuned, dtype, name):
    delta = tuned - base
    return stored_update(
        spacings(name, np.dtype(np.float32)),
        count_binades(tuned.astype(np.float32)),
        float(np.sum(delta**2)),
        unchanged=float(np.mean(delta == 0)),
        median_noise=median_noise(delta, np.random.default_rng(0)),
        stored=(name, name),
    )


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16)])
@pytest.mark.parametrize("history", ["stored", "rounded"])
@pytest.mark.parametrize("size", [1e-3, 1e-2])
def test_history_noise_and_rank_of_a_stored_pair(name, dtype, history, size):
    """The noise is that which is left when the best multiple of the trained update is taken out."""
    base, tuned, update = pair(size, history, dtype)
    found = fit(base, tuned, dtype, name)
    assert found.history == history
    delta = tuned - base
    gain = np.sum(delta * update) / np.sum(update**2)
    assert found.gain == pytest.approx(gain, abs=0.03)
    assert found.noise == pytest.approx(np.std(delta - gain * update), rel=0.03)
    ranks = rank_rules(
        Spectrum.dense(delta), delta.shape, noise=found.noise, median_noise=found.noise, edge=2 * found.noise * 480**0.5
    )
    assert ranks["GD storage"].low == ranks["GD storage"].high == 8


def test_energy_misses_the_rank_that_storage_buries():
    base, tuned, _ = pair(1e-3, "rounded", ml_dtypes.bfloat16)
    delta = tuned - base
    ranks = rank_rules(Spectrum.dense(delta), delta.shape, noise=1e-9, median_noise=1e-9, edge=0.0)
    assert ranks["energy 90 %"].low > 80
    assert ranks["GD storage"].low > 300  # what the rule says of noise that it is not told of


def test_stored_float32_has_no_noise_to_speak_of():
    base, tuned, _ = pair(1e-3, "stored", np.float32)
    found = fit(base, tuned, np.float32, "float32")
    assert found.noise < 1e-4 * np.std(tuned - base)


def test_different_dtypes_leave_one_history():
    found = stored_update([1.0], np.array([10]), 25.0, unchanged=0.3, median_noise=1.0, stored=("bfloat16", "float32"))
    assert found.history == "stored"


@pytest.mark.parametrize("limit", [512, 60])
@pytest.mark.parametrize("shape", [(200, 300), (300, 200)])
def test_the_median_tells_the_noise_under_a_low_rank(monkeypatch, limit, shape):
    """From all rows, or from some of them."""
    monkeypatch.setattr(rules, "_SAMPLED", limit)
    rng = np.random.default_rng(1)
    a = 0.3 * rng.standard_normal(shape) + 5 * np.outer(rng.standard_normal(shape[0]), rng.standard_normal(shape[1]))
    assert median_noise(a, rng) == pytest.approx(0.3, rel=0.05)
    assert leading.FULL_ORDER > 200
