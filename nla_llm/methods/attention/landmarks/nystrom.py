"""Landmarks: attention through a few averages of tokens (Nyströmformer), or through a few sampled ones (Skyformer)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, final

from nla_llm import costs
from nla_llm.backend import Array, constant, device_of, generator, namespace
from nla_llm.methods.attention.floors import rank_floor
from nla_llm.methods.attention.kernels.linear_attention import half_square_norm
from nla_llm.methods.attention.landmarks.gaussian import (
    gaussian,
    gaussian_cost,
    joined_tokens,
    sample_tokens,
)
from nla_llm.methods.registry import Properties, one_of, positive, register, require, settle, whole_number
from nla_llm.operators import Dense, Diagonal, Operator, Product, Selection, Skeleton, SoftmaxAttention

if TYPE_CHECKING:
    import numpy as np

    from nla_llm.problems import AttentionProblem
    from nla_llm.theory import Theory

__all__ = ["Nystromformer", "Skyformer", "landmark_means"]

ILL_CONDITIONED = dict.fromkeys(
    ("operator_laws", "precision", "array_api"),
    "the pseudo-inverse of a core with small singular values multiplies rounding errors by their inverses",
)
CORES = ("iteration", "pinv", "ridge")


@register("nystromformer")
@final
@dataclass(frozen=True)
class Nystromformer:
    """P̂ = F Z B with F = softmax(q k̃ᵀ), A = softmax(q̃ k̃ᵀ), B = softmax(q̃ kᵀ), Z ≈ A⁺, on the means of m segments.

    Xiong et al. 2021, arXiv 2102.03902, section 3.2. Segments are runs of ⌈n/m⌉ or ⌊n/m⌋ visible tokens, so n need not
    be a multiple of m; hidden keys enter no mean. Rows sum to one only where Z inverts A exactly, entries may be
    negative; the result ignores a common shift of the keys. The operator is a :class:`~nla_llm.operators.Skeleton`
    whose ``core_condition`` is κ₂(A), head by head.

    Parameters
    ----------
    m
        Number of landmarks.
    core
        'iteration': as published, from Z₀ = Aᵀ/(‖A‖₁ ‖A‖_∞) of each head alone; acts as a regulariser, since a
        singular value a counts as zero while (13/4)^iterations a² ≪ ‖A‖₁ ‖A‖_∞. 'pinv': the exact pseudo-inverse,
        in float64, whose large entries multiply what F and B cannot represent. 'ridge': (AᵀA + λI)⁻¹Aᵀ.
    iterations
        Steps of the iteration; six as published.
    ridge
        λ/(‖A‖₁ ‖A‖_∞). The default is near (4/13)⁶ = 0.00085, to which six iterations correspond.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.linspace(0, 1, 20)[:, None]
    >>> problem = AttentionProblem(q, q)
    >>> P = Nystromformer(4, core="pinv")(problem)
    >>> bool(abs(P.dense() - problem.exact().dense()).max() < 1e-4), bool(P.core_condition > 1e4)
    (True, True)
    """

    m: int
    _: KW_ONLY
    core: str = "iteration"
    iterations: int = 6
    ridge: float = 1e-3
    properties: ClassVar[Properties] = Properties(
        family="landmarks", budget="m", converges=True, row_stochastic=False, shift_invariant=True,
        permutation_equivariant=False, supports=frozenset({"key_mask"}),
        refusals={
            "causal": "a landmark is a mean over a segment of tokens, later ones included",
            "window": "a landmark stands for tokens on both sides of any border",
            "bias": "a bias belongs to pairs of tokens, and landmarks are none",
        },
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        whole_number("iterations", self.iterations)
        one_of("core", self.core, CORES)
        positive("ridge", self.ridge)
        if self.core == "pinv":
            object.__setattr__(self, "properties", replace(type(self).properties, exceptions=ILL_CONDITIONED))

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Skeleton:
        """Operator F Z B; F and B are streamed, so memory is that of the tokens."""
        require(self, problem)
        queries = landmark_means(problem.q, self.m, name="queries")
        keys = landmark_means(problem.k, self.m, problem.key_mask, name="visible keys")
        core, inverse = self._core(queries, keys, problem.scale)
        left = SoftmaxAttention(problem.q, keys, scale=problem.scale)
        right = SoftmaxAttention(queries, problem.k, scale=problem.scale, key_mask=problem.key_mask)
        return Skeleton(left, inverse, right, intersection=core)

    def _core(self, queries: Array, keys: Array, scale: float) -> tuple[Array, Array]:
        """A and Z, Z in the precision of the tokens."""
        from nla_llm.linalg.inverses import (  # noqa: PLC0415 - floor 1, loaded only where it is used
            iterated_inverse,
            norm_product,
            pseudo_inverse,
            ridge_inverse,
        )

        xp, dtype = namespace(queries, keys), queries.dtype
        if self.core == "iteration":
            core = SoftmaxAttention(queries, keys, scale=scale).dense()
            return core, iterated_inverse(core, self.iterations)
        queries, keys = (xp.astype(x, xp.float64, copy=False) for x in (queries, keys))
        core = SoftmaxAttention(queries, keys, scale=scale).dense()
        inverse = pseudo_inverse(core) if self.core == "pinv" else ridge_inverse(core, self.ridge * norm_product(core))
        return core, xp.astype(inverse, dtype, copy=False)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of its rank, m: whatever the method puts into it."""
        return rank_floor(problem, self.m)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """Landmarks, the core and its inverse; then two streamed products and one of order m."""
        n_q, n_k, d, d_v = costs.symbols_of(problem)
        m, f = costs.m, costs.formulas
        means = landmark_means_cost(n_q, m, d) + landmark_means_cost(n_k, m, d)
        core = f.softmax_rows(m, m**2, d) + costs.Operations(div=m**2)
        pairs = m * costs.symbols.visible_pairs(problem) / n_q
        products = f.softmax_product(m, pairs, d, d_v) + f.matmul(m, m, d_v) + f.softmax_product(n_q, n_q * m, d, d_v)
        return costs.Cost(prepare=means + core + self._inverse_cost(), apply=products)

    def _inverse_cost(self) -> costs.Operations:
        from sympy import Symbol  # noqa: PLC0415 - loads where a formula is asked for

        m, f = costs.m, costs.formulas
        if self.core == "iteration":
            start = f.norm_product(m) + costs.Operations(div=m**2)
            return start + f.iterated_inverse(m, Symbol("iterations"))
        if self.core == "pinv":
            return f.pseudo_inverse(m, m)
        return f.norm_product(m) + costs.Operations(mul=1) + f.ridge_inverse(m)


