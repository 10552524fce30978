"""Rules in use for the rank of an update, side by side; some need to know the noise that storage left in it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.measures import RankRange, rank_above, rank_of_energy, rank_of_tolerance
from nla_llm.measures.leading import gram_spectrum
from nla_llm.theory.storage import History, StoredUpdate, fit_stored_update
from nla_llm.theory.updates import hard_threshold, marchenko_pastur_median

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from nla_llm.measures import Spectrum

__all__ = ["TOLERANCE", "median_noise", "rank_rules", "stored_update"]

TOLERANCE = 0.1  # relative error of the rules that ask for one, where none is given
_TOLD_APART = 0.02  # difference of shares from which they tell two histories apart; the normal model is off by 0.005
_TINY = 1e-300
_SAMPLED = 512  # rows, with eight times as many columns, from which the noise of a large matrix is estimated


def rank_rules(
    spectrum: Spectrum,
    shape: tuple[int, int],
    *,
    noise: float,
    median_noise: float,
    edge: float,
    tolerance: float | None = None,
) -> dict[str, RankRange]:
    """The rank by every rule.

    Parameters
    ----------
    spectrum : Spectrum
    shape : tuple of int
    noise : float
        Standard deviation of an entry that storage explains.
    median_noise : float
        The same as the median of the singular values says it.
    edge : float
        Spectral norm that the noise of storage has by itself.
    tolerance : float, optional
        Relative error of the two rules that ask for one; 0.1 by default.

    Examples
    --------
    >>> from nla_llm.measures import Spectrum
    >>> s = Spectrum.dense(np.diag([3.0, 2.0, 1.0, 1e-3]))
    >>> ranks = rank_rules(s, (4, 4), noise=1e-3, median_noise=1e-3, edge=4e-3)
    >>> [f"{name}: {ranks[name]}" for name in ("energy 90 %", "spectral 0.1", "GD storage")]
    ['energy 90 %: 2', 'spectral 0.1: 3', 'GD storage: 3']
    """
    t = TOLERANCE if tolerance is None else tolerance
    stable = spectrum.stable_rank()
    return {
        "energy 90 %": rank_of_energy(spectrum, 0.9),
        "energy 99 %": rank_of_energy(spectrum, 0.99),
        f"Frobenius {t:g}": rank_of_tolerance(spectrum, t, "frobenius"),
        f"spectral {t:g}": rank_of_tolerance(spectrum, t, "spectral"),
        "stable": RankRange(*(math.ceil(float(end) * (1 - 1e-9)) for end in (stable.lower, stable.upper))),
        "GD storage": rank_above(spectrum, hard_threshold(shape, noise=noise)),
        "GD median": rank_above(spectrum, hard_threshold(shape, noise=median_noise)),
        "above noise": rank_above(spectrum, edge),
    }


def median_noise(matrix: NDArray[Any], rng: np.random.Generator) -> float:
    """Standard deviation of the noise in a matrix of low rank plus noise, from the median singular value.

    The median of the data over the median of the Marchenko–Pastur law (Gavish and Donoho 2014, arXiv 1305.5870, section
    III.E); of a large matrix, of 512 rows and 4096 columns drawn at random, whose noise is the same.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> round(median_noise(0.1 * rng.standard_normal((300, 500)), rng), 2)
    0.1
    """
    a = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    drawn = [
        np.sort(rng.choice(n, most, replace=False)) if n > most else np.arange(n)
        for n, most in zip(a.shape, (_SAMPLED, 8 * _SAMPLED), strict=True)
    ]
    a = a[np.ix_(*drawn)]  # one gather: np.take would copy all of a transposed matrix first
    small, large = sorted(a.shape)
    median = float(np.median(gram_spectrum(a).values))
    return median / math.sqrt(marchenko_pastur_median(small / large) * large)


def stored_update(
    spaces: ArrayLike,
    counts: NDArray[np.int64],
    energy: float,
    *,
    unchanged: float,
    median_noise: float,
    stored: tuple[str, str],
) -> StoredUpdate:
    """The noise of storage, by the history of the pair that explains better what is seen of it.

    Whether training started from the stored base, or the base is itself a rounded copy, the two files do not say (see
    `nla_llm.theory.storage`). Small updates tell it by the share of entries that are the same in both; of larger
    ones the two histories leave the same share, but noise of variance u²/12 and u²/6, which the median singular value
    can tell apart. Where the dtypes differ, the first is taken.

    Examples
    --------
    >>> stored_update(
    ...     [1.0], np.array([1000]), 239.6, unchanged=0.76, median_noise=0.4, stored=("bfloat16", "bfloat16")
    ... ).history
    'rounded'
    """
    spaces, present = np.asarray(spaces, dtype=np.float64), counts > 0
    histories: tuple[History, ...] = ("stored", "rounded") if stored[0] == stored[1] else ("stored",)
    fits = [fit_stored_update(spaces[present], counts[present], energy, history) for history in histories]
    shares = [fit.unchanged for fit in fits]
    if max(shares) - min(shares) > _TOLD_APART:
        best = min(fits, key=lambda fit: abs(fit.unchanged - unchanged))
    else:
        best = min(fits, key=lambda fit: abs(math.log(max(fit.noise, _TINY) / max(median_noise, _TINY))))
    variances = np.zeros(spaces.size)
    variances[present] = best.variances
    return best._replace(variances=variances)
