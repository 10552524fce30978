"""One training step of a linear layer, fully tuned or by LoRA, written out, and what it costs in time and memory.

The layer maps inputs X (b, d_in) to X Wᵀ or X (W + s·BA)ᵀ; a step is its forward pass, its backward pass from the
gradient with respect to its outputs, and no update of the parameters. The formulas are counted on counted arrays in the
tests, class by class; their matrix products are the 6 b d_in d_out operations of a full step and the
4 b d_in d_out + 6 b r (d_in + d_out) of LoRA, whose ratio tends to 2/3 + 2r/d on square layers, not to r/d.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import sympy

from nla_llm import costs
from nla_llm.backend import Array, namespace
from nla_llm.methods.update.lora.factors import Factors
from nla_llm.methods.update.lora.optimisers import OPTIMISERS

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "LayerStep",
    "Memory",
    "b",
    "full_memory",
    "full_step",
    "full_step_cost",
    "lora_memory",
    "lora_step",
    "lora_step_cost",
    "merge",
    "merge_cost",
    "steps_to_tolerance",
]

b = sympy.Symbol("b")  # rows of a batch: tokens


class LayerStep(NamedTuple):
    """Outputs (b, d_out), gradients of the trained parameters, and of the inputs (b, d_in), None where not wanted."""

    outputs: Array
    parameters: Any
    inputs: Array | None


def full_step(x: Array, W: Array, loss_gradient: Callable[[Array], Array], *, inputs: bool = True) -> LayerStep:
    """Forward and backward pass of X Wᵀ with W trained.

    Parameters
    ----------
    x : array (b, d_in)
    W : array (d_out, d_in)
    loss_gradient
        Outputs → gradient of the loss with respect to them.
    inputs
        Whether the gradient with respect to the inputs is wanted; a first layer does without.

    Examples
    --------
    >>> import numpy as np
    >>> full_step(np.eye(2), np.eye(2), lambda y: y).parameters.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    t = namespace(x).matrix_transpose
    y = x @ t(W)
    dy = loss_gradient(y)
    return LayerStep(y, t(dy) @ x, dy @ W if inputs else None)


def lora_step(
    x: Array,
    W: Array,
    factors: Factors,
    loss_gradient: Callable[[Array], Array],
    *,
    scale: float = 1.0,
    inputs: bool = True,
) -> LayerStep:
    """Forward and backward pass of X (W + s·BA)ᵀ with B and A trained, W frozen, the product never formed.

    Parameters are those of :func:`full_step`; the gradients come as :class:`Factors`.

    Examples
    --------
    >>> import numpy as np
    >>> pair = Factors(np.zeros((2, 1)), np.ones((1, 2)))
    >>> lora_step(np.eye(2), np.eye(2), pair, lambda y: y).parameters.B.tolist()
    [[1.0], [1.0]]
    """
    t, (B, A) = namespace(x).matrix_transpose, factors
    inner = scale * (x @ t(A))  # (b, r)
    y = x @ t(W) + inner @ t(B)
    dy = loss_gradient(y)
    d_inner = scale * (dy @ B)
    dx = dy @ W + d_inner @ A if inputs else None
    return LayerStep(y, Factors(t(dy) @ inner, t(d_inner) @ x), dx)


def merge(W: Array, factors: Factors, *, scale: float = 1.0) -> Array:
    """W + s·BA, after which the adapter costs nothing.

    Examples
    --------
    >>> import numpy as np
    >>> merge(np.eye(2), Factors(np.ones((2, 1)), np.ones((1, 2)))).tolist()
    [[2.0, 1.0], [1.0, 2.0]]
    """
    return W + (scale * factors.B) @ factors.A


# -- operations --------------------------------------------------------------------------------------------------------


def full_step_cost(*, inputs: bool = True) -> costs.Operations:
    """Operations of :func:`full_step` without those of the loss, in b, d_in and d_out.

    Examples
    --------
    >>> full_step_cost().matmuls()
    6*b*d_in*d_out
    """
    products: costs.Operations = (3 if inputs else 2) * costs.formulas.matmul(b, costs.d_in, costs.d_out)
    return products


def lora_step_cost(*, inputs: bool = True) -> costs.Operations:
    """Operations of :func:`lora_step` without those of the loss, in b, d_in, d_out and r.

    Examples
    --------
    >>> lora_step_cost().matmuls()
    4*b*d_in*d_out + 6*b*d_in*r + 6*b*d_out*r
    >>> lora_step_cost(inputs=False).matmuls()
    2*b*d_in*d_out + 4*b*d_in*r + 6*b*d_out*r
    """
    d_in, d_out, r = costs.d_in, costs.d_out, costs.r
    frozen: costs.Operations = (2 if inputs else 1) * costs.formulas.matmul(b, d_in, d_out)
    wide: costs.Operations = 3 * costs.formulas.matmul(b, r, d_out)
    narrow: costs.Operations = (3 if inputs else 2) * costs.formulas.matmul(b, r, d_in)
    sums = costs.Operations(mul=2 * b * r, add=b * d_out + (b * d_in if inputs else 0))
    return frozen + wide + narrow + sums


def merge_cost() -> costs.Operations:
    """Operations of :func:`merge`."""
    d_in, d_out, r = costs.d_in, costs.d_out, costs.r
    return costs.formulas.matmul(d_out, r, d_in) + costs.Operations(mul=d_out * r, add=d_out * d_in)


def steps_to_tolerance(tolerance: Any, factor: Any, start: Any = 1) -> Any:
    """⌈log(tolerance/start)/log(factor)⌉ steps bring an error from ``start`` to ``tolerance`` if each multiplies it.

    Times the cost of a step it is the cost of that accuracy. Factors: ``theory.low_rank_training`` knows those of
    gradient descent, (2κ − 1)/(2κ + 1) at best, of scaled gradient descent, 1 − η, and of alternating least squares.

    Examples
    --------
    >>> steps_to_tolerance(1e-6, 0.5)
    20
    """
    return sympy.ceiling(sympy.log(sympy.sympify(tolerance) / start) / sympy.log(factor))


# -- memory ------------------------------------------------------------------------------------------------------------


class Memory(NamedTuple):
    """Numbers that training keeps for one layer beside the frozen weight: SymPy expressions."""

    parameters: Any
    gradients: Any
    state: Any

    def total(self) -> Any:
        """All of them."""
        return sympy.expand(self.parameters + self.gradients + self.state)


def full_memory(optimiser: str) -> Memory:
    """Memory of training the whole weight with a rule of ``OPTIMISERS``.

    Examples
    --------
    >>> full_memory("adam").total()
    4*d_in*d_out
    """
    return _memory(costs.d_in * costs.d_out, optimiser)


def lora_memory(optimiser: str) -> Memory:
    """Memory of training B and A.

    Examples
    --------
    >>> lora_memory("adam").total()
    4*d_in*r + 4*d_out*r
    """
    return _memory(costs.r * (costs.d_in + costs.d_out), optimiser)


def _memory(parameters: Any, optimiser: str) -> Memory:
    if optimiser not in OPTIMISERS:
        raise ValueError(f"optimiser must be one of {', '.join(OPTIMISERS)}, got {optimiser!r}")
    return Memory(parameters, parameters, OPTIMISERS[optimiser].memory * parameters)
