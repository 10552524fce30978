"""Ensembles of random directions ω₁ … ω_m in R^d: how they are drawn, what they cost, and how inputs meet them.

An ensemble is a row of :data:`ENSEMBLES`; every random-feature function composes with every one of them. Its law that
matters is E ω ωᵀ = I; where each row is N(0, I) by itself, every feature function that is unbiased with independent
directions stays so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from nla_llm import costs
from nla_llm.backend import Array, from_numpy, namespace

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

__all__ = ["ENSEMBLES", "Directions", "Ensemble", "check_ensemble", "draw_directions"]

Expr = Any  # an int or an expression of SymPy, which has no types


@final
@dataclass(frozen=True, eq=False)
class Directions:
    """Drawn directions, an array (m, d) in the library and dtype of the inputs that will meet them."""

    matrix: Array

    def project(self, x: Array) -> Array:
        """ω·x for every direction and every token of x (..., n, d): an array (..., n, m)."""
        return x @ namespace(x).matrix_transpose(self.matrix)

    def dense(self) -> Array:
        """The directions as rows, (m, d)."""
        return self.matrix


@dataclass(frozen=True)
class Ensemble:
    """A law of directions.

    Attributes
    ----------
    draw
        (m, d, rng, like) → an object with ``project`` and ``dense`` as :class:`Directions` has them.
    draw_cost
        (m, d) → operations of drawing.
    project_cost
        (tokens, m, d) → operations of projecting that many tokens.
    gaussian
        Every row is N(0, I_d) by itself, so that unbiased feature functions stay unbiased.
    """

    draw: Callable[[int, int, np.random.Generator, Array], Directions]
    draw_cost: Callable[[Expr, Expr], costs.Operations]
    project_cost: Callable[[Expr, Expr, Expr], costs.Operations]
    gaussian: bool = True


def draw_directions(ensemble: str, m: int, d: int, rng: np.random.Generator, *, like: Array) -> Directions:
    """Directions of the named ensemble in the library, on the device and in the dtype of ``like``.

    Examples
    --------
    >>> import numpy as np
    >>> draw_directions("orthogonal", 5, 3, np.random.default_rng(0), like=np.zeros(1)).dense().shape
    (5, 3)
    """
    return ENSEMBLES[ensemble].draw(m, d, rng, like)


def check_ensemble(name: str) -> None:
    """ValueError, naming the known ones, where there is no such ensemble."""
    if name not in ENSEMBLES:
        raise ValueError(f"directions must be one of {', '.join(ENSEMBLES)}, got {name!r}")


def _matrix(drawn: Array, like: Array) -> Directions:
    return Directions(namespace(like).astype(drawn, like.dtype))


def _dense_products(tokens: Expr, m: Expr, d: Expr) -> costs.Operations:
    return costs.formulas.matmul(tokens, d, m)


def _draw_iid(m: int, d: int, rng: np.random.Generator, like: Array) -> Directions:
    return _matrix(from_numpy(rng.standard_normal((m, d)), like=like), like)


def _iid_cost(m: Expr, d: Expr) -> costs.Operations:
    return costs.Operations(draw=m * d)


def _draw_orthogonal(m: int, d: int, rng: np.random.Generator, like: Array) -> Directions:
    from nla_llm.linalg import orthogonal_directions  # noqa: PLC0415 - floor 1, loaded only where it is used

    return _matrix(orthogonal_directions(m, d, rng, like=like), like)


def _orthogonal_cost(m: Expr, d: Expr) -> costs.Operations:
    return costs.formulas.orthogonal_directions(m, d)  # looked up when called: SymPy loads with the first formula


ENSEMBLES: dict[str, Ensemble] = {
    # N(0, I)
    "iid": Ensemble(_draw_iid, _iid_cost, _dense_products),
    # Haar-orthogonal blocks of d rows with independent χ_d norms (Choromanski et al. 2021, arXiv 2009.14794, §2.4)
    "orthogonal": Ensemble(_draw_orthogonal, _orthogonal_cost, _dense_products),
}
