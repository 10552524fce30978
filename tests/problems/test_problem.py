"""Problems: the reference they give, the copies made of them, and every refusal with its sentence."""

import re

import ml_dtypes
import numpy as np
import pytest

import nla_llm as nl
from nla_llm.backend import to_numpy

EPS = np.finfo(np.float64).eps
EYE = np.eye(3)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def spoilt(value, shape=(3, 3)):
    a = np.ones(shape)
    a[1, 1] = value
    return a


# -- the reference -----------------------------------------------------------------------------------------------------


def test_exact_attention_by_its_definition(xp):
    """All structures at once, on every library; −∞ in the logits hides a key."""
    n = 12
    q, k, bias = draw(0, 2, 1, n, 4), draw(1, 2, 3, n, 4), draw(2, 3, n, n)
    keep = np.arange(n) % 5 != 3
    bias[:, 5, 2] = -np.inf
    problem = nl.AttentionProblem(
        *(xp.asarray(a) for a in (q, k)),
        scale=0.7,
        causal=True,
        window=9,
        key_mask=xp.asarray(keep),
        bias=xp.asarray(bias),
    )
    i, j = np.arange(n)[:, None], np.arange(n)
    hidden = (j > i) | (i - j >= 9) | ~keep
    want = softmax(np.where(hidden, -np.inf, 0.7 * q @ np.swapaxes(k, -1, -2) + bias))
    np.testing.assert_allclose(to_numpy(problem.exact().dense()), want, rtol=0, atol=100 * EPS)
    assert problem.structure == {"causal", "window", "key_mask", "bias"}


def test_window_without_causality_sees_both_sides():
    P = nl.AttentionProblem(draw(0, 7, 2), draw(1, 7, 2), window=2).exact().dense()
    np.testing.assert_array_equal(P > 0, abs(np.arange(7)[:, None] - np.arange(7)) < 2)


def test_scale_defaults_to_the_root_of_the_dimension():
    problem = nl.AttentionProblem(draw(0, 5, 16), draw(1, 6, 16))
    assert problem.scale == 0.25
    np.testing.assert_allclose(problem.exact().dense(), softmax(problem.q @ problem.k.T / 4), rtol=0, atol=10 * EPS)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_reference_is_float64_and_rounds_nothing(dtype, xp):
    """The same numbers as from inputs widened beforehand, to the last bit."""
    kind = getattr(xp, dtype)
    q, k = (xp.astype(xp.asarray(draw(seed, 9, 4)), kind) for seed in (0, 1))
    wide = nl.AttentionProblem(xp.astype(q, xp.float64), xp.astype(k, xp.float64))
    exact = nl.AttentionProblem(q, k).exact()
    assert exact.dtype == xp.float64
    np.testing.assert_array_equal(to_numpy(exact.dense()), to_numpy(wide.exact().dense()))
    assert nl.AttentionProblem(q, k).exact(xp.float32).dtype == xp.float32


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_reference_of_half_precisions(dtype):
    q, k = draw(0, 9, 4).astype(dtype), draw(1, 9, 4).astype(dtype)
    want = softmax(q.astype(float) @ k.astype(float).T / 2)
    exact = nl.AttentionProblem(q, k).exact()
    assert exact.dtype == np.float64
    np.testing.assert_allclose(exact.dense(), want, rtol=0, atol=10 * EPS)


def test_a_numpy_scale_does_not_widen_the_arithmetic():
    q = draw(0, 5, 4).astype(np.float32)
    problem = nl.AttentionProblem(q, q, scale=1 / np.sqrt(np.float64(4)))
    assert type(problem.scale) is float
    assert nl.method("random_keys", m=5)(problem, rng=0).dense().dtype == np.float32


def test_sizes():
    problem = nl.AttentionProblem(draw(0, 2, 1, 5, 4), draw(1, 3, 6, 4), draw(2, 6, 7))
    assert (problem.n_q, problem.n_k, problem.d, problem.d_v, problem.batch_shape) == (5, 6, 4, 7, (2, 3))
    assert nl.AttentionProblem(EYE, EYE).d_v == 3
    assert nl.AttentionProblem(EYE, EYE).structure == frozenset()


