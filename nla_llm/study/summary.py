"""What a run came to: for each study its results, its claims, and what stands in the way of either."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .cells import STATUSES, key
from .claims import Claim
from .content import pieces
from .execution import describe
from .export import to_frame
from .progress import duration, line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pandas import DataFrame

    from .cells import Scalar
    from .store import Result, Store
    from .study import Study

_SHOWN = 5  # failures told of one study
_HARMLESS = ("ok", "skipped")


@dataclass(frozen=True)
class StudySummary:
    """What is known of one study at one scale.

    Attributes
    ----------
    study : Study
        The study.
    scale : str
        The scale.
    cells : int
        Cells of the grid.
    results : tuple of Result
        What became of them, in the order of the grid.
    computed : int
        How many of them were computed in this run; the others were in the store.
    claims : tuple of Claim
        What the records say to each claim.
    trouble : str
        Why there are no claims, or not all; empty where nothing went wrong.
    provenance : tuple of dict
        Provenance of every run that contributed, oldest first.
    """

    study: Study
    scale: str
    cells: int
    results: tuple[Result, ...] = field(repr=False)
    computed: int
    claims: tuple[Claim, ...]
    trouble: str
    provenance: tuple[dict[str, Any], ...] = field(repr=False)

    @property
    def counts(self) -> dict[str, int]:
        """Cells of each status that occurs."""
        found = Counter(result.status for result in self.results)
        return {status: found[status] for status in STATUSES if found[status]}

    @property
    def missing(self) -> int:
        """Cells without a result."""
        return self.cells - len(self.results)

    @property
    def failures(self) -> list[Result]:
        """Results that are neither ok nor skipped."""
        return [result for result in self.results if result.status not in _HARMLESS]

    @cached_property
    def records(self) -> DataFrame:
        """Records as a DataFrame, see `nla_llm.study.Store.frame`."""
        return to_frame(self.results)

    @property
    def exit_code(self) -> int:
        """0; 1 if a cell or the judging of claims failed; 3 if a claim is contradicted."""
        if self.failures or self.missing or self.trouble:
            return 1
        return 3 if any(claim.surprises for claim in self.claims) else 0

    def lines(self) -> list[str]:
        """What a terminal shows of it."""
        counts = ", ".join(f"{count} {status}" for status, count in self.counts.items()) or "no results"
        text = [f"{self.study.name}: {self.cells} cells, {counts}; {self.computed} computed now"]
        text += [f"  {line(result)}" for result in self.failures[:_SHOWN]]
        if len(self.failures) > _SHOWN:
            text.append(f"  and {len(self.failures) - _SHOWN} more that did not end well")
        if self.missing:
            text.append(f"  {self.missing} cells are still to be computed")
        if self.trouble:
            text.append(f"  {self.trouble}")
        return text + [f"  {_claim_line(claim)}" for claim in self.claims]


@dataclass(frozen=True)
class Summary:
    """What a run came to, and the exit code it deserves."""

    studies: tuple[StudySummary, ...]
    provenance: dict[str, Any] = field(repr=False)
    store: Path
    run: str

    @property
    def computed(self) -> int:
        """Cells computed in this run."""
        return sum(study.computed for study in self.studies)

    @property
    def exit_code(self) -> int:
        """0 if all is well; 1 if a cell or the judging of claims failed; else 3 if a claim is contradicted."""
        codes = {study.exit_code for study in self.studies}
        return 1 if 1 in codes else max(codes, default=0)

    def lines(self) -> list[str]:
        """What a terminal shows of it."""
        text = [line for study in self.studies for line in study.lines()]
        return [*text, f"{duration(self.provenance['wall_seconds'])}; results in {self.store.name}"]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def summarise(
    study: Study,
    store: Store,
    *,
    scale: str = "default",
    cells: Sequence[dict[str, Scalar]] | None = None,
    computed: frozenset[str] = frozenset(),
    judge: bool = True,
) -> StudySummary:
    """Collect from the store what is known of a study: after a run, or for a report without one.

    Parameters
    ----------
    study, store : Study, Store
        Which study, and where its results are.
    scale : str
        Which grid.
    cells : sequence of dict, optional
        That grid, where it is at hand.
    computed : frozenset of str
        Keys of the results computed just now.
    judge : bool
        Whether to let the study decide its claims.
    """
    cells = study.grid(scale) if cells is None else cells
    results = tuple(store.select(key(cell, study.version(cell)) for cell in cells))
    provenance = tuple(store.provenance(run) for run in store.runs() if run in {result.run for result in results})
    claims, trouble = _judge(study, results) if judge else ((), "")
    trouble = trouble if cells else f"the study has no cells at scale {scale!r}"
    now = sum(result.key in computed for result in results)
    return StudySummary(study, scale, len(cells), results, now, claims, trouble, provenance)


def _judge(study: Study, results: Sequence[Result]) -> tuple[tuple[Claim, ...], str]:
    if not any(result.status == "ok" for result in results):
        return (), ""  # nothing to judge by; the statuses say why
    claims, failed = pieces(study.claims, to_frame(results))
    if not all(isinstance(claim, Claim) for claim in claims):
        return (), "the claims could not be judged: TypeError: claims(records) must return a list of Claim"
    troubles = [f"{name or 'the claims'} could not be judged: {describe(error)}" for name, error in failed]
    return tuple(claims), "; ".join(troubles)


def _claim_line(claim: Claim) -> str:
    note = f" (expected: {claim.expected})" if claim.surprises or claim.expected != "confirmed" else ""
    source = f" [{claim.source}]" if claim.source else ""
    return f"{claim.verdict}{note}: {claim.sentence}{source}: {claim.number}"
