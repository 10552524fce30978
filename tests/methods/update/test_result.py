"""The error that an engine left behind, bracketed a posteriori: certain below, and above as often as it says."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods.update import LowRankUpdate, remaining_error
from nla_llm.operators import Dense, LowRank, Operator

NORMS = {"frobenius": "fro", "spectral": 2}


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


class Hidden(Operator):
    """An operator of which only products are known."""

    def __init__(self, matrix):
        super().__init__(matrix.shape, matrix)
        self.matrix = matrix

    def apply(self, x):
        return self.matrix @ x

    def apply_transpose(self, y):
        return self.matrix.T @ y


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_updates_are_measured_exactly(norm, dtype, xp):
    delta = draw(0, 20, 15).astype(dtype)
    B = nl.method("truncated_svd", rank=3)(nl.UpdateProblem(xp.asarray(delta)))
    left, right = (to_numpy(a).astype(np.float64) for a in (B.left, B.right))
    truth = np.linalg.norm(delta.astype(np.float64) - left @ right.T, NORMS[norm])
    estimate = B.remaining(norm)
    assert estimate.confidence == 1
    np.testing.assert_allclose(float(estimate.value), truth, rtol=1e-13)
    assert estimate.contains(truth)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", [Dense, lambda a: Dense(a.T).T, Hidden], ids=["dense", "transposed", "hidden"])
def test_large_updates_are_bracketed(norm, make):
    delta = draw(0, 700, 560).astype(np.float32) * np.arange(1, 561, dtype=np.float32) ** -0.5
    B = LowRank(delta[:, :3], np.eye(560, 3, dtype=np.float32))
    truth = np.linalg.norm(delta[:, 3:].astype(np.float64), NORMS[norm])
    estimate = remaining_error(make(delta), B, norm, rng=1)
    assert estimate.contains(truth)
    assert float(estimate.upper / estimate.value) < 1.1


def test_hidden_updates_have_a_certain_lower_bound():
    """Over many draws the lower end of the sampled Frobenius norm never passes the truth, not even by chance."""
    delta = draw(2, 40, 30)
    for seed in range(40):
        estimate = remaining_error(Hidden(delta), LowRank(np.zeros((40, 1)), np.zeros((30, 1))), rng=seed)
        assert estimate.contains(np.linalg.norm(delta))
        assert estimate.lower <= np.linalg.norm(delta)
        assert 0 < estimate.confidence < 1


def test_probes_are_not_those_of_an_engine_with_the_same_seed():
    """An approximation that is exact on all that its own seed draws is bracketed from that number all the same."""
    delta, rng = draw(5, 900, 700), np.random.default_rng(0)
    seen = np.concatenate([rng.standard_normal((700, width)) for width in (32, 64)], axis=1)
    q = np.linalg.qr(delta @ seen)[0]
    estimate = remaining_error(Hidden(delta), LowRank(q, delta.T @ q), rng=0, rtol=0.3)
    truth = np.linalg.norm(delta - q @ (q.T @ delta))
    assert estimate.contains(truth)
    assert float(estimate.upper) < 2 * truth


def test_what_cancels_is_charged():
    """A difference of rounding size is not certified to more than rounding."""
    delta = draw(3, 30, 20)
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    B = LowRankUpdate(u * s, vt.T, of=Dense(delta))
    for norm in NORMS:
        estimate = B.remaining(norm)
        assert estimate.lower == 0
        assert 1e-16 < estimate.upper / np.linalg.norm(delta) < 1e-12


def test_each_entry_of_a_batch_is_bracketed():
    deltas = draw(4, 2, 12, 9)
    B = nl.method("truncated_svd", rank=2)(nl.UpdateProblem(deltas))
    for norm, order in NORMS.items():
        truth = np.linalg.norm(deltas - B.dense(), order, axis=(-2, -1))
        assert B.remaining(norm).contains(truth).all()


def test_unknown_norms_are_refused():
    B = nl.method("zero_update")(nl.UpdateProblem(np.eye(3)))
    with pytest.raises(ValueError, match="norm must be 'frobenius' or 'spectral', got 'nuclear'"):
        B.remaining("nuclear")
