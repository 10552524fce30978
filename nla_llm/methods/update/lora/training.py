"""Training watched: errors, condition numbers and angles along the way, and the best rate of a grid."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from nla_llm.backend import Array, namespace, to_numpy
from nla_llm.methods.update.lora.factors import Factors, largest_angle, pair_condition
from nla_llm.methods.update.shared import formed

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from nla_llm.methods.update.lora.lora import Lora
    from nla_llm.problems import UpdateProblem

__all__ = ["Sweep", "Trajectory", "recorded_steps", "sweep", "train"]

BLOWN_UP = 1e6  # relative error from which training counts as diverged, though its numbers are finite still
ROUNDING = 1e-12  # relative errors up to here count as equal: which of them is least is chance (empirical)
QUANTITIES = ("frobenius", "data", "kappa_A", "kappa_B", "kappa_product", "angle_left", "angle_right")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What was seen of one training.

    Attributes
    ----------
    steps
        Numbers of the steps that were recorded, 0 for the start.
    columns
        For each name of ``QUANTITIES`` an array (recorded, ...) over the batch axes: errors relative to the update,
        in the Frobenius norm and in that of the outputs on the inputs (absent without inputs); condition numbers of A,
        B and BA; largest principal angles, in radians, between the column (row) space of BA and that of the r leading
        singular vectors of the update. No entry is NaN.
    status
        "ok", or "diverged": an entry left the finite numbers, or the error exceeded a million.
    reason
        Of a divergence, the sentence.
    factors
        The last finite ones.
    """

    steps: tuple[int, ...]
    columns: dict[str, NDArray[np.float64]]
    status: Literal["ok", "diverged"]
    reason: str = ""
    factors: Factors | None = field(default=None, repr=False)

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self.columns[name]

    def final(self, name: str = "frobenius") -> NDArray[np.float64]:
        """Last value of a column; infinite where training diverged."""
        last = self.columns[name][-1]
        return last if self.status == "ok" else np.full_like(last, np.inf)

    def steps_to(self, tolerance: float, name: str = "frobenius") -> int | None:
        """First recorded step from which the column stays at or below a tolerance, in every entry of the batch.

        None where training diverged or never came there.
        """
        values = self.columns[name]
        above = np.any(values > tolerance, axis=tuple(range(1, values.ndim)))
        if self.status != "ok" or above[-1]:
            return None
        return self.steps[int(np.flatnonzero(above)[-1]) + 1] if above.any() else self.steps[0]


def recorded_steps(steps: int, number: int = 40) -> tuple[int, ...]:
    """About ``number`` steps from 0 to ``steps``, spaced as a geometric sequence.

    Examples
    --------
    >>> recorded_steps(100, 5)
    (0, 1, 3, 10, 32, 100)
    """
    if steps == 0:
        return (0,)
    return (0, *(int(t) for t in np.unique(np.geomspace(1, steps, number).round())))


def train(
    adapter: Lora, problem: UpdateProblem, rng: int | np.random.Generator | None = None, *, record: Iterable[int] = ()
) -> Trajectory:
    """Train ``adapter`` on ``problem`` and record what happens; divergence is a word in the result.

    Parameters
    ----------
    adapter : Lora
        What is trained, and how.
    problem : UpdateProblem
    rng : int or numpy.random.Generator, optional
        Needed where the start or the steps are random.
    record : iterable of int
        Steps that are recorded; by default :func:`recorded_steps`. The last is always recorded.

    Raises
    ------
    ValueError
        If the problem lacks what the initialisation or the loss is made from, or the update is zero.

    Examples
    --------
    >>> from nla_llm.methods import method
    >>> from nla_llm.problems import UpdateProblem
    >>> problem = UpdateProblem(np.diag([3.0, 1.0]))
    >>> trained = train(method("lora", rank=2, optimiser="gradient_descent", lr=0.1), problem, rng=0)
    >>> trained.status, trained.steps[-1], bool(trained.final() < 1e-3)
    ('ok', 100, True)
    >>> train(method("lora", rank=2, optimiser="gradient_descent", lr=100.0), problem, rng=0).status
    'diverged'
    """
    wanted = {0, adapter.steps, *(record or recorded_steps(adapter.steps))}
    rows: list[tuple[int, dict[str, NDArray[np.float64]]]] = []
    reason, factors, t = "", None, -1
    with np.errstate(all="ignore"):  # what overflows is judged by its result
        watch = _Watch(adapter, problem)
        for t, factors in enumerate(adapter.iterates(problem, rng)):
            if t in wanted:
                row = watch(factors)
                blown_up = not float(np.max(row["frobenius"])) <= BLOWN_UP
                if not blown_up or not rows:  # the start is there whatever it is
                    rows.append((t, row))
                if blown_up:
                    reason = f"relative error above {BLOWN_UP:g} in step {t}"
                    break
    if not reason and t < adapter.steps:
        reason = f"entries not finite in step {t + 1}"
    columns = {name: np.stack([row[name] for _, row in rows]) for name in rows[0][1]}
    status: Literal["ok", "diverged"] = "diverged" if reason else "ok"
    return Trajectory(tuple(step for step, _ in rows), columns, status, reason, factors)


