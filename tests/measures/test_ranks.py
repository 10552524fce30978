"""Ranks by every rule: brackets from a part of the spectrum hold what the whole spectrum says."""

import itertools

import numpy as np
import pytest

from nla_llm.measures import Estimate, RankRange, Spectrum, rank_above, rank_of_energy, rank_of_tolerance


def spectra():
    rng = np.random.default_rng(0)
    yield "power law", np.arange(1, 61) ** -0.7
    yield "low rank and a floor", np.r_[np.linspace(3, 1, 6), np.full(54, 0.2)]
    yield "noise", np.sort(rng.random(60))[::-1]


def part_of(values, k):
    squares = Estimate.exact(float(np.sum(values**2)), "known", rounding=1e-12)
    return Spectrum(values[:k] * 0.999, values[:k] * 1.001, squares, order=values.size, rest=float(values[k]) * 1.001)


@pytest.mark.parametrize(("name", "values"), list(spectra()), ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("k", [1, 5, 20])
def test_ranges_hold_the_rank_of_the_whole_spectrum(name, values, k):
    """Counted by hand from all values."""
    known = part_of(values, k)
    energy = np.cumsum(values**2) / np.sum(values**2)
    for share in (0.3, 0.5, 0.9, 0.99, 0.999):
        found = rank_of_energy(known, share)
        true = int(np.argmax(energy >= share) + 1)
        assert found.low <= true <= found.high, (name, share, found)
    for threshold in values[[0, 3, 10, 30]] * 0.9:
        found = rank_above(known, threshold)
        assert found.low <= int(np.sum(values > threshold)) <= found.high
    for tolerance, norm in itertools.product((0.05, 0.3, 0.7), ("spectral", "frobenius")):
        found = rank_of_tolerance(known, tolerance, norm)
        errors = [np.linalg.norm(values[r:], np.inf if norm == "spectral" else 2) for r in range(values.size)]
        errors = np.append(errors, 0) / np.linalg.norm(values, np.inf if norm == "spectral" else 2)
        assert found.low <= int(np.argmax(errors <= tolerance)) <= found.high


def test_a_whole_spectrum_gives_a_number():
    s = Spectrum.dense(np.diag([4.0, 3.0, 0.0]))
    assert rank_of_energy(s, 0.64) == RankRange(1, 1)  # met exactly
    assert rank_of_energy(s, 1.0) == RankRange(2, 2)
    assert rank_above(s, 3.5).known
    assert rank_of_energy(Spectrum.dense(np.zeros((3, 3))), 0.9) == RankRange(0, 0)


def test_ranges_are_not_vacuous():
    """Thirty of sixty known values settle what lies within them."""
    values = np.arange(1, 61) ** -1.5
    assert rank_of_energy(part_of(values, 30), 0.9).known
    assert rank_above(part_of(values, 30), 0.05).known
    assert rank_of_energy(part_of(values, 5), 0.99).high < 60


def test_brackets_of_the_tail():
    values = np.arange(1, 61) ** -0.7
    known = part_of(values, 10)
    for r in (0, 4, 10, 25):
        tail = known.frobenius(r)
        assert tail.contains(np.linalg.norm(values[r:])), r
        assert known.truncation(r, "spectral").contains(values[r] / values[0])
    assert known.truncation(60, "frobenius").value == 0
    assert known.stable_rank().contains(np.sum(values**2) / values[0] ** 2)


def test_mistakes():
    s = Spectrum.dense(np.eye(2))
    with pytest.raises(ValueError, match="share of the energy"):
        rank_of_energy(s, 1.5)
    with pytest.raises(ValueError, match="tolerance"):
        rank_of_tolerance(s, 0.0, "spectral")
    with pytest.raises(ValueError, match="order"):
        Spectrum([], [], Estimate.exact(1.0, ""), order=3)
