"""Pieces of encoded text that a model was not trained on, as they are shipped beside its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["Heldout"]


@final
class Heldout:
    """Tokens of all pieces one after the other, where each begins and the last ends, and the files they are from.

    Read from a file of NumPy with the arrays ``tokens``, ``offsets`` and ``files``.
    """

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as held:
            self._tokens, self._offsets = held["tokens"], held["offsets"]
            self.files = tuple(str(name) for name in held["files"])

    def piece(self, index: int, n: int | None = None) -> NDArray[np.int64]:
        """The first n token ids (n,) of a piece, all of them unless n is given."""
        if not 0 <= index < len(self.files):
            raise ValueError(f"piece must be in 0 ... {len(self.files) - 1}, got {index}")
        found = self._tokens[self._offsets[index] : self._offsets[index + 1]]
        if n is not None and not 1 <= n <= len(found):
            raise ValueError(f"n must be in 1 ... {len(found)}, the length of piece {index}, got {n}")
        return np.asarray(found[:n], dtype=np.int64)
