"""Every registered attention method as it stands in comparisons: a label, a registered name, options."""

from __future__ import annotations

from typing import Any, NamedTuple

import nla_llm as nl
from nla_llm.methods.registry import registered


class Entry(NamedTuple):
    """A method at a budget that is still open."""

    label: str
    method: str
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed

    @property
    def budget(self) -> str | None:
        """Name of the field that buys accuracy."""
        return registered(self.method).properties.budget  # type: ignore[attr-defined,no-any-return]

    def make(self, budget: int = 1) -> Any:
        """The method at a budget."""
        options = self.options if self.budget is None else {**self.options, self.budget: budget}
        return nl.method(self.method, **options)


YARDSTICKS = (
    Entry("uniform", "uniform"),
    Entry("random keys", "random_keys"),
    Entry("optimal rank", "optimal_rank"),
)
METHODS = (
    # deterministic features
    Entry("elu + 1", "elu_features"),
    Entry("relu", "relu_features"),
    # random features
    Entry("positive", "positive_features"),
    Entry("positive, orthogonal", "positive_features", {"directions": "orthogonal"}),
    Entry("positive, orthogonal, recentred", "positive_features", {"directions": "orthogonal", "recentre": True}),
    Entry("hyperbolic, orthogonal", "hyperbolic_features", {"directions": "orthogonal"}),
    Entry("trigonometric, orthogonal", "trigonometric_features", {"directions": "orthogonal"}),
)
ROSTER = {entry.label: entry for entry in (*YARDSTICKS, *METHODS)}
