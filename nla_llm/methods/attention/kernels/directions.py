"""Ensembles of random directions ω₁ … ω_m in R^d: how they are drawn, what they cost, and how inputs meet them.

An ensemble is a row of :data:`ENSEMBLES`; every random-feature function composes with every one of them. Its law that
matters is E ω ωᵀ = I; where each row is N(0, I) by itself, every feature function that is unbiased with independent
directions stays so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, final

from nla_llm import costs
from nla_llm.backend import Array, device_of, from_numpy, has_tuned_products, namespace
from nla_llm.methods.registry import one_of

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

__all__ = [
    "ENSEMBLES",
    "DenseDirections",
    "Directions",
    "Ensemble",
    "HadamardDirections",
    "check_ensemble",
    "draw_directions",
]

_DENSE_IS_FASTER = 1024  # length of a transform up to which a tuned matrix product wins (measured)

Expr = Any  # an int or an expression of SymPy, which has no types


class Directions(Protocol):
    """Drawn directions, in the library and dtype of the inputs that will meet them."""

    def project(self, x: Array) -> Array:
        """ω·x for every direction and every token of x (..., n, d): an array (..., n, m)."""
        ...

    def dense(self) -> Array:
        """The directions as rows, (m, d)."""
        ...


@final
@dataclass(frozen=True, eq=False)
class DenseDirections:
    """Directions without structure: the rows of an array (m, d)."""

    matrix: Array

    def project(self, x: Array) -> Array:
        """ω·x by a matrix product."""
        return x @ namespace(x).matrix_transpose(self.matrix)

    def dense(self) -> Array:
        """The directions as rows, (m, d)."""
        return self.matrix


@final
@dataclass(frozen=True, eq=False)
class HadamardDirections:
    """Blocks H D_k … H D_1 with diagonals D of signs, their rows times lengths; known by their diagonals alone.

    A projection is k fast transforms of length D, the power of two from d on, for each token and block. Where matrix
    products are tuned they are faster than transforms up to D ≈ 1024, so that the rows are formed and multiplied: at
    d = 64, m = 256, three factors, on one core, 10 times faster in NumPy and 25 times in PyTorch.

    Attributes
    ----------
    m, d
        Number of directions and their dimension.
    diagonals
        (blocks, k, D); all but the first factor hold ±D^(−1/2), so that nothing grows on the way.
    lengths
        (m,) factors of the rows, or None for ones.
    """

    m: int
    d: int
    diagonals: Array
    lengths: Array | None

    def project(self, x: Array) -> Array:
        """ω·x by fast Walsh–Hadamard transforms of x, padded with zeros."""
        if has_tuned_products(x) and self.diagonals.shape[-1] <= _DENSE_IS_FASTER:
            return DenseDirections(self.dense()).project(x)
        return self._transform(x)

    def dense(self) -> Array:
        """The directions as rows, (m, d)."""
        xp = namespace(self.diagonals)
        unit_vectors = xp.eye(self.d, dtype=self.diagonals.dtype, device=device_of(self.diagonals))
        return xp.matrix_transpose(self._transform(unit_vectors))

    def _transform(self, x: Array) -> Array:
        from nla_llm.linalg import walsh_hadamard  # noqa: PLC0415 - floor 1, loaded only where it is used

        xp = namespace(x)
        blocks, factors, size = self.diagonals.shape
        signed = x[..., None, :] * self.diagonals[:, 0, : self.d]  # (..., n, blocks, d)
        zeros = xp.zeros((*signed.shape[:-1], size - self.d), dtype=x.dtype, device=device_of(x))
        y = walsh_hadamard(xp.concat([signed, zeros], axis=-1))
        for factor in range(1, factors):
            y = walsh_hadamard(y * self.diagonals[:, factor, :])
        rows = xp.reshape(y, (*x.shape[:-1], blocks * size))[..., : self.m]
        return rows if self.lengths is None else rows * self.lengths


@dataclass(frozen=True)
class Ensemble:
    """A law of directions.

    Attributes
    ----------
    draw
        (m, d, rng, like) → :class:`Directions`.
    draw_cost
        (m, d) → operations of drawing.
    project_cost
        (tokens, m, d) → operations of projecting that many tokens.
    gaussian
        Every row is N(0, I_d) by itself, so that unbiased feature functions stay unbiased; the others estimate another
        kernel, however many directions there are.
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
    one_of("directions", name, ENSEMBLES)


# -- laws --------------------------------------------------------------------------------------------------------------
# Floor 1 and the formulas are looked up when they are called: SciPy and SymPy load with the first of them.


def _matrix(drawn: Array, like: Array) -> Directions:
    return DenseDirections(namespace(like).astype(drawn, like.dtype))


def _dense_products(tokens: Expr, m: Expr, d: Expr) -> costs.Operations:
    return costs.formulas.matmul(tokens, d, m)


def _draw_iid(m: int, d: int, rng: np.random.Generator, like: Array) -> Directions:
    return _matrix(from_numpy(rng.standard_normal((m, d)), like=like), like)


