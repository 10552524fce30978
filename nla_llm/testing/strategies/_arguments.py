"""What the strategies share: the generator of a drawn seed, and the rules of their arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from hypothesis.strategies import DrawFn

__all__ = ["DTYPES", "bounds", "choices", "generator_of", "subset"]

DTYPES = ("float64", "float32")


def generator_of(draw: DrawFn) -> np.random.Generator:
    """Generator of a drawn seed."""
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


def bounds(lower_name: str, lower: float, upper_name: str, upper: float) -> None:
    """Refuse bounds that leave nothing between them."""
    if not 1 <= lower <= upper:
        raise ValueError(f"{lower_name} must be at least 1 and at most {upper_name}, got {lower} and {upper}")


def subset(name: str, given: Collection[str], known: Sequence[str]) -> None:
    """Refuse names that are not known."""
    if isinstance(given, str) or not set(given) <= set(known):
        raise ValueError(f"{name} must be a collection of names among {', '.join(known)}, got {given!r}")


def choices(name: str, given: Sequence[Any]) -> None:
    """Refuse an empty choice."""
    if isinstance(given, str) or not list(given):
        raise ValueError(f"{name} must be a sequence with at least one entry, got {given!r}")
