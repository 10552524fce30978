"""How wrong: norms, errors, divergences and condition numbers of operators, each with its error bar."""

from nla_llm.measures.conditioning import (
    AttentionCondition,
    NormaliserCondition,
    attention_condition,
    condition_number,
    gram_condition,
    normaliser_condition,
    softmax_condition,
)
from nla_llm.measures.errors import NORMS, output_error, relative_error, row_divergence
from nla_llm.measures.estimate import Estimate
from nla_llm.measures.leading import leading_spectrum
from nla_llm.measures.norms import (
    frobenius_norm,
    inf_norm,
    max_norm,
    nuclear_norm,
    one_norm,
    stable_rank,
)
from nla_llm.measures.ranks import RankRange, Spectrum, rank_above, rank_of_energy, rank_of_tolerance
from nla_llm.measures.spectral import krylov_steps, spectral_norm
from nla_llm.measures.subspaces import (
    Intruders,
    amplification,
    intruder_dimensions,
    principal_angles,
    subspace_similarity,
)

__all__ = [
    "NORMS",
    "AttentionCondition",
    "Estimate",
    "Intruders",
    "NormaliserCondition",
    "RankRange",
    "Spectrum",
    "amplification",
    "attention_condition",
    "condition_number",
    "frobenius_norm",
    "gram_condition",
    "inf_norm",
    "intruder_dimensions",
    "krylov_steps",
    "leading_spectrum",
    "max_norm",
    "normaliser_condition",
    "nuclear_norm",
    "one_norm",
    "output_error",
    "principal_angles",
    "rank_above",
    "rank_of_energy",
    "rank_of_tolerance",
    "relative_error",
    "row_divergence",
    "softmax_condition",
    "spectral_norm",
    "stable_rank",
    "subspace_similarity",
]