def test_mask_and_bias_bring_batch_axes():
    keep = np.ones((2, 1, 3), dtype=bool)
    problem = nl.AttentionProblem(EYE, EYE, key_mask=keep, bias=np.zeros((4, 3, 3)))
    assert problem.batch_shape == (2, 4)
    assert problem.exact().shape == (2, 4, 3, 3)


def test_nothing_can_be_changed():
    problem = nl.AttentionProblem(EYE, EYE)
    with pytest.raises(AttributeError):
        problem.scale = 2.0
    with pytest.raises(AttributeError):
        nl.UpdateProblem(EYE).delta = EYE


# -- copies ------------------------------------------------------------------------------------------------------------


def grouped(xp=np):
    keep = np.arange(6) % 3 != 1
    return nl.AttentionProblem(
        xp.asarray(draw(0, 2, 3, 6, 4)),
        xp.asarray(draw(1, 2, 1, 6, 4)),
        xp.asarray(draw(2, 2, 1, 6, 5)),
        scale=0.3,
        causal=True,
        window=4,
        key_mask=xp.asarray(keep),
        bias=xp.asarray(draw(3, 3, 6, 6)),
    )


def test_head_is_the_problem_of_one_entry(xp):
    problem = grouped(xp)
    P = to_numpy(problem.exact().dense())
    for index in np.ndindex(2, 3):
        head = problem.head(index)
        assert head.batch_shape == ()
        assert (head.scale, head.causal, head.window, head.structure) == (0.3, True, 4, problem.structure)
        np.testing.assert_array_equal(to_numpy(head.exact().dense()), P[index])
        np.testing.assert_array_equal(to_numpy(head.v), draw(2, 2, 1, 6, 5)[index[0], 0])
    assert problem.head(1).batch_shape == (3,)


def test_astype_rounds_all_but_the_mask(xp):
    single = grouped(xp).astype(xp.float32)
    assert all(a.dtype == xp.float32 for a in (single.q, single.k, single.v, single.bias))
    assert xp.isdtype(single.key_mask.dtype, "bool")
    np.testing.assert_array_equal(to_numpy(single.q), draw(0, 2, 3, 6, 4).astype(np.float32))


def test_map_reaches_every_array_and_keeps_the_rest():
    seen = []

    def note(a):
        seen.append(a.shape)
        return a.copy()

    problem = grouped()
    copy = problem.map(note)
    assert sorted(seen) == sorted(a.shape for a in (problem.q, problem.k, problem.v, problem.key_mask, problem.bias))
    assert (copy.scale, copy.causal, copy.window) == (problem.scale, problem.causal, problem.window)
    np.testing.assert_array_equal(copy.exact().dense(), problem.exact().dense())
    assert nl.AttentionProblem(EYE, EYE).map(note).v is None


# -- refusals: arrays --------------------------------------------------------------------------------------------------


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
    large = nl.AttentionProblem((1e20 * EYE).astype(np.float32), (1e20 * EYE).astype(np.float32))
    assert np.isfinite(large.exact().dense()).all()  # beyond float32, well inside the float64 of the reference


# -- refusals: options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, 1j, "1", True, [1.0], [1.0, 2.0], np.ones(1)], ids=repr)
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


def test_update_between_two_matrices(xp):
    base, tuned = xp.asarray(draw(0, 5, 4)), xp.asarray(draw(1, 5, 4))
    problem = nl.UpdateProblem.between(base, tuned, inputs=xp.asarray(draw(2, 7, 4)))
    np.testing.assert_array_equal(to_numpy(problem.exact().dense()), draw(1, 5, 4) - draw(0, 5, 4))
    assert (problem.d_out, problem.d_in, problem.batch_shape, problem.structure) == (5, 4, (), frozenset())
    assert problem.exact().dtype == xp.float64
    single = problem.astype(xp.float32)
    assert all(a.dtype == xp.float32 for a in (single.delta, single.base, single.inputs))
    assert single.exact().dtype == xp.float64
    assert single.exact(xp.float32).dtype == xp.float32


def test_update_map_keeps_what_is_absent():
    doubled = nl.UpdateProblem(EYE, base=3 * EYE).map(lambda a: 2 * a)
    np.testing.assert_array_equal(doubled.exact().dense(), 2 * EYE)
    np.testing.assert_array_equal(doubled.base, 6 * EYE)
    assert doubled.inputs is None


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
