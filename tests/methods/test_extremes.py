"""Every method at the ends of the arithmetic: a matrix as promised or a sentence, no NaN, no warning."""

import re
from functools import cache

import numpy as np
import pytest
from registry import ROWS

import nla_llm as nl
from nla_llm.backend import eps, namespace, to_numpy
from nla_llm.methods.update.lora.training import train
from nla_llm.operators import CausalLowRank, Dense, LowRank, RowNormalised, ZeroRowSumError

METHODS = [row for row in ROWS if row.make().properties.problem == "attention"]
UPDATES = [row for row in ROWS if row not in METHODS]
N, D = 32, 8


def drawn(dtype, *, norm=None, std=1.0):
    """Normal queries and keys of a standard deviation, or whose largest norms are ``norm``."""
    rng = np.random.default_rng(0)
    (q, k), v = rng.standard_normal((2, N, D)), rng.standard_normal((N, 3))
    if norm is not None:
        q, k = (a / np.linalg.norm(a, axis=-1).max() for a in (q, k))
    size = std if norm is None else norm
    return nl.AttentionProblem((size * q).astype(dtype), (size * k).astype(dtype), v.astype(dtype))


def in_bfloat16():
    torch = pytest.importorskip("torch")
    return drawn(np.float32).map(torch.asarray).astype(torch.bfloat16)


FITTING = {
    "float16": lambda: drawn(np.float16),
    "longdouble": lambda: drawn(np.longdouble),
    "bfloat16": in_bfloat16,
    "float32, std 50": lambda: drawn(np.float32, std=50),
    "float32, std 500": lambda: drawn(np.float32, std=500),
    "float64, std 500": lambda: drawn(np.float64, std=500),
    "float32, norm 1e10": lambda: drawn(np.float32, norm=1e10),
    "float32, norm 1e18": lambda: drawn(np.float32, norm=1e18),
    "float64, norm 1e153": lambda: drawn(np.float64, norm=1e153),
}
TORCH = {"bfloat16"}
ANY_SIZE = {"uniform", "optimal_rank-m=8", "gaussian_projection-m=8-subspace=optimal"}  # take no squares of q and k
POWERS_OF_SIZE = "poisson_features-m=16"  # of mean |q||k|
BEYOND_WHOLE_NUMBERS = {"float32, norm 1e10", "float32, norm 1e18", "float64, norm 1e153"}
AGAINST_CANCELLATION = 100.0  # units of rounding, times what cancels in a row; empirical


@cache
def fitting(name):
    return FITTING[name]()


@cache
def overflowing():
    half, double = drawn(np.float16, std=50), drawn(np.float64, norm=5e153)
    return half, *(drawn(np.float32, norm=size) for size in (1e19, 1e25, 1e38)), double


def cancellation(op, dense):
    """Sizes that meet in the sum of a row, over the sum."""
    inner = op.op if isinstance(op, RowNormalised) else None
    if not isinstance(inner, LowRank | CausalLowRank):
        return np.abs(dense).sum(-1).max()
    left, right, sums = (np.abs(as_float64(a)) for a in (inner.left, inner.right, op.sums))
    return (left @ right.sum(-2)[:, None] / sums[:, None]).max()


def as_float64(a):
    return to_numpy(namespace(a).astype(a, namespace(a).float64))


def check_matrix(method, problem, op):
    dense, product = as_float64(op.dense()), as_float64(op @ problem.v)
    assert np.isfinite(dense).all()
    assert np.isfinite(product).all()
    if method.properties.nonnegative:
        assert dense.min() >= 0
    if method.properties.row_stochastic:
        unit = max(eps(problem.q), eps(np.zeros(1)))
        defect = np.abs(dense.sum(-1) - 1).max()
        assert defect <= AGAINST_CANCELLATION * unit * cancellation(op, dense)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.torch] if n in TORCH else []) for n in FITTING])
