"""Clustered attention: queries of a cluster share the weights of their centroid, corrected on a few keys or not."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, by_heads, device_of, generator, is_numpy, namespace
from nla_llm.methods.attention.floors import rank_floor
from nla_llm.methods.registry import Properties, register, require, settle, whole_number
from nla_llm.operators import Dense, Operator, Panel, Product, Selection, SoftmaxAttention, Sum, TiledSparse

if TYPE_CHECKING:
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["ClusteredAttention", "ImprovedClusteredAttention", "cluster"]

_PROMISES = Properties(
    family="clustered", budget="m", converges=True, nonnegative=True, deterministic=False, shift_invariant=True,
    supports=frozenset({"key_mask"}),
    refusals={
        "causal": "the queries of a cluster share a row of weights, and its centroid is a mean over later queries too",
        "window": "the queries of a cluster share a row of weights wherever they stand",
        "bias": "a bias belongs to pairs of tokens, and a centroid is none",
    },
)  # fmt: skip


@register("clustered_attention")
@final
@dataclass(frozen=True)
class ClusteredAttention:
    """P̂ = S softmax(c kᵀ): every query takes the row of the centroid c of its cluster, S picks it.

    Vyas, Katharopoulos and Fleuret 2020, arXiv 2007.04825, section 3.2. There the queries are hashed and clustered by
    Hamming distance; here they are clustered as they are: a fixed number of Lloyd steps for Euclidean distances, from
    m of the queries drawn without replacement (the same places in all heads), a cluster that runs empty keeping its
    centroid. Rows sum to one; the error of row i is at most ½ scale |q_i − c| ‖K‖₂
    (:func:`nla_llm.theory.columns.clustering_bound`), so it vanishes at m = n_q.

    Parameters
    ----------
    m
        Number of clusters, at most n_q.
    steps
        Lloyd steps.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.repeat(np.eye(3), 5, axis=0)
    >>> problem = AttentionProblem(q, q)
    >>> P = ClusteredAttention(6)(problem, rng=0)
    >>> bool(abs(P.dense() - problem.exact().dense()).max() < 1e-12)
    True
    """

    m: int
    _: KW_ONLY
    steps: int = 5
    properties: ClassVar[Properties] = _PROMISES

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        whole_number("steps", self.steps)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator S B; B is streamed."""
        require(self, problem)
        centroids, labels = cluster(problem.q, self.m, self.steps, generator(rng))
        weights = SoftmaxAttention(centroids, problem.k, scale=problem.scale, key_mask=problem.key_mask)
        return Product(Selection(labels, self.m, like=problem.q), weights)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of its rank, m; the bound of its rows needs the clusters, which are not known before they are drawn."""
        return rank_floor(problem, self.m)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Clusters; then softmax on m rows, which are copied."""
        n_q, _, d, d_v = costs.symbols_of(problem)
        rows = costs.formulas.softmax_product(costs.m, _pairs(problem), d, d_v)
        return costs.Cost(prepare=_cluster_cost(n_q, d), apply=rows)


