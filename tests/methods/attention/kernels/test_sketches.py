"""Sketches of polynomial kernels against their definitions with the same draws; zeros, scales, structures."""

import numpy as np
import pytest
from methods.attention.kernels.written_out import (
    EPS,
    assert_heads_stand_alone,
    assert_kernel,
    assert_single_precision,
    draw,
    kernel_of,
)
from scipy.special import logsumexp

import nla_llm as nl
from nla_llm.methods.attention.kernels.products import KINDS, draw_vectors
from nla_llm.operators import ZeroRowSumError

SKETCHES = [
    *[("product_sketch", {"m": 5, "degree": p, "kind": kind}) for p in (1, 2, 3) for kind in KINDS],
    *[("tensor_sketch", {"m": m, "degree": p}) for p in (1, 2, 3) for m in (1, 2, 5, 8)],
    ("poly_sketch", {"m": 3, "degree": 4}),
    ("poly_sketch", {"m": 2, "degree": 8}),
]
STRUCTURES = [{}, {"causal": True}, {"masked": True}, {"causal": True, "masked": True}]


def definition(method, x, y, seed):
    """Â_ij written out from the numbers that the method draws, without unit vectors or logarithms."""
    rng, m, p, d = np.random.default_rng(seed), method.m, method.degree, x.shape[-1]
    if method.name == "product_sketch":
        parts = draw_vectors(method.kind, (p, m, d), rng, like=np.zeros(1))
        w = parts[0] + (1j * parts[1] if len(parts) == 2 else 0)
        left, right = (np.prod(np.einsum("pmd,nd->pnm", w, a), axis=0) for a in (x, y))
        return (left @ np.conj(right).T).real / m
    if method.name == "tensor_sketch":
        hashes, negative = rng.integers(0, m, (p, d)), rng.integers(0, 2, (p, d)) == 1
        return buckets(x, hashes, negative, m) @ buckets(y, hashes, negative, m).T
    levels = method.draw(d, rng, like=np.zeros(1))
    return (poly_tree(x, levels) @ poly_tree(y, levels).T) ** 2


def buckets(x, hashes, negative, m):
    """Count sketches of all factors, convolved by fast Fourier transforms as published."""
    transform = 1.0
    for h, minus in zip(hashes, negative, strict=True):
        into = np.zeros((x.shape[-1], m))
        into[np.arange(len(h)), h] = np.where(minus, -1, 1)
        transform = transform * np.fft.fft(x @ into, axis=-1)
    return np.fft.ifft(transform, axis=-1).real


def poly_tree(x, levels):
    """Sketches of the nodes of all levels, from the lowest."""
    below = [x] * (2 * len(levels[0]))
    for level in levels:
        below = [(below[2 * i] @ g.T) * (below[2 * i + 1] @ h.T) for i, (g, h) in enumerate(level)]
    (top,) = below
    return top


# -- the definition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
@pytest.mark.parametrize(("name", "options"), SKETCHES, ids=str)
def test_definition(name, options, structure):
    n, d = 70, 3
    q, k = draw(0, n, d), 3 * draw(1, n, d)
    keep = np.arange(n) % 4 != 2 if "masked" in structure else np.ones(n, bool)
    causal = "causal" in structure
    method = nl.method(name, **options)
    for scale in (0.6, -0.6):
        problem = nl.AttentionProblem(
            q, k, scale=scale, causal=causal, key_mask=keep if "masked" in structure else None
        )
        want = definition(method, np.sqrt(0.6) * q, np.copysign(np.sqrt(0.6), scale) * k, seed=3) * keep
        want = np.tril(want) if causal else want
        assert_kernel(method(problem, rng=3), want)


@pytest.mark.parametrize(("name", "options"), SKETCHES[::3], ids=str)
def test_other_libraries_and_batches(name, options, xp):
    q, k = np.abs(draw(0, 2, 3, 11, 3)), np.abs(draw(1, 2, 1, 13, 3))
    assert_heads_stand_alone(nl.method(name, **options), definition, q, k, xp)


@pytest.mark.parametrize(("name", "options"), SKETCHES[::5], ids=str)
def test_single_precision(name, options):
    assert_single_precision(nl.method(name, **options), definition, 100)


# -- convergence to the polynomial kernel ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_what_theory_says(kind):
    """At a large m the estimate is within six of its standard deviations, which are small, and not within a tenth."""
    problem = nl.AttentionProblem(draw(0, 9, 3), draw(1, 8, 3), scale=0.2)
    u = 0.2 * problem.q @ problem.k.T
    method = nl.method("product_sketch", m=40_000, degree=2, kind=kind)
    deviation = (kernel_of(method(problem, rng=0)) - u**2) / np.exp(u)
    expected = np.sqrt(method.theory(problem).relative_variance())
    assert np.all(np.abs(deviation) < 6 * expected)
    assert 0.5 < np.sqrt(np.mean((deviation / expected) ** 2)) < 2
    assert np.all(expected * np.exp(u) < 0.05 * np.max(u**2))


@pytest.mark.parametrize("m", [4000, 4001])
def test_tensor_sketch_without_collisions_is_exact(m):
    """Nine pairs of coordinates seldom meet in thousands of buckets; in eight they do."""
    problem = nl.AttentionProblem(draw(0, 9, 3), draw(1, 8, 3), scale=0.5)
    u = 0.5 * problem.q @ problem.k.T
    np.testing.assert_allclose(kernel_of(nl.method("tensor_sketch", m=m)(problem, rng=0)), u**2, rtol=0, atol=1e-12)
    assert np.abs(kernel_of(nl.method("tensor_sketch", m=8)(problem, rng=0)) - u**2).max() > 0.1


