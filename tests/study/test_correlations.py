"""Rank correlations against SciPy's, and their intervals against simulation."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from nla_llm.study.correlations import rank_correlation, rank_correlation_difference


def pairs(n, rho, seed):
    x, noise = np.random.default_rng(seed).standard_normal((2, n))
    return x, rho * x + np.sqrt(1 - rho**2) * noise


def test_it_is_spearmans():
    x, y = pairs(40, 0.6, 0)
    np.testing.assert_allclose(float(rank_correlation(x, y, resamples=50).value), spearmanr(x, y).statistic, rtol=1e-12)


def test_the_interval_covers():
    """Spearman's rho of normal pairs is 6/π asin(ρ/2); of 50 intervals fewer than 41 cover with probability 1e-4."""
    rho = 0.6
    truth = 6 / np.pi * np.arcsin(rho / 2)
    intervals = [rank_correlation(*pairs(60, rho, seed), resamples=100) for seed in range(50)]
    assert sum(e.lower <= truth <= e.upper for e in intervals) >= 41


def test_levels_of_groups_do_not_count():
    x, y = pairs(60, 0.5, 1)
    groups = np.repeat([0, 1, 2], 20)
    plain = rank_correlation(x, y, groups=groups, resamples=50)
    lifted = rank_correlation(x + 100 * groups, y - 50 * groups, groups=groups, resamples=50)
    assert float(plain.value) == float(lifted.value)
    assert float(rank_correlation(x + 100 * groups, y - 50 * groups, resamples=50).value) < -0.5


def test_points_of_one_cluster_are_not_independent():
    """No correlation between methods, but each has one level in all groups: resampled by points, 60 % cover zero."""
    rng, covered = np.random.default_rng(4), 0
    groups, clusters = np.tile(np.arange(6), 25), np.repeat(np.arange(25), 6)
    for seed in range(60):
        x, y = rng.standard_normal((2, 25, 1)) + 0.3 * rng.standard_normal((2, 25, 6))
        e = rank_correlation(x.ravel(), y.ravel(), groups=groups, clusters=clusters, resamples=200, rng=seed)
        covered += e.lower <= 0 <= e.upper
    assert covered >= 47  # with probability 1e-4 fewer where 92 % cover


def test_clusters_of_one_point_are_points():
    x, y = pairs(40, 0.6, 5)
    points, clusters = (rank_correlation(x, y, clusters=c, resamples=400) for c in (None, np.arange(40)))
    assert (points.lower, points.upper) == (clusters.lower, clusters.upper)


@pytest.mark.parametrize("clusters", [[0, 1, 2], [0, 0, 1, 1]])
def test_bad_clusters_are_refused(clusters):
    with pytest.raises(ValueError, match="clusters must label"):
        rank_correlation([1, 2, 3, 4], [1, 3, 2, 4], clusters=clusters)


def test_ties_share_a_rank_within_groups_of_unequal_size():
    x, y = (np.round(a, 1) for a in pairs(30, 0.7, 6))
    assert float(rank_correlation(x, y, resamples=20).value) == pytest.approx(spearmanr(x, y).statistic, rel=1e-12)


def test_the_better_predictor_is_told_apart():
    x, y = pairs(200, 0.9, 2)
    z = np.random.default_rng(3).standard_normal(200)
    difference = rank_correlation_difference(x, z, y, resamples=200)
    assert difference.lower > 0
    np.testing.assert_allclose(
        float(difference.value), spearmanr(x, y).statistic - spearmanr(z, y).statistic, rtol=1e-12
    )


@pytest.mark.parametrize("bad", [([1, 2], [1, 2]), ([1, 2, np.nan], [1, 2, 3]), ([1, 2, 3], [1, 2, 3, 4])])
def test_bad_points_are_refused(bad):
    with pytest.raises(ValueError, match="points"):
        rank_correlation(*bad)
