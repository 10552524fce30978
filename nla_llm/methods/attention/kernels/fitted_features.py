"""Feature maps that are fitted to the softmax rows of calibration tokens, and then used on others.

The fit is explicit: :meth:`FittedFeatures.fit` returns a new method that holds the maps of every head. It works in
float64 NumPy and forms the matrices of the calibration tokens, n × n; what it returns is linear in n like any kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod, sqrt
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, by_heads, from_numpy, namespace, parallel, to_numpy
from nla_llm.methods.attention.floors import rank_floor
from nla_llm.methods.attention.kernels.linear_attention import CHUNK, Features, kernel_attention, kernel_attention_cost
from nla_llm.methods.registry import Properties, register, require, settle, whole_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

    Matrix = NDArray[np.float64]

__all__ = ["FeatureMaps", "FittedFeatures", "cross_entropy", "initial_map"]


@final
@dataclass(frozen=True, eq=False, repr=False)
class FeatureMaps:
    """The affine maps x ↦ xᵀW + b of queries and of keys, for every head.

    Attributes
    ----------
    queries, keys
        (..., d + 1, h), float64 NumPy: W above, b in the last row.
    """

    queries: Matrix
    keys: Matrix

    def __repr__(self) -> str:
        """One line: arrays do not belong into the name of a method."""
        *heads, rows, h = self.queries.shape
        return f"<maps of {prod(heads)} heads, d={rows - 1}, h={h}>"


@register("fitted_features")
@final
@dataclass(frozen=True)
class FittedFeatures:
    """φ(x) = softmax [Wᵀx + b, −Wᵀx − b] with maps of queries and of keys fitted to softmax attention, m features.

    Zhang et al. 2024 (Hedgehog), arXiv 2402.04347, section 4: exponentials of a learned affine map and of its negative.
    All m features of a token are divided by their sum; for queries that cancels and is left out. x = √scale q, so that
    the maps do not depend on the scale. They are fitted by the cross-entropy −Σ_ij P_ij log P̂_ij of the exact rows,
    as published, with L-BFGS instead of stochastic gradients. Replaces softmax by another kernel, which agrees with it
    where the tokens resemble those of the calibration; before :meth:`fit` it is that of the published start, W = I.

    There are (d + 1) m numbers to be fitted, so it overfits soon. Measured on the embedded model with m = 64, relative
    Frobenius errors on tokens that were not seen, medians over heads: fitted to 256 tokens, five of six layers are
    worse than the start; fitted to 14 stretches of 256 tokens, each layer closes 27 to 39 % of the distance from the
    start to the best matrix of rank 64.

    Parameters
    ----------
    m
        Number of features. W has ⌈m/2⌉ columns; for odd m the last one comes without its negative.
    tied
        One map for queries and keys instead of two (published: two).
    maps
        What :meth:`fit` found, None before it.

    Examples
    --------
    >>> from nla_llm.problems import AttentionProblem
    >>> q, k = np.random.default_rng(0).standard_normal((2, 60, 4))
    >>> problem = AttentionProblem(2 * q, k)
    >>> start = FittedFeatures(8)
    >>> fitted = start.fit(problem, steps=50)
    >>> errors = [np.linalg.norm((problem.exact() - method(problem)).dense()) for method in (fitted, start)]
    >>> bool(errors[0] < 0.6 * errors[1])
    True
    """

    m: int
    tied: bool = False
    maps: FeatureMaps | None = None
    properties: ClassVar[Properties] = Properties(
        family="fitted",
        target="fitted kernel",
        budget="m",
        nonnegative=True,
        supports=frozenset({"causal", "key_mask"}),
    )
    chunk: ClassVar[int] = CHUNK

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        if self.maps is None:
            return
        if not isinstance(self.maps, FeatureMaps):
            raise TypeError(f"maps must be the FeatureMaps that fit finds, or None, got {self.maps!r}")
        object.__setattr__(self, "properties", replace(type(self).properties, budget=None))
        if self.maps.queries.shape[-1] != self._columns:
            raise ValueError(
                f"the maps were fitted with h={self.maps.queries.shape[-1]} columns, which do not make m={self.m} "
                "features; fit again"
            )

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of linear attention with these maps."""
        require(self, problem)
        maps = self._maps_for(problem)
        q, k = problem.scaled_inputs()
        log_q = by_heads(self._exponents, q, from_numpy(maps.queries, like=q, dtype=q.dtype))
        log_k = by_heads(self._exponents, k, from_numpy(maps.keys, like=k, dtype=k.dtype))
        keys = Features(log=log_k, row=-by_heads(_log_sum_exp, log_k))
        return kernel_attention(problem, Features(log=log_q), keys, nonnegative=True)

    def fit(self, *problems: AttentionProblem, steps: int = 100) -> FittedFeatures:
        """The method with maps fitted to the exact rows of some problems, head by head, from where the maps are now.

        Parameters
        ----------
        *problems
            Calibration problems with the same heads: their batch axes are those of the maps. The cost is their mean
            cross-entropy over all queries. Masks and causality are respected.
        steps
            Steps of L-BFGS at most, 1 at least.

        Raises
        ------
        ValueError
            If there is no problem, or if they have different heads or dimensions.
        """
        whole_number("steps", steps)
        if len({(p.batch_shape, p.d) for p in problems}) != 1:
            raise ValueError(
                "fit needs problems with the same batch axes and dimension, got "
                f"{[(p.batch_shape, p.d) for p in problems] or 'none'}"
            )
        for problem in problems:
            require(self, problem)
        batch, d = problems[0].batch_shape, problems[0].d
        start = self._maps_for(problems[0])
        shape = (*batch, d + 1, self._columns)
        queries, keys = (np.broadcast_to(w, shape).copy() for w in (start.queries, start.keys))

        def head(index: tuple[int, ...]) -> None:
            rows = [_calibration(problem.head(index)) for problem in problems]
            queries[index], keys[index] = self._fit_head(rows, queries[index], keys[index], steps)

        parallel(head, np.ndindex(batch))
        return replace(self, maps=FeatureMaps(queries, keys))

    def head(self, index: tuple[int, ...] | int) -> FittedFeatures:
        """The method of one head, as ``problem.head(index)`` is its problem."""
        if self.maps is None:
            return self
        return replace(self, maps=FeatureMaps(self.maps.queries[index], self.maps.keys[index]))

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of its rank, m: whatever the method puts into it."""
        return rank_floor(problem, self.m)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Scaled inputs, their maps, sums of the features of the keys; then a kernel of m features."""
        import sympy  # noqa: PLC0415 - loads only where a cost is asked for

        n_q, n_k, d, _ = costs.symbols_of(problem)
        m, h, f = costs.m, sympy.ceiling(costs.m / 2), costs.formulas
        inputs = (n_q + n_k) * (costs.Operations(mul=d, add=h) + f.matmul(1, d, h))
        sums = n_k * (f.maximum_of(m) + costs.Operations(add=m + 1, exp=m + 1) + f.sum_of(m))
        unscaled = costs.Operations(add=-n_q)  # the features of queries have no scale of their own
        return costs.Cost(prepare=inputs + sums + unscaled) + kernel_attention_cost(problem, m, log_width=m, row=True)

    @property
    def _columns(self) -> int:
        return -(-self.m // 2)

    def _exponents(self, x: Array, w: Array) -> Array:
        """[z, −z] for z = xᵀW + b, the first m of them."""
        z = x @ w[..., :-1, :] + w[..., -1:, :]
        return namespace(z).concat([z, -z[..., : self.m - self._columns]], axis=-1)

    def _maps_for(self, problem: AttentionProblem) -> FeatureMaps:
        if self.maps is None:
            start = initial_map(problem.d, self._columns)
            return FeatureMaps(start, start)
        heads, rows = self.maps.queries.shape[:-2], self.maps.queries.shape[-2]
        fits = len(heads) <= len(problem.batch_shape) and all(
            a in {1, b} for a, b in zip(reversed(heads), reversed(problem.batch_shape), strict=False)
        )
        if rows != problem.d + 1 or not fits:
            raise ValueError(
                f"the maps were fitted for heads {heads} of dimension {rows - 1}, the problem has "
                f"{problem.batch_shape} of dimension {problem.d}; fit again, or pick one head with method.head(index)"
            )
        return self.maps

    def _fit_head(
        self, rows: Sequence[Calibration], queries: Matrix, keys: Matrix, steps: int
    ) -> tuple[Matrix, Matrix]:
        """Maps of one head by L-BFGS."""
        from scipy.optimize import minimize  # noqa: PLC0415 - loads only where something is fitted

        size = queries.size

        def unpack(parameters: Matrix) -> tuple[Matrix, Matrix]:
            w = parameters[:size].reshape(queries.shape)
            return w, w if self.tied else parameters[size:].reshape(keys.shape)

        def objective(parameters: Matrix) -> tuple[float, Matrix]:
            value, to_queries, to_keys = cross_entropy(*unpack(parameters), rows, self.m)
            gradient = [to_queries + to_keys] if self.tied else [to_queries, to_keys]
            return value, np.concatenate([g.ravel() for g in gradient])

        start = queries.ravel() if self.tied else np.concatenate([queries.ravel(), keys.ravel()])
        options: Any = {"maxiter": steps, "maxfun": 4 * steps, "maxcor": 20}
        return unpack(minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x)


# -- the cost and its gradient -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Calibration:
    """One head of a calibration problem: x (n_q, d), y (n_k, d) with x·y the logits, and the exact rows P."""

    x: Matrix
    y: Matrix
    exact: Matrix
    visible: NDArray[np.bool_]


def _calibration(problem: Any) -> Calibration:
    q, k = (to_numpy(a).astype(np.float64) for a in (problem.q, problem.k))
    root = sqrt(abs(problem.scale))
    visible = np.tri(*(len(q), len(k)), k=0 if problem.causal else len(k), dtype=np.bool_)
    if problem.key_mask is not None:
        visible &= to_numpy(problem.key_mask)
    return Calibration(
        root * q, (root if problem.scale >= 0 else -root) * k, to_numpy(problem.exact().dense()), visible
    )


def initial_map(d: int, columns: int) -> Matrix:
    """The start (d + 1, h): the identity for h = d as published, and b = 0; for h > d rotations of it, always the same.

    Examples
    --------
    >>> initial_map(2, 2).tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    rng = np.random.default_rng(0)
    blocks = [np.eye(d)]
    while d * len(blocks) < columns:
        blocks.append(np.linalg.qr(rng.standard_normal((d, d)))[0])
    return np.vstack([np.hstack(blocks)[:, :columns], np.zeros((1, columns))])


def cross_entropy(queries: Matrix, keys: Matrix, rows: Sequence[Calibration], m: int) -> tuple[float, Matrix, Matrix]:
    """Mean over all queries of −Σ_j P_ij log P̂_ij, and its gradients by the two maps (d + 1, h) of one head."""
    count = sum(len(r.x) for r in rows)
    value, to_queries, to_keys = 0.0, np.zeros_like(queries), np.zeros_like(keys)
    for r in rows:
        one, by_x, by_y = _cross_entropy_of(r, queries, keys, m)
        value += one / count
        to_queries += _through_map(r.x, by_x, queries.shape[-1]) / count
        to_keys += _through_map(r.y, by_y, keys.shape[-1]) / count
    return value, to_queries, to_keys


def _cross_entropy_of(r: Calibration, queries: Matrix, keys: Matrix, m: int) -> tuple[float, Matrix, Matrix]:
    """The sum over queries, and its gradients by the exponents z of queries and keys (n, m)."""
    z_q, z_k = _exponents_of(r.x, queries, m), _exponents_of(r.y, keys, m)
    phi_q = np.exp(z_q - z_q.max(axis=1, keepdims=True))  # a factor of the row cancels
    phi_k = np.exp(z_k - _log_sum_exp(z_k))
    tiny = np.finfo(np.float64).tiny  # where a step went so far that an entry underflows: a large cost, not an infinite
    kernel = np.where(r.visible, np.maximum(phi_q @ phi_k.T, tiny), 0.0)
    sums = kernel.sum(axis=1, keepdims=True)
    ratio = np.divide(r.exact, kernel, out=np.zeros_like(kernel), where=r.visible)
    log_ratio = np.log(np.divide(kernel, sums, out=np.ones_like(kernel), where=r.visible))
    by_kernel = r.visible / sums - ratio
    by_q = phi_q * (by_kernel @ phi_k)
    by_k = phi_k * (by_kernel.T @ phi_q)
    by_k -= phi_k * by_k.sum(axis=1, keepdims=True)  # the division by the sum of the features
    return -float(np.sum(r.exact * log_ratio)), by_q, by_k


def _exponents_of(x: Matrix, w: Matrix, m: int) -> Matrix:
    z = x @ w[:-1] + w[-1]
    return np.concatenate([z, -z[:, : m - z.shape[1]]], axis=1)


def _through_map(x: Matrix, by_exponents: Matrix, columns: int) -> Matrix:
    """Gradient by (W, b) from that by [z, −z]."""
    by_z = by_exponents[:, :columns].copy()
    by_z[:, : by_exponents.shape[1] - columns] -= by_exponents[:, columns:]
    return np.vstack([x.T @ by_z, by_z.sum(axis=0)])


def _log_sum_exp(x: Array) -> Array:
    """log Σ exp over the last axis, which is kept."""
    xp = namespace(x)
    top = xp.max(x, axis=-1, keepdims=True)
    return top + xp.log(xp.sum(xp.exp(x - top), axis=-1, keepdims=True))
