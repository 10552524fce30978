"""Laws of methods for weight updates."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import to_numpy
from nla_llm.testing.subject import Check, Figure, Skip, Subject, at_most, compare

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.problems import UpdateProblem

__all__ = ["UPDATES"]


def _independent_batch(subject: Subject) -> Figure:
    problem = subject.update(batch=(2,))
    before = to_numpy(subject(problem).dense())[0]
    delta = _matrix(problem)
    other = replace(problem, delta=np.stack([delta[0], 7.0 * delta[1] + 1.0]))
    figures = [compare(to_numpy(subject(other).dense())[0], before, what="entry 0 when entry 1 changes")]
    if subject.properties.deterministic:
        alone = to_numpy(subject(replace(problem, delta=delta[0])).dense())
        figures.append(compare(alone, before, what="entry 0 alone against entry 0 in a batch"))
    return at_most(figures)


def _rank(subject: Subject) -> Figure:
    if subject.properties.budget is None:
        raise Skip("budget: not declared")
    problem = subject.update()
    s = _singular_values(subject.limited(problem)(problem, rng=subject.seed))
    rank = subject.limited_budget(problem)
    tail = float(s[rank]) / float(s[0]) if s[0] > 0 and s.size > rank else 0.0
    return Figure(tail, 1e2 * float(np.finfo(np.float64).eps), f"singular value {rank + 1} over the first")


def _never_below_the_floor(subject: Subject) -> Figure:
    problem = subject.update()
    op = subject(problem)
    delta = _matrix(problem)
    scale = float(np.linalg.norm(delta))
    rank = int(np.sum(_singular_values(op) > 1e-12 * scale))
    floor = float(np.linalg.norm(np.linalg.svd(delta, compute_uv=False)[rank:]))
    error = float(np.linalg.norm(to_numpy(op.dense()) - delta))
    what = f"error below the best possible of its rank {rank}"
    return Figure(max(floor - error, 0.0) / scale, 1e3 * float(np.finfo(np.float64).eps), what)


def _converges(subject: Subject) -> Figure:
    if not subject.properties.converges:
        raise Skip("convergence: not declared")
    if subject.properties.budget is None:
        raise AssertionError(
            "converges is declared without naming the budget that buys accuracy; set Properties.budget"
        )
    problem = subject.update()
    full = min(problem.d_out, problem.d_in)
    errors = [_relative_error(subject, problem, rank) for rank in (1, full // 4, full // 2, full)]
    if any(later > (1 + 1e-9) * earlier for earlier, later in pairwise(errors)):
        raise AssertionError(f"the error rises with the budget: {', '.join(f'{e:.3g}' for e in errors)}")
    return Figure(errors[-1], 1e4 * float(np.finfo(np.float64).eps), "relative error at full rank")


def _beats_zero(subject: Subject) -> Figure:
    if not subject.properties.converges:
        raise Skip("convergence: not declared")
    problem = subject.update()
    half = min(problem.d_out, problem.d_in) // 2
    return Figure(_relative_error(subject, problem, half), 0.8, "error at half the full rank over that of no update")


def _yardstick(subject: Subject) -> Figure:
    if not subject.properties.yardstick or subject.properties.converges:
        raise Skip("yardstick without convergence: not declared")
    problem = subject.update()
    delta = _matrix(problem)
    error = float(np.linalg.norm(to_numpy(subject(problem).dense()) - delta) / np.linalg.norm(delta))
    return Figure(0.5, error, "half the size of the update, below the error")


def _relative_error(subject: Subject, problem: UpdateProblem, rank: int) -> float:
    op = subject.with_budget(rank)(problem, rng=subject.seed)
    delta = _matrix(problem)
    return float(np.linalg.norm(to_numpy(op.dense()) - delta) / np.linalg.norm(delta))


def _matrix(problem: UpdateProblem) -> NDArray[np.float64]:
    return to_numpy(problem.exact().dense())


def _singular_values(op: Any) -> NDArray[np.float64]:
    return np.linalg.svd(to_numpy(op.dense()).astype(np.float64), compute_uv=False)


UPDATES = (
    Check("independent_batch", "No entry of the batch depends on another one.", _independent_batch),
    Check("rank", "The rank of the result is at most the declared one.", _rank),
    Check("floor", "The error is not below the best possible of the same rank.", _never_below_the_floor),
    Check("converges", "The error falls with the rank and vanishes at full rank.", _converges),
    Check("beats_zero", "At half the full rank the error is below that of no update.", _beats_zero),
    Check("yardstick", "A yardstick that does not claim to converge does not come near the update.", _yardstick),
)
