"""Kernel attention: softmax replaced by φ(q)·φ(k), normalised by rows, in time linear in n.

The normalisation makes any common factor of a row irrelevant, and the sum over features lets a factor of feature r
move between queries and keys. Both keep exponentials in range without an epsilon: key features are scaled by their
largest value *per feature*, the inverse goes to the query side, and query rows are then scaled by their largest entry.
In the causal form the scale of the keys may only know the past, so it runs along the chunks and the state is rescaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from nla_llm import costs
from nla_llm.backend import Array, by_heads, device_of, namespace
from nla_llm.methods.registry import Properties, register, require
from nla_llm.operators import CausalLowRank, LowRank, RowNormalised

if TYPE_CHECKING:
    import numpy as np

    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem

__all__ = ["CHUNK", "EluFeatures", "Features", "ReluFeatures", "kernel_attention", "kernel_attention_cost"]

CHUNK = 64  # rows of a causal chunk: near the feature counts in use, where state and triangle cost the same


@dataclass(frozen=True, eq=False)
class Features:
    """Features φ = amplitude · exp(log): their logarithmic scale is carried apart so that it can be moved.

    Attributes
    ----------
    amplitude
        (..., n, m), or None for ones.
    log
        (..., n, m) or (..., n, 1), or None for zeros.
    """

    amplitude: Array | None = None
    log: Array | None = None

    def hide(self, mask: Array | None) -> Features:
        """The same with the rows of hidden tokens zero."""
        if mask is None:
            return self
        xp = namespace(mask)
        keep = mask[..., None]

        def blank(a: Array | None, fill: float) -> Array | None:
            return None if a is None else xp.where(keep, a, xp.asarray(fill, dtype=a.dtype, device=device_of(a)))

        return Features(blank(self.amplitude, 0.0), blank(self.log, -xp.inf))

    def values(self, log: Array | None) -> Array:
        """amplitude · exp(log) for another logarithmic scale."""
        if log is None:
            return self.amplitude
        scale = namespace(log).exp(log)
        return scale if self.amplitude is None else self.amplitude * scale


def kernel_attention(
    problem: AttentionProblem,
    queries: Features,
    keys: Features,
    *,
    log_factor: float = 0.0,
    nonnegative: bool = False,
    chunk: int = CHUNK,
) -> RowNormalised:
    """diag(Â 1)⁻¹ Â for Â = exp(log_factor) φ(q) φ(k)ᵀ, its lower triangle where the problem is causal.

    Masked keys are removed from numerator and denominator alike.
    """
    keys = keys.hide(problem.key_mask)
    if problem.causal:
        return _causal(queries, keys, log_factor=log_factor, nonnegative=nonnegative, chunk=chunk)
    row_scale = None
    log_q, log_k = queries.log, keys.log
    if log_q is not None:
        xp = namespace(log_q)
        top = xp.max(log_k, axis=-2, keepdims=True)
        log_k, log_q = log_k - top, log_q + top
        row_scale = xp.max(log_q, axis=-1, keepdims=True)
        log_q = log_q - row_scale
        row_scale = row_scale[..., 0] + log_factor
    op = LowRank(queries.values(log_q), keys.values(log_k), nonnegative=nonnegative)
    return RowNormalised(op, row_scale_log=row_scale)


def _causal(queries: Features, keys: Features, *, log_factor: float, nonnegative: bool, chunk: int) -> RowNormalised:
    if keys.log is None:
        op = CausalLowRank(queries.values(None), keys.values(None), chunk=chunk, nonnegative=nonnegative)
        return RowNormalised(op)
    log_q, log_k, decay, chunk = _running_scale(queries.log, keys.log, chunk)
    xp = namespace(log_q)
    row_scale = xp.max(log_q, axis=-1, keepdims=True)
    left, right = queries.values(log_q - row_scale), keys.values(log_k)
    op = CausalLowRank(left, right, decay=decay, chunk=chunk, nonnegative=nonnegative)
    return RowNormalised(op, row_scale_log=row_scale[..., 0] + log_factor)


def _running_scale(log_q: Array, log_k: Array, chunk: int) -> tuple[Array, Array, Array, int]:
    """Move the running maximum of the keys' log-features, chunk by chunk, to the queries.

    Returns the moved logs, the decay of the state on entering each chunk, and the chunk size. A row at the start of a
    chunk is scaled by a maximum that includes the later keys of its own chunk; where that maximum has grown by more
    than the exponent range allows, chunks are halved (a chunk of one row knows no later key).
    """
    xp = namespace(log_k)
    allowed = 0.45 * float(xp.log(xp.asarray(xp.finfo(log_k.dtype).max)))  # both factors stay normal numbers
    n = log_k.shape[-2]
    top = log_k[..., :1, :]
    moved_q, moved_k, decay = [], [], []
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)  # the standard leaves a slice beyond the end undefined
        block = log_k[..., start:stop, :]
        at_first_row = xp.maximum(top, block[..., :1, :])
        new_top = xp.maximum(top, xp.max(block, axis=-2, keepdims=True))
        if chunk > 1 and bool(xp.any(new_top - at_first_row > allowed)):
            return _running_scale(log_q, log_k, chunk // 2)
        moved_k.append(block - new_top)
        moved_q.append(log_q[..., start:stop, :] + new_top)
        decay.append(xp.exp(top - new_top))
        top = new_top
    return xp.concat(moved_q, axis=-2), xp.concat(moved_k, axis=-2), xp.concat(decay, axis=-2), chunk


def kernel_attention_cost(
    problem: AttentionProblem, features: Any, *, log_width: Any = None, amplitude: bool = False
) -> costs.Cost:
    """Cost of :func:`kernel_attention` with ``features`` features, whose logs have ``log_width`` columns.

    Holds where no chunk has to be halved; a causal run that halves them does more.
    """
    n_q, n_k, _, d_v = costs.symbols_of(problem)
    op: costs.formulas.LowRankShape | costs.formulas.CausalLowRankShape
    if problem.causal:
        op = costs.formulas.CausalLowRankShape(n_q, features, costs.c, decay=log_width is not None)
        scaling = _running_scale_cost(n_q, op.chunks, log_width)
    else:
        op = costs.formulas.LowRankShape(n_q, n_k, features)
        scaling = _scale_cost(n_q, n_k, log_width)
    normalised = costs.formulas.row_normalised(op, n_q, d_v)
    if log_width is None:
        return normalised
    row_scale = costs.formulas.maximum_of(log_width, times=n_q) + costs.Operations(add=n_q * log_width + n_q)
    values = costs.Operations(exp=log_width, mul=features if amplitude else 0) * (n_q + n_k)
    return costs.Cost(prepare=scaling + row_scale + values) + normalised


def _scale_cost(n_q: Any, n_k: Any, width: Any) -> costs.Operations:
    """The largest log of each feature, moved from the keys to the queries."""
    if width is None:
        return costs.Operations()
    return costs.formulas.maximum_of(n_k, times=width) + costs.Operations(add=(n_q + n_k) * width)


def _running_scale_cost(n: Any, chunks: Any, width: Any) -> costs.Operations:
    """Cost of :func:`_running_scale`: per chunk its maximum, the new scale, its test and its decay."""
    if width is None:
        return costs.Operations()
    per_chunk = costs.Operations(compare=3 * width, add=2 * width, exp=width)
    moved = costs.Operations(compare=(n - chunks) * width, add=2 * n * width)
    in_chunks: costs.Operations = per_chunk * chunks
    return in_chunks + moved + costs.Operations(exp=1)  # the exponent range is one logarithm


@register("elu_features")
@final
@dataclass(frozen=True)
class EluFeatures:
    """Linear attention with φ(x) = elu(x) + 1, entry by entry (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7).

    Replaces softmax by another kernel: it does not converge to it. As published, the scale of the logits is not used.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.eye(3)
    >>> EluFeatures()(AttentionProblem(q, q)).row_sums().tolist()
    [1.0, 1.0, 1.0]
    """

    properties: ClassVar[Properties] = Properties(
        family="elu", target="elu kernel", nonnegative=True, supports=frozenset({"causal", "key_mask"})
    )
    chunk: ClassVar[int] = CHUNK

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of linear attention."""
        require(self, problem)
        queries, keys = (Features(by_heads(_elu_plus_one, x)) for x in (problem.q, problem.k))
        return kernel_attention(problem, queries, keys, nonnegative=True)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Features by two comparisons, an exponential and an addition an entry; then a kernel of d features."""
        n_q, n_k, d, _ = costs.symbols_of(problem)
        features = (n_q + n_k) * d * costs.Operations(compare=2, exp=1, add=1)
        return costs.Cost(prepare=features) + kernel_attention_cost(problem, d)


@register("relu_features")
@final
@dataclass(frozen=True)
class ReluFeatures:
    """Linear attention with φ(x) = max(x, 0) (the generalised attention of Choromanski et al. 2021, arXiv 2009.14794).

    A query that shares no positive coordinate with any visible key has no weights; such data are refused with
    :class:`~nla_llm.operators.ZeroRowSumError` rather than patched with an epsilon.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.array([[1.0, 1.0], [0.0, 2.0]])
    >>> ReluFeatures()(AttentionProblem(q, q)).dense().tolist()
    [[0.5, 0.5], [0.3333333333333333, 0.6666666666666666]]
    """

    properties: ClassVar[Properties] = Properties(
        family="relu", target="relu kernel", nonnegative=True, partial=True, supports=frozenset({"causal", "key_mask"})
    )
    chunk: ClassVar[int] = CHUNK

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of linear attention."""
        require(self, problem)
        queries, keys = (Features(by_heads(_relu, x)) for x in (problem.q, problem.k))
        return kernel_attention(problem, queries, keys, nonnegative=True)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Features by one comparison an entry; then a kernel of d features."""
        n_q, n_k, d, _ = costs.symbols_of(problem)
        return costs.Cost(prepare=costs.Operations(compare=(n_q + n_k) * d)) + kernel_attention_cost(problem, d)


def _elu_plus_one(x: Array) -> Array:
    """1 + x for x > 0 and exp(x) otherwise; the exponential only ever sees the negative part."""
    xp = namespace(x)
    features = xp.exp(xp.minimum(x, _zero(x)))
    features += xp.maximum(x, _zero(x))
    return features


def _relu(x: Array) -> Array:
    return namespace(x).maximum(x, _zero(x))


def _zero(x: Array) -> Array:
    return namespace(x).zeros((), dtype=x.dtype, device=device_of(x))
