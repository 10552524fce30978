"""The runner: grids of cells become results in the store, whatever happens to single cells."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nla_llm.backend import thread_count

from . import catalogue
from .cells import key, seed
from .execution import Task
from .progress import progress as show_progress
from .provenance import collect
from .store import DEFAULT_PATH, Store
from .study import Study
from .summary import StudySummary, Summary, summarise
from .workers import RunError, in_process, in_workers, through_executor

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
    from concurrent.futures import Executor

    from .cells import Scalar
    from .store import Result

__all__ = ["Interrupted", "RunError", "StudySummary", "Summary", "dask_executor", "run"]

FINAL = ("ok", "diverged")  # what would come out the same again
DEFAULT_TIMEOUT = 600.0


class Interrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C; the cells that were finished are in the store, and ``summary`` tells of them."""

    exit_code = 130

    def __init__(self, summary: Summary) -> None:
        self.summary = summary
        left = sum(study.missing for study in summary.studies)
        super().__init__(f"stopped: {summary.computed} cells computed and kept, {left} left; the same command goes on")


@dataclass(frozen=True)
class _Plan:
    """What a run has to do for one study."""

    study: Study
    cells: Sequence[dict[str, Scalar]]
    tasks: Sequence[Task]


def run(
    studies: str | Path | Study | Iterable[str | Path | Study] | None = None,
    *,
    scale: str | None = None,
    store: str | Path | Store = DEFAULT_PATH,
    jobs: int | None = None,
    threads: int | None = None,
    executor: Executor | None = None,
    dask: str | None = None,
    timeout: float | None = DEFAULT_TIMEOUT,
    resume: bool = True,
    progress: bool = True,
    arguments: Sequence[str] | None = None,
) -> Summary:
    """Run studies and keep every result.

    Results do not depend on the order of the cells or on ``jobs``; to the last bit that takes the same number of BLAS
    threads (``threads``), since a sum split over threads is rounded in another order.

    Parameters
    ----------
    studies : str, Path, Study or iterable of these, optional
        Names, files ending in .py, or studies; the headline studies by default.
    scale : {"default", "small", "full"}, optional
        Which grid; by default "default" for studies that are named, and the scale that each headline study declares.
    store : str, Path or Store
        Where results are kept.
    jobs : int, optional
        Worker processes, as many as cores by default; 0 runs the cells in this process.
    threads : int, optional
        BLAS threads of each worker; cores/jobs by default. Cells of an ``exclusive`` study run alone, with all cores.
    executor : concurrent.futures.Executor, optional
        Runs the cells instead of worker processes of our own. Nothing stops a hanging cell where its workers do not run
        them in their main thread (threads, Dask), and when it breaks (a process pool whose worker dies), unfinished
        cells fail. An exclusive cell is alone among the cells of this run, not on the machine.
    dask : str, optional
        Address of a Dask scheduler, whose client's executor is used.
    timeout : float, optional
        Seconds for one cell; None for no limit.
    resume : bool
        Keep results of the same cells from the same code (``ok`` and ``diverged``) instead of computing them again.
    progress : bool
        Show a progress bar on standard error.
    arguments : sequence of str, optional
        Command line for the provenance.

    Raises
    ------
    Interrupted
        On Ctrl-C, a ``KeyboardInterrupt`` with the summary of what was kept.
    RunError
        If workers cannot be started, find other sources than this process, or Dask cannot be reached.
    nla_llm.study.StoreError
        If the store cannot be read or written.
    ValueError
        If a study is unknown, or an argument makes no sense.
    """
    started = time.monotonic()
    _check(jobs=jobs, threads=threads, timeout=timeout, executor=executor, dask=dask)
    chosen = _load(studies)
    scales = [scale or (study.headline if studies is None else "") or "default" for study in chosen]
    grids = [(study, study.grid(own)) for study, own in zip(chosen, scales, strict=True)]
    cores = thread_count()
    jobs = cores if jobs is None else jobs
    threads = max(1, cores // max(1, jobs)) if threads is None else threads
    how = "dask" if dask else type(executor).__name__ if executor else "processes" if jobs else "this process"
    settings = {
        "scale": _scales(chosen, scales),
        "executor": how,
        "jobs": jobs,
        "threads": threads,
        "timeout": timeout,
        "resume": resume,
    }
    facts: dict[str, Any] = collect(arguments) | {"studies": [study.name for study in chosen], "run": settings}
    with _opened(store) as kept, _executor(executor, dask) as pool:
        plans = [_plan(study, cells, kept, timeout=timeout, resume=resume) for study, cells in grids]
        number = kept.begin(facts)
        outcome = _Outcome()
        results = _results(plans, pool, jobs=jobs, threads=threads, cores=cores)
        size = _size_of(plans)
        total = sum(size(task) if size else 1 for plan in plans for task in plan.tasks)
        shown = show_progress(total, enabled=progress, size=size)
        try:
            with outcome, shown as advance, closing(results):
                for result in results:
                    kept.put(replace(result, run=number), replace_ok=not resume)
                    outcome.computed.add(result.key)
                    advance(result)
        finally:
            facts |= {"wall_seconds": round(time.monotonic() - started, 3), "interrupted": outcome.interrupted}
            kept.finish(number, facts)
        judged = (_summary(plan, kept, own, outcome) for plan, own in zip(plans, scales, strict=True))
        summary = Summary(tuple(judged), facts, kept.path, number)
    if outcome.interrupted:
        raise Interrupted(summary)
    return summary


@dataclass
class _Outcome:
    """What was computed until the end, or until something ended the run: Ctrl-C is held back, anything else goes on."""

    computed: set[str] = field(default_factory=set)
    interrupted: bool = False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self.interrupted = kind is not None
        return kind is not None and issubclass(kind, KeyboardInterrupt)


def _plan(
    study: Study, cells: Sequence[dict[str, Scalar]], store: Store, *, timeout: float | None, resume: bool
) -> _Plan:
    versions = [study.version(cell) for cell in cells]
    found = store.select(map(key, cells, versions)) if resume else ()
    final = {result.key for result in found if result.status in FINAL}
    source = study.source or study
    tasks = [
        Task(source, cell, version, timeout)
        for cell, version in zip(cells, versions, strict=True)
        if key(cell, version) not in final
    ]
    return _Plan(study, cells, tasks)


def _size_of(plans: Sequence[_Plan]) -> Callable[[Task | Result], int] | None:
    """Bytes that a cell reads, where all studies of a run say so of theirs."""
    sizes = {plan.study.name: plan.study.size for plan in plans if plan.study.size is not None}
    if len(sizes) < len(plans):
        return None
    return lambda one: sizes[str(one.cell["study"])](one.cell)


def _results(
    plans: Sequence[_Plan], pool: Executor | None, *, jobs: int, threads: int, cores: int
) -> Generator[Result]:
    """Results of all tasks as they come: first those that may share the machine, then those that must not.

    Those that share it start in the order of the hash of their cells: whatever has been done is then a fair sample of
    what is left, so that the progress bar does not promise an end that the slow cells, all of them last, put off.
    """
    shared = [task for plan in plans if not plan.study.exclusive for task in plan.tasks]
    shared.sort(key=lambda task: seed(task.cell))
    alone = [task for plan in plans if plan.study.exclusive for task in plan.tasks]
    if pool is not None:
        yield from through_executor(shared, pool)
        for task in alone:
            yield from through_executor([task], pool)
    elif jobs == 0:
        yield from in_process([*shared, *alone])
    else:
        yield from in_workers(shared, jobs=jobs, threads=threads)
        yield from in_workers(alone, jobs=1, threads=cores)


def _summary(plan: _Plan, store: Store, scale: str, outcome: _Outcome) -> StudySummary:
    computed, judge = frozenset(outcome.computed), not outcome.interrupted
    return summarise(plan.study, store, scale=scale, cells=plan.cells, computed=computed, judge=judge)


def _load(studies: str | Path | Study | Iterable[str | Path | Study] | None) -> list[Study]:
    if studies is None:
        studies = catalogue.headline()
    if isinstance(studies, str | Path | Study):
        studies = [studies]
    chosen = [study if isinstance(study, Study) else catalogue.load(study) for study in studies]
    if not chosen:
        raise ValueError(
            f"there is no study to run; name one of: {', '.join(catalogue.names()) or 'none is installed'}"
        )
    twice = {study.name for study in chosen if sum(other.name == study.name for other in chosen) > 1}
    if twice:
        raise ValueError(f"studies must have different names, got {sorted(twice)} more than once")
    return chosen


def _scales(chosen: Sequence[Study], scales: Sequence[str]) -> str:
    """The scale of all studies, or which studies have which."""
    names = {one: [study.name for study, own in zip(chosen, scales, strict=True) if own == one] for one in scales}
    return ", ".join(one if len(names) == 1 else f"{one} ({', '.join(names[one])})" for one in names)


def _check(
    *, jobs: int | None, threads: int | None, timeout: float | None, executor: Executor | None, dask: str | None
) -> None:
    for name, value, least in (("jobs", jobs, 0), ("threads", threads, 1)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds, or None, got {timeout!r}")
    if executor is not None and dask is not None:
        raise ValueError("pass either executor or dask, not both")


def _opened(store: str | Path | Store) -> AbstractContextManager[Store]:
    return nullcontext(store) if isinstance(store, Store) else Store(store)


@contextmanager
def _executor(executor: Executor | None, dask: str | None) -> Iterator[Executor | None]:
    if dask is None:
        yield executor
        return
    with dask_executor(dask) as made:
        yield made


@contextmanager
def dask_executor(address: str) -> Iterator[Executor]:
    """Executor of the Dask cluster whose scheduler is at ``address``.

    Raises
    ------
    RunError
        If the package is not installed, or no scheduler answers.
    """
    try:
        Client: Any = import_module("distributed").Client
    except ModuleNotFoundError as error:
        raise RunError('Dask needs the package distributed: pip install "nla-llm[dask]"') from error
    try:
        client = Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise RunError(f"no Dask scheduler answers at {address!r}: {error}") from error
    with client:
        yield client.get_executor()
