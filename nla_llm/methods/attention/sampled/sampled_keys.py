"""Importance sampling of keys with replacement: an unbiased kernel from m columns of the exponentials."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from math import log, prod
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, constant, device_of, from_numpy, generator, namespace, to_numpy
from nla_llm.methods.attention.floors import few_columns_floor
from nla_llm.methods.attention.sampled.samples import (
    draw_with_replacement,
    draw_with_replacement_cost,
    exponentials,
    exponentials_cost,
    squared_value_norms,
    squared_value_norms_cost,
    uniform_numbers,
    visible_in_sample,
    weighted_sample_attention,
    weighted_sample_attention_cost,
)
from nla_llm.methods.registry import Properties, one_of, register, require, settle, whole_number
from nla_llm.operators import Selection

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["KDEformer", "SampledKeys"]

_BLOCK_ENTRIES = 1 << 21  # entries of the exact matrix held at once
PROBABILITIES = ("uniform", "value_norms", "key_norms", "optimal")
NO_BETTER = "at a budget far below the number of keys a sample with replacement is no better than one without"


def _promises(supports: frozenset[str], why_not_causal: str = "") -> Properties:
    """Independent draws do not converge in the sense of the suite: m^(−1/2) reaches no small error."""
    return Properties(
        family="sampled keys", budget="m", unbiased=True, nonnegative=True, deterministic=False,
        permutation_equivariant=False, supports=supports,
        refusals={"causal": why_not_causal} if why_not_causal else {},
    )  # fmt: skip


def _stratified(promised: Properties) -> Properties:
    """Counts of stratified draws deviate by less than two from their means, so the error falls as 1/m."""
    return replace(promised, converges=True, exceptions={"beats_random_keys": NO_BETTER})


@register("sampled_keys")
@final
@dataclass(frozen=True)
class SampledKeys:
    """m keys drawn independently with probabilities p, Â_ij = A_ij c_j/(m p_j) where key j was drawn c_j times.

    Approximate matrix multiplication (Drineas, Kannan and Mahoney 2006, SIAM J. Comput. 36, algorithm BasicMatrix-
    Multiplication) of A = exp(logits) with the right-hand side; the rows of Â are then divided by their sums. Unbiased,
    E Â = A, where every p_j is positive; relative variance (1/p_j − 1)/m; the error falls as m^(−1/2), so slowly that
    ``converges`` is not declared; m may exceed the number of keys.

    Parameters
    ----------
    m
        Draws.
    probabilities
        - 'uniform': p_j = 1/n over the keys that are not masked.
        - 'value_norms': p_j ∝ |v_j|, as in sampling rules that look at the values only; 1/n without values, where the
          right-hand side is the identity. A key of value zero is never drawn, so it is missing from the row sums.
        - 'key_norms': p_j ∝ |k_j|; the same holds of a key that is zero.
        - 'optimal': p_j ∝ |P_:j| |v_j| with the exact columns of P = softmax(logits), which minimises the mean square
          error of P V before normalisation. An oracle: it costs n² d (streamed by rows), as much as what it replaces.

    stratified
        Draw one key from each of m strata of equal probability, in the order of the keys, instead of independently:
        still unbiased, never of larger variance, and the error falls as 1/m once m exceeds the number of keys.

    In the causal form (uniform probabilities) the first key is always present with weight one, since the first query
    sees no other, and m − 1 draws stand for the others; they do not look at masks, which only hide what was drawn.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.zeros((4, 1))
    >>> P = SampledKeys(64)(AttentionProblem(q, q), rng=0)
    >>> bool(abs(P.dense() - 1 / 4).max() < 0.2), float(P.dense().sum())
    (True, 4.0)
    """

    m: int
    _: KW_ONLY
    probabilities: str = "uniform"
    stratified: bool = False
    properties: ClassVar[Properties] = _promises(frozenset({"causal", "key_mask"}))

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        one_of("probabilities", self.probabilities, PROBABILITIES)
        promised = type(self).properties
        if self.probabilities != "uniform":
            reason = f"probabilities={self.probabilities!r} depend on keys and values that earlier queries may not see"
            promised = _promises(frozenset({"key_mask"}), reason)
        object.__setattr__(self, "properties", _stratified(promised) if self.stratified else promised)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of rank at most m; the same uniform numbers serve all heads."""
        require(self, problem)
        rng, q = generator(rng), problem.q
        if problem.causal:
            return self._causal(problem, uniform_numbers(rng, self.m - 1, stratified=self.stratified))
        u = uniform_numbers(rng, self.m, stratified=self.stratified)
        index, p = draw_with_replacement(self._weights(problem), from_numpy(u, like=q))
        xp = problem.xp
        log_weight = xp.astype(-xp.log(self.m * p), q.dtype)
        return weighted_sample_attention(problem, Selection(index, problem.n_k, like=q), log_weight=log_weight)

    def _causal(self, problem: AttentionProblem, u: NDArray[np.float64]) -> Operator:
        """Key 0 with weight one, then draws from all keys, of which those of key 0 do not count again."""
        n, q = problem.n_k, problem.q
        if self.m == 1 and n > 1:
            raise ValueError("m must be at least 2 where the problem is causal: the first key is always in the sample")
        position = (u * n).astype(np.int64)
        log_weight = np.where(position == 0, -np.inf, log(n / max(self.m - 1, 1)))
        position, log_weight = (np.concatenate([[0], a]) for a in (position, log_weight))
        sample = Selection(from_numpy(position, like=q), n, like=q)
        return weighted_sample_attention(
            problem, sample, log_weight=from_numpy(log_weight, like=q, dtype=q.dtype),
            visible=visible_in_sample(problem, sample),
        )  # fmt: skip

    def _weights(self, problem: AttentionProblem) -> Array:
        """Sampling weights of the keys in float64, (..., n_k), zero for masked ones."""
        xp = problem.xp
        if self.probabilities == "uniform":
            weights = xp.ones((problem.n_k,), dtype=xp.float64, device=device_of(problem.q))
        elif self.probabilities == "key_norms":
            weights = xp.linalg.vector_norm(problem.k, axis=-1)
        else:
            weights = xp.sqrt(squared_value_norms(problem))
        if self.probabilities == "optimal":
            weights = weights * xp.sqrt(_squared_column_norms(problem))
        return _visible_only(problem, xp.astype(weights, xp.float64))

    def theory(self, problem: AttentionProblem) -> Theory:
        """Mean and variance of the entries of Â before the division by row sums, in closed form."""
        from nla_llm.theory.sampling import sampled_columns_theory  # noqa: PLC0415 - loaded only where it is used

        fine = problem.map(to_numpy).map(_float64)
        shape = fine.exact().shape
        if problem.causal:
            p = np.full(problem.n_k, 1 / problem.n_k)
            return sampled_columns_theory(p, max(self.m - 1, 1), shape, always=(0,), stratified=self.stratified)
        weights = self._weights(fine)
        return sampled_columns_theory(
            weights / weights.sum(axis=-1, keepdims=True), self.m, shape, stratified=self.stratified
        )

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Weights of the keys, their running sum and the search for the draws; then attention on a sample of m keys."""
        n_k, m = costs.symbols_of(problem).n_k, costs.m
        drawing = costs.Operations(draw=m - 1 if problem.causal else m)
        if not problem.causal:
            drawing += self._weights_cost(problem) + draw_with_replacement_cost(n_k, m) + costs.Operations(mul=m, exp=m)
        return costs.Cost(prepare=drawing) + weighted_sample_attention_cost(problem, m)

    def _weights_cost(self, problem: AttentionProblem) -> costs.Operations:
        _, n_k, d, _ = costs.symbols_of(problem)
        if self.probabilities == "uniform":
            return costs.Operations()
        if self.probabilities == "key_norms":
            return costs.Operations(madd=n_k * d, sqrt=n_k)
        values = squared_value_norms_cost(problem) + costs.Operations(sqrt=n_k)
        if self.probabilities == "value_norms":
            return values
        return values + _squared_column_norms_cost(problem) + costs.Operations(sqrt=n_k, mul=n_k)


@register("kdeformer")
@final
@dataclass(frozen=True)
class KDEformer:
    """Importance sampling of keys by estimated column norms of the softmax matrix and exact norms of the values.

    Zandieh, Han, Daliri and Karbasi 2023, arXiv 2302.02451, as we read it, without its fast density estimate; it is not
    a rerun of their program. What is implemented: p_j = ½ (β_j/Σβ + |v_j|²/‖V‖_F²),
    where β_j estimates the squared column norm |P_:j|² of P = softmax(logits). Its guarantee needs p to dominate both
    terms up to a constant, which equal parts do without spectral norms. The kernel density estimate β is the plain one,
    from ``queries`` rows of P at queries drawn uniformly with replacement, β_j = Σ_r P_rj² (a common factor cancels);
    one sample then serves numerators and denominators, and no part is computed exactly. The paper estimates densities
    by locality-sensitive hashing, and its code takes sorted buckets exactly, as
    :class:`~nla_llm.methods.attention.sampled.hyper.HyperAttention` does here, and samples the rest by value norms.

    Unbiased, E Â = A, where every p_j is positive; without values V = I and p_j ≥ 1/(2n), so the relative variance is
    below 2n/m. The guarantee has unnamed constants, so no bound can be drawn from it, and the variance has no closed
    form since p is itself estimated.

    Parameters
    ----------
    m
        Keys drawn, with replacement: it may exceed the number of keys.
    queries
        Rows of P from which column norms are estimated.
    stratified
        As in :class:`SampledKeys`.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> k = np.array([[8.0], [0.0], [0.0], [0.0]])
    >>> P = KDEformer(16)(AttentionProblem(np.ones((4, 1)), k), rng=0)
    >>> bool(P.dense()[0, 0] > 0.99)
    True
    """

    m: int
    _: KW_ONLY
    queries: int = 128
    stratified: bool = False
    properties: ClassVar[Properties] = _promises(
        frozenset({"key_mask"}), "the sampling probabilities look at all keys and values, later ones included"
    )

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        whole_number("queries", self.queries)
        if self.stratified:
            object.__setattr__(self, "properties", _stratified(type(self).properties))

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of rank at most m; the same random numbers serve all heads."""
        require(self, problem)
        rng, q, xp = generator(rng), problem.q, problem.xp
        rows = from_numpy(rng.integers(problem.n_q, size=self.queries), like=q)
        u = from_numpy(uniform_numbers(rng, self.m, stratified=self.stratified), like=q)
        index, p = draw_with_replacement(self._weights(problem, rows), u)
        log_weight = xp.astype(-xp.log(self.m * p), q.dtype)
        return weighted_sample_attention(problem, Selection(index, problem.n_k, like=q), log_weight=log_weight)

    @staticmethod
    def _weights(problem: AttentionProblem, rows: Array) -> Array:
        """2 p_j from the softmax of some queries and the norms of the values, in float64, zero for masked keys."""
        xp = problem.xp
        some = problem.scale * xp.take(problem.q, rows, axis=-2)
        logits = some @ xp.matrix_transpose(problem.k)
        if problem.key_mask is not None:
            hidden = constant(-xp.inf, like=logits)
            logits = xp.where(problem.key_mask[..., None, :], logits, hidden)
        softmax, _ = exponentials(logits)
        softmax /= xp.sum(softmax, axis=-1, keepdims=True)
        columns = _visible_only(problem, xp.astype(xp.sum(softmax * softmax, axis=-2), xp.float64))
        values = _visible_only(problem, xp.astype(squared_value_norms(problem), xp.float64))
        total = xp.sum(values, axis=-1, keepdims=True)
        if not bool(xp.all(total > 0)):
            raise ValueError("all values of a head are zero, so they cannot tell which keys matter")
        return columns / xp.sum(columns, axis=-1, keepdims=True) + values / total

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of weights on m keys alone."""
        return few_columns_floor(problem, self.m)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Rows of the softmax matrix, probabilities, the search for the draws; then attention on a sample of m keys."""
        import sympy  # noqa: PLC0415 - loads only where a cost is asked for

        _, n_k, d, _ = costs.symbols_of(problem)
        m, s = costs.m, sympy.Symbol("queries")
        f, o = costs.formulas, costs.Operations
        softmax = o(mul=s * d) + f.matmul(s, d, n_k) + exponentials_cost(s, n_k) + f.sum_of(n_k, times=s)
        softmax += o(div=s * n_k, mul=s * n_k) + f.sum_of(s, times=n_k)
        p = squared_value_norms_cost(problem) + 2 * f.sum_of(n_k) + o(div=2 * n_k, add=n_k, compare=1)
        drawing = o(draw=m + s, mul=m, exp=m) + draw_with_replacement_cost(n_k, m)
        return costs.Cost(prepare=softmax + p + drawing) + weighted_sample_attention_cost(problem, m)


