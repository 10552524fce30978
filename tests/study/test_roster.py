"""The roster: every registered attention method is on it, and every entry can be made."""

import pytest

import nla_llm as nl
from nla_llm.methods.registry import registered
from nla_llm.study.roster import ROSTER


def test_no_method_is_forgotten():
    attention = {name for name in nl.methods() if registered(name).properties.problem == "attention"}
    assert {entry.method for entry in ROSTER.values()} == attention


@pytest.mark.parametrize("label", ROSTER)
def test_entries_are_methods(label):
    entry = ROSTER[label]
    method = entry.make(2)
    assert method.name == entry.method
    assert entry.budget is None or getattr(method, entry.budget) == 2
