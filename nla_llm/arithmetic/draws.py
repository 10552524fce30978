"""A generator that counts the random numbers it gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.arithmetic.tally import record

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CountingGenerator"]

_DRAWS = (
    "chisquare", "choice", "exponential", "gamma", "integers", "laplace", "normal", "permutation", "permuted", "random",
    "standard_cauchy", "standard_exponential", "standard_gamma", "standard_normal", "standard_t", "uniform",
)  # fmt: skip


class CountingGenerator(np.random.Generator):
    """``numpy.random.Generator`` with the same stream as ``rng``, which it advances, that tallies the numbers drawn.

    A number is an entry of what a call returns: the 3 of ``choice(10, 3)``, the n of ``permutation(n)``.

    Examples
    --------
    >>> from nla_llm.arithmetic import tally
    >>> with tally() as t:
    ...     x = CountingGenerator(np.random.default_rng(0)).standard_normal((2, 3))
    >>> t.draw, bool(np.all(x == np.random.default_rng(0).standard_normal((2, 3))))
    (6, True)
    """

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__(rng.bit_generator)
        self._plain = rng


def _counting(name: str) -> Callable[..., Any]:
    def method(self: CountingGenerator, *args: Any, **kwargs: Any) -> Any:
        result = getattr(self._plain, name)(*args, **kwargs)  # not of self: some methods call others, counted twice
        record("draw", np.size(result))
        return result

    method.__name__ = name
    method.__doc__ = f"``numpy.random.Generator.{name}``, counted."
    return method


for _name in _DRAWS:
    setattr(CountingGenerator, _name, _counting(_name))
