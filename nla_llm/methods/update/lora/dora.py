"""Weights as magnitude times direction, the decomposition of DoRA (Liu et al. 2024, arXiv 2402.09353).

W = m ∘ V/‖V‖ with one magnitude for each vector of V. The paper takes the columns of W (d, k), the published libraries
the rows of a weight (d_out, d_in), one for each output: both are here, by ``axis``, the axis along which norms run: −1
for rows, −2 for columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from nla_llm.backend import Array, namespace

if TYPE_CHECKING:
    from nla_llm.methods.update.lora.factors import Factors

__all__ = ["Decomposed", "DoraGradients", "compose", "decompose", "dora_gradients", "dora_weight"]


class Decomposed(NamedTuple):
    """Magnitudes, with an axis of length one where norms were taken, and directions, vectors of norm one."""

    magnitude: Array
    direction: Array


class DoraGradients(NamedTuple):
    """Gradients with respect to the magnitudes and to the weight V whose directions are taken."""

    magnitude: Array
    weight: Array


def decompose(W: Array, axis: int = -1) -> Decomposed:
    """Norms and directions of the rows (``axis=-1``) or columns (``axis=-2``) of W (..., d_out, d_in).

    Raises
    ------
    ValueError
        If a vector is zero, which has no direction.

    Examples
    --------
    >>> import numpy as np
    >>> m, v = decompose(np.array([[3.0, 4.0], [0.0, 2.0]]))
    >>> m[:, 0].tolist(), v.round(12).tolist()
    ([5.0, 2.0], [[0.6, 0.8], [0.0, 1.0]])
    """
    xp = namespace(W)
    norms = xp.linalg.vector_norm(W, axis=_axis(axis), keepdims=True)
    if bool(xp.any(norms == 0)):
        raise ValueError(f"a {'row' if axis == -1 else 'column'} of the weight is zero and has no direction; drop it")
    return Decomposed(norms, W / norms)


def compose(parts: Decomposed) -> Array:
    """The weight, magnitude times direction.

    Examples
    --------
    >>> import numpy as np
    >>> W = np.array([[3.0, 4.0], [0.0, 2.0]])
    >>> bool(np.allclose(compose(decompose(W)), W))
    True
    """
    return parts.magnitude * parts.direction


def dora_weight(W: Array, factors: Factors, magnitude: Array, *, scale: float = 1.0, axis: int = -1) -> Array:
    """m ∘ (W + s·BA)/‖W + s·BA‖ (equation 5 of the paper); W itself for B = 0 and the magnitudes of W.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.methods.update.lora.factors import Factors
    >>> W, start = np.diag([3.0, 2.0]), Factors(np.zeros((2, 1)), np.ones((1, 2)))
    >>> bool(np.allclose(dora_weight(W, start, decompose(W).magnitude), W))
    True
    """
    return magnitude * decompose(W + scale * (factors.B @ factors.A), axis).direction


def dora_gradients(V: Array, magnitude: Array, gradient: Array, *, axis: int = -1) -> DoraGradients:
    """Gradients of a loss through W' = m ∘ V/‖V‖ from its gradient with respect to W' (equations 6 and 7).

    That of V is (m/‖V‖)(I − v vᵀ) times the gradient, v the direction: perpendicular to V, so that gradient flow keeps
    its norms. That of A and B follows by the chain, s·Bᵀ(·) and s·(·)Aᵀ.

    Examples
    --------
    >>> import numpy as np
    >>> g = dora_gradients(np.array([[2.0, 0.0]]), np.array([[1.0]]), np.array([[3.0, 4.0]]))
    >>> g.magnitude.tolist(), g.weight.tolist()
    ([[3.0]], [[0.0, 2.0]])
    """
    xp = namespace(V)
    norms, direction = decompose(V, axis)
    along = xp.sum(gradient * direction, axis=_axis(axis), keepdims=True)
    return DoraGradients(along, (magnitude / norms) * (gradient - along * direction))


def _axis(axis: int) -> int:
    if axis not in {-1, -2}:
        raise ValueError(f"axis must be -1 (rows of the weight) or -2 (columns), got {axis!r}")
    return axis