@pytest.mark.parametrize("row", METHODS, ids=str)
def test_what_fits_gives_a_matrix(row, name):
    """Only a row whose kernel sums to zero may be refused, by those who say so."""
    method, problem = row.make(), fitting(name)
    if str(row) == POWERS_OF_SIZE and name in BEYOND_WHOLE_NUMBERS:
        with pytest.raises(nl.Unsupported, match=r"no whole numbers beyond .* pass rate=\.\.\."):
            method(problem, rng=0)
        return
    try:
        op = method(problem, rng=0)
    except ZeroRowSumError:
        assert method.properties.partial
        return
    check_matrix(method, problem, op)


@pytest.mark.parametrize("row", METHODS, ids=str)
def test_what_overflows_is_refused_with_a_sentence(row):
    for problem in overflowing():
        method = row.make()
        if str(row) in ANY_SIZE:
            check_matrix(method, problem, method(problem, rng=0))
            continue
        dtype = problem.q.dtype
        with pytest.raises(nl.Unsupported, match=f"{row.name} squares .*q and k, .* {dtype} ends .*scale q or k down"):
            method(problem, rng=0)


def test_a_row_sum_of_zero_is_refused_with_a_sentence():
    with pytest.raises(ZeroRowSumError, match="pass another rng, a larger m, or a wider dtype than float32"):
        nl.method("cur_attention", m=8)(fitting("float32, std 500"), rng=0)


def test_the_refusal_names_a_precision_that_fits():
    uses = nl.method("random_keys", m=4)
    for problem, fits in ((drawn(np.float16, std=50), "float32"), (drawn(np.float32, norm=1e19), "float64")):
        with pytest.raises(nl.Unsupported, match=rf"pass problem\.astype\(xp\.{fits}\)"):
            uses(problem, rng=0)
        assert np.isfinite(uses(problem.astype(getattr(np, fits)), rng=0).dense()).all()
    with pytest.raises(nl.Unsupported, match=r"float64 ends at 1\.8e\+308; scale q or k down"):
        uses(drawn(np.float64, norm=5e153), rng=0)


@pytest.mark.parametrize("row", [row for row in METHODS if row.make().properties.budget == "m"], ids=str)
def test_a_budget_beyond_the_tokens_works_or_says_what_to_pass(row):
    problem = nl.AttentionProblem(*np.random.default_rng(0).standard_normal((3, 6, 2)))
    method = nl.method(row.name, **{**row.options, "m": 100})
    try:
        op = method(problem, rng=0)
    except ZeroRowSumError:
        assert method.properties.partial
    except ValueError as refusal:
        said = str(refusal)
    else:
        check_matrix(method, problem, op)
        return
    assert "100" in said
    assert "pass" in said


# -- updates -----------------------------------------------------------------------------------------------------------

DELTA, WEIGHT = np.random.default_rng(1).standard_normal((2, 12, 10))
INPUTS = np.random.default_rng(2).standard_normal((20, 10))
LOW_RANK = DELTA[:, :2] @ WEIGHT[:2]
FACTORS = DELTA[:, :6], INPUTS[:10, :6]


def update(delta, *, inputs=INPUTS, dtype=np.float64):
    """An update with a base of its shape and inputs of its width; arrays in a precision."""
    base = np.resize(WEIGHT, delta.shape).astype(dtype)
    if isinstance(delta, np.ndarray):
        delta, inputs = delta.astype(dtype), np.resize(inputs, (len(inputs), delta.shape[-1])).astype(dtype)
    return nl.UpdateProblem(delta, base=base, inputs=inputs)


def of_views(*, writeable):
    arrays = [np.asfortranarray(a)[::-1, ::-1] for a in (DELTA, WEIGHT, INPUTS)]
    for a in arrays:
        a.flags.writeable = writeable
    return nl.UpdateProblem(arrays[0], base=arrays[1], inputs=arrays[2])


