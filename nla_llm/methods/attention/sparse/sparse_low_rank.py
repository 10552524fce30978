"""Sparse plus low rank: the kernel itself where a pattern looks, random features for everything else."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from math import log
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, by_heads, device_of, exp_in_place, generator, namespace
from nla_llm.methods.attention.kernels.directions import ENSEMBLES, check_ensemble, draw_directions
from nla_llm.methods.attention.kernels.random_features import PositiveFeatures
from nla_llm.methods.attention.sparse.tiles import enough_keys, low_tile, rescaled, row_groups, tile_softmax, to_tiles
from nla_llm.methods.registry import Properties, register, require, settle, whole_number
from nla_llm.operators import Panel, RowNormalised, Step, SteppedLowRank, Sum, TiledSparse

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.methods.attention.kernels.linear_attention import Features
    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["Scatterbrain"]


@register("scatterbrain")
@final
@dataclass(frozen=True)
class Scatterbrain:
    """Kernel exp(logits) on a window of m keys, φ(q)·φ(k) of positive random features outside it.

    Chen et al. 2021, arXiv 2110.15343, section 4: φφᵀ + S with S = exp(logits) − φφᵀ on the support. Unbiased before
    the division by row sums, since the support does not depend on the draw; the variance is that of the features
    outside the window and zero in it. The paper finds the support by hashing; here it is a window that blocks of
    ⌈m/4⌉ queries, at most 64, share: then what lies outside is two running sums, before and behind the window, with a
    running scale. Nothing is subtracted, so entries are nonnegative in floating point too, and no logits over- or
    underflow all of a row.

    Parameters
    ----------
    m
        Keys of the window. In the causal form a query sees between ¾ m and m of them exactly, and earlier ones by
        features.
    features
        Random features f; as many as m if None.
    directions
        Ensemble of the directions of the features.

    Examples
    --------
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.random.default_rng(0).standard_normal((100, 4))
    >>> problem, method = AttentionProblem(q, q), Scatterbrain(50, features=8)
    >>> error = method(problem, rng=0) - problem.exact()
    >>> bool(np.linalg.norm(error.dense()) < np.linalg.norm(problem.exact().dense()))
    True
    """

    m: int
    _: KW_ONLY
    features: int | None = None
    directions: str = "iid"
    properties: ClassVar[Properties] = Properties(
        family="sparse + low rank", budget="m", converges=True, unbiased=True, nonnegative=True, deterministic=False,
        permutation_equivariant=False, supports=frozenset({"causal", "key_mask"}),
        refusals={"window": "the features beyond the window see all keys", "bias": "a bias has no features"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        if self.features is not None:
            whole_number("features", self.features)
        check_ensemble(self.directions)
        if not ENSEMBLES[self.directions].gaussian:
            object.__setattr__(self, "properties", replace(type(self).properties, unbiased=False))

    @property
    def rank(self) -> int:
        """Number of features."""
        return self.m if self.features is None else self.features

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of class RowNormalised over the sum of tiles and of running sums."""
        require(self, problem)
        enough_keys(self.m, problem)
        xp, (x, y) = problem.xp, problem.scaled_inputs()
        omega = draw_directions(self.directions, self.rank, problem.d, generator(rng), like=x)
        queries, keys = (PositiveFeatures.features(z, omega.project(z)) for z in (x, y))
        log_q, log_k = _logs(queries, -log(self.rank)), _logs(keys.hide(problem.key_mask))
        window = _window(problem, self.m)
        panels, top = _near(problem, x, y, window)
        passes = [_Pass.run(log_q, log_k, steps) for steps in window.passes if any(s.enters for s in steps)]
        scale = top
        for far in passes:
            scale = xp.maximum(scale, xp.max(far.log_q, axis=-1))
        shape = (*np.broadcast_shapes(problem.batch_shape, scale.shape[:-1]), problem.n_q, problem.n_k)
        op: Operator = TiledSparse(rescaled(panels, xp.exp(top - scale)), shape, nonnegative=True)
        for far in passes:
            left = by_heads(_exp_below, far.log_q, scale[..., None])
            op = Sum(op, SteppedLowRank(left, far.right, far.decay, far.steps, nonnegative=True))
        return RowNormalised(op, row_scale_log=scale)

    def theory(self, problem: AttentionProblem) -> Theory | None:
        """Mean and variance before normalisation: those of the features outside the window, exact in it."""
        from nla_llm.theory import kernel_theory  # noqa: PLC0415 - SciPy loads there

        x, y = problem.scaled_inputs()
        promise = kernel_theory(x, y, scale=1.0, features="positive", m=self.rank, directions=self.directions)
        if promise is None or self.m >= problem.n_k:
            return None
        window, variance = _window(problem, self.m), promise.log_variance_rows

        def rows(start: int, stop: int) -> NDArray[np.float64]:
            assert variance is not None  # noqa: S101 - for the type checker: it is asked for below
            place = np.arange(problem.n_k)
            first, last = window.first[start:stop, None], window.last[start:stop, None]
            return np.where((place >= first) & (place < last), -np.inf, variance(start, stop))

        return replace(
            promise, name="features outside the window", log_variance_rows=None if variance is None else rows
        )

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Features; exact logits in the window; the running sums before and behind it."""
        from sympy import Symbol  # noqa: PLC0415 - SymPy loads with the first formula

        n_q, n_k, d, d_v = costs.symbols_of(problem)
        tokens, (pairs, flows) = n_q + n_k, _flows(problem, self.m)
        f = costs.m if self.features is None else Symbol("features")
        ensemble = ENSEMBLES[self.directions]
        drawn = ensemble.draw_cost(f, d) + ensemble.project_cost(tokens, f, d)
        norms: costs.Operations = tokens * (costs.Operations(mul=2 * d + 1) + costs.formulas.sum_of(d))
        logs = costs.Operations(add=tokens * f + n_q)
        near = costs.Operations(madd=pairs * d, compare=pairs, add=pairs + n_q, exp=pairs + n_q, mul=pairs)
        op, far = _Shape(f, n_q, pairs, flows), costs.Operations()
        for flow in flows:
            entered: costs.Operations = costs.Operations(compare=1, add=1, exp=1) * ((flow.keys + flow.steps) * f)
            far += entered + costs.Operations(add=2 * n_q * f, compare=n_q * f, exp=n_q * f)
        sums = op.apply(1) if flows else costs.Operations(add=pairs - n_q)
        prepare = drawn + norms + logs + near + far + sums + costs.Operations(compare=2 * n_q)
        return costs.Cost(prepare=prepare, apply=op.apply(d_v) + costs.Operations(div=n_q * d_v))


class _Window(NamedTuple):
    """The window of each query, first and one past the last key (n_q,), in tiles; steps before and behind it."""

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    groups: list[tuple[int, int, int]]
    passes: list[list[Step]]

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key of its window."""
        return int((self.last - self.first).sum())


