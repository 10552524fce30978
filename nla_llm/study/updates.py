"""What is measured of a weight update: its spectrum, ranks by every rule, what storage left of it, its directions.

Of a large matrix nothing is decomposed in full, and one of base, tuned and difference is in memory at a time.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import ml_dtypes
import numpy as np

from nla_llm.backend import parallel
from nla_llm.linalg.lanczos import largest_cosines, leading_triplets
from nla_llm.measures import (
    Estimate,
    Intruders,
    Spectrum,
    amplification,
    intruder_dimensions,
    leading_spectrum,
    rank_of_tolerance,
    spectral_norm,
)
from nla_llm.measures.leading import DENSE_ENTRIES, FULL_ORDER, remainder
from nla_llm.measures.storage import binades, count_binades, spacings
from nla_llm.operators import Dense
from nla_llm.study.rules import median_noise, rank_rules, stored_update
from nla_llm.theory.updates import random_projection_norm

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.linalg import SVD
    from nla_llm.problems.pair import TensorPair
    from nla_llm.theory.storage import StoredUpdate

__all__ = ["Factors", "Spectrum", "Wanted", "matrix_records", "vector_records"]

MOST_POINTS = 64  # of a spectrum that is drawn
MOST_RANK = 512  # up to which a rank is searched that meets a tolerance in a large matrix
DIRECTIONS = 10  # leading left singular vectors of the tuned matrix that are looked at (Shuttleworth et al. 2024)
COMPARED = 32  # ... with so many of the base
_TRIES = 8  # ranks above the one that a tolerance asks for, where rounding or the iteration has cost a little
_LOOSE = 0.1  # relative width of the bracket of ‖W‖₂
_NARROW = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Wanted:
    """What is asked of a matrix: the errors at some ranks, or the least rank that meets a tolerance.

    ``dtype`` is that of the factors as they will be stored, None where they will not; the errors at the largest rank
    are those of the stored factors.
    """

    ranks: tuple[int, ...] = ()
    tolerance: float | None = None
    norm: str = "frobenius"
    dtype: str | None = None
    inputs: NDArray[Any] | None = None


class Factors(NamedTuple):
    """An update as ``left @ rightᵀ``, with the values that are stored."""

    left: NDArray[Any]
    right: NDArray[Any]


def matrix_records(pair: TensorPair, wanted: Wanted, seed: int) -> tuple[list[dict[str, Any]], Factors]:
    """Records of the update of one weight matrix, and its factors at the largest rank.

    One record of the whole (``what`` = "tensor"), one for some of the singular values ("spectrum"), one for each rule
    of choosing a rank ("rule"), one for each rank ("truncation"). BLAS is held to one thread, products of large
    matrices are shared among threads of our own.

    Raises
    ------
    ZeroDivisionError
        If base and tuned are equal.
    """
    result: tuple[list[dict[str, Any]], Factors] = parallel(lambda _: _records(pair, wanted, seed), [None])[0]
    return result


def vector_records(pair: TensorPair) -> list[dict[str, Any]]:
    """The size of the change of a tensor that no adapter holds: a norm, a bias."""
    _, seen = _difference(pair)
    size = math.sqrt(seen.squares / seen.base_squares) if seen.base_squares else None
    return [{"what": "vector", "relative_update": size, "unchanged": seen.unchanged}]


def _records(pair: TensorPair, wanted: Wanted, seed: int) -> tuple[list[dict[str, Any]], Factors]:
    rng = np.random.default_rng(seed)
    update = _update(pair, wanted, rng)
    tuned = _tuned(pair, update.stored, rng)
    base = _base(pair, update, tuned.left, rng)
    spectrum, order = update.spectrum, update.spectrum.order
    size, top = spectrum.frobenius(), spectrum.value(1)
    weight = Estimate.exact(math.sqrt(update.seen.base_squares), "one pass over the entries", rounding=1e-12)
    values = update.factors.values
    expected = random_projection_norm(float(weight), update.rank, *pair.shape) if float(weight) else 0.0
    whole = {
        "what": "tensor",
        "rows": pair.shape[0],
        "columns": pair.shape[1],
        "stored_base": pair.stored[0],
        "stored": pair.stored[1],
        "rank": update.rank,
        "update_frobenius": size,
        "update_spectral": top,
        "weight_frobenius": float(weight),
        "relative_update": size / weight if float(weight) else None,
        "stable_rank": spectrum.stable_rank(),
        "condition": float(values[0] / values[update.rank - 1]) if values[update.rank - 1] > 0 else None,
        "unchanged": update.seen.unchanged,
        "expected_unchanged": update.stored.unchanged,
        "history": update.stored.history,
        "survives": update.stored.gain,
        "noise": update.stored.noise,
        "noise_frobenius": update.stored.noise * math.sqrt(math.prod(pair.shape)) / float(size),
        "noise_spectral": tuned.edge / float(top),
        "amplification": base.amplification,
        "amplification_random": float(size) / expected if expected else None,
        "intruders_low": base.intruders.low,
        "intruders_high": base.intruders.high,
        "directions": min(DIRECTIONS, order),
        "output_error": update.output,
        "output_error_plain": update.output_plain,
        "met": update.met,
        "leading": json.dumps([float(f"{value:.9g}") for value in values]),
    }
    rules = rank_rules(
        spectrum,
        pair.shape,
        noise=update.stored.noise,
        median_noise=update.median_noise,
        edge=tuned.edge,
        tolerance=wanted.tolerance,
    )
    ruled = [{"what": "rule", "rule": name, "low": found.low, "high": found.high} for name, found in rules.items()]
    whole["worth"] = rules["GD storage"].high
    points = np.unique(np.geomspace(1, spectrum.size, MOST_POINTS).round().astype(int))
    drawn = [{"what": "spectrum", "index": int(i), "singular_value": spectrum.value(int(i))} for i in points]
    asked = wanted.ranks or (update.rank,)
    errors = [_error_record(rank, update, rank == asked[-1], weight, base.spectral) for rank in asked]
    return [whole, *drawn, *ruled, *errors], update.stored_factors


def _error_record(
    rank: int, update: _Update, largest: bool, weight: Estimate, weight_spectral: Estimate
) -> dict[str, Any]:
    """Errors at one rank: measured at the largest, where there are factors, and from the spectrum at the others."""
    spectrum = update.spectrum
    full = rank >= spectrum.order
    if largest and rank > 0 and not full:
        errors = {"frobenius": update.frobenius, "spectral": update.spectral}
    else:
        errors = {"frobenius": spectrum.frobenius(rank), "spectral": spectrum.value(rank + 1)} if not full else {}
    zero = Estimate.exact(0.0, "the rank reaches the smaller dimension")
    record: dict[str, Any] = {"what": "truncation", "rank": rank}
    references = (("frobenius", spectrum.frobenius(), weight), ("spectral", spectrum.value(1), weight_spectral))
    for norm, own, base in references:
        error = errors.get(norm, zero)
        record |= {
            norm: error,
            f"relative_{norm}": error / own,
            f"weight_{norm}": error / base if float(base) else None,
        }
    return record


# -- the difference ----------------------------------------------------------------------------------------------------


class _Seen(NamedTuple):
    """What one pass over base and tuned has told."""

    squares: float  # ‖ΔW‖_F²
    base_squares: float  # ‖W‖_F²
    unchanged: float  # share of entries
    counts: NDArray[np.int64]  # of the entries of tuned in each binade


class _Update(NamedTuple):
    """What is left of the difference once it has been decomposed."""

    seen: _Seen
    stored: StoredUpdate
    median_noise: float
    spectrum: Spectrum
    factors: SVD
    rank: int
    stored_factors: Factors
    spectral: Estimate
    frobenius: Estimate
    met: bool | None
    output: float | None
    output_plain: float | None


def _difference(pair: TensorPair) -> tuple[NDArray[Any], _Seen]:
    """``tuned − base``; it is rounded once to float32, by at most 2⁻²⁴ of each entry, unless stored in float64."""
    small = math.prod(pair.shape) <= DENSE_ENTRIES
    delta = np.empty(pair.shape, np.float64 if small else pair.dtype)
    squares = base_squares = 0.0
    zeros, counts = 0, None
    for start, b, t in pair.blocks():
        part = delta[start : start + b.shape[0]]
        np.subtract(t, b, out=part, dtype=delta.dtype)
        squares += _square_sum(part)
        base_squares += _square_sum(b)
        zeros += part.size - int(np.count_nonzero(part))
        found = count_binades(t)
        counts = found if counts is None else counts + found
    assert counts is not None  # noqa: S101 - for the type checker: there is at least one row
    return delta, _Seen(squares, base_squares, zeros / delta.size, counts)


def _square_sum(block: NDArray[Any]) -> float:
    wide = block.astype(np.float64, copy=False).ravel()
    return float(wide @ wide)


def _update(pair: TensorPair, wanted: Wanted, rng: np.random.Generator) -> _Update:
    delta, seen = _difference(pair)
    if seen.squares == 0:
        raise ZeroDivisionError(f"base and tuned {pair.name!r} are equal: there is no update")
    sampled = median_noise(delta, rng)
    stored = stored_update(
        spacings(pair.stored[1], pair.dtype),
        seen.counts,
        seen.squares,
        unchanged=seen.unchanged,
        median_noise=sampled,
        stored=pair.stored,
    )
    found, rank = _search(delta, wanted, rng, seen.squares)
    chosen = rank
    for _ in range(_TRIES):
        factors = _factors(delta, found.factors, chosen, wanted, rng)
        spectral, frobenius = remainder(Dense(delta), factors.left, factors.right, rng)
        met = _met(wanted, found.spectrum, spectral, frobenius)
        if met is not False or chosen == found.factors.values.size:
            break
        chosen = min(chosen + max(1, chosen // 32), found.factors.values.size)
    outputs = _output_errors(delta, factors, found.factors, chosen, wanted)
    return _Update(
        seen, stored, sampled, found.spectrum, found.factors, chosen, factors, spectral, frobenius, met, *outputs
    )


def _search(delta: NDArray[Any], wanted: Wanted, rng: np.random.Generator, squares: float) -> tuple[Any, int]:
    """Approximation of the largest rank asked for; or of a rank that meets the tolerance, where one does."""
    order = min(delta.shape)
    if wanted.tolerance is None:
        rank = min(max(*wanted.ranks, 1), order)
        return leading_spectrum(delta, rank, rng, squares=squares), rank
    limit = order if order <= FULL_ORDER else min(order, MOST_RANK)
    rank = min(16, limit)
    while True:
        found = leading_spectrum(delta, rank, rng, squares=squares)
        needed = max(rank_of_tolerance(found.spectrum, wanted.tolerance, wanted.norm).high, 1)
        if needed <= rank or rank == limit:
            return found, min(needed, rank)
        spare = needed + _TRIES * (1 + needed // 32)
        rank = min(spare if found.spectrum.complete else 2 * rank, limit)


def _met(wanted: Wanted, spectrum: Spectrum, spectral: Estimate, frobenius: Estimate) -> bool | None:
    """Whether the tolerance is certainly met; None where none is asked for."""
    if wanted.tolerance is None:
        return None
    error, size = (frobenius, spectrum.frobenius()) if wanted.norm == "frobenius" else (spectral, spectrum.value(1))
    return bool(error.upper <= wanted.tolerance * size.lower)


# -- factors -----------------------------------------------------------------------------------------------------------


def _factors(delta: NDArray[Any], svd: SVD, rank: int, wanted: Wanted, rng: np.random.Generator) -> Factors:
    """``left @ rightᵀ`` of a rank, the singular values shared among both, in the dtype of storage.

    With inputs X the best error of the outputs, ‖(ΔW − BA)Xᵀ‖_F, has B A = U Uᵀ ΔW with U the leading left singular
    vectors of ΔW Xᵀ: its singular values are attained without an inverse of XᵀX, which may not exist.
    """
    left, values, right = svd.left[:, :rank], svd.values[:rank], svd.right[:, :rank]
    if wanted.inputs is not None:
        outputs = delta @ wanted.inputs.T.astype(delta.dtype)
        left = leading_triplets(outputs, min(rank, *outputs.shape), rng, rtol=1e-2, max_steps=16).left
        right = np.asarray(delta.T @ left.astype(delta.dtype), dtype=np.float64)
        values = np.linalg.norm(right, axis=0)
        right = right / np.where(values > 0, values, 1.0)
    root = np.sqrt(values)
    return Factors(*(rounded(x * root, wanted.dtype) for x in (left, right)))


def rounded(x: NDArray[Any], dtype: str | None) -> NDArray[Any]:
    """Round to a dtype of storage and hold the result in one that NumPy computes with; as it is for None.

    Raises
    ------
    ValueError
        If an entry overflows.
    """
    if dtype is None or dtype == "float64":
        return x
    with np.errstate(over="ignore"):
        narrow = x.astype(np.float32)
        narrow = narrow.astype(_NARROW[dtype]).astype(np.float32) if dtype in _NARROW else narrow
    if not np.isfinite(narrow).all():
        raise ValueError(f"a factor of the update overflows {dtype}; pass --dtype bfloat16 or --dtype float32")
    return narrow


def _output_errors(
    delta: NDArray[Any], factors: Factors, svd: SVD, rank: int, wanted: Wanted
) -> tuple[float | None, float | None]:
    """‖(ΔW − BA)Xᵀ‖_F relative to ‖ΔW Xᵀ‖_F, of the factors and of the plain truncated decomposition."""
    if wanted.inputs is None:
        return None, None
    x = wanted.inputs.T.astype(delta.dtype)
    outputs = np.asarray(delta @ x, dtype=np.float64)
    plain = svd.left[:, :rank] * svd.values[:rank], svd.right[:, :rank]
    norm = float(np.linalg.norm(outputs))
    if norm == 0:
        return None, None
    errors = (float(np.linalg.norm(outputs - left @ (right.T @ x))) / norm for left, right in (factors, plain))
    return tuple(errors)  # type: ignore[return-value]


# -- base and tuned ----------------------------------------------------------------------------------------------------


class _Tuned(NamedTuple):
    edge: float
    left: NDArray[Any]  # leading left singular vectors


class _Base(NamedTuple):
    spectral: Estimate
    amplification: float | None
    intruders: Intruders


def _tuned(pair: TensorPair, stored: StoredUpdate, rng: np.random.Generator) -> _Tuned:
    """The edge of the noise of storage, and the leading directions.

    The edge is the leading term of the expected spectral norm of independent entries, the largest row norm plus the
    largest column norm of their standard deviations (Bandeira and van Handel 2016, arXiv 1408.6185).
    """
    tuned = pair.matrix("tuned")
    rows, columns = np.zeros(tuned.shape[0]), np.zeros(tuned.shape[1])
    step = max(1, (1 << 20) // tuned.shape[1])
    for start in range(0, tuned.shape[0], step):
        variances = stored.variances[binades(tuned[start : start + step])]
        rows[start : start + step] = variances.sum(axis=1)
        columns += variances.sum(axis=0)
    edge = math.sqrt(float(rows.max())) + math.sqrt(float(columns.max()))
    return _Tuned(edge, _left_vectors(tuned, DIRECTIONS, rng)[:, :DIRECTIONS])


def _base(pair: TensorPair, update: _Update, tuned_left: NDArray[Any], rng: np.random.Generator) -> _Base:
    """The size of the base, what it has along the update, and which directions of the tuned matrix it has not."""
    base = pair.matrix("base")
    if not update.seen.base_squares:
        count = tuned_left.shape[1]
        return _Base(Estimate.exact(0.0, "the base is zero"), None, Intruders(count, count))
    left, _, right = update.factors
    factor = amplification(math.sqrt(update.seen.squares), left[:, : update.rank], right[:, : update.rank], base)
    top = spectral_norm(Dense(base), rtol=_LOOSE, rng=rng)
    vectors = _left_vectors(base, COMPARED, rng)
    bound = None if vectors.shape[1] == vectors.shape[0] else largest_cosines(base, tuned_left)
    intruders = intruder_dimensions(tuned_left, vectors, bound=bound)
    return _Base(top, factor if math.isfinite(factor) else None, intruders)


def _left_vectors(matrix: NDArray[Any], count: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Left singular vectors: all of a small matrix, the leading ones of another."""
    if matrix.size <= DENSE_ENTRIES and matrix.shape[0] <= FULL_ORDER:
        whole: NDArray[np.float64] = np.linalg.svd(matrix.astype(np.float64))[0]
        return whole
    leading: NDArray[np.float64] = leading_triplets(matrix, min(count, *matrix.shape), rng, max_steps=6).left
    return leading
