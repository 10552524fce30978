"""Ways of running tasks: in this process, in worker processes of our own, through any executor.

Each is a generator of results in the order in which cells finish. The processes are not those of
``concurrent.futures.ProcessPoolExecutor``, because that pool can neither stop a task nor tell which task a dead process
was working on; here every worker has a pipe of its own, so the cell that killed its process fails and no other is
touched.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections import deque
from concurrent.futures import CancelledError, Executor, Future, as_completed
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from .cells import seed
from .execution import Task, describe, loaded, run_cell
from .store import Result
from .versions import package_version

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

GRACE_SECONDS = 5.0  # beyond its time limit, for a cell inside a long call that no signal interrupts
START_SECONDS = 300.0
_LOOK_SECONDS = 1.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class RunError(RuntimeError):
    """The run cannot go on; the sentence says why and what to do."""


def in_process(tasks: Iterable[Task]) -> Iterator[Result]:
    """Run tasks here, one after the other."""
    for task in tasks:
        yield run_cell(*task)


def through_executor(tasks: Sequence[Task], executor: Executor) -> Iterator[Result]:
    """Run tasks through any ``concurrent.futures`` executor.

    What stops a cell at its time limit is the worker itself, if it runs tasks in its main thread (processes do, threads
    and Dask do not). When the executor breaks, as a process pool does when one of its workers dies, the cells without a
    result fail; a resumed run takes them up again.
    """
    futures: dict[Future[Result], Task] = {}
    try:
        for task in tasks:
            try:
                futures[executor.submit(run_cell, *task)] = task
            except RuntimeError as error:  # BrokenExecutor, or shut down
                yield _failed(task, f"the executor took no more cells: {describe(error)}")
        for future in as_completed(futures):
            try:
                yield future.result()
            except (Exception, CancelledError) as error:
                yield _failed(futures[future], f"the executor lost the cell: {describe(error)}")
    finally:
        for future in futures:
            future.cancel()


def in_workers(tasks: Iterable[Task], *, jobs: int, threads: int, grace: float | None = None) -> Iterator[Result]:
    """Run tasks in ``jobs`` processes, each with BLAS held to ``threads`` threads.

    A cell whose process does not answer within its time limit and ``grace`` is a ``timeout``, and its process is killed
    and replaced; a cell whose process dies has ``failed``.

    Raises
    ------
    RunError
        If the processes cannot be started, or find other sources of the package than this process did.
    """
    waiting = deque(tasks)
    grace = GRACE_SECONDS if grace is None else grace
    _check_sendable(waiting)
    sources = sorted({task.source for task in waiting if isinstance(task.source, str)})
    workers: list[_Worker] = []
    try:
        while waiting or any(worker.task for worker in workers):
            workers = [worker for worker in workers if worker.alive]
            while len(workers) < min(jobs, len(waiting) + sum(worker.task is not None for worker in workers)):
                workers.append(_Worker(sources, threads))
            for worker in workers:
                if worker.ready and worker.task is None and waiting:
                    worker.give(waiting.popleft())
            wait([worker.connection for worker in workers], timeout=_LOOK_SECONDS)
            for worker in workers:
                result = worker.look(grace)
                if result is not None:
                    yield result
    finally:
        for worker in workers:
            worker.connection.close()  # idle ones end by themselves, all at once
        for worker in workers:
            worker.stop()


def _check_sendable(tasks: Iterable[Task]) -> None:
    for study in {id(task.source): task.source for task in tasks if not isinstance(task.source, str)}.values():
        try:
            pickle.dumps(study)
        except Exception as error:
            raise RunError(
                f"study {study.name!r} lives in this process only, so workers cannot run it: save it as a file and "
                f"pass its path, or run it here with jobs=0 ({error})"
            ) from error


class _Worker:
    """A process that runs one task at a time, and what it is doing."""

    def __init__(self, sources: Sequence[str], threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, sources, threads), name="nla-llm worker")
        with _surroundings(threads):
            self.process.start()
        theirs.close()
        self.started = time.monotonic()
        self.ready = False
        self.alive = True
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        """Start a task."""
        self.task, self.started = task, time.monotonic()
        with suppress(OSError):  # it died while idle; the next look finds that
            self.connection.send(task)

    def look(self, grace: float) -> Result | None:
        """Take what the process has to say; the result of its task, once there is one."""
        task = self.task
        elapsed = time.monotonic() - self.started
        try:
            if self.connection.poll():
                message = self.connection.recv()
                self.ready, self.task = True, None
                if isinstance(message, Result):
                    return message
                _check_version(message)
                return None
        except (EOFError, OSError):
            return self._ended(task)
        if self.process.exitcode is not None:
            return self._ended(task)
        if not self.ready and elapsed > START_SECONDS:
            self.stop()
            raise RunError(f"a worker process did not start within {START_SECONDS:.0f} seconds; try fewer with --jobs")
        if task is not None and task.timeout is not None and elapsed > task.timeout + grace:
            self.stop()
            return _failed(task, f"not finished after {task.timeout:g} seconds, and killed", "timeout", elapsed)
        return None

    def _ended(self, task: Task | None) -> Result | None:
        self.process.join(_LOOK_SECONDS)
        code, elapsed = self.process.exitcode, time.monotonic() - self.started
        self.stop()
        if not self.ready:
            raise RunError(
                f"a worker process ended with {_exit_word(code)} before its first cell; in a script of your own, "
                'call run under if __name__ == "__main__":'
            )
        return None if task is None else _failed(task, f"its process ended with {_exit_word(code)}", "failed", elapsed)

    def stop(self) -> None:
        """End the process: in peace if it is idle, else whatever it is doing."""
        self.connection.close()
        if self.ready and self.task is None:
            self.process.join(_LOOK_SECONDS)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.alive, self.task = False, None


def _check_version(version: str) -> None:
    if version != package_version():
        raise RunError("the code of nla_llm was changed since this process started; finished cells are kept: run again")


def serve(connection: Connection, sources: Sequence[str], threads: int) -> None:
    """Run tasks from a pipe until it is closed: the main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _limit_threads(threads)
    for source in sources:
        with suppress(Exception):  # each of its cells will say why
            loaded(source, {"study": source})
    with suppress(EOFError, OSError):
        connection.send(package_version())
        while True:
            connection.send(run_cell(*connection.recv()))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def _surroundings(threads: int) -> Iterator[None]:
    """What a worker about to start inherits: numbers of threads, read by libraries as they are loaded; no Ctrl-C."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    masks = hasattr(signal, "pthread_sigmask")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if masks else set()
    try:
        yield
    finally:
        if masks:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _limit_threads(threads: int) -> None:
    import scipy.linalg  # noqa: F401, PLC0415 - the libraries must be loaded to be limited
    from threadpoolctl import threadpool_limits  # noqa: PLC0415 - the libraries must be loaded to be limited

    threadpool_limits(limits=threads)


def _exit_word(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            name = signal.Signals(-code).name
            return f"{name} (the system does that when memory runs out)" if name == "SIGKILL" else name
    return f"exit code {code}"


def _failed(task: Task, reason: str, status: str = "failed", seconds: float = 0.0) -> Result:
    return Result(str(task.cell["study"]), task.cell, task.version or "", status, reason, (), seed(task.cell), seconds)
