import numpy as np
import pytest

from nla_llm.arithmetic import CLASSES, CountedArray, counted, tally
from nla_llm.backend import from_numpy, is_numpy, matmul_where, namespace, to_numpy

rng = np.random.default_rng(0)
A, B = rng.standard_normal((2, 3, 4))


def operations(t):
    return {kind: getattr(t, kind) for kind in CLASSES if getattr(t, kind)}


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (lambda x, y: x + y, {"add": 12}),
        (lambda x, y: x - y, {"add": 12}),
        (lambda x, y: x * y, {"mul": 12}),
        (lambda x, y: x / y, {"div": 12}),
        (lambda x, y: 2.0 * x, {"mul": 12}),
        (lambda x, y: 1 - x, {"add": 12}),
        (lambda x, y: 1 / x, {"div": 12}),
        (lambda x, y: x**2, {"mul": 12}),
        (lambda x, y: abs(x) ** 0.5, {"sqrt": 12}),
        (lambda x, y: abs(x) ** 1.5, {"exp": 12}),
        (lambda x, y: -x, {}),
        (lambda x, y: abs(x), {}),
        (lambda x, y: x < y, {"compare": 12}),
        (lambda x, y: ~((x < y) | (x == 0)), {"compare": 24}),
        (lambda x, y: x @ y.mT, {"madd": 36}),
        (lambda x, y: x[:, 1:] + y[:, None, 1:][..., 0, :], {"add": 9}),
        (lambda x, y: x[:, :1] + y, {"add": 12}),
        (lambda x, y: x[0, :] + y, {"add": 12}),
    ],
)
def test_operators_count_one_for_each_entry_of_the_result(run, expected):
    with tally() as t:
        result = run(counted(A), counted(B))
    assert operations(t) == expected
    mT = np.swapaxes(B, -1, -2)
    plain = A @ mT if "madd" in expected else run(A, B)
    assert np.array_equal(result.array, plain)


def test_a_batched_product_counts_every_matrix():
    a, b = rng.standard_normal((2, 1, 3, 4)), rng.standard_normal((5, 4, 6))
    with tally() as t:
        c = counted(a) @ counted(b)
    assert c.shape == (2, 5, 3, 6)
    assert t.madd == 2 * 5 * 3 * 4 * 6


@pytest.mark.parametrize("vector_first", [True, False])
def test_products_with_vectors(vector_first):
    with tally() as t:
        y = counted(A[:, 0]) @ counted(A) if vector_first else counted(A) @ counted(A[0])
    assert t.madd == 12
    assert np.array_equal(y.array, A[:, 0] @ A if vector_first else A @ A[0])


def test_integers_are_bookkeeping():
    i = counted(np.arange(6))
    with tally() as t:
        (i[:, None] >= i[None, :]) & (i[:, None] - i[None, :] < 3)
        i @ i
    assert operations(t) == {}


# -- entries that a structure removes ------------------------------------------------------------------------------


def causal_softmax_by_hand(s, v):
    """Softmax attention on the lower triangle, entry by entry, with its operations counted by hand."""
    n, d_v = len(s), v.shape[1]
    t = dict.fromkeys(CLASSES, 0)
    out = np.zeros((n, d_v))
    for i in range(n):
        top = s[i, 0]
        for j in range(1, i + 1):
            top = max(top, s[i, j])
            t["compare"] += 1
        weights = []
        for j in range(i + 1):
            weights.append(np.exp(s[i, j] - top))
            t["add"] += 1
            t["exp"] += 1
        total = weights[0]
        for w in weights[1:]:
            total += w
            t["add"] += 1
        for c in range(d_v):
            for j in range(i + 1):
                out[i, c] += weights[j] * v[j, c]
                t["madd"] += 1
            out[i, c] /= total
            t["div"] += 1
    return out, t


