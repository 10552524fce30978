"""Polynomial kernels and cosFormer against their dense definitions; packing against the enumeration of monomials."""

import itertools
from collections import Counter
from math import comb, factorial, prod

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods.attention.kernels import deterministic_features as features
from nla_llm.operators import ZeroRowSumError
from nla_llm.theory import polynomials

EPS = np.finfo(np.float64).eps
KINDS = {
    "taylor_features": lambda u, p: sum(u**k / factorial(k) for k in range(p + 1)),
    "polynomial_features": lambda u, p: (1 + u) ** p,
}


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def normalised(kernel, *, causal=False, key_mask=None):
    a = kernel if key_mask is None else kernel * key_mask[..., None, :]
    a = np.tril(a) if causal else a
    return a / a.sum(axis=-1, keepdims=True)


# -- packing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("variables", "degree"), [(1, 1), (1, 5), (2, 1), (3, 2), (4, 3), (3, 6)])
def test_packing_enumerates_the_monomials_once_each(variables, degree):
    x = np.random.default_rng(0).uniform(0.5, 2, (2, 3, variables))
    indices = list(itertools.combinations_with_replacement(range(variables), degree))
    assert len(indices) == comb(variables + degree - 1, degree)
    np.testing.assert_allclose(
        features.monomials(x, degree), np.stack([np.prod(x[..., list(i)], axis=-1) for i in indices], -1), rtol=1e-14
    )
    table = features.packing(variables, degree)
    counts = [Counter(i) for i in indices]
    assert table.leading.tolist() == [c[0] for c in counts]
    assert table.multinomial.tolist() == [factorial(degree) / prod(map(factorial, c.values())) for c in counts]


@pytest.mark.parametrize(("d", "p", "count"), [(64, 2, 2145), (1, 3, 4), (4, 8, 495)])
def test_symmetric_packing_needs_fewer_features_than_tensor_powers(d, p, count):
    method = nl.method("taylor_features", degree=p)
    assert method.features_of(d) == count == comb(d + p, p)
    assert method(nl.AttentionProblem(draw(0, 5, d) ** 2, draw(1, 5, d) ** 2)).op.rank == count


def test_more_features_than_fit_are_refused_before_anything_is_made():
    q = np.ones((2, 100, 64))
    with pytest.raises(ValueError, match=r"degree=6 makes C\(d\+p, p\) = 131115985 features .* 400 queries and keys"):
        nl.method("taylor_features", degree=6)(nl.AttentionProblem(q, q))


# -- the definition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["plain", "causal", "masked", "both"])
@pytest.mark.parametrize("scale", [0.3, -0.2])
@pytest.mark.parametrize("degree", [1, 2, 3, 6])
@pytest.mark.parametrize("name", KINDS)
def test_the_kernel_is_the_polynomial_of_the_logits(name, degree, scale, structure):
    n = 97
    q, k, v = 0.8 * draw(0, 2, n, 3), 0.8 * draw(1, 2, n, 3), draw(2, 2, n, 2)
    keep = np.arange(n) % 4 != 2 if structure in {"masked", "both"} else None
    causal = structure in {"causal", "both"}
    u = scale * q @ np.swapaxes(k, -1, -2)
    kernel = KINDS[name](u, degree)
    want = normalised(kernel, causal=causal, key_mask=keep)
    op = nl.method(name, degree=degree)(nl.AttentionProblem(q, k, scale=scale, causal=causal, key_mask=keep))
    condition = np.max(np.abs(KINDS[name](np.abs(u), degree)) / np.abs(kernel.sum(-1, keepdims=True)))
    tolerance = 1e3 * EPS * max(1.0, condition) * np.abs(want).max()
    np.testing.assert_allclose(op.dense(), want, rtol=0, atol=tolerance)
    np.testing.assert_allclose(op @ v, want @ v, rtol=0, atol=n * tolerance)
    before = np.exp(op.row_scale_log)[..., None] * op.op.dense()
    visible = (np.tri(n) if causal else 1.0) * (1.0 if keep is None else keep)
    np.testing.assert_allclose(before, kernel * visible, rtol=0, atol=1e3 * EPS * np.abs(kernel).max())


@pytest.mark.parametrize("name", KINDS)
def test_other_libraries_and_grouped_queries(name, xp):
    q, k = 0.5 * draw(0, 2, 3, 11, 2), 0.5 * draw(1, 2, 1, 13, 2)
    want = normalised(KINDS[name](q @ np.swapaxes(k, -1, -2) / 2**0.5, 4))
    op = nl.method(name, degree=4)(nl.AttentionProblem(xp.asarray(q), xp.asarray(k)))
    np.testing.assert_allclose(to_numpy(op.dense()), want, rtol=0, atol=1e4 * EPS)


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_blocks_of_rows_change_nothing(rows, monkeypatch):
    problem = nl.AttentionProblem(draw(0, 20, 3), draw(1, 20, 3))
    whole = nl.method("taylor_features", degree=2)(problem).dense()
    monkeypatch.setattr(features, "_BLOCK_ENTRIES", 10 * rows)
    np.testing.assert_array_equal(nl.method("taylor_features", degree=2)(problem).dense(), whole)


# -- convergence, range, signs -----------------------------------------------------------------------------------------


