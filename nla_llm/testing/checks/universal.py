"""Laws that hold for every method, and those of the rows: operators, dtypes, seeds, states, borders."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import from_numpy, namespace, to_numpy
from nla_llm.operators import Operator
from nla_llm.problems import AttentionProblem, UpdateProblem
from nla_llm.testing.subject import Check, Figure, Skip, Subject, at_most, compare

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ATTENTION_ONLY", "OPERATOR", "UNIVERSAL"]

REFUSALS = (ValueError, TypeError, FloatingPointError, NotImplementedError, np.linalg.LinAlgError)


def _returns_operator(subject: Subject) -> None:
    for problem in subject.problems():
        op = subject(problem)
        if not isinstance(op, Operator):
            raise AssertionError(  # noqa: TRY004 - a broken law, not a wrong argument
                f"got {type(op).__name__}; return one of nla_llm.operators, Dense(matrix) at least"
            )


def _shapes_and_dtypes(subject: Subject) -> None:
    for problem in subject.problems():
        for name in ("float64", "float32"):
            rounded = problem.astype(getattr(problem.xp, name))
            op, exact = subject(rounded), rounded.exact()
            xp, coarse = op.xp, rounded.exact(getattr(problem.xp, name)).dtype
            if tuple(op.shape) != tuple(exact.shape):
                raise AssertionError(f"shape {op.shape}, but the exact operator has {exact.shape}")
            if not xp.isdtype(op.dtype, "real floating") or xp.result_type(op.dtype, coarse) != op.dtype:
                raise AssertionError(f"dtype {op.dtype} for {name} input; it must be floating and at least as precise")
            x = _vectors(subject, op, op.shape[-1])
            y = op @ x
            if tuple(y.shape) != (*op.batch_shape, op.shape[-2], x.shape[-1]) or y.dtype != op.dtype:
                raise AssertionError(f"applied to {x.shape} it gives {y.shape} of dtype {y.dtype}, not {op.dtype}")
            if tuple(op.dense().shape) != tuple(op.shape) or op.dense().dtype != op.dtype:
                raise AssertionError(f"dense() is {op.dense().shape} of dtype {op.dense().dtype}")


def _operator_laws(subject: Subject) -> Figure:
    figures: list[Figure] = []
    for problem in subject.problems():
        op = subject(problem)
        n_q, n_k = op.shape[-2:]
        x, z, y = (_vectors(subject, op, n, stream=s) for s, n in enumerate((n_k, n_k, n_q)))
        dense, t = op.dense(), op.xp.matrix_transpose
        figures += [
            compare(op @ x, dense @ x, what="op @ x against dense"),
            compare(op @ (2.0 * x - z), 2.0 * (op @ x) - op @ z, what="linearity"),
            compare(op.T @ y, t(dense) @ y, what="adjoint against the transposed matrix"),
            compare(op.rows(1, n_q), dense[..., 1:n_q, :], what="rows against dense") if n_q > 1 else figures[-1],
            compare(op.row_sums(), op.xp.sum(dense, axis=-1), what="row_sums against dense"),
        ]
    return at_most(figures)


def _finite(subject: Subject) -> None:
    for problem in subject.problems():
        if not np.all(np.isfinite(to_numpy(subject(problem).dense()))):
            raise AssertionError("the matrix has entries that are NaN or infinite")


def _precision(subject: Subject) -> Figure:
    figures = []
    for problem in subject.problems():
        coarse = problem.astype(problem.xp.float32)
        same = coarse.astype(problem.xp.float64)  # the same numbers, so that only the arithmetic differs
        fine = subject(same).dense()
        figures.append(compare(subject(coarse).dense(), fine, dtype=np.float32, what="float32 against float64"))
    return at_most(figures)


def _half_precision(subject: Subject) -> None:
    problem = next(iter(subject.problems()))
    try:
        half = problem.map(lambda a: a.astype(np.float16) if a.dtype.kind == "f" else a)
        dense = to_numpy(subject(half).dense())
    except REFUSALS as refusal:
        if not str(refusal):
            raise AssertionError(f"refused with a bare {type(refusal).__name__}; say what to pass instead") from refusal
        return
    if not np.all(np.isfinite(dense)):
        raise AssertionError("silently NaN or infinite in float16: compute in a wider format or refuse it")


def _statelessness(subject: Subject) -> None:
    problems = list(subject.problems())
    method = [subject.limited(p) for p in problems]
    first = [to_numpy(m(p, rng=subject.seed).dense()) for m, p in zip(method, problems, strict=True)]
    for m, p, before in zip(method, problems, first, strict=True):
        op = m(p, rng=subject.seed)
        x = _vectors(subject, op, op.shape[-1])
        applied = [to_numpy(op @ x) for _ in range(2)]
        if not (_same(before, to_numpy(op.dense())) and _same(*applied)):
            raise AssertionError(
                "the same call with the same rng gave another answer: something was kept between calls"
            )


def _inputs_unchanged(subject: Subject) -> None:
    for problem in subject.problems():
        before = _contents(problem)
        op = subject(problem)
        x = _vectors(subject, op, op.shape[-1])
        kept = to_numpy(x).copy()
        _ = op @ x, op.T @ _vectors(subject, op, op.shape[-2])
        changed = [n for n, a in _contents(problem).items() if not _same(a, before[n])]
        if changed or not _same(kept, to_numpy(x)):
            raise AssertionError(f"the call edited its input in place: {', '.join(changed) or 'x'}")


def _same_seed(subject: Subject) -> None:
    problem = next(iter(subject.problems()))
    method = subject.limited(problem)
    for rng in (lambda: 7, lambda: np.random.default_rng(7)):
        one, two = (to_numpy(method(problem, rng=rng()).dense()) for _ in range(2))
        if not _same(one, two):
            raise AssertionError(f"two calls with equal rng ({rng()!r}) differ; randomness must come from rng alone")


def _different_seeds(subject: Subject) -> None:
    if not subject.declared or subject.properties.deterministic:
        raise Skip("declared deterministic" if subject.declared else "randomness: not declared")
    problem = next(iter(subject.problems()))
    draws = [to_numpy(subject(problem, rng=100 + s).dense()) for s in range(3)]
    if any(_same(draws[0], other) for other in draws[1:]):
        raise AssertionError("different seeds gave the same answer, though the method declares that it is random")


def _without_rng(subject: Subject) -> None:
    problem = next(iter(subject.problems()))
    method = subject.limited(problem)
    if subject.declared and subject.properties.deterministic:
        if not _same(to_numpy(method(problem).dense()), to_numpy(method(problem, rng=3).dense())):
            raise AssertionError("declared deterministic, but the answer without rng differs from the one with rng=3")
        return
    try:
        one, two = (to_numpy(method(problem).dense()) for _ in range(2))
    except (TypeError, ValueError):
        return
    if not _same(one, two):
        raise AssertionError("two calls without rng differ: randomness is an argument, never a hidden state")


def _budget_is_checked(subject: Subject) -> None:
    if subject.properties.budget is None:
        raise Skip("budget: not declared")
    problem = next(iter(subject.problems()))
    for value in (0, -1):
        try:
            subject.with_budget(value)(problem, rng=subject.seed)
        except (ValueError, TypeError) as refusal:
            if str(refusal):
                continue
        raise AssertionError(f"{subject.properties.budget}={value} was not refused with a sentence")


def _array_api(subject: Subject) -> Figure:
    try:
        import array_api_strict as strict  # noqa: PLC0415 - an optional package
    except ImportError:
        raise Skip("array-api-strict is not installed; pip install array-api-strict") from None
    figures = []
    for problem in subject.problems():
        if namespace(problem.exact().like) is strict:
            raise Skip("the given problem is array-api-strict already")
        try:
            other = subject(problem.map(lambda a: strict.asarray(to_numpy(a))))
            x = _vectors(subject, other, other.shape[-1])
            figures += [
                compare(other.dense(), subject(problem).dense(), what="array-api-strict against NumPy"),
                compare(other @ x, other.dense() @ x, what="applied, on array-api-strict"),
            ]
        except Exception as error:
            if type(subject.method).__module__.startswith("nla_llm."):
                raise
            kind = type(error).__name__
            raise Skip(f"tied to its array library, it does not run on array-api-strict ({kind}: {error})") from error
    return at_most(figures)


def _empty(subject: Subject) -> None:
    empty: dict[str, Callable[[], Any]] = {
        "update": lambda: UpdateProblem(np.ones((0, 3))),
        "attention": lambda: AttentionProblem(np.ones((0, 4)), np.ones((0, 4))),
    }
    try:
        subject.method(empty[subject.properties.problem](), rng=subject.seed)
    except ValueError as refusal:
        if str(refusal):
            return
    raise AssertionError("an empty input was not refused with a sentence")


# -- attention only ------------------------------------------------------------------------------------------------


def _row_sums(subject: Subject) -> Figure:
    subject.need("row_stochastic")
    figures = []
    for problem in subject.problems():
        sums = np.sum(to_numpy(subject(problem).dense()), axis=-1, dtype=np.float64)
        figures.append(compare(sums, np.ones_like(sums), what="defect of the row sums"))
    return at_most(figures)


def _nonnegative(subject: Subject) -> Figure:
    subject.need("nonnegative")
    figures = []
    for problem in subject.problems():
        op = subject(problem)
        dense = to_numpy(op.dense())
        tolerance = 1e2 * float(np.finfo(dense.dtype).eps) * float(np.max(np.abs(dense)))
        figures.append(Figure(float(max(-np.min(dense), 0.0)), tolerance, "most negative entry"))
    return at_most(figures)


def _sharp_logits(subject: Subject) -> None:
    problem = subject.problem()
    q, k = problem.q, problem.k
    root = (50.0 / float(np.std(problem.scale * q @ k.T))) ** 0.5
    signs = (1.0,) if subject.properties.partial else (1.0, -1.0)  # the sign is what a partial method may refuse
    for sign, dtype in product(signs, (np.float64, np.float32)):
        sharp = AttentionProblem((root * q).astype(dtype), (sign * root * k).astype(dtype))
        try:
            dense = to_numpy(subject(sharp).dense())
        except FloatingPointError as refusal:
            if subject.properties.partial and str(refusal):
                continue  # it says that it may refuse such data
            raise
        if not np.all(np.isfinite(dense)):
            name = np.dtype(dtype).name
            raise AssertionError(
                f"NaN or infinite entries in {name}: subtract a maximum, or carry logarithms of scales"
            )


def _single_token(subject: Subject) -> Figure:
    q, k, v = subject.arrays((1, 4), (1, 4), (1, 3))
    op = subject(AttentionProblem(q, k, v))
    if tuple(op.shape) != (1, 1):
        raise AssertionError(f"a single token gives an operator of shape {op.shape}")
    if not subject.properties.row_stochastic:
        return compare(op @ v, op.dense() @ v)
    return compare(op @ v, v, what="output for one token against its value")


# -- helpers -------------------------------------------------------------------------------------------------------


def _vectors(subject: Subject, op: Operator, n: int, *, stream: int = 0) -> Any:
    """Two columns for ``op`` or its adjoint, in its library and dtype."""
    drawn = np.random.default_rng([subject.seed, 1, stream]).standard_normal((n, 2))
    return from_numpy(drawn, like=op.like, dtype=op.dtype)


def _same(a: Any, b: Any) -> bool:
    return bool(np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f"))


def _contents(problem: Any) -> dict[str, Any]:
    """Copies of the arrays of a problem."""
    fields = {name: getattr(problem, name) for name in problem.__dataclass_fields__}
    return {name: to_numpy(a).copy() for name, a in fields.items() if hasattr(a, "shape")}


OPERATOR = Check("returns_operator", "A method returns an Operator.", _returns_operator)

UNIVERSAL = (
    OPERATOR,
    Check(
        "shapes_and_dtypes",
        "The shape of the exact operator, in the precision of the input or more.",
        _shapes_and_dtypes,
    ),
    Check("operator_laws", "Linear; adjoint, rows, row sums and dense form are those of one matrix.", _operator_laws),
    Check("finite", "No entry is NaN or infinite.", _finite),
    Check("precision", "float32 gives the float64 answer to float32 accuracy.", _precision),
    Check("half_precision", "float16 works or is refused; it does not silently give NaN.", _half_precision),
    Check("statelessness", "The second call equals the first, whatever was called between.", _statelessness),
    Check("inputs_unchanged", "Queries, keys, values, masks and weights are not edited in place.", _inputs_unchanged),
    Check("same_seed", "The same seed gives the same answer.", _same_seed),
    Check("different_seeds", "A random method depends on its seed.", _different_seeds),
    Check("without_rng", "A deterministic method needs no rng; a random one draws nothing without it.", _without_rng),
    Check("budget_is_checked", "A budget below one is refused with a sentence.", _budget_is_checked),
    Check("array_api", "Another array library gives the same answer.", _array_api),
    Check("empty_refused", "An empty input is refused with a ValueError that says so.", _empty),
)

ATTENTION_ONLY = (
    Check("row_sums", "Rows sum to one.", _row_sums),
    Check("nonnegative", "No entry is negative.", _nonnegative),
    Check("sharp_logits", "Logits with a standard deviation of 50 do not give NaN.", _sharp_logits),
    Check("single_token", "One token attends to itself.", _single_token),
)
