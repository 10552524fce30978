"""Spacings of stored numbers."""

import ml_dtypes
import numpy as np
import pytest

from nla_llm.measures.storage import binades, count_binades, spacings


@pytest.mark.parametrize(
    ("name", "dtype"), [("bfloat16", ml_dtypes.bfloat16), ("float16", np.float16), ("float32", np.float32)]
)
@pytest.mark.parametrize("computed", [np.float32, np.float64])
def test_spacings_are_those_of_the_dtype(name, dtype, computed):
    """The distance to the next number, from the bits of the stored ones; subnormal halves included."""
    values = np.abs(np.random.default_rng(0).standard_normal(200) * 10.0 ** np.linspace(-7, 2, 200)).astype(dtype)
    values = values[values > 0]
    bits = values.view(np.uint16 if values.dtype.itemsize == 2 else np.uint32)
    following = (bits + 1).astype(bits.dtype).view(dtype).astype(np.float64)
    found = spacings(name, np.dtype(computed))[binades(values.astype(computed))]
    assert np.array_equal(found, following - values.astype(np.float64))


def test_every_entry_is_counted_once():
    values = np.array([[0.0, -1.0], [1.5, 4.0]], np.float32)
    counts = count_binades(values)
    assert counts.sum() == 4
    assert (counts[0], counts[127], counts[129]) == (1, 2, 1)
    assert spacings("float32", np.dtype(np.float32))[0] == 0
