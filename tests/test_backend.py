"""The wall to array libraries: namespaces, conversions, generators, threads."""

import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from nla_llm import backend
from nla_llm.arithmetic import counted, tally
from nla_llm.backend import (
    by_heads,
    eps,
    from_numpy,
    generator,
    has_tuned_products,
    is_array,
    is_numpy,
    is_real_floating,
    matmul,
    matmul_where,
    namespace,
    parallel,
    thread_count,
    to_numpy,
)
from nla_llm.operators import CausalLowRank, _chunked

MATRIX = np.arange(6.0).reshape(2, 3) - 2


# -- namespaces and conversions ----------------------------------------------------------------------------------------


def test_namespace_of_each_library(xp):
    x = xp.asarray(MATRIX)
    assert namespace(x).__name__ == xp.__name__
    assert namespace(x, x) is namespace(x)
    assert is_array(x)
    assert is_numpy(x) == (xp.__name__ == "array_api_compat.numpy")
    assert has_tuned_products(x) == ("numpy" in xp.__name__ or "torch" in xp.__name__)


@pytest.mark.parametrize("x", [1.0, [1.0], (1,), None, "x", SimpleNamespace(shape=(1,))])
def test_what_is_no_array(x):
    assert not is_array(x)
    assert not is_numpy(x)


def test_plain_numpy_means_no_subclass():
    assert is_numpy(MATRIX, MATRIX[0])
    assert not is_numpy(MATRIX, np.ma.array(MATRIX))


def test_arrays_of_different_libraries_have_no_namespace():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError):
        namespace(MATRIX, torch.ones(2))


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "bool"])
def test_conversion_there_and_back(dtype, xp):
    a = MATRIX.astype(dtype)
    x = from_numpy(a, like=xp.asarray([0.0]))
    assert x.dtype == getattr(xp, dtype)
    back = to_numpy(x)
    assert type(back) is np.ndarray
    assert back.dtype == a.dtype
    np.testing.assert_array_equal(back, a)


def test_conversion_to_another_dtype(xp):
    x = from_numpy(MATRIX, like=xp.asarray([0.0]), dtype=xp.float32)
    assert x.dtype == xp.float32
    np.testing.assert_array_equal(to_numpy(x), MATRIX)


def test_scalars_and_gradients_become_numpy():
    assert to_numpy(2.0) == np.float64(2)
    assert to_numpy(np.float32(2)).dtype == np.float32
    torch = pytest.importorskip("torch")
    np.testing.assert_array_equal(to_numpy(torch.ones(2, requires_grad=True)), [1, 1])


def test_eps_of_every_library(xp):
    for dtype, bits in (("float32", 23), ("float64", 52)):
        x = xp.zeros(1, dtype=getattr(xp, dtype))
        assert eps(x) == 2.0**-bits
        assert eps(SimpleNamespace(xp=xp, dtype=x.dtype)) == 2.0**-bits


@pytest.mark.parametrize(
    ("dtype", "bits"), [(ml_dtypes.bfloat16, 7), (ml_dtypes.float8_e4m3fn, 3), (np.float16, 10), (">f8", 52)]
)
def test_eps_of_formats_that_numpy_does_not_know(dtype, bits):
    assert eps(np.zeros(1, dtype)) == 2.0**-bits


@pytest.mark.parametrize(
    ("dtype", "answer"),
    [(np.float16, True), (np.float32, True), (ml_dtypes.bfloat16, True), (int, False), (bool, False), (complex, False)],
)
def test_real_floating(dtype, answer):
    assert is_real_floating(np.zeros(1, dtype)) is answer


# -- randomness --------------------------------------------------------------------------------------------------------


def test_a_generator_is_passed_through_and_a_seed_makes_one():
    rng = np.random.default_rng(3)
    assert generator(rng) is rng
    want = np.random.default_rng(3).random()
    for seed in (3, np.int32(3), np.uint64(3)):
        assert generator(seed).random() == want


@pytest.mark.parametrize(
    "rng", [None, True, 1.0, "0", np.random.RandomState(0), np.random, [0]], ids=lambda x: type(x).__name__
)
def test_hidden_randomness_is_refused(rng):
    with pytest.raises(TypeError, match=r"rng must be an int or a numpy\.random\.Generator .*; pass rng=0"):
        generator(rng)


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="rng must not be negative where it is a number, got -1; pass rng=0"):
        generator(-1)


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [0.0, -np.inf])
def test_product_under_a_mask(fill, xp):
    a, b = MATRIX, MATRIX.T + 1
    keep = np.tri(2, dtype=bool)
    got = matmul_where(xp.asarray(a), xp.asarray(b), xp.asarray(keep), fill)
    np.testing.assert_array_equal(to_numpy(got), np.where(keep, a @ b, fill))


def test_product_under_a_mask_with_batch_axes(xp):
    a, b = np.stack([MATRIX, -MATRIX]), np.stack([MATRIX.T, MATRIX.T])
    keep = np.array([[True, False], [True, True]])
    got = matmul_where(xp.asarray(a), xp.asarray(b), xp.asarray(keep))
    np.testing.assert_array_equal(to_numpy(got), np.where(keep, a @ b, 0))


