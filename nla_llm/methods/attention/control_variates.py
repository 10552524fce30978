"""Control variates for randomised attention: exact nearby, one direction for each segment elsewhere."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, ClassVar, final

from nla_llm import costs
from nla_llm.backend import Array, device_of, from_numpy, generator, matmul_where, namespace
from nla_llm.methods.attention.near_tokens import (
    exp_of_fresh,
    half_square_norm,
    norms_cost,
    segment_means,
    segment_means_cost,
    unit_scale,
)
from nla_llm.methods.registry import Properties, register, require, whole_number
from nla_llm.operators import Dense, Operator, Product, SegmentDiagonal, Segments, Sum

if TYPE_CHECKING:
    import numpy as np

    from nla_llm.problems import AttentionProblem

__all__ = ["Eva"]


@register("eva")
@final
@dataclass(frozen=True)
class Eva:
    """Exact attention in the window of a query; any segment c elsewhere as a whole, with the weight |c| exp(x·ȳ_c).

    EVA of Zheng, Yuan, Wang and Kong 2023, arXiv 2302.04542: randomised attention with a control variate for each of m
    segments of consecutive keys. Where the coefficient of a segment is its own best one, the sum over the segment
    becomes exact and the ω of the other segments drop out of it. What is left of the segment of other queries is its
    total weight Σ_{j ∈ c} exp(x_i·y_j), approximated by the mean key ȳ_c, and the division of this weight among its
    keys, which is softmax_j(ω_c·y_j − |y_j|²/2) with ω_c ~ N(x̄_c + ȳ_c, I), x̄_c the mean of the queries of the same
    number.

    Biased: the weight by Jensen's inequality, of second order in the spread of the keys of a segment, the division of
    first order, as ω_c ought to lie near x_i + ȳ_c. With m = n_k it is softmax attention itself. The draw
    of ω_c adds a variance that no other draw averages: without it the error is smaller.

    Three things are otherwise in the authors' program: it leaves out the factor |c|, without which a segment weighs as
    much as a single key; it counts the keys of the window twice, exactly and in segments; and it halves the mean of ω.

    Costs 2 n (n/B + m)(d + d_v) operations with B windows: linear in n only where B grows with it. The causal form sees
    the earlier keys of its own window and the segments of earlier windows.

    Parameters
    ----------
    m
        Number of segments, at most n_q and n_k.
    windows
        Largest number of windows B, parted into the segments. By default every segment is a window: exact with m = 1
        too, so that the error first rises with m as the exact neighbourhood shrinks. With fewer it falls with m.
    sampled
        Draw the ω_c. With False they are at their means, as in the authors' program when it evaluates: nothing is
        random then.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.zeros((5, 2))
    >>> Eva(2)(AttentionProblem(q, q), rng=0).dense()[0, :2].tolist()
    [0.2, 0.2]
    """

    m: int
    _: KW_ONLY
    windows: int | None = None
    sampled: bool = True
    properties: ClassVar[Properties] = Properties(
        family="randomised", budget="m", converges=True, nonnegative=True, deterministic=False, shift_invariant=True,
        permutation_equivariant=False, supports=frozenset({"causal", "key_mask"}),
    )  # fmt: skip

    def __post_init__(self) -> None:
        whole_number("m", self.m)
        if self.windows is not None:
            whole_number("windows", self.windows)
        if not self.sampled:
            why = "segments are made of positions: hiding a key makes its own shorter, removing it moves all borders"
            promised = replace(type(self).properties, deterministic=True, exceptions={"padding": why})
            object.__setattr__(self, "properties", promised)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator: the own segments exactly, the others through one row for each."""
        require(self, problem)
        if self.m > min(problem.n_q, problem.n_k):
            raise ValueError(f"m={self.m} segments cannot be made of {problem.n_q} queries and {problem.n_k} keys")
        x, y = unit_scale(problem)
        xp = namespace(x)
        windows = Segments(problem.n_q, self._windows), Segments(problem.n_k, self._windows)
        rows, columns = (Segments(n, self.m, windows=self._windows) for n in (problem.n_q, problem.n_k))
        near_y, count = segment_means(y, columns, problem.key_mask)
        omega = segment_means(x, rows)[0] + near_y
        if self.sampled:
            noise = generator(rng).standard_normal((self.m, problem.d))
            omega = omega + xp.astype(from_numpy(noise, like=x), x.dtype)
        own = _own_logits(problem, x, y, windows)
        others = _segment_logits(problem, x @ xp.matrix_transpose(near_y), rows, count)
        own, others = _joint_softmax(own, others, windows[0])
        shares = _shares(y, omega, columns, _hidden_slots(problem, columns), count)
        near = SegmentDiagonal(own, *windows, nonnegative=True)
        whole = SegmentDiagonal(shares, Segments(self.m, self.m), columns, nonnegative=True)
        return Sum(near, Product(Dense(others, nonnegative=True), whole))

    @property
    def _windows(self) -> int:
        return self.m if self.windows is None else min(self.m, self.windows)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Means of segments; logits inside windows and with segments, their softmax; shares inside segments."""
        from sympy import Symbol  # noqa: PLC0415 - SymPy loads with the first formula

        n_q, n_k, d, d_v = costs.symbols_of(problem)
        m, f = costs.m, costs.formulas
        w = m if self._windows == self.m else Symbol("windows")
        pairs = f.pairs_inside_segments(n_q, n_k, w, causal=problem.causal)
        inputs = (n_q + n_k) * costs.Operations(mul=d) + norms_cost(n_k, d)
        masked = problem.key_mask is not None
        means = segment_means_cost(n_q, d, m, windows=w) + segment_means_cost(n_k, d, m, windows=w, mask=masked)
        logits = costs.Operations(madd=pairs * d) + f.matmul(n_q, d, m) + costs.Operations(exp=m, add=n_q * m)
        softmax = costs.Operations(compare=pairs + n_q * m - n_q, exp=pairs + n_q * m, div=pairs + n_q * m)
        softmax += costs.Operations(add=pairs + n_q * m + pairs + n_q * m - n_q)
        omega = costs.Operations(add=m * d) + costs.Operations(add=m * d, draw=m * d) * int(self.sampled)
        shares = costs.Operations(madd=n_k * d, add=3 * n_k - m, compare=n_k - m, exp=n_k, div=n_k)
        products = costs.Operations(madd=(pairs + n_k + n_q * m) * d_v, add=n_q * d_v)
        return costs.Cost(prepare=inputs + means + logits + softmax + omega + shares, apply=products)


def _own_logits(problem: AttentionProblem, x: Array, y: Array, windows: tuple[Segments, Segments]) -> Array:
    """Logits of the keys of its own window, (..., B, rows.size, columns.size), −∞ for keys that it does not see."""
    xp, (rows, columns) = namespace(x), windows
    hidden = _hidden_slots(problem, columns)
    keep = rows.filled[:, :, None] & columns.filled[:, None, :]
    if problem.causal:
        keep = keep & (columns.slots[:, None, :] <= rows.slots[:, :, None])
    seen = xp.asarray(keep, device=device_of(x))
    logits = matmul_where(rows.split(x), xp.matrix_transpose(columns.split(y)), seen, -xp.inf)
    return logits if hidden is None else xp.where(hidden & seen, _minus_infinity(logits), logits)


def _segment_logits(problem: AttentionProblem, logits: Array, rows: Segments, count: Array) -> Array:
    """log(|c| exp(x·ȳ_c)) (..., n_q, m), −∞ in the own window, in later ones, and without visible keys, from x·ȳ_c."""
    xp = namespace(logits)
    own = rows.window[rows.number][:, None]
    other = rows.window < own if problem.causal else rows.window != own
    size = xp.astype(xp.where(count > 0, count, 1), logits.dtype)
    logits = logits + xp.log(size)[..., None, :]
    seen = xp.asarray(other, device=device_of(logits)) & (count > 0)[..., None, :]
    return xp.where(seen, logits, _minus_infinity(logits))


def _joint_softmax(own: Array, others: Array, rows: Segments) -> tuple[Array, Array]:
    """Weights of both kinds of logits, which sum to one together."""
    xp = namespace(own)

    def joined(a: Array) -> Array:
        return rows.join(a[..., None])[..., 0]

    def split(a: Array) -> Array:
        return rows.split(a[..., None])

    top = xp.maximum(joined(xp.max(own, axis=-1)), xp.max(others, axis=-1))
    own -= split(top)  # in place from here on: both are fresh arrays
    others -= top[..., None]
    own, others = exp_of_fresh(own), exp_of_fresh(others)
    total = joined(xp.sum(own, axis=-1)) + xp.sum(others, axis=-1)
    own /= split(total)
    others /= total[..., None]
    return own, others


def _shares(y: Array, omega: Array, columns: Segments, hidden: Array | None, count: Array) -> Array:
    """softmax_j(ω_c·y_j − |y_j|²/2) over the visible keys of each segment, (..., m, 1, columns.size)."""
    xp = namespace(y)
    filled = xp.asarray(columns.filled[:, None, :], device=device_of(y))
    split = columns.split(y)
    logits = matmul_where(omega[..., None, :], xp.matrix_transpose(split), filled, -xp.inf)
    logits = logits - xp.matrix_transpose(columns.split(half_square_norm(y)))
    if hidden is not None:  # a segment without visible keys has no weight, whatever its shares
        logits = xp.where(hidden & filled & (count > 0)[..., None, None], _minus_infinity(logits), logits)
    shares = xp.exp(logits - xp.max(logits, axis=-1, keepdims=True))
    return shares / xp.sum(shares, axis=-1, keepdims=True)


def _hidden_slots(problem: AttentionProblem, columns: Segments) -> Array | None:
    """Which slots of a segment hold hidden keys, (..., m, 1, size)."""
    if problem.key_mask is None:
        return None
    return ~problem.xp.matrix_transpose(columns.split(problem.key_mask[..., None]))


def _minus_infinity(like: Array) -> Array:
    xp = namespace(like)
    return xp.asarray(-xp.inf, dtype=like.dtype, device=device_of(like))
