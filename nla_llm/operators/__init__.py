"""The operator algebra: what methods return and what measures take."""

from nla_llm.operators.base import Dense, Operator, Product, Scaled, Sum, Transpose
from nla_llm.operators.lowrank import CausalLowRank, LowRank, RowNormalised, Selection, ZeroRowSumError
from nla_llm.operators.softmax import SoftmaxAttention

__all__ = [
    "CausalLowRank",
    "Dense",
    "LowRank",
    "Operator",
    "Product",
    "RowNormalised",
    "Scaled",
    "Selection",
    "SoftmaxAttention",
    "Sum",
    "Transpose",
    "ZeroRowSumError",
]
