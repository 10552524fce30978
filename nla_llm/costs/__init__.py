"""What a method costs: a formula for each class of operation, proved by counting the operations really done.

SymPy is loaded when the first formula is asked for.

Examples
--------
>>> import nla_llm as nl
>>> nl.costs.Operations(madd=nl.costs.n**2 * nl.costs.d, exp=nl.costs.n**2).total()
2*d*n**2 + n**2
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
