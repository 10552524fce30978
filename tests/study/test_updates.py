"""Spectra of updates and the noise of their storage."""

import ml_dtypes
import numpy as np
import pytest

from nla_llm.study.updates import Spectrum, storage_noise, update_records


@pytest.mark.parametrize(
    ("name", "dtype"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16), ("float32", np.float32)]
)
def test_storage_noise_is_that_of_a_matrix_really_rounded(name, dtype):
    """Frobenius to 2 %; the spectral norm lies below its expectation's leading bound, and within 15 % of it."""
    w = np.random.default_rng(0).standard_normal((400, 300)) * np.linspace(0.1, 1, 300)
    stored = w.astype(dtype)
    error = stored.astype(np.float64) - w
    noise = storage_noise(stored.astype(np.float64), name)
    assert noise.frobenius == pytest.approx(np.linalg.norm(error), rel=2e-2)
    assert 0.8 * noise.spectral < np.linalg.norm(error, 2) < 1.02 * noise.spectral


def test_storage_noise_of_subnormal_halves():
    """Half precision has no spacing below 2⁻²⁴."""
    noise = storage_noise(np.full((1, 1), 2.0**-20), "float16")
    assert noise.frobenius == pytest.approx(2.0**-24 / np.sqrt(12))


def test_above_noise_counts_the_rank_that_was_trained():
    """A rank that bfloat16 buries in the energy is found again above the noise."""
    rng = np.random.default_rng(1)
    base = (rng.standard_normal((128, 96)) / 8).astype(ml_dtypes.bfloat16).astype(np.float64)
    update = rng.standard_normal((128, 4)) @ rng.standard_normal((4, 96))
    update *= 0.01 * np.linalg.norm(base) / np.linalg.norm(update)
    tuned = (base + update).astype(ml_dtypes.bfloat16).astype(np.float64)
    whole = update_records(base, tuned, [4], "bfloat16")[0]
    assert whole["above_noise"] == 4
    assert whole["rank_99"] > 10


def test_spectrum_brackets_a_prescribed_one():
    rng = np.random.default_rng(2)
    u, v = (np.linalg.qr(rng.standard_normal((n, 20)))[0] for n in (40, 30))
    s = 2.0 ** -np.arange(20)
    found = Spectrum((u * s) @ v.T)
    for i in range(1, 21):
        assert found.value(i).contains(s[i - 1])
    for r in (0, 3, 19):
        assert found.truncation(r, "frobenius").contains(np.sqrt(np.sum(s[r:] ** 2) / np.sum(s**2)))
        assert found.truncation(r, "spectral").contains(s[r] / s[0])
    assert float(found.truncation(30, "spectral").value) == 0
    assert found.rank_of_energy(0.75) == 1


def test_equal_matrices_have_no_update():
    with pytest.raises(ZeroDivisionError):
        update_records(np.ones((2, 2)), np.ones((2, 2)), [1], "float32")
