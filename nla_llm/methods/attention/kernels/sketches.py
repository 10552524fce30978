"""Sketches of polynomial kernels: random features with an inner product near (x·y)^p, for x·y the logits.

All of them are products of p linear forms of x. A sketch is homogeneous, so |x|^p comes out of each row as a common
factor whose logarithm is carried apart, and the forms only ever see unit vectors. They approximate a polynomial kernel,
not softmax; :class:`~nla_llm.methods.attention.kernels.series_features.MaclaurinFeatures` adds products of all
degrees up to the power series of exp.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from functools import partial
from math import log, pi, sqrt
from typing import TYPE_CHECKING, Any, ClassVar, final

import numpy as np

from nla_llm import costs
from nla_llm.backend import Array, by_heads, device_of, from_numpy, generator, namespace
from nla_llm.methods.attention.kernels.deterministic_features import monomials, packing, require_room
from nla_llm.methods.attention.kernels.linear_attention import CHUNK, Features, kernel_attention, kernel_attention_cost
from nla_llm.methods.attention.kernels.products import (
    KINDS,
    Factor,
    Kind,
    draw_vectors,
    inputs_cost,
    product_of_forms,
    products_cost,
    unit_rows,
)
from nla_llm.methods.registry import Properties, one_of, register, require, settle, whole_number

if TYPE_CHECKING:
    from nla_llm.operators import Operator
    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["PolySketch", "PolynomialSketch", "ProductSketch", "TensorSketch"]


# -- what the sketches share -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolynomialSketch(ABC):
    """What the sketches share: unit vectors, the power of the norm as a scale of the row, normalisation.

    A query or a key of zeros has no weights at all: the kernel of a query of zeros is zero, and such data are refused
    with :class:`~nla_llm.operators.ZeroRowSumError`.

    Parameters
    ----------
    m
        Size of the sketch.
    degree
        Degree p of the kernel (x·y)^p. For odd p the kernel itself takes both signs.
    """

    m: int
    _: KW_ONLY
    degree: int = 2
    chunk: ClassVar[int] = CHUNK
    properties: ClassVar[Properties]

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        whole_number("degree", self.degree)

    @abstractmethod
    def draw(self, d: int, rng: np.random.Generator, *, like: Array) -> Any:
        """What the features of queries and of keys have in common, in the library and dtype of ``like``."""

    @abstractmethod
    def features(self, x: Array, drawn: Any) -> Array:
        """Features (..., n, ·) of unit vectors x (..., n, d)."""

    @property
    def log_factor(self) -> float:
        """Logarithm of the factor of the inner product of two features."""
        return -log(self.m)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator diag(Â 1)⁻¹ Â with Â_ij = φ(x_i)·φ(y_j); the same draw serves all heads."""
        require(self, problem)
        x, y = problem.scaled_inputs()
        drawn = self.draw(problem.d, generator(rng), like=x)
        (x, log_x), (y, log_y) = unit_rows(x), unit_rows(y)
        queries, keys = self.feature_pair(x, y, drawn)
        return kernel_attention(
            problem,
            Features(queries, row=self.degree * log_x),
            Features(keys, row=self.degree * log_y),
            log_factor=self.log_factor,
            nonnegative=self.properties.nonnegative,
        )

    def feature_pair(self, x: Array, y: Array, drawn: Any) -> tuple[Array, Array]:
        """Features of queries and of keys."""
        return self.features(x, drawn), self.features(y, drawn)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Unit vectors, the features, powers of the norms; then a kernel of as many features."""
        n_q, n_k, _, _ = costs.symbols_of(problem)
        drawing, features, width = self._features_cost(problem)
        powers = costs.Operations(mul=n_q + n_k)
        kernel = kernel_attention_cost(problem, width, amplitude=True, row=True)
        return costs.Cost(prepare=drawing + inputs_cost(problem) + features + powers) + kernel

    @abstractmethod
    def _features_cost(self, problem: AttentionProblem) -> tuple[costs.Operations, costs.Operations, Any]:
        """Costs of the draw and of the features of all tokens, and the number of features."""


def _promises(family: str, *, nonnegative: bool = False) -> Properties:
    return Properties(
        family=family, target="polynomial kernel", budget="m", converges=True, deterministic=False, partial=True,
        nonnegative=nonnegative, supports=frozenset({"causal", "key_mask"}),
    )  # fmt: skip


# -- the sketches ------------------------------------------------------------------------------------------------------


@register("product_sketch")
@final
@dataclass(frozen=True)
class ProductSketch(PolynomialSketch):
    """φ(x)_r = m^(-1/2) Π_{j≤p} w_rj·x with independent random vectors: E φ(x)·φ(y) = (x·y)^p.

    Kar and Karnick 2012, arXiv 1201.6530; complex vectors, of which real and imaginary parts become two features, by
    Wacker, Ohana and Filippone 2022, arXiv 2202.02031. The variance is known in closed form for every kind
    (:func:`~nla_llm.theory.sketches.product_sketch_theory`) and grows as 3^p for real vectors and parallel x and y.

    Parameters
    ----------
    m
        Number of products drawn; complex kinds make two features of each.
    degree
        Degree p of the kernel.
    kind
        Entries of the vectors: 'rademacher' (±1), 'gaussian', 'complex_rademacher' (±1, ±i) or 'complex_gaussian'.

    Examples
    --------
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.eye(3) + 1
    >>> P = ProductSketch(1000, degree=2)(AttentionProblem(q, q), rng=0)
    >>> bool(abs(P.dense()[0] - np.array([36, 25, 25]) / 86).max() < 0.1)
    True
    """

    kind: Kind = "rademacher"
    properties: ClassVar[Properties] = _promises("product sketch")

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("kind", self.kind, KINDS)

    def draw(self, d: int, rng: np.random.Generator, *, like: Array) -> list[Factor]:
        """Vectors of all factors."""
        parts = draw_vectors(self.kind, (self.degree, self.m, d), rng, like=like)
        return [tuple(part[j, ...] for part in parts) for j in range(self.degree)]

    def features(self, x: Array, drawn: list[Factor]) -> Array:
        """One product for each vector, or its real and imaginary parts."""
        return product_of_forms(x, drawn)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Mean and variance of the entries of Â, in closed form."""
        from nla_llm.theory.sketches import product_sketch_theory  # noqa: PLC0415 - SciPy loads there

        x, y = problem.scaled_inputs()
        return product_sketch_theory(x, y, scale=1.0, m=self.m, degree=self.degree, kind=self.kind)

    def _features_cost(self, problem: AttentionProblem) -> tuple[costs.Operations, costs.Operations, Any]:
        n_q, n_k, d, _ = costs.symbols_of(problem)
        is_complex = self.kind.startswith("complex")
        numbers = self.degree * costs.m * d * (2 if self.kind == "complex_gaussian" else 1)
        products = products_cost(n_q + n_k, d, costs.m, self.degree, is_complex=is_complex)
        return costs.Operations(draw=numbers), products, 2 * costs.m if is_complex else costs.m


