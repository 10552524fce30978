import numpy as np
import pytest

from nla_llm.linalg import haar_orthogonal, is_small
from nla_llm.measures import krylov_steps, spectral_norm
from nla_llm.operators import Dense, LowRank, Operator, SoftmaxAttention

SPECTRA = {
    "power law": lambda n: np.arange(1, n + 1.0) ** -0.5,
    "exponential": lambda n: 0.9 ** np.arange(n),
    "slow": lambda n: 1.0 - 0.5 * np.linspace(0, 1, n) ** 2,
    "cluster below the top": lambda n: np.r_[1.0, np.full(n // 2, 0.98), np.linspace(0.5, 0, n - n // 2 - 1)],
    "multiple top": lambda n: np.r_[np.ones(n // 4), np.linspace(0.9, 0.1, n - n // 4)],
}


class Diagonal(Operator):
    """A diagonal matrix known by its products alone: a Gaussian start makes its basis no special case."""

    def __init__(self, values, *, nonnegative=False):
        super().__init__((*values.shape, values.shape[-1]), values)
        self.values, self.nonnegative, self.products = values, nonnegative, 0

    def apply(self, x):
        self.products += 1
        return self.values[..., None] * x

    apply_transpose = apply

    def rows(self, start, stop):
        return (self.values[..., :, None] * np.eye(self.shape[-1]))[..., start:stop, :]


@pytest.fixture
def no_shortcuts(monkeypatch):
    """Neither a dense SVD nor a pass over the entries: the probabilistic bound must do it alone."""
    monkeypatch.setattr("nla_llm.measures.spectral.is_small", lambda op: False)
    monkeypatch.setattr("nla_llm.measures.spectral._CHEAP_ENTRIES", 0)
    monkeypatch.setattr("nla_llm.measures.spectral._Search._ritz_bounds", lambda *a, **k: None)


@pytest.mark.parametrize("shape", [(6, 4), (2, 3, 4, 6), (1, 1)])
def test_small_operators_are_exact(xp, shape):
    matrix = np.random.default_rng(0).standard_normal(shape)
    estimate = spectral_norm(Dense(xp.asarray(matrix)))
    assert estimate.contains(np.linalg.norm(matrix, 2, axis=(-2, -1))).all()
    assert estimate.width.max() < 1e-13
    assert estimate.how == "dense eigenvalues of the Gram matrix"


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rtol", [0.1, 1e-2])
def test_large_operators_are_bracketed_to_the_tolerance(name, rtol):
    values = SPECTRA[name](700) * 3.0
    estimate = spectral_norm(Dense((haar_orthogonal(700, 0) * values)[:650]), rtol=rtol)
    truth = np.linalg.norm((haar_orthogonal(700, 0) * values)[:650], 2)
    assert estimate.contains(truth)
    assert float(estimate.upper / estimate.lower) <= (1 + rtol) * (1 + 1e-10)


def test_two_hundred_random_operators_in_the_stated_share(no_shortcuts):
    """Few steps and a low confidence, so that the bound works as hard as it can."""
    rng, confidence, missed, certain = np.random.default_rng(0), 0.7, 0, 0
    names = sorted(SPECTRA)
    for i in range(200):
        n = int(rng.integers(20, 120))
        values = SPECTRA[names[i % len(names)]](n) * rng.uniform(0.1, 10)
        estimate = spectral_norm(
            Diagonal(values), rtol=0.25, rng=rng, confidence=confidence, block=int(rng.integers(1, 4))
        )
        assert float(estimate.lower) <= values.max()
        missed += not estimate.contains(values.max())
        certain += estimate.confidence == 1
    assert missed <= (1 - confidence) * 200
    assert certain < 100


def test_two_hundred_random_operators_in_every_deterministic_case():
    rng, names = np.random.default_rng(1), sorted(SPECTRA)
    for i in range(200):
        n = int(rng.integers(5, 60))
        values = SPECTRA[names[i % len(names)]](n) * 10.0 ** rng.integers(-5, 5)
        matrix = (haar_orthogonal(n, rng) * values) @ haar_orthogonal(n, rng).T
        estimate = spectral_norm(Dense(matrix), rng=rng)
        assert estimate.confidence == 1
        assert estimate.contains(values.max())


@pytest.mark.parametrize("name", SPECTRA)
def test_certain_bounds_hold_when_the_dense_svd_is_taken_away(monkeypatch, name):
    monkeypatch.setattr("nla_llm.measures.spectral.is_small", lambda op: False)
    rng = np.random.default_rng(2)
    for _ in range(10):
        values = SPECTRA[name](60)
        matrix = (haar_orthogonal(60, rng) * values) @ haar_orthogonal(60, rng).T
        estimate = spectral_norm(Dense(matrix), rtol=0.02, rng=rng, block=3)
        if estimate.confidence == 1:
            assert estimate.contains(values.max())


@pytest.mark.parametrize("rank", [1, 5])
def test_a_single_column_misses_few_directions_no_more_often_than_it_says(no_shortcuts, rank):
    values = np.zeros(64)
    values[:rank] = 1.0
    estimates = [spectral_norm(Diagonal(values), rtol=5.0, rng=s, confidence=0.6, block=1) for s in range(200)]
    covered = np.mean([e.contains(1.0) for e in estimates])
    assert covered >= 0.6


def test_the_number_of_products_is_what_was_planned(no_shortcuts):
    op = Diagonal(np.linspace(1, 2, 300))
    spectral_norm(op, rtol=0.05)
    assert op.products == 2 * krylov_steps(300, 0.05) - 1


def test_krylov_steps_solve_the_bound():
    n, rtol, confidence, block = 4096, 0.02, 0.99, 8
    k, epsilon = krylov_steps(n, rtol, confidence=confidence, block=block), 1 - (1 + rtol) ** -2
    failure = [(1.648 * np.sqrt(n) * np.exp(-np.sqrt(epsilon) * (2 * j - 1))) ** block for j in (k - 1, k)]
    assert failure[1] <= 1 - confidence < failure[0]


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_measured_with_certainty_by_products_alone(monkeypatch, xp, causal):
    monkeypatch.setattr("nla_llm.measures.spectral._CHEAP_ENTRIES", 0)
    monkeypatch.setattr("nla_llm.measures.spectral._Search._ritz_bounds", lambda *a, **k: None)
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 2, 600, 8))
    op = SoftmaxAttention(xp.asarray(q), xp.asarray(k), scale=8**-0.5, causal=causal)
    assert not is_small(op)
    estimate = spectral_norm(op, rtol=1e-3)
    assert estimate.confidence == 1
    assert "Collatz" in estimate.how
    assert estimate.contains(np.linalg.norm(np.asarray(op.dense()), 2, axis=(-2, -1))).all()
    assert np.all(estimate.upper <= 1.001 * estimate.lower * (1 + 1e-10))


def test_collatz_wielandt_alone_is_an_upper_bound_whatever_the_zeros(monkeypatch):
    monkeypatch.setattr("nla_llm.measures.spectral.is_small", lambda op: False)
    monkeypatch.setattr("nla_llm.measures.spectral._CHEAP_ENTRIES", 0)
    rng = np.random.default_rng(3)
    for _ in range(50):
        matrix = np.abs(rng.standard_normal((30, 25))) * (rng.uniform(size=(30, 25)) < 0.2)
        matrix[:, 3] = 0.0
        matrix[4] = 0.0
        estimate = spectral_norm(Dense(matrix, nonnegative=True), rtol=0.05, rng=rng, block=2, max_steps=4)
        if estimate.confidence == 1:
            assert estimate.contains(np.linalg.norm(matrix, 2))
        assert float(estimate.lower) <= np.linalg.norm(matrix, 2)


def test_batch_elements_do_not_disturb_each_other():
    values = np.stack([SPECTRA["slow"](600), 1e3 * SPECTRA["power law"](600), np.zeros(600)])
    estimate = spectral_norm(Diagonal(values), rtol=0.02)
    assert estimate.shape == (3,)
    assert estimate.contains(values.max(axis=-1)).all()


def test_a_zero_operator_has_the_norm_zero():
    zero = Diagonal(np.zeros(600), nonnegative=True)
    estimate = spectral_norm(zero)
    assert float(estimate.lower) == float(estimate.upper) == 0.0


def test_too_few_steps_give_a_wide_bracket_and_no_lie():
    values = SPECTRA["slow"](3000)
    estimate = spectral_norm(Diagonal(values), rtol=1e-3, max_steps=2)
    assert float(estimate.upper / estimate.lower) > 1.05
    assert estimate.contains(1.0)


def test_a_thin_product_is_exact_at_any_length():
    left, right = np.random.default_rng(0).standard_normal((2, 50_000, 2))
    small = np.linalg.norm(np.linalg.qr(left)[1] @ np.linalg.qr(right)[1].T, 2)
    estimate = spectral_norm(LowRank(left, right))
    assert estimate.confidence == 1
    assert estimate.contains(small)


def test_float32_is_measured_with_an_allowance_for_its_rounding(xp):
    matrix = np.random.default_rng(0).standard_normal((600, 600)).astype(np.float32)
    estimate = spectral_norm(Dense(xp.asarray(matrix)), rtol=1e-2)
    assert estimate.contains(np.linalg.norm(matrix.astype(np.float64), 2))


@pytest.mark.parametrize(
    ("dtype", "scales"), [(np.float64, (1e-290, 1e-160, 1e150)), (np.float32, (1e-35, 1e-22, 1e18))]
)
def test_norms_whose_squares_leave_the_numbers_are_bracketed(dtype, scales):
    """Powers of two are taken out: with AᵀA below the least number a certain bracket used to miss the norm."""
    matrix = np.random.default_rng(0).standard_normal((560, 530))
    for scale in scales:
        held = (scale * matrix).astype(dtype)
        truth = np.linalg.norm(held.astype(np.float64) / scale, 2) * scale
        estimate = spectral_norm(Dense(held), rtol=0.05)
        assert estimate.contains(truth)
        assert float(estimate.upper / estimate.lower) < 1.06


@pytest.mark.parametrize(("arguments", "word"), [({"rtol": -1.0}, "rtol"), ({"confidence": 0.0}, "confidence")])
def test_bad_arguments_are_named(arguments, word):
    with pytest.raises(ValueError, match=word):
        spectral_norm(Dense(np.eye(2)), **arguments)


@pytest.mark.parametrize("n", [5, 600])
def test_entries_that_are_not_finite_are_refused(n):
    matrix = np.eye(n)
    matrix[2, 3] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        spectral_norm(Dense(matrix))


@pytest.mark.parametrize("rtol", [1e-30, 0.0, -1.0, float("nan")])
def test_a_tolerance_below_rounding_is_refused(rtol):
    with pytest.raises(ValueError, match="rtol must be at least 2e-16"):
        krylov_steps(100, rtol)
