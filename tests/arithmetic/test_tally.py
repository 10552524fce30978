import numpy as np
import pytest

from nla_llm.arithmetic import CLASSES, counted, tally, untallied


def test_an_enclosing_tally_counts_what_the_inner_one_counts():
    x = counted(np.ones(5))
    with tally() as outer:
        x + x
        with tally() as inner:
            x * x
        x * x
    assert (inner.add, inner.mul) == (0, 5)
    assert (outer.add, outer.mul) == (5, 10)


def test_a_tally_is_closed_by_an_exception():
    x = counted(np.ones(5))
    with tally() as outer:
        with pytest.raises(ValueError, match="device"), tally():
            (x + x).to_device("cuda")
        x + x
    assert outer.add == 10


def test_nothing_is_recorded_without_a_tally():
    x = counted(np.ones(5))
    x + x
    with tally() as t:
        pass
    assert all(getattr(t, kind) == 0 for kind in CLASSES)


def test_what_leaves_for_numpy_is_reported():
    with tally() as t:
        counted(np.ones((2, 3))).to_numpy()
    assert t.escaped == 6


def test_checks_of_the_input_are_no_work_and_the_count_goes_on_after_them():
    x = counted(np.ones(3))
    with tally() as t:
        with untallied():
            _ = x.to_numpy(), x * x
        _ = x + x
    assert (t.add, t.mul, t.escaped) == (3, 0, 0)


def test_the_count_goes_on_after_a_check_that_failed():
    x = counted(np.ones(3))
    with tally() as t:
        with pytest.raises(ZeroDivisionError), untallied():
            raise ZeroDivisionError
        _ = x + x
    assert t.add == 3
