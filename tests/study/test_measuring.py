import numpy as np
import pytest

import nla_llm as nl
from nla_llm.measures import Estimate
from nla_llm.problems import gallery
from nla_llm.study.measuring import attention_records, over_draws


def test_the_median_over_draws_is_no_surer_than_the_union_bound_allows():
    few, many = (
        [Estimate.bracket(1.0 + 0.01 * i, 1.1 + 0.01 * i, "by hand", confidence=0.98) for i in range(count)]
        for count in (6, 60)
    )
    assert np.isclose(over_draws(few).confidence, 1 - 2**-5 - 6 * 0.02)
    assert 0 < over_draws(many).confidence <= 0.01  # 60 · 0.02 leaves nothing


def test_the_bounds_are_order_statistics_of_the_bounds():
    values = [Estimate.bracket(x - 0.1, x + 0.2, "by hand", value=x) for x in (4.0, 1.0, 2.0)]
    found = over_draws(values)
    assert (float(found.value), float(found.lower), float(found.upper)) == (2.0, 0.9, 4.2)


@pytest.mark.parametrize("count", [2, 6, 15])
def test_the_interval_covers_the_median_even_where_no_mean_exists(count):
    """Cauchy samples: the stated confidence is exact for order statistics; 3 standard errors of a proportion."""
    rng, runs = np.random.default_rng(0), 4000
    samples = rng.standard_cauchy((runs, count))
    found = over_draws([Estimate.exact(samples[:, i], "a draw") for i in range(count)])
    covered = np.mean(found.contains(0.0))
    assert abs(covered - found.confidence) < 3 * np.sqrt(found.confidence * (1 - found.confidence) / runs)


def test_one_draw_of_a_random_method_is_refused():
    problem = gallery.gaussian(16, 4)
    with pytest.raises(ValueError, match="at least 2"):
        attention_records(problem, nl.method("random_keys", m=4), draws=1, seed=0)
    (record,) = attention_records(problem, nl.method("uniform"), draws=1, seed=0)
    assert record["relative_frobenius"].confidence == 1