@register("improved_clustered_attention")
@final
@dataclass(frozen=True)
class ImprovedClusteredAttention:
    """Clustered attention whose k largest weights of each cluster are recomputed for each of its queries.

    Vyas, Katharopoulos and Fleuret 2020, arXiv 2007.04825, section 3.3: with T the k largest keys of a centroid and μ
    its mass on them, row i is μ softmax(q_i k_Tᵀ) on T and the row of the centroid elsewhere. Rows sum to one, and the
    operator is exact at k = n_k for every m. Written as S B plus a sparse correction on T whose rows sum to zero.
    Clusters as in :class:`ClusteredAttention`.

    There is no theory object: T depends on clusters that are drawn, the correction is not of low rank, and no bound
    that holds before the draw is known to us.

    Parameters
    ----------
    m
        Number of clusters, at most n_q.
    k
        Keys recomputed in each cluster; all of them where there are no more.
    steps
        Lloyd steps.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.random.default_rng(0).standard_normal((9, 2))
    >>> problem = AttentionProblem(q, q)
    >>> P = ImprovedClusteredAttention(2, k=9)(problem, rng=0)
    >>> bool(abs(P.dense() - problem.exact().dense()).max() < 1e-12)
    True
    """

    m: int
    _: KW_ONLY
    k: int = 32
    steps: int = 5
    properties: ClassVar[Properties] = _PROMISES

    def __post_init__(self) -> None:
        settle(self)
        for name in ("m", "k", "steps"):
            whole_number(name, getattr(self, name))

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator S B + correction; the gathered entries of a row are k, the rows of B are m."""
        require(self, problem)
        centroids, labels = cluster(problem.q, self.m, self.steps, generator(rng))
        weights = SoftmaxAttention(
            centroids, problem.k, scale=problem.scale, key_mask=problem.key_mask
        ).dense()  # (..., m, n_k)
        xp = namespace(weights)
        top = _largest(weights, min(self.k, problem.n_k))
        shared = xp.take_along_axis(weights, top, axis=-1)
        member = Selection(labels, self.m, like=problem.q)
        keys = member.gather(top)
        logits = by_heads(_logits_at, problem.scale * problem.q, problem.k, keys)
        if problem.key_mask is not None:
            shown = xp.broadcast_to(problem.key_mask[..., None, :], weights.shape)
            shown = member.gather(xp.take_along_axis(shown, top, axis=-1))
            logits = xp.where(shown, logits, xp.full_like(logits, -xp.inf))
        own = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
        mass = member.gather(xp.sum(shared, axis=-1, keepdims=True))
        correction = own * (mass / xp.sum(own, axis=-1, keepdims=True))
        correction = correction - member.gather(shared)
        sparse = TiledSparse([Panel(correction[..., None, :], keys)], (*correction.shape[:-1], problem.n_k))
        return Sum(Product(member, Dense(weights, nonnegative=True)), sparse)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Clusters, the rows of the centroids, their largest entries by sorting, and k logits for each query."""
        from sympy import Symbol  # noqa: PLC0415 - loads where a formula is asked for

        n_q, n_k, d, d_v = costs.symbols_of(problem)
        m, f, pairs, count = costs.m, costs.formulas, _pairs(problem), costs.Operations
        k = Symbol("k") if self.k <= problem.n_k else n_k
        rows = f.softmax_rows(m, pairs, d) + count(div=pairs) + m * f.merge_sort(n_k) + f.sum_of(k, times=m)
        logits = count(mul=n_q * d, madd=n_q * k * d)
        softmax = f.maximum_of(k, times=n_q) + f.sum_of(k, times=n_q)
        softmax += count(add=2 * n_q * k, exp=n_q * k, div=n_q, mul=n_q * k)
        product = count(madd=(pairs + n_q * k) * d_v, add=n_q * d_v)
        return costs.Cost(prepare=_cluster_cost(n_q, d) + rows + logits + softmax, apply=product)


# -- clusters ------------------------------------------------------------------------------------------------------


