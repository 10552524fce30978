"""Linformer and the construction of its theorem against dense definitions."""

import numpy as np
import pytest
from scipy.special import softmax

import nla_llm as nl
from nla_llm.backend import to_numpy

EPS = np.finfo(np.float64).eps


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def close(got, want, constant=1000):
    np.testing.assert_allclose(to_numpy(got), want, rtol=0, atol=constant * EPS * max(1.0, np.abs(want).max()))


def gaussian(m, n, seed):
    return np.random.default_rng(seed).standard_normal((m, n)) / np.sqrt(m)


# -- linformer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_gaussian_linformer_is_its_definition(masked, xp):
    q, k, v = draw(0, 2, 3, 11, 4), draw(1, 2, 1, 17, 4), draw(2, 2, 1, 17, 3)
    keep = np.arange(17) % 4 != 1
    E = gaussian(6, 17, 5) * (keep if masked else 1)
    want = softmax(0.3 * q @ np.swapaxes(E @ k, -1, -2), axis=-1) @ E
    mask = xp.asarray(keep) if masked else None
    P = nl.method("linformer", m=6)(nl.AttentionProblem(xp.asarray(q), xp.asarray(k), scale=0.3, key_mask=mask), rng=5)
    close(P.dense(), want)
    close(P @ xp.asarray(v), want @ v)
    assert np.abs(want.sum(axis=-1) - 1).max() > 0.1  # rows do not sum to one


def test_gaussian_linformer_tends_to_zero():
    """m P̂ → scale q kᵀ + 1 (Eᵀ1)ᵀ: with more directions it moves away from softmax attention, to nothing at all."""
    q, k, m = draw(0, 5, 3), draw(1, 6, 3), 40_000
    problem = nl.AttentionProblem(q, k)
    P = nl.method("linformer", m=m)(problem, rng=0).dense()
    limit = problem.scale * q @ k.T + gaussian(m, 6, 0).sum(axis=0)
    assert np.abs(m * P - limit).max() < 0.1 * np.abs(limit).max()
    exact = problem.exact().dense()
    assert abs(np.linalg.norm(P - exact) / np.linalg.norm(exact) - 1) < 1e-3


@pytest.mark.parametrize(("n", "m"), [(12, 4), (17, 5), (7, 7), (9, 1)])
def test_means_are_softmax_over_groups(n, m, xp):
    """Group of key j is ⌊j m/n⌋; its weight is its size times the exponential at its mean key."""
    q, k = draw(0, 2, 5, 3), draw(1, 2, n, 3)
    group = np.arange(n) * m // n
    sizes = np.bincount(group, minlength=m)
    means = np.stack([k[:, group == c].mean(axis=1) for c in range(m)], axis=1)
    weights = softmax(q @ np.swapaxes(means, -1, -2) / 3**0.5 + np.log(sizes), axis=-1)
    want = (weights / sizes)[..., group]
    P = nl.method("linformer", m=m, projection="mean")(nl.AttentionProblem(xp.asarray(q), xp.asarray(k)))
    close(P.dense(), want)


def test_means_of_single_keys_are_exact():
    problem = nl.AttentionProblem(draw(0, 6, 3), draw(1, 9, 3))
    close(nl.method("linformer", m=9, projection="mean")(problem).dense(), problem.exact().dense())


def test_more_groups_than_visible_keys_are_exact():
    problem = nl.AttentionProblem(draw(0, 6, 3), draw(1, 9, 3), key_mask=np.arange(9) % 3 == 0)
    close(nl.method("linformer", m=5, projection="mean")(problem).dense(), problem.exact().dense())


def test_equal_logits_give_equal_weights_whatever_the_sizes():
    P = nl.method("linformer", m=4, projection="mean")(nl.AttentionProblem(np.zeros((3, 2)), draw(0, 11, 2)))
    close(P.dense(), np.full((3, 11), 1 / 11))


