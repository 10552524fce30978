"""Ranks under one budget against enumeration of all of them."""

from itertools import pairwise, product

import numpy as np
import pytest

from nla_llm.methods.update.lora.allocation import (
    ALLOCATIONS,
    Layer,
    allocate,
    budget_schedule,
    energy_bound,
    kept_energy,
)


def drawn(seed, *, same=False):
    rng = np.random.default_rng(seed)
    shapes = [(6, 6)] * 4 if same else [(6, 6), (6, 10), (4, 3), (5, 14)]
    return [Layer(np.sort(rng.exponential(size=min(4, *shape)))[::-1], *shape) for shape in shapes]


def enumerated(layers, budget):
    """The most energy over every choice of ranks."""
    choices = product(*(range(len(layer.singular_values) + 1) for layer in layers))
    affordable = (c for c in choices if sum(r * x.price for r, x in zip(c, layers, strict=True)) <= budget)
    return max(kept_energy(layers, c) for c in affordable)


@pytest.mark.parametrize("budget", [0, 6, 7, 40, 61, 87, 120, 10_000])
@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_by_enumeration(seed, budget):
    layers = drawn(seed)
    ranks = allocate(layers, budget)
    assert sum(r * x.price for r, x in zip(ranks, layers, strict=True)) <= budget
    assert kept_energy(layers, ranks) == pytest.approx(enumerated(layers, budget), rel=1e-13)


@pytest.mark.parametrize("how", ALLOCATIONS)
@pytest.mark.parametrize("seed", range(6))
def test_every_allocation_keeps_the_budget_and_none_beats_the_optimum_or_its_bound(how, seed):
    layers = drawn(seed)
    for budget in (30, 75, 110):
        ranks = allocate(layers, budget, how)
        assert sum(r * x.price for r, x in zip(ranks, layers, strict=True)) <= budget
        best = kept_energy(layers, allocate(layers, budget))
        assert kept_energy(layers, ranks) <= best + 1e-14
        assert best <= energy_bound(layers, budget) + 1e-14


def test_order_by_energy_is_best_for_layers_of_one_shape():
    for seed in range(10):
        layers = drawn(seed, same=True)
        for budget in (24, 60, 100):
            best = kept_energy(layers, allocate(layers, budget))
            for how in ("magnitude", "energy_per_parameter"):
                assert kept_energy(layers, allocate(layers, budget, how)) == pytest.approx(best, rel=1e-13)


def test_greedy_falls_short_of_the_optimum_where_shapes_differ_by_less_than_one_triplet():
    """Of 10 parameters the dense triplet takes 6 and leaves 4 unused; the other layer alone would fill them."""
    layers = [Layer([1.0], 3, 3), Layer([1.2], 5, 5)]
    greedy, best = allocate(layers, 10, "energy_per_parameter"), allocate(layers, 10)
    assert (greedy, best) == ((1, 0), (0, 1))
    gap = kept_energy(layers, best) - kept_energy(layers, greedy)
    assert 0 < gap < 1.2**2 / (1 + 1.2**2)


def test_magnitude_overpays_for_wide_layers():
    layers = [Layer([1.0, 0.9, 0.8], 4, 4), Layer([1.1, 1.0], 20, 20)]
    by_size, best = (kept_energy(layers, allocate(layers, 40, how)) for how in ("magnitude", "optimal"))
    assert by_size < 0.6 * best


def test_zero_triplets_are_not_bought():
    layers = [Layer([1.0, 0.0], 4, 4), Layer([0.0], 4, 4)]
    for how in ("magnitude", "energy_per_parameter", "optimal"):
        assert allocate(layers, 1000, how) == (1, 0)


def test_the_schedule_starts_and_ends_where_it_should_and_never_rises():
    budgets = [budget_schedule(t, first=40, last=8, warm_up=20, steady=30, steps=100) for t in range(101)]
    assert budgets[:21] == [40] * 21
    assert budgets[70:] == [8] * 31
    assert all(a >= b for a, b in pairwise(budgets))
    assert budgets[45] == round(8 + 32 * 0.5**3)


@pytest.mark.parametrize(
    ("layers", "budget", "how", "message"),
    [
        ([], 3, "optimal", "layers is empty"),
        ([Layer([1.0], 2, 2)], -1, "optimal", "budget must be a whole number"),
        ([Layer([1.0], 2, 2)], 1.5, "optimal", "budget must be a whole number"),
        ([Layer([1.0], 2, 2)], 3, "best", "how must be one of uniform"),
        ([Layer([1.0, 2.0], 2, 2)], 3, "optimal", "layer 0 must be finite, >= 0 and descending"),
        ([Layer([1.0, 0.5, 0.1], 2, 2)], 3, "optimal", "layer 0 of shape 2 x 2 has 1 to 2 singular values"),
    ],
)
def test_refusals(layers, budget, how, message):
    with pytest.raises(ValueError, match=message):
        allocate(layers, budget, how)
