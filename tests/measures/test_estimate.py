import math

import numpy as np
import pytest

from nla_llm.measures import Estimate


def test_constructors_enclose_their_value():
    a = Estimate.exact(2.0, "known", rounding=0.01)
    assert (float(a.lower), float(a.value), float(a.upper)) == (1.98, 2.0, 2.02)
    b = Estimate.bracket([1.0, 2.0], [3.0, np.inf], "bounds", confidence=0.9)
    assert b.value.tolist() == [2.0, 2.0]
    assert b.shape == (2,)
    assert b.confidence == 0.9
    assert float(b[1].lower) == 2.0
    assert b.width.tolist() == [2.0, np.inf]


@pytest.mark.parametrize(
    ("numbers", "confidence"),
    [((1, 2, 3), 1.0), ((2, 1, 1.5), 1.0), ((np.nan, 0, 1), 1.0), ((1, 1, 1), 0.0), ((1, 1, 1), 1.1)],
)
def test_nonsense_is_refused(numbers, confidence):
    with pytest.raises(ValueError, match=r"lower <= value <= upper|NaN|confidence"):
        Estimate(*numbers, confidence, "nonsense")


def test_only_a_single_estimate_is_a_float():
    assert float(Estimate.exact(1.5, "known")) == 1.5
    with pytest.raises(TypeError, match="pick an entry"):
        float(Estimate.exact([1.5], "known"))


def test_the_arrays_cannot_be_written_to():
    a = Estimate.exact(np.ones(2), "known")
    with pytest.raises(ValueError, match="read-only"):
        a.value[0] = 2


@pytest.mark.parametrize("operation", [lambda a, b: a / b, lambda a, b: a * b])
def test_interval_arithmetic_encloses_every_result(operation):
    rng = np.random.default_rng(0)
    low = rng.uniform(-1, 2, (50,))
    a = Estimate.bracket(low, low + rng.uniform(0, 1, 50), "a", confidence=0.95)
    b = Estimate.bracket(rng.uniform(0.1, 1, 50), rng.uniform(1, 2, 50), "b", confidence=0.98)
    result = operation(a, b)
    assert math.isclose(result.confidence, 0.93)
    for _ in range(50):
        s, t = rng.uniform(size=(2, 50))
        x, y = a.lower + s * a.width, b.lower + t * b.width
        slack = 1e-14
        assert np.all(result.lower - slack <= operation(x, y))
        assert np.all(operation(x, y) <= result.upper + slack)
    corners = [operation(x, y) for x in (a.lower, a.upper) for y in (b.lower, b.upper)]
    assert np.array_equal(result.upper, np.max(corners, axis=0))  # and it is no wider than it must be


def test_roots_powers_and_numbers():
    a = Estimate.bracket(4.0, 9.0, "a")
    assert (float(a.sqrt().lower), float(a.sqrt().upper)) == (2.0, 3.0)
    assert (float((a**2).lower), float((a**2).upper)) == (16.0, 81.0)
    assert (float((a / 2.0).lower), float((2.0 * a).upper)) == (2.0, 18.0)
    assert (a / 2.0).how == "a"
    with pytest.raises(ValueError, match="non-negative"):
        Estimate.bracket(-1.0, 1.0, "b").sqrt()


def test_division_by_what_may_be_zero():
    one = Estimate.exact(1.0, "one")
    with pytest.raises(ZeroDivisionError, match="reference is zero"):
        one / Estimate.exact(0.0, "zero")
    assert float((one / Estimate.bracket(0.0, 2.0, "wide")).upper) == np.inf
    with pytest.raises(ZeroDivisionError, match="may be zero"):
        one / Estimate.bracket(-1.0, 2.0, "both signs")


def test_a_negative_denominator_that_ends_at_zero_leaves_the_quotient_unbounded_below():
    quotient = Estimate.bracket(0.5, 3.0, "") / Estimate(-2.0, -2.0, 0.0, 1.0, "")
    assert float(quotient.lower) == -np.inf
    assert float(quotient.upper) == -0.25
    positive = Estimate.bracket(0.5, 3.0, "") / Estimate(2.0, -0.0, 2.0, 1.0, "")
    assert (float(positive.lower), float(positive.upper)) == (0.25, np.inf)


def test_student_interval_covers_the_mean_as_often_as_it_says():
    samples = np.random.default_rng(0).standard_normal((5, 4000)) + 3
    e = Estimate.from_samples(samples, confidence=0.9)
    assert e.shape == (4000,)
    assert abs(e.contains(3.0).mean() - 0.9) < 4 * math.sqrt(0.9 * 0.1 / 4000)


def test_a_single_sample_has_no_interval():
    e = Estimate.from_samples([2.0])
    assert (float(e.value), float(e.lower), float(e.upper)) == (2.0, -np.inf, np.inf)
    with pytest.raises(ValueError, match="at least one sample"):
        Estimate.from_samples([])


def test_shown_for_readers():
    a = Estimate.bracket(1.0, 2.0, "<how>", confidence=0.99)
    assert str(a) == "1.5 [1, 2] (99 %)"
    assert "&lt;how&gt;" in a._repr_html_()
    assert Estimate.exact(np.ones((2, 2)), "h")._repr_html_().count("<tr>") == 5
