"""Medians with intervals that assume no distribution, and findings."""

import numpy as np
import pandas as pd
import pytest

from nla_llm.study.medians import finding, median_claim, median_interval, median_text, medians


@pytest.mark.parametrize("count", [6, 7, 20, 36, 101])
def test_interval_covers_the_median_as_often_as_it_says(count):
    """Against simulation: at least 95 %, less a margin of four standard errors; and not always."""
    low, high = median_interval(count)
    draws = np.sort(np.random.default_rng(count).standard_exponential((4000, count)), axis=1)
    covered = np.mean((draws[:, low] <= np.log(2)) & (np.log(2) <= draws[:, high]))
    assert 0.95 - 4 * np.sqrt(0.05 * 0.95 / 4000) <= covered < 0.9999


def test_few_values_are_enclosed_by_their_extremes():
    assert [median_interval(count) for count in (1, 2, 5)] == [(0, 0), (0, 1), (0, 4)]


def test_medians_by_group_in_order_with_missing_entries():
    records = pd.DataFrame({"m": [8, None, 8, None, 8], "error": [3.0, 5.0, 1.0, 7.0, 2.0]})
    found = medians(records, ["m"], "error")
    assert found["median"].to_list() == [2.0, 6.0]
    assert found["heads"].to_list() == [3, 2]
    assert (found["lower"].to_list(), found["upper"].to_list()) == ([1.0, 5.0], [3.0, 7.0])


def test_a_single_head_has_the_interval_of_its_estimate():
    one = pd.DataFrame({"error": [2.0], "error_lower": [1.5], "error_upper": [2.25]})
    assert median_text(one, "error") == "2 [1.5, 2.25]"


@pytest.mark.parametrize(
    ("low", "high", "sentence", "verdict"),
    [(0.6, 0.9, "yes", "confirmed"), (0.2, 0.5, "no", "confirmed"), (0.4, 0.6, "yes", "open")],
)
def test_a_finding_never_contradicts_an_expectation(low, high, sentence, verdict):
    claim = finding("yes", "no", low, high, 0.5, number="n")
    assert (claim.sentence, claim.verdict, claim.surprises) == (sentence, verdict, False)


def test_a_claim_about_a_median_rests_on_its_interval():
    values = pd.Series([0.5, 0.25, 0.75])
    verdicts = [median_claim("below", values, threshold, "<", what="error").verdict for threshold in (0.8, 0.6, 0.2)]
    assert verdicts == ["confirmed", "open", "refuted"]
    assert median_claim("below", values[:1], 0.6, "<", what="error").number == "error 0.5"