def in_torch(dtype, size=1.0, *, gradients=False):
    torch = pytest.importorskip("torch")
    arrays = (torch.asarray(a).to(getattr(torch, dtype)) for a in (size * DELTA, WEIGHT, INPUTS))
    delta, base, inputs = (a.requires_grad_(gradients) for a in arrays)
    return nl.UpdateProblem(delta, base=base, inputs=inputs)


CASES = {
    "zero": lambda: update(0 * DELTA),
    "rank 2": lambda: update(LOW_RANK),
    "rank 2, float32": lambda: update(LOW_RANK, dtype=np.float32),
    "constant": lambda: update(np.full((12, 10), 3.0)),
    "outlier": lambda: update(np.where(np.arange(120).reshape(12, 10) == 34, 1e6, 1e-3)),
    "1 x 1": lambda: update(DELTA[:1, :1]),
    "1 x n": lambda: update(DELTA[:1]),
    "n x 1": lambda: update(DELTA[:, :1]),
    "wide": lambda: update(DELTA.T),
    "float32, 1e38": lambda: update(3e37 * DELTA, dtype=np.float32),
    "float32, 1e-25": lambda: update(1e-25 * DELTA, dtype=np.float32),
    "float32, 1e-40": lambda: update(1e-40 * DELTA, dtype=np.float32),
    "float64, 1e300": lambda: update(1e300 * DELTA),
    "float64, 1e-310": lambda: update(1e-310 * DELTA),
    "float16": lambda: update(DELTA, dtype=np.float16),
    "longdouble": lambda: update(DELTA, dtype=np.longdouble),
    "batch": lambda: update(np.stack([DELTA, 0 * DELTA, LOW_RANK, 1e-12 * DELTA, 1e-200 * DELTA])),
    "reversed views": lambda: of_views(writeable=True),
    "read-only": lambda: of_views(writeable=False),
    "inputs zero": lambda: update(DELTA, inputs=0 * INPUTS),
    "inputs, one": lambda: update(DELTA, inputs=INPUTS[:1]),
    "inputs, 1e200": lambda: update(DELTA, inputs=1e200 * INPUTS),
    "inputs, 1e-200": lambda: update(DELTA, inputs=1e-200 * INPUTS),
    "inputs, operator": lambda: update(Dense(DELTA), inputs=LowRank(INPUTS[:, :3], WEIGHT[:10, :3])),
    "low rank": lambda: update(LowRank(*FACTORS)),
    "low rank, 1e200 times 1e-200": lambda: update(LowRank(1e200 * FACTORS[0], 1e-200 * FACTORS[1])),
    "sum": lambda: update(Dense(DELTA) + LowRank(*FACTORS)),
    "transpose": lambda: update(Dense(DELTA.T).T),
    "float16 of torch": lambda: in_torch("float16"),
    "bfloat16 of torch, 1e37": lambda: in_torch("bfloat16", 1e37),
    "gradients of torch": lambda: in_torch("float64", gradients=True),
}
CASE_NAMES = [pytest.param(name, marks=[pytest.mark.torch] if "torch" in name else []) for name in CASES]
BEYOND_RATES = {"float32, 1e38", "float64, 1e300", "bfloat16 of torch, 1e37", "outlier", "batch"}  # of gradient rules
BEYOND_SCALES = {"float32, 1e-40", "float64, 1e300", "float64, 1e-310", "batch"}  # of a quantiser, kept in float32
NOT_FINITE = {
    "NaN in a matrix": Dense(np.where(DELTA > 2, np.nan, DELTA)),
    "infinity in a matrix": Dense(np.where(DELTA > 2, np.inf, DELTA)),
    "NaN in factors": LowRank(np.where(DELTA > 2, np.nan, DELTA)[:, :6], FACTORS[1]),
    "NaN in a sum": Dense(DELTA) + LowRank(np.where(DELTA > 2, np.nan, DELTA)[:, :6], FACTORS[1]),
    "overflow of factors": LowRank(*(1e200 * f for f in FACTORS)),
}


