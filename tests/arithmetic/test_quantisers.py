"""Quantisers: their laws on awkward blocks, the published table of NF4, exact bits, refusals."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from nla_llm.arithmetic import counted, tally
from nla_llm.arithmetic.quantisers import Quantiser, integer_levels, normal_float_levels, quantiser
from nla_llm.backend import to_numpy
from nla_llm.costs.formulas import quantisation

# Dettmers et al. 2023 (arXiv 2305.14314), appendix E
PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
FORMATS = ["nf4", "nf4_double", "nf2", "int2", "int3", "int4", "int8", "int4_affine", "int8_double"]
BLOCKS = [1, 7, 64, 10_000, None]  # neither divides 13 × 11, one is longer than it


def matrices():
    """What a block may hold: Gaussian entries, all orders of magnitude, nothing but zeros or one number, extremes."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((13, 11))
    yield from (x, x * 10.0 ** rng.integers(-6, 6, x.shape), rng.standard_normal((3, 13, 11)), np.abs(x))
    yield from (np.zeros((13, 11)), np.full((13, 11), -0.7), np.concatenate([np.zeros((8, 11)), x]), np.array([[3.0]]))
    yield from (1e37 * x, 1e-34 * np.sign(x) * (0.5 + np.abs(x)))


def test_normal_float_levels_are_the_published_table():
    """The table rests on 1 − δ rounded to 0.9677083, which shifts a level by up to 2e-7."""
    np.testing.assert_allclose(normal_float_levels(4), PUBLISHED_NF4, rtol=0, atol=2e-7)
    assert len(normal_float_levels(8)) == 256


@pytest.mark.parametrize("bits", range(2, 9))
def test_integer_levels_are_equidistant(bits):
    for affine, count in ((False, 2**bits - 1), (True, 2**bits)):
        levels = np.array(integer_levels(bits, affine=affine))
        assert len(levels) == count
        np.testing.assert_allclose(np.diff(levels), (1 if affine else 2) / (count - 1), rtol=1e-13)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", FORMATS)
def test_laws(name, block):
    q, eps = quantiser(name, block), np.finfo(np.float32).eps  # scales and offsets are float32 numbers
    for x, dtype in product(matrices(), (np.float32, np.float64)):
        x = x.astype(dtype)  # noqa: PLW2901
        once = q(x)
        assert once.matrix.dtype == dtype
        assert once.matrix.shape == once.codes.shape == x.shape
        scale = written_out(once.scales, q, x)
        size = scale + (0 if once.offsets is None else np.abs(written_out(once.offsets, q, x)))
        beyond = np.maximum(np.abs(x) - scale, 0) if q.nested else 0.0  # cut at a scale that was rounded down
        half_gap = np.max(np.diff(q.levels)) / 2
        error = np.abs(once.matrix.astype(np.float64) - x)
        assert np.all(error <= np.maximum(half_gap * scale, beyond) + 4 * eps * size)
        if not q.nested:
            tolerance = 4 * eps * size if q.affine else 0.0
            assert np.all(np.abs(q(once.matrix).matrix - once.matrix) <= tolerance)


def test_a_rounded_scale_need_not_be_found_again():
    """The law of the plain quantisers that the nested ones lack, where a scale is far below others."""
    x = np.random.default_rng(0).standard_normal((13, 11))
    once = quantiser("int8_double", block=1)(x).matrix
    assert np.any(quantiser("int8_double", block=1)(once).matrix != once)


def written_out(numbers, q, x):
    """A number for each block as one for each entry."""
    rows, columns = x.shape[-2:]
    block = columns if q.block is None else min(q.block, rows * columns)
    flat = np.repeat(numbers.astype(np.float64), block, axis=-1)[..., : rows * columns]
    return flat.reshape(x.shape)


