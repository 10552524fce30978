"""Records by status and entry, and in groups."""

import numpy as np
import pandas as pd

from nla_llm.measures import Estimate
from nla_llm.study.frames import groups, standard_error, succeeded


def test_groups_come_in_order_with_missing_entries():
    records = pd.DataFrame({"m": [8, None, 8, None, 8]})
    assert [len(group) for _, group in groups(records, ["m"])] == [3, 2]


def test_what_failed_is_left_out_even_where_nothing_succeeded():
    records = pd.DataFrame({"status": ["failed", "skipped"], "what": ["loss", "loss"]})
    assert succeeded(records).empty
    assert succeeded(records, what="loss").empty
    assert succeeded(records, layer=0).empty


def test_the_standard_error_of_a_mean_is_found_again_from_its_interval():
    samples = np.random.default_rng(0).normal([1.0, 5.0], 1.0, (9, 2))
    e = Estimate.from_samples(samples)
    records = pd.DataFrame({"error": e.value, "error_upper": e.upper, "draws": 9})
    wanted = samples.std(axis=0, ddof=1) / 3
    np.testing.assert_allclose(standard_error(records, "error", records["draws"]), wanted, rtol=1e-12)
