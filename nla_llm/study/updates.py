"""What is measured of a weight update: its spectrum, the error of its truncation, and what its storage left of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nla_llm.linalg import singular_values
from nla_llm.measures import Estimate
from nla_llm.operators import Dense

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["Spectrum", "StorageNoise", "storage_noise", "update_records"]

MOST_POINTS = 64  # of a spectrum that is drawn
SHARES = (0.5, 0.9, 0.99)  # of the energy ‖ΔW‖_F²
# stored dtype -> bits of the fraction, exponent of the smallest spacing
_FORMATS = {"float64": (52, -1074), "float32": (23, -149), "float16": (10, -24), "bfloat16": (7, -133)}


class Spectrum:
    """Singular values of a matrix and what follows from them by Eckart, Young and Mirsky, rounding included.

    The dense decomposition is backward stable: each value is off by at most a small multiple of eps σ₁. The constant
    8 is empirical.

    Examples
    --------
    >>> s = Spectrum(np.diag([4.0, 2.0, 0.0]))
    >>> float(s.truncation(1, "spectral").value), s.rank_of_energy(0.9)
    (0.5, 2)
    """

    def __init__(self, matrix: NDArray[Any]) -> None:
        self.values = singular_values(Dense(np.asarray(matrix, dtype=np.float64)))
        self.rounding = 8 * np.finfo(np.float64).eps * float(self.values[0])

    def value(self, index: int) -> Estimate:
        """σ_index, counted from one."""
        s = float(self.values[index - 1])
        return _within(s, self.rounding)

    def frobenius(self, beyond: int = 0) -> Estimate:
        """√(Σ σ_i²) over i > ``beyond``: the norm, or the error of the best approximation of that rank."""
        tail = self.values[beyond:]
        norm, slack = float(np.linalg.norm(tail)), self.rounding * math.sqrt(max(tail.size, 1))
        return _within(norm, slack)

    def truncation(self, rank: int, norm: str) -> Estimate:
        """Relative error of the best approximation of a rank, in the Frobenius or the spectral norm; 0 at full rank.

        Raises
        ------
        ZeroDivisionError
            If the matrix is zero.
        """
        if rank >= self.values.size:
            return Estimate.exact(0.0, "the rank reaches the smaller dimension")
        if norm == "spectral":
            return self.value(rank + 1) / self.value(1)
        return self.frobenius(rank) / self.frobenius()

    def stable_rank(self) -> Estimate:
        """‖A‖_F² / ‖A‖₂²."""
        return (self.frobenius() / self.value(1)) ** 2

    def rank_of_energy(self, share: float) -> int:
        """Smallest rank whose best approximation keeps at least this share of ‖A‖_F²."""
        energy = np.cumsum(self.values**2)
        return int(np.searchsorted(energy, share * energy[-1] * (1 - 1e-12)) + 1)  # 1e-12: a share met to rounding


def _within(value: float, slack: float) -> Estimate:
    ends = np.array([max(value - slack, 0.0), value + slack])
    return Estimate(np.array(value), ends[0], ends[1], 1.0, "dense singular value decomposition")


class StorageNoise(NamedTuple):
    """What rounding to the stored dtype does to a matrix, in the Frobenius and the spectral norm, as expected."""

    frobenius: float
    spectral: float


def storage_noise(stored: NDArray[Any], dtype: str) -> StorageNoise:
    """Expected norms of the rounding error of a stored matrix, for errors that are independent and uniform.

    An entry w is then off by a variance of ulp(w)²/12. The spectral norm is the leading term of its expectation for
    independent entries, the largest row norm plus the largest column norm of the standard deviations (Bandeira and van
    Handel 2016, arXiv 1408.6185). Singular values of a difference below it cannot be told from rounding. Where
    an update is smaller than the spacing of the stored numbers its errors are not independent of it, and this model
    is a rough one.

    Parameters
    ----------
    stored : array (d_out, d_in)
        The values as they were stored.
    dtype : {"float16", "bfloat16", "float32", "float64"}

    Examples
    --------
    >>> storage_noise(np.zeros((2, 2)), "bfloat16")
    StorageNoise(frobenius=0.0, spectral=0.0)
    """
    bits, smallest = _FORMATS[dtype]
    _, exponent = np.frexp(stored)
    ulp = np.where(stored == 0, 0.0, np.ldexp(1.0, np.maximum(exponent - 1 - bits, smallest)))
    variance = ulp**2 / 12
    edge = math.sqrt(np.max(variance.sum(axis=1))) + math.sqrt(np.max(variance.sum(axis=0)))
    return StorageNoise(math.sqrt(np.sum(variance)), edge)


def update_records(base: NDArray[Any], tuned: NDArray[Any], ranks: Sequence[int], dtype: str) -> list[dict[str, Any]]:
    """Records of the update tuned − base of one weight matrix, formed in float64.

    One record of the whole (``what`` = "tensor"): relative size, stable rank, ranks for shares of the energy, share of
    entries that are exactly zero, noise of the storage. One for some of the singular values ("spectrum") and one for
    each rank ("truncation"), with the relative errors in both norms.

    Parameters
    ----------
    base, tuned : array (d_out, d_in)
    ranks : sequence of int
    dtype : str
        In which ``tuned`` was stored.

    Raises
    ------
    ZeroDivisionError
        If the two are equal.
    """
    delta = tuned.astype(np.float64) - base.astype(np.float64)
    spectrum = Spectrum(delta)
    noise = storage_noise(tuned, dtype)
    weight = float(np.linalg.norm(base.astype(np.float64)))
    size = spectrum.frobenius()
    whole = {
        "what": "tensor",
        "relative_update": size / Estimate.exact(weight, "norm of the base", rounding=1e-14) if weight else None,
        "stable_rank": spectrum.stable_rank(),
        **{f"rank_{100 * share:g}": spectrum.rank_of_energy(share) for share in SHARES},
        "zero_share": float(np.mean(delta == 0)),
        "noise_frobenius": noise.frobenius / float(size),
        "noise_spectral": noise.spectral / float(spectrum.values[0]),
        "noise_edge": noise.spectral,
        "above_noise": int(np.sum(spectrum.values > noise.spectral)),
    }
    points = np.unique(np.geomspace(1, spectrum.values.size, MOST_POINTS).round().astype(int))
    values = [{"what": "spectrum", "index": int(i), "singular_value": spectrum.value(int(i))} for i in points]
    errors = [
        {"what": "truncation", "rank": r}
        | {f"relative_{norm}": spectrum.truncation(r, norm) for norm in ("frobenius", "spectral")}
        for r in ranks
    ]
    return [whole, *values, *errors]
