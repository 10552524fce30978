"""What theory promises about one approximation: the object that a method returns and that figures and checks read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

__all__ = ["Kind", "Matrix", "Status", "Theory"]

Matrix: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = Callable[[int, int], Matrix]
Kind: TypeAlias = Literal["closed form", "bound", "floor", "first order"]
Status: TypeAlias = Literal["VE", "VB", "NV"]


@dataclass(frozen=True, eq=False)
class Theory:
    """A promise about an approximation Â of a matrix A (..., n_q, n_k), entry by entry or in a norm.

    For kernel methods A is the unnormalised kernel exp(scale · q kᵀ) and Â its estimate before division by the row
    sums; ``mean`` and ``relative_variance`` describe one random estimate. ``error`` speaks of the operator itself (P̂
    against P, or B̂ against ΔW): the root of the expected squared error over the draws, the error itself where nothing
    is drawn. Everything is float64 NumPy and is computed when asked for, block of rows by block of rows.

    Parameters
    ----------
    name
        What is promised, a few words for a legend.
    kind
        'closed form' (an equality), 'bound' (an upper bound), 'floor' (a lower bound for every draw) or 'first order'
        (an equality up to higher powers of the relative variance).
    status
        'VE' verified as an equality, 'VB' verified as a bound that was never violated, 'NV' not verified.
    source
        Authors, year, arXiv number and equation; 'derived' with the reason where it is our own.
    shape
        Shape of the matrix, batch axes first.
    mean_rows, log_variance_rows
        Functions (start, stop) → array (..., stop − start, n_k): E Â_ij / A_ij, and the natural logarithm of
        Var Â_ij / A_ij² (−inf where the variance is zero). None where theory says nothing.
    error_norm
        Function of the name of a norm → absolute error, an array of the batch shape; None where theory says nothing.
        It raises ValueError for a norm of which theory says nothing.
    assumptions
        Sentences, one for each hypothesis.

    Examples
    --------
    >>> def ones(start, stop):
    ...     return np.ones((stop - start, 2))
    >>> promise = Theory("exact", "closed form", "VE", "by definition", (2, 2), mean_rows=ones)
    >>> promise.mean(0, 1).tolist(), sorted(promise.covers)
    ([[1.0, 1.0]], ['mean'])
    """

    name: str
    kind: Kind
    status: Status
    source: str
    shape: tuple[int, ...]
    mean_rows: Rows | None = None
    log_variance_rows: Rows | None = None
    error_norm: Callable[[str], Matrix] | None = None
    assumptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field, known in (("kind", get_args(Kind)), ("status", get_args(Status))):
            if getattr(self, field) not in known:
                raise ValueError(f"{field} must be one of {', '.join(known)}, got {getattr(self, field)!r}")

    @property
    def covers(self) -> frozenset[str]:
        """What theory speaks of: any of 'mean', 'relative_variance', 'error'."""
        present = {"mean": self.mean_rows, "relative_variance": self.log_variance_rows, "error": self.error_norm}
        return frozenset(name for name, here in present.items() if here is not None)

    @property
    def unbiased(self) -> bool | None:
        """Whether E Â = A to 1e-12 in every entry; None where theory says nothing of the mean. Looks at all entries."""
        if self.mean_rows is None:
            return None
        blocks = range(0, self.shape[-2], 256)
        return all(bool(np.all(np.abs(self.mean(i, i + 256) - 1) < 1e-12)) for i in blocks)

    def mean(self, start: int = 0, stop: int | None = None) -> Matrix:
        """E Â_ij / A_ij of the rows ``start:stop``, an array (..., stop − start, n_k); 1 where Â is unbiased."""
        return self._rows("mean", self.mean_rows, start, stop)

    def log_relative_variance(self, start: int = 0, stop: int | None = None) -> Matrix:
        """Natural logarithm of Var Â_ij / A_ij², an array (..., stop − start, n_k)."""
        return self._rows("relative_variance", self.log_variance_rows, start, stop)

    def relative_variance(self, start: int = 0, stop: int | None = None) -> Matrix:
        """Var Â_ij / A_ij² of one estimate, an array (..., stop − start, n_k); inf where it overflows."""
        with np.errstate(over="ignore"):
            return np.asarray(np.exp(self.log_relative_variance(start, stop)))

    def error(self, norm: str) -> Matrix:
        """Absolute error in the named norm ('frobenius', 'spectral', 'nuclear', ...), an array of the batch shape."""
        if self.error_norm is None:
            raise ValueError(
                f"theory '{self.name}' says nothing of the error of the operator; it covers {self._covered()}"
            )
        return np.asarray(self.error_norm(norm))

    def _rows(self, what: str, rows: Rows | None, start: int, stop: int | None) -> Matrix:
        if rows is None:
            raise ValueError(f"theory '{self.name}' says nothing of the {what}; it covers {self._covered()}")
        n = self.shape[-2]
        stop = n if stop is None else min(stop, n)
        if not 0 <= start < stop:
            raise ValueError(f"start and stop must satisfy 0 <= start < stop <= {n}, got start={start}, stop={stop}")
        return np.asarray(rows(start, stop))

    def _covered(self) -> str:
        return ", ".join(sorted(self.covers)) or "nothing"

    def __repr__(self) -> str:
        """One line for a log."""
        fields: dict[str, Any] = {"kind": self.kind, "status": self.status, "source": self.source, "shape": self.shape}
        return f"Theory({self.name!r}, " + ", ".join(f"{k}={v!r}" for k, v in fields.items()) + ")"
