"""Problems: the reference they give and the copies made of them."""

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


@pytest.mark.parametrize("index", [2, (0, 3), (0, 0, 0), slice(0, 1), (True, 0), 0.0])
def test_a_head_that_is_none_is_refused(index):
    with pytest.raises(ValueError, match=r"index must be whole numbers within the batch axes \(2, 3\)"):
        grouped(np).head(index)


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


# -- updates -----------------------------------------------------------------------------------------------------------


@pytest.mark.torch
def test_tensors_whose_gradients_are_followed():
    torch = pytest.importorskip("torch")
    q, k, v, bias = (torch.tensor(draw(s, 6, 6), requires_grad=True) for s in range(4))
    plain = [a.detach() for a in (q, k, v)]
    for method in (nl.method("positive_features", m=8), nl.method("poisson_features", m=8)):
        followed, same = (method(nl.AttentionProblem(*arrays), rng=0) for arrays in ((q, k, v), plain))
        np.testing.assert_array_equal(to_numpy(followed @ v), to_numpy(same @ plain[2]))
    output = nl.AttentionProblem(q, k, v, bias=bias).exact() @ v
    gradient = torch.autograd.grad((output**2).sum(), q)[0]
    assert 0 < float(gradient.abs().max()) < np.inf


def test_unmasked_every_query_sees_every_key():
    q, k, v = (draw(seed, 5, 3) for seed in range(3))
    problem = nl.AttentionProblem(q, k, v, scale=0.3, causal=True, key_mask=np.arange(5) < 4, bias=draw(3, 5, 5))
    plain = problem.unmasked()
    assert plain.structure == frozenset()
    assert np.array_equal(plain.exact().dense(), nl.AttentionProblem(q, k, v, scale=0.3).exact().dense())
