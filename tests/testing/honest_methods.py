"""Methods without a fault, of other kinds than those of the package: the suite must not reject them."""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from nla_llm.methods import Properties
from nla_llm.methods.registry import require, whole_number
from nla_llm.operators import Dense, RowNormalised


@dataclass(frozen=True)
class TopKeys:
    """Softmax over the m largest logits of each row: exact at m = n, worse than uniform attention where it is flat."""

    m: int = 8
    properties: ClassVar[Properties] = Properties(
        budget="m", converges=True, nonnegative=True, shift_invariant=True, supports=frozenset({"causal"})
    )

    def __post_init__(self):
        whole_number("m", self.m)

    def __call__(self, problem, rng=None):
        require(self, problem)
        logits = problem.scale * (problem.q @ np.swapaxes(problem.k, -1, -2))
        if problem.causal:
            logits = np.where(np.tril(np.ones(logits.shape[-2:], dtype=bool)), logits, -np.inf)
        return Dense(softmax_where(logits, self.chosen(logits)))

    def chosen(self, logits):
        if self.m >= logits.shape[-1]:
            return np.ones(logits.shape, dtype=bool)
        return logits >= np.sort(logits, axis=-1)[..., -self.m, None]


class Neighbours(TopKeys):
    """Softmax over the keys at a distance below m: exact at m = n, good where attention is local."""

    properties = replace(TopKeys.properties, permutation_equivariant=False)

    def chosen(self, logits):
        i, j = np.indices(logits.shape[-2:])
        return np.broadcast_to((abs(i - j) < self.m) | (j == 0), logits.shape)


class ExactAtEveryBudget(TopKeys):
    """Nothing is left to fall."""

    def chosen(self, logits):
        return np.ones(logits.shape, dtype=bool)


@dataclass(frozen=True)
class TaylorPolynomial:
    """The exponential cut after an even degree, which keeps it positive."""

    degree: int = 8
    properties: ClassVar[Properties] = Properties(budget="degree", converges=True, nonnegative=True)

    def __post_init__(self):
        whole_number("degree", self.degree)

    def __call__(self, problem, rng=None):
        require(self, problem)
        logits = problem.scale * (problem.q @ np.swapaxes(problem.k, -1, -2))
        term, kernel = np.ones_like(logits), np.ones_like(logits)
        for i in range(1, self.degree + self.degree % 2 + 1):
            term = term * logits / i
            kernel = kernel + term
        return RowNormalised(Dense(kernel, nonnegative=True))


def undeclared(problem, rng=None):
    """Somebody's method in its simplest form: exact attention as a function, without any declaration."""
    return Dense(problem.exact(problem.q.dtype).dense())


def softmax_where(logits, keep):
    logits = np.where(keep, logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
