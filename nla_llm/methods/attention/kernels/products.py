"""Products of linear forms of unit vectors: what sketches of polynomial kernels and random series are made of."""

from __future__ import annotations

from functools import partial
from math import sqrt
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, by_heads, constant, from_numpy, namespace

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nla_llm.problems import AttentionProblem

__all__ = [
    "KINDS",
    "Factor",
    "Kind",
    "draw_vectors",
    "inputs_cost",
    "product_of_forms",
    "products_cost",
    "unit_rows",
]

Kind: TypeAlias = Literal["rademacher", "gaussian", "complex_rademacher", "complex_gaussian"]
KINDS: tuple[str, ...] = get_args(Kind)

Factor: TypeAlias = tuple[
    Array, ...
]  # real parts (m, d) of the vectors of one factor; the imaginary parts too, if complex


def unit_rows(x: Array) -> tuple[Array, Array]:
    """x/|x| and log|x| (..., n, 1) of each row; a row of zeros stays one, and its logarithm is zero too."""
    xp = namespace(x)
    norm = xp.linalg.vector_norm(x, axis=-1, keepdims=True)
    norm = xp.where(norm > 0, norm, constant(1.0, like=x))
    return x / norm, xp.log(norm)


def inputs_cost(problem: AttentionProblem) -> costs.Operations:
    """Cost of the scaled inputs and :func:`unit_rows`."""
    n_q, n_k, d, _ = costs.symbols_of(problem)
    row = costs.Operations(mul=d, madd=d, sqrt=1, compare=1, div=d, exp=1)
    rows: costs.Operations = (n_q + n_k) * row
    return rows


def product_of_forms(x: Array, factors: Sequence[Factor]) -> Array:
    """Π_j w_j·x of x (..., n, d) for all vectors of the factors: (..., n, m); real then imaginary parts, if complex."""
    return by_heads(partial(_product_of_forms, factors=factors), x)


def _product_of_forms(x: Array, *, factors: Sequence[Factor]) -> Array:
    xp = namespace(x)
    first, *others = [tuple(xp.matrix_transpose(part) for part in factor) for factor in factors]
    if len(first) == 1:
        product = x @ first[0]
        for (w,) in others:
            product *= x @ w  # a product of matrices is a fresh array
        return product
    re, im = x @ first[0], x @ first[1]
    for w_re, w_im in others:
        a, b = x @ w_re, x @ w_im
        re, im = re * a - im * b, re * b + im * a
    return xp.concat([re, im], axis=-1)


def products_cost(tokens: Any, d: Any, m: Any, degree: int, *, is_complex: bool = False) -> costs.Operations:
    """Cost of :func:`product_of_forms` for ``degree`` factors of m vectors."""
    forms = costs.formulas.matmul(tokens, d, m) * degree
    products = (degree - 1) * m * tokens
    if not is_complex:
        return forms + costs.Operations(mul=products)
    pairs: costs.Operations = forms * 2 + costs.Operations(mul=4, add=2) * products
    return pairs


def draw_vectors(kind: Kind, shape: tuple[int, ...], rng: np.random.Generator, *, like: Array) -> Factor:
    """Vectors with independent entries of mean zero and E |w|² = 1: real parts, and imaginary ones if complex."""
    parts: Sequence[Any]
    if kind == "rademacher":
        parts = (2.0 * rng.integers(0, 2, shape) - 1.0,)
    elif kind == "gaussian":
        parts = (rng.standard_normal(shape),)
    elif kind == "complex_rademacher":  # 1, i, −1, −i
        turns = rng.integers(0, 4, shape)
        parts = tuple(np.asarray([1.0, 0.0, -1.0, 0.0])[(turns - shift) % 4] for shift in (0, 1))
    else:
        parts = tuple(rng.normal(0.0, sqrt(0.5), (2, *shape)))
    xp = namespace(like)
    return tuple(xp.astype(from_numpy(part, like=like), like.dtype) for part in parts)