def test_taylor_converges_to_softmax_as_its_remainder_says():
    q, k = draw(0, 40, 4), draw(1, 40, 4)
    problem = nl.AttentionProblem(q, k)
    largest = np.abs(q @ k.T / 2).max()
    for degree in (2, 4, 8, 16, 32):
        op = nl.method("taylor_features", degree=degree)(problem)
        kernel = np.exp(op.row_scale_log)[:, None] * op.op.dense()
        rounding = 1e3 * EPS * np.exp(largest)
        assert np.abs(kernel - np.exp(q @ k.T / 2)).max() <= polynomials.taylor_remainder(largest, degree) + rounding
        promise = nl.method("taylor_features", degree=degree).theory(problem).error("frobenius")
        assert np.linalg.norm(op.dense() - problem.exact().dense()) <= promise + rounding
    assert promise < 1e-8


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("name", "degree"), [("taylor_features", 8), ("taylor_features", 40), ("polynomial_features", 16)]
)
def test_no_power_over_or_underflows(name, degree, dtype, causal):
    """Logits up to 1000: their powers leave float32 by far. The reference scales each row in the log domain."""
    q, k = (30 * np.abs(draw(s, 50, 1)).astype(dtype) for s in (0, 1))
    op = nl.method(name, degree=degree)(nl.AttentionProblem(q, k, scale=1.0, causal=causal))
    u = q.astype(np.float64) @ k.astype(np.float64).T
    assert u.max() > 1000
    want = normalised(KINDS[name](u, degree), causal=causal)
    np.testing.assert_allclose(op.dense(), want, rtol=0, atol=300 * degree * np.finfo(dtype).eps)


def test_odd_degrees_may_give_negative_rows_and_say_so():
    q, k = np.array([[3.0], [0.1]]), np.array([[-1.0], [-1.0]])
    problem = nl.AttentionProblem(q, k, scale=1.0)
    odd, even = (nl.method("taylor_features", degree=p) for p in (3, 4))
    assert odd(problem).negative_share == 0.5
    assert even(problem).negative_share == 0.0
    assert odd.properties.partial
    assert not even.properties.partial


def test_a_root_of_the_kernel_in_every_entry_of_a_row_is_refused():
    """A logit of −1 between vectors with |x̂| = 2, so that nothing is rounded."""
    problem = nl.AttentionProblem(np.array([[1.0, 1.0, 1.0]]), np.array([[1.0, -1.0, -1.0]]), scale=1.0)
    for name, degree in (("taylor_features", 1), ("polynomial_features", 1)):
        with pytest.raises(ZeroRowSumError, match=r"100\.00% of the rows"):
            nl.method(name, degree=degree)(problem)


def test_an_even_degree_never_refuses():
    """Logits of both signs up to ±40: the smallest value of the polynomial is far above the rounding of its terms."""
    q, k = np.linspace(-6, 6, 61)[:, None], np.linspace(-6.5, 6.5, 53)[:, None]
    for degree in (2, 4, 6, 8):
        op = nl.method("taylor_features", degree=degree)(nl.AttentionProblem(q, k, scale=1.0))
        assert op.op.dense().min() > 0
        assert op.negative_share == 0


# -- cosFormer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, False), (70, 70, True), (70, 70, False), (7, 31, False)])
@pytest.mark.parametrize("length", [None, 100])
def test_cosformer_is_its_definition(length, shape, masked, xp):
    n_q, n_k, causal = shape
    q, k = np.abs(draw(0, 2, n_q, 4)) - 0.2, np.abs(draw(1, 2, n_k, 4)) - 0.2
    q[..., 0], k[..., 0] = 0.5, 0.5
    keep = np.arange(n_k) % 3 != 1 if masked else None
    m = max(n_q, n_k) if length is None else length
    distance = np.arange(n_q)[:, None] - np.arange(n_k)
    kernel = np.maximum(q, 0) @ np.swapaxes(np.maximum(k, 0), -1, -2) * np.cos(np.pi / 2 * distance / m)
    want = normalised(kernel, causal=causal, key_mask=keep)
    mask = None if keep is None else xp.asarray(keep)
    problem = nl.AttentionProblem(xp.asarray(q), xp.asarray(k), causal=causal, key_mask=mask)
    op = nl.method("cosformer", length=length)(problem)
    np.testing.assert_allclose(to_numpy(op.dense()), want, rtol=0, atol=100 * EPS)
    assert np.all(to_numpy(op.dense()) >= -100 * EPS)


def test_cosformer_prefers_near_keys_and_knows_positions():
    q = np.ones((10, 2))
    dense = nl.method("cosformer")(nl.AttentionProblem(q, q)).dense()
    assert np.all(np.diff(dense[0]) < 0)
    assert np.argmax(dense, axis=1).tolist() == list(range(10))


def test_cosformer_with_a_fixed_length_is_the_same_for_a_prefix():
    q, k = np.abs(draw(0, 30, 3)), np.abs(draw(1, 30, 3))
    for length, same in ((64, True), (None, False)):
        method = nl.method("cosformer", length=length)
        whole, prefix = (method(nl.AttentionProblem(q[:n], k[:n], causal=True)).dense() for n in (30, 20))
        assert np.allclose(whole[:20, :20], prefix, rtol=0, atol=100 * EPS) == same


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: nl.method("taylor_features", degree=0), "degree must be a whole number >= 1"),
        (lambda: nl.method("cosformer", length=0), "length must be a whole number >= 1"),
        (
            lambda: nl.method("cosformer", length=3)(nl.AttentionProblem(np.ones((4, 1)), np.ones((2, 1)))),
            "at least the",
        ),
    ],
)
def test_bad_arguments(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