def test_refusals():
    q = draw(0, 6, 2)
    with pytest.raises(nl.methods.Unsupported, match="a combination of all keys, later ones included"):
        nl.method("linformer", m=2)(nl.AttentionProblem(q, q, causal=True), rng=0)
    with pytest.raises(nl.methods.Unsupported, match="a combination of all keys, later ones included"):
        nl.method("gaussian_projection", m=2)(nl.AttentionProblem(q, q, causal=True), rng=0)
    with pytest.raises(ValueError, match="m=7 groups cannot be made of n_k=6 keys"):
        nl.method("linformer", m=7, projection="mean")(nl.AttentionProblem(q, q))
    with pytest.raises(ValueError, match="m=7 exceeds the dimensions"):
        nl.method("gaussian_projection", m=7, subspace="optimal")(nl.AttentionProblem(q, q))
    with pytest.raises(ValueError, match="one of gaussian, mean"):
        nl.method("linformer", m=7, projection="max")
    with pytest.raises(ValueError, match="one of gaussian, optimal"):
        nl.method("gaussian_projection", m=7, subspace="best")


# -- P RᵀR -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_gaussian_projection_is_its_definition(masked, xp):
    q, k, v = draw(0, 2, 3, 11, 4), draw(1, 2, 1, 17, 4), draw(2, 2, 1, 17, 3)
    keep = np.arange(17) % 4 != 1
    mask = xp.asarray(keep) if masked else None
    problem = nl.AttentionProblem(xp.asarray(q), xp.asarray(k), key_mask=mask)
    R = gaussian(6, 17, 5) * (keep if masked else 1)
    want = to_numpy(problem.exact().dense()) @ R.T @ R
    P = nl.method("gaussian_projection", m=6)(problem, rng=5)
    close(P.dense(), want)
    close(P @ xp.asarray(v), want @ v)


def test_theory_counts_visible_keys_and_heads():
    """Mean square error over draws against the closed form, head by head, where keys are hidden."""
    q, k, keep = draw(0, 2, 9, 3), draw(1, 2, 15, 3), np.arange(15) % 3 > 0
    problem = nl.AttentionProblem(q, k, key_mask=keep)
    method, exact = nl.method("gaussian_projection", m=4), problem.exact().dense()
    promised = method.theory(problem).error("frobenius")
    np.testing.assert_allclose(promised**2, np.sum(exact**2, axis=(-2, -1)) * 11 / 4, rtol=1e-12)
    ratios = [np.sum((method(problem, rng=s).dense() - exact) ** 2, axis=(-2, -1)) / promised**2 for s in range(400)]
    assert np.all(np.abs(np.mean(ratios, axis=0) - 1) < 4 * np.std(ratios, axis=0) / 400**0.5)


@pytest.mark.parametrize("n", [40, 2100])
def test_the_optimal_subspace_gives_the_best_matrix_of_its_rank(n):
    """Beyond 2048 tokens by block Krylov iteration, whose error is within the tolerance of its residual."""
    q, k = draw(0, n, 2), draw(1, 37, 2)
    problem = nl.AttentionProblem(q, k)
    best = nl.method("optimal_rank", m=3)(problem, rng=0).dense()
    P = nl.method("gaussian_projection", m=3, subspace="optimal")(problem, rng=0).dense()
    exact = problem.exact().dense()
    errors = [np.linalg.norm(exact - a) for a in (best, P)]
    np.testing.assert_allclose(errors[1], errors[0], rtol=1e-10 if n <= 2048 else 1e-3)
    promised = nl.method("gaussian_projection", m=3, subspace="optimal").theory(problem)
    np.testing.assert_allclose(errors[1], promised.error("frobenius"), rtol=1e-10 if n <= 2048 else 1e-3)


def test_random_directions_are_worse_than_nothing_until_they_outnumber_the_keys():
    problem = nl.AttentionProblem(0.3 * draw(0, 60, 3), 0.3 * draw(1, 60, 3))
    exact = problem.exact().dense()

    def error(m):
        P = [nl.method("gaussian_projection", m=m)(problem, rng=s).dense() for s in range(20)]
        return np.sqrt(np.mean([np.sum((a - exact) ** 2) for a in P])) / np.linalg.norm(exact)

    assert error(15) > 1.7  # √(61/15) = 2.02
    assert error(244) < 0.6  # 0.5