@register("tensor_sketch")
@final
@dataclass(frozen=True)
class TensorSketch(PolynomialSketch):
    """The count sketch of x ⊗ … ⊗ x: coordinate (l₁, …, l_p) goes to bucket Σ h_j(l_j) mod m with sign Π s_j(l_j).

    Pham and Pagh 2013. The buckets are the circular convolution of the count sketches of the factors, so their Fourier
    transform is the product over j of Σ_l s_j(l) exp(−2πi r h_j(l)/m) x_l. Inner products are the same there
    (Parseval), and the transform of a count sketch is a linear form: the features here are the real and imaginary parts
    of these m numbers, without any transform back, at the cost of a dense product. A fast transform would pay where
    p (d + m log m) is far below p m d, that is for head dimensions far above log m.

    E φ(x)·φ(y) = (x·y)^p, and the variance is known exactly for all p and m
    (:func:`~nla_llm.theory.sketches.tensor_sketch_theory`).

    Parameters
    ----------
    m
        Number of buckets, and of features.
    degree
        Degree p of the kernel.

    Examples
    --------
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.eye(3) + 1
    >>> P = TensorSketch(1000, degree=2)(AttentionProblem(q, q), rng=0)
    >>> bool(abs(P.dense()[0] - np.array([36, 25, 25]) / 86).max() < 0.1)
    True
    """

    properties: ClassVar[Properties] = _promises("tensor sketch")

    def draw(self, d: int, rng: np.random.Generator, *, like: Array) -> list[Factor]:
        """Fourier transforms of the count sketches of the factors, frequencies 0 … ⌊m/2⌋."""
        hashes, negative = rng.integers(0, self.m, (self.degree, d)), rng.integers(0, 2, (self.degree, d)) == 1
        return self.transforms(hashes, negative, like=like)

    def transforms(self, hashes: Any, negative: Any, *, like: Array) -> list[Factor]:
        """Linear forms (⌊m/2⌋ + 1, d) of given hashes (p, d) and signs."""
        xp, m = namespace(like), self.m
        angle = (2 * pi / m) * xp.arange(m, dtype=like.dtype, device=device_of(like))
        waves = xp.cos(angle), -xp.sin(angle)
        twice = np.ones((m // 2 + 1, 1))  # frequencies that stand for their conjugates too
        twice[1 : (m + 1) // 2] = sqrt(2)
        weights = xp.astype(from_numpy(twice, like=like), like.dtype)
        factors = []
        for j in range(self.degree):
            place = np.arange(m // 2 + 1)[:, None] * hashes[j] % m
            index, flip = from_numpy(place.reshape(-1), like=like), from_numpy(negative[j], like=like)
            rows = [xp.reshape(xp.take(wave, index, axis=0), place.shape) for wave in waves]
            rows = [xp.where(flip, -row, row) for row in rows]
            factors.append(tuple(rows if j else [weights * row for row in rows]))
        return factors

    def features(self, x: Array, drawn: list[Factor]) -> Array:
        """Real parts, and the imaginary ones that are not zero: m numbers."""
        pairs = product_of_forms(x, drawn)
        real = self.m // 2 + 1
        return namespace(x).concat([pairs[..., :real], pairs[..., real + 1 : real + (self.m + 1) // 2]], axis=-1)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Mean and variance of the entries of Â, in closed form."""
        from nla_llm.theory.sketches import tensor_sketch_theory  # noqa: PLC0415 - SciPy loads there

        x, y = problem.scaled_inputs()
        return tensor_sketch_theory(x, y, scale=1.0, m=self.m, degree=self.degree)

    def _features_cost(self, problem: AttentionProblem) -> tuple[costs.Operations, costs.Operations, Any]:
        from sympy import floor  # noqa: PLC0415 - the formulas load it

        n_q, n_k, d, _ = costs.symbols_of(problem)
        m, half = costs.m, floor(costs.m / 2) + 1
        forms = costs.Operations(mul=m + 2 * half * d, exp=2 * m, draw=2 * self.degree * d)
        return forms, products_cost(n_q + n_k, d, half, self.degree, is_complex=True), m


@register("poly_sketch")
@final
@dataclass(frozen=True)
class PolySketch(PolynomialSketch):
    """The sketch of PolySketchFormer: S² for a sketch S of degree p/2, so that no entry is negative.

    Kacham, Mirrokni and Zhong 2023, arXiv 2310.01655. S is a binary tree: a node of degree t multiplies
    Gaussian projections of two sketches of degree t/2, φ_t = m^(-1/2) (G φ_{t/2}) ∘ (G' φ'_{t/2}), and φ₁(x) = x. The
    features φ ⊗ φ are symmetric, so half of them are enough: m(m + 1)/2. The published network also normalises queries
    and keys by layers, may learn the projections, and has exact weights in local blocks; none of it is done here.

    Biased: the mean of the kernel is (x·y)^p + Var S, known in closed form
    (:func:`~nla_llm.theory.sketches.poly_sketch_theory`). The bias falls as 1/m, and it is a floor: orthogonal vectors,
    whose kernel is zero, get about |x|^p |y|^p/m, so that no weight is much less than 1/m of the largest.

    Parameters
    ----------
    m
        Size of the sketch S, r in the paper; there are m(m + 1)/2 features, held for all tokens. What would not fit
        into memory is refused: 65 536 tokens at m = 256 are 17 GB in float32, at m = 64 a GB.
    degree
        Degree p of the kernel: 4, 8, 16, …

    Examples
    --------
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.eye(3) + 1
    >>> P = PolySketch(50, degree=4)(AttentionProblem(q, q), rng=0)
    >>> P.nonnegative, bool(P.dense().min() >= 0)
    (True, True)
    """

    degree: int = 4
    properties: ClassVar[Properties] = _promises("poly sketch", nonnegative=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.degree < 4 or self.degree & (self.degree - 1):
            raise ValueError(f"degree must be a power of two, 4 or more, got {self.degree}")

    @property
    def log_factor(self) -> float:
        """The projections carry it."""
        return 0.0

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator diag(Â 1)⁻¹ Â with Â_ij = φ(x_i)·φ(y_j); the same draw serves all heads."""
        require(self, problem)
        require_room(problem, self.m * (self.m + 1) // 2, f"m={self.m} makes m(m + 1)/2", "a smaller m")
        return super().__call__(problem, rng)

    def draw(self, d: int, rng: np.random.Generator, *, like: Array) -> list[Array]:
        """Projections of all nodes, level by level, two for each node."""
        xp, nodes = namespace(like), self.degree // 4
        matrices: list[Array] = []
        while nodes:
            inner = self.m if matrices else d
            drawn = rng.normal(0.0, self.m**-0.25, (nodes, 2, self.m, inner))
            matrices.append(xp.astype(from_numpy(drawn, like=like), like.dtype))
            nodes //= 2
        return matrices

    def features(self, x: Array, drawn: list[Array]) -> Array:
        """Products of two entries of the sketch, each pair once."""
        return by_heads(partial(_self_tensored, drawn=drawn), x)

    def feature_pair(self, x: Array, y: Array, drawn: list[Array]) -> tuple[Array, Array]:
        """Queries carry the multiplicities of the pairs, 1 and 2."""
        twice = namespace(x).astype(from_numpy(packing(self.m, 2).multinomial, like=x), x.dtype)
        return by_heads(operator.mul, self.features(x, drawn), twice), self.features(y, drawn)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Mean of the entries of Â, in closed form."""
        from nla_llm.theory.sketches import poly_sketch_theory  # noqa: PLC0415 - SciPy loads there

        x, y = problem.scaled_inputs()
        return poly_sketch_theory(x, y, scale=1.0, m=self.m, degree=self.degree)

    def _features_cost(self, problem: AttentionProblem) -> tuple[costs.Operations, costs.Operations, Any]:
        n_q, n_k, d, _ = costs.symbols_of(problem)
        m, tokens, half = costs.m, n_q + n_k, self.degree // 2
        width = m * (m + 1) / 2
        entries = half * m * d + (half - 2) * m**2  # of all projections
        products = costs.Operations(madd=tokens * entries, mul=tokens * ((half - 1) * m + width) + n_q * width)
        return costs.Operations(draw=entries), products, width


def _self_tensored(x: Array, *, drawn: list[Array]) -> Array:
    return monomials(_tree(x, drawn, len(drawn) - 1, 0), 2)


def _tree(x: Array, drawn: list[Array], level: int, node: int) -> Array:
    """The sketch at a node: x below the lowest level."""
    if level < 0:
        return x
    transpose = namespace(x).matrix_transpose
    left, right = (_tree(x, drawn, level - 1, 2 * node + side) for side in (0, 1))
    product = left @ transpose(drawn[level][node, 0, ...])
    product *= right @ transpose(drawn[level][node, 1, ...])
    return product
