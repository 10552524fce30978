import math

import numpy as np
import pytest

from nla_llm.linalg import haar_orthogonal
from nla_llm.measures import (
    attention_condition,
    condition_number,
    gram_condition,
    normaliser_condition,
    softmax_condition,
)
from nla_llm.operators import Dense, LowRank, SoftmaxAttention


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("kappa", [1.0, 1e3, 1e10])
def test_condition_numbers_of_known_spectra(xp, kappa):
    values = np.geomspace(1, 1 / kappa, 8)
    matrix = (haar_orthogonal(8, 0) * values) @ haar_orthogonal(8, 1)
    estimate = condition_number(Dense(xp.asarray(matrix)))
    assert estimate.contains(kappa)
    assert float(estimate.upper / estimate.lower) < 1 + 1e-13 * kappa
    assert condition_number(Dense(xp.asarray(matrix)), rank=1).contains(1.0)


def test_a_singular_matrix_has_no_finite_upper_end():
    estimate = condition_number(Dense(np.ones((5, 5))))
    assert math.isinf(float(estimate.upper))
    assert float(estimate.lower) > 1e12
    with pytest.raises(ZeroDivisionError, match="zero"):
        condition_number(Dense(np.zeros((3, 3))))


def test_a_low_rank_product_is_judged_on_its_range(xp):
    left, right = np.random.default_rng(0).standard_normal((2, 30, 4))
    truth = np.linalg.svd(left @ right.T, compute_uv=False)
    estimate = condition_number(LowRank(xp.asarray(left), xp.asarray(right)))
    assert estimate.contains(truth[0] / truth[3])
    assert float(estimate.width) < 1e-11
    with pytest.raises(ValueError, match="rank must be between 1 and 4"):
        condition_number(LowRank(left, right), rank=5)


def test_a_large_matrix_is_only_bounded_from_below(monkeypatch):
    monkeypatch.setattr("nla_llm.measures.conditioning.SMALL_ENTRIES", 0)
    values = np.geomspace(1, 1e-3, 520)
    matrix = (haar_orthogonal(520, 0) * values) @ haar_orthogonal(520, 1)
    estimate = condition_number(Dense(matrix))
    assert 1 < float(estimate.lower) <= 1e3
    assert math.isinf(float(estimate.upper))


def test_gram_condition_is_that_of_the_gram_matrix(xp):
    features = np.random.default_rng(0).standard_normal((2, 30, 5))
    truth = np.linalg.cond(np.swapaxes(features, -1, -2) @ features)
    estimate = gram_condition(xp.asarray(features))
    assert np.allclose(estimate.value, truth, rtol=1e-12)
    with pytest.raises(ValueError, match="m <= n"):
        gram_condition(features[:, :3])


def test_gram_condition_survives_where_the_gram_matrix_is_numerically_singular():
    features = (haar_orthogonal(20, 0)[:, :5] * np.geomspace(1, 1e-10, 5)) @ haar_orthogonal(5, 1)
    assert gram_condition(features).contains(1e20)


def test_normaliser_condition_counts_signs(xp):
    sums = np.array([[1.0, 2.0, -8.0, 4.0], [1.0, 1.0, 1.0, 0.0]])
    found = normaliser_condition(xp.asarray(sums))
    assert found.ratio.value.tolist() == [8.0, np.inf]
    assert found.negative_share.value.tolist() == [0.25, 0.0]
    with pytest.raises(ValueError, match="row_sums must be finite"):
        normaliser_condition(np.array([np.nan]))


def test_softmax_condition_agrees_with_the_jacobian(xp):
    x = np.random.default_rng(0).standard_normal((6, 9)) * np.array([0.1, 1, 3, 10, 30, 1])[:, None] + 2
    p = softmax(x)
    jacobian = p[..., None] * np.eye(9) - p[:, :, None] * p[:, None, :]
    truth = np.linalg.norm(jacobian, np.inf, axis=(-2, -1)) * np.abs(x).max(axis=-1) / p.max(axis=-1)
    estimate = softmax_condition(xp.asarray(x))
    assert np.allclose(estimate.value[:4], truth[:4], rtol=1e-11)
    assert np.allclose(estimate.value, truth, atol=1e-13)


def test_softmax_condition_of_a_sharp_row_does_not_cancel():
    # 1 − p_max = e^−50/(1 + e^−50), which is lost in 1 − p_max
    assert softmax_condition(np.array([50.0, 0.0])).contains(100 * math.exp(-50) / (1 + math.exp(-50)))


def test_removed_keys_do_not_count_and_a_fully_masked_row_is_refused():
    with_removed = softmax_condition(np.array([1.0, -np.inf, 2.0]))
    assert np.isclose(float(with_removed), float(softmax_condition(np.array([1.0, 2.0]))), rtol=1e-15)
    with pytest.raises(ValueError, match="fully masked"):
        softmax_condition(np.array([-np.inf, -np.inf]))


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_bounds_are_never_beaten_by_a_finite_difference(xp, scale):
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 10, 4))
    factor = 0.5 if scale is None else scale

    def output(q, k, v):
        return softmax(factor * q @ np.swapaxes(k, -1, -2)) @ v

    op = SoftmaxAttention(xp.asarray(q), xp.asarray(k), scale=factor)
    bounds = attention_condition(op, *(xp.asarray(a) for a in (q, k, v)), scale=scale)
    base, step, norm = output(q, k, v), 1e-6, lambda a: np.linalg.norm(a, axis=(-2, -1))
    worst = np.zeros((3, 2))
    for _ in range(100):
        for i, name in enumerate("qkv"):
            arrays = {"q": q, "k": k, "v": v}
            change = rng.standard_normal(arrays[name].shape)
            change *= step * norm(arrays[name])[:, None, None] / norm(change)[:, None, None]
            arrays[name] = arrays[name] + change
            worst[i] = np.maximum(worst[i], norm(output(**arrays) - base) / norm(base) / step)
    for i, bound in enumerate(bounds):
        assert np.all(worst[i] <= bound.upper)
        assert np.all(bound.upper < 100 * worst[i])
    exact_v = np.linalg.norm(op_dense := np.asarray(op.dense()), 2, axis=(-2, -1)) * norm(v) / norm(op_dense @ v)
    assert bounds.v.contains(exact_v).all()
