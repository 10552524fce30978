"""CUR factorisations of attention: some keys, some queries, and a small core between their columns and rows."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

from nla_llm import costs
from nla_llm.backend import Array, by_heads, device_of, generator, namespace
from nla_llm.methods.attention.floors import rank_floor
from nla_llm.methods.attention.landmarks.leverage import hidden_last, leverage, ridge_leverage, ring, sample_cost
from nla_llm.methods.attention.landmarks.nystrom import ILL_CONDITIONED
from nla_llm.methods.registry import Properties, one_of, positive, register, require, settle, whole_number
from nla_llm.operators import Dense, Operator, RowNormalised, Selection, Skeleton, SoftmaxAttention

if TYPE_CHECKING:
    import numpy as np

    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["CURAttention"]

CORES = ("ridge", "pinv", "optimal")
SAMPLINGS = ("uniform", "leverage", "ridge_leverage")
_SINGULAR = {**ILL_CONDITIONED, "row_sums": "the sums of rows that nearly cancel lose digits"}


@register("cur_attention")
@final
@dataclass(frozen=True)
class CURAttention:
    """Kernel exp(logits) ≈ C U R from m sampled keys (C), m sampled queries (R) and U ≈ W⁺, then division by row sums.

    W is the intersection of C and R. Rows of C are scaled by their largest entry, rows of R and W by that of R.
    Samples are drawn without replacement with probabilities proportional to scores, from one exponential clock for each
    place, the same in all heads.

    Mahoney and Drineas 2009 (CUR by leverage scores); Musco and Musco 2017, arXiv 1605.07583 (ridge leverage scores
    from sampled landmarks). The operator is a :class:`~nla_llm.operators.Skeleton` divided by its row sums; its ``op``
    tells ``core_condition``, κ₂(W). Entries and even row sums may be negative.

    Parameters
    ----------
    m
        Number of keys and of queries.
    sampling
        'uniform': no scores. 'leverage': x_iᵀ(XᵀX)⁺x_i of the centred queries, and of the centred keys, O(n d²).
        'ridge_leverage': of the Gaussian kernel of the queries, and of the keys, [G(G + I/10)⁻¹]_ii estimated from m
        uniform landmarks, O(n m (d + m)); the factor that λ = 1/10 would put before them cancels.
    core
        'ridge': (WᵀW + λI)⁻¹Wᵀ with λ = ridge ‖W‖₁ ‖W‖_∞; what λ hides stays hidden as m grows. 'pinv': the
        pseudo-inverse in float64, whose large entries multiply what C and R cannot represent: errors of 10 to 100
        times the matrix are usual. 'optimal': columns and rows of softmax attention P itself with U = C⁺ P R⁺, which
        needs all entries of P, O(n_q n_k (d + m)), and no division: what the chosen keys and queries could give.
    ridge
        See ``core``. The default is empirical: smaller ones are better on isotropic data and worse on sharp heads.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.linspace(0, 1, 20)[:, None]
    >>> problem = AttentionProblem(q, q)
    >>> bool(abs(CURAttention(4, core="pinv")(problem, rng=0).dense() - problem.exact().dense()).max() < 1e-3)
    True
    """

    m: int
    _: KW_ONLY
    sampling: str = "leverage"
    core: str = "ridge"
    ridge: float = 1e-2
    properties: ClassVar[Properties] = Properties(
        family="columns", budget="m", deterministic=False, shift_invariant=True, partial=True,
        permutation_equivariant=False, supports=frozenset({"key_mask"}),
        refusals={"causal": "a sampled query sees a row of keys that earlier queries may not see"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        for name, value, known in (("sampling", self.sampling, SAMPLINGS), ("core", self.core, CORES)):
            one_of(name, value, known)
        positive("ridge", self.ridge)
        promised = {
            "ridge": {},
            "pinv": {"converges": True, "shift_invariant": False, "exceptions": _SINGULAR},
            "optimal": {"converges": True, "row_stochastic": False, "partial": False},
        }[self.core]
        object.__setattr__(self, "properties", replace(type(self).properties, **promised))  # type: ignore[arg-type]

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of rank m, normalised by rows but for the optimal core; C and R are held, n × m each."""
        require(self, problem)
        _enough_on_both_sides(self.m, problem)
        xp, draws = problem.xp, generator(rng)
        x, y = problem.scaled_inputs()
        some_queries = self._sample(x, None, draws)
        some_keys = self._sample(y, problem.key_mask, draws)
        if self.core == "optimal":
            return _optimal(problem, some_queries, some_keys)
        rows, columns = some_queries.gather(x), some_keys.gather(y)
        left, row_scale = _below_maximum(x @ xp.matrix_transpose(columns))
        log_right = rows @ xp.matrix_transpose(y)
        if problem.key_mask is not None:
            log_right = xp.where(problem.key_mask[..., None, :], log_right, xp.full_like(log_right, -xp.inf))
        right, top = _below_maximum(log_right)
        inner = xp.exp(rows @ xp.matrix_transpose(columns) - top)
        op = Skeleton(Dense(left), self._inverse(inner), Dense(right), intersection=inner)
        return RowNormalised(op, row_scale_log=row_scale[..., 0])

    def _inverse(self, inner: Array) -> Array:
        from nla_llm.linalg.inverses import (  # noqa: PLC0415 - floor 1, loaded only where it is used
            norm_product,
            pseudo_inverse,
            ridge_inverse,
        )

        xp = namespace(inner)
        wide = xp.astype(inner, xp.float64, copy=False)
        inverse = pseudo_inverse(wide) if self.core == "pinv" else ridge_inverse(wide, self.ridge * norm_product(wide))
        return xp.astype(inverse, inner.dtype, copy=False)

    def _sample(self, x: Array, mask: Array | None, rng: np.random.Generator) -> Selection:
        """m places with probabilities proportional to the scores: those whose exponential clocks ring first."""
        xp, n = namespace(x), x.shape[-2]
        clock = xp.asarray(rng.standard_exponential(n), device=device_of(x))
        if self.sampling == "ridge_leverage":
            landmarks = xp.argsort(hidden_last(xp.asarray(rng.random(n), device=device_of(x)), mask), axis=-1)
            chosen = Selection(landmarks[..., : self.m], n, like=x).gather(x)
            clock = ring(clock, by_heads(ridge_leverage, x, chosen))
        elif self.sampling == "leverage":
            clock = ring(clock, leverage(x, mask))
        order = xp.argsort(hidden_last(clock, mask), axis=-1)[..., : self.m]
        return Selection(xp.sort(order, axis=-1), n, like=x)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of its rank, m: whatever the method puts into it."""
        return rank_floor(problem, self.m)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Two samples, C, R and W, the inverse; then a product of rank m."""
        n_q, n_k, d, d_v = costs.symbols_of(problem)
        m, f, count = costs.m, costs.formulas, costs.Operations
        samples = count(mul=(n_q + n_k) * d) + sample_cost(self.sampling, n_q, d, masked=False)
        samples += sample_cost(self.sampling, n_k, d, masked=problem.key_mask is not None)
        if self.core == "optimal":
            return costs.Cost(prepare=samples) + _optimal_cost(problem)
        factors = f.matmul(n_q + n_k + m, d, m) + f.maximum_of(m, times=n_q) + f.maximum_of(n_k, times=m)
        factors += count(add=1, exp=1) * ((n_q + n_k + m) * m)
        inverse = f.pseudo_inverse(m, m)
        if self.core == "ridge":
            inverse = f.norm_product(m) + count(mul=1) + f.ridge_inverse(m)
        sums = f.matmul(m, n_k, 1) + f.matmul(m, m, 1)
        sums += f.matmul(n_q, m, 1) + count(compare=2 * n_q)
        products = f.matmul(m, n_k, d_v) + f.matmul(m, m, d_v) + f.matmul(n_q, m, d_v) + count(div=n_q * d_v)
        return costs.Cost(prepare=samples + factors + inverse + sums, apply=products)


