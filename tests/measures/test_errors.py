import math

import numpy as np
import pytest
from scipy.special import rel_entr

from nla_llm.measures import NORMS, Estimate, output_error, relative_error, row_divergence
from nla_llm.operators import Dense, LowRank, SoftmaxAttention

ORDERS = {"spectral": 2, "frobenius": "fro", "nuclear": "nuc"}


def dense_norm(a, norm):
    return np.abs(a).max(axis=(-2, -1)) if norm == "max" else np.linalg.norm(a, ORDERS[norm], axis=(-2, -1))


def stochastic(shape, seed):
    p = np.random.default_rng(seed).uniform(size=shape) ** 4
    return p / p.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("norm", NORMS)
def test_relative_error_agrees_with_dense_norms(xp, norm):
    p, phat = stochastic((2, 12, 9), 0), stochastic((2, 12, 9), 1)
    estimate = relative_error(Dense(xp.asarray(p)), Dense(xp.asarray(phat)), norm=norm)
    assert estimate.shape == (2,)
    assert estimate.contains(dense_norm(p - phat, norm) / dense_norm(p, norm)).all()
    assert estimate.width.max() < 1e-12


@pytest.mark.parametrize("norm", NORMS)
def test_the_error_of_nothing_is_zero_and_of_zero_is_one(norm):
    p = Dense(stochastic((12, 9), 0))
    assert float(relative_error(p, p, norm=norm)) == 0
    assert relative_error(p, 0.0 * p, norm=norm).contains(1.0)


def test_large_spectral_error_keeps_its_tolerance_and_confidence():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1000, 4))
    P = SoftmaxAttention(q, k, scale=0.5)
    Phat = LowRank(np.ones((1000, 1)), np.full((1000, 1), 1e-3))
    estimate = relative_error(P, Phat, rtol=0.02, confidence=0.95)
    dense = P.dense()
    assert estimate.contains(np.linalg.norm(dense - 1e-3, 2) / np.linalg.norm(dense, 2))
    assert float(estimate.upper / estimate.lower) <= 1.02 * (1 + 1e-10)
    assert estimate.confidence >= 0.95


def test_a_known_reference_is_used():
    p, phat = Dense(np.eye(3)), Dense(np.zeros((3, 3)))
    for norm in NORMS:
        assert float(relative_error(p, phat, norm=norm, reference=Estimate.exact(0.5, "told"))) >= 2.0


@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
def test_a_reference_that_has_used_up_the_failure_probability_is_still_of_use(norm):
    """A reference measured with the confidence that is asked of the quotient leaves none for the numerator."""
    p, phat = Dense(stochastic((60, 50), 0)), Dense(stochastic((60, 50), 1))
    exact = dense_norm(p.matrix, norm)
    reference = Estimate.bracket(0.99 * exact, 1.01 * exact, "by probes", confidence=0.99)
    estimate = relative_error(p, phat, norm=norm, reference=reference)
    assert estimate.contains(dense_norm(p.matrix - phat.matrix, norm) / exact)
    assert 0.985 - 1e-12 <= estimate.confidence <= 0.99


@pytest.mark.parametrize("norm", NORMS)
def test_output_error_agrees_with_dense_norms(xp, norm):
    p, phat, v = (
        stochastic((2, 12, 9), 0),
        stochastic((2, 12, 9), 1),
        np.random.default_rng(2).standard_normal((2, 9, 4)),
    )
    estimate = output_error(*(Dense(xp.asarray(a)) for a in (p, phat)), xp.asarray(v), norm=norm)
    assert estimate.contains(dense_norm((p - phat) @ v, norm) / dense_norm(p @ v, norm)).all()


def test_output_error_takes_operators_of_different_precision(xp):
    p, v = stochastic((12, 9), 0), np.random.default_rng(2).standard_normal((9, 4))
    single = Dense(xp.asarray(p.astype(np.float32)))
    error = float(output_error(Dense(xp.asarray(p)), single, xp.asarray(v)))
    assert 0 < error < 1e-6


def test_divergences_agree_with_their_definitions(xp, monkeypatch):
    monkeypatch.setattr("nla_llm.measures.streaming._BLOCK_ENTRIES", 40)
    p, phat = stochastic((2, 12, 9), 0), stochastic((2, 12, 9), 1)
    p[..., :3] = 0.0
    ops = [Dense(xp.asarray(a)) for a in (p, phat)]
    by_row = {"tv": 0.5 * np.abs(p - phat).sum(axis=-1), "kl": rel_entr(p, phat).sum(axis=-1)}
    for kind, rows in by_row.items():
        assert row_divergence(*ops, kind=kind).contains(rows.mean(axis=-1)).all()
        assert row_divergence(*ops, kind=kind, reduce="max").contains(rows.max(axis=-1)).all()
        assert row_divergence(*ops, kind=kind).width.max() < 1e-13


def test_divergence_is_infinite_where_an_approximation_refuses_what_happens():
    p, phat = Dense(np.array([[0.5, 0.5], [1.0, 0.0]])), Dense(np.array([[1.0, 0.0], [1.0, 0.0]]))
    estimate = row_divergence(p, phat, kind="kl")
    assert math.isinf(float(estimate))
    assert "25.000%" in estimate.how
    assert float(row_divergence(p, phat, kind="tv")) == 0.25


def test_pinsker_relates_the_two():
    p, phat = Dense(stochastic((40, 30), 3)), Dense(stochastic((40, 30), 4))
    assert float(row_divergence(p, phat)) <= math.sqrt(0.5 * float(row_divergence(p, phat, kind="kl")))


def test_bad_arguments_are_named():
    p, other = Dense(np.eye(3)), Dense(np.eye(4))
    with pytest.raises(ValueError, match="norm must be one of spectral"):
        relative_error(p, p, norm="l2")
    with pytest.raises(ValueError, match="norm must be one of"):
        output_error(p, p, np.eye(3), norm="l2")
    with pytest.raises(ValueError, match="v must be"):
        output_error(p, p, np.eye(4))
    for measure in (relative_error, row_divergence):
        with pytest.raises(ValueError, match="same matrix shape"):
            measure(p, other)
    with pytest.raises(ValueError, match="kind must be"):
        row_divergence(p, p, kind="js")
    with pytest.raises(ZeroDivisionError, match="reference is zero"):
        relative_error(0.0 * p, p)


@pytest.mark.parametrize(
    ("v", "error"),
    [
        ([[1.0], [2.0]], TypeError),
        (None, TypeError),
        (np.ones((2, 1), int), TypeError),
        (np.ones((2, 1), complex), TypeError),
        (np.ones((2, 0)), ValueError),
        (np.ones(2), ValueError),
    ],
)
def test_values_that_are_none_are_refused(v, error):
    with pytest.raises(error, match="v must be"):
        output_error(Dense(np.eye(2)), Dense(np.ones((2, 2))), v)
