"""Every attention method at the ends of the arithmetic: a matrix as promised or a sentence, no NaN, no warning."""

from functools import cache

import numpy as np
import pytest
from registry import ROWS

import nla_llm as nl
from nla_llm.backend import eps, namespace, to_numpy
from nla_llm.operators import CausalLowRank, LowRank, RowNormalised, ZeroRowSumError

METHODS = [row for row in ROWS if row.make().properties.problem == "attention"]
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
