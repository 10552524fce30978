"""What storage leaves of a weight update: weights rounded to a grid, before and after a small change, and subtracted.

Everything is float64 NumPy, in units of the spacing u of the grid: an entry of the update is x ~ N(0, t²), the stored
difference is J, a whole number. Two histories of a pair of checkpoints:

* "stored": training started from the base as it is stored, a point of the grid: J = round(x).
* "rounded": the base is itself the rounded copy of what training started from, its phase φ uniform: J = round(φ + x) −
  round(φ) with φ uniform in [−½, ½].

By Stein's lemma J = c·x + noise, where c = E[J x]/t² and the noise is uncorrelated with x (Bussgang 1952): what the
stored difference says of the trained update is c times it, buried in noise of variance E J² − c² t².
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["History", "RoundedUpdate", "StoredUpdate", "fit_stored_update", "rounded_update"]

History = Literal["stored", "rounded"]
_SMALL = 0.1  # below it a step of more than one spacing has probability 1e-22
_TERMS = 40  # of the Fourier series; exp(−2π² 40² 0.1²) is zero


class RoundedUpdate(NamedTuple):
    """What one entry of a stored update is, in units of the spacing; arrays of the shape of t."""

    energy: NDArray[np.float64]  # E J²
    noise: NDArray[np.float64]  # variance of what is uncorrelated with the update
    gain: NDArray[np.float64]  # c, the share of the update that is left
    unchanged: NDArray[np.float64]  # probability that J = 0


def rounded_update(t: ArrayLike, history: History) -> RoundedUpdate:
    """Moments of the stored difference of an update N(0, t²), t in units of the spacing (derived).

    With e_k = exp(−2π²k²t²): "rounded" has c = 1 and noise E f(1 − f) = 1/6 − Σ e_k/(π²k²), f the fractional part of
    |x|; "stored" has c = 1 + 2Σ(−1)^k e_k and E(J − x)² = 1/12 + Σ(−1)^k e_k/(π²k²).

    Examples
    --------
    >>> far = rounded_update(100.0, "rounded")  # two roundings, each of variance 1/12
    >>> round(float(far.noise), 6), float(far.gain)
    (0.166667, 1.0)
    >>> near = rounded_update(0.1, "stored")  # below half a spacing nothing changes
    >>> round(float(near.unchanged), 6), round(float(near.gain), 4)
    (0.999999, 0.0)
    """
    from scipy.special import erf, erfc  # noqa: PLC0415 - slow to load and only needed here

    if history not in get_args(History):
        raise ValueError(f"history must be one of {get_args(History)}, got {history!r}")
    t = np.asarray(t, dtype=np.float64)
    if not bool(np.all(np.isfinite(t) & (t > 0))):
        raise ValueError(f"t must be finite and positive, got {t!r}")
    small, wide = t < _SMALL, np.maximum(t, _SMALL)
    k = np.arange(1, _TERMS + 1)
    with np.errstate(under="ignore"):
        decay = np.exp(-2 * (np.pi * k * np.minimum(wide, 10.0)[..., None]) ** 2)
        if history == "rounded":
            series = 1 / 6 - (decay / (np.pi * k) ** 2).sum(axis=-1)
            noise = np.where(small, t * np.sqrt(2 / np.pi) - t**2, series)
            still = erf(1 / (t * np.sqrt(2))) + t * np.sqrt(2 / np.pi) * np.expm1(-0.5 / t**2)
            return RoundedUpdate(t**2 + noise, noise, np.ones_like(t), np.clip(still, 0.0, 1.0))
        sign = (-1.0) ** k
        edge = 0.5 / np.minimum(t, _SMALL)
        gain = np.where(small, 2 * _density(edge) / t, 1 + 2 * (sign * decay).sum(axis=-1))
        gap = 1 / 12 + (sign * decay / (np.pi * k) ** 2).sum(axis=-1)
        energy = np.where(small, erfc(edge / np.sqrt(2)), gap + (2 * gain - 1) * wide**2)
        # E J² − c²t², written so that nothing cancels where c is one
        noise = np.where(small, energy - (gain * t) ** 2, gap - (1 - gain) ** 2 * wide**2)
        return RoundedUpdate(energy, np.maximum(noise, 0.0), gain, erf(0.5 / (t * np.sqrt(2))))


def _density(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.exp(-0.5 * x**2) / np.sqrt(2 * np.pi))


class StoredUpdate(NamedTuple):
    """A pair of stored matrices, seen as an update of independent normal entries that storage has rounded."""

    history: History
    scale: float  # standard deviation of the trained update
    variances: NDArray[np.float64]  # of what is not gain · update, for each spacing
    noise: float  # root mean square of that over all entries
    gain: float  # mean of c over all entries
    unchanged: float  # share of entries that should not have changed


def fit_stored_update(spacings: ArrayLike, counts: ArrayLike, energy: float, history: History) -> StoredUpdate:
    """Scale of the trained update whose stored difference has this energy, and the noise that storage added.

    Entries of the update are taken as independent and normal of one variance s², whatever the size of the weight. An
    entry whose weight has a coarse grid keeps less of it than one with a fine grid: its own c differs from the mean c̄,
    and (c − c̄)² s² counts as noise too.

    Parameters
    ----------
    spacings, counts : array (b,)
        Spacing of the stored numbers around a weight, and how many weights have it; a spacing of zero for weights
        that are exact.
    energy : float
        ‖W' − W‖_F² of the stored pair, positive.

    Raises
    ------
    ValueError
        If there are no entries, or the energy is not positive.

    Examples
    --------
    >>> fit = fit_stored_update([1.0], [100], 100 * (1.0 + 1 / 6), "rounded")
    >>> round(fit.scale, 6), round(fit.noise**2, 6)
    (1.0, 0.166667)
    """
    u, n = (np.asarray(a, dtype=np.float64) for a in (spacings, counts))
    total = float(n.sum())
    if not (total > 0 and energy > 0 and np.isfinite(energy)):
        raise ValueError(f"the fit needs entries and a positive energy, got {total:g} entries and energy {energy:g}")
    from scipy.optimize import brentq  # noqa: PLC0415 - slow to load and only needed here

    def excess(log_scale: float) -> float:
        """Logarithm of the energy that a scale gives over the one that was measured; it grows with the scale."""
        found = _by_spacing(float(np.exp(log_scale)), u, history)
        return float(np.log(np.sum(n * found.energy) + np.finfo(float).tiny) - np.log(energy))

    root_mean_square = np.sqrt(energy / total)
    ends = np.log(root_mean_square * 1e-9), np.log(root_mean_square + 2 * u.max())
    scale = float(np.exp(brentq(excess, *ends)))
    found = _by_spacing(scale, u, history)
    gain, unchanged = (float(np.sum(n * x) / total) for x in (found.gain, found.unchanged))
    variances = found.noise + ((found.gain - gain) * scale) ** 2
    noise = float(np.sqrt(np.sum(n * variances) / total))
    return StoredUpdate(history, scale, variances, noise, gain, unchanged)


def _by_spacing(scale: float, u: NDArray[np.float64], history: History) -> RoundedUpdate:
    """Moments in the units of the weights, for each spacing."""
    exact = u == 0
    found = rounded_update(scale / np.where(exact, scale, u), history)
    return RoundedUpdate(
        np.where(exact, scale**2, found.energy * u**2),
        np.where(exact, 0.0, found.noise * u**2),
        np.where(exact, 1.0, found.gain),
        np.where(exact, 0.0, found.unchanged),
    )