@pytest.mark.parametrize("name", FORMATS)
def test_the_nearest_level_is_taken(name):
    """Against a search through all levels; the scales are those that the quantiser states."""
    q, x = quantiser(name, 16), np.random.default_rng(1).standard_normal((8, 6))
    got = q(x)
    scale, offset = written_out(got.scales, q, x), 0 if got.offsets is None else written_out(got.offsets, q, x)
    candidates = offset + np.multiply.outer(q.levels, scale)
    best = np.min(np.abs(candidates - x), axis=0)
    np.testing.assert_allclose(np.abs(got.matrix - x), best, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(got.matrix, np.array(q.levels)[got.codes] * scale + offset)


def test_scales_are_the_largest_moduli_row_after_row():
    x = np.array([[1.0, -2.0, 3.0], [4.0, -8.0, 5.0]])
    assert quantiser("nf4", 2)(x).scales.tolist() == [2.0, 4.0, 8.0]
    assert quantiser("nf4", 4)(x).scales.tolist() == [4.0, 8.0]
    assert quantiser("nf4", None)(x).scales.tolist() == [3.0, 8.0]


def test_double_quantisation_moves_scales_by_half_a_step_of_the_largest():
    x = np.random.default_rng(2).standard_normal((600, 64))  # 600 blocks in three blocks of scales
    plain, double = (quantiser(name)(x).scales for name in ("nf4", "nf4_double"))
    for i in range(0, 600, 256):
        part = slice(i, i + 256)
        assert np.max(np.abs(plain[part] - double[part])) <= plain[part].max() / 510 * (1 + 1e-12)
    assert np.max(np.abs(plain - double)) > 0


@pytest.mark.parametrize(
    ("name", "block", "shape", "bits"),
    [
        ("nf4", 64, (256, 256), Fraction(9, 2)),
        ("nf4_double", 64, (256, 256), 4 + Fraction(8 * 1024 + 32 * 4, 65536)),  # the 4.127 of the paper
        ("int4_affine", 64, (64, 64), Fraction(5)),
        ("int8", None, (10, 100), 8 + Fraction(32, 100)),
        ("int4", 64, (13, 11), 4 + Fraction(3 * 32, 143)),
        ("nf4", 64, (2, 2), Fraction(12)),
    ],
)
def test_bits(name, block, shape, bits):
    q = quantiser(name, block)
    assert q.bits_per_entry(shape) == bits
    got = q(np.ones((2, *shape)))
    stored = q.bits * got.codes[0].size + 32 * sum(a[0].size for a in got[2:] if a is not None)
    assert q.nested or bits == Fraction(stored, got.codes[0].size)


@pytest.mark.parametrize("name", FORMATS)
def test_other_libraries(name, xp):
    x = np.random.default_rng(3).standard_normal((2, 9, 15))
    here, there = quantiser(name)(x), quantiser(name)(xp.asarray(x))
    np.testing.assert_array_equal(to_numpy(there.codes), here.codes)
    np.testing.assert_allclose(to_numpy(there.matrix), here.matrix, rtol=1e-15)


def test_half_precision_is_widened():
    x = np.random.default_rng(4).standard_normal((4, 70)).astype(np.float16)
    got = quantiser("nf4")(x)
    assert got.matrix.dtype == np.float32
    np.testing.assert_array_equal(got.matrix, quantiser("nf4")(x.astype(np.float32)).matrix)


@pytest.mark.parametrize("name", ["nf4", "nf4_double", "int8", "int4_affine"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39, 1e-39])
def test_what_float32_cannot_scale_is_refused(name, bad):
    x = np.zeros((3, 70))
    x[1, 2] = bad
    with pytest.raises(ValueError, match=r"not finite, or a block whose scale lies outside .*; scale the matrix"):
        quantiser(name)(x)


@pytest.mark.parametrize(
    ("matrix", "error", "sentence"),
    [
        (np.ones((2, 2), dtype=int), TypeError, "matrix must be real and floating"),
        (np.ones(3), TypeError, r"matrix must be real and floating, \(..., rows, columns\)"),
        (np.ones((0, 3)), ValueError, "matrix has an empty axis"),
    ],
)
def test_bad_matrices(matrix, error, sentence):
    with pytest.raises(error, match=sentence):
        quantiser("nf4")(matrix)


@pytest.mark.parametrize("name", ["nf9", "int1", "fp4", "nf4_affine", "int4_double_affine", None])
def test_unknown_formats(name):
    with pytest.raises(ValueError, match="format must be nf or int with 2 to 8 bits"):
        quantiser(name)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"levels": (1.0, 0.0), "bits": 1}, "levels must be at least two ascending numbers between -1 and 1"),
        ({"levels": (0.0, 0.5), "bits": 1, "affine": True}, "must begin with 0 and end with 1"),
        ({"levels": (0.0, 1.0), "bits": 1, "affine": True, "nested": True}, "cannot be nested"),
        ({"levels": (-1.0, 0.0, 1.0), "bits": 1}, "bits=1 cannot number 3 levels"),
        ({"levels": (-1.0, 1.0), "bits": 1, "block": 0}, "block must be a whole number >= 1, or None"),
    ],
)
def test_quantisers_that_mean_nothing(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Quantiser(**arguments)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("name", FORMATS)
def test_formula_is_the_count(name, block):
    q, x = quantiser(name, block), counted(np.random.default_rng(5).standard_normal((13, 11)))
    with tally() as t:
        q(x)
    for kind, number in quantisation(13, 11, q).items():
        assert getattr(t, kind) == number, kind
