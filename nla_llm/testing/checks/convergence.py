"""Does the error fall with the budget, and is the method better than doing nothing.

Each random figure is a Student test over independent draws with fixed seeds: a method whose mean logarithmic error is
within the bound fails with probability below :data:`FALSE_ALARM`, a method that misses it by a wide margin always
does. The bounds themselves are empirical: an honest estimator stays below them by a factor of five or more, the
faults that they are meant to catch lie above them by a factor of two or more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import to_numpy
from nla_llm.methods import method
from nla_llm.problems import AttentionProblem
from nla_llm.testing.subject import Check, Figure, Skip, Subject

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CONVERGENCE"]

FALSE_ALARM = 1e-3
DRAWS = 6
TOKENS = 37
LADDER = (8, 32, TOKENS, 64, 1024, 16384)
MOST_OPERATIONS = 1e9  # of one call: a higher budget is not tried if it might take more, operations growing as m²


def _converges(subject: Subject) -> Figure:
    """At the largest budget the error on an easy problem is far below that of uniform attention."""
    _claims(subject)
    problem = _easy(subject)
    log_errors = _climb(subject, problem)
    last = max(log_errors)
    uniform = _log_errors(method("uniform"), problem, draws=1, reference=_reference(subject, problem))
    return _test(log_errors[last] - uniform, 0.2, f"error at {subject.properties.budget}={last} over that of uniform")


def _error_falls(subject: Subject) -> Figure:
    """Where all logits are negative, the error must still fall: an epsilon beside the features stops it."""
    _claims(subject)
    log_errors = _climb(subject, _opposed(subject))
    last = max(log_errors)
    first = max([b for b in log_errors if b <= last // 256], default=min(log_errors))
    if np.mean(log_errors[last]) <= np.log(1e-6):  # it has arrived at rounding
        return Figure(float(np.exp(np.mean(log_errors[last]))), 1e-6, f"error at {subject.properties.budget}={last}")
    if first == last:
        raise AssertionError(f"only one budget ({last}) was accepted, so nothing can fall; the others were refused")
    what = f"error at {subject.properties.budget}={last} over that at {first}"
    return _test(log_errors[last] - log_errors[first], 0.5, what)


def _beats_random_keys(subject: Subject) -> Figure:
    """At a budget far below the number of keys, on flat, on sharp or on local attention."""
    _claims(subject)
    problems = (_easy(subject), _sharp(subject), _local(subject))
    return min((_against_random_keys(subject, problem) for problem in problems), key=lambda figure: figure.value)


def _yardstick(subject: Subject) -> Figure:
    if not subject.properties.yardstick:
        raise Skip("yardstick: not declared")
    if subject.properties.converges:
        raise Skip("a yardstick that declares convergence: checked under 'converges'")
    problem, budget = _easy(subject), 8
    candidate = subject.method if subject.properties.budget is None else subject.with_budget(budget)
    errors = _log_errors(candidate, problem, draws=DRAWS)
    rivals = [_log_errors(method("uniform"), problem, draws=1), _log_errors(method("random_keys", m=budget), problem)]
    best = min(float(np.mean(r)) for r in rivals)
    return Figure(
        0.5, float(np.exp(np.mean(errors) - best)), "half the error of doing nothing, below that of the method"
    )


# -- helpers -------------------------------------------------------------------------------------------------------


def _claims(subject: Subject) -> None:
    if not subject.properties.converges:
        raise Skip("convergence: not declared")
    if subject.properties.target != "softmax" and not hasattr(subject.method, "target"):
        raise Skip(f"it converges to another target ({subject.properties.target}), which is not known here")
    if subject.properties.budget is None:
        raise AssertionError(
            "converges is declared without naming the budget that buys accuracy; set Properties.budget"
        )


def _climb(subject: Subject, problem: AttentionProblem) -> dict[int, NDArray[np.float64]]:
    """Logarithmic errors at each budget of the ladder that the method accepts, up to rounding or to its cost.

    Where the ladder ends depends on formulas alone, never on the time that something took.
    """
    found: dict[int, NDArray[np.float64]] = {}
    refusal, reference = None, _reference(subject, problem)
    for budget in LADDER:
        try:
            candidate = subject.with_budget(budget)
            found[budget] = _log_errors(
                candidate, problem, seed=subject.seed, draws=_draws(subject), reference=reference
            )
        except ValueError as error:
            refusal = error
            continue
        growth = (_next(budget) / budget) ** 2
        if np.max(found[budget]) < np.log(1e-9) or _operations(candidate, problem, budget) * growth > MOST_OPERATIONS:
            break
    if not found:
        raise AssertionError(f"every budget of {LADDER} was refused: {refusal}")
    return found


def _next(budget: int) -> int:
    return min((b for b in LADDER if b > budget), default=budget)


def _operations(candidate: Any, problem: AttentionProblem, budget: int) -> float:
    """Those of the declared cost; without one, a multiply-add for each pair of tokens and unit of the budget."""
    if getattr(candidate, "cost", None) is None:
        return float(problem.n_q * problem.n_k * budget)
    return float(candidate.cost(problem).at(problem, candidate).total())


def _draws(subject: Subject) -> int:
    return 1 if subject.properties.deterministic else DRAWS


def _reference(subject: Subject, problem: AttentionProblem) -> NDArray[Any]:
    """What the method aims at, as a matrix: its ``target(problem)`` where that is not softmax."""
    aim = problem.exact() if subject.properties.target == "softmax" else subject.method.target(problem)
    return to_numpy(aim.dense())


def _log_errors(
    candidate: Any,
    problem: AttentionProblem,
    *,
    seed: int = 0,
    draws: int = DRAWS,
    reference: NDArray[Any] | None = None,
) -> NDArray[np.float64]:
    """Logarithms of the relative Frobenius errors of independent draws, floored at rounding."""
    exact = to_numpy(problem.exact().dense()) if reference is None else reference
    errors = [
        np.linalg.norm(to_numpy(candidate(problem, rng=1000 * seed + s).dense()) - exact) / np.linalg.norm(exact)
        for s in range(draws)
    ]
    return np.log(np.maximum(errors, 1e-15))


def _test(log_ratios: NDArray[np.float64], bound: float, what: str) -> Figure:
    """Geometric mean of ratios, lowered to its one-sided confidence limit where it is random, against the bound."""
    mean, n = float(np.mean(log_ratios)), log_ratios.size
    if n == 1:
        return Figure(float(np.exp(mean)), bound, what)
    from scipy.special import stdtrit  # noqa: PLC0415 - loads only where a test is made

    limit = mean - float(stdtrit(n - 1, 1 - FALSE_ALARM)) * float(np.std(log_ratios, ddof=1)) / n**0.5
    note = f"{what}: geometric mean {np.exp(mean):.2g}, lower limit at level {FALSE_ALARM:g}"
    return Figure(float(np.exp(limit)), bound, note)


def _against_random_keys(subject: Subject, problem: AttentionProblem, budget: int = 8) -> Figure:
    reference = _reference(subject, problem)  # the yardstick is held against the same matrix
    try:
        errors = _log_errors(
            subject.with_budget(budget), problem, seed=subject.seed, draws=_draws(subject), reference=reference
        )
    except FloatingPointError as refusal:
        if not subject.properties.partial:
            raise
        return Figure(np.inf, 0.5, f"no error, since the problem was refused: {refusal}")  # no reason to be believed
    yardstick = _log_errors(method("random_keys", m=budget), problem, seed=subject.seed + 1, reference=reference)
    return _test(errors - np.mean(yardstick), 0.5, f"error over that of {budget} random keys")


def _ball(rng: np.random.Generator, n: int, d: int, low: float, high: float) -> NDArray[np.float64]:
    """Points of uniform direction with norms from ``low`` to ``high``: unequal, as equal ones hide wrong kernels."""
    x = rng.standard_normal((n, d))
    scaled: NDArray[np.float64] = x / np.linalg.norm(x, axis=1, keepdims=True) * rng.uniform(low, high, (n, 1))
    return scaled


def _easy(subject: Subject, offset: float = 0.0, outlier: float | None = None) -> AttentionProblem:
    """Small logits; queries and keys may be shifted in opposite directions, and one key far away is hardly seen."""
    rng = np.random.default_rng([subject.seed, 5])
    d = 2
    shift = np.full(d, offset / d**0.5)
    q, k = _ball(rng, TOKENS, d, 0.2, 0.9) + shift, _ball(rng, TOKENS, d, 0.2, 0.9) - shift
    if outlier is not None:
        k[TOKENS // 2] = -outlier / d**0.5
    # the same logits as scale 1 and no other scale, so that a method that forgets its scale is found out
    factor = d**0.25
    return AttentionProblem(factor * q, factor * k)


def _opposed(subject: Subject) -> AttentionProblem:
    """All kernel values are small against the largest features, so that an additive epsilon drowns them."""
    return _easy(subject, offset=1.3, outlier=3.0)


def _sharp(subject: Subject) -> AttentionProblem:
    """Every query looks at the few keys nearest to a direction of its own."""
    rng = np.random.default_rng([subject.seed, 6])
    k = _ball(rng, TOKENS, 8, 0.9, 1.1)
    return AttentionProblem(12.0 * k[rng.permutation(TOKENS)], k, scale=1.0)


def _local(subject: Subject) -> AttentionProblem:
    """Every query looks at the tokens beside it: keys go round a circle once."""
    angle = 2 * np.pi * np.arange(TOKENS) / TOKENS + 0.1 * subject.seed
    k = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    return AttentionProblem(20.0 * k, k, scale=1.0)


CONVERGENCE = (
    Check("converges", "At a large budget the error is a fifth of that of uniform attention, or less.", _converges),
    Check("error_falls", "The error falls with the budget, also where all logits are negative.", _error_falls),
    Check(
        "beats_random_keys",
        "Flat, sharp or local: somewhere the error is at most half of that of as many random keys.",
        _beats_random_keys,
    ),
    Check("yardstick", "A yardstick that does not claim to converge does not come near the target.", _yardstick),
)
