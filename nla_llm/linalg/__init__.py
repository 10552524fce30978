"""Algorithms on operators and random matrices that measures and methods share."""

from nla_llm.linalg.basis import extend_basis, gaussian, orthonormalise, widen
from nla_llm.linalg.directions import (
    SOBOL_SEEDS,
    haar_orthogonal,
    orthogonal_directions,
    simplex_directions,
    sobol_directions,
)
from nla_llm.linalg.factors import SVD, factored_svd, low_rank_factors
from nla_llm.linalg.hadamard import next_power_of_two, walsh_hadamard
from nla_llm.linalg.krylov import BlockKrylov, apply_widened
from nla_llm.linalg.svd import (
    SMALL_ENTRIES,
    is_small,
    largest_singular_value,
    range_finder,
    singular_values,
    truncated_svd,
)

__all__ = [
    "SMALL_ENTRIES",
    "SOBOL_SEEDS",
    "SVD",
    "BlockKrylov",
    "apply_widened",
    "extend_basis",
    "factored_svd",
    "gaussian",
    "haar_orthogonal",
    "is_small",
    "largest_singular_value",
    "low_rank_factors",
    "next_power_of_two",
    "orthogonal_directions",
    "orthonormalise",
    "range_finder",
    "simplex_directions",
    "singular_values",
    "sobol_directions",
    "truncated_svd",
    "walsh_hadamard",
    "widen",
]
