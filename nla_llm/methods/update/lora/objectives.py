"""What training makes small: the distance to an update, or to its outputs on given inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, final

from nla_llm import costs
from nla_llm.backend import Array, from_numpy, namespace
from nla_llm.methods.update.lora.factors import Factors
from nla_llm.methods.update.shared import formed

if TYPE_CHECKING:
    import numpy as np

    from nla_llm.problems import UpdateProblem

__all__ = ["OBJECTIVES", "Regression", "gradient_cost", "regression", "shift_cost"]

OBJECTIVES = ("frobenius", "data")


@final
@dataclass(frozen=True, eq=False)
class Regression:
    """½ w ‖X (s B A)ᵀ − Y‖_F², the loss of the product s·B·A on samples.

    Attributes
    ----------
    x
        Inputs (samples, d_in), or None for the identity: then the loss is the distance to Yᵀ itself.
    y
        Outputs (..., samples, d_out).
    scale
        s.
    weight
        w: one over the number of samples, or one where there are no inputs.
    batch
        Samples drawn for a step, without replacement; None takes all of them.
    noise
        Standard deviation of Gaussian noise that is added to the outputs, anew for every step.

    Examples
    --------
    >>> import numpy as np
    >>> loss = Regression(None, np.eye(2))
    >>> loss.gradients(Factors(np.zeros((2, 1)), np.ones((1, 2)))).B.tolist()
    [[-1.0], [-1.0]]
    """

    x: Array | None
    y: Array
    scale: float = 1.0
    weight: float = 1.0
    batch: int | None = None
    noise: float = 0.0

    @property
    def stochastic(self) -> bool:
        """Whether every step sees other data."""
        return self.batch is not None or self.noise > 0

    @property
    def samples(self) -> int:
        """Number of samples: d_in of them where there are no inputs."""
        return int(self.y.shape[-2])

    def draw(self, rng: np.random.Generator | None) -> Regression:
        """The loss on the data of one step."""
        if not self.stochastic:
            return self
        assert rng is not None  # noqa: S101 - for the type checker: stochastic training has a generator
        x, y, weight = self.x, self.y, self.weight
        if self.batch is not None and x is not None:
            rows = rng.choice(self.samples, self.batch, replace=False)
            chosen = from_numpy(rows, like=y)
            xp = namespace(y)
            x, y, weight = xp.take(x, chosen, axis=-2), xp.take(y, chosen, axis=-2), 1.0 / self.batch
        if self.noise > 0:
            y = y + from_numpy(self.noise * rng.standard_normal(y.shape), like=y, dtype=y.dtype)
        return replace(self, x=x, y=y, weight=weight)

    def shifted(self, factors: Factors) -> Regression:
        """The loss of s·(BA − B₀A₀): its optimum is as far from zero as that of s·BA is from the given factors."""
        start = (self.scale * self.inner(factors.A)) @ namespace(self.y).matrix_transpose(factors.B)
        return replace(self, y=self.y + start)

    def gradients(self, factors: Factors) -> Factors:
        """Gradients of the loss with respect to B and A."""
        xp, B, A = namespace(self.y), factors.B, factors.A
        inner = self.scale * self.inner(A)
        residual = inner @ xp.matrix_transpose(B) - self.y
        back = xp.matrix_transpose(residual @ B)
        grad_A = back if self.x is None else back @ self.x
        grad_B = xp.matrix_transpose(residual) @ inner
        return Factors(self.weight * grad_B, (self.weight * self.scale) * grad_A)

    def inner(self, A: Array) -> Array:
        """X Aᵀ, the inputs as the narrow layer sees them."""
        transposed = namespace(A).matrix_transpose(A)
        return transposed if self.x is None else self.x @ transposed

    def descent(self) -> Array:
        """w Yᵀ X (..., d_out, d_in): minus the gradient with respect to a full update, at no update."""
        towards = namespace(self.y).matrix_transpose(self.y)
        return towards if self.x is None else self.weight * (towards @ self.x)


def regression(
    problem: UpdateProblem, kind: str, *, scale: float = 1.0, batch: int | None = None, noise: float = 0.0
) -> Regression:
    """The loss of approximating an update: "frobenius", ½ ‖s B A − ΔW‖_F², or "data", ½ ‖X (s B A − ΔW)ᵀ‖_F²/samples.

    An update or inputs that are operators are formed: the residual is as large as they.

    Raises
    ------
    ValueError
        If the data norm or batches are asked for and the problem has no inputs, or too few of them.
    """
    xp, delta = problem.xp, formed("delta", problem.delta)
    if kind not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {kind!r}")
    if kind == "frobenius":
        if batch is not None:
            raise ValueError(
                f"batch={batch} needs samples to draw from; use objective='data' and a problem with inputs"
            )
        return Regression(None, xp.matrix_transpose(delta), scale, noise=noise)
    if problem.inputs is None:
        raise ValueError("objective='data' needs a problem with inputs; pass UpdateProblem(delta, inputs=x)")
    x = xp.astype(formed("inputs", problem.inputs), delta.dtype, copy=False)
    samples = int(x.shape[-2])
    if batch is not None and batch > samples:
        raise ValueError(f"batch={batch} exceeds the {samples} samples of the problem")
    y = formed("the product of inputs and delta", x @ xp.matrix_transpose(delta))
    return Regression(x, y, scale, 1.0 / samples, batch, noise)


def gradient_cost(d_out: Any, d_in: Any, r: Any, samples: Any | None) -> costs.Operations:
    """Operations of :meth:`Regression.gradients`; ``samples`` is None for the Frobenius norm."""
    rows = d_in if samples is None else samples
    widths = costs.Operations(mul=rows * r + r * (d_out + d_in), add=rows * d_out)
    products: costs.Operations = 3 * costs.formulas.matmul(rows, r, d_out)
    with_inputs: costs.Operations = 2 * costs.formulas.matmul(rows, d_in, r)
    return widths + products + (costs.Operations() if samples is None else with_inputs)


def shift_cost(d_out: Any, d_in: Any, r: Any, samples: Any | None) -> costs.Operations:
    """Operations of :meth:`Regression.shifted`."""
    rows = d_in if samples is None else samples
    start = costs.formulas.matmul(rows, r, d_out) + costs.Operations(mul=rows * r, add=rows * d_out)
    return start if samples is None else start + costs.formulas.matmul(rows, d_in, r)
