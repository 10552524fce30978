"""What a given number of operations buys: the largest budget of a method whose cost by formula stays within it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

__all__ = ["affordable"]


def affordable(method: Any, problem: Any, operations: float, *, largest: int, stage: str = "total") -> Any:
    """The same method with the largest budget that costs at most ``operations`` for one head, or None if none does.

    Exact where the cost does not fall with the budget. Where it does (fewer blocks, or blocks that fit), all budgets up
    to 64 are tried, and beyond them steps of 5 %, between the last two of which the cost is taken to grow.

    Parameters
    ----------
    method
        A dataclass with ``properties.budget`` and ``cost``; one without a budget is returned as it is, if it fits.
    problem
        Attention or update problem, for its sizes.
    operations
        What it may cost, preparing and applying together.
    largest
        Budget that is not exceeded, whatever it costs: the number of keys, say.
    stage
        "total", or "apply" where the preparation is not charged.

    Examples
    --------
    >>> import numpy as np
    >>> import nla_llm as nl
    >>> problem = nl.AttentionProblem(np.zeros((256, 32)), np.zeros((256, 32)))
    >>> nl.costs.affordable(nl.method("positive_features", m=1), problem, 2e6, largest=256).m
    28
    >>> nl.costs.affordable(nl.method("elu_features"), problem, 100, largest=256) is None
    True
    """
    if stage not in {"total", "apply"}:
        raise ValueError(f"stage must be 'total' or 'apply', got {stage!r}")
    if not largest >= 1:
        raise ValueError(f"largest must be a budget of at least 1, got {largest!r}")
    budget = method.properties.budget

    def fits(candidate: Any) -> bool:
        cost = candidate.cost(problem).at(problem, candidate)
        return bool((cost if stage == "total" else cost.apply).total() <= operations)

    if budget is None:
        return method if fits(method) else None
    high = largest + 1  # does not fit or is not wanted
    for low in reversed(_ladder(largest)):
        if fits(replace(method, **{budget: low})):
            break
        high = low
    else:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(replace(method, **{budget: middle})) else (low, middle)
    return replace(method, **{budget: low})


def _ladder(largest: int) -> list[int]:
    """Budgets to try, ascending: all up to 64, then in steps of 5 %, and the largest."""
    steps = []
    step = 1
    while step < largest:
        steps.append(step)
        step += max(1, step // 20) if step >= 64 else 1
    return [*steps, largest]
