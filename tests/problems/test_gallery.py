"""What the gallery's docstrings claim to know."""

import inspect

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nla_llm.problems import AttentionProblem, UpdateProblem, gallery

ATTENTION = {
    "gaussian": gallery.gaussian,
    "unequal_key_norms": gallery.unequal_key_norms,
    "shifted_mean": gallery.shifted_mean,
    "clusters": gallery.clusters,
    "low_rank_logits": lambda n, d, **kw: gallery.low_rank_logits(n, d, rank=max(1, d // 2), **kw),
    "prescribed_logit_spectrum": lambda n, d, **kw: gallery.prescribed_logit_spectrum([2.0, 1.0], n, d, **kw),
}
UPDATES = {
    "power_law_update": gallery.power_law_update,
    "exponential_update": gallery.exponential_update,
    "low_rank_plus_noise_update": lambda a, b, **kw: gallery.low_rank_plus_noise_update(a, b, rank=2, **kw),
    "prescribed_spectrum_update": lambda a, b, **kw: gallery.prescribed_spectrum_update([2.0, 1.0], a, b, **kw),
    "spiked_update": lambda a, b, **kw: gallery.spiked_update([2.0, 1.0], a, b, **kw),
}


def test_the_tables_hold_every_maker():
    assert set(ATTENTION) | set(UPDATES) == set(gallery.__all__)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_shapes_dtypes_and_seeds(name):
    make = ATTENTION[name]
    p = make(12, 4, d_v=3, heads=(2, 3), causal=True, rng=5, dtype=np.float32)
    assert isinstance(p, AttentionProblem)
    assert p.q.shape == p.k.shape == (2, 3, 12, 4)
    assert p.v.shape == (2, 3, 12, 3)
    assert p.q.dtype == p.k.dtype == p.v.dtype == np.float32
    assert p.causal
    assert p.scale == 0.5
    same, other = make(12, 4, d_v=3, heads=(2, 3), rng=np.random.default_rng(5)), make(12, 4, heads=(2, 3), rng=6)
    assert np.array_equal(p.q, same.q.astype(np.float32))  # another precision, the same problem
    assert not np.array_equal(same.q, other.q)
    assert not np.array_equal(p.q[0, 0], p.q[0, 1])  # heads differ
    assert np.std(p.v) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("name", UPDATES)
def test_update_shapes_dtypes_and_seeds(name):
    make = UPDATES[name]
    u = make(6, 9, rng=1, dtype=np.float32)
    assert isinstance(u, UpdateProblem)
    assert u.delta.shape == (6, 9)
    assert u.delta.dtype == np.float32
    assert np.array_equal(u.delta, make(6, 9, rng=1).delta.astype(np.float32))
    assert not np.array_equal(u.delta, make(6, 9, rng=2, dtype=np.float32).delta)


@pytest.mark.parametrize("name", ["gaussian", "unequal_key_norms", "low_rank_logits"])
def test_mean_square_of_the_entries_is_the_square_of_scale(name):
    p = ATTENTION[name](4096, 16, scale=0.7, rng=3)
    assert np.mean(p.q**2) == pytest.approx(0.49, rel=0.05)
    if name == "unequal_key_norms":
        p = gallery.unequal_key_norms(40_000, 16, spread=0.5, scale=0.7, rng=3)
        assert np.std(np.log(np.linalg.norm(p.k, axis=-1))) == pytest.approx(np.hypot(0.5, 1 / np.sqrt(32)), rel=0.05)
    assert np.mean(p.k**2) == pytest.approx(0.49, rel=0.05)


def test_gaussian_logits_and_squared_norms():
    p = gallery.gaussian(512, 64, scale=0.8, rng=0)
    assert np.std(p.scale * p.q @ p.k.T) == pytest.approx(0.64, rel=0.02)
    t = np.sum(p.scale * (p.q + p.k) ** 2, axis=-1)
    assert t.mean() == pytest.approx(2 * 0.64 * 8, rel=0.03)


def test_no_spread_and_no_shift_are_gaussian():
    plain = gallery.gaussian(32, 4, rng=9)
    assert np.array_equal(gallery.unequal_key_norms(32, 4, spread=0.0, rng=9).k, plain.k)
    assert np.array_equal(gallery.shifted_mean(32, 4, shift=0.0, rng=9).q, plain.q)


def test_shift_of_the_keys_leaves_the_softmax():
    shifted, plain = gallery.shifted_mean(32, 4, shift=0.8, rng=9), gallery.gaussian(32, 4, rng=9)
    only_q = AttentionProblem(shifted.q, plain.k)
    np.testing.assert_allclose(shifted.exact().dense(), only_q.exact().dense(), atol=1e-14)
    assert np.abs(shifted.exact().dense() - plain.exact().dense()).max() > 1e-3


@settings(max_examples=20, deadline=None, derandomize=True)
@given(count=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_clusters_without_spread_have_their_rank(count, seed):
    P = gallery.clusters(40, 6, count=count, spread=0.0, rng=seed).exact().dense()
    assert np.linalg.matrix_rank(P) <= count
    assert len(np.unique(P.round(13), axis=0)) <= count


@settings(max_examples=20, deadline=None, derandomize=True)
@given(rank=st.integers(1, 6), seed=st.integers(0, 2**32 - 1))
def test_low_rank_logits_have_exactly_their_rank(rank, seed):
    p = gallery.low_rank_logits(20, 6, rank, rng=seed)
    s = np.linalg.svd(p.q @ p.k.T)[1]
    assert s[rank - 1] > 1e-6 * s[0]  # a square Gaussian of order 6 is that far from singular in all draws tried
    assert np.all(s[rank:] < 40 * np.finfo(float).eps * s[0])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    values=st.lists(st.floats(0, 1e3), min_size=1, max_size=8).filter(lambda v: max(v) > 1e-3),
    extra=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_prescribed_spectra_come_out(values, extra, seed, dtype):
    want = np.zeros(8 + extra)
    want[: len(values)] = np.sort(values)[::-1]
    tolerance = 50 * np.finfo(dtype).eps * want[0]  # sizes up to 13: the constant is empirical, twice what was seen
    p = gallery.prescribed_logit_spectrum(values, 8 + extra, 8, rng=seed, dtype=dtype)
    got = np.linalg.svd(p.scale * p.q.astype(float) @ p.k.astype(float).T)[1]
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance)
    u = gallery.prescribed_spectrum_update(values, 8 + extra, 9 + extra, rng=seed, dtype=dtype)
    np.testing.assert_allclose(np.linalg.svd(u.delta.astype(float))[1], want, rtol=0, atol=tolerance)


def test_named_spectra():
    i = np.arange(1, 21)
    for update, want in (
        (gallery.power_law_update(20, 30, exponent=0.5), i**-0.5),
        (gallery.exponential_update(30, 20, rate=0.3), np.exp(-0.3 * (i - 1))),
        (gallery.low_rank_plus_noise_update(20, 20, rank=3, noise=0.01), np.where(i <= 3, 1, 0.01)),
    ):
        np.testing.assert_allclose(np.linalg.svd(update.delta)[1], want, atol=1e-13)


def test_spiked_update_has_its_noise_and_its_spike():
    u = gallery.spiked_update([3.0], 300, 600, rng=0)
    s = np.linalg.svd(u.delta)[1]
    assert s[0] == pytest.approx(np.sqrt((3 + 1 / 3) * (3 + 0.5 / 3)), rel=0.05)
    assert s[1] == pytest.approx(1 + np.sqrt(0.5), rel=0.05)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: gallery.gaussian(0, 4), ValueError, "n must be a whole number"),
        (lambda: gallery.gaussian(4, 2.5), ValueError, "d must be a whole number"),
        (lambda: gallery.gaussian(4, 2, scale=-1), ValueError, "scale must be one finite number"),
        (lambda: gallery.gaussian(4, 2, heads=8), TypeError, "heads must be a tuple"),
        (lambda: gallery.gaussian(4, 2, dtype=int), TypeError, "dtype must be floating"),
        (lambda: gallery.gaussian(4, 2, rng=None), TypeError, "rng must be"),
        (lambda: gallery.shifted_mean(4, 2, shift=np.inf), ValueError, "shift must be finite"),
        (lambda: gallery.unequal_key_norms(4, 2, spread=np.nan), ValueError, "spread must be one finite"),
        (lambda: gallery.clusters(4, 2, count=0), ValueError, "count must be a whole number"),
        (lambda: gallery.low_rank_logits(4, 2, 3), ValueError, "rank must be at most d=2"),
        (lambda: gallery.prescribed_logit_spectrum([1, 1, 1], 2, 8), ValueError, r"at most min\(n, d\)=2"),
        (lambda: gallery.prescribed_spectrum_update([1, -1], 2, 2), ValueError, "finite and >= 0"),
        (lambda: gallery.prescribed_spectrum_update([], 2, 2), ValueError, "at least one number"),
        (lambda: gallery.prescribed_spectrum_update([1, 1, 1], 2, 4), ValueError, r"min\(d_out, d_in\)=2"),
        (lambda: gallery.low_rank_plus_noise_update(4, 4, rank=5), ValueError, "rank must be at most"),
    ],
)
def test_bad_input(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call()


def test_every_maker_documents_an_example():
    for name in gallery.__all__:
        assert ">>>" in inspect.getdoc(getattr(gallery, name)), name
