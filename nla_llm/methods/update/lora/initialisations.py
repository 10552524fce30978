"""Where training starts: one row of :data:`INITIALISATIONS` for each published choice of B₀ and A₀.

A start with B₀ ≠ 0 that is taken from the base weight W is subtracted from what stays frozen, W − s·B₀A₀, so that the
model is unchanged at first (``offset``). The trained update is then s·(BA − B₀A₀), of rank up to 2r, and it reaches an
update ΔW only as far as ΔW + s·B₀A₀ has rank r.

The forms are as we read them in the papers and in the code published with them; where these leave a constant open, the
row says what is taken. s is the scale of the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nla_llm import costs
from nla_llm.backend import Array, device_of, from_numpy, namespace
from nla_llm.methods.update.lora.factors import Factors
from nla_llm.methods.update.shared import formed

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    from nla_llm.methods.update.lora.objectives import Regression
    from nla_llm.problems import UpdateProblem

__all__ = ["INITIALISATIONS", "Initialisation", "start"]

LORA_GA_GAMMA = 16.0  # of the published code


@dataclass(frozen=True)
class Initialisation:
    """A choice of the first factors.

    Attributes
    ----------
    make
        (problem, loss, rank, rng) → factors.
    cost
        (d_out, d_in, r, samples) → operations; ``samples`` are those of the problem where it needs inputs, else those
        of the loss, None for a loss without inputs.
    needs
        Any of "base" and "inputs", the arrays that the problem must have.
    offset
        Whether s·B₀A₀ is subtracted from the frozen weight.
    random
        Whether it draws.
    ranks
        How many times the rank must fit into the dimensions.
    """

    make: Callable[[UpdateProblem, Regression, int, Any], Factors]
    cost: Callable[[Any, Any, Any, Any], costs.Operations]
    needs: frozenset[str] = frozenset()
    offset: bool = False
    random: bool = False
    ranks: int = 1


def start(name: str, problem: UpdateProblem, loss: Regression, rank: int, rng: np.random.Generator | None) -> Factors:
    """B₀ (..., d_out, r) and A₀ (..., r, d_in) of the named initialisation, in the precision of the loss.

    Raises
    ------
    ValueError
        If the name is unknown, the problem lacks what it is made from, or the rank does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.methods.update.lora.objectives import regression
    >>> from nla_llm.problems import UpdateProblem
    >>> problem = UpdateProblem(np.eye(3), base=np.diag([9.0, 4.0, 1.0]))
    >>> B, A = start("pissa", problem, regression(problem, "frobenius"), 1, None)
    >>> float((B @ A)[0, 0])
    9.0
    """
    row = INITIALISATIONS[name]
    missing = sorted(n for n in row.needs if getattr(problem, n) is None)
    if missing:
        arguments = ", ".join(f"{n}=..." for n in missing)
        raise ValueError(f"initialisation={name!r} is made from {' and '.join(missing)}; pass UpdateProblem(delta, "
                         f"{arguments})")  # fmt: skip
    if row.ranks * rank > min(problem.d_out, problem.d_in):
        times = "" if row.ranks == 1 else f"{row.ranks} times "
        raise ValueError(
            f"{times}rank={rank} exceeds the dimensions of the update, {problem.d_out} x {problem.d_in}, in "
            f"initialisation={name!r}; pass a lower rank, or another initialisation"
        )
    return row.make(problem, loss, rank, rng)


# -- zero B ------------------------------------------------------------------------------------------------------------


def _gaussian(problem: UpdateProblem, loss: Regression, rank: int, rng: np.random.Generator) -> Factors:
    """A of N(0, 1/d_in): rows of norm about one (the paper leaves the variance open)."""
    return _zero_left(problem, loss, rng.standard_normal(_shape(problem, rank)) * problem.d_in**-0.5)


def _kaiming(problem: UpdateProblem, loss: Regression, rank: int, rng: np.random.Generator) -> Factors:
    """A uniform within ± d_in^(−1/2), of variance 1/(3 d_in): He's bound with a = √5, as layers are made in PyTorch."""
    bound = problem.d_in**-0.5
    return _zero_left(problem, loss, rng.uniform(-bound, bound, size=_shape(problem, rank)))