def _iid_cost(m: Expr, d: Expr) -> costs.Operations:
    return costs.Operations(draw=m * d)


def _draw_orthogonal(m: int, d: int, rng: np.random.Generator, like: Array) -> Directions:
    from nla_llm.linalg import orthogonal_directions  # noqa: PLC0415

    return _matrix(orthogonal_directions(m, d, rng, like=like), like)


def _orthogonal_cost(m: Expr, d: Expr) -> costs.Operations:
    return costs.formulas.orthogonal_directions(m, d)


def _draw_regularised(m: int, d: int, rng: np.random.Generator, like: Array) -> Directions:
    from nla_llm.linalg import orthogonal_directions  # noqa: PLC0415

    return _matrix(orthogonal_directions(m, d, rng, like=like, fixed_norms=True), like)


def _regularised_cost(m: Expr, d: Expr) -> costs.Operations:
    return costs.formulas.orthogonal_directions(m, d, fixed_norms=True)


def _draw_simplex(m: int, d: int, rng: np.random.Generator, like: Array) -> Directions:
    from nla_llm.linalg import simplex_directions  # noqa: PLC0415

    return _matrix(simplex_directions(m, d, rng, like=like), like)


def _simplex_cost(m: Expr, d: Expr) -> costs.Operations:
    return costs.formulas.simplex_directions(m, d)


def _draw_sobol(m: int, d: int, rng: np.random.Generator, like: Array) -> Directions:
    from nla_llm.linalg import sobol_directions  # noqa: PLC0415

    return _matrix(from_numpy(sobol_directions(m, d, rng), like=like), like)


def _sobol_cost(m: Expr, d: Expr) -> costs.Operations:
    from nla_llm.linalg import SOBOL_SEEDS  # noqa: PLC0415

    return costs.Operations(draw=SOBOL_SEEDS + m * d)  # points and Φ⁻¹ belong to the drawing, as a generator's inside


def _hadamard(factors: int, *, chi: bool) -> Ensemble:
    """Blocks of ``factors`` transforms; rows have the norm √D, or χ_D norms."""

    def draw(m: int, d: int, rng: np.random.Generator, like: Array) -> Directions:
        from nla_llm.linalg import next_power_of_two  # noqa: PLC0415

        xp, size = namespace(like), next_power_of_two(d)
        signs = 2 * rng.integers(0, 2, size=(-(-m // size), factors, size)) - 1
        diagonals = xp.astype(from_numpy(signs, like=like), xp.float64)
        if factors > 1:
            later = diagonals[:, 1:, :] * size**-0.5
            diagonals = xp.concat([diagonals[:, :1, :], later], axis=1)
        lengths = None
        if chi:  # before it a row has the norm √D
            lengths = xp.sqrt(from_numpy(rng.chisquare(size, size=m), like=like)) * size**-0.5
            lengths = xp.astype(lengths, like.dtype)
        return HadamardDirections(m, d, xp.astype(diagonals, like.dtype), lengths)

    def draw_cost(m: Expr, d: Expr) -> costs.Operations:
        return costs.formulas.hadamard_directions(m, d, factors=factors, chi=chi)

    def project_cost(tokens: Expr, m: Expr, d: Expr) -> costs.Operations:
        one = costs.formulas.hadamard_projection(m, d, factors=factors, chi=chi)
        all_tokens: costs.Operations = tokens * one
        return all_tokens

    return Ensemble(draw, draw_cost, project_cost, gaussian=False)


ENSEMBLES: dict[str, Ensemble] = {
    # N(0, I)
    "iid": Ensemble(_draw_iid, _iid_cost, _dense_products),
    # Haar-orthogonal blocks of d rows with independent χ_d norms (Choromanski et al. 2021, arXiv 2009.14794, §2.4)
    "orthogonal": Ensemble(_draw_orthogonal, _orthogonal_cost, _dense_products),
    # the same with all norms √d: the kernel SMREG (ibidem, Theorem 1), E ω ωᵀ = I
    "regularised": Ensemble(_draw_regularised, _regularised_cost, _dense_products, gaussian=False),
    # blocks u_i·u_j = −1/(d − 1) with independent χ_d norms (Reid et al. 2023, arXiv 2301.13856)
    "simplex": Ensemble(_draw_simplex, _simplex_cost, _dense_products),
    # rows of D^(−1) H D₃ H D₂ H D₁ with independent χ_D norms, D the power of two from d on, cut to d coordinates:
    # E ω ωᵀ = I; orthogonal within blocks, norms χ_d, where d = D (Yu et al. 2016, arXiv 1610.09072, with norms √D)
    "hadamard": _hadamard(3, chi=True),
    # rows of H D₁ cut to d coordinates: independent signs in each row, E ω ωᵀ = I, norms √d; all rows of a block agree
    # in the first coordinate, along which more of them bring nothing
    "hadamard1": _hadamard(1, chi=False),
    # Φ⁻¹ of scrambled Sobol points: each row N(0, I), all of them spread evenly
    "sobol": Ensemble(_draw_sobol, _sobol_cost, _dense_products),
}
