import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import sympy

from nla_llm.study.cells import canonical, complete, flatten, key, records_of, scalar, seed

CELL = {"study": "toy", "method": "uniform", "m": 16, "causal": False, "scale": 0.5, "layer": None}
ESTIMATE = SimpleNamespace(value=np.float64(2.0), lower=1.5, upper=2.5, confidence=0.95, how="seeds")


def test_seed_and_key_do_not_depend_on_the_order_of_entries():
    turned = dict(reversed(CELL.items()))
    assert canonical(turned) == canonical(CELL)
    assert seed(turned) == seed(CELL)
    assert key(turned, "v1") == key(CELL, "v1") != key(CELL, "v2")


def test_every_entry_changes_the_seed():
    variants = [CELL | {name: "other"} for name in CELL] + [CELL | {"new": None}]
    assert len({seed(cell) for cell in [CELL, *variants]}) == len(variants) + 1


@pytest.mark.parametrize(
    ("one", "other"), [({"a": "b_c"}, {"a_b": "c"}), ({"a": 1}, {"a": "1"}), ({"a": 1}, {"a": True})]
)
def test_cells_that_look_alike_when_joined_have_different_seeds(one, other):
    assert seed(one) != seed(other)


def test_seeds_fit_a_double_and_use_all_bits():
    seeds = [seed({"i": i}) for i in range(200)]
    assert len(set(seeds)) == 200
    assert all(0 <= s < 2**53 and int(float(s)) == s for s in seeds)
    ones = np.array([[s >> bit & 1 for bit in range(53)] for s in seeds]).mean(axis=0)
    assert np.all(np.abs(ones - 0.5) < 0.2)  # five standard deviations


def test_seed_is_the_same_on_every_machine_and_for_ever():
    assert seed({"n": 8, "method": "uniform"}) == 4440923036620837


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.array(2.0), 2.0),
        (np.str_("a"), "a"),
        (sympy.Integer(7), 7),
        (sympy.Rational(1, 2), 0.5),
    ],
)
def test_numbers_of_libraries_become_plain(value, plain):
    assert scalar(value, "x") == plain
    assert type(scalar(value, "x")) is type(plain)


@pytest.mark.parametrize("value", [np.zeros(2), [1], {"a": 1}, 1j, object()])
def test_what_is_no_scalar_is_refused_by_name(value):
    with pytest.raises(TypeError, match="column 'x' of a record must be a scalar"):
        records_of({"x": value}, CELL)


@pytest.mark.parametrize(
    ("cell", "word"),
    [
        ({"study": "other"}, "names study"),
        ({"status": 1}, "status"),
        ({"a": math.nan}, "finite"),
        ({"a": math.inf}, "finite"),
    ],
)
def test_bad_cells_are_refused(cell, word):
    with pytest.raises(ValueError, match=word):
        complete("toy", cell)


def test_nested_cells_are_refused():
    with pytest.raises(TypeError, match="entry 'a'"):
        complete("toy", {"a": [1]})


def test_an_estimate_in_a_record_becomes_five_columns():
    (record,) = records_of({"error": ESTIMATE}, CELL)
    expected = {"error": 2.0, "error_lower": 1.5, "error_upper": 2.5, "error_confidence": 0.95, "error_how": "seeds"}
    assert record == flatten(ESTIMATE, "error") == expected
    assert json.loads(json.dumps(record)) == record


def test_an_estimate_of_a_batch_is_refused():
    batch = SimpleNamespace(value=np.ones(3), lower=np.ones(3), upper=np.ones(3), confidence=1.0, how="exact")
    with pytest.raises(TypeError, match=r"shape \(3,\)"):
        records_of({"error": batch}, CELL)


@pytest.mark.parametrize("record", [{"m": 17}, {"status": "ok"}, {"error": ESTIMATE, "error_lower": 0.0}])
def test_a_record_cannot_contradict_its_cell(record):
    with pytest.raises(ValueError, match="column"):
        records_of(record, CELL)


def test_a_record_may_repeat_its_cell():
    assert records_of([{"m": 16, "x": 1}, {"x": 2}], CELL) == [{"m": 16, "x": 1}, {"x": 2}]


@pytest.mark.parametrize("result", [None, "text", 3.0, [1.0]])
def test_measure_must_return_records(result):
    with pytest.raises(TypeError, match="dict or a list of dicts"):
        records_of(result, CELL)
