"""Feature maps without randomness: polynomial kernels, the Taylor polynomial of exp among them, and cosFormer.

A polynomial Σ c_k (x·y)^k of degree p with c_k >= 0 is an inner product of monomials. They are packed symmetrically,
one feature for each multi-index: C(d+p, p) features instead of the 1 + d + … + d^p of the tensor powers. The constant
is one more coordinate, x̂ = (1, x), so that all monomials have degree p: then |x̂|^p comes out of each row as a common
factor, whose logarithm is carried apart, and what is left are monomials of a unit vector, which do not overflow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import comb, factorial, lgamma, log, pi, prod, sqrt
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, by_heads, constant, from_numpy, is_numpy, namespace, parallel, to_numpy
from nla_llm.methods.attention.floors import rank_floor
from nla_llm.methods.attention.kernels.linear_attention import CHUNK, Features, kernel_attention, kernel_attention_cost
from nla_llm.methods.registry import Properties, register, require, settle, whole_number

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["MOST_ENTRIES", "CosFormer", "MonomialFeatures", "PolynomialFeatures", "TaylorFeatures"]

MOST_ENTRIES = 2**30  # of the features of all queries and keys: 4 GiB in float32, 8 GiB in float64

_BLOCK_ENTRIES = 1 << 19  # of a block of features, 2 MiB in float32 (measured)


class Packing(NamedTuple):
    """The monomials of degree p in D variables, in lexicographic order of their sorted indices i₁ ≤ … ≤ i_p.

    Attributes
    ----------
    multinomial
        p!/α! of each monomial x^α, float64 (C(D+p−1, p),).
    leading
        How often the first variable occurs in it, α₀.
    """

    multinomial: NDArray[np.float64]
    leading: NDArray[np.int64]


def packing(variables: int, degree: int) -> Packing:
    """Multiplicities of the packed monomials, by the recursion of :func:`monomials`.

    Examples
    --------
    >>> packing(2, 2)  # x₀², x₀x₁, x₁²
    Packing(multinomial=array([1., 2., 1.]), leading=array([2, 1, 0]))
    """
    multinomial = np.ones(variables)
    run = np.ones(variables, dtype=np.int64)  # how often the first index of a monomial is repeated
    for k in range(2, degree + 1):
        parts, runs = [], []
        for j in range(variables):
            start = _first_with_index(variables, k - 1, j)
            longer = run[start:].copy()
            longer[: _first_with_index(variables, k - 1, j + 1) - start] += 1  # these begin with j already
            longer[_first_with_index(variables, k - 1, j + 1) - start :] = 1
            parts.append(multinomial[start:] * (k / longer))
            runs.append(longer)
        multinomial, run = np.concatenate(parts), np.concatenate(runs)
    leading = run.copy()
    leading[_first_with_index(variables, degree, 1) :] = 0
    return Packing(multinomial, leading)


def monomials(x: Array, degree: int) -> Array:
    """All monomials of a degree of the last axis: (..., n, D) → (..., n, C(D+p−1, p)), one product for each of them.

    In lexicographic order the monomials whose indices are at least j form the end of the list, so that x_j times them
    is a product with a slice; nothing is looked up.

    Examples
    --------
    >>> monomials(np.array([[2.0, 3.0]]), 2).tolist()
    [[4.0, 6.0, 9.0]]
    """
    xp, variables = namespace(x), x.shape[-1]
    found = x
    for k in range(2, degree + 1):
        starts = [_first_with_index(variables, k - 1, j) for j in range(variables)]
        found = xp.concat([x[..., j : j + 1] * found[..., start:] for j, start in enumerate(starts)], axis=-1)
    return found


def _weighted_monomials(x: Array, degree: int, weights: Array) -> Array:
    """``monomials(x, degree) * weights``, on NumPy from threads by blocks of rows that stay in the cache."""
    if not is_numpy(x, weights):
        return monomials(x, degree) * weights
    out = np.empty((*x.shape[:-1], weights.shape[0]), x.dtype)
    step = max(1, _BLOCK_ENTRIES // weights.shape[0])

    def block(place: tuple[int, ...]) -> None:
        rows: Any = (*place[:-1], slice(step * place[-1], step * (place[-1] + 1)))
        np.multiply(monomials(x[rows], degree), weights, out=out[rows])

    parallel(block, np.ndindex((*x.shape[:-2], -(-x.shape[-2] // step))))
    return out


def _first_with_index(variables: int, degree: int, j: int) -> int:
    """Place of the first monomial whose indices are all at least j, in the list of those of a degree."""
    return _count(variables, degree) - _count(variables - j, degree)


def _count(variables: int, degree: int) -> int:
    return comb(variables + degree - 1, degree)


@dataclass(frozen=True)
class MonomialFeatures(ABC):
    """What the polynomial kernels share: Σ_{k≤p} c_k u^k of the logits u = scale q·k, exactly, by packed monomials.

    Parameters
    ----------
    degree
        Degree p >= 1. There are C(d+p, p) features for each token; a problem for which those of all tokens and heads
        exceed :data:`MOST_ENTRIES` numbers is refused. More features than tokens cost more than exact attention.
    """

    degree: int
    properties: ClassVar[Properties]
    chunk: ClassVar[int] = CHUNK

    def __post_init__(self) -> None:
        settle(self)
        whole_number("degree", self.degree)

    @property
    @abstractmethod
    def unit(self) -> float:
        """The logit beside which the constant has the same weight: x̂ = (1, x/√unit)."""

    @abstractmethod
    def ratios(self, k: NDArray[np.int64]) -> NDArray[np.float64]:
        """c_k unit^k / C(p, k): the coefficients against those of (1 + u/unit)^p, in which all monomials are alike."""

    def features_of(self, d: int) -> int:
        """Number of features of a token of dimension d, C(d+p, p).

        Examples
        --------
        >>> TaylorFeatures(2).features_of(64)
        2145
        """
        return comb(d + self.degree, self.degree)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator diag(Â 1)⁻¹ Â with the polynomial Â_ij of the logits."""
        require(self, problem)
        require_room(problem, self.features_of(problem.d), f"degree={self.degree} makes C(d+p, p)", "a lower degree")
        root = sqrt(abs(problem.scale) / self.unit)
        table = packing(problem.d + 1, self.degree)
        weights = np.sqrt(table.multinomial * self.ratios(self.degree - table.leading))
        weights = from_numpy(weights, like=problem.q, dtype=problem.q.dtype)
        signed = root if problem.scale >= 0 else -root
        queries, keys = (self._features(s * x, weights) for s, x in ((root, problem.q), (signed, problem.k)))
        return kernel_attention(problem, queries, keys, nonnegative=self.properties.nonnegative, overwrite=True)

    def _features(self, x: Array, weights: Array) -> Features:
        """Monomials of x̂/|x̂| with their weights, and p log |x̂|."""
        xp = namespace(x)
        shrink = 1.0 / xp.sqrt(1.0 + xp.sum(x * x, axis=-1, keepdims=True))
        unit_vector = xp.concat([shrink, shrink * x], axis=-1)
        amplitude = _weighted_monomials(unit_vector, self.degree, weights)
        return Features(amplitude=amplitude, row=-float(self.degree) * xp.log(shrink))

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Scaled inputs, their norms, monomials of each degree and weights; a kernel of C(d+p, p) features."""
        n_q, n_k, d, _ = costs.symbols_of(problem)
        p, f = self.degree, costs.formulas
        features = _binomial(d, p, p)
        inputs = costs.Operations(mul=3 * d + 1, add=1, sqrt=1, div=1, exp=1) + f.sum_of(d)
        packed = costs.Operations(mul=_binomial(d, p + 1, p) - d - 2)  # Σ C(d+k, k) over the degrees from 2 to p
        prepare = (n_q + n_k) * (inputs + packed + costs.Operations(mul=features))
        return costs.Cost(prepare=prepare) + kernel_attention_cost(problem, features, amplitude=True, row=True)


def require_room(problem: AttentionProblem, features: int, what: str, instead: str) -> None:
    """Refuse factors that would not fit into memory, with what makes so many features and what to pass instead."""
    tokens = prod(problem.q.shape[:-1]) + prod(problem.k.shape[:-1])
    if tokens * features > MOST_ENTRIES:
        raise ValueError(
            f"{what} = {features} features of dimension d={problem.d}; for the {tokens} queries and keys of all heads "
            f"these are more than the {MOST_ENTRIES} numbers that are taken to fit into memory; pass {instead}, or "
            "fewer tokens or heads at a time"
        )


def _binomial(d: Any, more: int, p: int) -> Any:
    """C(d + more, p) as a polynomial in d."""
    from sympy import expand  # noqa: PLC0415 - SymPy loads only where a cost is asked for

    product: Any = 1
    for i in range(p):
        product *= d + more - i
    return expand(product) / factorial(p)


@register("polynomial_features")
@final
@dataclass(frozen=True)
class PolynomialFeatures(MonomialFeatures):
    """The polynomial kernel (1 + scale q·k)^p, exactly, by C(d+p, p) symmetric features.

    φ_α(x) = √(p!/α!) x̂^α for the multi-indices |α| = p of x̂ = (1, √scale x), so that φ(x)·φ(y) = (1 + x·y)^p by the
    multinomial theorem. It replaces softmax by another kernel (Katharopoulos et al. 2020, arXiv 2006.16236, section
    3.2, for p = 2): a larger degree is not a better approximation of it. For even p no entry is negative, but a logit
    of −1 has the kernel zero; for odd p entries and row sums may be negative: their share is counted by the operator.

    Parameters
    ----------
    degree
        p >= 1.

    Examples
    --------
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.array([[1.0], [2.0]])
    >>> PolynomialFeatures(2)(AttentionProblem(q, q, scale=1.0)).dense().round(6).tolist()  # 4 : 9 and 9 : 25
    [[0.307692, 0.692308], [0.264706, 0.735294]]
    """

    properties: ClassVar[Properties] = Properties(
        family="polynomial",
        target="polynomial kernel",
        budget="degree",
        partial=True,
        supports=frozenset({"causal", "key_mask"}),
    )

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of its rank, C(d+p, p): whatever the method puts into it."""
        return rank_floor(problem, self.features_of(problem.d))

    @property
    def unit(self) -> float:
        """One: x̂ = (1, x)."""
        return 1.0

    def ratios(self, k: NDArray[np.int64]) -> NDArray[np.float64]:
        """Ones."""
        return np.ones(k.shape)


