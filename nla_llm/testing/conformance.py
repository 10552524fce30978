"""The conformance suite: every law that a method declares, checked, counted and reported."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import is_numpy
from nla_llm.methods import Properties
from nla_llm.testing.checks import ATTENTION, OPERATOR, UPDATE
from nla_llm.testing.report import ConformanceError, Report, Result
from nla_llm.testing.subject import Skip, Subject

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from nla_llm.testing.subject import Check

__all__ = ["check_method", "check_names"]

STRUCTURES = {"causal", "window", "key_mask", "bias"}


def check_method(
    method: Any,
    *,
    problems: Iterable[Any] | None = None,
    rng: int = 0,
    expected_failures: Mapping[str, str] | None = None,
    raise_on_failure: bool = True,
) -> Report:
    """Check every law that ``method`` declares, and those that hold for all.

    What a method does not declare is reported as skipped, with the reason, never assumed.

    Parameters
    ----------
    method
        Anything that makes an operator of (problem, rng=...). See :class:`nla_llm.Method`.
    problems
        NumPy problems on which the checks that need no special data run, instead of the built-in ones.
    rng
        Seed of the data and of the calls, a whole number.
    expected_failures
        Names of checks that are known to fail, each with the reason, beside those that the method itself declares in
        ``properties.exceptions``. One that matches no check, or whose check passes, gives a warning.
    raise_on_failure
        False returns the report whatever it says.

    Returns
    -------
    Report
        Prints as one line for each check, after the number of checks that ran.

    Raises
    ------
    ConformanceError
        If a check fails that was not expected to; the message lists all of them.
    TypeError, ValueError
        If an argument makes no sense.

    Examples
    --------
    >>> import nla_llm as nl
    >>> report = check_method(nl.method("uniform"))
    >>> report.passed, report["converges"].reason
    (True, 'convergence: not declared')
    """
    _validate(method)
    subject = Subject(method, _seed(rng), _problems(problems))
    table = ATTENTION if subject.properties.problem == "attention" else UPDATE
    expected = {**subject.properties.exceptions, **(expected_failures or {})}
    _warn_of_unknown(expected, table)
    first = _run(OPERATOR, subject, expected)
    if first.status == "failed":
        rest = [
            Result(c.name, c.law, "skipped", reason="there is no operator to check") for c in table if c is not OPERATOR
        ]
    else:
        rest = [_run(check, subject, expected) for check in table if check is not OPERATOR]
    report = Report(subject.name, (first, *rest))
    if raise_on_failure and report.failures:
        raise ConformanceError(report)
    return report


def check_names(problem: str = "attention") -> tuple[str, ...]:
    """Names of all checks for methods of one kind of problem, the keys of ``expected_failures``.

    Raises
    ------
    ValueError
        If there is no such kind.

    Examples
    --------
    >>> "causality" in check_names(), "rank" in check_names("update")
    (True, True)
    """
    tables = {"attention": ATTENTION, "update": UPDATE}
    if problem not in tables:
        raise ValueError(f"problem must be one of {', '.join(tables)}, got {problem!r}")
    return tuple(check.name for check in tables[problem])


def _run(check: Check, subject: Subject, expected: Mapping[str, str]) -> Result:
    """One check as a result; whatever the method raises is a failure with that sentence."""

    def result(status: Any, reason: str, figure: Any = None) -> Result:
        value, tolerance = (None, None) if figure is None else (figure.value, figure.tolerance)
        return Result(check.name, check.law, status, value, tolerance, reason)

    try:
        with np.errstate(all="ignore"):  # what overflows is judged by its result
            figure = check.run(subject)
    except Skip as skip:
        return result("skipped", str(skip))
    except Exception as error:  # a failure of the method is a result
        reason = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
        return _failed(check, result, reason, None, expected)
    if figure is not None and not figure.holds:
        reason = f"{figure.what} is {figure.value:.3g}, at most {figure.tolerance:.3g} is allowed"
        return _failed(check, result, reason, figure, expected)
    if check.name in expected:
        warnings.warn(f"{check.name} was expected to fail ({expected[check.name]}) but passed", stacklevel=3)
    return result("passed", "" if figure is None else figure.what, figure)


def _failed(check: Check, result: Any, reason: str, figure: Any, expected: Mapping[str, str]) -> Result:
    if check.name in expected:
        return result("expected failure", f"{expected[check.name]} ({reason})", figure)  # type: ignore[no-any-return]
    return result("failed", reason, figure)  # type: ignore[no-any-return]


def _validate(method: Any) -> None:
    """Refuse what is no method, and declarations that mean nothing."""
    if not callable(method) or isinstance(method, type):
        raise TypeError(f"method must be callable with (problem, rng=...), got {method!r}; pass an instance")
    properties = getattr(method, "properties", None)
    if properties is None:
        return
    if not isinstance(properties, Properties):
        raise TypeError(f"method.properties must be nla_llm.Properties, got {type(properties).__name__}")
    if properties.problem not in {"attention", "update"}:
        raise ValueError(f"properties.problem must be 'attention' or 'update', got {properties.problem!r}")
    unknown = sorted(set(properties.supports) - STRUCTURES)
    if unknown:
        raise ValueError(f"properties.supports names {unknown}; the structures are {', '.join(sorted(STRUCTURES))}")
    if properties.budget is not None and not hasattr(method, properties.budget):
        raise ValueError(f"properties.budget names {properties.budget!r}, but the method has no such attribute")


def _warn_of_unknown(expected: Mapping[str, str], table: tuple[Check, ...]) -> None:
    known = [check.name for check in table]
    for name in expected:
        if name not in known:
            warnings.warn(
                f"expected_failures names {name!r}, which is no check; there are {', '.join(known)}", stacklevel=3
            )


def _seed(rng: Any) -> int:
    if isinstance(rng, bool) or not isinstance(rng, int | np.integer) or rng < 0:
        raise TypeError(f"rng must be a whole number >= 0, from which all draws of the suite derive, got {rng!r}")
    return int(rng)


def _problems(problems: Iterable[Any] | None) -> tuple[Any, ...]:
    if problems is None:
        return ()
    given = tuple(problems)
    if not given:
        raise ValueError("problems is empty, so nothing would be checked; leave it out for the built-in ones")
    for problem in given:
        if not is_numpy(getattr(problem, "q", getattr(problem, "delta", None))):
            raise TypeError(f"problems must be attention or update problems on NumPy arrays, got {problem!r}")
    return given
