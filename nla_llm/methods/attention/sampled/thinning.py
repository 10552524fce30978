"""Thinformer: keys thinned by kernel halving, so that those that are left stand for those that are gone."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from functools import cache
from math import log
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, constant, device_of, from_numpy, generator, is_numpy, namespace, parallel
from nla_llm.methods.attention.floors import few_columns_floor
from nla_llm.methods.attention.sampled.samples import (
    values_of_operator,
    weighted_sample_attention,
    weighted_sample_attention_cost,
)
from nla_llm.methods.registry import Properties, positive, register, require, settle, whole_number
from nla_llm.operators import Selection

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["Halving", "Thinformer", "halvings"]

_WORTH_GROUPS, _GROUP_ENTRIES = 1 << 16, 1 << 16  # entries: a Gram matrix of a group is a quarter of a MiB (measured)


class Halving(NamedTuple):
    """A step of the plan: ``buckets`` buckets of ``pairs`` pairs, one of each pair survives; ``kept`` points go on."""

    buckets: int
    pairs: int
    kept: int = 0


class _Tokens(NamedTuple):
    """Keys times the root of |scale| and values of size one; hidden tokens are zero."""

    keys: Array  # (..., n, d)
    values: Array | None  # (..., n, c)
    top: Array  # largest |key|², (..., 1, 1)


class _Pairs(NamedTuple):
    """Weights of both points of each pair, whether they are equal, and the coin that decides where they are not."""

    first: Array
    second: Array
    equal: Array
    coin: Array


@register("thinformer")
@final
@dataclass(frozen=True)
class Thinformer:
    """m weighted keys that stand for all of them, by repeated kernel halving in buckets (KH-Compress).

    Carrell, Gong, Shetty, Dwivedi and Mackey 2025, arXiv 2502.12063, Section 4; kernel halving: Dwivedi and Mackey
    2021, arXiv 2110.01593. Keys are paired; of each pair one survives with the weight of both, chosen by a
    self-balancing walk that keeps the signed sum of the differences small in the norm of the attention kernel

        K((k, v), (k', v')) = exp(k·k' |scale|) (v·v'/max|v|² + 1),

    then the other one instead with probability ½ for a whole bucket. Buckets grow from ``bucket`` keys by two in every
    round while their number falls by four, as published. Every key has the expected weight one, so the kernel is
    unbiased, E Â = A.

    The published code first drops keys until a power of four is left and always returns 2^g √n. Here nothing is
    dropped: an odd bucket is filled with a point of weight zero, which never survives against a key, and a last partial
    round pairs only as many as are too many, so that exactly m are left for any n and m. Masked keys have weight zero;
    they are not removed before the pairing, so with masks fewer than m of the survivors are keys.

    Parameters
    ----------
    m
        Keys that are left, at most n_k.
    bucket
        Keys in a bucket of the first round, to within a factor of two.
    delta
        δ of the walk, whose threshold is ½ + log(2 S₀ R n/(S δ)) in units of the largest squared difference, in a
        bucket of S keys out of R rounds that began with S₀: the walk only differs from fair coins once the sum
        approaches that.
    greedy
        Always take the one that makes the signed sum smaller, a threshold of zero: not covered by the theory of the
        walk, unbiased all the same. On values that vary smoothly with the keys it leaves less than half of the error.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> k = np.linspace(-1, 1, 16)[:, None]
    >>> problem = AttentionProblem(k, k)
    >>> error = problem.exact() @ k - Thinformer(8, greedy=True)(problem, rng=0) @ k
    >>> bool(abs(error).max() < 0.1)
    True
    """

    m: int
    _: KW_ONLY
    bucket: int = 64
    delta: float = 0.5
    greedy: bool = False
    properties: ClassVar[Properties] = Properties(
        family="thinning", budget="m", converges=True, unbiased=True, nonnegative=True, deterministic=False,
        permutation_equivariant=False, supports=frozenset({"key_mask"}),
        refusals={"causal": "which keys survive depends on all of them, later ones included"},
        exceptions={"beats_random_keys": "no subset of keys is nearer to a flat matrix; what is nearer is its product "
                    "with values that vary smoothly with the keys"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        whole_number("bucket", self.bucket, at_least=2)
        positive("delta", self.delta, at_most=1)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of rank at most m; the same random numbers serve all heads."""
        require(self, problem)
        rng, n, xp, q = generator(rng), problem.n_k, problem.xp, problem.q
        if self.m > n:
            raise ValueError(f"m={self.m} keys cannot be left of n_k={n}; pass m <= n_k")
        tokens = _tokens(problem)
        index = xp.arange(n, device=device_of(q))
        weight = xp.ones((n,), dtype=q.dtype, device=device_of(q))
        if problem.key_mask is not None:
            weight = xp.astype(problem.key_mask, q.dtype)
        plan = halvings(n, self.m, self.bucket)
        for step in plan:
            threshold = 0.0 if self.greedy else self._threshold(n, step, plan)
            index, weight = _halve(tokens, index, weight, step, threshold, rng)
        some = weight > 0
        log_weight = xp.log(xp.where(some, weight, xp.ones_like(weight)))
        sample = Selection(index, n, like=q)
        log_weight = xp.where(some, log_weight, constant(-xp.inf, like=q))
        return weighted_sample_attention(problem, sample, log_weight=log_weight)

    def _threshold(self, n: int, step: Halving, plan: tuple[Halving, ...]) -> float:
        """Threshold of the walk in units of the largest squared difference."""
        return 0.5 + log(2 * plan[0].pairs * len(plan) * n / (step.pairs * self.delta))

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of weights on m keys alone."""
        return few_columns_floor(problem, self.m)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Scaled tokens, the halvings of the plan (which counts its steps), then attention on a sample of m keys."""
        import sympy  # noqa: PLC0415 - loads only where a cost is asked for

        _, n, d, d_v = costs.symbols_of(problem)
        m, f, o = costs.m, costs.formulas, costs.Operations
        total = {name: function(n, m, sympy.Symbol("bucket")) for name, function in _plan_sums().items()}
        gram, pairs, half = total["gram"], total["pairs"], total["half"]
        work = o(mul=2 * n * d) + f.sum_of(d, times=n) + f.maximum_of(n)
        work += o(madd=gram * d, add=gram, compare=gram, exp=gram) + o(add=total["differences"])
        if problem.v is not None:
            work += f.maximum_of(n * d_v) + o(compare=1, div=n * d_v) + o(madd=gram * d_v, add=gram, mul=gram)
        work += o(compare=2 * pairs, add=pairs, mul=pairs, draw=pairs + total["buckets"])  # weights, coins
        work += o(compare=pairs, mul=half, add=half)  # the walk
        if not self.greedy:
            work += o(compare=pairs + total["running"], sqrt=pairs, mul=3 * pairs, add=pairs)  # its threshold
        return costs.Cost(prepare=work + o(compare=m, exp=m)) + weighted_sample_attention_cost(problem, m)


