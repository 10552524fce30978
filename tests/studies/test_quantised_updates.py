"""The study of quantised matrices: error bars of its claims."""

import numpy as np
import pandas as pd

from nla_llm.study import catalogue


def test_formats_and_ranks_do_not_narrow_an_interval_over_matrices():
    claims = catalogue.load("quantised_updates").claims.__globals__
    errors = np.random.default_rng(0).normal(0.98, 0.2, 12)

    def claim(pairs):
        rows = [
            {"what": "model", "status": "ok", "tensor": f"t{i}", "form": form, "rank": rank}
            | {"label": label, "output": error if label == "QERA" else 1.0}
            for i, error in enumerate(errors)
            for form, rank in pairs
            for label in ("QERA", "LQER")
        ]
        return claims["unseen_claim"](pd.DataFrame(rows))

    once = claim([("nf4", 8)])
    assert once.verdict == "open"
    assert claim([("nf4", 8), ("nf4", 32), ("int3", 8), ("int3", 32), ("int4", 8), ("int8", 8)]) == once
