"""Hypothesis strategies for problems and matrices, for other people's test suites.

Sizes, structures and one seed are drawn; the entries come from that seed. So a failing example shrinks to small sizes
and few structures within seconds. Every argument is keyword-only and has a default; an argument that
would leave nothing to draw is refused at once.

Examples
--------
>>> from hypothesis import given, settings
>>> from nla_llm.testing import strategies
>>> @settings(max_examples=20, derandomize=True, database=None, deadline=None)
... @given(strategies.attention_problems(max_tokens=12))
... def rows_of_a_softmax_sum_to_one(problem):
...     sums = problem.exact().dense().sum(axis=-1)
...     assert abs(sums - 1).max() < 1e-12
>>> rows_of_a_softmax_sum_to_one()
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from nla_llm.problems import AttentionProblem, UpdateProblem

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from hypothesis.strategies import DrawFn, SearchStrategy
    from numpy.typing import NDArray

__all__ = [
    "KnownMatrix",
    "attention_problems",
    "ill_conditioned",
    "matrices_with_spectrum",
    "rank_deficient",
    "update_problems",
]

STRUCTURES = ("causal", "window", "key_mask", "bias")
DTYPES = ("float64", "float32")
LOGIT_SIZES = (1.0, 0.0, 0.1, 10.0, 50.0)  # standard deviations of the logits; the first is what shrinking ends at
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


# -- attention -----------------------------------------------------------------------------------------------------


def attention_problems(
    *,
    min_tokens: int = 1,
    max_tokens: int = 40,
    max_d: int = 8,
    structures: Collection[str] = STRUCTURES,
    rectangular: bool = True,
    batched: bool = True,
    values: bool = True,
    dtypes: Sequence[str] = DTYPES,
    logit_sizes: Sequence[float] = LOGIT_SIZES,
) -> SearchStrategy[AttentionProblem]:
    """Attention problems on NumPy arrays: lengths that are odd, prime or one, unequal n_q and n_k, d = 1, heads.

    Parameters
    ----------
    min_tokens, max_tokens
        Bounds of n_q and n_k.
    max_d
        Largest head dimension, and number of columns of v.
    structures
        Which of 'causal', 'window', 'key_mask', 'bias' may occur, alone or together. Masks are trailing (padding) or
        scattered; every query keeps a key.
    rectangular
        Whether n_q may differ from n_k (never together with 'causal' or 'window').
    batched
        Whether there may be leading axes: a batch, heads, or grouped queries (h, g, n, d) against (h, 1, n, d).
    values
        Whether there is a v.
    dtypes
        Names of dtypes to choose from.
    logit_sizes
        Standard deviations of the logits to choose from. The scale is sometimes 1/√d and sometimes given.

    Raises
    ------
    ValueError
        If an argument leaves nothing to draw.

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> @settings(max_examples=10, derandomize=True, database=None, deadline=None)
    ... @given(attention_problems(structures=("causal",), batched=False))
    ... def first_row_sees_itself(problem):
    ...     if problem.causal:
    ...         assert abs(problem.exact().dense()[0, 0] - 1) < 1e-12
    >>> first_row_sees_itself()
    """
    _bounds("min_tokens", min_tokens, "max_tokens", max_tokens)
    _bounds("1", 1, "max_d", max_d)
    _subset("structures", structures, STRUCTURES)
    _choices("dtypes", dtypes)
    _choices("logit_sizes", logit_sizes)
    allowed = [s for s in STRUCTURES if s in structures]

    @st.composite
    def problems(draw: DrawFn) -> AttentionProblem:
        chosen = draw(st.sets(st.sampled_from(allowed))) if allowed else set()
        n_k = draw(st.integers(min_tokens, max_tokens))
        square = not rectangular or bool(chosen & {"causal", "window"})
        n_q = n_k if square else draw(st.integers(min_tokens, max_tokens))
        d, d_v = draw(st.integers(1, max_d)), draw(st.integers(1, max_d))
        batch_q, batch_k = draw(_batches()) if batched else ((), ())
        rng, dtype = _generator(draw), np.dtype(draw(st.sampled_from(list(dtypes))))
        # the logits of standard normal q and k have standard deviation 1 with the scale 1/√d
        size = draw(st.sampled_from(list(logit_sizes)))
        given_scale = draw(st.booleans())
        q = rng.standard_normal((*batch_q, n_q, d)) * (1.0 if given_scale else size)
        k = rng.standard_normal((*batch_k, n_k, d))
        v = rng.standard_normal((*batch_k, n_k, d_v)).astype(dtype) if values else None
        scale = size / d**0.5 if given_scale else None
        options = _structure(draw, chosen, n_q=n_q, n_k=n_k, batch=batch_k, rng=rng)
        if "bias" in options:
            options["bias"] = options["bias"].astype(dtype)
        return AttentionProblem(q.astype(dtype), k.astype(dtype), v, scale=scale, **options)

    return problems()


@st.composite
def _batches(draw: DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Leading axes of q and of k: none, the same, or shared keys for a group of queries."""
    kind = draw(st.sampled_from(["none", "same", "grouped"]))
    if kind == "none":
        return (), ()
    if kind == "same":
        batch = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
        return batch, batch
    heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    return (heads, group), (heads, 1)


