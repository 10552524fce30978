import numpy as np
import pytest
from array_api_compat import numpy as plain

from nla_llm.arithmetic import CLASSES, CountedArray, counted, tally
from nla_llm.backend import namespace

rng = np.random.default_rng(1)
A = np.abs(rng.standard_normal((3, 4))) + 0.5
S = A.T @ A
MASK = A > 1
xp = namespace(counted(A))

# (function of (xp, wrap), what it counts as)
ROWS = {
    "exp": (lambda xp, w: xp.exp(w(A)), {"exp": 12}),
    "log": (lambda xp, w: xp.log(w(A)), {"exp": 12}),
    "cosh": (lambda xp, w: xp.cosh(w(A)), {"exp": 12}),
    "sin": (lambda xp, w: xp.sin(w(A)), {"exp": 12}),
    "sqrt": (lambda xp, w: xp.sqrt(w(A)), {"sqrt": 12}),
    "square": (lambda xp, w: xp.square(w(A)), {"mul": 12}),
    "maximum": (lambda xp, w: xp.maximum(w(A), w(A[::-1])), {"compare": 12}),
    "isfinite": (lambda xp, w: xp.isfinite(w(A)), {"compare": 12}),
    "logical_not": (lambda xp, w: xp.logical_not(w(MASK)), {}),
    "clip": (lambda xp, w: xp.clip(w(A), 0.6, 1.0), {"compare": 24}),
    "sum": (lambda xp, w: xp.sum(w(A), axis=-1), {"add": 9}),
    "sum_all": (lambda xp, w: xp.sum(w(A)), {"add": 11}),
    "sum_two_axes": (lambda xp, w: xp.sum(w(A), axis=(0, 1), keepdims=True), {"add": 11}),
    "prod": (lambda xp, w: xp.prod(w(A), axis=0), {"mul": 8}),
    "mean": (lambda xp, w: xp.mean(w(A), axis=0), {"add": 8, "div": 4}),
    "max": (lambda xp, w: xp.max(w(A), axis=-1, keepdims=True), {"compare": 9}),
    "argmin": (lambda xp, w: xp.argmin(w(A), axis=0), {"compare": 8}),
    "any": (lambda xp, w: xp.any(w(MASK), axis=-1), {}),
    "cumulative_sum": (lambda xp, w: xp.cumulative_sum(w(A), axis=0), {"add": 8}),
    "sort": (lambda xp, w: xp.sort(w(A), axis=-1), {"compare": 15}),
    "searchsorted": (lambda xp, w: xp.searchsorted(w(np.arange(5.0)), w(A)), {"compare": 3 * A.size}),
    "argsort": (lambda xp, w: xp.argsort(w(A[0])), {"compare": 5}),
    "matmul": (lambda xp, w: xp.matmul(w(A), w(S)), {"madd": 48}),
    "vecdot": (lambda xp, w: xp.vecdot(w(A), w(A)), {"madd": 12}),
    "where": (lambda xp, w: xp.where(w(MASK), w(A), 0.0), {}),
    "take": (lambda xp, w: xp.take(w(A), w(np.array([2, 0])), axis=0), {}),
    "take_along_axis": (lambda xp, w: xp.take_along_axis(w(A), w(np.array([[1], [0], [3]])), axis=1), {}),
    "concat": (lambda xp, w: xp.concat([w(A), w(A)], axis=1), {}),
    "stack": (lambda xp, w: xp.stack([w(A), w(A)]), {}),
    "broadcast_to": (lambda xp, w: xp.broadcast_to(w(A), (2, 3, 4)), {}),
    "permute_dims": (lambda xp, w: xp.permute_dims(w(A), (1, 0)), {}),
    "tril": (lambda xp, w: xp.tril(w(S), k=-1), {}),
    "astype": (lambda xp, w: xp.astype(w(A), xp.float32), {}),
    "zeros_like": (lambda xp, w: xp.zeros_like(w(A)), {}),
    "eye": (lambda xp, w: xp.eye(3, 2, k=-1, dtype=xp.float64, device="cpu"), {}),
    "arange": (lambda xp, w: xp.arange(2, 7, device="cpu"), {}),
    "linalg.qr": (lambda xp, w: xp.linalg.qr(w(S))[0], {"madd": 120}),
    "linalg.svd": (lambda xp, w: xp.linalg.svd(w(A), full_matrices=False)[1], {"madd": 7 * 4 * 9 + 4 * 27}),
    "linalg.svdvals": (lambda xp, w: xp.linalg.svdvals(w(S)), {"madd": 120}),
    "linalg.eigh": (lambda xp, w: xp.linalg.eigh(w(S))[0], {"madd": 290}),
    "linalg.solve": (lambda xp, w: xp.linalg.solve(w(S + np.eye(4)), w(A.T)), {"madd": 20 + 48}),
    "linalg.vector_norm": (lambda xp, w: xp.linalg.vector_norm(w(A), axis=-1), {"madd": 12, "sqrt": 3}),
    "linalg.vector_norm inf": (lambda xp, w: xp.linalg.vector_norm(w(A), axis=-1, ord=np.inf), {"compare": 9}),
    "linalg.diagonal": (lambda xp, w: xp.linalg.diagonal(w(S)), {}),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_function_counts_as_its_table_says_and_gives_the_plain_value(name):
    run, expected = ROWS[name]
    with tally() as t:
        result = run(xp, counted)
    assert isinstance(result, CountedArray)
    assert {kind: getattr(t, kind) for kind in CLASSES if getattr(t, kind)} == expected
    value = run(plain, np.asarray)
    assert result.dtype == value.dtype
    assert np.array_equal(result.array, value)


def test_a_factorisation_counts_every_matrix_of_a_batch():
    with tally() as t:
        xp.linalg.qr(counted(rng.standard_normal((5, 4, 4))))
    assert t.madd == 5 * 120


def test_where_does_not_undo_work_that_is_done():
    x = counted(A)
    with tally() as t:
        xp.exp(xp.where(counted(MASK), x, 0.0))
    assert t.exp == 12


def test_a_function_that_is_not_told_is_refused_by_name():
    with pytest.raises(AttributeError, match="'erf'"):
        _ = xp.erf
    assert not hasattr(xp, "fft")


def test_types_pass_through():
    assert xp.result_type(counted(A), np.float32) == np.float64
    assert xp.finfo(np.dtype("float32")).eps == 2.0**-23
    assert xp.isdtype(counted(A).dtype, "real floating")
    assert xp.inf == np.inf
