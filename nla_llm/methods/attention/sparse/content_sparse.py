"""Sparse attention with a pattern that is found from the data: the largest entries of each row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, constant, is_numpy, matmul_where, parallel
from nla_llm.methods.attention.sparse.patterns import restriction_promise
from nla_llm.methods.attention.sparse.tiles import enough_keys
from nla_llm.methods.registry import Properties, register, require, settle, whole_number
from nla_llm.operators import Panel, RowNormalised, TiledSparse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators import Operator, SoftmaxAttention
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

    Matrix = NDArray[Any]

__all__ = ["TopK"]

_BLOCK_ENTRIES = 1 << 20  # logits held at once by each thread


@register("top_k")
@final
@dataclass(frozen=True)
class TopK:
    """Softmax over the m keys with the largest logits of each query: the best pattern of m keys a query.

    Gupta et al. 2021 (arXiv 2106.06899). An oracle in content: it looks at all logits, a block of rows at a time, so it
    takes O(n² d) operations and O(n m) memory, and its worth is as a floor of what any pattern of m keys can do: in
    total variation the error of a row is the mass that is left out, and no other m keys leave out less. In the causal
    form the keys are the largest of those that a query sees.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q, k = np.array([[1.0], [-1.0]]), np.array([[0.0], [5.0], [6.0]])
    >>> TopK(2)(AttentionProblem(q, k)).dense().round(3).tolist()
    [[0.0, 0.269, 0.731], [0.993, 0.007, 0.0]]
    """

    m: int
    properties: ClassVar[Properties] = Properties(
        family="content", budget="m", converges=True, nonnegative=True, shift_invariant=True,
        supports=frozenset({"causal", "window", "key_mask", "bias"}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of class RowNormalised over tiles of one row."""
        require(self, problem)
        enough_keys(self.m, problem)
        exact: Any = problem.exact(problem.q.dtype)
        find = _numpy_largest if is_numpy(problem.q) else _largest
        weights, keys, top = find(exact, self.m)
        op = TiledSparse([Panel(weights[..., None, :], keys)], exact.shape, nonnegative=True)
        return RowNormalised(op, row_scale_log=top)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Error in the Frobenius norm from the mass that each row keeps, exactly."""
        return restriction_promise(self, problem)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """All logits and their sorting, row by row; then softmax and a product over the keys that are kept."""
        n_q, n_k, d, d_v = costs.symbols_of(problem)
        f, kept = costs.formulas, self._kept_pairs(problem)
        seen = costs.symbols.structural_pairs(problem)
        logits = costs.Operations(mul=n_q * d, madd=seen * d, add=0 if problem.bias is None else seen)
        softmax = costs.Operations(compare=kept - n_q, add=kept, exp=kept)
        sums = costs.Operations(add=kept - n_q, compare=2 * n_q)
        sorting: costs.Operations = n_q * f.merge_sort(n_k)
        apply = costs.Operations(madd=kept * d_v, div=n_q * d_v)
        return costs.Cost(prepare=logits + sorting + softmax + sums, apply=apply)

    @staticmethod
    def _kept_pairs(problem: AttentionProblem) -> Any:
        """Sum over the queries of m, or of the keys that causality and window leave where these are fewer."""
        from sympy import Max, Min  # noqa: PLC0415 - SymPy loads with the first formula

        n, m, w = costs.symbols_of(problem).n_q, costs.m, costs.symbols.w
        if problem.causal:
            m = m if problem.window is None else Min(m, w)
            return n * m - m * (m - 1) / 2
        if problem.window is None:
            return n * m
        short = Max(0, Min(m, 2 * w - 1) - w)  # queries at either end that see fewer than the others
        return n * Min(m, 2 * w - 1) - short * (short + 1)


def _largest(exact: SoftmaxAttention, m: int) -> tuple[Array, Array, Array]:
    """exp(logits − largest) of the m largest, (..., n_q, m), their keys, and the largest logits (..., n_q)."""
    xp, (n_q, n_k) = exact.xp, exact.shape[-2:]
    heads = int(np.prod(exact.batch_shape, dtype=int))
    step = max(1, _BLOCK_ENTRIES // (n_k * heads))
    parts = []
    for start in range(0, n_q, step):
        logits = _logits(exact, start, min(start + step, n_q))
        keys = _visible_first(xp.argsort(-logits, axis=-1), exact, start)[..., :m]
        picked = xp.take_along_axis(logits, keys, axis=-1)
        top = xp.max(picked, axis=-1)
        parts.append((xp.exp(picked - top[..., None]), keys, top))
    weights, keys, top = zip(*parts, strict=True)
    return xp.concat(weights, axis=-2), xp.concat(keys, axis=-2), xp.concat(top, axis=-1)


def _visible_first(order: Array, exact: SoftmaxAttention, start: int) -> Array:
    """The order of keys (..., rows, n_k) with those last that causality or window hides.

    Otherwise one of them might be kept in place of a key whose logit is −∞ for another reason, and the number of keys
    that are kept would depend on the data.
    """
    xp, (rows, n_k) = exact.xp, order.shape[-2:]
    keep = exact.structure(start, start + rows, 0, n_k)
    if keep is None or (exact.key_mask is None and exact.bias is None):
        return order
    hidden = xp.astype(~xp.broadcast_to(keep, order.shape), xp.int8)
    behind = xp.argsort(xp.take_along_axis(hidden, order, axis=-1), axis=-1, stable=True)
    return xp.take_along_axis(order, behind, axis=-1)


def _logits(exact: SoftmaxAttention, start: int, stop: int) -> Array:
    """Logits of some rows on all keys, −∞ where causality, window, mask or bias hide one."""
    xp = exact.xp
    q, k = exact.scale * exact.q[..., start:stop, :], xp.matrix_transpose(exact.k)
    keep = exact.structure(start, stop, 0, exact.shape[-1])
    logits = q @ k if keep is None else matmul_where(q, k, keep, -xp.inf)
    if exact.bias is not None:
        logits = logits + exact.bias[..., start:stop, :]
    if exact.key_mask is not None:
        visible = exact.key_mask[..., None, :]
        # what the structure hides was not computed, what the mask hides is thrown away
        visible = visible if keep is None else visible | ~keep
        logits = xp.where(visible, logits, constant(-xp.inf, like=logits))
    return logits


def _numpy_largest(exact: SoftmaxAttention, m: int) -> tuple[Matrix, Matrix, Matrix]:
    """The NumPy path of :func:`_largest`: threads over blocks of rows, selection in place of sorting."""
    batch, (n_q, n_k) = exact.batch_shape, exact.shape[-2:]
    weights, keys = np.zeros((*batch, n_q, m), exact.dtype), np.zeros((*batch, n_q, m), np.int32)
    top = np.empty((*batch, n_q), exact.dtype)
    q, k = (np.broadcast_to(a, (*batch, *a.shape[-2:])) for a in (exact.q, exact.k))
    mask = None if exact.key_mask is None else np.broadcast_to(exact.key_mask, (*batch, n_k))
    bias = None if exact.bias is None else np.broadcast_to(exact.bias, (*batch, n_q, n_k))
    step = max(1, _BLOCK_ENTRIES // n_k)

    def block(task: tuple[tuple[int, ...], int]) -> None:
        index, start = task
        rows = slice(start, min(start + step, n_q))
        first, last = exact.visible_keys(rows.start, rows.stop)
        logits = (exact.scale * q[index][rows]) @ k[index][first:last].T
        if bias is not None:
            logits += bias[index][rows, first:last]
        keep = exact.structure(rows.start, rows.stop, first, last)
        if keep is not None:
            np.copyto(logits, -np.inf, where=~keep)
        if mask is not None:
            logits[:, ~mask[index][first:last]] = -np.inf
        count = min(m, last - first)
        chosen = np.argpartition(logits, last - first - count, axis=-1)[:, last - first - count :]
        picked = np.take_along_axis(logits, chosen, axis=-1)
        top[index][rows] = picked.max(axis=-1)
        keys[index][rows, :count] = first + chosen
        weights[index][rows, :count] = np.exp(picked - top[index][rows, None])

    parallel(block, [(index, s) for s in reversed(range(0, n_q, step)) for index in np.ndindex(batch)])
    return weights, keys, top