def cluster(x: Array, m: int, steps: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Centroids (..., m, d) and labels (..., n) of the rows of x (..., n, d) after some Lloyd steps.

    Raises
    ------
    ValueError
        If there are fewer rows than clusters.

    Examples
    --------
    >>> x = np.array([[0.0], [0.1], [5.0], [5.1]])
    >>> centroids, labels = cluster(x, 2, 3, np.random.default_rng(0))
    >>> sorted(centroids[:, 0].round(2).tolist()), bool(labels[0] == labels[1] != labels[2])
    ([0.05, 5.05], True)
    """
    xp, n = namespace(x), x.shape[-2]
    if m > n:
        raise ValueError(f"m={m} clusters cannot be made of {n} queries; pass a smaller m")
    start = np.sort(rng.permutation(n)[:m])
    centroids = xp.take(x, xp.asarray(start, device=device_of(x)), axis=-2)
    for _ in range(steps):
        centroids = by_heads(_means, x, by_heads(_nearest, x, centroids)[..., None], centroids)
    return centroids, by_heads(_nearest, x, centroids)


def _nearest(x: Array, centroids: Array) -> Array:
    """Label of the nearest centroid, where x·c − |c|²/2 is largest."""
    xp = namespace(x)
    nearness = x @ xp.matrix_transpose(centroids)
    nearness -= 0.5 * xp.sum(centroids * centroids, axis=-1)[..., None, :]
    return xp.argmax(nearness, axis=-1)


def _means(x: Array, labels: Array, centroids: Array) -> Array:
    """Means of the rows with each label, the old centroid where there are none."""
    xp = namespace(x)
    size, total = _sums(x, labels[..., 0], centroids.shape[-2])
    mean = total / xp.astype(xp.where(size > 0, size, xp.ones_like(size)), x.dtype)
    return xp.where(size > 0, mean, centroids)


def _sums(x: Array, labels: Array, m: int) -> tuple[Array, Array]:
    """How many rows of x have each of m labels, (..., m, 1), and their sums (..., m, d)."""
    xp = namespace(x)
    if is_numpy(x) and labels.ndim <= 2 and labels.size == labels.shape[-1] and x.size == labels.size * x.shape[-1]:
        from scipy.sparse import csr_array  # noqa: PLC0415 - a product with the labels that skips their zeros

        n = labels.shape[-1]
        member = csr_array((np.ones(n, x.dtype), labels.ravel(), np.arange(n + 1)), shape=(n, m))
        size = np.bincount(labels.ravel(), minlength=m)
        total = member.T @ x.reshape(n, x.shape[-1])
        return size.reshape((*labels.shape[:-1], m, 1)), total.reshape((*x.shape[:-2], m, x.shape[-1]))
    one_hot = labels[..., None] == xp.arange(m, device=device_of(labels))  # (..., n, m)
    size = xp.sum(xp.astype(one_hot, xp.int64), axis=-2)[..., None]
    return size, xp.matrix_transpose(xp.astype(one_hot, x.dtype)) @ x


def _cluster_cost(n: Any, d: Any) -> costs.Operations:
    """Each Lloyd step labels all rows and sums them up by a product with the labels; at the end they are labelled."""
    from sympy import Symbol  # noqa: PLC0415 - loads where a formula is asked for

    m, f, steps = costs.m, costs.formulas, Symbol("steps")
    norms = costs.Operations(mul=m * d + m) + f.sum_of(d, times=m)
    labels = norms + f.matmul(n, d, m) + costs.Operations(add=n * m) + f.maximum_of(m, times=n)
    means = f.matmul(m, n, d) + costs.Operations(div=m * d)
    total: costs.Operations = costs.Operations(draw=n) + (steps + 1) * labels + steps * means
    return total


def _pairs(problem: AttentionProblem) -> Any:
    """Pairs of a centroid and a visible key."""
    return costs.m * costs.symbols.visible_pairs(problem) / costs.symbols_of(problem).n_q


def _logits_at(q: Array, k: Array, keys: Array) -> Array:
    """q_i · k_j for the keys j in row i of ``keys`` (..., n_q, s), slot by slot, so that no n_q × s × d is held."""
    xp = namespace(q, k)
    picked = (Selection(keys[..., slot], k.shape[-2], like=q).gather(k) for slot in range(keys.shape[-1]))
    return xp.stack([xp.vecdot(*xp.broadcast_arrays(q, rows)) for rows in picked], axis=-1)


def _largest(weights: Array, k: int) -> Array:
    """Places of the k largest entries of each row, in the order of the row."""
    xp = namespace(weights)
    if is_numpy(weights) and k < weights.shape[-1]:
        return np.sort(np.argpartition(-weights, k - 1, axis=-1)[..., :k], axis=-1)
    return xp.sort(xp.argsort(weights, axis=-1, descending=True)[..., :k], axis=-1)
