"""Randomised attention: softmax attention as a mean over random directions that are drawn near queries plus keys.

In the units x = √scale q and y = √scale k of this package, where the logits are x·y, softmax attention is a mean over
ω,

    P_nj = E softmax_j(ω·y_j − |y_j|²/2),   ω = x_n + y_l + ε,   l ~ P_n·,   ε ~ N(0, I)

(Zheng, Wang and Kong 2022, arXiv 2204.04667). Drawing ω costs as much as attention itself; the linear methods draw the
same few ω for all queries, near means of queries and keys, and weigh them. In units of q and k the variance of ε is √d;
the authors' programs draw it with variance 1 (and not at all when they evaluate), which makes all of their estimators
biased, this one included.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, constant, device_of, from_numpy, generator, namespace, to_numpy
from nla_llm.methods.attention.floors import squared_norm
from nla_llm.methods.attention.kernels.linear_attention import (
    Features,
    half_square_norm,
    half_square_norm_cost,
    kernel_attention,
    kernel_attention_cost,
)
from nla_llm.methods.attention.randomised.segments import (
    segment_means,
    segment_means_cost,
)
from nla_llm.methods.registry import Properties, one_of, register, require, settle, whole_number
from nla_llm.operators import Averaged, Operator, Segments, SoftmaxAttention

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["Lara", "RandomisedAttention"]

_COPY_ENTRIES = 1 << 17  # of the copies that are worked on at once: a MiB, a core's second-level cache
_ROW_ENTRIES = 1 << 20  # probabilities held at once while keys are drawn


@register("randomised_attention")
@final
@dataclass(frozen=True)
class RandomisedAttention:
    """Mean of m softmax attentions with drawn queries ω: P̂_n = (1/m) Σ_s softmax(ω_ns yᵀ − |y|²/2).

    RA of Zheng, Wang and Kong 2022, arXiv 2204.04667. Unbiased for softmax attention itself, E P̂ = P, rows
    sum to one, and no entry is negative. Given ω, its row is the posterior of the key l that ω was drawn near; so it is
    key sampling from P_n·, improved by conditional expectation (Rao and Blackwell), and its variance is below that of m
    keys drawn from P: E ‖P̂ − P‖_F² <= (n_q − ‖P‖_F²)/m.

    A yardstick of what drawing can do rather than a cheap method: m + 1 times the cost of exact attention, and n_q m d
    numbers held. Keys are drawn in float64, by inversion of the distribution function of each row, the same random
    numbers for all heads.

    Parameters
    ----------
    m
        Number of ω for each query.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.eye(3)
    >>> P = RandomisedAttention(4)(AttentionProblem(q, q), rng=0)
    >>> P.shape, bool(np.allclose(P.row_sums(), 1))
    ((3, 3), True)
    """

    m: int
    properties: ClassVar[Properties] = Properties(
        family="randomised", budget="m", converges=True, nonnegative=True, deterministic=False, shift_invariant=True,
        permutation_equivariant=False, supports=frozenset({"causal", "window", "key_mask", "bias"}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Mean over m operators of class SoftmaxAttention with queries [ω, 1] and keys [y, −|y|²/2]."""
        require(self, problem)
        rng = generator(rng)
        uniform, noise = rng.random((problem.n_q, self.m)), rng.standard_normal((self.m, problem.n_q, problem.d))
        x, y = problem.scaled_inputs()
        xp = namespace(x)
        index = _draw_keys(problem, from_numpy(uniform, like=x))
        keys = xp.concat([y, -half_square_norm(y)], axis=-1)[..., None, :, :]
        noise = xp.astype(from_numpy(noise, like=x), x.dtype)
        mask = None if problem.key_mask is None else problem.key_mask[..., None, :]
        bias = None if problem.bias is None else problem.bias[..., None, :, :]
        parts = []
        for start, stop in self._groups(problem):
            near = _gather(y, index[..., start:stop, :])
            omega = x[..., None, :, :] + near + noise[start:stop, ...]
            ones = xp.ones((*omega.shape[:-1], 1), dtype=x.dtype, device=device_of(x))
            part = SoftmaxAttention(
                xp.concat([omega, ones], axis=-1), keys, scale=1.0, causal=problem.causal, window=problem.window,
                key_mask=mask, bias=bias,
            )  # fmt: skip
            parts.append(part)
        return Averaged(parts)

    def theory(self, problem: AttentionProblem) -> Theory:
        """A bound of the root mean square error in the Frobenius norm."""
        from nla_llm.theory.randomised import randomised_attention_theory  # noqa: PLC0415 - SciPy loads there

        exact = problem.exact()
        return randomised_attention_theory(squared_norm(exact), self.m, exact.shape)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Exact weights, m keys drawn from each row; then m exact attentions in one dimension more."""
        n_q, n_k, d, d_v = costs.symbols_of(problem)
        m, f, pairs = costs.m, costs.formulas, costs.symbols.visible_pairs(problem)
        inputs = (n_q + n_k) * costs.Operations(mul=d) + half_square_norm_cost(n_k, d)
        running = f.softmax_weights(problem) + costs.Operations(div=pairs, add=pairs - n_q)
        search = costs.Operations(mul=n_q * (m + 1), compare=n_q * m * (1 + f.bisections(n_k)))
        omega = costs.Operations(draw=n_q * m * (d + 1), add=2 * n_q * m * d)
        one = costs.Operations(mul=n_q * (d + 1), madd=pairs * (d + 1 + d_v), div=n_q * d_v)
        one += costs.Operations(add=2 * pairs - n_q, compare=pairs - n_q, exp=pairs)
        one += costs.Operations(add=0 if problem.bias is None else pairs)
        mean = costs.Operations(add=(m - 1) * n_q * d_v, mul=n_q * d_v)
        return costs.Cost(prepare=inputs + running + search + omega, apply=m * one + mean)

    def _groups(self, problem: AttentionProblem) -> Iterator[tuple[int, int]]:
        """The m copies in groups: what is worked on at once has about ``_COPY_ENTRIES`` entries."""
        entries = _size(problem.batch_shape) * problem.n_q * max(problem.n_k, problem.d)
        group = max(1, _COPY_ENTRIES // entries)
        return ((start, min(start + group, self.m)) for start in range(0, self.m, group))


def _draw_keys(problem: AttentionProblem, uniform: Array) -> Array:
    """Keys l ~ P_n·, m for each query, (..., m, n_q): where ``uniform`` (n_q, m) falls in the running sums of a row."""
    exact = problem.exact()
    assert isinstance(exact, SoftmaxAttention)  # noqa: S101 - for the type checker
    block = max(1, _ROW_ENTRIES // (problem.n_k * _size(exact.batch_shape)))
    parts = []
    for start in range(0, problem.n_q, block):
        stop = min(start + block, problem.n_q)
        first, last = exact.visible_keys(start, stop)
        rows = exact.rows(start, stop)[..., first:last]
        parts.append(first + _invert(rows, uniform[start:stop, ...], steps=(problem.n_k - 1).bit_length()))
    xp = exact.xp
    return xp.matrix_transpose(xp.concat(parts, axis=-2))


def _invert(p: Array, uniform: Array, *, steps: int) -> Array:
    """First key whose running sum exceeds ``uniform`` (rows, m) of the whole, for weights p (..., rows, n)."""
    xp = namespace(p)
    n = p.shape[-1]
    running = xp.cumulative_sum(p, axis=-1)
    total = running[..., -1:]
    # before the first visible key the sums are zeros that the search does meet
    running = xp.where(xp.astype(running, xp.bool), running, constant(0.0, like=p))
    # below the total also where it is rounded, so that no key without weight is drawn
    below = (1 - float(xp.finfo(p.dtype).eps)) * total
    target = xp.minimum(uniform * total, below)
    index = xp.zeros(target.shape, dtype=xp.int64, device=device_of(p))
    for step in reversed(range(steps)):
        probe = index + 2**step
        inside = xp.where(probe < n, probe, n)
        passed = xp.take_along_axis(running, inside - 1, axis=-1) <= target
        index = xp.where(passed & (probe < n), probe, index)
    return index


def _gather(y: Array, index: Array) -> Array:
    """Rows y_l of y (..., n_k, d) for l = index (..., m, n_q): an array (..., m, n_q, d)."""
    xp = namespace(y)
    batch = np.broadcast_shapes(y.shape[:-2], index.shape[:-2])
    (copies, rows), d = index.shape[-2:], y.shape[-1]
    flat = xp.reshape(xp.broadcast_to(index, (*batch, copies, rows)), (*batch, copies * rows, 1))
    y = xp.broadcast_to(y, (*batch, *y.shape[-2:]))
    near = xp.take_along_axis(y, xp.broadcast_to(flat, (*batch, copies * rows, d)), axis=-2)
    return xp.reshape(near, (*batch, copies, rows, d))


# -- the same ω for all queries ----------------------------------------------------------------------------------------


@register("lara")
@final
@dataclass(frozen=True)
class Lara:
    """Linear randomised attention: Â_ij = Σ_s α_is N(ω_s; 0, I)/N(ω_s; μ_s, I) ξ(x_i, ω_s) ξ(y_j, ω_s).

    Here ξ(x, ω) = e^(ω·x − |x|²/2), x = √scale q and y = √scale k. Zheng, Wang and Kong 2022, arXiv 2204.04667, as we
    read it; ``proposals`` fewer than m are our own. One ω_s ~ N(μ_s, I) for each proposal, whose mean μ_s is the sum of
    the means of a segment of consecutive queries and of the segment of keys of the same number. The weights α sum to
    one over the proposals at every ω, so that the kernel is unbiased before normalisation:

    - ``weighting="balance"``: α_s(ω) = N(ω; μ_s, I)/Σ_s' N(ω; μ_s', I), the same for all queries (balance heuristic,
      Veach and Guibas 1995). The relative variance of an entry is at most (H − 1)/m, H the harmonic mean of
      exp(|x_i + y_j − μ_s|²) over s; μ = 0 is FAVOR+.
    - ``weighting="query"``: to this is added t_is − mean_s t_is with t_is the softmax over queries i of x̄_s·x_i, x̄_s
      the mean query of the segment: the form of the authors' program. There it is cut off at 1e-8 to keep it positive,
      which makes it biased; here it may be negative, and the rows whose sum is negative are counted.

    Keys may be shifted at will, since the proposals move with them. As the proposals look at all tokens there is no
    causal form.

    Parameters
    ----------
    m
        Number of ω.
    proposals
        Largest number of segments. By default as many as ω, as published: then m can be at most the number of tokens,
        and the error does not fall to zero. With fewer, ω_s belongs to segment s mod ``proposals``, and m is free.
    weighting
        'balance' or 'query'.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = 0.1 * np.eye(3)
    >>> Lara(64, proposals=2)(AttentionProblem(q, q), rng=0).nonnegative
    True
    """

    m: int
    _: KW_ONLY
    proposals: int | None = None
    weighting: str = "balance"
    properties: ClassVar[Properties] = Properties(
        family="randomised", budget="m", unbiased=True, nonnegative=True, deterministic=False, shift_invariant=True,
        permutation_equivariant=False, supports=frozenset({"key_mask"}),
        refusals={"causal": "its proposals are means over segments of all queries and keys"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        if self.proposals is not None:
            whole_number("proposals", self.proposals)
        one_of("weighting", self.weighting, ("balance", "query"))
        balance = self.weighting == "balance"
        promised = replace(type(self).properties, nonnegative=balance, converges=self.proposals is not None)
        object.__setattr__(self, "properties", promised)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator diag(Â 1)⁻¹ Â."""
        require(self, problem)
        x, y = problem.scaled_inputs()
        xp = namespace(x)
        near_x, near_y = self._segment_means(problem, x, y)
        mu, number = near_x + near_y, np.arange(self.m) % self._segments
        segment = xp.asarray(number, device=device_of(x))
        noise = generator(rng).standard_normal((self.m, problem.d))
        omega = xp.take(mu, segment, axis=-2) + xp.astype(from_numpy(noise, like=x), x.dtype)
        # log N(ω; μ, I)/N(ω; 0, I), of each proposal
        density = omega @ xp.matrix_transpose(mu) - xp.matrix_transpose(half_square_norm(mu))
        draws = from_numpy(np.bincount(number), like=x)  # from each proposal
        log_all = _log_sum_exp(density, xp.astype(draws, x.dtype))
        amplitude = None
        if self.weighting == "balance":
            log_weight = -log_all
        else:
            place = xp.broadcast_to(segment[:, None], (*density.shape[:-1], 1))
            own = xp.take_along_axis(density, place, axis=-1)
            log_weight = -own
            near = xp.take(near_x, segment, axis=-2)
            amplitude = xp.matrix_transpose(xp.exp(own - log_all)) + _query_weights(x, near)
        directions = xp.matrix_transpose(omega)
        queries = Features(amplitude, log=x @ directions, row=-half_square_norm(x))
        keys = Features(log=y @ directions, row=-half_square_norm(y), column=xp.matrix_transpose(log_weight))
        return kernel_attention(problem, queries, keys, nonnegative=self.properties.nonnegative)

    @property
    def _segments(self) -> int:
        return self.m if self.proposals is None else min(self.m, self.proposals)

    def _segment_means(self, problem: AttentionProblem, x: Array, y: Array) -> tuple[Array, Array]:
        """Means of the segments of queries and of visible keys, (..., segments, d)."""
        c = self._segments
        fewest = min(problem.n_q, problem.n_k)
        if c > fewest:
            raise ValueError(
                f"{c} segments cannot be made of n_q={problem.n_q} queries and n_k={problem.n_k} keys; "
                f"pass proposals <= {fewest}, and m is free"
            )
        return segment_means(x, Segments(problem.n_q, c))[0], segment_means(
            y, Segments(problem.n_k, c), problem.key_mask
        )[0]

    def theory(self, problem: AttentionProblem) -> Theory | None:
        """Mean and a bound of the variance of the entries of Â before the division by row sums."""
        if self.weighting != "balance":
            return None
        from nla_llm.theory.randomised import proposal_theory  # noqa: PLC0415 - SciPy loads there

        x, y = problem.scaled_inputs()
        near_x, near_y = self._segment_means(problem, x, y)
        mu = to_numpy(near_x + near_y)[..., np.arange(self.m) % self._segments, :]
        return proposal_theory(to_numpy(x), to_numpy(y), mu)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Means of segments, densities of ω under each proposal, projections and norms; then a kernel of m features."""
        from sympy import Symbol  # noqa: PLC0415 - SymPy loads with the first formula

        n_q, n_k, d, _ = costs.symbols_of(problem)
        m, f = costs.m, costs.formulas
        c = m if self._segments == self.m else Symbol("proposals")
        inputs = (n_q + n_k) * costs.Operations(mul=d) + half_square_norm_cost(n_q + n_k, d) + f.matmul(n_q + n_k, d, m)
        means = segment_means_cost(n_q, d, c) + segment_means_cost(n_k, d, c, mask=problem.key_mask is not None)
        proposals = costs.Operations(add=c * d + m * d, draw=m * d) + half_square_norm_cost(c, d)
        density = f.matmul(m, d, c) + costs.Operations(add=m * c)
        sums = m * (f.maximum_of(c) + costs.Operations(add=c + 1, exp=c + 1, mul=c) + f.sum_of(c))
        total = costs.Cost(prepare=inputs + means + proposals + density + sums)
        if self.weighting == "query":
            total += costs.Cost(prepare=_query_weights_cost(n_q, d, m))
        return total + kernel_attention_cost(problem, m, log_width=m, row=True, column=True)


def _query_weights(x: Array, near: Array) -> Array:
    """t − mean_s t for t_is the softmax over queries i of x_i·near_s, (..., n_q, m)."""
    xp = namespace(x)
    logits = x @ xp.matrix_transpose(near)
    t = xp.exp(logits - xp.max(logits, axis=-2, keepdims=True))
    t = t / xp.sum(t, axis=-2, keepdims=True)
    return t - xp.mean(t, axis=-1, keepdims=True)


def _query_weights_cost(n_q: costs.formulas.Expr, d: costs.formulas.Expr, m: costs.formulas.Expr) -> costs.Operations:
    """The softmax, its means, the balance of each ω added to it, the product with the features of queries."""
    f = costs.formulas
    softmax = m * (f.maximum_of(n_q) + f.sum_of(n_q) + costs.Operations(add=n_q, exp=n_q, div=n_q))
    centred = n_q * (f.sum_of(m) + costs.Operations(div=1, add=m))
    balance = costs.Operations(add=m, exp=m) + costs.Operations(add=n_q * m, mul=n_q * m)
    total: costs.Operations = f.matmul(n_q, d, m) + softmax + centred + balance
    return total


# -- helpers -----------------------------------------------------------------------------------------------------------


def _log_sum_exp(a: Array, weights: Array) -> Array:
    """log Σ weights exp(a) over the last axis, kept."""
    xp = namespace(a)
    top = xp.max(a, axis=-1, keepdims=True)
    return top + xp.log(xp.sum(weights * xp.exp(a - top), axis=-1, keepdims=True))


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) if shape else 1
