"""Every refusal of a problem, with its sentence; and what is allowed beside it."""

import re

import numpy as np
import pytest

import nla_llm as nl

EPS = np.finfo(np.float64).eps
EYE = np.eye(3)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def spoilt(value, shape=(3, 3)):
    a = np.ones(shape)
    a[1, 1] = value
    return a


# -- arrays ------------------------------------------------------------------------------------------------------------


def slot(name, value):
    """A problem with one argument replaced."""
    return nl.AttentionProblem(**({"q": EYE, "k": EYE, "v": EYE} | {name: value}))


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([[1.0]], TypeError, "must be an array, got list; pass numpy.asarray"),
        (np.eye(3, dtype=int), TypeError, "must be real and floating, got dtype int64"),
        (np.eye(3, dtype=bool), TypeError, "must be real and floating, got dtype bool"),
        (np.eye(3, dtype=complex), TypeError, "must be real and floating, got dtype complex128"),
        (np.ma.array(EYE), TypeError, "must be a plain array, got numpy MaskedArray"),
        (np.ones(3), ValueError, r"at least two axes \(..., rows, columns\), got shape \(3,\)"),
        (np.ones((0, 3)), ValueError, r"empty axis, shape \(0, 3\)"),
        (np.ones((3, 0)), ValueError, r"empty axis, shape \(3, 0\)"),
        (np.ones((0, 3, 3)), ValueError, r"empty axis, shape \(0, 3, 3\)"),
        (spoilt(np.nan), ValueError, "has 1 entries that are NaN or infinite"),
        (spoilt(np.inf), ValueError, "has 1 entries that are NaN or infinite"),
        (spoilt(-np.inf), ValueError, "has 1 entries that are NaN or infinite"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused_arrays(name, value, error, message):
    with pytest.raises(error, match=f"^{name} .*{message}"):
        slot(name, value)


def test_refused_on_every_library(xp):
    a = xp.asarray(EYE)
    with pytest.raises(ValueError, match="k has 1 entries that are NaN"):
        nl.AttentionProblem(a, xp.asarray(spoilt(np.nan)))
    with pytest.raises(TypeError, match="q must be real and floating"):
        nl.AttentionProblem(xp.asarray(np.eye(3, dtype=np.int64)), a)
    with pytest.raises(TypeError, match="key_mask must be a boolean array"):
        nl.AttentionProblem(a, a, key_mask=xp.asarray(np.ones(3)))
    with pytest.raises(ValueError, match="bias has entries that are NaN"):
        nl.AttentionProblem(a, a, bias=xp.asarray(spoilt(np.inf)))
    with pytest.raises(ValueError, match=r"some query among rows 0\.\.2 sees no key at all"):
        nl.AttentionProblem(a, a, key_mask=xp.asarray(np.zeros(3, dtype=bool)))


@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_matrices_of_numpy_are_refused():
    with pytest.raises(TypeError, match="q must be a plain array, got numpy matrix"):
        slot("q", np.matrix(EYE))


def test_missing_arrays_are_refused():
    for name in ("q", "k"):
        with pytest.raises(TypeError, match=f"{name} must be an array, got NoneType"):
            slot(name, None)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((EYE, np.ones((3, 2))), r"same last axis d, got q \(3, 3\) and k \(3, 2\)"),
        ((EYE, EYE, np.ones((4, 3))), r"v must have as many rows as k, got v \(4, 3\) and k \(3, 3\)"),
        ((np.ones((2, 3, 3)), np.ones((4, 3, 3))), r"do not broadcast: .*'q': \(2, 3, 3\), 'k': \(4, 3, 3\)"),
        ((np.ones((2, 3, 3)), EYE, np.ones((4, 3, 3))), r"do not broadcast: .*'v': \(4, 3, 3\)"),
    ],
)
def test_shapes_that_do_not_fit(arrays, message):
    with pytest.raises(ValueError, match=message):
        nl.AttentionProblem(*arrays)


def test_mixed_precisions_are_refused():
    with pytest.raises(TypeError, match="q and k must have the same dtype, got float64 and float32"):
        nl.AttentionProblem(EYE, EYE.astype(np.float32))


def test_mixed_libraries_are_refused():
    strict = pytest.importorskip("array_api_strict")
    other = strict.asarray(EYE)
    for options in ({"k": other}, {"v": other}, {"bias": other}, {"key_mask": strict.asarray([True] * 3)}):
        name = next(iter(options))
        with pytest.raises(TypeError, match=f"one library, got .*'q': 'numpy'.*'{name}': 'array_api_strict'"):
            nl.AttentionProblem(**({"q": EYE, "k": EYE} | options))
    with pytest.raises(TypeError, match="one library"):
        nl.UpdateProblem(EYE, base=other)
    with pytest.raises(TypeError, match="one library"):
        nl.UpdateProblem.between(EYE, other)


