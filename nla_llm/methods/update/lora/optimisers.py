"""How the factors are moved: one row of :data:`OPTIMISERS` for each rule.

A rule starts with a state (a tuple of arrays) and makes one step from the loss on the data of that step. Rates of
gradient rules belong to the loss as it is, but for the scaled ones, whose natural rates lie in (0, 2/3] whatever the
update is multiplied by.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from nla_llm import costs
from nla_llm.backend import Array, device_of, namespace
from nla_llm.linalg.inverses import pseudo_inverse
from nla_llm.methods.update.lora.factors import Factors

if TYPE_CHECKING:
    from collections.abc import Callable

    from nla_llm.methods.update.lora.objectives import Regression

__all__ = ["OPTIMISERS", "Optimiser"]

State = tuple[Any, ...]
MOMENTUM = 0.9
BETAS, ADAM_EPS = (0.9, 0.999), 1e-8  # Kingma and Ba 2014, arXiv 1412.6980
RATIO = 16.0  # rate of B over that of A, as Hayou et al. 2024, arXiv 2402.12354, recommend
DAMPING = 1e-12  # of the trace of a Gram matrix: empirical, enough to divide by one of lower rank


@dataclass(frozen=True)
class Optimiser:
    """A rule.

    Attributes
    ----------
    start
        (loss, factors) → state.
    step
        (loss on the data of this step, factors, state, rate, number of the step from 1) → factors, state.
    start_cost, step_cost
        (d_out, d_in, r, samples or None) → operations, those of the gradients included.
    memory
        Numbers of state for each trained parameter.
    stochastic
        Whether a step may see part of the data.
    """

    start: Callable[[Regression, Factors], State]
    step: Callable[[Regression, Factors, State, float, int], tuple[Factors, State]]
    start_cost: Callable[[Any, Any, Any, Any], costs.Operations]
    step_cost: Callable[[Any, Any, Any, Any], costs.Operations]
    memory: int = 0
    stochastic: bool = True


def _nothing(loss: Regression, factors: Factors) -> State:
    return ()


def _no_cost(d_out: Any, d_in: Any, r: Any, samples: Any) -> costs.Operations:
    return costs.Operations()


def _with_gradients(**per_parameter: int) -> Callable[[Any, Any, Any, Any], costs.Operations]:
    """Gradients, and so many operations of each class for every parameter."""

    def step_cost(d_out: Any, d_in: Any, r: Any, samples: Any) -> costs.Operations:
        from nla_llm.methods.update.lora.objectives import gradient_cost  # noqa: PLC0415 - formulas alone

        parameters = r * (d_out + d_in)
        entries = costs.Operations(**{kind: times * parameters for kind, times in per_parameter.items()})
        return gradient_cost(d_out, d_in, r, samples) + entries

    return step_cost


# -- gradient descent, with and without memory -------------------------------------------------------------------------


def _descend(loss: Regression, factors: Factors, state: State, lr: float, t: int) -> tuple[Factors, State]:
    g = loss.gradients(factors)
    return Factors(factors.B - lr * g.B, factors.A - lr * g.A), state


def _start_momentum(loss: Regression, factors: Factors) -> State:
    return (_zeros(factors),)


def _momentum(loss: Regression, factors: Factors, state: State, lr: float, t: int) -> tuple[Factors, State]:
    g, velocity = loss.gradients(factors), state[0]
    velocity = Factors(MOMENTUM * velocity.B + g.B, MOMENTUM * velocity.A + g.A)
    return Factors(factors.B - lr * velocity.B, factors.A - lr * velocity.A), (velocity,)


def _start_adam(loss: Regression, factors: Factors) -> State:
    return _zeros(factors), _zeros(factors)


def _adam(
    loss: Regression, factors: Factors, state: State, lr: float, t: int, *, ratio: float = 1.0
) -> tuple[Factors, State]:
    """Adam, the rate of B ``ratio`` times that of A."""
    g, (first, second) = loss.gradients(factors), state
    B, first_B, second_B = _adam_entries(factors.B, g.B, (first.B, second.B), ratio * lr, t)
    A, first_A, second_A = _adam_entries(factors.A, g.A, (first.A, second.A), lr, t)
    return Factors(B, A), (Factors(first_B, first_A), Factors(second_B, second_A))


def _adam_entries(w: Array, g: Array, moments: tuple[Array, Array], lr: float, t: int) -> tuple[Array, Array, Array]:
    m, v = moments
    m = BETAS[0] * m + (1 - BETAS[0]) * g
    v = BETAS[1] * v + (1 - BETAS[1]) * (g * g)
    size = namespace(w).sqrt(v / (1 - BETAS[1] ** t)) + ADAM_EPS
    return w - (lr / (1 - BETAS[0] ** t)) * m / size, m, v


def _zeros(factors: Factors) -> Factors:
    xp = namespace(factors.B)
    return Factors(*(xp.zeros_like(f) for f in factors))


# -- preconditioned by the other factor --------------------------------------------------------------------------------


def _scaled(loss: Regression, factors: Factors, state: State, lr: float, t: int) -> tuple[Factors, State]:
    """B ← B − η G_B (s² A Aᵀ)⁻¹ and A ← A − η (s² Bᵀ B)⁻¹ G_A, both from the old factors.

    The s² make the product s·B·A move as with s = 1. Where B = 0, G_A vanishes with it and A stays.
    """
    xp, (B, A), g = namespace(factors.B), factors, loss.gradients(factors)
    t_ = xp.matrix_transpose
    move_B = t_(_solve(A @ t_(A), t_(g.B), loss.scale))
    move_A = _solve(t_(B) @ B, g.A, loss.scale)
    return Factors(B - lr * move_B, A - lr * move_A), state


def _solve(gram: Array, right: Array, scale: float) -> Array:
    """(s² G + damping)⁻¹ right, the damping relative to the trace of G."""
    xp = namespace(gram)
    trace = xp.sum(xp.linalg.diagonal(gram), axis=-1)[..., None, None]
    limits = xp.finfo(gram.dtype)
    ridge = DAMPING * trace + float(limits.smallest_normal) / float(limits.eps)  # a factor of zero leaves no trace
    eye = xp.eye(gram.shape[-1], dtype=gram.dtype, device=device_of(gram))
    return xp.linalg.solve(scale**2 * (gram + ridge * eye), right)


def _scaled_cost(d_out: Any, d_in: Any, r: Any, samples: Any) -> costs.Operations:
    damped: costs.Operations = 2 * (costs.formulas.sum_of(r) + costs.Operations(mul=1 + 2 * r**2, add=1 + r**2))
    grams = costs.formulas.matmul(r, d_in, r) + costs.formulas.matmul(r, d_out, r)
    solves = costs.formulas.solve(r, d_out) + costs.formulas.solve(r, d_in)
    return _with_gradients(mul=1, add=1)(d_out, d_in, r, samples) + grams + damped + solves


# -- exact minimisation over one factor at a time ----------------------------------------------------------------------


def _start_alternating(loss: Regression, factors: Factors) -> State:
    """(X⁺ Y)ᵀ, the full update of least squares."""
    fit = loss.y if loss.x is None else pseudo_inverse(loss.x) @ loss.y
    return (namespace(fit).matrix_transpose(fit),)


def _alternate(loss: Regression, factors: Factors, state: State, lr: float, t: int) -> tuple[Factors, State]:
    """B of least squares for the row space of A, made orthonormal; then A of least squares for that B.

    Without inputs it is subspace iteration. Only the row space of A matters, so a B of zero is as good as any.
    """
    xp, fit = namespace(factors.B), state[0]
    t_ = xp.matrix_transpose
    row_space = xp.linalg.qr(t_(factors.A))[0]
    B = fit @ row_space if loss.x is None else t_(pseudo_inverse(loss.x @ row_space) @ loss.y)
    B = xp.linalg.qr(B)[0]
    return Factors(B, (1 / loss.scale) * (t_(B) @ fit)), state


def _alternating_start_cost(d_out: Any, d_in: Any, r: Any, samples: Any) -> costs.Operations:
    if samples is None:
        return costs.Operations()
    return costs.formulas.pseudo_inverse(samples, d_in) + costs.formulas.matmul(d_in, samples, d_out)


def _alternating_cost(d_out: Any, d_in: Any, r: Any, samples: Any) -> costs.Operations:
    bases = costs.formulas.qr(d_in, r) + costs.formulas.qr(d_out, r)
    new_A = costs.formulas.matmul(r, d_out, d_in) + costs.Operations(mul=r * d_in)
    if samples is None:
        return bases + new_A + costs.formulas.matmul(d_out, d_in, r)
    seen = costs.formulas.matmul(samples, d_in, r) + costs.formulas.pseudo_inverse(samples, r)
    return bases + new_A + seen + costs.formulas.matmul(r, samples, d_out)


_ADAM_COST = _with_gradients(mul=6, add=4, div=2, sqrt=1)
OPTIMISERS: dict[str, Optimiser] = {
    "gradient_descent": Optimiser(_nothing, _descend, _no_cost, _with_gradients(mul=1, add=1)),
    # heavy ball (Polyak 1964)
    "momentum": Optimiser(_start_momentum, _momentum, _no_cost, _with_gradients(mul=2, add=2), memory=1),
    # Kingma and Ba 2014, arXiv 1412.6980, algorithm 1
    "adam": Optimiser(_start_adam, _adam, _no_cost, _ADAM_COST, memory=2),
    # Hayou, Ghosh and Yu 2024, arXiv 2402.12354: Adam with a larger rate for B
    "lora_plus": Optimiser(_start_adam, partial(_adam, ratio=RATIO), _no_cost, _ADAM_COST, memory=2),
    # Tong, Ma and Chi 2021, arXiv 2005.08898; for LoRA: Zhang and Pilanci 2024, arXiv 2402.02347
    "scaled_gd": Optimiser(_nothing, _scaled, _no_cost, _scaled_cost),
    # alternating least squares, of which the rate of learning is no part
    "alternating": Optimiser(
        _start_alternating, _alternate, _alternating_start_cost, _alternating_cost, stochastic=False
    ),
}
