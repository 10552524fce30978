"""What a given number of operations buys: the largest budget of a method whose cost by formula stays within it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

__all__ = ["affordable"]


def affordable(method: Any, problem: Any, operations: float, *, largest: int, stage: str = "total") -> Any:
    """The same method with the largest budget that costs at most ``operations`` for one head, or None if none does.

    By bisection on the formula, which must not fall with the budget.

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
    if not fits(replace(method, **{budget: 1})):
        return None
    low, high = 1, largest + 1  # low fits, high does not or is not wanted
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(replace(method, **{budget: middle})) else (low, middle)
    return replace(method, **{budget: low})