def test_poly_sketch_converges_to_the_power():
    problem = nl.AttentionProblem(draw(0, 9, 3), draw(1, 8, 3), scale=0.5)
    u = 0.5 * problem.q @ problem.k.T
    errors = [
        np.linalg.norm(kernel_of(nl.method("poly_sketch", m=m)(problem, rng=0)) - u**4) / np.linalg.norm(u**4)
        for m in (8, 1000)
    ]
    assert errors[1] < 0.2 < errors[0]


@pytest.mark.parametrize("degree", [4, 8])
def test_poly_sketch_is_nonnegative_where_the_product_sketch_is_not(degree):
    problem = nl.AttentionProblem(draw(0, 30, 5), draw(1, 30, 5))
    size = {4: 3, 8: 2}[degree]
    square = nl.method("poly_sketch", m=size, degree=degree)(problem, rng=0)
    assert square.nonnegative
    assert square.dense().min() >= -100 * EPS
    assert square.negative_share == 0
    assert square.op.rank == size * (size + 1) // 2
    plain = nl.method("product_sketch", m=size, degree=degree)(problem, rng=0)
    assert plain.dense().min() < -1e-3


def test_negative_row_sums_are_counted_and_not_clamped():
    """An odd kernel of opposite vectors is negative; the division by its sum makes the weights positive again."""
    q = np.abs(draw(0, 20, 4))
    P = nl.method("product_sketch", m=4000, degree=1)(nl.AttentionProblem(q, -q), rng=0)
    assert P.negative_share == 1
    np.testing.assert_allclose(P.row_sums(), 1, rtol=1e-10)


# -- zeros and sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options"), SKETCHES[::4], ids=str)
def test_zeros(name, options):
    """A key of zeros has no weight, whatever the others are; a query of zeros has no weights to be normalised."""
    q, k = np.abs(draw(0, 6, 3)), np.abs(draw(1, 6, 3))
    k[2] = 0
    method = nl.method(name, **options)
    for causal in (False, True):
        P = method(nl.AttentionProblem(q, k, causal=causal), rng=5).dense()
        assert np.all(P[:, 2] == 0)
        assert np.abs(P).max() > 0.1
    q[4] = 0
    with pytest.raises(ZeroRowSumError, match=r"16\.67% of the rows"):
        method(nl.AttentionProblem(q, k), rng=5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("name", "options"), [*SKETCHES[::4], ("product_sketch", {"m": 9, "degree": 12})], ids=str)
def test_sizes_do_not_overflow(name, options, sign, dtype, causal):
    """Keys of very different lengths, products far beyond the range of the format; only ratios of keys matter."""
    q, k = draw(0, 30, 4), draw(1, 30, 4) * np.logspace(0, 2, 30)[:, None]
    method = nl.method(name, **options)
    huge = 1e15 if dtype is np.float32 else 1e140
    plain = method(nl.AttentionProblem(q.astype(dtype), (sign * k).astype(dtype), causal=causal), rng=0).dense()
    P = method(nl.AttentionProblem((huge * q).astype(dtype), (sign * huge * k).astype(dtype), causal=causal), rng=0)
    assert np.all(np.isfinite(P.dense()))
    eps = float(np.finfo(dtype).eps)  # the logarithm of a length of 1e140, times the degree, has lost some digits
    np.testing.assert_allclose(P.dense(), plain, rtol=0, atol=1e5 * eps * np.abs(plain).max())


def test_logsumexp_reference_for_keys_that_underflow():
    """Relative to the longest key the shortest ones underflow, as they should, without harm to the rest."""
    lengths = np.logspace(-100, 0, 21)
    q, k = np.ones((2, 1)), lengths[:, None]
    P = nl.method("product_sketch", m=3, degree=4)(nl.AttentionProblem(q, k), rng=0).dense()
    want = np.exp(4 * np.log(lengths) - logsumexp(4 * np.log(lengths)))
    np.testing.assert_allclose(P, np.stack([want, want]), rtol=1e-12, atol=1e-300)


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("product_sketch", {"m": 3, "kind": "gauss"}, "kind must be one of rademacher, gaussian"),
        ("product_sketch", {"m": 3, "degree": 0}, "degree must be a whole number >= 1"),
        ("tensor_sketch", {"m": 0}, "m must be a whole number >= 1"),
        ("poly_sketch", {"m": 3, "degree": 6}, "power of two, 4 or more, got 6"),
        ("poly_sketch", {"m": 3, "degree": 2}, "power of two, 4 or more, got 2"),
    ],
)
def test_bad_arguments(name, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        nl.method(name, **options)


def test_windows_are_refused():
    with pytest.raises(ValueError, match="no form with window"):
        nl.method("tensor_sketch", m=3)(nl.AttentionProblem(draw(0, 5, 2), draw(1, 5, 2), window=2), rng=0)


def test_more_features_than_memory_are_refused():
    q = np.ones((128, 2))
    with pytest.raises(ValueError, match=r"m=4096 makes m\(m \+ 1\)/2 = 8390656 features .* pass a smaller m"):
        nl.method("poly_sketch", m=4096)(nl.AttentionProblem(q, q), rng=0)