def _eva(problem: UpdateProblem, loss: Regression, rank: int, rng: Any) -> Factors:
    """Rows of A are the leading right singular vectors of the inputs, which are not centred."""
    x = _inputs(problem, loss)
    if x.shape[-2] < rank:
        raise ValueError(f"initialisation='eva' takes {rank} directions from {x.shape[-2]} samples; pass more samples")
    return _zero_left(problem, loss, _svd(x)[2][..., :rank, :])


def _zero_left(problem: UpdateProblem, loss: Regression, A: Any) -> Factors:
    xp, like = namespace(loss.y), loss.y
    A = from_numpy(A, like=like, dtype=like.dtype)
    A = xp.broadcast_to(A, (*problem.batch_shape, *A.shape[-2:]))
    kind = {"dtype": like.dtype, "device": device_of(like)}
    return Factors(xp.zeros((*problem.batch_shape, problem.d_out, A.shape[-2]), **kind), A)


# -- from the weight ---------------------------------------------------------------------------------------------------


def _pissa(problem: UpdateProblem, loss: Regression, rank: int, rng: Any) -> Factors:
    """s·B₀A₀ is the best approximation of W of rank r, balanced: B₀ = U_r (Σ_r/s)^½, A₀ = (Σ_r/s)^½ V_rᵀ."""
    return _balanced(_base(problem, loss), _leading(rank), loss.scale)


def _milora(problem: UpdateProblem, loss: Regression, rank: int, rng: Any) -> Factors:
    """As PiSSA with the r smallest singular triplets of W."""
    return _balanced(_base(problem, loss), _trailing(rank), loss.scale)


def _olora(problem: UpdateProblem, loss: Regression, rank: int, rng: Any) -> Factors:
    """B₀ and A₀ are the first r columns of Q and rows of R in W = QR."""
    W = _base(problem, loss)
    q, r = namespace(W).linalg.qr(W)
    return Factors(q[..., :, :rank], r[..., :rank, :])


def _corda(which: Callable[[int], slice]) -> Callable[[UpdateProblem, Regression, int, Any], Factors]:
    """s·B₀A₀ = U_r Σ_r V_rᵀ C⁻¹ of the SVD W C = U Σ Vᵀ with C = XᵀX/samples, balanced as PiSSA."""

    def make(problem: UpdateProblem, loss: Regression, rank: int, rng: Any) -> Factors:
        x, W = _inputs(problem, loss), _base(problem, loss)
        xp, samples = namespace(x), int(x.shape[-2])
        if samples < problem.d_in:
            raise ValueError(
                f"CorDA inverts the covariance of the inputs, which {samples} samples of dimension {problem.d_in} make "
                "singular; pass at least d_in samples"
            )
        covariance = (1.0 / samples) * (xp.matrix_transpose(x) @ x)
        B, A = _balanced(W @ covariance, which(rank), loss.scale)
        return Factors(B, xp.matrix_transpose(xp.linalg.solve(covariance, xp.matrix_transpose(A))))

    return make


# -- from the gradient -------------------------------------------------------------------------------------------------


def _lora_ga(problem: UpdateProblem, loss: Regression, rank: int, rng: Any) -> Factors:
    """A₀ = c V_{1…r}ᵀ and B₀ = c U_{r+1…2r} of the gradient at no update, c = d_out^¼/γ^½ with γ = 16.

    The first step of s·BA is then, to first order in the rate, −η s² c² times the best approximation of the gradient
    of rank 2r.
    """
    u, _, vt = _svd(loss.descent())
    size = problem.d_out**0.25 / LORA_GA_GAMMA**0.5
    return Factors(size * u[..., :, rank : 2 * rank], size * vt[..., :rank, :])


def _lora_one(problem: UpdateProblem, loss: Regression, rank: int, rng: Any) -> Factors:
    """s·B₀A₀ is the best approximation of rank r of minus the gradient at no update, balanced; not subtracted from W.

    One step of full gradient descent of rate one, cut to rank r; the paper divides it by a constant γ, taken as one.
    """
    return _balanced(loss.descent(), _leading(rank), loss.scale)


# -- helpers -----------------------------------------------------------------------------------------------------------


def _shape(problem: UpdateProblem, rank: int) -> tuple[int, ...]:
    return (*problem.batch_shape, rank, problem.d_in)


def _base(problem: UpdateProblem, loss: Regression) -> Array:
    return namespace(loss.y).astype(formed("base", problem.base), loss.y.dtype, copy=False)


def _inputs(problem: UpdateProblem, loss: Regression) -> Array:
    return namespace(loss.y).astype(formed("inputs", problem.inputs), loss.y.dtype, copy=False)