def made(row, problem):
    """The method of a row, its rank cut to what the problem has."""
    most = min(problem.d_out, problem.d_in) // (2 if row.options.get("initialisation") == "lora_ga" else 1)
    return nl.method(row.name, **{k: min(v, max(most, 1)) if k == "rank" else v for k, v in row.options.items()})


def may_refuse(row, name):
    """The sentence with which a row may refuse a case; "" where it may not."""
    if row.options.get("initialisation") == "lora_ga" and {"1 x 1", "1 x n", "n x 1"} & {name}:
        return r"2 times rank=1 exceeds .* pass a lower rank"
    if row.name == "lora" and name in BEYOND_RATES:
        return r"diverged in step .* take a lower rate, or scale the update"
    if row.make().properties.family == "quantised" and name in BEYOND_SCALES:
        return r"scale lies outside .* of float32, in which it is stored; scale the matrix"
    return ""


def check_brackets(problem, op):
    """Errors lie in their brackets, measured in extended precision."""
    like = problem.like
    exact = problem.operator.dense() if like.dtype == np.longdouble else as_float64(problem.exact().dense())
    left, right = (as_float64(f).astype(np.longdouble) for f in (op.left, op.right))
    error = exact - left @ right.mT
    top = np.where((error != 0).any((-2, -1)), abs(error).max((-2, -1)), 1)
    unit = (error / top[..., None, None]).astype(float)
    for norm, order in (("frobenius", "fro"), ("spectral", 2)):
        bracket, size = op.remaining(norm), top * np.linalg.norm(unit, order, axis=(-2, -1))
        assert (bracket.lower <= size * (1 + 1e-14)).all()  # the truth is rounded, too
        assert (size <= bracket.upper * (1 + 1e-14)).all()


def check_update(method, problem, op):
    dense = as_float64(op.dense())
    assert np.isfinite(dense).all()
    np.testing.assert_array_equal(dense, as_float64(method(problem, rng=np.random.default_rng(0)).dense()))
    if hasattr(op, "remaining"):
        check_brackets(problem, op)


@pytest.mark.parametrize("name", CASE_NAMES)
@pytest.mark.parametrize("row", UPDATES, ids=str)
def test_an_update_gives_a_finite_matrix_within_its_brackets(row, name):
    problem = CASES[name]()
    method = made(row, problem)
    try:
        op = method(problem, rng=0)
    except (ValueError, FloatingPointError) as refusal:
        if sentence := may_refuse(row, name):
            said = str(refusal)
        else:
            raise
    else:
        check_update(method, problem, op)
        return
    assert re.search(sentence, said)


@pytest.mark.parametrize("power", [-1000, 1000])
@pytest.mark.parametrize("row", [r for r in UPDATES if r.name not in {"lora", "zero_update"}], ids=str)
def test_an_update_times_a_number_is_replaced_by_the_same_times_it(row, power):
    """Neither squares nor sums of squares over- or underflow; a quantiser stores scales in float32."""
    method = row.make()
    if method.properties.family == "quantised":
        power = power // 10
    one, other = (as_float64(method(update(np.ldexp(DELTA, p)), rng=0).dense()) for p in (0, power))
    np.testing.assert_allclose(np.ldexp(other, -power), one, atol=1e-12)


@pytest.mark.parametrize("power", [-600, 600])
@pytest.mark.parametrize(
    "row", [r for r in UPDATES if r.name in {"lqer", "qera", "caldera", "data_aware_svd"}], ids=str
)
def test_the_size_of_calibration_inputs_does_not_matter(row, power):
    method = row.make()
    one, other = (method(update(DELTA, inputs=np.ldexp(INPUTS, p)), rng=0).dense() for p in (0, power))
    np.testing.assert_allclose(other, one, atol=1e-12)


