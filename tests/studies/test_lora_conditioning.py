"""The study of LoRA's conditioning: what its claims make of training that diverged."""

import pandas as pd
import pytest

from nla_llm.study import catalogue


@pytest.mark.parametrize(("final", "verdict"), [(0.5, "confirmed"), (None, "refuted")])
def test_a_rule_that_diverged_is_within_no_distance_of_the_optimum(final, verdict):
    claims = catalogue.load("lora_conditioning").claims.__globals__
    rows = [
        {"what": "race", "record": "outcome", "status": "ok", "target": "power law", "floor": 0.5}
        | {"optimiser": rule, "final": value}
        for rule, value in (("scaled_gd", 0.5), ("adam", final))
    ]
    outcome = claims["judged"](claims["of"](pd.DataFrame(rows), "race", "outcome"))
    assert claims["power_law"](outcome).verdict == verdict