def _svd(matrix: Array) -> Any:
    return namespace(matrix).linalg.svd(matrix, full_matrices=False)


def _balanced(matrix: Array, kept: slice, scale: float) -> Factors:
    """The kept triplets of a matrix, over the scale, each singular value shared out equally."""
    u, s, vt = _svd(matrix)
    root = namespace(s).sqrt((1.0 / scale) * s[..., kept])
    return Factors(u[..., :, kept] * root[..., None, :], root[..., :, None] * vt[..., kept, :])


def _leading(rank: int) -> slice:
    return slice(None, rank)


def _trailing(rank: int) -> slice:
    return slice(-rank, None)


# -- costs -------------------------------------------------------------------------------------------------------------


def _drawing(d_out: Any, d_in: Any, r: Any, samples: Any) -> costs.Operations:
    return costs.Operations(draw=r * d_in)


def _balanced_cost(d_out: Any, d_in: Any, r: Any, samples: Any = None) -> costs.Operations:
    return costs.formulas.svd(d_out, d_in) + costs.Operations(mul=r + r * (d_out + d_in), sqrt=r)


def _olora_cost(d_out: Any, d_in: Any, r: Any, samples: Any) -> costs.Operations:
    import sympy  # noqa: PLC0415 - loaded with the first formula

    return costs.formulas.qr(sympy.Max(d_out, d_in), sympy.Min(d_out, d_in))


def _descent_cost(d_out: Any, d_in: Any, samples: Any) -> costs.Operations:
    if samples is None:
        return costs.Operations()
    return costs.formulas.matmul(d_out, samples, d_in) + costs.Operations(mul=d_out * d_in)


def _lora_one_cost(d_out: Any, d_in: Any, r: Any, samples: Any) -> costs.Operations:
    return _descent_cost(d_out, d_in, samples) + _balanced_cost(d_out, d_in, r)


def _lora_ga_cost(d_out: Any, d_in: Any, r: Any, samples: Any) -> costs.Operations:
    scaled = costs.Operations(mul=r * (d_out + d_in))
    return _descent_cost(d_out, d_in, samples) + costs.formulas.svd(d_out, d_in) + scaled


def _eva_cost(d_out: Any, d_in: Any, r: Any, samples: Any) -> costs.Operations:
    return costs.formulas.svd(samples, d_in)


def _corda_cost(d_out: Any, d_in: Any, r: Any, samples: Any) -> costs.Operations:
    covariance = costs.formulas.matmul(d_in, samples, d_in) + costs.Operations(mul=d_in**2)
    back = costs.formulas.solve(d_in, r)
    return covariance + costs.formulas.matmul(d_out, d_in, d_in) + _balanced_cost(d_out, d_in, r) + back


_BASE, _BOTH = frozenset({"base"}), frozenset({"base", "inputs"})
INITIALISATIONS: dict[str, Initialisation] = {
    # Hu et al. 2021, arXiv 2106.09685, section 4.1
    "gaussian": Initialisation(_gaussian, _drawing, random=True),
    # the code published with it
    "kaiming": Initialisation(_kaiming, _drawing, random=True),
    # Meng, Wang and Zhang 2024, arXiv 2404.02948, equations 2-4
    "pissa": Initialisation(_pissa, _balanced_cost, _BASE, offset=True),
    # Wang et al. 2024, arXiv 2406.09044
    "milora": Initialisation(_milora, _balanced_cost, _BASE, offset=True),
    # Büyükakyüz 2024, arXiv 2406.01775
    "olora": Initialisation(_olora, _olora_cost, _BASE, offset=True),
    # Wang, Yu and Li 2024, arXiv 2407.05000
    "lora_ga": Initialisation(_lora_ga, _lora_ga_cost, offset=True, ranks=2),
    # Zhang, Liu and Chen 2025, arXiv 2502.01235
    "lora_one": Initialisation(_lora_one, _lora_one_cost),
    # Paischer et al. 2024, arXiv 2410.07170
    "eva": Initialisation(_eva, _eva_cost, frozenset({"inputs"})),
    # Yang et al. 2024, arXiv 2406.05223: the leading part (instruction previewed) or the trailing (knowledge preserved)
    "corda": Initialisation(_corda(_leading), _corda_cost, _BOTH, offset=True),
    "corda_knowledge": Initialisation(_corda(_trailing), _corda_cost, _BOTH, offset=True),
}