def test_logits_beyond_float64_are_refused():
    with pytest.raises(ValueError, match=r"1e\+200 \* 1e\+200 overflow float64"):
        nl.AttentionProblem(1e200 * EYE, 1e200 * EYE)
    with pytest.raises(ValueError, match="overflow float64"):
        nl.AttentionProblem(EYE, 1e10 * EYE, scale=1e300)
    with pytest.raises(ValueError, match=r"bias up to 1\.79e\+308 on logits up to .* overflows float64"):
        nl.AttentionProblem(1e154 * EYE, 1e153 * EYE, bias=np.full((3, 3), 1.79e308))
    large = nl.AttentionProblem((1e20 * EYE).astype(np.float32), (1e20 * EYE).astype(np.float32))
    assert np.isfinite(large.exact().dense()).all()  # beyond float32, well inside the float64 of the reference


# -- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale", [np.nan, np.inf, -np.inf, 1j, "1", True, [1.0], [1.0, 2.0], np.ones(1), 10**400], ids=lambda x: str(x)[:9]
)
def test_scale_must_be_a_finite_number(scale):
    with pytest.raises(ValueError, match=r"scale must be one finite number, got .*; leave it out for 1/sqrt\(d\)"):
        nl.AttentionProblem(EYE, EYE, scale=scale)


@pytest.mark.parametrize("scale", [0, 2, -0.5, np.float32(0.5), np.int64(2)], ids=repr)
def test_any_finite_number_is_a_scale(scale):
    assert nl.AttentionProblem(EYE, EYE, scale=scale).scale == float(scale)


@pytest.mark.parametrize("window", [0, -1, 2.0, 2.5, np.nan, np.inf, "3", True, [1]], ids=repr)
def test_window_must_be_a_whole_number(window):
    with pytest.raises(ValueError, match="window must be a whole number >= 1"):
        nl.AttentionProblem(EYE, EYE, window=window)


@pytest.mark.parametrize("window", [1, 3, 100, np.int64(2)])
def test_windows(window):
    P = nl.AttentionProblem(EYE, EYE, window=window).exact().dense()
    assert np.count_nonzero(P) == sum(abs(i - j) < window for i in range(3) for j in range(3))


def test_causal_must_be_a_truth_value():
    with pytest.raises(TypeError, match="causal must be True or False, got 'yes'"):
        nl.AttentionProblem(EYE, EYE, causal="yes")


