"""Ranks that training finds, against the optimal ones."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods.update.lora.adalora import AdaLora, Triplets
from nla_llm.methods.update.lora.allocation import Layer, allocate, kept_energy
from nla_llm.problems import gallery

INDEX = np.arange(1, 7)
SPECTRA = [INDEX**-0.5, 0.6 / INDEX, 0.9 * 0.6**INDEX]
LAYERS = [gallery.prescribed_spectrum_update(s, 12, 10, rng=i) for i, s in enumerate(SPECTRA)]
SHAPES = [Layer(s, 12, 10) for s in SPECTRA]


@pytest.mark.parametrize("budget", [5, 7])
def test_pruning_by_magnitude_finds_the_optimal_ranks_and_updates(budget):
    found = AdaLora(budget, 6)(LAYERS, rng=0)
    assert found.ranks == allocate(SHAPES, budget * SHAPES[0].price)
    for rank, update, layer in zip(found.ranks, found.updates, LAYERS, strict=True):
        assert update.rank == rank
        best = nl.method("truncated_svd", rank=rank)(layer).dense() if rank else np.zeros((12, 10))
        np.testing.assert_allclose(update.dense(), best, rtol=0, atol=2e-2)


def test_sensitivity_keeps_the_budget_and_less_energy_where_there_is_no_noise():
    best = kept_energy(SHAPES, allocate(SHAPES, 7 * SHAPES[0].price))
    shares = []
    for seed in range(3):
        found = AdaLora(7, 6, "sensitivity")(LAYERS, rng=seed)
        assert sum(found.ranks) == 7
        shares.append(kept_energy(SHAPES, found.ranks))
    assert max(shares) <= best + 1e-12
    assert np.median(shares) < 0.96 * best  # magnitudes reach it from each of these seeds


def test_sensitivity_is_smoothed_parameter_by_parameter():
    """The paper's score, entry by entry: a product of averages, of which the mean over a vector is taken last."""
    rng, adapter = np.random.default_rng(0), AdaLora(2, 2, "sensitivity", smoothing=0.6)
    averages, means, spreads = [((0.0, 0.0),) * 3], {}, {}
    for _ in range(3):
        x, g = (Triplets(*map(rng.standard_normal, ((4, 2), 2, (2, 3)))) for _ in range(2))
        (scores,), averages = adapter._importance([x], [g], averages)
        wanted = np.zeros(2)
        for name in Triplets._fields:
            w, slope = getattr(x, name), getattr(g, name)
            for place in np.ndindex(w.shape):
                key, now = (name, place), abs(w[place] * slope[place])
                means[key] = 0.6 * means.get(key, 0.0) + 0.4 * now
                spreads[key] = 0.6 * spreads.get(key, 0.0) + 0.4 * abs(now - means[key])
                triplet = place[1] if name == "P" else place[0]
                wanted[triplet] += means[key] * spreads[key] * 2 / w.size
        np.testing.assert_allclose(scores, wanted, rtol=1e-12)


def test_gradients_by_central_differences():
    rng = np.random.default_rng(0)
    x = Triplets(rng.standard_normal((12, 3)), rng.standard_normal(3), rng.standard_normal((3, 10)))
    adapter, target = AdaLora(3, 3, orthogonality=0.3), LAYERS[0].delta

    def loss(P, values, Q):
        fit = 0.5 * np.sum((P * values @ Q - target) ** 2)
        defects = (np.sum((m - np.eye(3)) ** 2) for m in (P.T @ P, Q @ Q.T))
        return fit + 0.3 * sum(defects)

    for i, gradient in enumerate(adapter._gradient(x, target)):
        move, h = rng.standard_normal(gradient.shape), 1e-6
        ends = [loss(*(w + sign * h * move if i == j else w for j, w in enumerate(x))) for sign in (1, -1)]
        assert np.sum(gradient * move) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6)


def test_the_same_on_every_library(xp):
    found = AdaLora(5, 4, steps=60)([layer.map(xp.asarray) for layer in LAYERS], rng=1)
    plain = AdaLora(5, 4, steps=60)(LAYERS, rng=1)
    assert found.ranks == plain.ranks
    for a, b in zip(found.updates, plain.updates, strict=True):
        np.testing.assert_allclose(to_numpy(a.dense()), b.dense(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "layers", "message"),
    [
        ({"budget": 5, "first": 11}, LAYERS, "at least first=11 rows and columns"),
        ({"budget": 5, "first": 4}, [], "at least first=4 rows"),
        ({"budget": 13, "first": 4}, LAYERS, "budget=13 exceeds the first=4 triplets of each of 3 layers"),
    ],
)
def test_refused_layers(options, layers, message):
    with pytest.raises(ValueError, match=message):
        AdaLora(**options)(layers, rng=0)


def test_divergence_and_options():
    with pytest.raises(FloatingPointError, match="lr=50 diverged"), np.errstate(all="ignore"):
        AdaLora(3, 3, lr=50.0, steps=60)(LAYERS, rng=0)
    with pytest.raises(ValueError, match="importance must be one of magnitude, sensitivity"):
        AdaLora(3, 3, "random")


def test_options_that_mean_nothing_and_rates_that_diverge_are_refused():
    layers = [nl.UpdateProblem(np.eye(4)), nl.UpdateProblem(2 * np.eye(4))]
    for options in ({"smoothing": 2.0}, {"smoothing": np.nan}, {"orthogonality": -1}, {"orthogonality": np.inf}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be a number > 0"):
            AdaLora(budget=3, first=3, **options)
    with pytest.raises(FloatingPointError, match=r"lr=1e\+09 diverged; take a lower rate, or scale the updates"):
        AdaLora(budget=3, first=3, lr=1e9)(layers, rng=0)
