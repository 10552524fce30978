"""What studies and the command line measure of a method: one record for each head, estimates included."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm import costs, measures, theory
from nla_llm.backend import to_numpy
from nla_llm.linalg import is_small
from nla_llm.measures import Estimate
from nla_llm.measures.streaming import row_blocks
from nla_llm.methods import properties_of
from nla_llm.operators import Dense, RowNormalised
from nla_llm.study.medians import binomial_tail, median_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem

__all__ = ["attention_records", "first_order_error", "head_facts", "head_records", "kernel_error", "operators"]


def operators(problem: Any, method: Any, *, draws: int, seed: int) -> list[Operator]:
    """What a method makes of a problem: ``draws`` independent operators, one where nothing is random.

    Raises
    ------
    ValueError
        If a random method is to be drawn once: a single draw says nothing about the spread.
    """
    if properties_of(method).deterministic:
        return [method(problem)]
    if draws < 2:
        raise ValueError(f"draws must be at least 2 for a random method, got {draws}: one draw has no error bar")
    children = np.random.SeedSequence(seed).spawn(draws)
    return [method(problem, rng=np.random.default_rng(child)) for child in children]


def head_records(problem: AttentionProblem, method: Any, *, draws: int, seed: int) -> list[dict[str, Any]]:
    """Errors of a method on every head of a problem (`attention_records`), its cost, and what kind of head it is.

    ``operations``, None where the method states no cost, and ``exact_operations`` are those of one head by formula.

    Raises
    ------
    FloatingPointError
        If an operator cannot be formed or an error is not finite.
    Unsupported
        If the method refuses the problem.
    """
    records = attention_records(problem, method, draws=draws, seed=seed)
    cost = {
        "operations": int(method.cost(problem).at(problem, method).total()) if hasattr(method, "cost") else None,
        "exact_operations": int(costs.exact_attention(problem).at(problem).total()),
    }
    return [record | cost | facts for record, facts in zip(records, head_facts(problem), strict=True)]


def attention_records(
    problem: AttentionProblem,
    method: Any,
    *,
    draws: int,
    seed: int,
    norms: Sequence[str] = ("frobenius", "spectral"),
    rtol: float = 1e-2,
) -> list[dict[str, Any]]:
    """Relative errors of a method on every head of a problem, as medians over draws with their intervals.

    The reference is exact attention in float64. Columns: ``head`` (index among the flattened batch axes), ``relative_``
    and the norm, ``output_error`` (relative, Frobenius, of P v, where the problem has v), ``negative_share`` (of row
    sums before normalisation).

    Raises
    ------
    FloatingPointError
        If an operator cannot be formed or an error is not finite.
    """
    exact = problem.exact()
    if is_small(exact):  # its norms are taken densely, once for each draw: form it once
        exact = Dense(exact.dense(), nonnegative=True)
    references = {norm: _norm(exact, norm, rtol, seed) for norm in norms}
    samples: dict[str, list[Estimate]] = {f"relative_{norm}": [] for norm in norms}
    negative = []
    for op in operators(problem, method, draws=draws, seed=seed):
        error = exact - op
        for norm in norms:
            samples[f"relative_{norm}"].append(_norm(error, norm, rtol, seed) / references[norm])
        if problem.v is not None:
            output = measures.output_error(exact, op, problem.v, norm="frobenius")
            samples.setdefault("output_error", []).append(output)
        share = op.negative_share if isinstance(op, RowNormalised) else np.zeros(problem.batch_shape)
        negative.append(np.broadcast_to(to_numpy(share), problem.batch_shape))
    columns = {name: over_draws(values) for name, values in samples.items()}
    share = np.mean(negative, axis=0)
    return [
        {"head": number, **{name: e[index] for name, e in columns.items()}, "negative_share": float(share[index])}
        for number, index in enumerate(np.ndindex(problem.batch_shape))
    ]


def _norm(op: Operator, norm: str, rtol: float, seed: int) -> Estimate:
    if norm == "spectral":
        return measures.spectral_norm(op, rtol=rtol, rng=seed)
    if norm == "frobenius":
        return measures.frobenius_norm(op, rtol=rtol, rng=seed)
    return {"nuclear": measures.nuclear_norm, "max": measures.max_norm}[norm](op)


def over_draws(values: Sequence[Estimate]) -> Estimate:
    """Median over draws with order statistics that enclose it, whatever the distribution.

    Not the mean: the error of trigonometric features has none, since their row sums come arbitrarily close to zero. The
    bounds are order statistics of the bounds of the single measurements; six draws give a confidence of 96.9 %.

    Examples
    --------
    >>> draws = [Estimate.exact(x, "by hand") for x in (3.0, 1.0, 2.0, 9.0, 4.0, 5.0)]
    >>> print(over_draws(draws))
    3.5 [1, 9] (96.88 %)
    """
    if len(values) == 1:
        return values[0]
    value, lower, upper = (np.sort([getattr(e, part) for e in values], axis=0) for part in ("value", "lower", "upper"))
    low, high = median_interval(len(values))
    outside = binomial_tail(low, len(values)) + sum(1 - e.confidence for e in values)  # union bound
    how = f"median of {len(values)} draws, order statistics; each: {values[0].how}"
    return Estimate(np.median(value, axis=0), lower[low], upper[high], max(1 - outside, np.finfo(float).tiny), how)


def kernel_error(problem: AttentionProblem, method: Any, *, draws: int, seed: int) -> tuple[Estimate, NDArray[Any]]:
    """Mean square error of the kernel before normalisation, measured and promised.

    The measured value is E‖Â − A‖_F²/‖A‖_F² over draws, one number for each batch entry, for A = exp(logits) and Â the
    method's estimate of it; the promised one is Σ A² (relative variance + squared relative bias) / ‖A‖_F² from the
    closed form of the method.
    """
    logits = problem.scale * to_numpy(problem.q) @ np.swapaxes(to_numpy(problem.k), -1, -2)
    kernel = np.exp(logits)
    total = np.sum(kernel**2, axis=(-1, -2))
    measured = []
    for op in operators(problem, method, draws=draws, seed=seed):
        if not isinstance(op, RowNormalised) or op.row_scale_log is None:
            raise TypeError(f"{method!r} does not return its kernel, a RowNormalised operator with row_scale_log")
        estimate = np.exp(to_numpy(op.row_scale_log))[..., None] * to_numpy(op.op.dense())
        measured.append(np.sum((estimate - kernel) ** 2, axis=(-1, -2)) / total)
    promise = method.theory(problem)
    bias = promise.mean() - 1 if "mean" in promise.covers else 0.0
    promised = np.sum(kernel**2 * (promise.relative_variance() + bias**2), axis=(-1, -2)) / total
    return Estimate.from_samples(np.stack(measured)), promised


def first_order_error(head: AttentionProblem, method: Any) -> dict[str, Any]:
    """Relative Frobenius error of P that theory promises to first order, and whether it may be trusted there.

    For one head without a mask and a method of random features (`nla_llm.theory.first_order_error`). None and False
    with directions of which theory knows no covariance.
    """
    if method.directions not in {"iid", "orthogonal", "simplex"}:
        return {"first_order": None, "first_order_valid": False}
    promise = theory.first_order_error(
        head.q,
        head.k,
        scale=head.scale,
        m=method.m,
        features=method.function,
        directions=method.directions,
    )
    size = float(measures.frobenius_norm(head.exact()))
    return {"first_order": float(np.sqrt(promise.value)) / size, "first_order_valid": promise.valid}


def head_facts(problem: AttentionProblem) -> list[dict[str, float]]:
    """What kind of head each is: mean entropy of its rows relative to uniform attention, and the spread of its logits.

    0 is an attention that looks at one key only, 1 is uniform attention. ``norm_growth`` is the mean of |x + y|² for
    x = √scale q, y = √scale k: the exponent of the variance of positive random features.
    """
    exact, shape = problem.exact(), problem.batch_shape
    entropy, largest = np.zeros(shape), np.zeros(shape)
    for start, stop in row_blocks(exact):
        weights = to_numpy(exact.rows(start, stop))
        visible = np.sum(weights > 0, axis=-1)
        rows = -np.sum(weights * np.log(np.where(weights > 0, weights, 1.0)), axis=-1)
        entropy += np.where(visible > 1, rows, 0.0).sum(axis=-1)
        largest += np.where(visible > 1, np.log(visible), 0.0).sum(axis=-1)
    relative = np.divide(entropy, largest, out=np.zeros(shape), where=largest > 0)
    x = np.sqrt(abs(problem.scale)) * to_numpy(problem.q).astype(np.float64)
    y = np.sign(problem.scale) * np.sqrt(abs(problem.scale)) * to_numpy(problem.k).astype(np.float64)
    growth = np.mean(np.sum(x**2, -1), -1) + np.mean(np.sum(y**2, -1), -1) + 2 * np.sum(x.mean(-2) * y.mean(-2), -1)
    growth = np.broadcast_to(growth, shape)
    return [{"entropy": float(relative[i]), "norm_growth": float(growth[i])} for i in np.ndindex(shape)]
