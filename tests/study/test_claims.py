import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nla_llm.study import Claim

finite = st.floats(-10, 10)


@given(st.tuples(finite, finite).map(sorted), finite, st.sampled_from(["<", "<=", ">", ">="]))
def test_the_verdict_is_that_of_every_point_of_the_interval(interval, threshold, sense):
    low, high = interval
    points = [low, high, low + (high - low) / 3]
    holds = [eval(f"{point!r} {sense} {threshold!r}") for point in points]  # noqa: S307 - numbers made here
    verdict = Claim.decide("a claim", low, high, threshold, sense).verdict
    if verdict != "open":
        assert all(holds) if verdict == "confirmed" else not any(holds)
    else:
        assert holds[0] != holds[1]


def test_nan_leaves_a_claim_open():
    assert Claim.decide("a claim", math.nan, 0.1, 0.5).verdict == "open"
    assert Claim.decide("a claim", 0.1, math.nan, 0.5).verdict == "open"


def test_infinite_ends_decide():
    assert Claim.decide("a claim", 1.0, math.inf, 0.5).verdict == "refuted"
    assert Claim.decide("a claim", 0.0, math.inf, 0.5).verdict == "open"


def test_surprise_is_the_contrary_of_what_is_expected():
    assert Claim("a claim", "refuted", "1").surprises
    assert not Claim("a claim", "refuted", "1", expected="refuted").surprises
    assert Claim("a claim", "confirmed", "1", expected="refuted").surprises
    assert not Claim("a claim", "open", "1").surprises


def test_the_number_shows_interval_and_threshold():
    assert Claim.decide("a claim", 0.25, 0.75, 0.5).number == "0.25 to 0.75, claimed < 0.5"
    assert Claim.decide("a claim", 0.25, 0.25, 0.5, number="a quarter").number == "a quarter"


@pytest.mark.parametrize(
    "build",
    [
        lambda: Claim("", "open", "1"),
        lambda: Claim("a claim", "true", "1"),
        lambda: Claim("a claim", "open", "1", expected="open"),
        lambda: Claim.decide("a claim", 2, 1, 0),
        lambda: Claim.decide("a claim", 1, 2, math.nan),
        lambda: Claim.decide("a claim", 1, 2, 0, "=="),
    ],
)
def test_bad_claims_are_refused(build):
    with pytest.raises(ValueError, match=r"claim|verdict|expected|sense"):
        build()
