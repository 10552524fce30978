"""Studies: a question, a grid of cells, what is measured in each, and the claims that the records decide."""

from . import catalogue
from .cells import Cell, Diverged, Record, Scalar, Skip, flatten, seed
from .claims import Claim
from .content import Figure, Table
from .provenance import collect, scrub
from .runner import Interrupted, RunError, run
from .store import DEFAULT_PATH, Result, Store
from .store_file import StoreError
from .study import Study
from .summary import StudySummary, Summary, summarise

__all__ = [
    "DEFAULT_PATH",
    "Cell",
    "Claim",
    "Diverged",
    "Figure",
    "Interrupted",
    "Record",
    "Result",
    "RunError",
    "Scalar",
    "Skip",
    "Store",
    "StoreError",
    "Study",
    "StudySummary",
    "Summary",
    "Table",
    "catalogue",
    "collect",
    "flatten",
    "run",
    "scrub",
    "seed",
    "summarise",
]
