"""The method under test, with what the checks need of it: copies at other budgets, calls, comparisons."""

from __future__ import annotations

import copy
from dataclasses import dataclass, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import to_numpy
from nla_llm.methods import Properties, describe, properties_of
from nla_llm.problems import AttentionProblem, UpdateProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from nla_llm.operators import Operator

__all__ = ["Check", "Figure", "Skip", "Subject", "at_most", "compare", "frobenius"]

TOKENS = 67  # prime, and above the usual chunk of 64, so that incomplete blocks and chunk borders occur
SMALL_BUDGET = 16


class Skip(Exception):  # noqa: N818 - not an error: the check does not apply, for the reason given
    """The check does not apply to this method."""


@dataclass(frozen=True)
class Figure:
    """A measured number and what it may be at most; NaN is never at most anything."""

    value: float
    tolerance: float
    what: str

    @property
    def holds(self) -> bool:
        """Whether the number is within its tolerance."""
        return bool(self.value <= self.tolerance)


@dataclass(frozen=True)
class Check:
    """One law: its name, the sentence, and the function that tests it.

    ``run`` takes a :class:`Subject` and returns a :class:`Figure` or None; it raises :class:`Skip` where the law does
    not apply and AssertionError (or any other exception) where it is broken.
    """

    name: str
    law: str
    run: Callable[[Subject], Figure | None]


@dataclass(frozen=True, eq=False)
class Subject:
    """A method under test.

    Attributes
    ----------
    method
        The method as it was given.
    seed
        From which the data of the checks and the ``rng`` of the calls derive.
    given
        Problems of the caller, on which the checks that need no special data run instead of the built-in ones.
    """

    method: Any
    seed: int = 0
    given: tuple[Any, ...] = ()

    # -- what it declares ------------------------------------------------------------------------------------------

    @property
    def declared(self) -> bool:
        """Whether the method has properties at all."""
        return getattr(self.method, "properties", None) is not None

    @property
    def properties(self) -> Properties:
        """The declared properties, the most modest ones where there are none."""
        return properties_of(self.method)

    @property
    def name(self) -> str:
        """The method and its hyper-parameters."""
        options = describe(self.method)
        name = options.pop("method")
        return f"{name}({', '.join(f'{k}={v!r}' for k, v in options.items() if not k.startswith('_'))})"

    @property
    def floor(self) -> bool:
        """Whether it is the best possible rather than a method: a yardstick that converges."""
        return self.properties.yardstick and self.properties.converges

    def need(self, name: str) -> None:
        """Skip the check unless the property ``name`` is declared True."""
        if not getattr(self.properties, name):
            raise Skip(f"{name}: not declared")

    # -- calls -----------------------------------------------------------------------------------------------------

    def __call__(self, problem: Any, rng: Any = None) -> Operator:
        """Operator of the method on ``problem``; its budget is lowered where the problem is small."""
        op: Operator = self.limited(problem)(problem, rng=self.seed if rng is None else rng)
        return op

    def limited(self, problem: Any) -> Any:
        """The method, with its budget lowered to what a small problem allows."""
        return self.method if self.properties.budget is None else self.with_budget(self.limited_budget(problem))

    def limited_budget(self, problem: Any) -> int:
        """Budget of :meth:`limited`."""
        shape = (problem.n_q, problem.n_k) if isinstance(problem, AttentionProblem) else problem.delta.shape[-2:]
        return int(min(*shape, SMALL_BUDGET, self.budget))

    @property
    def budget(self) -> int:
        """Value of the budget field."""
        return int(getattr(self.method, str(self.properties.budget)))

    def with_budget(self, value: int) -> Any:
        """The same method with another budget."""
        name = str(self.properties.budget)
        if value == getattr(self.method, name):
            return self.method
        if is_dataclass(self.method):
            return replace(self.method, **{name: value})  # type: ignore[type-var]
        other = copy.copy(self.method)
        setattr(other, name, value)
        return other

    # -- problems --------------------------------------------------------------------------------------------------

    def arrays(self, *shapes: tuple[int, ...], stream: int = 0) -> list[NDArray[np.float64]]:
        """Standard normal arrays; of their absolute values for a method that may refuse some signs."""
        rng = np.random.default_rng([self.seed, stream])
        drawn = [rng.standard_normal(shape) for shape in shapes]
        return [np.abs(a) for a in drawn] if self.properties.partial else drawn

    def problem(
        self, n_q: int = TOKENS, n_k: int = TOKENS, *, d: int = 4, batch: tuple[int, ...] = (), **structure: Any
    ) -> AttentionProblem:
        """Gaussian queries, keys and three columns of values."""
        q, k, v = self.arrays((*batch, n_q, d), (*batch, n_k, d), (*batch, n_k, 3))
        return AttentionProblem(q, k, v, **structure)

    def update(self, d_out: int = 29, d_in: int = 23, *, batch: tuple[int, ...] = ()) -> UpdateProblem:
        """An update with slowly falling singular values: column j of a Gaussian matrix times (j + 1)^(-1/2).

        The calibration inputs, for methods that look at them, are twice as many as an input has entries.
        """
        (drawn,), (inputs,) = self.arrays((*batch, d_out, d_in)), self.arrays((2 * d_in, d_in), stream=5)
        return UpdateProblem(drawn * np.arange(1, d_in + 1) ** -0.5, inputs=inputs)

    def problems(self) -> Iterator[Any]:
        """The problems of the checks that need no special data: one for each structure that is supported."""
        if self.given:
            yield from self.given
            return
        if self.properties.problem == "update":
            yield from (self.update(batch=(2,)), self.update(7, 31))
            return
        yield self.problem(batch=(2,))
        yield self.problem(5, 31, d=1)
        options = self._structures()
        for name in sorted(self.properties.supports & set(options)):
            yield self.problem(**{name: options[name]})
        if {"causal", "key_mask"} <= self.properties.supports:
            yield self.problem(causal=True, key_mask=options["key_mask"])

    def _structures(self) -> dict[str, Any]:
        """An example of each structure; together they leave every query a key."""
        bias = np.random.default_rng([self.seed, 4]).standard_normal((TOKENS, TOKENS))
        return {"causal": True, "window": 9, "key_mask": np.arange(TOKENS) % 3 != 1, "bias": bias}


# -- comparisons ---------------------------------------------------------------------------------------------------


def frobenius(a: Any) -> float:
    """Frobenius norm of an array over all its axes, in float64."""
    return float(np.linalg.norm(np.asarray(to_numpy(a), dtype=np.float64)))


def compare(
    actual: Any, expected: Any, *, times_eps: float = 1e4, dtype: Any = None, what: str = "relative difference"
) -> Figure:
    """Relative Frobenius difference against ``times_eps`` units of rounding of ``dtype``, or of the coarser of the two.

    The default constant is empirical: features of both signs lose about three digits in the row sums.
    """
    a, b = to_numpy(actual), to_numpy(expected)
    if a.shape != b.shape:
        raise AssertionError(f"shapes differ: {a.shape} instead of {b.shape}")
    eps = max(float(np.finfo(x).eps) for x in ((a.dtype, b.dtype) if dtype is None else (dtype,)))
    scale = max(frobenius(b), float(np.finfo(np.float64).tiny))
    return Figure(frobenius(a.astype(np.float64) - b) / scale, times_eps * eps, what)


def at_most(figures: Sequence[Figure]) -> Figure:
    """The figure that is worst in comparison with its tolerance."""
    broken = [f for f in figures if not f.holds]  # a NaN compares with nothing, so it has to be looked for
    return broken[0] if broken else max(figures, key=lambda f: f.value / max(f.tolerance, 1e-300))
