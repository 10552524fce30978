"""Records by status and entry, and in groups."""

import pandas as pd

from nla_llm.study.frames import groups, succeeded


def test_groups_come_in_order_with_missing_entries():
    records = pd.DataFrame({"m": [8, None, 8, None, 8]})
    assert [len(group) for _, group in groups(records, ["m"])] == [3, 2]


def test_what_failed_is_left_out_even_where_nothing_succeeded():
    records = pd.DataFrame({"status": ["failed", "skipped"], "what": ["loss", "loss"]})
    assert succeeded(records).empty
    assert succeeded(records, what="loss").empty
    assert succeeded(records, layer=0).empty
