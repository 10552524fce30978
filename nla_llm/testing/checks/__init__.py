"""The checks: one function for each law, and the tables of them."""

from nla_llm.testing.checks.convergence import CONVERGENCE
from nla_llm.testing.checks.costs import COSTS
from nla_llm.testing.checks.invariances import INVARIANCES
from nla_llm.testing.checks.statistics import STATISTICS, THEORY
from nla_llm.testing.checks.universal import ATTENTION_ONLY, OPERATOR, UNIVERSAL
from nla_llm.testing.checks.update import UPDATES

__all__ = ["ATTENTION", "OPERATOR", "UPDATE"]

ATTENTION = (*UNIVERSAL, *ATTENTION_ONLY, *INVARIANCES, *CONVERGENCE, *STATISTICS, *COSTS, *THEORY)
UPDATE = (*UNIVERSAL, *UPDATES, *COSTS, *THEORY)