# -- helpers -----------------------------------------------------------------------------------------------------------


def _squared_column_norms(problem: AttentionProblem) -> Array:
    """|P_:j|² of the exact softmax matrix, (..., n_k), by blocks of rows."""
    xp = problem.xp
    exact = problem.exact(problem.q.dtype)
    heads = prod(exact.batch_shape)
    block = max(1, _BLOCK_ENTRIES // (problem.n_k * heads))
    total = None
    for start in range(0, problem.n_q, block):
        rows = exact.rows(start, min(start + block, problem.n_q))
        part = xp.sum(rows * rows, axis=-2)
        total = part if total is None else total + part
    return _visible_only(problem, total)


def _squared_column_norms_cost(problem: AttentionProblem) -> costs.Operations:
    """Cost of :func:`_squared_column_norms`: the matrix, its squares, and their sums over the rows."""
    n_q, *_ = costs.symbols_of(problem)
    pairs = costs.symbols.visible_pairs(problem)
    squares = costs.Operations(div=pairs, mul=pairs, add=pairs - pairs / n_q)
    return costs.formulas.softmax_weights(problem) + squares


def _visible_only(problem: AttentionProblem, weights: Array) -> Array:
    """``weights`` with zeros for masked keys."""
    if problem.key_mask is None:
        return weights
    xp = namespace(weights)
    return xp.where(problem.key_mask, weights, constant(0.0, like=weights))


def _float64(a: NDArray[np.generic]) -> NDArray[np.generic]:
    return a.astype(np.float64) if a.dtype.kind == "f" else a
