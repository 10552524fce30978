"""The Gaussian kernel of queries and keys together: what Nyström methods of sampled tokens approximate.

With x = √scale q and y = √scale k the softmax kernel is exp(x·y) = exp(|x|²/2) exp(−|x − y|²/2) exp(|y|²/2), and the
Gaussian kernel between is positive semi-definite on the union of queries and keys, with a diagonal of ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, by_heads, constant, device_of, namespace
from nla_llm.methods.attention.kernels.linear_attention import half_square_norm
from nla_llm.operators import Selection

if TYPE_CHECKING:
    from nla_llm.problems import AttentionProblem

__all__ = [
    "gaussian",
    "gaussian_cost",
    "joined_tokens",
    "recentred_keys",
    "recentring_cost",
    "sample_tokens",
]


def recentred_keys(x: Array, y: Array, mask: Array | None) -> Array:
    """Keys shifted by −mean(x) − mean(y) over the visible keys: softmax does not see it, and |x + y|² is least."""
    xp = namespace(x, y)
    if mask is None:
        middle = xp.mean(y, axis=-2, keepdims=True)
    else:
        weights = xp.astype(mask, y.dtype)[..., None]
        shown = xp.where(mask[..., None], y, xp.zeros_like(y))
        middle = xp.sum(shown, axis=-2, keepdims=True) / xp.sum(weights, axis=-2, keepdims=True)
    return y - middle - xp.mean(x, axis=-2, keepdims=True)


def recentring_cost(problem: AttentionProblem) -> costs.Operations:
    """Two means, the number of visible keys where there is a mask, and two subtractions."""
    n_q, n_k, d, _ = costs.symbols_of(problem)
    f = costs.formulas
    means = f.sum_of(n_q, times=d) + f.sum_of(n_k, times=d) + costs.Operations(div=2 * d)
    total: costs.Operations = means + costs.Operations(add=2 * n_k * d)
    return total if problem.key_mask is None else total + f.sum_of(n_k)


def joined_tokens(x: Array, y: Array) -> Array:
    """Queries and keys below one another, (..., n_q + n_k, d), batch axes broadcast."""
    xp = namespace(x, y)
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    return xp.concat([xp.broadcast_to(a, (*batch, *a.shape[-2:])) for a in (x, y)], axis=-2)


def sample_tokens(problem: AttentionProblem, m: int, rng: np.random.Generator) -> Selection:
    """m of the queries and visible keys, uniformly without replacement.

    Raises
    ------
    ValueError
        If there are fewer of them.
    """
    xp, total = problem.xp, problem.n_q + problem.n_k
    order = xp.asarray(rng.random(total), device=device_of(problem.q))
    if problem.key_mask is not None:
        hidden = ~problem.key_mask
        shown = xp.zeros((*hidden.shape[:-1], problem.n_q), dtype=xp.bool, device=device_of(hidden))
        order = xp.where(xp.concat([shown, hidden], axis=-1), xp.full_like(order, 2.0), order)
        total -= int(xp.max(xp.sum(xp.astype(hidden, xp.int64), axis=-1)))
    if m > total:
        raise ValueError(f"m={m} tokens cannot be drawn from {total} queries and visible keys; pass a smaller m")
    index = xp.sort(xp.argsort(order, axis=-1)[..., :m], axis=-1)
    return Selection(index, problem.n_q + problem.n_k, like=problem.q)


def gaussian(x: Array, y: Array) -> Array:
    """exp(−|x_i − y_j|²/2), an array (..., n_x, n_y)."""
    return by_heads(_gaussian, x, y)


def _gaussian(x: Array, y: Array) -> Array:
    xp = namespace(x, y)
    log = x @ xp.matrix_transpose(y)
    log -= half_square_norm(x)
    log -= xp.matrix_transpose(half_square_norm(y))
    zero = constant(0.0, like=log)
    return xp.exp(xp.minimum(log, zero))  # above zero there is only rounding, which grows with |x|²


def gaussian_cost(rows: Any, columns: Any, d: Any) -> costs.Operations:
    """Norms of both sides, a product, two subtractions, a comparison and an exponential for each entry."""
    f = costs.formulas
    norms: costs.Operations = (rows + columns) * (costs.Operations(mul=d + 1) + f.sum_of(d))
    pairs = rows * columns
    entries = costs.Operations(add=2 * pairs, compare=pairs, exp=pairs)
    return norms + f.matmul(rows, d, columns) + entries
