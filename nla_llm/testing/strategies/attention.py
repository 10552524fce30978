"""Attention problems, drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import strategies as st

from nla_llm.problems import AttentionProblem
from nla_llm.testing.strategies._arguments import DTYPES, bounds, choices, generator_of, subset

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from hypothesis.strategies import DrawFn, SearchStrategy

__all__ = ["attention_problems"]

STRUCTURES = ("causal", "window", "key_mask", "bias")
LOGIT_SIZES = (1.0, 0.0, 0.1, 10.0, 50.0)  # standard deviations of the logits; the first is what shrinking ends at


def attention_problems(
    *,
    min_tokens: int = 1,
    max_tokens: int = 40,
    max_d: int = 8,
    structures: Collection[str] = STRUCTURES,
    rectangular: bool = True,
    batched: bool = True,
    values: bool = True,
    dtypes: Sequence[str] = DTYPES,
    logit_sizes: Sequence[float] = LOGIT_SIZES,
) -> SearchStrategy[AttentionProblem]:
    """Attention problems on NumPy arrays: lengths that are odd, prime or one, unequal n_q and n_k, d = 1, heads.

    Parameters
    ----------
    min_tokens, max_tokens
        Bounds of n_q and n_k.
    max_d
        Largest head dimension, and number of columns of v.
    structures
        Which of 'causal', 'window', 'key_mask', 'bias' may occur, alone or together. Masks are trailing (padding) or
        scattered; every query keeps a key.
    rectangular
        Whether n_q may differ from n_k (never together with 'causal' or 'window').
    batched
        Whether there may be leading axes: a batch, heads, or grouped queries (h, g, n, d) against (h, 1, n, d).
    values
        Whether there is a v.
    dtypes
        Names of dtypes to choose from.
    logit_sizes
        Standard deviations of the logits to choose from. The scale is sometimes 1/√d and sometimes given.

    Raises
    ------
    ValueError
        If an argument leaves nothing to draw.

    Examples
    --------
    >>> from hypothesis import given, settings
    >>> @settings(max_examples=10, derandomize=True, database=None, deadline=None)
    ... @given(attention_problems(structures=("causal",), batched=False))
    ... def first_row_sees_itself(problem):
    ...     if problem.causal:
    ...         assert abs(problem.exact().dense()[0, 0] - 1) < 1e-12
    >>> first_row_sees_itself()
    """
    bounds("min_tokens", min_tokens, "max_tokens", max_tokens)
    bounds("1", 1, "max_d", max_d)
    subset("structures", structures, STRUCTURES)
    choices("dtypes", dtypes)
    choices("logit_sizes", logit_sizes)
    allowed = [s for s in STRUCTURES if s in structures]

    @st.composite
    def problems(draw: DrawFn) -> AttentionProblem:
        chosen = draw(st.sets(st.sampled_from(allowed))) if allowed else set()
        n_k = draw(st.integers(min_tokens, max_tokens))
        square = not rectangular or bool(chosen & {"causal", "window"})
        n_q = n_k if square else draw(st.integers(min_tokens, max_tokens))
        d, d_v = draw(st.integers(1, max_d)), draw(st.integers(1, max_d))
        batch_q, batch_k = draw(_batches()) if batched else ((), ())
        rng, dtype = generator_of(draw), np.dtype(draw(st.sampled_from(list(dtypes))))
        # the logits of standard normal q and k have standard deviation 1 with the scale 1/√d
        size = draw(st.sampled_from(list(logit_sizes)))
        given_scale = draw(st.booleans())
        q = rng.standard_normal((*batch_q, n_q, d)) * (1.0 if given_scale else size)
        k = rng.standard_normal((*batch_k, n_k, d))
        v = rng.standard_normal((*batch_k, n_k, d_v)).astype(dtype) if values else None
        scale = size / d**0.5 if given_scale else None
        options = _structure(draw, chosen, n_q=n_q, n_k=n_k, batch=batch_k, rng=rng)
        if "bias" in options:
            options["bias"] = options["bias"].astype(dtype)
        return AttentionProblem(q.astype(dtype), k.astype(dtype), v, scale=scale, **options)

    return problems()


@st.composite
def _batches(draw: DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Leading axes of q and of k: none, the same, or shared keys for a group of queries."""
    kind = draw(st.sampled_from(["none", "same", "grouped"]))
    if kind == "none":
        return (), ()
    if kind == "same":
        batch = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
        return batch, batch
    heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    return (heads, group), (heads, 1)


def _structure(
    draw: DrawFn, chosen: set[str], *, n_q: int, n_k: int, batch: tuple[int, ...], rng: np.random.Generator
) -> dict[str, Any]:
    """The options of the chosen structures.

    The keys 0, w, 2w, … for a window w (key 0 alone without one) are never hidden, so that every query sees a key.
    """
    options: dict[str, Any] = {"causal": "causal" in chosen}
    if "window" in chosen:
        options["window"] = draw(st.integers(1, n_k))
    kept = np.arange(n_k) % options.get("window", n_k) == 0
    if "key_mask" in chosen:
        trailing = draw(st.booleans())
        mask = np.arange(n_k) < draw(st.integers(1, n_k)) if trailing else rng.random((*batch, n_k)) < 0.6
        options["key_mask"] = np.broadcast_to(mask | kept, (*batch, n_k)).copy()
    if "bias" in chosen:
        bias = rng.standard_normal((n_q, n_k))
        hidden = rng.random((n_q, n_k)) < (0.3 if draw(st.booleans()) else 0.0)
        options["bias"] = np.where(hidden & ~kept, -np.inf, bias)
    return options