def _structure(
    draw: DrawFn, chosen: set[str], *, n_q: int, n_k: int, batch: tuple[int, ...], rng: np.random.Generator
) -> dict[str, Any]:
    """The options of the chosen structures.

    The keys 0, w, 2w, … for a window w (key 0 alone without one) are never hidden, so that every query sees a key.
    """
    options: dict[str, Any] = {"causal": "causal" in chosen}
    if "window" in chosen:
        options["window"] = draw(st.integers(1, n_k))
    kept = np.arange(n_k) % options.get("window", n_k) == 0
    if "key_mask" in chosen:
        trailing = draw(st.booleans())
        mask = np.arange(n_k) < draw(st.integers(1, n_k)) if trailing else rng.random((*batch, n_k)) < 0.6
        options["key_mask"] = np.broadcast_to(mask | kept, (*batch, n_k)).copy()
    if "bias" in chosen:
        bias = rng.standard_normal((n_q, n_k))
        hidden = rng.random((n_q, n_k)) < (0.3 if draw(st.booleans()) else 0.0)
        options["bias"] = np.where(hidden & ~kept, -np.inf, bias)
    return options


# -- matrices ------------------------------------------------------------------------------------------------------


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
    _bounds("min_side", min_side, "max_side", max_side)
    _bounds("1", 1, "max_condition", max_condition)
    _choices("dtypes", dtypes)

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
    _bounds("min_side", min_side, "max_side", max_side)
    _bounds("2", 2, "min_side", min_side)
    _bounds("1", 1, "min_condition", min_condition)
    _bounds("min_condition", min_condition, "max_condition", max_condition)
    _bounds("max_condition", max_condition, "1/(4 eps)", 0.25 / np.finfo(np.float64).eps)

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
    _bounds("min_side", min_side, "max_side", max_side)
    _bounds("2", 2, "min_side", min_side)
    _choices("dtypes", dtypes)

    @st.composite
    def matrices(draw: DrawFn) -> KnownMatrix:
        rows, columns = draw(st.integers(min_side, max_side)), draw(st.integers(min_side, max_side))
        smaller = min(rows, columns)
        rank = draw(st.integers(0, smaller - 1))
        s = np.concatenate([np.geomspace(1.0, 0.1, rank) if rank else np.zeros(0), np.zeros(smaller - rank)])
        return _with_spectrum(draw, rows, columns, s, dtypes)

    return matrices()


# -- updates -------------------------------------------------------------------------------------------------------


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
    _bounds("min_side", min_side, "max_side", max_side)
    _choices("dtypes", dtypes)

    @st.composite
    def problems(draw: DrawFn) -> UpdateProblem:
        d_out, d_in = draw(st.integers(min_side, max_side)), draw(st.integers(min_side, max_side))
        batch = tuple(draw(st.lists(st.integers(1, 3), max_size=2))) if batched else ()
        dtype = np.dtype(draw(st.sampled_from(list(dtypes))))
        kind, rng = draw(st.sampled_from(SPECTRA)), _generator(draw)
        s = _update_spectrum(kind, min(d_out, d_in))
        delta = _product(rng, d_out, d_in, s, batch)
        if kind == "low_rank_plus_noise":
            delta = delta + 1e-2 * rng.standard_normal(delta.shape)
        base = rng.standard_normal(delta.shape).astype(dtype) if with_base and draw(st.booleans()) else None
        inputs = rng.standard_normal((d_in + 3, d_in)).astype(dtype) if with_inputs and draw(st.booleans()) else None
        return UpdateProblem(delta.astype(dtype), base=base, inputs=inputs)

    return problems()


# -- helpers -------------------------------------------------------------------------------------------------------


def _generator(draw: DrawFn) -> np.random.Generator:
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


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
    return KnownMatrix(_product(_generator(draw), rows, columns, s).astype(dtype), s)


def _product(
    rng: np.random.Generator, rows: int, columns: int, s: NDArray[np.float64], batch: tuple[int, ...] = ()
) -> NDArray[np.float64]:
    """U diag(s) Vᵀ (*batch, rows, columns) with U and V from the Haar measure."""
    from nla_llm.linalg import haar_orthogonal  # noqa: PLC0415 - loads SciPy with it

    u, v = haar_orthogonal(rows, rng, batch=batch), haar_orthogonal(columns, rng, batch=batch)
    product: NDArray[np.float64] = (u[..., : s.size] * s) @ np.swapaxes(v[..., : s.size], -1, -2)
    return product


def _bounds(lower_name: str, lower: float, upper_name: str, upper: float) -> None:
    if not 1 <= lower <= upper:
        raise ValueError(f"{lower_name} must be at least 1 and at most {upper_name}, got {lower} and {upper}")


def _subset(name: str, given: Collection[str], known: Sequence[str]) -> None:
    if isinstance(given, str) or not set(given) <= set(known):
        raise ValueError(f"{name} must be a collection of names among {', '.join(known)}, got {given!r}")


def _choices(name: str, given: Sequence[Any]) -> None:
    if isinstance(given, str) or not list(given):
        raise ValueError(f"{name} must be a sequence with at least one entry, got {given!r}")
