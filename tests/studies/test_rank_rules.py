"""The study of rank rules: its records against explicit truncation, on matrices of a few rows."""

import numpy as np
import pytest

from nla_llm.study import catalogue


@pytest.fixture(scope="module")
def study():
    return catalogue.load("rank_rules")


def judged(study, *arguments, **options):
    return study.measure.__globals__["judged"](*arguments, **options)


def test_the_error_at_every_rank_is_that_of_explicit_truncation(study):
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((12, 3)) @ rng.standard_normal((3, 20))
    noisy = truth + 0.3 * rng.standard_normal((12, 20))
    found = judged(study, noisy, truth, noise=0.3, edge=2.0, rng=rng)
    u, s, vt = np.linalg.svd(noisy, full_matrices=False)
    for r in range(13):
        error = np.linalg.norm((u[:, :r] * s[:r]) @ vt[:r] - truth) / np.linalg.norm(truth)
        assert found["errors"][r] == pytest.approx(error, rel=1e-10)
    assert found["errors"][0] == pytest.approx(1)
    assert found["ranks"]["GD storage"] == 3


@pytest.mark.parametrize("history", ["stored", "rounded"])
def test_a_small_stored_pair(study, history):
    """Every rule has a record; the model tells the history, and the threshold keeps no noise."""
    cell = {"what": "stored", "order": 96, "dtype": "bfloat16", "size": 1e-2, "history": history, "seeds": 2}
    records = study.measure(cell, 0)
    (pair,) = [record for record in records if record["kind"] == "pair"]
    assert float(pair["history_found"]) == 1
    rules = {record["rule"]: record for record in records if record["kind"] == "rule"}
    assert len(rules) == 8
    assert 14 <= rules["GD storage"]["smallest"] <= rules["GD storage"]["largest"] <= 16
    assert float(rules["GD storage"]["excess"]) < 1.05
    assert float(rules["energy 99 %"]["rank"]) > 20


def test_spikes_come_near_their_limits(study):
    cell = {"what": "spikes", "rows": 100, "columns": 200, "seeds": 6}
    for record in study.measure(cell, 1):
        if record["quantity"] == "singular value":
            assert float(record["measured"]) == pytest.approx(float(record["theory"]), rel=0.1)