@pytest.mark.parametrize("n", [1, 2, 7])
def test_masked_entries_do_not_count(n):
    q, k = rng.standard_normal((2, n, 3))
    v = rng.standard_normal((n, 2))
    expected, by_hand = causal_softmax_by_hand(q @ k.T, v)
    with tally() as t:
        x, y, z = counted(q), counted(k), counted(v)
        xp = namespace(x)
        i = xp.arange(n)
        s = matmul_where(x, xp.matrix_transpose(y), i[:, None] >= i[None, :], -xp.inf)
        weights = xp.exp(s - xp.max(s, axis=-1, keepdims=True))
        result = (weights @ z) / xp.sum(weights, axis=-1, keepdims=True)
    by_hand["madd"] += 3 * n * (n + 1) // 2  # the logits themselves
    assert {kind: getattr(t, kind) for kind in CLASSES} == by_hand
    assert np.allclose(result.array, expected, rtol=1e-13)


def test_liveness_moves_with_the_entries():
    x = namespace(counted(A)).tril(counted(np.ones((4, 4))))
    xp = namespace(x)
    with tally() as t:
        xp.exp(x[1:, :])
        xp.exp(xp.reshape(xp.matrix_transpose(x), (16,)))
        xp.exp(xp.concat([x, counted(np.ones((2, 4)))], axis=0))
        xp.exp(xp.astype(x, xp.float32))
    assert t.exp == 9 + 10 + 18 + 10


def test_adding_a_structural_zero_is_a_copy():
    xp = namespace(counted(A))
    lower, upper = xp.tril(counted(np.ones((4, 4)))), xp.triu(counted(np.ones((4, 4))), k=1)
    with tally() as t:
        whole = lower + upper
    assert t.add == 0
    assert whole.live is None
    with tally() as t:
        lower + counted(np.ones((4, 4)))
    assert t.add == 10


def test_a_dead_minus_infinity_stays_dead_under_addition():
    a = counted(np.ones((3, 3)))
    i = namespace(a).arange(3)
    logits = matmul_where(a, a, i[:, None] >= i[None, :], -np.inf)
    with tally() as t:
        shifted = logits + counted(np.ones((3, 3)))
    assert t.add == 6
    assert np.count_nonzero(shifted.live) == 6


def test_a_product_with_a_triangle_counts_its_live_products():
    x = namespace(counted(A)).tril(counted(np.ones((4, 4))))
    with tally() as t:
        y = x @ counted(np.ones((4, 2)))
        z = x @ x
    assert t.madd == 10 * 2 + sum((i - j + 1) for i in range(4) for j in range(i + 1))
    assert y.live is None
    assert np.array_equal(z.live, np.tri(4, dtype=bool))


def test_running_sums_and_inner_products_skip_what_is_not_there():
    xp = namespace(counted(A))
    lower = xp.tril(counted(np.ones((4, 4))))
    with tally() as t:
        sums = xp.cumulative_sum(lower, axis=0)
        xp.vecdot(lower, counted(np.ones((4, 4))), axis=-1)
    assert (t.add, t.madd) == (10 - 4, 10)
    assert np.array_equal(sums.live, np.tri(4, dtype=bool))


# -- borders -------------------------------------------------------------------------------------------------------


def test_plain_arrays_are_refused():
    x = counted(A)
    for mix in (lambda: x + A, lambda: A + x, lambda: x @ A.T, lambda: A.T @ x):
        with pytest.raises(TypeError):
            mix()


def test_numpy_functions_are_refused_with_a_sentence():
    with pytest.raises(TypeError, match="cannot count"):
        np.asarray(counted(A))
    with pytest.raises(TypeError):
        np.exp(counted(A))


def test_the_backend_takes_it_for_an_array_of_its_own_kind():
    x = counted(A)
    assert not is_numpy(x)
    assert to_numpy(x) is A
    assert isinstance(from_numpy(B, like=x), CountedArray)
    assert from_numpy(B, like=x, dtype=namespace(x).float32).dtype == np.float32


def test_a_buffer_is_filled_without_counting():
    buffer = counted(np.zeros((2, 3)))
    with tally() as t:
        buffer[..., 1, :] = counted(A[0, :3])
    assert operations(t) == {}
    assert np.array_equal(buffer.array, [[0, 0, 0], A[0, :3]])
    with pytest.raises(NotImplementedError, match="live"):
        buffer[0, :] = namespace(buffer).tril(counted(B[:, :3]))[0, :]


def test_scalars_come_out():
    x = counted(np.asarray(2.5))
    assert float(x) == 2.5
    assert bool(x > 1)
    assert int(counted(np.asarray(3))) == 3


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match="'cuda'"):
        counted(A).to_device("cuda")
