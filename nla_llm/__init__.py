"""A test bench for the linear algebra of large language models.

Whoever replaces a matrix inside a language model by a cheaper one finds out how wrong it is, what theory promised, how
it compares with doing nothing and with the best possible, what it cost, and in which arithmetic.

Examples
--------
>>> import numpy as np
>>> import nla_llm as nl
>>> q, k, v = np.random.default_rng(0).standard_normal((3, 64, 8))
>>> problem = nl.AttentionProblem(q, k, v)
>>> exact, approximate = problem.exact(), nl.method("elu_features")(problem)
>>> bool(nl.measures.relative_error(exact, approximate, norm="spectral").value < 1)
True
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