@pytest.mark.parametrize("options", [{"causal": True}, {"window": 2}])
def test_causality_and_window_need_as_many_queries_as_keys(options):
    with pytest.raises(ValueError, match="as many queries as keys, got n_q=3 and n_k=4; for decoding"):
        nl.AttentionProblem(np.ones((3, 2)), np.ones((4, 2)), **options)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([True] * 3, TypeError, r"boolean array \(..., n_k\), True = keep; pass mask.astype\(bool\)"),
        (np.ones(3), TypeError, "boolean array"),
        (np.ones(3, dtype=int), TypeError, "boolean array"),
        (np.ones(4, dtype=bool), ValueError, r"n_k=3\), got \(4,\)"),
        (np.array(True), ValueError, r"n_k=3\), got \(\)"),
        (np.ones((2, 1), dtype=bool), ValueError, r"got \(2, 1\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused_masks(mask, error, message):
    with pytest.raises(error, match=f"key_mask must be .*{message}"):
        nl.AttentionProblem(EYE, EYE, key_mask=mask)


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        ([[0.0]], TypeError, "bias must be an array"),
        (np.zeros((3, 3), dtype=int), TypeError, "bias must be real and floating"),
        (np.zeros(3), ValueError, r"bias must be \(..., n_q=3, n_k=3\), got \(3,\)"),
        (np.zeros((3, 4)), ValueError, r"got \(3, 4\)"),
        (np.zeros((1, 3)), ValueError, r"got \(1, 3\)"),
        (spoilt(np.nan), ValueError, r"NaN or \+inf; only finite entries and -inf"),
        (spoilt(np.inf), ValueError, r"NaN or \+inf; only finite entries and -inf"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused_biases(bias, error, message):
    with pytest.raises(error, match=message):
        nl.AttentionProblem(EYE, EYE, bias=bias)


def test_mask_and_bias_must_broadcast():
    q = np.ones((2, 3, 3))
    with pytest.raises(ValueError, match=r"do not broadcast: .*'key_mask'"):
        nl.AttentionProblem(q, q, key_mask=np.ones((5, 3), dtype=bool))
    with pytest.raises(ValueError, match=r"do not broadcast: .*'bias'"):
        nl.AttentionProblem(q, q, bias=np.zeros((5, 3, 3)))


def but(*hidden, n=4):
    keep = np.ones(n, dtype=bool)
    keep[list(hidden)] = False
    return keep


def hiding(*entries, n=4):
    bias = np.zeros((n, n))
    for entry in entries:
        bias[entry] = -np.inf
    return bias


FULLY_MASKED = {
    "mask": {"key_mask": but(0, 1, 2, 3)},
    "mask of one batch entry": {"key_mask": np.stack([but(), but(0, 1, 2, 3)])},
    "causal and mask": {"key_mask": but(0), "causal": True},
    "window and mask": {"key_mask": but(1, 2, 3), "window": 2},
    "causal, window and mask": {"key_mask": but(2), "causal": True, "window": 1},
    "bias": {"bias": hiding((2, slice(None)))},
    "causal and bias": {"bias": hiding((1, slice(0, 2))), "causal": True},
    "mask and bias": {"key_mask": but(0, 1), "bias": hiding((3, slice(2, 4)))},
}


@pytest.mark.parametrize("options", FULLY_MASKED.values(), ids=FULLY_MASKED)
def test_a_query_that_sees_no_key_is_refused(options):
    with pytest.raises(ValueError, match=re.escape("rows 0..3 sees no key at all (key_mask, bias, causal and window")):
        nl.AttentionProblem(np.eye(4), np.eye(4), **options)


def test_a_late_query_that_sees_no_key_is_found():
    """The check goes over blocks of rows: the second block is named."""
    n, bias = 1030, np.zeros((1030, 1030))
    bias[1027] = -np.inf
    with pytest.raises(ValueError, match=r"rows 1024\.\.1029 sees no key"):
        nl.AttentionProblem(np.ones((n, 1)), np.ones((n, 1)), bias=bias)


@pytest.mark.parametrize(
    "options",
    [
        {"key_mask": but(1, 2, 3), "causal": True},
        {"key_mask": but(0, 3), "window": 2},
        {"bias": hiding((2, slice(0, 3)))},
        {"key_mask": np.stack([but(0), but(3)])},
    ],
)
def test_a_single_visible_key_is_enough(options):
    P = nl.AttentionProblem(draw(0, 4, 2), draw(1, 4, 2), **options).exact().dense()
    np.testing.assert_allclose(P.sum(-1), 1, rtol=0, atol=10 * EPS)


# -- updates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nl.UpdateProblem([[1.0]]), TypeError, "delta must be an array, got list"),
        (lambda: nl.UpdateProblem(np.eye(2, dtype=int)), TypeError, "delta must be real and floating"),
        (lambda: nl.UpdateProblem(np.ones(3)), ValueError, "delta must have at least two axes"),
        (lambda: nl.UpdateProblem(np.ones((3, 0))), ValueError, "delta has an empty axis"),
        (lambda: nl.UpdateProblem(spoilt(np.nan)), ValueError, "delta has 1 entries that are NaN"),
        (lambda: nl.UpdateProblem(EYE, base=np.eye(2)), ValueError, r"shape of delta \(3, 3\), got \(2, 2\)"),
        (lambda: nl.UpdateProblem(EYE, base=spoilt(np.inf)), ValueError, "base has 1 entries"),
        (lambda: nl.UpdateProblem(EYE, inputs=np.ones((5, 2))), ValueError, r"\(samples, d_in=3\), got \(5, 2\)"),
        (lambda: nl.UpdateProblem(EYE, inputs=np.ones((0, 3))), ValueError, "inputs has an empty axis"),
        (lambda: nl.UpdateProblem(EYE, inputs=np.ones(3)), ValueError, "inputs must have at least two axes"),
        (lambda: nl.UpdateProblem.between(EYE, np.eye(2)), ValueError, r"the same shape, got \(3, 3\) and \(2, 2\)"),
        (lambda: nl.UpdateProblem.between(EYE, [[1.0]]), TypeError, "tuned must be an array, got list"),
        (lambda: nl.UpdateProblem.between(spoilt(np.nan), EYE), ValueError, "base has 1 entries"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_refused_updates(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_rounding_to_a_type_that_cannot_hold_the_entries_is_refused():
    q = np.full((3, 2), 1e6)
    with pytest.raises(TypeError, match="q must be real and floating"):
        nl.AttentionProblem(q, q).astype(np.int64)
    with pytest.raises(ValueError, match="NaN or infinite"):
        nl.AttentionProblem(q / 1e4, q / 1e4, q).astype(np.float16)
    with pytest.raises(ValueError, match="delta has"):
        nl.UpdateProblem(q).astype(np.float16)
