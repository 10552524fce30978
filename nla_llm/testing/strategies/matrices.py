"""Matrices with known singular values and weight updates, drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from nla_llm.linalg import haar_orthogonal
from nla_llm.problems import UpdateProblem
from nla_llm.testing.strategies._arguments import DTYPES, bounds, choices, generator_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hypothesis.strategies import DrawFn, SearchStrategy
    from numpy.typing import NDArray

__all__ = ["KnownMatrix", "ill_conditioned", "matrices_with_spectrum", "rank_deficient", "update_problems"]

SPECTRA = ("power", "exponential", "low_rank_plus_noise")


class KnownMatrix(NamedTuple):
    """A matrix whose singular values are known.

    Attributes
    ----------
    matrix
        (rows, columns).
    singular_values
        float64, in falling order, min(rows, columns) of them.
    """

    matrix: NDArray[Any]
    singular_values: NDArray[np.float64]

    @property
    def rank(self) -> int:
        """Number of singular values that are not zero."""
        return int(np.count_nonzero(self.singular_values))

    @property
    def condition_number(self) -> float:
        """Largest over smallest singular value; infinite where one is zero."""
        s = self.singular_values
        return float(s[0] / s[-1]) if s[-1] > 0 else float("inf")


def matrices_with_spectrum(
    *, min_side: int = 1, max_side: int = 20, max_condition: float = 1e6, dtypes: Sequence[str] = DTYPES
) -> SearchStrategy[KnownMatrix]:
    """Matrices U diag(σ) Vᵀ with Haar U, V and known σ: equal, geometric, power-law, or in two clusters.

    Parameters
    ----------
    min_side, max_side
        Bounds of the numbers of rows and columns.
    max_condition
        Largest condition number, at least 1. Rounding to the dtype moves σ by about eps · σ₁.
    dtypes
        Names of dtypes to choose from.

    Raises
    ------
    ValueError
        If an argument leaves nothing to draw.

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> @settings(max_examples=10, derandomize=True, database=None, deadline=None)
    ... @given(matrices_with_spectrum(dtypes=("float64",)))
    ... def spectral_norm_is_the_first_singular_value(known):
    ...     assert abs(np.linalg.norm(known.matrix, 2) - known.singular_values[0]) < 1e-12 * known.singular_values[0]
    >>> spectral_norm_is_the_first_singular_value()
    """
    bounds("min_side", min_side, "max_side", max_side)
    bounds("1", 1, "max_condition", max_condition)
    choices("dtypes", dtypes)

    @st.composite
    def matrices(draw: DrawFn) -> KnownMatrix:
        rows, columns = draw(st.integers(min_side, max_side)), draw(st.integers(min_side, max_side))
        condition = float(max_condition) ** draw(st.sampled_from([0.0, 0.5, 1.0]))
        kind = draw(st.sampled_from(["geometric", "power", "clusters"]))
        s = _spectrum(kind, min(rows, columns), condition)
        return _with_spectrum(draw, rows, columns, s, dtypes)

    return matrices()


def ill_conditioned(
    *,
    min_side: int = 2,
    max_side: int = 20,
    min_condition: float = 1e8,
    max_condition: float = 1e14,
) -> SearchStrategy[KnownMatrix]:
    """Square float64 matrices whose condition number is known and large, yet whose rank is full.

    Raises
    ------
    ValueError
        If an argument leaves nothing to draw, or the condition number would be lost in rounding.

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> @settings(max_examples=10, derandomize=True, database=None, deadline=None)
    ... @given(ill_conditioned(max_condition=1e10))
    ... def the_condition_number_is_what_it_says(known):
    ...     assert abs(np.linalg.cond(known.matrix) / known.condition_number - 1) < 1e-3
    >>> the_condition_number_is_what_it_says()
    """
    bounds("min_side", min_side, "max_side", max_side)
    bounds("2", 2, "min_side", min_side)
    bounds("1", 1, "min_condition", min_condition)
    bounds("min_condition", min_condition, "max_condition", max_condition)
    bounds("max_condition", max_condition, "1/(4 eps)", 0.25 / np.finfo(np.float64).eps)

    @st.composite
    def matrices(draw: DrawFn) -> KnownMatrix:
        n = draw(st.integers(min_side, max_side))
        decades = draw(st.integers(0, 4)) / 4
        condition = float(min_condition) * (max_condition / min_condition) ** decades
        kind = draw(st.sampled_from(["geometric", "clusters"]))
        return _with_spectrum(draw, n, n, _spectrum(kind, n, condition), ("float64",))

    return matrices()


def rank_deficient(
    *, min_side: int = 2, max_side: int = 20, dtypes: Sequence[str] = DTYPES
) -> SearchStrategy[KnownMatrix]:
    """Matrices of known rank below the smaller side, zero included; the other singular values lie in [1/10, 1].

    Raises
    ------
    ValueError
        If an argument leaves nothing to draw.

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> @settings(max_examples=10, derandomize=True, database=None, deadline=None)
    ... @given(rank_deficient())
    ... def numpy_sees_the_rank(known):
    ...     assert np.linalg.matrix_rank(known.matrix, tol=1e-4) == known.rank < min(known.matrix.shape)
    >>> numpy_sees_the_rank()
    """
    bounds("min_side", min_side, "max_side", max_side)
    bounds("2", 2, "min_side", min_side)
    choices("dtypes", dtypes)

    @st.composite
    def matrices(draw: DrawFn) -> KnownMatrix:
        rows, columns = draw(st.integers(min_side, max_side)), draw(st.integers(min_side, max_side))
        smaller = min(rows, columns)
        rank = draw(st.integers(0, smaller - 1))
        s = np.concatenate([np.geomspace(1.0, 0.1, rank) if rank else np.zeros(0), np.zeros(smaller - rank)])
        return _with_spectrum(draw, rows, columns, s, dtypes)

    return matrices()


def update_problems(
    *,
    min_side: int = 1,
    max_side: int = 20,
    batched: bool = True,
    with_base: bool = True,
    with_inputs: bool = True,
    dtypes: Sequence[str] = DTYPES,
) -> SearchStrategy[UpdateProblem]:
    """Weight updates with a power-law or exponential spectrum, or of low rank plus noise.

    Parameters
    ----------
    min_side, max_side
        Bounds of d_out and d_in.
    batched, with_base, with_inputs
        Whether there may be leading axes, a base matrix, calibration inputs.
    dtypes
        Names of dtypes to choose from.

    Raises
    ------
    ValueError
        If an argument leaves nothing to draw.

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> from nla_llm.methods import method
    >>> @settings(max_examples=10, derandomize=True, database=None, deadline=None)
    ... @given(update_problems(min_side=2, dtypes=("float64",)))
    ... def rank_one_does_not_make_it_worse(problem):
    ...     error = problem.exact() - method("truncated_svd", rank=1)(problem)
    ...     assert np.linalg.norm(error.dense()) <= np.linalg.norm(problem.delta)
    >>> rank_one_does_not_make_it_worse()
    """
    bounds("min_side", min_side, "max_side", max_side)
    choices("dtypes", dtypes)

    @st.composite
    def problems(draw: DrawFn) -> UpdateProblem:
        d_out, d_in = draw(st.integers(min_side, max_side)), draw(st.integers(min_side, max_side))
        batch = tuple(draw(st.lists(st.integers(1, 3), max_size=2))) if batched else ()
        dtype = np.dtype(draw(st.sampled_from(list(dtypes))))
        kind, rng = draw(st.sampled_from(SPECTRA)), generator_of(draw)
        s = _update_spectrum(kind, min(d_out, d_in))
        delta = _product(rng, d_out, d_in, s, batch)
        if kind == "low_rank_plus_noise":
            delta = delta + 1e-2 * rng.standard_normal(delta.shape)
        base = rng.standard_normal(delta.shape).astype(dtype) if with_base and draw(st.booleans()) else None
        inputs = rng.standard_normal((d_in + 3, d_in)).astype(dtype) if with_inputs and draw(st.booleans()) else None
        return UpdateProblem(delta.astype(dtype), base=base, inputs=inputs)

    return problems()


# -- helpers ---------------------------------------------------------------------------------------------------


def _spectrum(kind: str, n: int, condition: float) -> NDArray[np.float64]:
    """Singular values from 1 down to 1/condition."""
    if kind == "geometric":
        return np.geomspace(1.0, 1.0 / condition, n) if n > 1 else np.ones(1)
    if kind == "power":
        exponent = np.log(condition) / np.log(n) if n > 1 else 0.0
        return np.asarray(np.arange(1, n + 1) ** -exponent)
    small = n // 2
    return np.concatenate([np.ones(n - small), np.full(small, 1.0 / condition)])


def _update_spectrum(kind: str, n: int) -> NDArray[np.float64]:
    j = np.arange(n)
    if kind == "power":
        return np.asarray((j + 1.0) ** -0.5)
    if kind == "exponential":
        return np.asarray(0.7**j)
    return np.where(j < max(1, n // 3), 1.0, 0.0)


def _with_spectrum(draw: DrawFn, rows: int, columns: int, s: NDArray[np.float64], dtypes: Sequence[str]) -> KnownMatrix:
    dtype = np.dtype(draw(st.sampled_from(list(dtypes))))
    return KnownMatrix(_product(generator_of(draw), rows, columns, s).astype(dtype), s)


def _product(
    rng: np.random.Generator, rows: int, columns: int, s: NDArray[np.float64], batch: tuple[int, ...] = ()
) -> NDArray[np.float64]:
    """U diag(s) Vᵀ (*batch, rows, columns) with U and V from the Haar measure."""
    u, v = haar_orthogonal(rows, rng, batch=batch), haar_orthogonal(columns, rng, batch=batch)
    product: NDArray[np.float64] = (u[..., : s.size] * s) @ np.swapaxes(v[..., : s.size], -1, -2)
    return product
