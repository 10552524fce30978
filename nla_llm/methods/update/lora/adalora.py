"""Ranks found while training: AdaLoRA (Zhang et al. 2023, arXiv 2303.10512) on several layers under one budget.

Every layer has an update P diag(λ) Q with more triplets than will stay. After each step on ½ ‖P diag(λ) Q − ΔW‖_F²,
plus a penalty for P and Q that are not orthonormal, the λ of the triplets of least importance among all layers are set
to zero; the number that stays falls along a cubic schedule. They may come back as long as the budget falls.

Importance is "magnitude", |λ|, or "sensitivity", the paper's: for every parameter w, |w ∂L/∂w| smoothed over steps (β₁)
times its smoothed variation (β₂); that of λ plus the means of those of the entries of its two vectors. Triplets are
counted, not their parameters, so layers of different shapes are not told apart. Forms are as we read them. In a
regression without noise the sensitivity of what has been learned goes to zero with its gradient, and with it the sense
of that ranking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np

from nla_llm.backend import Array, generator, namespace
from nla_llm.linalg import gaussian
from nla_llm.methods.registry import one_of, positive, whole_number
from nla_llm.methods.update.lora.allocation import budget_schedule
from nla_llm.methods.update.shared import formed
from nla_llm.operators import LowRank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nla_llm.problems import UpdateProblem

__all__ = ["AdaLora", "Allocated", "Triplets"]

IMPORTANCES = ("magnitude", "sensitivity")


class Triplets(NamedTuple):
    """P (d_out, k), λ (k,) and Q (k, d_in)."""

    P: Array
    values: Array
    Q: Array


class Allocated(NamedTuple):
    """The rank of each layer, and its update as an operator of that rank."""

    ranks: tuple[int, ...]
    updates: tuple[LowRank, ...]


@final
@dataclass(frozen=True)
class AdaLora:
    """Training of several layers with one budget of triplets.

    Attributes
    ----------
    budget
        Triplets that stay, in all layers together.
    first
        Triplets of each layer at the start.
    importance
        "magnitude" or "sensitivity".
    lr, steps
        Rate and number of steps of gradient descent, for updates of norm about one.
    orthogonality
        Weight of ‖PᵀP − I‖_F² + ‖QQᵀ − I‖_F².
    smoothing
        β of both averages of the sensitivity.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> layers = [UpdateProblem(np.diag([1.0, 0.9, 0.0])), UpdateProblem(np.diag([0.8, 0.0, 0.0]))]
    >>> AdaLora(budget=3, first=3)(layers, rng=0).ranks
    (2, 1)
    """

    budget: int
    first: int
    importance: str = "magnitude"
    lr: float = 0.2
    steps: int = 1000
    orthogonality: float = 0.1
    smoothing: float = 0.85

    def __post_init__(self) -> None:
        for name in ("budget", "first", "steps"):
            whole_number(name, getattr(self, name))
        one_of("importance", self.importance, IMPORTANCES)
        positive("lr", self.lr)
        if self.orthogonality != 0:
            positive("orthogonality", self.orthogonality, other=" or 0")
        if self.smoothing != 0:
            positive("smoothing", self.smoothing, at_most=1, other=" or 0")

    def __call__(self, layers: Sequence[UpdateProblem], rng: int | np.random.Generator) -> Allocated:
        """Train all layers; a tenth of the steps warms up, a half is left for the final ranks.

        Raises
        ------
        ValueError
            If there is no layer, one is a batch or too small for ``first`` triplets, or the budget exceeds them all.
        FloatingPointError
            If training diverges.
        """
        targets = [formed("delta", layer.delta) for layer in layers]
        if not targets or any(t.ndim != 2 or self.first > min(t.shape) for t in targets):
            raise ValueError(
                f"layers must be updates (d_out, d_in) of at least first={self.first} rows and columns, got "
                f"{[tuple(t.shape) for t in targets]}"
            )
        if self.budget > self.first * len(targets):
            raise ValueError(
                f"budget={self.budget} exceeds the first={self.first} triplets of each of {len(targets)} layers"
            )
        drawing = generator(rng)
        trained, keep = [_start(t, self.first, drawing) for t in targets], []
        averages: list[Any] = [((0.0, 0.0),) * 3] * len(targets)  # of P, λ and Q
        with np.errstate(all="ignore"):  # what overflows shows in the factors
            for t in range(self.steps):
                gradients = [self._gradient(x, target) for x, target in zip(trained, targets, strict=True)]
                scores, averages = self._importance(trained, gradients, averages)
                if t <= self.steps - self._steady:  # from there on the ranks are final
                    keep = self._kept(scores, t)
                moved = (_moved(x, g, self.lr) for x, g in zip(trained, gradients, strict=True))
                trained = [_masked(x, k) for x, k in zip(moved, keep, strict=True)]
        if not all(bool(namespace(w).all(namespace(w).isfinite(w))) for x in trained for w in x):
            raise FloatingPointError(f"AdaLoRA with lr={self.lr:g} diverged; take a lower rate, or scale the updates")
        return Allocated(*zip(*(_of_rank(x, k) for x, k in zip(trained, keep, strict=True)), strict=True))

    @property
    def _steady(self) -> int:
        """Steps with the final ranks."""
        return self.steps // 2

    def _gradient(self, x: Triplets, target: Array) -> Triplets:
        xp = namespace(target)
        t = xp.matrix_transpose
        eye = xp.eye(x.values.shape[0], dtype=target.dtype)
        residual = (x.P * x.values) @ x.Q - target
        along_Q, along_P = residual @ t(x.Q), t(x.P) @ residual
        return Triplets(
            along_Q * x.values + 4 * self.orthogonality * (x.P @ (t(x.P) @ x.P - eye)),
            xp.sum(x.P * along_Q, axis=0),
            x.values[:, None] * along_P + 4 * self.orthogonality * ((x.Q @ t(x.Q) - eye) @ x.Q),
        )

    def _importance(
        self, trained: list[Triplets], gradients: list[Triplets], averages: list[Any]
    ) -> tuple[list[Array], list[Any]]:
        """Importance of every triplet, and the averages on which it rests."""
        if self.importance == "magnitude":
            return [namespace(x.values).abs(x.values) for x in trained], averages
        scores, kept = [], []
        for x, g, before in zip(trained, gradients, averages, strict=True):
            xp = namespace(x.values)
            now = [xp.abs(w * slope) for w, slope in zip(x, g, strict=True)]
            after = [self._smoothed(a, *old) for a, old in zip(now, before, strict=True)]
            P, values, Q = (mean * spread for mean, spread in after)
            scores.append(values + xp.mean(P, axis=0) + xp.mean(Q, axis=1))
            kept.append(after)
        return scores, kept

    def _smoothed(self, now: Array, mean: Any, spread: Any) -> tuple[Array, Array]:
        """The two averages after one step more."""
        mean = self.smoothing * mean + (1 - self.smoothing) * now
        return mean, self.smoothing * spread + (1 - self.smoothing) * namespace(now).abs(now - mean)

    def _kept(self, scores: list[Array], t: int) -> list[Array]:
        """Which triplets of each layer are among the most important of all, as many as step t allows."""
        xp, total = namespace(scores[0]), self.first * len(scores)
        stay = {"warm_up": self.steps // 10, "steady": self._steady, "steps": self.steps}
        allowed = budget_schedule(t, first=total, last=self.budget, **stay)
        place = xp.argsort(xp.argsort(-xp.concat(scores)))  # 0 for the most important
        return [place[i * self.first : (i + 1) * self.first] < allowed for i in range(len(scores))]


def _start(target: Array, triplets: int, rng: np.random.Generator) -> Triplets:
    """Random orthonormal vectors and λ = 0 (the paper's Gaussian vectors, orthonormal from the start)."""
    xp = namespace(target)
    d_out, d_in = target.shape
    P, Q = (xp.astype(xp.linalg.qr(gaussian((n, triplets), rng, like=target))[0], target.dtype) for n in (d_out, d_in))
    return Triplets(P, xp.zeros_like(P[0, :]), xp.matrix_transpose(Q))


def _moved(x: Triplets, gradient: Triplets, lr: float) -> Triplets:
    return Triplets(*(w - lr * g for w, g in zip(x, gradient, strict=True)))


def _masked(x: Triplets, keep: Array) -> Triplets:
    return Triplets(x.P, namespace(keep).where(keep, x.values, namespace(keep).zeros_like(x.values)), x.Q)


def _of_rank(x: Triplets, keep: Array) -> tuple[int, LowRank]:
    """The number of triplets that stay, and their product."""
    xp = namespace(x.P)
    (places,) = xp.nonzero(keep)
    left, right = (xp.take(w, places, axis=1) for w in (x.P * x.values, xp.matrix_transpose(x.Q)))
    return int(places.shape[0]), LowRank(left, right)
