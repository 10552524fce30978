"""Laws about what the result may depend on: later keys, hidden keys, other heads, the order and origin of the keys."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from nla_llm.backend import to_numpy
from nla_llm.problems import AttentionProblem
from nla_llm.testing.subject import TOKENS, Check, Figure, Skip, Subject, at_most, compare, frobenius

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["INVARIANCES"]

JUNK = 1e4  # large and finite: what a buffer may hold behind the end of a sequence


def _shift_invariance(subject: Subject) -> Figure:
    subject.need("shift_invariant")
    problem = subject.problem()
    shift = 3.0 * subject.arrays((problem.d,), stream=1)[0]
    shifted = AttentionProblem(problem.q, problem.k + shift, problem.v)
    return compare(_matrix(subject, shifted), _matrix(subject, problem), what="change when all keys move by a constant")


def _permutation_equivariance(subject: Subject) -> Figure:
    subject.need("permutation_equivariant")
    problem = subject.problem(11, TOKENS)
    order = np.random.default_rng([subject.seed, 2]).permutation(problem.n_k)
    q, k, v = _parts(problem)
    shuffled = AttentionProblem(q, k[order], v[order])
    before = _matrix(subject, problem)[:, order]
    return compare(_matrix(subject, shuffled), before, what="columns of the permuted keys")


def _causality(subject: Subject) -> Figure:
    if subject.floor:
        raise Skip("the best matrix of its rank: a floor looks at all entries and is not triangular")
    problem = _accepted(subject, "causal", causal=True)
    before, n = _matrix(subject, problem), problem.n_k
    figures = [_share(np.triu(before, 1), before, "entries above the diagonal")]
    for first, factor in ((3, 0.01), (n // 2, -2.0), (n - 1, 4.0), (n - 1, -50.0)):  # all of them move a global maximum
        _, k, v = _parts(problem)
        k[first:] *= abs(factor) if subject.properties.partial else factor
        v[first:] = JUNK
        after = subject(AttentionProblem(problem.q, k, v, causal=True))
        figures.append(
            compare(to_numpy(after.dense())[:first], before[:first], what="earlier rows when later keys change")
        )
        figures.append(
            compare(
                to_numpy(after @ v)[:first], before[:first] @ problem.v, what="earlier outputs when later keys change"
            )
        )
    return at_most(figures)


def _window(subject: Subject) -> Figure:
    if subject.floor:
        raise Skip("the best matrix of its rank: a floor looks at all entries and is not banded")
    _, width = _accepted(subject, "window", window=9), 9
    i, j = np.indices((TOKENS, TOKENS))
    figures = []
    for causal in (False, True):
        if causal and "causal" not in subject.properties.supports:
            continue
        dense = _matrix(subject, subject.problem(window=width, causal=causal))
        hidden = (np.abs(i - j) >= width) | (causal & (j > i))
        figures.append(_share(dense[hidden], dense, "entries outside the window"))
    return at_most(figures)


def _padding(subject: Subject) -> Figure:
    """Hidden keys must not matter; for a deterministic method the result must be that of the keys that remain.

    Where positions matter, only the keys at the end can be removed without moving others.
    """
    figures = []
    trailing, scattered = np.arange(TOKENS) < TOKENS - 14, np.arange(TOKENS) % 4 != 1
    structures: list[dict[str, Any]] = [{}, {"causal": True}] if "causal" in subject.properties.supports else [{}]
    for keep, structure in product((trailing, scattered), structures):
        problem = _accepted(subject, "key_mask", key_mask=keep, **structure)
        before = subject(problem)
        dense = to_numpy(before.dense())
        _, k, v = _parts(problem)
        k[~keep] = JUNK * np.sign(k[~keep])
        v[~keep] = -JUNK
        after = to_numpy(subject(AttentionProblem(problem.q, k, v, key_mask=keep, **structure)).dense())
        figures += [
            _share(dense[:, ~keep], dense, "weight on hidden keys"),
            compare(after, dense, what="change when hidden keys and values change"),
            compare(
                before @ v, dense[:, keep] @ v[keep], what="output when hidden values change", times_eps=1e4 * JUNK
            ),
        ]
        in_place = keep is trailing or subject.properties.permutation_equivariant  # the rest keeps its positions
        if subject.properties.deterministic and in_place and not structure:
            q, k, v = _parts(problem)
            removed = AttentionProblem(q, k[keep], v[keep])
            figures.append(compare(dense[:, keep], _matrix(subject, removed), what="hiding against removing keys"))
    return at_most(figures)


def _bias(subject: Subject) -> Figure:
    if subject.floor:
        raise Skip("the best matrix of its rank: a floor looks at all entries and fills the hidden ones")
    bias = np.where(np.random.default_rng([subject.seed, 3]).random((TOKENS, TOKENS)) < 0.3, -np.inf, 0.0)
    bias[:, 0] = 0.0
    dense = _matrix(subject, _accepted(subject, "bias", bias=bias))
    return _share(dense[bias < 0], dense, "entries where the bias is -inf")


def _refusals(subject: Subject) -> None:
    if not subject.declared:
        raise Skip("supports: not declared")
    n = TOKENS
    structures: dict[str, dict[str, Any]] = {
        "causal": {"causal": True},
        "window": {"window": 9},
        "key_mask": {"key_mask": np.arange(n) < n - 5},
        "bias": {"bias": np.zeros((n, n))},
    }
    for name, options in structures.items():
        if name in subject.properties.supports:
            continue
        try:
            subject(subject.problem(**options))
        except ValueError as refusal:
            if name not in str(refusal):
                raise AssertionError(f"refused {name} without naming it: {refusal}") from refusal
        else:
            raise AssertionError(f"{name} is not declared in supports, yet the problem was accepted; raise Unsupported")


def _heads(subject: Subject) -> Figure:
    """Changing head 1 must not change head 0; without randomness head 0 alone must be the same too."""
    figures = []
    for structure in ({}, {"causal": True}):
        if structure and "causal" not in subject.properties.supports:
            continue
        problem = subject.problem(batch=(2,), **structure)
        before = _matrix(subject, problem)[0]
        q, k, v = _parts(problem)
        q[1], k[1], v[1] = 3.0 * q[1], 5.0 * k[1] + 1.0, JUNK
        changed = _matrix(subject, AttentionProblem(q, k, v, **structure))[0]
        figures.append(compare(changed, before, what="change of head 0 when head 1 changes"))
        if subject.properties.deterministic:
            alone = _matrix(subject, AttentionProblem(problem.q[0], problem.k[0], **structure))
            figures.append(compare(alone, before, what="head 0 alone against head 0 in a batch"))
    return at_most(figures)


def _grouped_queries(subject: Subject) -> Figure:
    q, k, v = subject.arrays((2, 3, TOKENS, 4), (2, 1, TOKENS, 4), (2, 1, TOKENS, 3))
    grouped = subject(AttentionProblem(q, k, v))
    if tuple(grouped.shape) != (2, 3, TOKENS, TOKENS):
        raise AssertionError(f"q {q.shape} against k {k.shape} gives an operator of shape {grouped.shape}")
    wide = AttentionProblem(q, np.repeat(k, 3, axis=1), np.repeat(v, 3, axis=1))
    repeated = subject(wide)
    figures = [compare(grouped @ v, repeated @ wide.v, what="shared against repeated keys")]
    if subject.properties.deterministic:
        figures.append(compare(grouped.dense(), repeated.dense(), what="shared against repeated keys"))
    return at_most(figures)


def _accepted(subject: Subject, name: str, **structure: Any) -> AttentionProblem:
    """A problem with the structure; skip where the method refuses it rightly. What it accepts it must honour."""
    problem = subject.problem(**structure)
    if name in subject.properties.supports:
        return problem
    try:
        subject(problem)
    except ValueError:
        raise Skip(f"{name}: not declared in supports, and refused") from None
    return problem


def _parts(problem: AttentionProblem) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Copies of queries, keys and values."""
    q, k, v = (np.array(to_numpy(a)) for a in (problem.q, problem.k, problem.v))
    return q, k, v


def _matrix(subject: Subject, problem: AttentionProblem) -> NDArray[Any]:
    return to_numpy(subject(problem).dense())


def _share(part: NDArray[Any], whole: NDArray[Any], what: str) -> Figure:
    """Size of entries that must vanish, in comparison with the matrix."""
    return Figure(frobenius(part) / max(frobenius(whole), 1e-300), 1e2 * float(np.finfo(whole.dtype).eps), what)


INVARIANCES = (
    Check("shift_invariance", "Adding a constant vector to all keys changes nothing.", _shift_invariance),
    Check("permutation_equivariance", "Permuting the keys permutes the columns.", _permutation_equivariance),
    Check("causality", "Later keys and values do not change earlier rows.", _causality),
    Check("padding", "Hidden keys do not matter: hiding is removing.", _padding),
    Check("window", "Entries outside the window are zero.", _window),
    Check("bias", "Entries with a bias of -inf are zero.", _bias),
    Check("refusals", "A structure that is not supported is refused by name, never ignored.", _refusals),
    Check("independent_heads", "No head depends on another one.", _heads),
    Check("grouped_queries", "Shared keys are as good as repeated ones.", _grouped_queries),
)
