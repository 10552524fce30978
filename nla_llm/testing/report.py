"""What a conformance run found: one result for each check, and the report that holds them."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Literal, TypeAlias

__all__ = ["ConformanceError", "Report", "Result", "Status"]

Status: TypeAlias = Literal["passed", "failed", "skipped", "expected failure"]
_MARKS: dict[Status, str] = {"passed": "ok", "failed": "FAILED", "skipped": "skipped", "expected failure": "expected"}


class ConformanceError(AssertionError):
    """A method broke at least one law. The message lists every failure; ``report`` holds all results."""

    def __init__(self, report: Report) -> None:
        self.report = report
        lines = [f"  {r.name}: {r.law}\n    {r.reason}" for r in report.failures]
        count = f"{len(report.failures)} of {report.checks_run} checks failed for {report.method}"
        super().__init__("\n".join([count, *lines]))


@dataclass(frozen=True)
class Result:
    """The outcome of one check.

    Attributes
    ----------
    name
        Name of the check, the key of ``expected_failures``.
    law
        The sentence that was checked.
    status
        'passed', 'failed', 'skipped' or 'expected failure'.
    figure, tolerance
        What was measured and what it may be at most; None where the outcome is not a number.
    reason
        Why it failed or was skipped; what the figure is where it passed.
    """

    name: str
    law: str
    status: Status
    figure: float | None = None
    tolerance: float | None = None
    reason: str = ""

    def __str__(self) -> str:
        """One line: status, name, figure against tolerance, reason."""
        number = "" if self.figure is None else f" {self.figure:.2g} (at most {self.tolerance:.2g})"
        reason = f": {self.reason}" if self.reason else ""
        return f"{_MARKS[self.status]:>8}  {self.name}{number}{reason}"


@dataclass(frozen=True)
class Report:
    """All results of one method.

    Examples
    --------
    >>> report = Report("mine", (Result("row_sums", "rows sum to one", "passed", 0.0, 1e-12),))
    >>> report.passed, report.checks_run
    (True, 1)
    """

    method: str
    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        """Whether at least one check ran and none failed unexpectedly."""
        return self.checks_run > 0 and not self.failures

    @property
    def failures(self) -> tuple[Result, ...]:
        """The checks that failed and were not expected to."""
        return self._with("failed")

    @property
    def skipped(self) -> tuple[Result, ...]:
        """The checks that did not apply, each with its reason."""
        return self._with("skipped")

    @property
    def checks_run(self) -> int:
        """Number of checks that really ran: passed, failed, or failed as expected."""
        return len(self.results) - len(self.skipped)

    def __getitem__(self, name: str) -> Result:
        """The result of the named check."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(f"no check is called {name!r}; there are {', '.join(r.name for r in self.results)}")

    def _with(self, status: Status) -> tuple[Result, ...]:
        return tuple(r for r in self.results if r.status == status)

    def _headline(self) -> str:
        expected = len(self._with("expected failure"))
        counts = f"{self.checks_run} checks ran, {len(self._with('passed'))} passed, {len(self.failures)} failed"
        counts += f", {expected} failed as expected" if expected else ""
        return f"{self.method}: {counts}; {len(self.skipped)} skipped"

    def __str__(self) -> str:
        """The headline with the number of checks run, then one line for each check."""
        return "\n".join([self._headline(), *(str(r) for r in self.results)])

    def _repr_html_(self) -> str:
        colours = {"passed": "#009E73", "failed": "#D55E00", "skipped": "#777", "expected failure": "#E69F00"}
        rows = []
        for r in self.results:
            number = "" if r.figure is None else f"{r.figure:.2g} &le; {r.tolerance:.2g}"
            cells = (f'<b style="color:{colours[r.status]}">{r.status}</b>', escape(r.name), escape(r.law), number)
            rows.append("<tr>" + "".join(f"<td>{c}</td>" for c in (*cells, escape(r.reason))) + "</tr>")
        head = "".join(f"<th>{t}</th>" for t in ("status", "check", "law", "figure", "reason"))
        return f"<p>{escape(self._headline())}</p><table><tr>{head}</tr>{''.join(rows)}</table>"
