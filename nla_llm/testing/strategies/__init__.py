"""Hypothesis strategies for problems and matrices, for other people's test suites.

Sizes, structures and one seed are drawn; the entries come from that seed. So a failing example shrinks to small sizes
and few structures within seconds. Every argument is keyword-only and has a default; an argument that
would leave nothing to draw is refused at once.

Examples
--------
>>> from hypothesis import given, settings
>>> from nla_llm.testing import strategies
>>> @settings(max_examples=20, derandomize=True, database=None, deadline=None)
... @given(strategies.attention_problems(max_tokens=12))
... def rows_of_a_softmax_sum_to_one(problem):
...     sums = problem.exact().dense().sum(axis=-1)
...     assert abs(sums - 1).max() < 1e-12
>>> rows_of_a_softmax_sum_to_one()
"""

from nla_llm.testing.strategies.attention import attention_problems
from nla_llm.testing.strategies.matrices import (
    KnownMatrix,
    ill_conditioned,
    matrices_with_spectrum,
    rank_deficient,
    update_problems,
)

__all__ = [
    "KnownMatrix",
    "attention_problems",
    "ill_conditioned",
    "matrices_with_spectrum",
    "rank_deficient",
    "update_problems",
]
