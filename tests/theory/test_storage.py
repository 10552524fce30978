"""What storage leaves of an update, against numbers that are really rounded."""

import ml_dtypes
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from nla_llm.measures.storage import count_binades, spacings
from nla_llm.theory.storage import fit_stored_update, rounded_update

DRAWS = 400_000


@pytest.mark.parametrize("t", [0.05, 0.099, 0.101, 0.3, 0.5, 1.0, 4.0])
def test_stored_history_against_sums_over_the_steps(t):
    """J = j where x lies in [j − ½, j + ½]: probabilities and means from the normal distribution alone."""
    found = rounded_update(t, "stored")
    j = np.arange(-60, 61)
    weight = norm.cdf((j + 0.5) / t) - norm.cdf((j - 0.5) / t)
    energy = np.sum(j**2 * weight)
    # ∫ x p(x) dx over a step is t² times the difference of the densities at its ends
    gain = np.sum(j * (norm.pdf(j - 0.5, scale=t) - norm.pdf(j + 0.5, scale=t)))
    assert float(found.energy) == pytest.approx(energy, rel=1e-9, abs=1e-18)
    assert float(found.gain) == pytest.approx(gain, rel=1e-7, abs=1e-12)
    assert float(found.noise) == pytest.approx(energy - gain**2 * t**2, rel=1e-6, abs=1e-14)
    assert float(found.unchanged) == pytest.approx(weight[60], rel=1e-12)


@pytest.mark.parametrize("t", [0.01, 0.099, 0.101, 0.3, 0.7, 2.5])
def test_rounded_history_against_quadrature(t):
    """Given x, J is ⌊x⌋ or ⌈x⌉ with the probabilities that make it unbiased: its variance is f(1 − f)."""
    found = rounded_update(t, "rounded")

    def mean(function):
        pieces = [quad(lambda x: function(x) * norm.pdf(x, scale=t), k, k + 1, epsabs=1e-14)[0] for k in range(40)]
        return 2 * sum(pieces)

    assert float(found.noise) == pytest.approx(mean(lambda x: (x % 1) * (1 - x % 1)), rel=1e-8)
    assert float(found.unchanged) == pytest.approx(mean(lambda x: max(0.0, 1 - x)), rel=1e-8)
    assert float(found.gain) == 1


@pytest.mark.parametrize("history", ["stored", "rounded"])
@pytest.mark.parametrize("size", [1e-3, 1e-2])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_the_fit_finds_the_update_behind_a_stored_pair(history, size, dtype):
    """Scale, gain, noise and unchanged entries of weights that were really stored."""
    rng = np.random.default_rng(7)
    weight = (0.02 * rng.standard_normal(DRAWS)).astype(np.float32)
    before = weight.astype(dtype).astype(np.float64)
    start = before if history == "stored" else weight.astype(np.float64)
    update = 0.02 * size * rng.standard_normal(DRAWS)
    after = (start + update).astype(np.float32).astype(dtype).astype(np.float64)
    difference = after - before
    name = np.dtype(dtype).name
    counts = count_binades(after.astype(np.float32))
    present = counts > 0
    spaces = spacings(name, np.dtype(np.float32))[present]
    fit = fit_stored_update(spaces, counts[present], float(np.sum(difference**2)), history)
    gain = np.mean(difference * update) / np.mean(update**2)
    assert fit.scale == pytest.approx(0.02 * size, rel=0.02)
    assert fit.gain == pytest.approx(gain, abs=0.02)
    assert fit.noise == pytest.approx(np.std(difference - gain * update), rel=0.02)
    assert fit.unchanged == pytest.approx(np.mean(difference == 0), abs=0.01)


def test_exact_weights_add_no_noise():
    fit = fit_stored_update([0.0], [50], 50 * 4.0, "stored")
    assert (fit.noise, fit.gain, fit.unchanged) == (0, 1, 0)
    assert fit.scale == pytest.approx(2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: rounded_update(0.0, "stored"), "positive"),
        (lambda: rounded_update(1.0, "other"), "history"),
        (lambda: fit_stored_update([1.0], [3], 0.0, "stored"), "positive energy"),
    ],
)
def test_mistakes(call, words):
    with pytest.raises(ValueError, match=words):
        call()
