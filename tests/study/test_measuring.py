import math

import numpy as np

from nla_llm.measures import Estimate
from nla_llm.study.measuring import over_draws


def test_the_mean_over_draws_is_no_surer_than_the_union_bound_allows():
    few, many = (
        [Estimate.bracket(1.0 + 0.01 * i, 1.1 + 0.01 * i, "by hand", confidence=0.98) for i in range(count)]
        for count in (5, 60)
    )
    assert math.isclose(over_draws(few).confidence, 0.95 - 5 * 0.02)
    assert 0 < over_draws(many).confidence <= 0.01  # 0.95 − 60 · 0.02 leaves nothing


def test_the_interval_over_draws_holds_that_of_the_mean_and_of_the_measurements():
    values = [Estimate.bracket(x - 0.1, x + 0.2, "by hand", value=x) for x in (1.0, 2.0, 4.0)]
    found, mean = over_draws(values), Estimate.from_samples(np.array([1.0, 2.0, 4.0]))
    assert math.isclose(float(found.value), 7 / 3)
    assert math.isclose(float(found.lower), max(float(mean.lower) - 0.1, 0.0))
    assert math.isclose(float(found.upper), float(mean.upper) + 0.2)
