"""Rank correlations with intervals: which of several quantities tells best what another one will be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from nla_llm.measures import Estimate

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["rank_correlation", "rank_correlation_difference"]


def rank_correlation(
    x: ArrayLike,
    y: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    resamples: int = 2000,
    rng: int = 0,
) -> Estimate:
    """Spearman's rank correlation with a 95 % bootstrap interval (percentiles over resampled points).

    Parameters
    ----------
    x, y
        Points, finite.
    groups
        A label for each point: ranks are then taken within its group and scaled to (0, 1), so that a difference of
        level between groups counts for nothing, and points are resampled within groups.
    clusters
        A label for each point: points of one cluster are not independent of one another (one method in several groups,
        at several budgets), so whole clusters are resampled, through all groups. Twenty or more, for the interval.
    resamples
        Number of bootstrap samples.
    rng
        Seed.

    Examples
    --------
    >>> e = rank_correlation(np.arange(20), np.arange(20) ** 3)
    >>> round(float(e.value), 12)
    1.0
    """
    points = _points(x, y, groups=groups)
    values = _resampled(points, resamples, rng, clusters)
    low, high = np.quantile(values[:, 0], [0.025, 0.975])
    value = _correlations(points)[0]
    how = f"Spearman's rank correlation over {len(points[0])} points; 95 % of {resamples} bootstrap samples"
    return _interval(value, low, high, how)


def rank_correlation_difference(
    x: ArrayLike,
    z: ArrayLike,
    y: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    resamples: int = 2000,
    rng: int = 0,
) -> Estimate:
    """How much better x tells y than z does: the difference of their rank correlations, on the same resampled points.

    Examples
    --------
    >>> y = np.arange(30.0)
    >>> round(float(rank_correlation_difference(y, -y, y).value), 12)
    2.0
    """
    points = _points(x, z, y, groups=groups)
    values = _resampled(points, resamples, rng, clusters)
    low, high = np.quantile(values[:, 0] - values[:, 1], [0.025, 0.975])
    first, second = _correlations(points)
    value = first - second
    how = f"difference of rank correlations over {len(points[0])} points; 95 % of {resamples} bootstrap samples"
    return _interval(value, low, high, how)


def _interval(value: float, low: float, high: float, how: str) -> Estimate:
    """An estimate that its own interval encloses."""
    middle, lower, upper = (np.asarray(x) for x in (value, min(low, value), max(high, value)))
    return Estimate(middle, lower, upper, 0.95, how)


def _points(*columns: ArrayLike, groups: ArrayLike | None) -> list[NDArray[np.float64]]:
    """The columns as arrays with a last one that numbers the groups."""
    arrays = [np.asarray(a, dtype=np.float64) for a in columns]
    if any(a.shape != arrays[0].shape or a.ndim != 1 or not np.isfinite(a).all() for a in arrays):
        raise ValueError(f"the points must be finite and as many in each column, got {[a.shape for a in arrays]}")
    labels = np.zeros(arrays[0].size) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if min(np.bincount(labels.astype(int))) < 3:
        raise ValueError("a rank correlation needs at least three points, in each group where there are groups")
    return [*arrays, labels.astype(np.float64)]


def _correlations(points: list[NDArray[np.float64]]) -> list[float]:
    """Rank correlation of every column but the last two with the last but one, ranks taken within groups."""
    once = [np.ones((1, place.size)) for place in _places(points)]
    return [float(value) for value in _of_samples(points, once)[0]]


def _places(points: list[NDArray[np.float64]]) -> list[NDArray[np.int64]]:
    """Indices of the points of each group."""
    return [np.flatnonzero(points[-1] == label) for label in np.unique(points[-1])]


def _resampled(
    points: list[NDArray[np.float64]], resamples: int, rng: int, clusters: ArrayLike | None
) -> NDArray[np.float64]:
    """Correlations of bootstrap samples, (resamples, columns), without those in which all points are equal."""
    generator, places = np.random.default_rng(rng), _places(points)
    if clusters is None:
        counts = [_counts(generator, resamples, place.size) for place in places]
    else:
        names, member = np.unique(np.asarray(clusters), return_inverse=True)
        if member.shape != points[-1].shape or len(names) < 3:
            raise ValueError(f"clusters must label each of the {points[-1].size} points, with three labels or more")
        drawn = _counts(generator, resamples, len(names))
        counts = [drawn[:, member[place]] for place in places]
    values = _of_samples(points, counts)
    return values[np.isfinite(values).all(axis=1)]


def _counts(generator: np.random.Generator, resamples: int, size: int) -> NDArray[np.float64]:
    """How often each of ``size`` things is drawn in each of as many draws with replacement, (resamples, size)."""
    drawn = generator.integers(size, size=(resamples, size))
    place = drawn + size * np.arange(resamples)[:, None]
    return np.asarray(np.bincount(place.ravel(), minlength=resamples * size).reshape(resamples, size), dtype=np.float64)


def _of_samples(points: list[NDArray[np.float64]], counts: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Correlations (samples, columns) where the points of each group count so often, (samples, size)."""
    sums = np.zeros((len(points) - 2, 3, len(counts[0])))
    with np.errstate(invalid="ignore", divide="ignore"):
        for place, often in zip(_places(points), counts, strict=True):
            total = often.sum(axis=1, keepdims=True)
            ranks = [(often @ _before(a[place]).T) / np.where(total > 0, total, 1) - 0.5 for a in points[:-1]]
            y = ranks[-1]
            sums += np.stack([[np.sum(often * part, axis=1) for part in (r * y, r * r, y * y)] for r in ranks[:-1]])
        return np.asarray((sums[:, 0] / np.sqrt(sums[:, 1] * sums[:, 2])).T)


def _before(a: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 where point j comes before point i, ½ where they are level: counts of these are mean ranks less ½."""
    return np.asarray((a < a[:, None]) + 0.5 * (a == a[:, None]), dtype=np.float64)
