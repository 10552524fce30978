"""What is measured of a low-rank adapter: the spectrum of every product BA, from QR of both factors, never formed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nla_llm.linalg.factors import factored_svd
from nla_llm.measures import Estimate, Spectrum, rank_of_energy, rank_of_tolerance
from nla_llm.study.updates import rounded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nla_llm.linalg import SVD
    from nla_llm.problems.adapters import Adapter

__all__ = ["MANY_AT_THE_TOP", "clamped_share", "module_records", "recompressed", "spectrum_of"]

MANY_AT_THE_TOP = 0.004  # share of entries at ±max from which clamping is suspected; a quantile of 0.99 leaves 0.02


class Compressed(NamedTuple):
    """A product of fewer columns, as it will be stored."""

    left: NDArray[Any]
    right: NDArray[Any]
    rank: int


def spectrum_of(svd: SVD, order: int) -> Spectrum:
    """Spectrum of a product of rank at most r, all other values zero.

    Examples
    --------
    >>> s = spectrum_of(factored_svd(np.eye(4)[:, :2], 2 * np.eye(5)[:, :2]), 4)
    >>> s.values.tolist(), s.order
    ([2.0, 2.0], 2)
    """
    values = np.asarray(svd.values)[:order]
    slack = 16 * np.finfo(np.float64).eps * float(values[0])
    squares = Estimate.exact(float(np.sum(values**2)), "QR of both factors", rounding=1e-13)
    return Spectrum(
        np.maximum(values - slack, 0.0), values + slack, squares, order=values.size, how="QR of both factors"
    )


def clamped_share(left: NDArray[Any], right: NDArray[Any]) -> float:
    """Share of the entries of two factors whose size is exactly the largest of both.

    Extraction in the manner of kohya-ss/sd-scripts clamps the factors at the 0.99 quantile of their entries together,
    which leaves one entry in fifty at exactly plus or minus that value; training and truncation leave one or two.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> a, b = rng.standard_normal((2, 100, 4))
    >>> clamped_share(a, b) < 0.002, clamped_share(a.clip(-2, 2), b.clip(-2, 2)) > 0.02
    (True, True)
    """
    entries = np.abs(np.concatenate([left.ravel(), right.ravel()]))
    return float(np.mean(entries == entries.max()))


def recompressed(
    svd: SVD,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    norm: str = "frobenius",
    dtype: str | None = None,
) -> Compressed:
    """Truncate a product to a rank, or to the least rank that meets a relative tolerance; at least to rank one.

    Examples
    --------
    >>> svd = factored_svd(np.diag([4.0, 2.0, 0.1]), np.eye(3))
    >>> recompressed(svd, rank=2).rank, recompressed(svd, tolerance=0.6, norm="spectral").rank
    (2, 1)
    """
    values = np.asarray(svd.values)
    if tolerance is not None and values[0] > 0:
        rank = rank_of_tolerance(spectrum_of(svd, values.size), tolerance, norm).high
    r = min(max(rank or 1, 1), values.size)
    root = np.sqrt(values[:r])
    left, right = (rounded(np.asarray(x)[:, :r] * root, dtype) for x in (svd.left, svd.right))
    return Compressed(left, right, r)


def module_records(
    adapter: Adapter, name: str, ranks: Sequence[int], tolerance: float | None, norm: str
) -> list[dict[str, Any]]:
    """Records of one module: one of the whole ("module"), and one for each rank ("truncation").

    The errors are those of the factors rounded to the dtype in which the adapter is stored.
    """
    left, right = adapter.factors(name)
    module, stored = adapter.modules[name], adapter.stored_dtype(name)
    svd = factored_svd(module.scale * left, right)
    values = np.asarray(svd.values)
    spectrum = spectrum_of(svd, min(left.shape[0], right.shape[0]))
    whole = {
        "what": "module",
        "layout": module.layout,
        "stored": stored,
        "rows": left.shape[0],
        "columns": right.shape[0],
        "rank": left.shape[1],
        "scale": module.scale,
        "clamped": clamped_share(left, right),
        "frobenius": spectrum.frobenius(),
        "spectral": spectrum.value(1),
        "stable_rank": spectrum.stable_rank() if values[0] > 0 else None,
        "condition": float(values[0] / values[-1]) if values[-1] > 1e-14 * values[0] else None,
        "rank_90": rank_of_energy(spectrum, 0.9).high,
        "rank_99": rank_of_energy(spectrum, 0.99).high,
    }
    points = [
        {"what": "spectrum", "index": i + 1, "singular_value": spectrum.value(i + 1)} for i in range(spectrum.size)
    ]
    if values[0] == 0:
        return [whole, *points]
    asked = [{"rank": r} for r in ranks if r < values.size] if tolerance is None else [{"tolerance": tolerance}]
    cuts = [recompressed(svd, norm=norm, dtype=stored, **one) for one in asked]
    return [whole, *points, *(_error_record(svd, cut, spectrum) for cut in cuts)]


def _error_record(svd: SVD, cut: Compressed, spectrum: Spectrum) -> dict[str, Any]:
    """Error of a recompressed product, from the factors of the difference."""
    left = np.concatenate([np.asarray(svd.left) * np.asarray(svd.values), -cut.left], axis=1)
    right = np.concatenate([np.asarray(svd.right), cut.right], axis=1)
    values = np.asarray(factored_svd(left, right).values)
    slack = 16 * np.finfo(np.float64).eps * float(spectrum.upper[0])
    how = "QR of both factors of the difference"
    record: dict[str, Any] = {"what": "truncation", "rank": cut.rank}
    for norm, value, own in (
        ("frobenius", float(np.linalg.norm(values)), spectrum.frobenius()),
        ("spectral", float(values[0]), spectrum.value(1)),
    ):
        error = Estimate.bracket(max(value - slack, 0.0), value + slack, how, value=value)
        record |= {norm: error, f"relative_{norm}": error / own}
    return record