def test_product_under_a_mask_counts_what_is_kept():
    """Three of four entries, each over three terms."""
    a, b, keep = counted(MATRIX), counted(MATRIX.T), counted(np.tri(2, dtype=bool))
    with tally() as all_entries:
        matmul(a, b)
    with tally() as kept:
        product = matmul_where(a, b, keep)
    assert (all_entries.madd, kept.madd) == (12, 9)
    np.testing.assert_array_equal(to_numpy(product), np.tril(MATRIX @ MATRIX.T))


def test_products_of_mixed_precision_have_the_wider(xp):
    a, b = xp.asarray(MATRIX), xp.astype(xp.asarray(MATRIX.T), xp.float32)
    for product in (matmul(a, b), matmul(xp.matrix_transpose(b), xp.matrix_transpose(a))):
        assert product.dtype == xp.float64
    np.testing.assert_array_equal(to_numpy(matmul(a, b)), MATRIX @ MATRIX.T)


# -- threads -----------------------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_tasks():
    """Later tasks finish first."""

    def slow(i):
        time.sleep(0.002 * (8 - i))
        return i * i

    assert parallel(slow, range(8), threads=4) == [i * i for i in range(8)]
    assert parallel(slow, iter([7, 6]), threads=2) == [49, 36]
    assert parallel(slow, []) == []


def test_tasks_run_side_by_side():
    """Two tasks that wait for each other finish only if both run."""
    meeting = threading.Barrier(2, timeout=20)
    assert parallel(lambda _: meeting.wait() >= 0, range(2), threads=2) == [True, True]


def test_one_thread_is_the_caller():
    assert parallel(lambda _: threading.get_ident(), range(3), threads=1) == [threading.get_ident()] * 3


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_exception_is_raised_again(threads):
    def fail(i):
        if i % 2:
            raise KeyError(i)
        return i

    with pytest.raises(KeyError, match="1"):
        parallel(fail, range(6), threads=threads)


def blas_threads(_=None):
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


@pytest.fixture
def two_blas_threads():
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        assert before == {2}
        yield
        assert blas_threads() == before


@pytest.mark.parametrize(("tasks", "threads"), [(2, 2), (1, 2), (2, 1), (1, None)])
@pytest.mark.usefixtures("two_blas_threads")
def test_blas_is_held_to_one_thread_and_released(tasks, threads):
    """Beside a single task too: threads of BLAS that share a small product mostly wait for each other."""
    assert parallel(blas_threads, range(tasks), threads=threads) == [{1}] * tasks
    assert blas_threads() == {2}


@pytest.mark.usefixtures("two_blas_threads")
def test_blas_is_released_where_a_task_fails():
    with pytest.raises(ZeroDivisionError):
        parallel(lambda i: 1 / i, [0])
    assert blas_threads() == {2}


@pytest.mark.usefixtures("two_blas_threads")
def test_causal_products_of_one_head_hold_blas(monkeypatch):
    seen = []
    product = _chunked._group_product
    monkeypatch.setattr(_chunked, "_group_product", lambda *a, **k: seen.append(blas_threads()) or product(*a, **k))
    op = CausalLowRank(np.ones((300, 4)), np.ones((300, 4)))
    np.testing.assert_array_equal(op @ np.ones((300, 1)), 4 * np.arange(1.0, 301)[:, None])
    assert seen
    assert all(threads == {1} for threads in seen)


@pytest.mark.parametrize(
    ("wanted", "cores", "threads"), [("", 4, 4), ("2", 4, 2), ("8", 4, 4), ("0", 4, 4), ("two", 4, 4)]
)
def test_thread_count(monkeypatch, wanted, cores, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    monkeypatch.setattr(backend, "_cores", lambda: cores)
    assert thread_count() == threads


def test_cores_are_those_of_the_process():
    assert 1 <= backend._cores() <= os.cpu_count()


def test_the_package_imports_no_heavy_library():
    heavy = {"sympy", "matplotlib", "pandas", "scipy", "torch", "threadpoolctl"}
    code = f"import sys, nla_llm, nla_llm.backend; print(*({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)  # noqa: S603 - ours
    assert run.stdout.strip() == ""


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4), (3, 2, 256, 128)])
def test_by_heads_is_the_function(shape):
    """One array or several, small or large enough for threads, with an array that all heads share."""
    x, shared = np.random.default_rng(0).standard_normal(shape), np.arange(shape[-1], dtype=float)

    def both(a, b):
        return a + b, np.max(a, axis=-1, keepdims=True)

    np.testing.assert_array_equal(by_heads(lambda a, b: a + b, x, shared), x + shared)
    total, top = by_heads(both, x, shared)
    np.testing.assert_array_equal(total, x + shared)
    np.testing.assert_array_equal(top, np.max(x, axis=-1, keepdims=True))