def _optimal(problem: AttentionProblem, some_queries: Selection, some_keys: Selection) -> Skeleton:
    """P between the projections on the sampled columns and on the sampled rows, in float64."""
    xp, scale, mask = problem.xp, problem.scale, problem.key_mask
    q, k = (xp.astype(x, xp.float64, copy=False) for x in (problem.q, problem.k))
    exact = SoftmaxAttention(q, k, scale=scale, key_mask=mask)
    rows = SoftmaxAttention(some_queries.gather(q), k, scale=scale, key_mask=mask).dense()
    row_basis = xp.linalg.qr(xp.matrix_transpose(rows))[0]
    if mask is not None:  # dependent rows leave directions open, which must not point at hidden keys
        row_basis = xp.where(mask[..., None], row_basis, xp.zeros_like(row_basis))
    product = exact @ row_basis
    shift, total = exact.normaliser
    logits = (scale * q) @ xp.matrix_transpose(some_keys.gather(k))
    below = xp.minimum(logits - shift[..., None], xp.log(total)[..., None])  # no entry of P exceeds one
    columns = xp.exp(below) / total[..., None]
    column_basis = xp.linalg.qr(columns)[0]
    core = xp.matrix_transpose(column_basis) @ product
    right = Dense(xp.matrix_transpose(row_basis))
    return Skeleton(Dense(column_basis), core, right, intersection=some_queries.gather(columns))


def _optimal_cost(problem: AttentionProblem) -> costs.Cost:
    """Exact rows, one exact product, exact columns; two QR factorisations; then a product of rank m."""
    n_q, n_k, d, d_v = costs.symbols_of(problem)
    m, f, count, pairs = costs.m, costs.formulas, costs.Operations, costs.symbols.visible_pairs(problem)
    rows = f.softmax_rows(m, m * pairs / n_q, d) + count(div=m * pairs / n_q) + f.qr(n_k, m)
    product = f.softmax_product(n_q, pairs, d, m)
    columns = (
        count(mul=n_q * d, exp=n_q)
        + f.matmul(n_q, d, m)
        + count(add=1, compare=1, exp=1, div=1) * (n_q * m)
        + f.qr(n_q, m)
    )
    apply = f.matmul(m, n_k, d_v) + f.matmul(m, m, d_v) + f.matmul(n_q, m, d_v)
    return costs.Cost(prepare=rows + product + columns + f.matmul(m, n_q, m), apply=apply)


def _below_maximum(log: Array) -> tuple[Array, Array]:
    """exp(log) over the largest entry of each row, and the logarithms of these."""
    xp = namespace(log)
    top = xp.max(log, axis=-1, keepdims=True)
    return xp.exp(log - top), top


def _enough_on_both_sides(m: int, problem: AttentionProblem) -> None:
    xp, fewest = problem.xp, problem.n_k
    if problem.key_mask is not None:
        fewest = int(xp.min(xp.sum(xp.astype(problem.key_mask, xp.int64), axis=-1)))
    if m > min(problem.n_q, fewest):
        raise ValueError(
            f"m={m} rows and columns cannot be chosen from {problem.n_q} queries and {fewest} visible keys; "
            "pass a smaller m"
        )