@register("taylor_features")
@final
@dataclass(frozen=True)
class TaylorFeatures(MonomialFeatures):
    """The Taylor polynomial Σ_{k≤p} u^k/k! of exp in the logits u = scale q·k, by C(d+p, p) symmetric features.

    φ_α(x) = x^α/√(α!) for all multi-indices |α| ≤ p, x = √scale q. It converges to softmax as the degree grows, fast
    for small logits: sup_{|u|≤B} of the error is Σ_{k>p} B^k/k!. Even degrees have no real root, so that no row sums to
    zero; odd ones have one, and beyond it negative entries and perhaps row sums, which are counted, never clamped
    (:mod:`nla_llm.theory.polynomials`).

    Parameters
    ----------
    degree
        p >= 1.

    Examples
    --------
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.array([[1.0], [-1.0]])
    >>> TaylorFeatures(2)(AttentionProblem(q, q)).dense().round(6).tolist()  # 5/2 : 1/2
    [[0.833333, 0.166667], [0.166667, 0.833333]]
    """

    properties: ClassVar[Properties] = Properties(
        family="taylor", budget="degree", converges=True, supports=frozenset({"causal", "key_mask"})
    )

    def __post_init__(self) -> None:
        MonomialFeatures.__post_init__(self)
        if self.degree % 2:
            object.__setattr__(self, "properties", replace(type(self).properties, partial=True))

    @property
    def unit(self) -> float:
        """The degree: (1 + u/p)^p is near exp(u), so that the coefficients hardly differ."""
        return float(self.degree)

    def ratios(self, k: NDArray[np.int64]) -> NDArray[np.float64]:
        """p^k (p−k)!/p!, between 1 and e^p."""
        p = self.degree
        table = [j * log(p) + lgamma(p - j + 1) - lgamma(p + 1) for j in range(p + 1)]
        found: NDArray[np.float64] = np.exp(np.asarray(table))[k]
        return found

    def theory(self, problem: AttentionProblem) -> Theory:
        """Bound of the error of the operator, from the logits of every row."""
        from nla_llm.theory.polynomials import taylor_theory  # noqa: PLC0415 - SciPy loads there

        mask = None if problem.key_mask is None else to_numpy(problem.key_mask)
        q, k = to_numpy(problem.q), to_numpy(problem.k)
        return taylor_theory(q, k, scale=problem.scale, degree=self.degree, causal=problem.causal, key_mask=mask)


