"""Claims: sentences that the records of a study confirm, refute or leave open, each with its number."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Callable

Verdict = Literal["confirmed", "refuted", "open"]
Sense = Literal["<", "<=", ">", ">="]
_HOLDS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Claim:
    """A sentence with the verdict of the measurements.

    Attributes
    ----------
    sentence : str
        What is claimed, with its conditions.
    verdict : {"confirmed", "refuted", "open"}
        What the records say.
    number : str
        The measured number on which the verdict rests, with its interval.
    expected : {"confirmed", "refuted"}
        The verdict that the study expects: "refuted" for a published claim that is known not to reproduce.
    source : str
        Who claims it: authors, year, arXiv number.

    Raises
    ------
    ValueError
        If the sentence is empty, or ``verdict`` or ``expected`` is another word.
    """

    sentence: str
    verdict: Verdict
    number: str
    expected: Verdict = "confirmed"
    source: str = ""

    def __post_init__(self) -> None:
        if not self.sentence.strip():
            raise ValueError("a claim needs a sentence")
        for name in ("verdict", "expected"):
            if getattr(self, name) not in get_args(Verdict):
                raise ValueError(f"{name} must be one of {get_args(Verdict)}, got {getattr(self, name)!r}")
        if self.expected == "open":
            raise ValueError("expected must be 'confirmed' or 'refuted': an open verdict is never held against a study")

    @property
    def surprises(self) -> bool:
        """Whether the measurements contradict what the study expects."""
        return self.verdict not in (self.expected, "open")

    @classmethod
    def decide(
        cls,
        sentence: str,
        low: float,
        high: float,
        threshold: float,
        sense: Sense = "<",
        *,
        number: str | None = None,
        expected: Verdict = "confirmed",
        source: str = "",
    ) -> Claim:
        """Claim that an estimated quantity is on one side of a threshold.

        It is confirmed only if the whole interval [low, high] is on the right side, refuted only if the whole interval
        is on the wrong side, and open otherwise; so also where an end is NaN.

        Raises
        ------
        ValueError
            If ``low`` exceeds ``high``, ``threshold`` is NaN or ``sense`` is unknown.

        Examples
        --------
        >>> Claim.decide("the error is below one half", 0.3, 0.4, 0.5).verdict
        'confirmed'
        >>> Claim.decide("the error is below one half", 0.3, 0.6, 0.5).verdict
        'open'
        >>> Claim.decide("the error is below one half", 0.5, 0.6, 0.5).verdict
        'refuted'
        """
        if sense not in _HOLDS:
            raise ValueError(f"sense must be one of {tuple(_HOLDS)}, got {sense!r}")
        if low > high or math.isnan(threshold):
            raise ValueError(f"a claim needs low <= high and a threshold, got [{low}, {high}] and {threshold}")
        ends = [_HOLDS[sense](float(end), float(threshold)) for end in (low, high)]
        verdict: Verdict = "confirmed" if all(ends) else "open" if any(ends) else "refuted"
        if math.isnan(low) or math.isnan(high):
            verdict = "open"
        return cls(sentence, verdict, number or _interval(low, high, threshold, sense), expected, source)


def _interval(low: float, high: float, threshold: float, sense: str) -> str:
    measured = f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
    return f"{measured}, claimed {sense} {threshold:.4g}"