@pytest.mark.parametrize("name", NOT_FINITE)
@pytest.mark.parametrize("row", [row for row in UPDATES if row.name != "zero_update"], ids=str)
def test_operators_that_are_not_finite_are_refused_with_a_sentence(row, name):
    with pytest.raises(ValueError, match=r"not finite|NaN, infinite or beyond float64; pass"):
        row.make()(update(NOT_FINITE[name]), rng=0)


@pytest.mark.parametrize("name", NOT_FINITE)
def test_what_remains_of_an_operator_that_is_not_finite_is_refused(name):
    op = nl.method("zero_update")(update(NOT_FINITE[name]))
    for norm in ("frobenius", "spectral"):
        with pytest.raises(ValueError, match="not finite"):
            op.remaining(norm)


@pytest.mark.parametrize("row", [row for row in UPDATES if "rank" in row.options], ids=str)
def test_a_rank_that_means_nothing_is_refused_with_a_sentence(row):
    for rank in (0, -1, 2.5, True, "4", None):
        with pytest.raises(ValueError, match=f"rank must be a whole number >= 1, got {rank!r}"):
            nl.method(row.name, **{**row.options, "rank": rank})
    with pytest.raises(ValueError, match=r"rank=11 exceeds the dimensions of the update, 12 x 10.*; pass"):
        nl.method(row.name, **{**row.options, "rank": 11})(update(DELTA), rng=0)


@pytest.mark.parametrize("row", [row for row in UPDATES if not row.make().properties.deterministic], ids=str)
def test_a_generator_goes_on_and_a_seed_begins_anew(row):
    method, problem, rng = row.make(), update(DELTA), np.random.default_rng(0)
    first, second = (method(problem, rng=rng).dense() for _ in range(2))
    assert "different_seeds" in method.properties.exceptions or not np.array_equal(first, second)
    for again in nl.backend.parallel(lambda seed: method(problem, rng=seed).dense(), [0, 0], threads=2):
        np.testing.assert_array_equal(again, first)
    for rng, sentence in ((None, "rng must be an int or"), (-1, "rng must not be negative")):
        with pytest.raises((TypeError, ValueError), match=sentence):
            method(problem, rng=rng)


@pytest.mark.parametrize("power", [-1000, 1000])
def test_training_and_the_optimum_are_told_at_any_size(power):
    small, large = (update(np.ldexp(DELTA, p)) for p in (0, power))
    best = [nl.method("truncated_svd", rank=4).theory(problem).error("frobenius") for problem in (small, large)]
    np.testing.assert_allclose(np.ldexp(best[1], -power), best[0])
    adapter = nl.method("lora", rank=4, optimiser="alternating", steps=3)
    errors = [train(adapter, problem, rng=0).final() for problem in (small, large)]
    np.testing.assert_allclose(errors[1], errors[0])


def test_training_that_starts_beyond_its_update_has_diverged_with_its_start_recorded():
    adapter = nl.method("lora", rank=3, optimiser="adam", initialisation="lora_ga")
    trained = train(adapter, update(1e-40 * DELTA, dtype=np.float32), rng=0)
    assert (trained.status, trained.steps) == ("diverged", (0,))
    assert "relative error above 1e+06 in step 0" in trained.reason


@pytest.mark.parametrize("power", [-1000, -600, 600, 900])
def test_a_large_update_of_extreme_size_lies_in_its_spectral_bracket(power):
    """Beyond order 512 the norm is bracketed by a Krylov space, which squares the matrix."""
    matrix = np.random.default_rng(3).standard_normal((540, 520))
    op = nl.method("truncated_svd", rank=3)(nl.UpdateProblem(np.ldexp(matrix, power)))
    bracket, size = op.remaining("spectral"), np.linalg.svd(matrix, compute_uv=False)[3]
    assert np.ldexp(bracket.lower, -power) <= size <= np.ldexp(bracket.upper, -power) <= 1.1 * size