# -- the plan ----------------------------------------------------------------------------------------------------------


def halvings(n: int, m: int, bucket: int) -> tuple[Halving, ...]:
    """Steps that leave exactly m of n keys, buckets growing by two while their number falls by four.

    While there are 2m or more, all are halved; then as many pairs as there are points too many, in buckets of the same
    size and a smaller one. A step that pairs more points than there are fills up with points of weight zero.

    Examples
    --------
    >>> halvings(100, 16, 32)
    (Halving(buckets=2, pairs=25, kept=0), Halving(buckets=1, pairs=25, kept=0), Halving(buckets=1, pairs=9, kept=7))
    """
    buckets, points, steps = 1, n, []
    while n >= 2 * buckets * bucket:
        buckets *= 2
    while points >= 2 * m:
        pairs = -(-points // (2 * buckets))
        steps.append(Halving(buckets, pairs))
        points, buckets = buckets * pairs, max(1, buckets // 4)
    surplus, size = points - m, -(-points // (2 * buckets))
    for count, pairs in ((surplus // size, size), (1, surplus % size)):
        if count * pairs:
            points -= count * pairs
            steps.append(Halving(count, pairs, points - count * pairs))
    return tuple(steps)


@cache
def _plan_sums() -> dict[str, Any]:
    """Sums over the steps of a plan as functions of (n, m, bucket) that evaluate at whole numbers."""
    terms = {
        "gram": lambda c, p: 4 * c * p**2,
        "differences": lambda c, p: 3 * c * p**2,
        "pairs": lambda c, p: c * p,
        "buckets": lambda c, p: c,  # noqa: ARG005
        "half": lambda c, p: c * p * (p - 1) // 2,
        "running": lambda c, p: c * sum(p - s for s in _shifts(p)),
    }

    def summed(name: str, term: Any) -> Any:
        def total(n: int, m: int, bucket: int) -> int:
            return int(sum(term(step.buckets, step.pairs) for step in halvings(n, m, bucket)))

        return costs.symbols.size_function(f"thinning_{name}", total)

    return {name: summed(name, term) for name, term in terms.items()}


# -- kernel halving ----------------------------------------------------------------------------------------------------


def _tokens(problem: AttentionProblem) -> _Tokens:
    xp = problem.xp
    keys, values = abs(problem.scale) ** 0.5 * problem.k, None
    if problem.v is not None:
        values = values_of_operator(problem)
    if problem.key_mask is not None:
        keep = problem.key_mask[..., None]
        keys = xp.where(keep, keys, constant(0.0, like=keys))
        values = None if values is None else xp.where(keep, values, constant(0.0, like=values))
    top = xp.max(xp.sum(keys * keys, axis=-1, keepdims=True), axis=-2, keepdims=True)
    if values is not None:
        size = xp.max(xp.abs(values), axis=(-2, -1), keepdims=True)
        values = values / xp.where(size > 0, size, xp.ones_like(size))
    return _Tokens(keys, values, top)


def _halve(  # noqa: PLR0917 - the state of the thinning and its step
    tokens: _Tokens, index: Array, weight: Array, step: Halving, threshold: float, rng: np.random.Generator
) -> tuple[Array, Array]:
    """One of each pair survives with the weight of both: the new points and their weights, (..., buckets · pairs)."""
    xp, c, p = namespace(weight), step.buckets, step.pairs
    paired = index.shape[-1] - step.kept
    rest = [(a[..., paired:]) for a in (index, weight)]
    index, weight = (_in_pairs(_fill(a[..., :paired], 2 * c * p), c) for a in (index, weight))  # (..., c, 2, p)
    differences = _differences(tokens, index, c)  # (..., c, p, p)
    first, second = weight[..., 0, :], weight[..., 1, :]
    both = first + second

    u, flip = rng.random((c, p)), rng.random((c, 1)) < 0.5
    coin = from_numpy(u, like=weight, dtype=weight.dtype) * both < first
    noise = None
    if threshold > 0:
        signed = from_numpy(threshold * (2 * u - 1), like=weight, dtype=weight.dtype)
        noise = signed * _scale_of_steps(differences) * first
    pairs = _Pairs(first, second, first == second, coin)
    won = _walk(differences, pairs, noise)
    won = xp.where(pairs.equal, won != from_numpy(flip, like=weight), won)
    survivors = xp.where(won, index[..., 0, :], index[..., 1, :])
    survivors, both = xp.broadcast_arrays(survivors, both)
    flat = [xp.reshape(a, (*a.shape[:-2], c * p)) for a in (survivors, both)]
    if not step.kept:
        return flat[0], flat[1]
    kept = [xp.broadcast_to(a, (*f.shape[:-1], step.kept)) for a, f in zip(rest, flat, strict=True)]
    return xp.concat([kept[0], flat[0]], axis=-1), xp.concat([kept[1], flat[1]], axis=-1)


def _differences(tokens: _Tokens, index: Array, buckets: int) -> Array:
    """⟨φ_a − φ_b, φ_a' − φ_b'⟩ of the pairs ``index`` (..., buckets, 2, pairs), φ the features of K."""
    index = namespace(index).reshape(index, (*index.shape[:-3], -1))
    sample = Selection(index, tokens.keys.shape[-2], like=tokens.keys)
    keys = _in_buckets(sample.gather(tokens.keys), buckets)
    values = None if tokens.values is None else _in_buckets(sample.gather(tokens.values), buckets)
    top = tokens.top[..., None]
    if is_numpy(keys) and keys.size >= _WORTH_GROUPS:
        return _in_groups(keys, values, top)
    return _gram_differences(keys, values, top)


def _gram_differences(keys: Array, values: Array | None, top: Array) -> Array:
    """Gram matrices of K, rows and columns subtracted in pairs; keys (..., 2 p, d), result (..., p, p)."""
    xp = namespace(keys)
    log = xp.minimum(
        keys @ xp.matrix_transpose(keys) - top, constant(0.0, like=keys)
    )  # above zero there is only rounding
    gram = xp.exp(log)
    if values is not None:
        gram = gram * (values @ xp.matrix_transpose(values) + 1.0)
    pairs = gram.shape[-1] // 2
    rows = gram[..., :pairs, :] - gram[..., pairs:, :]
    return rows[..., :pairs] - rows[..., pairs:]


def _in_groups(keys: NDArray[Any], values: NDArray[Any] | None, top: NDArray[Any]) -> NDArray[Any]:
    """:func:`_gram_differences`, a few buckets at a time from threads, so that Gram matrices stay in the cache."""
    given = [a for a in (keys, values, top) if a is not None]
    batch = np.broadcast_shapes(*(a.shape[:-2] for a in given))
    flat = [np.broadcast_to(a, (*batch, *a.shape[-2:])).reshape(-1, *a.shape[-2:]) for a in given]
    size = keys.shape[-2]
    out = np.empty((len(flat[0]), size // 2, size // 2), keys.dtype)
    step = max(1, _GROUP_ENTRIES // size**2)

    def group(start: int) -> None:
        part = [a[start : start + step] for a in flat]
        out[start : start + step] = _gram_differences(part[0], None if values is None else part[1], part[-1])

    parallel(group, range(0, len(out), step))
    return out.reshape(*batch, size // 2, size // 2)


def _scale_of_steps(differences: Array) -> Array:
    """Length of each difference times the largest length so far, (..., buckets, pairs)."""
    xp = namespace(differences)
    squares = xp.linalg.diagonal(differences)
    length = xp.sqrt(xp.maximum(squares, constant(0.0, like=squares)))
    top = length
    for shift in _shifts(int(length.shape[-1])):
        top = xp.concat([top[..., :shift], xp.maximum(top[..., shift:], top[..., :-shift])], axis=-1)
    return length * top


def _walk(differences: Array, pairs: _Pairs, noise: Array | None) -> Array:
    """Whether the first of each pair is taken, (..., buckets, pairs).

    Taking the first adds second · difference to the signed sum, taking the second subtracts first · difference. Between
    equals the sum decides, against ``noise``; otherwise the coin, in proportion to the weights.
    """
    xp = namespace(differences)
    along = xp.zeros(differences.shape[:-1], dtype=differences.dtype, device=device_of(differences))
    won = []
    for i in range(int(differences.shape[-1])):
        total = along[..., 0] if noise is None else along[..., 0] + noise[..., i]
        won.append(xp.where(pairs.equal[..., i], total < 0, pairs.coin[..., i]))
        move = xp.where(won[-1], pairs.second[..., i], -pairs.first[..., i])
        along = along[..., 1:] + move[..., None] * differences[..., i, i + 1 :]
    return xp.stack(won, axis=-1)


def _shifts(length: int) -> list[int]:
    """Powers of two below ``length``: the steps of a running maximum by doubling."""
    return [2**i for i in range((length - 1).bit_length())]


def _fill(a: Array, size: int) -> Array:
    """``a`` (..., n) with zeros up to ``size``: points of weight zero."""
    xp, missing = namespace(a), size - a.shape[-1]
    if not missing:
        return a
    return xp.concat([a, xp.zeros((*a.shape[:-1], missing), dtype=a.dtype, device=device_of(a))], axis=-1)


def _in_pairs(a: Array, buckets: int) -> Array:
    """Neighbours as pairs: (..., n) as (..., buckets, 2, pairs), the first of all pairs before the second of all."""
    xp = namespace(a)
    return xp.matrix_transpose(xp.reshape(a, (*a.shape[:-1], buckets, -1, 2)))


def _in_buckets(x: Array, buckets: int) -> Array:
    return namespace(x).reshape(x, (*x.shape[:-2], buckets, -1, x.shape[-1]))
