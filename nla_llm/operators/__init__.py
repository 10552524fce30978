"""The operator algebra: what methods return and what measures take."""

from nla_llm.operators.base import Dense, Operator, Product, Scaled, Sum, Transpose
from nla_llm.operators.blocks import Averaged, SegmentDiagonal, Segments
from nla_llm.operators.hierarchy import BlockLowRank, Grouped, MonarchMatrix, Permutation
from nla_llm.operators.lowrank import CausalLowRank, LowRank, RowNormalised, Selection, ZeroRowSumError
from nla_llm.operators.skeleton import Diagonal, Skeleton
from nla_llm.operators.softmax import SoftmaxAttention
from nla_llm.operators.sorted_blocks import SortedBlocks
from nla_llm.operators.sparse import Panel, TiledSparse, gather_rows
from nla_llm.operators.stepped import Step, SteppedLowRank
from nla_llm.operators.widened import Widened, widened

__all__ = [
    "Averaged",
    "BlockLowRank",
    "CausalLowRank",
    "Dense",
    "Diagonal",
    "Grouped",
    "LowRank",
    "MonarchMatrix",
    "Operator",
    "Panel",
    "Permutation",
    "Product",
    "RowNormalised",
    "Scaled",
    "SegmentDiagonal",
    "Segments",
    "Selection",
    "Skeleton",
    "SoftmaxAttention",
    "SortedBlocks",
    "Step",
    "SteppedLowRank",
    "Sum",
    "TiledSparse",
    "Transpose",
    "Widened",
    "ZeroRowSumError",
    "gather_rows",
    "widened",
]