# -- landmarks -----------------------------------------------------------------------------------------------------


def landmark_means(x: Array, m: int, mask: Array | None = None, *, name: str = "tokens") -> Array:
    """Means of m runs of the visible rows of x (..., n, d), as equal in length as n allows: an array (..., m, d).

    Raises
    ------
    ValueError
        If there are fewer visible rows than landmarks.

    Examples
    --------
    >>> import numpy as np
    >>> landmark_means(np.arange(5.0)[:, None], 2)[:, 0].tolist()
    [1.0, 3.5]
    """
    xp, device, n = namespace(x), device_of(x), x.shape[-2]
    visible = xp.asarray([n], device=device)
    if mask is not None:
        visible = xp.sum(xp.astype(mask, visible.dtype), axis=-1, keepdims=True)
    fewest = int(xp.min(visible))
    if m > fewest:
        raise ValueError(f"m={m} landmarks cannot be means of {fewest} {name}; pass a smaller m")
    segment = xp.arange(m, device=device)
    size = visible // m + xp.astype(segment < visible % m, visible.dtype)
    start = segment * (visible // m) + xp.minimum(segment, visible % m)
    step = xp.arange(-(-n // m), device=device)
    inside = step < size[..., None]  # (..., m, ⌈n/m⌉)
    place = xp.where(inside, start[..., None] + step, xp.zeros_like(step))
    place = xp.reshape(place, (*place.shape[:-2], m * step.shape[0]))
    if mask is not None:
        shown_first = xp.argsort(xp.astype(~mask, xp.int32), axis=-1, stable=True)
        place = xp.take_along_axis(shown_first, place, axis=-1)
    tokens = Selection(place, n, like=x).gather(x)
    tokens = xp.reshape(tokens, (*tokens.shape[:-2], m, step.shape[0], x.shape[-1]))
    tokens = xp.where(inside[..., None], tokens, constant(0.0, like=x))
    return xp.sum(tokens, axis=-2) / xp.astype(size[..., None], x.dtype)


def landmark_means_cost(n: Any, m: Any, d: Any) -> costs.Operations:
    """Sums of m runs of ⌈n/m⌉ rows, the last row of a short run empty, and their division."""
    from sympy import ceiling  # noqa: PLC0415 - loads where a formula is asked for

    means: costs.Operations = costs.formulas.sum_of(ceiling(n / m), times=m * d) + costs.Operations(div=m * d)
    return means


# -- Skyformer -----------------------------------------------------------------------------------------------------


@register("skyformer")
@final
@dataclass(frozen=True)
class Skyformer:
    """C̃ = κ(x, s) (κ(s, s) + λI)⁻¹ κ(s, y) for the Gaussian kernel κ(x, y) = exp(−|x − y|²/2), with m sampled tokens s.

    Chen, Zeng, Ji and Yang 2021, arXiv 2111.00035, eq. (5), with x = √scale q and y = √scale k: a Nyström approximation
    of the cross block of the positive semi-definite matrix of all queries and keys. It aims at the Gaussian kernel
    matrix without normalisation, ``target(problem)``, not at softmax; the rows sum to what that kernel's rows sum to.
    Tokens are drawn uniformly without replacement from queries and visible keys, the same places in all heads. The
    operator is a :class:`~nla_llm.operators.Skeleton`; its ``core_condition`` is that of κ(s, s), without λ.

    Parameters
    ----------
    m
        Number of sampled tokens, at most those of queries and visible keys together.
    ridge
        λ, in units of the diagonal of the kernel, which is one. The default is an empirical choice.
    core
        'iteration': the third-order iteration for D^(-1/2) (κ(s, s) + λI) D^(-1/2), D the diagonal matrix of its row
        sums, from the identity, as published; the largest eigenvalue of that matrix is exactly one. 'exact': by
        eigenvalues, in float64.
    iterations
        Steps of the iteration.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.problems import AttentionProblem
    >>> q = np.linspace(0, 1, 20)[:, None]
    >>> problem = AttentionProblem(q, q)
    >>> error = Skyformer(8, core="exact", ridge=1e-9)(problem, rng=0) - Skyformer.target(problem)
    >>> bool(abs(error.dense()).max() < 1e-4)
    True
    """

    m: int
    _: KW_ONLY
    ridge: float = 1e-3
    core: str = "iteration"
    iterations: int = 6
    properties: ClassVar[Properties] = Properties(
        family="landmarks", target="gaussian kernel", budget="m", converges=True, row_stochastic=False,
        deterministic=False, permutation_equivariant=False, supports=frozenset({"key_mask"}),
        refusals={"causal": "a landmark that is a later token would leak into earlier rows"},
    )  # fmt: skip

    def __post_init__(self) -> None:
        settle(self)
        whole_number("m", self.m)
        whole_number("iterations", self.iterations)
        one_of("core", self.core, ("iteration", "exact"))
        positive("ridge", self.ridge)

    def __call__(self, problem: AttentionProblem, rng: int | np.random.Generator | None = None) -> Skeleton:
        """Operator C̃ with both cross kernels held, n × m each."""
        require(self, problem)
        x, y = problem.scaled_inputs()
        sample = sample_tokens(problem, self.m, generator(rng))
        tokens = joined_tokens(x, y)
        s = sample.gather(tokens)
        left, right, inner = gaussian(x, s), gaussian(s, y), gaussian(s, s)
        if problem.key_mask is not None:
            xp = namespace(right)
            right = xp.where(problem.key_mask[..., None, :], right, xp.zeros_like(right))
        return Skeleton(Dense(left, nonnegative=True), self._inverse(inner), Dense(right), intersection=inner)

    def _inverse(self, inner: Array) -> Array:
        """(κ(s, s) + λI)⁻¹, or what the iteration makes of it."""
        from nla_llm.linalg.inverses import iterated_inverse  # noqa: PLC0415 - floor 1, loaded only where it is used

        xp = namespace(inner)
        if self.core == "exact":
            values, vectors = xp.linalg.eigh(xp.astype(inner, xp.float64, copy=False))
            scaled = vectors / (xp.maximum(values, xp.zeros_like(values)) + self.ridge)[..., None, :]
            return xp.astype(scaled @ xp.matrix_transpose(vectors), inner.dtype, copy=False)
        eye = xp.eye(self.m, dtype=inner.dtype, device=device_of(inner))
        shifted = inner + self.ridge * eye
        root = 1.0 / xp.sqrt(xp.sum(shifted, axis=-1, keepdims=True))
        both = root * xp.matrix_transpose(root)
        return both * iterated_inverse(both * shifted, self.iterations, start=eye)

    @staticmethod
    def target(problem: AttentionProblem) -> Operator:
        """The Gaussian kernel matrix itself, streamed in float64."""
        xp = problem.xp
        x, y = problem.astype(xp.float64).scaled_inputs()
        ones = xp.ones((*x.shape[:-1], 1), dtype=x.dtype, device=device_of(x))
        softmax = SoftmaxAttention(
            xp.concat([x, ones], axis=-1), xp.concat([y, -half_square_norm(y)], axis=-1), scale=1.0,
            key_mask=problem.key_mask,
        )  # fmt: skip
        return Product(Diagonal(xp.exp(softmax.log_sum_exp - half_square_norm(x)[..., 0])), softmax)

    def theory(self, problem: AttentionProblem) -> Theory:
        """Floor of its rank, m, for the error against softmax attention, at which it does not aim."""
        return rank_floor(problem, self.m)

    def cost(self, problem: AttentionProblem) -> costs.Cost:
        """The draw, sorted; three kernel matrices; the inverse; then two products of order nm and one of order m²."""
        n_q, n_k, d, d_v = costs.symbols_of(problem)
        m, f, count = costs.m, costs.formulas, costs.Operations
        draw = count(draw=n_q + n_k) + f.merge_sort(n_q + n_k) + count(mul=(n_q + n_k) * d)
        kernels = gaussian_cost(n_q, m, d) + gaussian_cost(m, n_k, d) + gaussian_cost(m, m, d)
        products = f.matmul(m, n_k, d_v) + f.matmul(m, m, d_v) + f.matmul(n_q, m, d_v)
        return costs.Cost(prepare=draw + kernels + self._inverse_cost(), apply=products)

    def _inverse_cost(self) -> costs.Operations:
        from sympy import Symbol  # noqa: PLC0415 - loads where a formula is asked for

        m, f, count = costs.m, costs.formulas, costs.Operations
        if self.core == "exact":
            return f.eigh(m) + count(compare=m, add=m, div=m**2) + f.matmul(m, m, m)
        scaling = count(mul=4 * m**2, add=m**2, sqrt=m, div=m) + f.sum_of(m, times=m)
        return scaling + f.iterated_inverse(m, Symbol("iterations"))
