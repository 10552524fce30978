"""Low-rank adaptation of a weight matrix as a method, on the regression problem whose optimum is known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, final

from nla_llm import costs
from nla_llm.arithmetic import untallied
from nla_llm.backend import Array, generator, is_linalg_error, largest, namespace, number
from nla_llm.methods.registry import Properties, one_of, positive, register, require, settle, whole_number
from nla_llm.methods.update.lora.factors import SCALINGS, Factors, product
from nla_llm.methods.update.lora.initialisations import INITIALISATIONS, start
from nla_llm.methods.update.lora.objectives import OBJECTIVES, Regression, regression, shift_cost
from nla_llm.methods.update.lora.optimisers import OPTIMISERS
from nla_llm.methods.update.result import LowRankUpdate
from nla_llm.methods.update.shared import checked

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from nla_llm.operators import LowRank
    from nla_llm.problems import UpdateProblem

__all__ = ["Lora"]

_SCALES = 1e15  # between its inverse and this the square of a scale is a number of float32

Rng = Any  # int, numpy.random.Generator, or None where nothing is drawn


@register("lora")
@final
@dataclass(frozen=True)
class Lora:
    """The update s·B·A that training finds (Hu et al. 2021, arXiv 2106.09685), started and moved as tables say.

    The loss is a regression on the update itself, ½ ‖ΔW − s·BA‖_F² or ½ ‖X (ΔW − s·BA)ᵀ‖_F²/samples, so the optimum is
    known: the truncated singular value decomposition, of ΔW or for the inputs. Where a start is taken from the base
    weight, the update is s·(BA − B₀A₀), of rank up to 2r (see ``initialisations``).

    Attributes
    ----------
    rank
        r.
    optimiser
        A row of ``optimisers.OPTIMISERS``. The default is the one gradient rule whose rate suits an update of any size.
    initialisation
        A row of ``initialisations.INITIALISATIONS``.
    scaling
        "standard", s = α/r, or "rank_stabilised", s = α/√r.
    alpha
        α; None takes α = r.
    lr
        Rate η of a step; "alternating" has none.
    steps
        Number of steps.
    objective
        "frobenius" or "data".
    batch
        Inputs drawn for a step; None takes all of them.
    noise
        Standard deviation of noise on the outputs, anew in every step.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import UpdateProblem
    >>> B = Lora(1)(UpdateProblem(np.diag([3.0, 1.0])), rng=0)
    >>> B.rank, round(float(B.dense().max()), 6)
    (1, 3.0)
    """

    rank: int
    optimiser: str = "scaled_gd"
    initialisation: str = "gaussian"
    scaling: str = "standard"
    alpha: float | None = None
    lr: float = 0.5
    steps: int = 100
    objective: str = "frobenius"
    batch: int | None = None
    noise: float = 0.0
    properties: ClassVar[Properties] = Properties(
        problem="update", family="lora", target="update", budget="rank", row_stochastic=False, deterministic=False,
        partial=True,
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("rank", self.rank)
        whole_number("steps", self.steps, at_least=0)
        if self.batch is not None:
            whole_number("batch", self.batch)
        one_of("optimiser", self.optimiser, OPTIMISERS)
        one_of("initialisation", self.initialisation, INITIALISATIONS)
        one_of("scaling", self.scaling, SCALINGS)
        one_of("objective", self.objective, OBJECTIVES)
        positive("lr", self.lr)
        if self.alpha is not None:
            positive("alpha", self.alpha, other=" or None")
        if not 1 / _SCALES <= self.scale <= _SCALES:
            raise ValueError(
                f"alpha={self.alpha} with rank={self.rank} makes a scale of {self.scale:g}, whose square leaves "
                "float32; pass an alpha nearer to the rank"
            )
        if self.noise != 0:
            positive("noise", self.noise, other=" or 0")
        if self._stochastic and not OPTIMISERS[self.optimiser].stochastic:
            raise ValueError(f"optimiser={self.optimiser!r} needs all data in every step; leave batch and noise out")
        drawn = INITIALISATIONS[self.initialisation].random or self._stochastic
        budget = None if INITIALISATIONS[self.initialisation].offset else "rank"  # else the rank is up to 2r
        exact = self.optimiser == "alternating" and self.objective == "frobenius" and budget is not None
        promised = replace(type(self).properties, deterministic=not drawn, converges=exact, budget=budget)
        object.__setattr__(self, "properties", promised)

    @property
    def scale(self) -> float:
        """s."""
        return SCALINGS[self.scaling](self.rank if self.alpha is None else self.alpha, self.rank)

    @property
    def _stochastic(self) -> bool:
        return self.batch is not None or self.noise > 0

    def loss(self, problem: UpdateProblem) -> Regression:
        """The loss on ``problem``."""
        return regression(problem, self.objective, scale=self.scale, batch=self.batch, noise=self.noise)

    def iterates(self, problem: UpdateProblem, rng: Rng = None) -> Iterator[Factors]:
        """The factors at the start and after each step, as long as they are finite.

        Raises
        ------
        ValueError
            If the problem lacks what the initialisation or the loss is made from.
        """
        require(self, problem)
        drawing = None if self.properties.deterministic else generator(rng)
        loss, rule = self.loss(problem), OPTIMISERS[self.optimiser]
        factors = start(self.initialisation, problem, loss, self.rank, drawing)
        yield factors
        if INITIALISATIONS[self.initialisation].offset:
            loss = loss.shifted(factors)
        state = rule.start(loss, factors)
        for t in range(1, self.steps + 1):
            try:
                factors, state = rule.step(loss.draw(drawing), factors, state, self.lr, t)
            except Exception as error:
                if not is_linalg_error(error):  # a Gram matrix or an image that is not finite
                    raise
                return
            if not all(_finite(f) for f in factors) or not _state_is_finite(state):
                return
            yield factors

    def update(self, factors: Factors, first: Factors) -> LowRank:
        """The operator that stands for the trained factors: s·BA, or s·(BA − B₀A₀) where the start was subtracted."""
        if not INITIALISATIONS[self.initialisation].offset:
            return product(factors, self.scale)
        xp = namespace(factors.B)
        both = Factors(xp.concat([factors.B, -first.B], axis=-1), xp.concat([factors.A, first.A], axis=-2))
        return product(both, self.scale)

    @checked
    def __call__(self, problem: UpdateProblem, rng: int | np.random.Generator | None = None) -> LowRankUpdate:
        """Factors in the precision of the update; in float32 where that is a half precision.

        Raises
        ------
        FloatingPointError
            If training diverges: there is no operator then. ``training.train`` tells of it without raising.
        """
        iterates = self.iterates(problem, rng)
        first = factors = next(iterates)
        done = 0
        for done, factors in enumerate(iterates, start=1):  # noqa: B007 - the last ones are wanted
            pass
        trained = self.update(factors, first)
        if done < self.steps or not _product_fits(trained):
            step = min(done + 1, self.steps)
            raise FloatingPointError(
                f"{self.optimiser} with lr={self.lr:g} diverged in step {step} of {self.steps}; take a lower rate, "
                "or scale the update"
            )
        return LowRankUpdate(trained.left, trained.right, of=problem.operator)

    def cost(self, problem: UpdateProblem) -> costs.Cost:
        """The start, all steps with their test for finiteness, and the scale; applying takes the two factors."""
        d_out, d_in, r = costs.d_out, costs.d_in, costs.r
        rule, row = OPTIMISERS[self.optimiser], INITIALISATIONS[self.initialisation]
        inputs = None if problem.inputs is None else int(problem.inputs.shape[-2])
        whole = inputs if self.objective == "data" else None  # samples of the loss, and of one step
        samples = self.batch or whole
        data = costs.Operations() if whole is None else costs.formulas.matmul(inputs, d_in, d_out)
        seen = inputs if row.needs else whole
        begin = data + row.cost(d_out, d_in, r, seen)
        if row.offset:
            begin += shift_cost(d_out, d_in, r, whole)
        begin += rule.start_cost(d_out, d_in, r, samples)
        finite = costs.Operations(compare=r * (d_out + d_in))
        drawn = costs.Operations(draw=self.batch or 0)
        if self.noise:
            rows = d_in if samples is None else samples
            drawn += costs.Operations(draw=rows * d_out, add=rows * d_out)
        step: costs.Operations = self.steps * (rule.step_cost(d_out, d_in, r, samples) + finite + drawn)
        width = 2 * r if row.offset else r
        prepare = begin + step + costs.Operations(mul=d_out * width)
        return costs.Cost(prepare=prepare, apply=costs.formulas.LowRankShape(d_out, d_in, width).apply(1))


def _state_is_finite(state: Any) -> bool:
    """Whether the memory of a rule is: squares of gradients overflow before the factors do, and nothing moves then."""
    with untallied():
        return all(_state_is_finite(s) if isinstance(s, tuple) else _finite(s) for s in state)


def _product_fits(op: LowRank) -> bool:
    """Whether no entry of the product can leave the range of its precision."""
    with untallied():
        sizes = (number(op.xp.max(op.xp.abs(f))) for f in (op.left, op.right))
        return op.rank * prod(sizes) <= largest(op.left)


def _finite(x: Array) -> bool:
    xp = namespace(x)
    return bool(xp.all(xp.isfinite(x)))
