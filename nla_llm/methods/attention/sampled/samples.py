"""What all methods share that attend to a sample of the keys: logits on a sample with weights, and draws."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, constant, device_of, is_numpy, namespace, parallel
from nla_llm.operators import Dense, Product, RowNormalised, Selection

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.problems import AttentionProblem

__all__ = [
    "draw_with_replacement",
    "draw_with_replacement_cost",
    "draw_without_replacement",
    "draw_without_replacement_cost",
    "exponentials",
    "exponentials_cost",
    "logits_on_sample",
    "logits_on_sample_cost",
    "squared_value_norms",
    "squared_value_norms_cost",
    "uniform_numbers",
    "values_of_operator",
    "visible_in_sample",
    "weighted_sample_attention",
    "weighted_sample_attention_cost",
]

_WORTH_TILES, _TILE_ENTRIES = 1 << 18, 1 << 17  # entries: a tile is half a MiB in float32 (measured)
Expr = Any  # an int or an expression of SymPy, which has no types


# -- attention on a sample ---------------------------------------------------------------------------------------------


def logits_on_sample(
    problem: AttentionProblem,
    sample: Selection,
    *,
    log_weight: Array | float | None = None,
    visible: Array | None = None,
) -> Array:
    """Logits on the sampled keys plus ``log_weight``, (..., n_q, m), a fresh array; −∞ where a query sees no such key.

    Parameters
    ----------
    sample
        The keys, an index (..., m); a key that it holds twice counts twice.
    log_weight
        (..., 1, m) or a number, or None for zeros.
    visible
        Which of the sampled keys a query sees, (..., n_q, m) or (..., 1, m); None where it sees all.
    """
    xp, q = problem.xp, problem.q
    logits = (problem.scale * q) @ xp.matrix_transpose(sample @ problem.k)
    if log_weight is not None:
        logits += log_weight  # a fresh array
    if visible is not None:
        logits = xp.where(visible, logits, constant(-xp.inf, like=logits))
    return logits


def logits_on_sample_cost(problem: AttentionProblem, m: Expr, *, weighted: bool) -> costs.Operations:
    """Cost of :func:`logits_on_sample` for m keys; hidden ones are computed and thrown away."""
    n_q, _, d, _ = costs.symbols_of(problem)
    weights = costs.Operations(add=n_q * m if weighted else 0)
    return costs.Operations(mul=n_q * d) + costs.formulas.matmul(n_q, d, m) + weights


def exponentials(logits: Array, top: Array | None = None) -> tuple[Array, Array]:
    """exp(logits − top) for logits (..., rows, m), and ``top`` (..., rows): the largest of each row unless it is given.

    ``logits`` may be overwritten: where it is large and NumPy's, this runs in place, in tiles that stay in the cache.
    """
    xp = namespace(logits)
    if is_numpy(logits) and logits.size >= _WORTH_TILES and logits.flags.c_contiguous:
        return _exponentials_in_tiles(logits, top)
    if top is None:
        top = xp.max(logits, axis=-1)
    return xp.exp(logits - top[..., None]), top


def _exponentials_in_tiles(logits: NDArray[Any], top: NDArray[Any] | None) -> tuple[NDArray[Any], NDArray[Any]]:
    m = logits.shape[-1]
    flat = logits.reshape(-1, m)
    known = None if top is None else np.broadcast_to(top, logits.shape[:-1]).reshape(-1)
    tops = np.empty(len(flat), logits.dtype) if known is None else known
    rows = max(1, _TILE_ENTRIES // m)

    def tile(start: int) -> None:
        part = slice(start, start + rows)
        if known is None:
            np.max(flat[part], axis=-1, out=tops[part])
        flat[part] -= tops[part, None]
        np.exp(flat[part], out=flat[part])

    parallel(tile, range(0, len(flat), rows))
    return logits, tops.reshape(logits.shape[:-1])


def exponentials_cost(rows: Expr, m: Expr) -> costs.Operations:
    """Cost of :func:`exponentials`."""
    return costs.formulas.maximum_of(m, times=rows) + costs.Operations(add=rows * m, exp=rows * m)


def visible_in_sample(problem: AttentionProblem, sample: Selection) -> Array | None:
    """Which of the sampled keys a query sees by causality and mask: (..., n_q, m), (..., 1, m), or None for all."""
    xp = problem.xp
    visible = None
    if problem.causal:
        rows = xp.arange(problem.n_q, device=device_of(problem.q))
        visible = sample.index[..., None, :] <= rows[:, None]
    if problem.key_mask is not None:
        kept = sample.gather(problem.key_mask[..., None])[..., 0]
        visible = kept[..., None, :] if visible is None else visible & kept[..., None, :]
    return visible


def weighted_sample_attention(
    problem: AttentionProblem, sample: Selection, *, log_weight: Array, visible: Array | None = None
) -> RowNormalised:
    """diag(Â 1)⁻¹ Â for Â_ij = A_ij Σ_r w_r [sample_r = j], with A = exp(logits) and weights w = exp(log_weight)."""
    logits = logits_on_sample(problem, sample, log_weight=log_weight[..., None, :], visible=visible)
    weights, top = exponentials(logits)
    return RowNormalised(Product(Dense(weights, nonnegative=True), sample), row_scale_log=top)


def weighted_sample_attention_cost(problem: AttentionProblem, m: Expr) -> costs.Cost:
    """Cost of :func:`weighted_sample_attention`: exponentials, row sums by one product with ones, and their checks."""
    n_q, _, _, d_v = costs.symbols_of(problem)
    f = costs.formulas
    sums = f.matmul(n_q, m, 1) + costs.Operations(compare=2 * n_q)
    return costs.Cost(
        prepare=logits_on_sample_cost(problem, m, weighted=True) + exponentials_cost(n_q, m) + sums,
        apply=f.matmul(n_q, m, d_v) + costs.Operations(div=n_q * d_v),
    )


# -- draws -------------------------------------------------------------------------------------------------------------


def draw_without_replacement(problem: AttentionProblem, m: int, rng: np.random.Generator) -> Selection:
    """m keys drawn uniformly without replacement, in ascending order.

    Masked keys are drawn last; the first key always belongs to the sample of a causal problem, whose first query sees
    no other. The same sample serves all heads with the same mask.
    """
    xp, q = problem.xp, problem.q
    priority = rng.random(problem.n_k)
    if problem.causal:
        priority[0] = -1.0
    order = xp.asarray(priority, device=device_of(q))
    if problem.key_mask is not None:
        order = xp.where(problem.key_mask, order, xp.asarray(2.0, dtype=order.dtype, device=device_of(q)))
    return Selection(xp.sort(xp.argsort(order, axis=-1)[..., :m], axis=-1), problem.n_k, like=q)


def draw_without_replacement_cost(n: Expr) -> costs.Operations:
    """Cost of :func:`draw_without_replacement`: a number for each key, sorted."""
    return costs.Operations(draw=n) + costs.formulas.merge_sort(n)


def uniform_numbers(rng: np.random.Generator, m: int, *, stratified: bool) -> NDArray[np.float64]:
    """m uniform numbers in [0, 1): independent, or one from each of m intervals of equal length.

    Examples
    --------
    >>> (4 * uniform_numbers(np.random.default_rng(0), 4, stratified=True)).astype(int).tolist()
    [0, 1, 2, 3]
    """
    u = rng.random(m)
    return np.minimum((np.arange(m) + u) / m, np.nextafter(1.0, 0.0)) if stratified else u


def draw_with_replacement(weights: Array, u: Array) -> tuple[Array, Array]:
    """Draws of keys with probabilities proportional to ``weights`` (..., n): where their sums pass ``u``.

    Parameters
    ----------
    weights
        (..., n), not negative, in float64: n increments of a running sum need the digits.
    u
        (m,) uniform numbers in [0, 1); they serve all heads, each with its own weights.

    Returns
    -------
    index, p
        The keys (..., m) and their probabilities. A key of weight zero is never drawn.

    Raises
    ------
    ValueError
        If the weights of a head sum to zero.

    Examples
    --------
    >>> import numpy as np
    >>> draw_with_replacement(np.array([0.0, 1.0, 3.0]), np.array([0.0, 0.2, 0.3, 0.9]))[0].tolist()
    [1, 1, 2, 2]
    """
    xp = namespace(weights)
    running = xp.cumulative_sum(weights, axis=-1)
    total = running[..., -1:]
    if not bool(xp.all(total > 0)):
        raise ValueError("all sampling weights of a head are zero, so no key can be drawn; pass uniform probabilities")
    index = _count_at_most(running / total, u)
    return index, xp.take_along_axis(weights, index, axis=-1) / total


def draw_with_replacement_cost(n: Expr, m: Expr) -> costs.Operations:
    """Cost of :func:`draw_with_replacement`: the running sum, and a binary search for each draw."""
    import sympy  # noqa: PLC0415 - loads only where a cost is asked for

    steps = sympy.floor(sympy.log(n, 2)) + 1
    return costs.Operations(add=n - 1, div=n + m, compare=1 + m * steps)


def _count_at_most(ordered: Array, u: Array) -> Array:
    """How many of the ascending numbers ``ordered`` (..., n) are at most u (m,), by binary search for all heads."""
    xp = namespace(ordered)
    n = int(ordered.shape[-1])
    count = xp.zeros((*ordered.shape[:-1], u.shape[-1]), dtype=xp.int64, device=device_of(ordered))
    for power in reversed(range(n.bit_length())):
        probe = count + 2**power
        inside = probe <= n
        place = xp.where(inside, probe, xp.ones_like(probe)) - 1
        passed = xp.take_along_axis(ordered, place, axis=-1) <= u
        count = xp.where(inside & passed, probe, count)
    return count


def values_of_operator(problem: AttentionProblem) -> Array:
    """Values (..., n_k, c) whose batch axes are those of the attention matrix: other axes become columns.

    Values that differ along an axis that the matrix does not have are so many columns of one right-hand side.
    """
    xp, batch = problem.xp, problem.batch_shape
    v: Any = problem.v
    extra = v.ndim - 2 - len(batch)
    for _ in range(extra):
        v = xp.moveaxis(v, 0, -2)
        v = xp.reshape(v, (*v.shape[:-2], -1))
    for axis, size in enumerate(batch[len(batch) - v.ndim + 2 :]):
        if size < v.shape[axis]:
            v = xp.moveaxis(v, axis, -2)
            v = xp.expand_dims(xp.reshape(v, (*v.shape[:-2], -1)), axis=axis)
    return v


def squared_value_norms(problem: AttentionProblem) -> Array:
    """|v_j|² of each key, (..., n_k); ones where the problem has no values (V = I)."""
    xp = problem.xp
    if problem.v is None:
        return xp.ones((problem.n_k,), dtype=problem.q.dtype, device=device_of(problem.q))
    v = values_of_operator(problem)
    return xp.sum(v * v, axis=-1)


def squared_value_norms_cost(problem: AttentionProblem) -> costs.Operations:
    """Cost of :func:`squared_value_norms` on one head."""
    if problem.v is None:
        return costs.Operations()
    _, n_k, _, d_v = costs.symbols_of(problem)
    return costs.Operations(mul=n_k * d_v) + costs.formulas.sum_of(d_v, times=n_k)