def _window(problem: AttentionProblem, m: int) -> _Window:
    """Windows of m keys around the middle of each tile, in the causal form those that end with its last query."""
    n_q, n_k = problem.n_q, problem.n_k
    groups = row_groups(0, n_q, tile=low_tile(m))
    starts = np.concatenate([start + tall * np.arange(tiles) for start, tiles, tall in groups])
    heights = np.concatenate([np.full(tiles, tall) for _, tiles, tall in groups])
    if problem.causal:
        low = np.maximum(starts + heights - m, 0)
    else:
        low = np.clip(np.minimum(starts + heights // 2, n_k - 1) - m // 2, 0, n_k - m)
    first = np.repeat(low, heights)
    last = np.arange(n_q) + 1 if problem.causal else first + m
    ends = [(int(s), int(s + h)) for s, h in zip(starts, heights, strict=True)]
    before, behind = [int(j) for j in low], [int(j) + m for j in low]
    passes = [[Step(*rows, a, b) for rows, a, b in zip(ends, [0, *before[:-1]], before, strict=True)]]
    if not problem.causal:
        entering = zip(ends, behind, [*behind[1:], n_k], strict=True)
        passes.append([Step(*rows, a, b) for rows, a, b in reversed(list(entering))])
    return _Window(first, last, groups, passes)


def _near(problem: AttentionProblem, x: Array, y: Array, window: _Window) -> tuple[list[Panel], Array]:
    """exp(logits − largest) in the windows, and the largest logits (..., n_q), −∞ where a mask hides all of them."""
    xp, device = problem.xp, device_of(x)
    panels, tops = [], []
    for start, tiles, tall in window.groups:
        rows = slice(start, start + tiles * tall)
        first, last = (a[rows].reshape(tiles, tall, 1) for a in (window.first, window.last))
        width = int((last - first).max())
        place = first[:, :1, 0] + np.arange(width)
        keys = xp.asarray(np.minimum(place, problem.n_k - 1), device=device)
        seen = xp.asarray(place[:, None, :] < last, device=device)
        block = to_tiles(x[..., rows, :], tall)
        weights, top = tile_softmax(block, y, keys, seen, problem.key_mask, repeated=seen & ~seen)
        panels.append(Panel(weights, keys))
        tops.append(xp.reshape(top, (*top.shape[:-2], -1)))
    return panels, xp.concat(tops, axis=-1)


class _Pass(NamedTuple):
    """Running sums of keys in one direction: the log-features of queries with the scale of the state that they read."""

    log_q: Array
    right: Array
    decay: Array
    steps: list[Step]

    @classmethod
    def run(cls, log_q: Array, log_k: Array, steps: list[Step]) -> _Pass:
        """Let the keys enter and carry the largest of each log-feature along."""
        xp = namespace(log_k)
        top = xp.full_like(log_k[..., :1, :], -xp.inf)
        read, right, decay = {}, {}, []
        for step in steps:
            if step.enters:
                block = log_k[..., step.first_key : step.last_key, :]
                new = xp.maximum(top, xp.max(block, axis=-2, keepdims=True))
                scale = xp.where(new > -xp.inf, new, xp.zeros_like(new))  # every key that has entered is hidden
                right[step.first_key] = xp.exp(block - scale)
                decay.append(xp.exp(top - scale))
                top = new
            read[step.first_row] = log_q[..., step.first_row : step.last_row, :] + top
        first, last = min(right), max(step.last_key for step in steps if step.enters)
        outside = [xp.zeros_like(log_k[..., :first, :]), xp.zeros_like(log_k[..., last:, :])]
        right_rows = [outside[0], *(right[key] for key in sorted(right)), outside[1]]
        rows = xp.concat([read[row] for row in sorted(read)], axis=-2)
        return cls(rows, xp.concat(right_rows, axis=-2), xp.concat(decay, axis=-2), steps)


class _Flow(NamedTuple):
    """One pass: the keys that enter, the steps at which any does, and the rows that read what has entered."""

    keys: Any
    steps: Any
    rows: Any


class _Shape(NamedTuple):
    """Costs of the sum of tiles and running sums: f features, n_q rows, pairs in tiles, and what flows in each pass."""

    features: Any
    rows: Any
    pairs: Any
    flows: list[_Flow]

    def apply(self, width: Any) -> costs.Operations:
        """Product with an n_k × width matrix."""
        total = costs.Operations(madd=self.pairs * width)
        for flow in self.flows:
            update = (flow.steps - 1) * self.features * width
            total += costs.Operations(madd=(flow.keys + flow.rows) * self.features * width, mul=update, add=update)
            total += costs.Operations(add=self.rows * width)
        return total


def _flows(problem: AttentionProblem, m: int) -> tuple[Any, list[_Flow]]:
    """Pairs in the windows and what flows in each pass: formulas in n, or numbers where n_q and n_k differ."""
    if problem.n_q == problem.n_k > m:
        return _causal_flow(m) if problem.causal else _flows_both_ways(m)
    window, flows = _window(problem, m), []
    for steps in window.passes:
        entering = [i for i, step in enumerate(steps) if step.enters]
        if entering:
            keys = sum(steps[i].last_key - steps[i].first_key for i in entering)
            reading = sum(step.last_row - step.first_row for step in steps[entering[0] :])
            flows.append(_Flow(keys, len(entering), reading))
    return window.pairs, flows


def _causal_flow(m: int) -> tuple[Any, list[_Flow]]:
    """Tiles of h queries: the first to see only part of the keys before it is the one that reaches beyond key m."""
    from sympy import Min, Mod, ceiling, floor  # noqa: PLC0415 - SymPy loads with the first formula

    n, h = costs.symbols.n, low_tile(m)
    tiles, full, rest = ceiling(n / h), floor(n / h), Mod(n, h)
    first = Min(m // h, tiles - 1)
    whole = first * h * (first * h + 1) / 2
    pairs = whole + (full - first) * (h * (m - h) + h * (h + 1) // 2) + rest * (m - rest) + rest * (rest + 1) / 2
    return pairs, [_Flow(n - m, tiles - first, n - first * h)]


def _flows_both_ways(m: int) -> tuple[Any, list[_Flow]]:
    """Windows move from the first tile whose middle lies more than m/2 keys in to the last that is m/2 from the end."""
    from sympy import Min, ceiling  # noqa: PLC0415 - SymPy loads with the first formula

    n, h = costs.symbols.n, low_tile(m)
    last_tile, margin = ceiling(n / h) - 1, m // 2 - h // 2
    first = Min(margin // h + 1, last_tile)
    last = Min(ceiling((n - m + margin) / h), last_tile)
    steps = last - first + 1
    return n * m, [_Flow(n - m, steps, n - first * h), _Flow(n - m, steps, last * h)]


def _exp_below(log: Array, scale: Array) -> Array:
    return exp_in_place(log - scale)


def _logs(features: Features, log_factor: float | None = None) -> Array:
    """Logarithms of the features times a factor, (..., n, f)."""
    log, row = features.log, features.row
    assert log is not None  # noqa: S101 - for the type checker: positive features have both
    assert row is not None  # noqa: S101
    return log + (row if log_factor is None else row + log_factor)
