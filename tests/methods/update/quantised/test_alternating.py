"""Base and correction in turns: the sequences themselves, PiSSA's ratio of F3, errors that rise, quantised factors."""

from fractions import Fraction
from itertools import islice

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.arithmetic.quantisers import quantiser
from nla_llm.methods.update.quantised.alternating import alternation
from nla_llm.problems import gallery


def matrix(exponent, seed, d=256):
    """Independent Gaussian entries for exponent 0, else singular values i^−exponent between Haar frames."""
    if exponent == 0:
        return np.random.default_rng(seed).standard_normal((d, d))
    return gallery.power_law_update(d, d, exponent, rng=seed).delta


def ratio(W, approximation):
    """PiSSA's ratio: per cent by which the nuclear norm of the error is below that of quantising alone."""
    errors = (np.linalg.norm(W - op, ord="nuc") for op in (approximation, quantiser("nf4")(W).matrix))
    error, alone = errors
    return 100 * (1 - error / alone)


def test_one_turn_is_lqer():
    p = nl.UpdateProblem(matrix(0.5, 0, 64))
    got, want = nl.method("loftq", rank=4, iterations=1)(p), nl.method("lqer", rank=4)(p)
    np.testing.assert_array_equal(got.dense(), want.dense())


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_sequences_are_those_of_the_papers(iterations):
    """Written out with truncated decompositions and quantisations alone."""
    W, quantise = matrix(0.5, 1, 64), quantiser("nf4")

    def truncated(A):
        u, s, vt = np.linalg.svd(A)
        return u[:, :6] * s[:6] @ vt[:6]

    L = np.zeros_like(W)
    for _ in range(iterations):
        Q = quantise(W - L).matrix
        L = truncated(W - Q)
    got = nl.method("loftq", rank=6, iterations=iterations)(nl.UpdateProblem(W))
    np.testing.assert_allclose(got.dense(), Q + L, rtol=0, atol=1e-13)

    L = truncated(W)
    for _ in range(iterations - 1):
        L = truncated(W - quantise(W - L).matrix)
    got = nl.method("qpissa", rank=6, iterations=iterations)(nl.UpdateProblem(W))
    np.testing.assert_allclose(got.dense(), quantise(W - L).matrix + L, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("exponent", "pissa", "loftq"), [(0, 10.9, 25.3), (0.5, 32.5, 25.3), (1, 80.2, 26.1)], ids=["iid", "half", "one"]
)
def test_ratio_of_pissa_and_loftq_depends_on_the_spectrum(exponent, pissa, loftq):
    """256 × 256, NF4 in blocks of 64, rank 16. The stated LoftQ values are those of six decompositions."""
    Ws = [matrix(exponent, seed) for seed in range(2)]
    p, q = (
        [ratio(W, nl.method(name, rank=16, iterations=t)(nl.UpdateProblem(W)).dense()) for W in Ws]
        for name, t in (("qpissa", 1), ("loftq", 6))
    )
    assert abs(np.mean(p) - pissa) < 1.2  # two matrices; a single one deviates by 0.4 at most (standard deviation)
    assert abs(np.mean(q) - loftq) < 0.7
    assert (np.mean(p) > np.mean(q)) == (exponent > 0)


def test_more_iterations_of_loftq_may_raise_the_error():
    W = matrix(1, 0)
    errors = [np.linalg.norm(W - op.dense()) for op in islice(alternation(W, quantiser("nf4"), 16), 10)]
    assert np.argmin(errors) < 9
    assert errors[9] > 1.005 * min(errors)


def test_the_correction_step_never_raises_the_error():
    W, quantise = matrix(0.5, 3, 96), quantiser("int2")
    before = np.zeros_like(W)
    for op in islice(alternation(W, quantise, 8), 6):
        base = op.terms[0].dense()
        assert np.linalg.norm(W - op.dense()) <= np.linalg.norm(W - base - before) * (1 + 1e-14)
        before = op.terms[1].dense()


def test_caldera_weighs_by_the_inputs_and_keeps_factors_of_few_levels():
    rng = np.random.default_rng(4)
    inputs = rng.standard_normal((200, 64)) * np.geomspace(10, 0.1, 64)
    p = nl.UpdateProblem(matrix(0.5, 5, 64), inputs=inputs)
    white = nl.UpdateProblem(p.delta, inputs=np.eye(64))
    method = nl.method("caldera", rank=8, format="int3", factor_format="int8")
    errors = [np.linalg.norm((p.delta - method(q).dense()) @ inputs.T) for q in (p, white)]
    assert errors[0] < 0.9 * errors[1]
    op = nl.method("caldera", rank=8, factor_format="int4")(p)
    for column in op.terms[1].left.T:  # one block to each column of 64
        assert len(np.unique(column)) <= 15


def test_fine_factors_change_caldera_little():
    """With one turn and 8-bit factors it is nearly QERA: the exact correction with rounded factors."""
    p = nl.UpdateProblem(matrix(0.5, 6, 64), inputs=np.random.default_rng(7).standard_normal((200, 64)))
    rounded = nl.method("caldera", rank=8, iterations=1, factor_format="int8")(p)
    exact = nl.method("qera", rank=8)(p)
    difference = np.linalg.norm((rounded - exact).dense()) / np.linalg.norm(exact.terms[1].dense())
    assert 0 < difference < 0.03  # two factors with errors of about 1 % each


def test_bits_of_caldera():
    p = nl.UpdateProblem(np.ones((128, 64)), inputs=np.ones((2, 64)))
    factors = Fraction(4 * 4 * (128 + 64) + 32 * 4 * 3, 128 * 64)  # codes, and a scale for each 64 of them
    assert nl.method("caldera", rank=4).bits(p) == Fraction(9, 2) + factors
