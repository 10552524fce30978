"""Ranks for several layers under one budget of parameters.

Rank r in a layer costs r·(d_out + d_in) parameters and keeps σ₁² + … + σ_r² of the energy of its update. As the σ fall,
every layer alone has falling returns, so that taking triplets in the order of energy per parameter is best where all
layers have one shape; where they have not, it is a knapsack, and :func:`optimal_ranks` solves it exactly.
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

__all__ = ["ALLOCATIONS", "Layer", "allocate", "budget_schedule", "energy_bound", "kept_energy"]


class Layer(NamedTuple):
    """Singular values (or importances) of the update of a layer, descending, and its shape."""

    singular_values: Any
    d_out: int
    d_in: int

    @property
    def price(self) -> int:
        """Parameters of one rank."""
        return self.d_out + self.d_in


def allocate(layers: Sequence[Layer], budget: int, how: str = "optimal") -> tuple[int, ...]:
    """Rank of each layer, of at most ``budget`` parameters together.

    Parameters
    ----------
    layers : sequence of Layer
    budget : int
        Parameters, at least 0.
    how : str
        A row of :data:`ALLOCATIONS`.

    Raises
    ------
    ValueError
        If singular values are negative, not descending or more than a layer can have, or an argument is unknown.

    Examples
    --------
    >>> layers = [Layer([3.0, 1.0], 4, 4), Layer([2.0, 1.9], 4, 4)]
    >>> allocate(layers, 24), allocate(layers, 24, "uniform")
    ((1, 2), (1, 1))
    """
    if how not in ALLOCATIONS:
        raise ValueError(f"how must be one of {', '.join(ALLOCATIONS)}, got {how!r}")
    if isinstance(budget, bool) or not isinstance(budget, int | np.integer) or budget < 0:
        raise ValueError(f"budget must be a whole number of parameters >= 0, got {budget!r}")
    if not layers:
        raise ValueError("layers is empty; pass at least one")
    energies = [_energies(i, layer) for i, layer in enumerate(layers)]
    return ALLOCATIONS[how](energies, [layer.price for layer in layers], int(budget))


def kept_energy(layers: Sequence[Layer], ranks: Sequence[int]) -> float:
    """Energy that truncation to these ranks keeps, as a share of all.

    Examples
    --------
    >>> kept_energy([Layer([2.0, 1.0], 4, 4)], [1])
    0.8
    """
    energies = [_energies(i, layer) for i, layer in enumerate(layers)]
    total = sum(float(e.sum()) for e in energies)
    if total == 0:
        raise ValueError("all singular values are zero, so there is no energy to keep")
    return sum(float(e[:r].sum()) for e, r in zip(energies, ranks, strict=True)) / total


def energy_bound(layers: Sequence[Layer], budget: int) -> float:
    """No allocation keeps a larger share: triplets by energy per parameter, the last one in part (the relaxation).

    Greedy allocation misses it by less than the energy of one triplet.

    Examples
    --------
    >>> energy_bound([Layer([2.0, 1.0], 4, 4)], 12)
    0.9
    """
    energies = [_energies(i, layer) for i, layer in enumerate(layers)]
    kept, left = 0.0, float(budget)
    for energy, price in sorted(
        ((float(x), layer.price) for layer, e in zip(layers, energies, strict=True) for x in e),
        key=lambda item: -item[0] / item[1],
    ):
        share = min(1.0, left / price)
        kept, left = kept + share * energy, left - share * price
        if left <= 0:
            break
    return float(kept / sum(float(e.sum()) for e in energies))


def budget_schedule(step: int, *, first: int, last: int, warm_up: int, steady: int, steps: int) -> int:
    """Budget of AdaLoRA at a step: ``first``, a cubic descent, then ``last``.

    Zhang et al. 2023, arXiv 2303.10512, section 3.3, as we read it.

    Examples
    --------
    >>> [budget_schedule(t, first=12, last=4, warm_up=10, steady=10, steps=50) for t in (0, 10, 25, 40, 50)]
    [12, 12, 5, 4, 4]
    """
    if step <= warm_up:
        return first
    if step >= steps - steady:
        return last
    left = 1 - (step - warm_up) / (steps - warm_up - steady)
    return round(last + (first - last) * left**3)


# -- the ways to allocate ----------------------------------------------------------------------------------------------


def _uniform(energies: list[NDArray[Any]], prices: list[int], budget: int) -> tuple[int, ...]:
    """The same rank everywhere, as far as a layer has one."""
    best = (0,) * len(prices)
    for rank in range(1, max(len(e) for e in energies) + 1):
        ranks = tuple(min(rank, len(e)) for e in energies)
        if sum(r * price for r, price in zip(ranks, prices, strict=True)) > budget:
            break
        best = ranks
    return best


def _greedy(worth: Callable[[float, int], float]) -> Callable[[list[NDArray[Any]], list[int], int], tuple[int, ...]]:
    """Triplets of all layers in the order of their worth; one that no longer fits closes its layer."""

    def ranks(energies: list[NDArray[Any]], prices: list[int], budget: int) -> tuple[int, ...]:
        chosen, left = [0] * len(prices), budget
        open_layers = set(range(len(prices)))
        while open_layers:
            open_layers = {i for i in open_layers if chosen[i] < len(energies[i]) and prices[i] <= left}
            if not open_layers:
                break
            i = max(sorted(open_layers), key=lambda i: worth(float(energies[i][chosen[i]]), prices[i]))
            if energies[i][chosen[i]] == 0:
                break
            chosen[i], left = chosen[i] + 1, left - prices[i]
        return tuple(chosen)

    return ranks


def optimal_ranks(energies: list[NDArray[Any]], prices: list[int], budget: int) -> tuple[int, ...]:
    """The most energy under the budget, by dynamic programming over budgets in units of the common divisor of prices.

    Time and memory: layers × budget/divisor × largest rank, and layers × budget/divisor.
    """
    unit = gcd(*prices)
    slots = budget // unit
    kept = np.zeros(slots + 1)
    choices = []
    for e, price in zip(energies, prices, strict=True):
        cumulative, weight = np.concatenate([[0.0], np.cumsum(e)]), price // unit
        new, choice = kept.copy(), np.zeros(slots + 1, dtype=int)
        for rank in range(1, min(len(e), slots // weight) + 1):
            gain = kept[: slots + 1 - rank * weight] + cumulative[rank]
            better = gain > new[rank * weight :]
            new[rank * weight :][better] = gain[better]
            choice[rank * weight :][better] = rank
        kept = new
        choices.append((choice, weight))
    ranks, slot = [], slots
    for choice, weight in reversed(choices):
        ranks.append(int(choice[slot]))
        slot -= ranks[-1] * weight
    return tuple(reversed(ranks))


ALLOCATIONS: dict[str, Callable[[list[NDArray[Any]], list[int], int], tuple[int, ...]]] = {
    "uniform": _uniform,
    # one ranking of all triplets by size, whatever they cost: AdaLoRA's pruning (Zhang et al. 2023, arXiv 2303.10512)
    "magnitude": _greedy(lambda energy, _: energy),
    "energy_per_parameter": _greedy(lambda energy, price: energy / price),
    "optimal": optimal_ranks,
}


def _energies(i: int, layer: Layer) -> NDArray[np.float64]:
    s: ArrayLike = layer.singular_values
    values = np.asarray(s, dtype=np.float64)
    if values.ndim != 1 or not 1 <= values.size <= min(layer.d_out, layer.d_in):
        raise ValueError(
            f"layer {i} of shape {layer.d_out} x {layer.d_in} has 1 to {min(layer.d_out, layer.d_in)} singular values, "
            f"got an array {values.shape}"
        )
    if not np.all(np.isfinite(values)) or np.any(values < 0) or np.any(np.diff(values) > 0):
        raise ValueError(f"singular values of layer {i} must be finite, >= 0 and descending")
    return values**2