class _Watch:
    """Everything that is recorded of a pair of factors."""

    def __init__(self, adapter: Lora, problem: UpdateProblem) -> None:
        xp = problem.xp
        self.adapter = adapter
        self.first: Factors | None = None
        self.delta, self.inputs = (
            None if a is None else xp.astype(formed(name, a), xp.float64, copy=False)
            for name, a in (("delta", problem.delta), ("inputs", problem.inputs))
        )
        u, _, vt = xp.linalg.svd(self.delta, full_matrices=False)
        self.left, self.right = u[..., :, : adapter.rank], xp.matrix_transpose(vt)[..., :, : adapter.rank]
        self.size = _norm(self.delta)
        self.output_size = None if self.inputs is None else self._output(self.delta)
        sizes = [self.size] if self.output_size is None else [self.size, self.output_size]
        if any(np.any(size == 0) for size in sizes):
            raise ValueError("the update, or its output on the inputs, is zero, so no error is relative to it")
        if not all(np.all(np.isfinite(size)) for size in sizes):
            raise ValueError("the update, or its output on the inputs, overflows float64; scale it")

    def __call__(self, factors: Factors) -> dict[str, NDArray[np.float64]]:
        xp = namespace(factors.B)
        wide = Factors(*(xp.astype(f, xp.float64) for f in factors))
        self.first = wide if self.first is None else self.first
        error = self.delta - self.adapter.update(wide, self.first).dense()
        row = {"frobenius": _norm(error) / self.size}
        if self.output_size is not None:
            row["data"] = self._output(error) / self.output_size
        if not np.all(np.isfinite(row["frobenius"])):
            return row  # judged as diverged; its factors need not have a decomposition
        kappa, (left, right) = pair_condition(wide), largest_angle(wide, self.left, self.right)
        return row | {
            "kappa_A": kappa.A, "kappa_B": kappa.B, "kappa_product": kappa.product,
            "angle_left": left, "angle_right": right,
        }  # fmt: skip

    def _output(self, matrix: Array) -> NDArray[np.float64]:
        return _norm(self.inputs @ namespace(matrix).matrix_transpose(matrix))


def _norm(matrix: Array) -> NDArray[np.float64]:
    """‖A‖_F, the largest entry taken out, so that no square over- or underflows."""
    entries = to_numpy(matrix)
    top = abs(entries).max(axis=(-2, -1), keepdims=True)
    top = np.where(np.isfinite(top) & (top > 0), top, 1.0)
    return np.asarray(top[..., 0, 0] * np.linalg.norm(entries / top, axis=(-2, -1)))


# -- the best rate -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sweep:
    """Training at every rate of a grid.

    Attributes
    ----------
    rates
        Ascending.
    errors
        Largest final error over the batch, infinite where training diverged.
    best
        Rate of the least error, the fastest where rounding decides; None where training diverged at every rate.
    trajectory
        Of the best rate, or of the lowest where all diverged.
    edge
        "lower" or "upper" where the best rate is the first or last of the grid, so that a better one may lie outside;
        "" where it lies inside.
    """

    rates: tuple[float, ...]
    errors: tuple[float, ...]
    best: float | None
    trajectory: Trajectory
    edge: Literal["", "lower", "upper"]


def sweep(
    adapter: Lora,
    problem: UpdateProblem,
    rates: Sequence[float],
    rng: int = 0,
    *,
    by: str = "frobenius",
    record: Iterable[int] = (),
) -> Sweep:
    """Train at every rate from the same start and keep the one with the least final error.

    Of rates that end within 1e-12, where rounding decides, the one that came there first.

    Parameters
    ----------
    adapter : Lora
        Its own rate is not used.
    problem : UpdateProblem
    rates : sequence of float
        Rates to try, in any order.
    rng : int
        Seed, the same for every rate.
    by : {"frobenius", "data"}
        Error that decides.
    record : iterable of int
        As in :func:`train`.

    Examples
    --------
    >>> from nla_llm.methods import method
    >>> from nla_llm.problems import UpdateProblem
    >>> adapter = method("lora", rank=2, optimiser="gradient_descent", steps=50)
    >>> found = sweep(adapter, UpdateProblem(np.diag([3.0, 1.0])), [0.01, 0.1, 1.0, 10.0])
    >>> found.best, found.edge
    (0.1, '')
    """
    grid = tuple(sorted(float(rate) for rate in rates))
    if not grid:
        raise ValueError("rates is empty, so nothing would be trained; pass at least one rate")
    record = tuple(record)
    runs = [train(replace(adapter, lr=rate), problem, rng, record=record) for rate in grid]
    errors = tuple(float(np.max(run.final(by))) for run in runs)
    arrivals = [run.steps_to(ROUNDING, by) for run in runs]
    ranking = [(max(e, ROUNDING), np.inf if t is None else t) for e, t in zip(errors, arrivals, strict=True)]
    index = ranking.index(min(ranking))
    if not np.isfinite(errors[index]):
        return Sweep(grid, errors, None, runs[0], "lower")
    edge: Literal["", "lower", "upper"] = ""
    if len(grid) > 1:
        edge = "lower" if index == 0 else "upper" if index == len(grid) - 1 else ""
    return Sweep(grid, errors, grid[index], runs[index], edge)
