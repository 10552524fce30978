"""Quantised once: errors against Eckart–Young, optimality in the output error, weights, bits."""

from fractions import Fraction

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.arithmetic.quantisers import quantiser
from nla_llm.operators import Dense, LowRank, Sum
from nla_llm.problems import gallery
from nla_llm.theory.yardsticks import eckart_young


def problem(d_out=48, d_in=40, samples=200, seed=0):
    """A matrix with a decaying spectrum, and correlated inputs of very different sizes."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d_in, d_in)) * np.geomspace(10, 0.1, d_in)
    delta = gallery.power_law_update(d_out, d_in, 0.5, rng=rng).delta
    return nl.UpdateProblem(delta, inputs=rng.standard_normal((samples, d_in)) @ mixing)


def output_error(p, op):
    return float(np.linalg.norm((p.delta - op.dense()) @ p.inputs.T))


@pytest.mark.parametrize("name", ["nf4", "int8", "int4_affine"])
def test_quantised_is_the_quantiser(name):
    p = problem()
    op = nl.method("quantised", format=name, block=32)(p)
    assert isinstance(op, Dense)
    np.testing.assert_array_equal(op.dense(), quantiser(name, 32)(p.delta).matrix)


def test_result_is_a_base_and_a_correction_with_factors():
    op = nl.method("lqer", rank=3)(problem())
    assert isinstance(op, Sum)
    base, correction = op.terms
    assert isinstance(base, Dense)
    assert isinstance(correction, LowRank)
    assert (correction.left.shape, correction.right.shape) == ((48, 3), (40, 3))


@pytest.mark.parametrize("norm", ["frobenius", "spectral", "nuclear"])
@pytest.mark.parametrize("rank", [1, 8, 40])
def test_lqer_attains_the_floor_of_its_base_in_every_norm(norm, rank):
    p = problem()
    residual = p.delta - quantiser("nf4")(p.delta).matrix
    order = {"frobenius": "fro", "spectral": 2, "nuclear": "nuc"}[norm]
    error = np.linalg.norm(p.delta - nl.method("lqer", rank=rank)(p).dense(), ord=order)
    floor = eckart_young(np.linalg.svd(residual, compute_uv=False), rank, norm)
    assert abs(error - floor) < 1e-13 * np.linalg.norm(p.delta, ord="nuc")
    assert abs(nl.method("lqer", rank=rank).theory(p).error(norm) - floor) < 1e-13


def test_qera_attains_the_data_aware_floor():
    """(Σ_{j>r} σ_j²((W − Q) Xᵀ))^½ of theory, from the samples themselves instead of their triangle."""
    p = problem()
    residual = p.delta - quantiser("nf4")(p.delta).matrix
    values = np.linalg.svd(residual @ p.inputs.T, compute_uv=False)
    for rank in (1, 8, 39):
        error = output_error(p, nl.method("qera", rank=rank)(p))
        assert abs(error - eckart_young(values, rank)) < 1e-12 * np.linalg.norm(p.delta @ p.inputs.T)


def test_no_perturbation_of_qera_has_a_smaller_output_error():
    """Random factors of the same rank around the optimum, at many distances; those of LQER are beaten."""
    p, rng = problem(), np.random.default_rng(1)
    op = nl.method("qera", rank=8)(p)
    best = output_error(p, op)
    residual = p.delta - op.terms[0].dense()
    left, right = op.terms[1].left, op.terms[1].right
    for size in np.geomspace(1e-4, 1, 40):
        changes = [size * np.std(f) * rng.standard_normal(f.shape) for f in (left, right)]
        other = (left + changes[0]) @ (right + changes[1]).T
        assert np.linalg.norm((residual - other) @ p.inputs.T) > best
    assert output_error(p, nl.method("lqer", rank=8)(p)) > 1.05 * best


def test_weights_order_the_output_error():
    """The exact solution is below both diagonal ones, for any data; these see the sizes of the inputs, unlike LQER."""
    p = problem()
    p = nl.UpdateProblem(
        p.delta, inputs=np.random.default_rng(2).standard_normal((300, 40)) * np.geomspace(30, 0.1, 40)
    )
    exact, diagonal, weighted, plain = (
        output_error(p, nl.method(name, rank=8, weighting=weighting)(p))
        for name, weighting in (("qera", "exact"), ("qera", "diagonal"), ("lqer", "activations"), ("lqer", "none"))
    )
    assert exact <= min(diagonal, weighted) * (1 + 1e-12)
    assert max(diagonal, weighted) < 0.9 * plain


@pytest.mark.parametrize(("name", "weighting"), [("qera", "exact"), ("qera", "diagonal"), ("lqer", "activations")])
def test_white_inputs_weigh_nothing(name, weighting):
    p = problem()
    white = nl.UpdateProblem(p.delta, inputs=np.concatenate([np.eye(40), -np.eye(40)]))
    got, want = (nl.method(n, rank=5, **o)(white).dense() for n, o in ((name, {"weighting": weighting}), ("lqer", {})))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)


def test_inputs_without_full_rank():
    """Three samples: three ranks are enough for no output error at all, and nothing is inverted."""
    p = problem(samples=3)
    p = nl.UpdateProblem(p.delta, inputs=np.concatenate([p.inputs] * 30))
    assert output_error(p, nl.method("qera", rank=3)(p)) < 1e-12 * np.linalg.norm(p.delta @ p.inputs.T)


@pytest.mark.parametrize(("name", "options"), [("qera", {}), ("lqer", {"weighting": "activations"}), ("caldera", {})])
def test_weights_need_inputs(name, options):
    with pytest.raises(ValueError, match="needs calibration inputs, and the problem has none"):
        nl.method(name, rank=1, **options)(nl.UpdateProblem(np.eye(4)))


def test_bits_count_the_factors():
    p = nl.UpdateProblem(np.ones((256, 128)), inputs=np.ones((2, 128)))
    assert nl.method("quantised").bits(p) == Fraction(9, 2)
    assert nl.method("lqer", rank=4).bits(p) == Fraction(9, 2) + Fraction(4 * 16 * 384, 256 * 128)
    assert nl.method("qera", rank=4, format="int8", block=None).bits(p) == 8 + Fraction(32, 128) + Fraction(3, 4)


@pytest.mark.parametrize("name", ["lqer", "qera", "loftq", "qpissa", "caldera"])
def test_bad_options(name):
    with pytest.raises(ValueError, match=r"rank=41 exceeds the dimensions of the update, 48 x 40"):
        nl.method(name, rank=41)(problem())
    with pytest.raises(ValueError, match="rank must be a whole number >= 1"):
        nl.method(name, rank=0)
    with pytest.raises(ValueError, match="format must be nf or int"):
        nl.method(name, rank=1, format="fp8")
    with pytest.raises(ValueError, match="block must be a whole number >= 1"):
        nl.method(name, rank=1, block=0)


@pytest.mark.parametrize(("name", "choices"), [("lqer", "none, activations"), ("qera", "exact, diagonal")])
def test_unknown_weighting(name, choices):
    with pytest.raises(ValueError, match=f"weighting must be one of {choices}, got 'all'"):
        nl.method(name, rank=1, weighting="all")