@register("cosformer")
@final
@dataclass(frozen=True)
class CosFormer:
    """Linear attention with the kernel relu(q_i)·relu(k_j) cos(π(i − j)/2M), 2d features.

    Qin et al. 2022, arXiv 2202.08791, section 3.3: the cosine of the difference splits into cos πi/2M cos πj/2M +
    sin πi/2M sin πj/2M. Replaces softmax by another kernel, which knows positions: permuting the keys changes it. The
    scale of the logits is not used; a positive one would cancel. A query that shares no positive coordinate with any
    visible key has no weights; such data are refused with :class:`~nla_llm.operators.ZeroRowSumError`.

    Parameters
    ----------
    length
        M, at least the number of queries and of keys, so that no weight is negative; None is the larger of the two, as
        published. No query sees later keys, but that default is the length of the sequence, so appending tokens changes
        earlier rows; for decoding pass the largest length there will be.

    Examples
    --------
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.ones((3, 1))
    >>> CosFormer()(AttentionProblem(q, q)).dense()[0].round(4).tolist()  # cosines of 0, 30 and 60 degrees
    [0.4226, 0.366, 0.2113]
    """

    length: int | None = None
    properties: ClassVar[Properties] = Properties(
        family="relu",
        target="cosformer kernel",
        nonnegative=True,
        partial=True,
        permutation_equivariant=False,
        supports=frozenset({"causal", "key_mask"}),
    )
    chunk: ClassVar[int] = CHUNK

    def __post_init__(self) -> None:
        settle(self)
        if self.length is not None:
            whole_number("length", self.length)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator of linear attention."""
        require(self, problem)
        longest = max(problem.n_q, problem.n_k)
        length = longest if self.length is None else self.length
        if length < longest:
            raise ValueError(
                f"length={length} must be at least the number of queries and keys, {longest}; pass length=None"
            )
        queries, keys = (Features(_reweighted(x, length)) for x in (problem.q, problem.k))
        return kernel_attention(problem, queries, keys, nonnegative=True)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of its rank, 2d: whatever the method puts into it."""
        return rank_floor(problem, 2 * problem.d)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """One comparison and two products an entry, with tables of cosines and sines; then a kernel of 2d features."""
        n_q, n_k, d, _ = costs.symbols_of(problem)
        features = costs.Operations(compare=d, mul=2 * d) * (n_q + n_k)
        return costs.Cost(prepare=features) + kernel_attention_cost(problem, 2 * d)


def _reweighted(x: Array, length: int) -> Array:
    """[relu(x_i) cos(πi/2M), relu(x_i) sin(πi/2M)] for the positions i = 0, 1, …"""
    xp = namespace(x)
    angle = pi / 2 * np.arange(x.shape[-2])[:, None] / length
    cosine, sine = (from_numpy(f(angle), like=x, dtype=x.dtype) for f in (np.cos, np.sin))

    def features(part: Array) -> Array:
        positive = xp.maximum(part, constant(0.0, like=part))
        return xp.concat([positive * cosine, positive * sine], axis=-1)

    return by_heads(features, x)
