"""Nyströmformer and Skyformer against naive dense definitions; their cores, landmarks and refusals."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods import Unsupported
from nla_llm.methods.attention.landmarks.nystrom import landmark_means
from nla_llm.operators import Skeleton
from nla_llm.theory import columns

EPS = np.finfo(np.float64).eps


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def naive_means(x, m):
    return np.stack([part.mean(0) for part in np.array_split(x, m)])


def naive_iteration(a, steps):
    z, eye = a.T / (np.linalg.norm(a, 1) * np.linalg.norm(a, np.inf)), np.eye(len(a))
    for _ in range(steps):
        z = z @ (13 * eye - a @ z @ (15 * eye - a @ z @ (7 * eye - a @ z))) / 4
    return z


def naive_nystromformer(q, k, m, scale, inverse):
    qm, km = naive_means(q, m), naive_means(k, m)
    return softmax(scale * q @ km.T) @ inverse(softmax(scale * qm @ km.T)) @ softmax(scale * qm @ k.T)


# -- landmarks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(1, 1), (12, 4), (13, 4), (15, 4), (7, 7), (101, 10), (9, 1)])
def test_segments_need_not_divide_the_tokens(n, m, xp):
    x = draw(0, 2, n, 3)
    want = np.stack([naive_means(head, m) for head in x])
    np.testing.assert_allclose(to_numpy(landmark_means(xp.asarray(x), m)), want, rtol=0, atol=50 * EPS)


def test_hidden_keys_enter_no_mean_and_heads_may_hide_different_ones():
    x, keep = draw(0, 2, 20, 3), np.random.default_rng(1).random((2, 20)) < 0.6
    got = landmark_means(np.where(keep[..., None], x, np.inf), 4, keep)
    for head in range(2):
        np.testing.assert_allclose(got[head], naive_means(x[head][keep[head]], 4), rtol=0, atol=50 * EPS)


def test_fewer_tokens_than_landmarks_are_refused():
    q, k = draw(0, 9, 2), draw(1, 20, 2)
    method = nl.method("nystromformer", m=10)
    with pytest.raises(ValueError, match="m=10 landmarks cannot be means of 9 queries"):
        method(nl.AttentionProblem(q, k))
    with pytest.raises(ValueError, match="of 7 visible keys"):
        method(nl.AttentionProblem(k, k, key_mask=np.arange(20) < 7))
    with pytest.raises(Unsupported, match="later ones included"):
        method(nl.AttentionProblem(k, k, causal=True))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nystromformer", {"m": 0}, "m must be"),
        ("nystromformer", {"m": 4, "core": "svd"}, "core must be one of"),
        ("nystromformer", {"m": 4, "iterations": 0}, "iterations must be"),
        ("nystromformer", {"m": 4, "ridge": 0.0}, "ridge must be a number > 0"),
        ("skyformer", {"m": 4, "core": "pinv"}, "core must be one of iteration, exact"),
        ("skyformer", {"m": 4, "ridge": -1.0}, "ridge must be a number > 0"),
    ],
)
def test_bad_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        nl.method(name, **options)


# -- Nyströmformer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 6])
@pytest.mark.parametrize(("n_q", "n_k"), [(23, 23), (17, 31)])
def test_definition_with_the_iteration(iterations, n_q, n_k, xp):
    q, k, v = draw(0, 2, n_q, 5), draw(1, 2, n_k, 5), draw(2, 2, n_k, 3)
    P = nl.method("nystromformer", m=6, iterations=iterations)(nl.AttentionProblem(xp.asarray(q), xp.asarray(k)))
    for head in range(2):
        want = naive_nystromformer(q[head], k[head], 6, 5**-0.5, lambda a: naive_iteration(a, iterations))
        np.testing.assert_allclose(to_numpy(P.dense())[head], want, rtol=0, atol=1e4 * EPS * np.abs(want).max())
        np.testing.assert_allclose(to_numpy(P @ xp.asarray(v))[head], want @ v[head], rtol=0, atol=1e5 * EPS)


def test_definition_with_the_pseudo_inverse_and_the_ridge():
    q, k = draw(0, 40, 3), draw(1, 40, 3)
    problem = nl.AttentionProblem(q, k)
    exact = nl.method("nystromformer", m=5, core="pinv")(problem)
    want = naive_nystromformer(q, k, 5, 3**-0.5, np.linalg.pinv)
    np.testing.assert_allclose(exact.dense(), want, rtol=0, atol=1e4 * EPS * float(exact.core_condition))

    def ridge(a):
        level = 0.01 * np.linalg.norm(a, 1) * np.linalg.norm(a, np.inf)
        return np.linalg.solve(a.T @ a + level * np.eye(len(a)), a.T)

    got = nl.method("nystromformer", m=5, core="ridge", ridge=0.01)(problem)
    np.testing.assert_allclose(got.dense(), naive_nystromformer(q, k, 5, 3**-0.5, ridge), rtol=0, atol=1e5 * EPS)


def test_rows_sum_to_one_only_where_the_core_is_inverted():
    """A 1 = 1 and F 1 = 1, so A⁻¹ keeps the sums; after few steps Z 1 is not 1."""
    problem = nl.AttentionProblem(3 * draw(0, 40, 3), draw(1, 40, 3))
    exact = nl.method("nystromformer", m=4, core="pinv")(problem)
    np.testing.assert_allclose(exact.row_sums(), 1, rtol=0, atol=1e3 * EPS * float(exact.core_condition))
    assert np.abs(nl.method("nystromformer", m=4, iterations=2)(problem).row_sums() - 1).max() > 1e-3
    many = nl.method("nystromformer", m=4, iterations=30)(problem)
    np.testing.assert_allclose(many.dense(), exact.dense(), rtol=0, atol=1e6 * EPS * float(exact.core_condition))


def test_condition_of_the_core_head_by_head(xp):
    q, k = draw(0, 2, 3, 30, 4), draw(1, 2, 1, 30, 4)
    P = nl.method("nystromformer", m=5)(nl.AttentionProblem(xp.asarray(q), xp.asarray(k)))
    assert isinstance(P, Skeleton)
    got = to_numpy(P.core_condition)
    assert got.shape == (2, 3)
    for i, j in np.ndindex(2, 3):
        core = softmax(0.5 * naive_means(q[i, j], 5) @ naive_means(k[i, 0], 5).T)
        assert np.isclose(got[i, j], np.linalg.cond(core), rtol=1e-8)


def test_six_steps_regularise_where_the_pseudo_inverse_explodes():
    """Isotropic queries and keys: the core is nearly of rank one, and its small singular values carry noise."""
    problem = nl.AttentionProblem(draw(0, 512, 64), draw(1, 512, 64))
    exact = problem.exact().dense()

    def error(**options):
        return np.linalg.norm(nl.method("nystromformer", m=64, **options)(problem).dense() - exact) / np.linalg.norm(
            exact
        )

    steps, pinv, ridge = error(), error(core="pinv"), error(core="ridge", ridge=columns.iteration_ridge(6))
    assert steps < 1
    assert pinv > 3
    assert abs(steps - ridge) < 0.05


def test_measures_see_the_factors():
    """The singular values come from factors of m columns, not from the streamed rows."""
    P = nl.method("nystromformer", m=5)(nl.AttentionProblem(draw(0, 2, 40, 3), draw(1, 2, 30, 3)))
    left, right = nl.linalg.low_rank_factors(P)
    assert (left.shape, right.shape) == ((2, 40, 5), (2, 30, 5))
    np.testing.assert_allclose(left @ np.swapaxes(right, -1, -2), P.dense(), rtol=0, atol=1e4 * EPS)


def test_hiding_keys_is_removing_them():
    q, k, keep = draw(0, 30, 3), draw(1, 30, 3), np.arange(30) % 4 != 1
    for core in ("iteration", "ridge"):
        method = nl.method("nystromformer", m=5, core=core)
        hidden = method(nl.AttentionProblem(q, np.where(keep[:, None], k, 1e4), key_mask=keep)).dense()
        assert not hidden[:, ~keep].any()
        removed = method(nl.AttentionProblem(q, k[keep])).dense()
        np.testing.assert_allclose(hidden[:, keep], removed, rtol=0, atol=1e5 * EPS)


@pytest.mark.parametrize("core", ["iteration", "pinv", "ridge"])
def test_a_low_rank_matrix_is_reproduced_from_as_many_landmarks(core):
    """Tokens that repeat within segments: every token is its own landmark, and P has rank m."""
    x = 4 * np.repeat(draw(0, 3, 2), 5, axis=0)
    problem = nl.AttentionProblem(x, x, scale=1.0)
    P = nl.method("nystromformer", m=3, core=core, iterations=40, ridge=1e-13)(problem)
    np.testing.assert_allclose(P.dense(), problem.exact().dense(), rtol=0, atol=1e-9)


# -- Skyformer ---------------------------------------------------------------------------------------------------------


def gaussian(x, y):
    return np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / 2)


@pytest.mark.parametrize("scale", [0.7, -0.7])
def test_target_is_the_gaussian_kernel(scale, xp):
    q, k, keep = draw(0, 9, 3), draw(1, 14, 3), np.arange(14) != 5
    problem = nl.AttentionProblem(xp.asarray(q), xp.asarray(k), scale=scale, key_mask=xp.asarray(keep))
    want = gaussian(0.7**0.5 * q, np.sign(scale) * 0.7**0.5 * k) * keep
    np.testing.assert_allclose(
        to_numpy(nl.method("skyformer", m=3).target(problem).dense()), want, rtol=0, atol=50 * EPS
    )


def test_target_of_far_tokens_does_not_overflow():
    q = 60 * draw(0, 9, 3)
    want = gaussian(3**-0.25 * q, 3**-0.25 * q)
    got = nl.method("skyformer", m=3).target(nl.AttentionProblem(q, q)).dense()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("core", ["iteration", "exact"])
def test_all_tokens_as_landmarks_give_the_shrunken_kernel(core):
    """With all 2n tokens sampled the completion is Ā(Ā + λI)⁻¹Ā, whatever the draw."""
    q, k = 0.5 * draw(0, 7, 2), 0.5 * draw(1, 9, 2)
    z = np.concatenate([q, k]) * 2**-0.25
    full = gaussian(z, z)
    P = nl.method("skyformer", m=16, core=core, ridge=0.1, iterations=30)(nl.AttentionProblem(q, k), rng=0)
    want = full @ np.linalg.solve(full + 0.1 * np.eye(16), full)
    np.testing.assert_allclose(P.dense(), want[:7, 7:], rtol=0, atol=1e5 * EPS)


def test_error_of_the_cross_block_is_below_that_of_the_completion():
    """For the same sample, found from the operator itself."""
    q, k = draw(0, 20, 3), draw(1, 20, 3)
    problem = nl.AttentionProblem(q, k)
    method = nl.method("skyformer", m=10, core="exact", ridge=0.01)
    P = method(problem, rng=3)
    z = np.concatenate([q, k]) * 3**-0.25
    full = gaussian(z, z)
    sample = [int(np.argmin(np.abs(full[:20] - column[:, None]).max(0))) for column in P.left.dense().T]
    core = np.linalg.inv(full[np.ix_(sample, sample)] + 0.01 * np.eye(10))
    completion = np.linalg.norm(full - full[:, sample] @ core @ full[sample], 2)
    error = np.linalg.norm((P - method.target(problem)).dense(), 2)
    assert 0.01 < error <= completion


def test_hidden_keys_are_never_landmarks():
    q, k, keep = draw(0, 3, 2), draw(1, 20, 2), np.arange(20) < 4
    junk = np.where(keep[:, None], k, 1e3)
    for seed in range(5):
        P = nl.method("skyformer", m=7)(nl.AttentionProblem(q, junk, key_mask=keep), rng=seed)
        assert P.left.dense().min() > 0  # no landmark is far away
    with pytest.raises(ValueError, match="8 tokens cannot be drawn from 7"):
        nl.method("skyformer", m=8)(nl.AttentionProblem(q, junk, key_mask=keep), rng=0)


@pytest.mark.parametrize("name", ["nystromformer", "skyformer"])
def test_memory_and_precision_at_single_precision(name):
    q = draw(0, 2000, 8).astype(np.float32)
    P = nl.method(name, m=16)(nl.AttentionProblem(q, q), rng=0)
    assert (P @ q).dtype == np.float32
    Q = nl.method(name, m=16)(nl.AttentionProblem(q.astype(float), q.astype(float)), rng=0)
    want = Q @ q.astype(float)
    np.testing.assert_allclose(P @ q, want, rtol=0, atol=1e4 * np.finfo(np.float32).eps * np.abs(want).max())


# -- masks, here and in columns and clusters ---------------------------------------------------------------------------

MASKED = [
    ("nystromformer", {}),
    ("nystromformer", {"core": "ridge"}),
    ("skyformer", {}),
    ("rpcholesky", {}),
    ("cur_attention", {}),
    ("cur_attention", {"sampling": "uniform"}),
    ("cur_attention", {"sampling": "ridge_leverage"}),
    ("clustered_attention", {}),
    ("improved_clustered_attention", {"k": 4}),
]


@pytest.mark.parametrize(("name", "options"), MASKED, ids=str)
def test_every_head_has_its_own_mask(name, options, xp):
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 3, 23, 4)), rng.standard_normal((2, 1, 29, 4))
    keep = rng.random((2, 1, 29)) < 0.7
    method = nl.method(name, m=6, **options)
    whole = method(nl.AttentionProblem(xp.asarray(q), xp.asarray(k), key_mask=xp.asarray(keep)), rng=3)
    dense = to_numpy(whole.dense())
    assert whole.shape == (2, 3, 23, 29)
    for i, j in np.ndindex(2, 3):
        alone = method(nl.AttentionProblem(q[i, j], k[i, 0], key_mask=keep[i, 0]), rng=3).dense()
        np.testing.assert_allclose(dense[i, j], alone, rtol=0, atol=1e6 * EPS)
        assert not dense[i, j][:, ~keep[i, 0]].any()
        assert np.abs(dense[i, j]).max() > 0.1
