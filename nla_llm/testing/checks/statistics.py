"""Means and variances of the kernel before normalisation, over many seeds: unbiasedness and closed forms.

Only pairs with t = |x + y|² ≤ 1.5 are looked at (x = √scale q, y = √scale k): beyond that the tails of exponential
features are so heavy that no test of their mean from a few hundred draws means anything.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nla_llm.backend import to_numpy
from nla_llm.operators import RowNormalised
from nla_llm.problems import AttentionProblem
from nla_llm.testing.subject import Check, Figure, Skip, Subject

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators import Operator

__all__ = ["STATISTICS", "mean_is_one", "observe"]

DRAWS = 500
FALSE_ALARM = 1e-4  # of one check, for a method that keeps its promise; Bonferroni over the pairs
LARGEST_T = 1.5


class Observed(NamedTuple):
    """Ratios Â_ij / A_ij of independent draws for the pairs that are looked at, and where these are."""

    ratios: NDArray[np.float64]  # (draws, pairs)
    pairs: NDArray[np.bool_]  # (n_q, n_k)
    problem: AttentionProblem


def _unbiased(subject: Subject) -> Figure:
    subject.need("unbiased")
    ratios = observe(subject).ratios
    return mean_is_one(
        ratios, what="deviation of the mean of the kernel ratio from one, in units of what chance allows"
    )


def mean_is_one(ratios: NDArray[np.float64], *, what: str, one_sided: bool = False) -> Figure:
    """Largest deviation of the column means from one, in units of what chance allows at level :data:`FALSE_ALARM`."""
    from scipy.special import stdtrit  # noqa: PLC0415 - loads only where a test is made

    draws, columns = ratios.shape
    quantile = float(stdtrit(draws - 1, 1 - FALSE_ALARM / (2 * columns)))
    standard_error = np.std(ratios, axis=0, ddof=1) / draws**0.5
    rounding = 1e4 * float(np.finfo(np.float64).eps)
    deviation = np.mean(ratios, axis=0) - 1
    units = (deviation if one_sided else np.abs(deviation)) / (quantile * standard_error + rounding)
    worst = int(np.argmax(np.where(np.isnan(units), np.inf, units)))
    mean = (
        f"mean {1 + deviation[worst]:.3g}" if columns == 1 else f"worst of {columns} means {1 + deviation[worst]:.3g}"
    )
    note = f"{what} ({mean}, {draws} draws, level {FALSE_ALARM:g})"
    return Figure(float(units[worst]), 1.0, note)


@lru_cache(maxsize=1)  # two checks of one method look at the same draws
def observe(subject: Subject) -> Observed:
    """Many draws of the kernel, on tokens that come in pairs x, −x so that a recentring of the keys changes nothing."""
    problem = _antipodal(subject)
    exact = np.exp(problem.scale * problem.q @ problem.k.T)
    root = problem.scale**0.5
    t = np.sum((root * problem.q[:, None] + root * problem.k[None]) ** 2, axis=-1)
    pairs = t <= LARGEST_T
    method = subject.limited(problem)
    draws = [kernel(method(problem, rng=10_000 * (subject.seed + 1) + s))[pairs] for s in range(DRAWS)]
    return Observed(np.stack(draws) / exact[pairs], pairs, problem)


def kernel(op: Operator) -> NDArray[np.float64]:
    """The kernel before the division by row sums: exp(row_scale_log) A of a RowNormalised A."""
    if not isinstance(op, RowNormalised):
        raise AssertionError(  # noqa: TRY004 - a broken law, not a wrong argument
            f"the kernel before normalisation cannot be seen in a {type(op).__name__}; return "
            "RowNormalised(kernel, row_scale_log=...) from a method that declares something about it"
        )
    dense = to_numpy(op.op.dense()).astype(np.float64)
    if op.row_scale_log is None:
        return dense
    return dense * np.exp(to_numpy(op.row_scale_log).astype(np.float64))[..., None]


def _antipodal(subject: Subject) -> AttentionProblem:
    """Tokens ±a u along the diagonal, an axis and a random direction; opposite long ones have a small kernel.

    For a method that may refuse some data all coordinates are positive and no token stands beside its opposite: an odd
    kernel cancels such pairs, and products of coordinates or of signs vanish on the axes and on the diagonal.
    """
    d = 4
    drawn = np.random.default_rng([subject.seed, 7]).standard_normal(d)
    if subject.properties.partial:
        u = np.abs(np.random.default_rng([subject.seed, 7]).standard_normal((3, d)))
        u /= np.linalg.norm(u, axis=-1, keepdims=True)
        tokens = np.concatenate([a * u for a in (0.2, 0.4, 0.6)]) * d**0.25
        return AttentionProblem(tokens, tokens)
    u = np.stack([np.full(d, d**-0.5), np.eye(d)[0], drawn / np.linalg.norm(drawn)])
    x = np.concatenate([0.3 * u, 0.6 * u, 2.0 * u[::2]])
    tokens = np.concatenate([x, -x]) * d**0.25  # so that with the scale 1/√d they have the lengths above
    return AttentionProblem(tokens, tokens)


# -- theory --------------------------------------------------------------------------------------------------------


def _theory(subject: Subject) -> Figure:
    theory = getattr(subject.method, "theory", None)
    if theory is None:
        raise Skip("theory: not declared")
    if subject.properties.problem == "update":
        return _error_promised(subject, next(iter(subject.problems())))
    problem = _antipodal(subject)
    promise = subject.limited(problem).theory(problem)
    if promise is None or not promise.covers:
        raise Skip("theory: nothing is promised for a plain problem")
    if "relative_variance" in promise.covers:
        return _variance_promised(subject, problem)
    if "mean" in promise.covers:
        if promise.kind == "first order":
            raise Skip(f"theory '{promise.name}' ({promise.kind}) holds for small norms only, not for all pairs here")
        ratios = observe(subject).ratios / promise.mean()[observe(subject).pairs]
        return mean_is_one(ratios, what="deviation of the mean from the promised one, in units of what chance allows")
    return _error_promised(subject, subject.problem(23, 23))


def _variance_promised(subject: Subject, problem: AttentionProblem) -> Figure:
    """The squared deviation over its promised variance, pooled over the pairs, has mean one."""
    ratios, pairs, _ = observe(subject)
    promise = subject.limited(problem).theory(problem)
    variance = promise.relative_variance()[pairs]
    mean = promise.mean()[pairs] if "mean" in promise.covers else 1.0
    random = variance > 1e-12
    pooled = np.mean(((ratios - mean) ** 2)[:, random] / variance[random], axis=1)
    bound = promise.kind == "bound"
    return mean_is_one(pooled[:, None], what=f"variance over that of '{promise.name}'", one_sided=bound)


def _error_promised(subject: Subject, problem: AttentionProblem) -> Figure:
    """The Frobenius error, or over seeds its mean square, against the promised one; no draw may fall below a floor."""
    method = subject.limited(problem)
    promise = method.theory(problem)
    if promise is None or not promise.covers:
        raise Skip("theory: nothing is promised for a plain problem")
    if "error" not in promise.covers or promise.kind == "first order":
        raise Skip(f"theory '{promise.name}' ({promise.kind}) promises nothing that a few draws can test")
    try:
        promised = promise.error("frobenius")
    except ValueError as silence:
        raise Skip(str(silence)) from silence
    exact = to_numpy(problem.exact().dense())
    bound, floor = promise.kind == "bound", promise.kind == "floor"
    draws = 1 if subject.properties.deterministic else 20 if floor else 200
    errors = [np.linalg.norm(to_numpy(method(problem, rng=s).dense()) - exact, axis=(-2, -1)) for s in range(draws)]
    if draws > 1 and not floor:
        pooled = np.mean((np.stack(errors) / promised) ** 2, axis=tuple(range(1, 1 + promised.ndim)))
        return mean_is_one(pooled[:, None], what=f"mean square error over '{promise.name}'", one_sided=bound)
    excess = promised - np.stack(errors) if floor else errors[0] - promised
    scale = float(np.linalg.norm(exact))
    value = float(np.max(excess if bound or floor else np.abs(excess))) / scale
    return Figure(
        value, 1e4 * float(np.finfo(np.float64).eps), f"error against '{promise.name}', relative to the matrix"
    )


STATISTICS = (Check("unbiased", "The kernel before normalisation has the mean exp(logits).", _unbiased),)
THEORY = (Check("theory", "The measured variance or error is the promised one.", _theory),)
