"""Boxes of a hierarchy of tokens: which pairs of boxes are near, and on which level a pair is far.

Box i of level l holds the tokens i s 2^l to (i + 1) s 2^l. It counts from the first token, not from the number of
tokens, so a sequence that grows keeps its boxes, and leaving away the last keys is the same as hiding them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from nla_llm.backend import Array, device_of, namespace
from nla_llm.methods.attention.sparse.tiles import row_groups, tile_softmax, to_tiles
from nla_llm.methods.registry import Properties
from nla_llm.operators import Panel

if TYPE_CHECKING:
    from numpy.typing import NDArray


__all__ = [
    "PROMISES",
    "Boxes",
    "Level",
    "Near",
    "boxes_of",
    "known",
    "near_counts",
    "near_field",
]


PROMISES = Properties(
    family="hierarchical", budget="m", converges=True, permutation_equivariant=False,
    supports=frozenset({"causal", "key_mask"}),
    refusals={
        "window": "the far field is what a window leaves away, and the near field is a sliding window",
        "bias": "a bias belongs to pairs of tokens, and far pairs are not looked at one by one",
    },
)  # fmt: skip


class Level(NamedTuple):
    """Far pairs of a level: boxes of ``size`` tokens, those of the queries (B,) and those of the keys (B,)."""

    size: int
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]


class Near(NamedTuple):
    """Tiles of the near field: their first row, the keys of each (T, s) and which of them a query sees (T, b, s)."""

    start: int
    keys: NDArray[np.int64]
    seen: NDArray[np.bool_]


class Boxes(NamedTuple):
    """A matrix as near tiles and far blocks, each entry once.

    Two boxes of a level are neighbours where their numbers differ by ``reach`` at most. Neighbours of the finest level
    are near; boxes of a level that are no neighbours, but whose parents are, are far.
    """

    n_q: int
    n_k: int
    size: int
    reach: int
    causal: bool

    @property
    def levels(self) -> list[Level]:
        """Far pairs of each level from the finest on; the last one has some."""
        levels, size = [], self.size
        while max(self.n_q, self.n_k) > size * (self.reach + 1):
            rows, offsets = np.arange(-(-self.n_q // size)), np.arange(-2 * self.reach - 1, 2 * self.reach + 2)
            i = np.repeat(rows, len(offsets))
            j = i + np.tile(offsets, len(rows))
            far = (np.abs(i - j) > self.reach) & (np.abs(i // 2 - j // 2) <= self.reach)
            far &= (j >= 0) & (j < -(-self.n_k // size)) & ((j < i) | (not self.causal))
            if far.any():
                levels.append(Level(size, i[far], j[far]))
            size *= 2
        return levels

    def near(self) -> list[Near]:
        """Tiles of neighbouring leaves; queries that lie beyond all keys may see none of them."""
        found = []
        for start, tiles, tall in row_groups(0, self.n_q, tile=self.size):
            box = start // self.size + np.arange(tiles)
            first = np.maximum(box - self.reach, 0) * self.size
            last = np.minimum((box + (0 if self.causal else self.reach) + 1) * self.size, self.n_k)
            width = max(1, min(int(np.max(last - first)), self.n_k))
            place = first[:, None] + np.arange(width)
            seen = (place < last[:, None])[:, None, :]
            if self.causal:
                rows = start + np.arange(tiles * tall).reshape(tiles, tall, 1)
                seen = seen & (place[:, None, :] <= rows)
            seen = np.array(np.broadcast_to(seen, (tiles, tall, width)))  # PyTorch wants arrays that may be written to
            found.append(Near(start, np.minimum(place, self.n_k - 1), seen))
        return found


@lru_cache(maxsize=256)
def boxes_of(n_q: int, n_k: int, size: int, reach: int, causal: bool) -> Boxes:
    """The boxes of a problem."""
    return Boxes(n_q, n_k, size, reach, causal)


def near_field(q: Array, k: Array, mask: Array | None, boxes: Boxes) -> tuple[list[Panel], Array]:
    """exp(logits − largest) of scaled queries in the near field; the largest (..., n_q), −∞ where none is visible."""
    panels, tops = [], []
    xp, device = namespace(q), device_of(q)
    nothing = xp.zeros((1, 1, 1), dtype=xp.bool, device=device)
    for near in boxes.near():
        tiles, tall, _ = near.seen.shape
        keys, seen = (xp.asarray(a, device=device) for a in (near.keys, near.seen))
        block = to_tiles(q[..., near.start : near.start + tiles * tall, :], tall)
        weights, top = tile_softmax(block, k, keys, seen, mask, repeated=nothing)
        panels.append(Panel(weights, keys))
        tops.append(xp.reshape(top, (*top.shape[:-2], -1)))
    return panels, known(xp.concat(tops, axis=-1))


def known(top: Array) -> Array:
    """Largest logits (..., n_q), −∞ instead of whatever stands where no key is visible, so that they compare."""
    xp = namespace(top)
    return xp.where(top > -xp.inf, top, xp.full_like(top, -xp.inf))


def near_counts(boxes: Boxes) -> tuple[int, NDArray[np.bool_]]:
    """Pairs of the near field, and which queries have any."""
    tiles = [near.seen for near in boxes.near()]
    rows = np.concatenate([seen.any(axis=-1).reshape(-1) for seen in tiles])
    return sum(int(seen.sum()) for seen in tiles), rows
