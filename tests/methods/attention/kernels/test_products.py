"""Unit vectors, random vectors, and products of linear forms against the same written out."""

import numpy as np
import pytest

from nla_llm.methods.attention.kernels.products import KINDS, draw_vectors, product_of_forms, unit_rows


def test_rows_of_unit_length():
    x = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]])
    unit, log = unit_rows(x)
    np.testing.assert_allclose(unit, [[0.6, 0.8], [0, 0], [0, -1]], rtol=1e-15)
    np.testing.assert_allclose(log[:, 0], [np.log(5), 0, np.log(2)], rtol=1e-15)


def test_vectors_have_mean_zero_and_unit_variance():
    for kind in KINDS:
        parts = draw_vectors(kind, (20_000,), np.random.default_rng(0), like=np.zeros(1))
        z = parts[0] + (1j * parts[1] if len(parts) == 2 else 0)
        assert abs(np.mean(z)) < 4 / np.sqrt(20_000)
        assert abs(np.mean(np.abs(z) ** 2) - 1) < 4 * np.sqrt(2 / 20_000)
        if kind.startswith("complex"):
            assert abs(np.mean(z**2)) < 4 * np.sqrt(2 / 20_000)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("degree", [1, 2, 4])
def test_product_of_forms(kind, degree):
    x = np.random.default_rng(0).standard_normal((2, 7, 3))
    parts = draw_vectors(kind, (degree, 5, 3), np.random.default_rng(1), like=x)
    w = parts[0] + (1j * parts[1] if len(parts) == 2 else 0)
    want = np.prod(np.einsum("jmd,hnd->jhnm", w, x), axis=0)
    want = np.concatenate([want.real, want.imag], axis=-1) if len(parts) == 2 else want
    got = product_of_forms(x, [tuple(part[j] for part in parts) for j in range(degree)])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-13 * np.abs(want).max())
