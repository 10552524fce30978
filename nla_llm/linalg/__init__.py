"""Algorithms on operators and random matrices that measures, methods and their theory share."""

from nla_llm.linalg.basis import extend_basis, gaussian, in_range, orthonormalise, widen, working
from nla_llm.linalg.directions import (
    SOBOL_SEEDS,
    haar_orthogonal,
    orthogonal_directions,
    simplex_directions,
    sobol_directions,
)
from nla_llm.linalg.factors import SVD, factored_svd, low_rank_factors
from nla_llm.linalg.hadamard import next_power_of_two, walsh_hadamard
from nla_llm.linalg.krylov import BlockKrylov, apply_as, apply_widened
from nla_llm.linalg.pivoting import PivotedQR, chosen_columns, interpolation, pivoted_qr, strong_pivoted_qr
from nla_llm.linalg.randomised import (
    gaussian_columns,
    generalised_nystrom,
    least_squares,
    leave_one_out,
    projected_svd,
    randomised_svd,
    range_finder,
)
from nla_llm.linalg.svd import (
    SMALL_ENTRIES,
    KrylovSVD,
    is_small,
    krylov_svd,
    largest_singular_value,
    singular_values,
    truncated_svd,
)
from nla_llm.linalg.triangular import triangular_factor

__all__ = [
    "SMALL_ENTRIES",
    "SOBOL_SEEDS",
    "SVD",
    "BlockKrylov",
    "KrylovSVD",
    "PivotedQR",
    "apply_as",
    "apply_widened",
    "chosen_columns",
    "extend_basis",
    "factored_svd",
    "gaussian",
    "gaussian_columns",
    "generalised_nystrom",
    "haar_orthogonal",
    "in_range",
    "interpolation",
    "is_small",
    "krylov_svd",
    "largest_singular_value",
    "least_squares",
    "leave_one_out",
    "low_rank_factors",
    "next_power_of_two",
    "orthogonal_directions",
    "orthonormalise",
    "pivoted_qr",
    "projected_svd",
    "randomised_svd",
    "range_finder",
    "simplex_directions",
    "singular_values",
    "sobol_directions",
    "strong_pivoted_qr",
    "triangular_factor",
    "truncated_svd",
    "walsh_hadamard",
    "widen",
    "working",
]
