"""Sparse attention in buckets of a hash: queries see the keys that point in nearly the same direction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, NamedTuple, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, by_heads, device_of, from_numpy, generator, namespace
from nla_llm.methods.attention.floors import few_entries_floor
from nla_llm.methods.attention.sparse.tiles import enough_keys, low_tile, rescaled, row_groups, tile_softmax, to_tiles
from nla_llm.methods.registry import Properties, register, require, settle, whole_number
from nla_llm.operators import Panel, RowNormalised, TiledSparse, gather_rows

if TYPE_CHECKING:
    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["Reformer"]

_MOST_BUCKETS = 64  # of one hash: more would make hashing as dear as attention


@register("reformer")
@final
@dataclass(frozen=True)
class Reformer:
    """Softmax over keys of the same bucket of an angular hash and of the neighbouring buckets.

    Kitaev et al. 2020, arXiv 2001.04451, section 2: h(x) = argmax [Rx; −Rx] for Gaussian R, tokens are sorted by their
    bucket, and chunks of the sorted sequence attend to their own surroundings. Published for keys equal to queries;
    here both are hashed as they are, by the same R (h does not depend on lengths). Where it takes more than 64 buckets
    to have m/2 keys in each on average, a bucket is a pair or triple of hashes, as in the paper's own program; the work
    grows as n log n. A chunk of ⌈m/4⌉ sorted queries, at most 64, sees the m sorted keys around the middle of the
    bucket of its middle query.
    With several rounds, the m keys of a query are dealt to them, each round has an R of its own, and softmax runs over
    the union: a pair that several rounds find counts once, as the published merge achieves by dividing by their number.
    Keys of one bucket keep their order, and with a border of a window inside the bucket it decides which are seen.

    Parameters
    ----------
    m
        Keys that a query sees in all rounds together; fewer where rounds find the same.
    rounds
        Number of hashes. Only one round sees all keys at m = n_k.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> k = np.array([[1.0, 0.0], [-1.0, 0.1], [0.9, 0.1], [-0.9, 0.0]])
    >>> (Reformer(2)(AttentionProblem(20 * k, k), rng=0).dense() > 1e-6).astype(int).tolist()
    [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    """

    m: int
    rounds: int = 1
    properties: ClassVar[Properties] = Properties(
        family="content", budget="m", converges=True, nonnegative=True, deterministic=False,
        permutation_equivariant=False, supports=frozenset({"key_mask"}),
        refusals={
            "causal": "a later key changes the sorted order, and with it which keys an earlier query sees",
            "window": "buckets know no places",
            "bias": "an n × n array, of which only the pairs in buckets would be read",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        whole_number("rounds", self.rounds)
        if self.rounds > 1:
            object.__setattr__(self, "properties", replace(type(self).properties, converges=False))

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of class RowNormalised over tiles in the order of the buckets."""
        require(self, problem)
        enough_keys(self.m, problem)
        xp, rng, q = problem.xp, generator(rng), problem.scale * problem.q
        rounds = [_Round.hashed(problem, q, m, rng) for m in self.keys_of_rounds]
        parts = [_round_softmax(problem, q, r, rounds[:i], several=len(rounds) > 1) for i, r in enumerate(rounds)]
        order = xp.concat([r.order for r in rounds], axis=-2)
        panels, top = [panel for part, _ in parts for panel in part], parts[0][1]
        if len(rounds) == 1:
            op = TiledSparse(panels, _shape(problem), order=order, nonnegative=True)
            return RowNormalised(op, row_scale_log=_unsorted(top, rounds[0].order))
        tops = [_unsorted(t, r.order) for (_, t), r in zip(parts, rounds, strict=True)]
        common = xp.max(xp.stack(tops, axis=-1), axis=-1)
        panels = []
        for (part, t), r in zip(parts, rounds, strict=True):
            panels += rescaled(part, xp.exp(t - _sorted(common, r.order)))
        return RowNormalised(TiledSparse(panels, _shape(problem), order=order, nonnegative=True), row_scale_log=common)

    @property
    def keys_of_rounds(self) -> list[int]:
        """Keys that a query sees in each round, which add up to m."""
        share, rest = divmod(self.m, self.rounds)
        return [share + (i < rest) for i in range(self.rounds) if share + (i < rest)]

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of m keys a query; which keys hash alike is not known before."""
        return few_entries_floor(problem, np.full(problem.n_q, self.m))

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Hashing of queries and keys, softmax over the pairs of all rounds, and what it takes to merge these.

        The numbers of directions are those of the sizes of the problem.
        """
        n_q, n_k, d, d_v = costs.symbols_of(problem)
        f, m, rounds = costs.formulas, costs.m, len(self.keys_of_rounds)
        hashes = costs.Operations(mul=n_q * d)
        for share in self.keys_of_rounds:
            directions = int(np.prod(_directions(share, problem.n_k)[:2]))
            hashes += costs.Operations(draw=directions * d, compare=(n_q + n_k) * directions)
            hashes += f.matmul(n_q + n_k, d, directions)
        pairs = n_q * m
        softmax = costs.Operations(madd=pairs * d, compare=pairs - rounds * n_q, add=pairs, exp=pairs)
        sums = costs.Operations(add=pairs - n_q, compare=2 * n_q)
        merge = costs.Operations()
        if rounds > 1:
            rows = rounds * n_q
            merge = costs.Operations(compare=rows + rows - n_q, add=rows, exp=rows, mul=pairs)
        apply = f.matmul(n_q, m, d_v) + costs.Operations(add=(rounds - 1) * n_q * d_v, div=n_q * d_v)
        return costs.Cost(prepare=hashes + softmax + sums + merge, apply=apply)


class _Round(NamedTuple):
    """One hash: the order of the queries, (..., 1, n_q), the keys that tiles see, and the places of both.

    ``keys`` holds an array (..., T, m) for each group of tiles, ``begins`` (..., n_q) the place of the first of them
    for each query, ``places`` (..., n_k) the place of each key in the sorted sequence.
    """

    m: int
    order: Array
    keys: list[Array]
    begins: Array
    places: Array

    @classmethod
    def hashed(cls, problem: AttentionProblem, q: Array, m: int, rng: np.random.Generator) -> _Round:
        """Queries and keys sorted by the buckets of one rotation."""
        xp, n_q, n_k, device = problem.xp, problem.n_q, problem.n_k, device_of(q)
        hashes, directions = _directions(m, n_k)
        drawn = rng.standard_normal((hashes, directions, problem.d))
        rotations = xp.astype(from_numpy(drawn, like=q), q.dtype)
        of_queries, of_keys = (by_heads(partial(_bucket, rotations), x) for x in (q, problem.k))
        visible = xp.asarray(n_k, device=device)
        if problem.key_mask is not None:  # hidden keys come last
            last = xp.full_like(of_keys, (2 * directions) ** hashes)
            of_keys = xp.where(problem.key_mask, of_keys, last)
            visible = xp.sum(xp.astype(problem.key_mask, of_keys.dtype), axis=-1)[..., None]
        order, key_order = xp.argsort(of_queries, axis=-1), xp.argsort(of_keys, axis=-1)
        of_queries, of_keys = xp.sort(of_queries, axis=-1), xp.sort(of_keys, axis=-1)
        keys, begins = [], []
        for start, tiles, tall in row_groups(0, n_q, tile=low_tile(m)):
            middle = start + tall // 2 + tall * xp.arange(tiles, device=device)
            begin = _middle_of_buckets(xp.take(of_queries, middle, axis=-1), of_keys) - m // 2
            begin = xp.minimum(begin, visible - m)
            begin = xp.maximum(begin, xp.zeros_like(begin))
            window = begin[..., None] + xp.arange(m, device=device)
            keys.append(gather_rows(key_order[..., None], window)[..., 0])
            begins.append(xp.repeat(begin, tall, axis=-1))
        begins = _unsorted(xp.concat(begins, axis=-1), order[..., None, :])
        return cls(m, order[..., None, :], keys, begins, xp.argsort(key_order, axis=-1))


def _bucket(rotations: Array, x: Array) -> Array:
    """Number of the bucket of each token, (..., n): argmax [Rx; −Rx] for each R of (hashes, directions, d)."""
    xp, bucket = namespace(x), None
    for i in range(rotations.shape[0]):
        projection = x @ xp.matrix_transpose(rotations[i, ...])
        place = xp.argmax(xp.abs(projection), axis=-1)
        chosen = xp.take_along_axis(projection, place[..., None], axis=-1)[..., 0]
        place = xp.where(chosen < 0, place + rotations.shape[1], place)
        bucket = place if bucket is None else 2 * rotations.shape[1] * bucket + place
    return bucket


def _middle_of_buckets(buckets: Array, of_keys: Array) -> Array:
    """Place of the middle of each bucket (..., T), in ascending order, in the sorted buckets of the keys (..., n_k)."""
    xp = namespace(buckets)
    batch = np.broadcast_shapes(buckets.shape[:-1], of_keys.shape[:-1])
    buckets, of_keys = (xp.broadcast_to(a, (*batch, a.shape[-1])) for a in (buckets, of_keys))
    tiles, n = buckets.shape[-1], of_keys.shape[-1]

    def ranks(first: Array, second: Array) -> Array:
        return xp.argsort(xp.argsort(xp.concat([first, second], axis=-1), axis=-1), axis=-1)

    # a stable sort puts equals in the order of the concatenation: before, respectively after, the keys of the bucket
    before = ranks(buckets, of_keys)[..., :tiles] + ranks(of_keys, buckets)[..., n:]
    return before // 2 - xp.arange(tiles, device=device_of(buckets))


def _round_softmax(
    problem: AttentionProblem, q: Array, r: _Round, earlier: list[_Round], *, several: bool
) -> tuple[list[Panel], Array]:
    """Panels of one round, and the largest logit of each of its rows (..., n_q), in the order of the round."""
    xp, ordered = problem.xp, gather_rows(q, r.order)[..., 0, :, :]
    panels, tops = [], []
    for (start, tiles, tall), keys in zip(row_groups(0, problem.n_q, tile=low_tile(r.m)), r.keys, strict=True):
        rows = slice(start, start + tiles * tall)
        seen = xp.ones((tiles, tall, r.m), dtype=xp.bool, device=device_of(q))
        repeated = seen & ~seen if several else None
        for other in earlier:
            begin = to_tiles(_sorted(other.begins, r.order)[..., rows, None], tall)
            place = xp.matrix_transpose(gather_rows(other.places[..., None], keys))
            repeated = repeated | ((place >= begin) & (place < begin + other.m))
        block = to_tiles(ordered[..., rows, :], tall)
        weights, top = tile_softmax(block, problem.k, keys, seen, problem.key_mask, repeated=repeated)
        panels.append(Panel(weights, keys))
        tops.append(xp.reshape(top, (*top.shape[:-2], -1)))
    return panels, xp.concat(tops, axis=-1)


def _sorted(a: Array, order: Array) -> Array:
    """Numbers of queries (..., n_q) in the order (..., 1, n_q)."""
    return gather_rows(a[..., None], order)[..., 0, :, 0]


def _unsorted(a: Array, order: Array) -> Array:
    """Numbers in the order (..., 1, n_q) as those of the queries."""
    return _sorted(a, namespace(order).argsort(order, axis=-1))


def _directions(m: int, n: int) -> tuple[int, int]:
    """Hashes, and rows of the R of each: together buckets of m/2 keys on average, or of a few less."""
    buckets, hashes, directions = 2 * -(-n // m), 1, 1
    while _MOST_BUCKETS**hashes < buckets:
        hashes += 1
    while (2 * directions) ** hashes < buckets:
        directions += 1
    return hashes, directions


def _shape(problem: AttentionProblem) -> tuple[int, ...]:
    return (*problem.batch_shape, problem.n_q, problem.n_k)
