"""Training of low-rank products: averages, integrated flows, Hessians by brute force, the published bound, networks."""

import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.stats import ortho_group

from nla_llm.theory import low_rank_training as theory


def frame(n, r, seed):
    return ortho_group.rvs(n, random_state=seed)[:, :r]


# -- the first step ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 8])
def test_mean_of_the_first_step_by_simulation(rank):
    """One step of gradient descent from B = 0 with a drawn A, averaged; the variance is that of uniform entries."""
    d_out, d_in, draws, lr, scale = 3, 5, 20_000, 0.1, 4 / rank
    rng = np.random.default_rng(rank)
    G = rng.standard_normal((d_out, d_in))
    A = rng.uniform(-(d_in**-0.5), d_in**-0.5, (draws, rank, d_in))
    B = -lr * scale * G @ np.swapaxes(A, -1, -2)
    steps = scale * B @ A
    want = theory.first_step(G, lr=lr, scale=scale, rank=rank, variance=theory.kaiming_variance(d_in))
    assert (np.abs(steps.mean(0) - want) / (steps.std(0) / np.sqrt(draws))).max() < 4


def test_two_scalings_of_the_first_step():
    sizes = {r: theory.first_step(1.0, lr=1.0, scale=1 / r, rank=r, variance=1.0) for r in (1, 4, 16)}
    assert [float(x) for x in sizes.values()] == [-1, -0.25, -0.0625]
    steady = {float(theory.first_step(1.0, lr=1.0, scale=r**-0.5, rank=r, variance=1.0)) for r in (1, 4, 16)}
    assert steady == {-1.0}


# -- gradient flow -----------------------------------------------------------------------------------------------------


def flow(B, A, T, scale, times):
    """B and A under gradient flow, by an integrator of order eight."""
    shapes, cut = (B.shape, A.shape), B.size

    def slope(_, w):
        b, a = w[:cut].reshape(shapes[0]), w[cut:].reshape(shapes[1])
        residual = scale * b @ a - T
        return -scale * np.concatenate([(residual @ a.T).ravel(), (b.T @ residual).ravel()])

    start = np.concatenate([B.ravel(), A.ravel()])
    solution = solve_ivp(slope, (0, times[-1]), start, method="DOP853", t_eval=times, rtol=1e-12, atol=1e-14)
    return [(w[:cut].reshape(shapes[0]), w[cut:].reshape(shapes[1])) for w in solution.y.T]


def test_the_flow_conserves_the_difference_of_the_grams():
    rng = np.random.default_rng(0)
    B, A, T = rng.standard_normal((5, 2)), rng.standard_normal((2, 4)), rng.standard_normal((5, 4))
    first = A @ A.T - B.T @ B
    for b, a in flow(B, A, T, 0.7, [1.0, 5.0]):
        np.testing.assert_allclose(a @ a.T - b.T @ b, first, rtol=0, atol=1e-10)
    assert np.abs(b - B).max() > 0.1


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_balanced_modes_against_the_integrated_flow(scale):
    strengths, starts, times = np.array([2.0, 0.7]), np.array([1e-3, 2e-3]), np.array([0.5, 1.0, 3.0, 8.0])
    U, V = frame(5, 2, 0), frame(4, 2, 1)
    root = np.sqrt(starts / scale)
    pairs = flow(U * root, root[:, None] * V.T, U * strengths @ V.T, scale, times)
    for t, (b, a) in zip(times, pairs, strict=True):
        modes = [float(theory.balanced_mode(t, s, u, scale=scale)) for s, u in zip(strengths, starts, strict=True)]
        np.testing.assert_allclose(U.T @ (scale * b @ a) @ V, np.diag(modes), rtol=0, atol=1e-9)


# -- local rates -------------------------------------------------------------------------------------------------------


def minimiser(s, d_out, d_in, scale, imbalance):
    """Factors of T = U Σ Vᵀ with A Aᵀ − Bᵀ B = δ I: the root by bisection, not by the formula."""
    a = []
    for sigma in s:
        low, high = 1e-9, 1e3
        for _ in range(200):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if middle**2 - (sigma / scale / middle) ** 2 < imbalance else (low, middle)
        a.append(low)
    a = np.array(a)
    return frame(d_out, len(s), 3) * (np.array(s) / scale / a), a[:, None] * frame(d_in, len(s), 4).T


@pytest.mark.parametrize(("scale", "imbalance"), [(1.0, 0.0), (0.5, 0.0), (1.0, 2.0), (2.0, -0.7)])
def test_spectrum_of_the_hessian_by_brute_force(scale, imbalance):
    """At a zero of the residual the Hessian is JᵀJ; J column by column from the differential of s·BA."""
    s, d_out, d_in = [2.0, 0.5], 4, 3
    B, A = minimiser(s, d_out, d_in, scale, imbalance)
    columns = []
    for i in range(B.size + A.size):
        unit = np.zeros(B.size + A.size)
        unit[i] = 1.0
        dB, dA = unit[: B.size].reshape(B.shape), unit[B.size :].reshape(A.shape)
        columns.append((scale * (dB @ A + B @ dA)).ravel())
    found = np.linalg.eigvalsh(np.transpose(columns).T @ np.transpose(columns))[::-1]
    want = theory.local_spectrum(s, d_out, d_in, scale=scale, imbalance=imbalance)
    np.testing.assert_allclose(found[: want.size], want, rtol=0, atol=1e-10 * want[0])
    np.testing.assert_allclose(found[want.size :], 0, atol=1e-10 * want[0])
    assert found.size - want.size == len(s) ** 2


def descend(B, A, T, lr, steps):
    errors = []
    for _ in range(steps):
        residual = B @ A - T
        B, A = B - lr * residual @ A.T, A - lr * B.T @ residual
        errors.append(np.linalg.norm(B @ A - T))
    return errors


@pytest.mark.parametrize("condition", [1.0, 4.0, 20.0])
def test_gradient_descent_has_the_best_factor_and_turns_unstable_at_the_critical_rate(condition):
    s = np.array([1.0, 1 / condition])
    B, A = minimiser(s, 5, 4, 1.0, 0.0)
    T, noise = B @ A, np.random.default_rng(0)
    near = [f + 1e-6 * noise.standard_normal(f.shape) for f in (B, A)]
    rate = theory.gradient_descent_rate(theory.local_spectrum(s, 5, 4))
    kappa = condition
    assert rate.factor == pytest.approx((2 * kappa - 1) / (2 * kappa + 1), rel=1e-12)
    steps = int(8 / -np.log(rate.factor))
    errors = descend(*near, T, rate.best, steps)
    assert (errors[-1] / errors[steps // 2]) ** (1 / (steps - 1 - steps // 2)) == pytest.approx(rate.factor, rel=0.02)
    assert descend(*near, T, 1.05 * rate.critical, 60)[-1] > 2 * descend(*near, T, 1.05 * rate.critical, 30)[-1]
    assert descend(*near, T, 0.95 * rate.critical, 60)[-1] < descend(*near, T, 0.95 * rate.critical, 30)[-1]


def scaled(B, A, T, lr):
    residual = B @ A - T
    return (
        B - lr * residual @ A.T @ np.linalg.inv(A @ A.T),
        A - lr * np.linalg.inv(B.T @ B) @ B.T @ residual,
    )


@pytest.mark.parametrize("lr", [0.2, 0.5, 2 / 3, 0.9])
@pytest.mark.parametrize("condition", [1.0, 100.0])
def test_factor_of_scaled_gradient_descent(condition, lr):
    s = np.array([1.0, 1 / condition])
    B, A = minimiser(s, 6, 5, 1.0, 0.0)
    T, rng = B @ A, np.random.default_rng(1)
    B, A = (f + 1e-4 / condition * rng.standard_normal(f.shape) for f in (B, A))
    errors = []
    for _ in range(16):
        B, A = scaled(B, A, T, lr)
        errors.append(np.linalg.norm(B @ A - T))
    assert (errors[15] / errors[10]) ** 0.2 == pytest.approx(theory.scaled_gd_factor(lr), rel=0.05)


@pytest.mark.parametrize("lr", [0.1, 0.5, 2 / 3])
@pytest.mark.parametrize("condition", [1.0, 30.0, 1000.0])
def test_the_bound_of_scaled_gradient_descent_is_never_exceeded(condition, lr):
    """Starts at the distance 0.1 σ_r, in random directions and in those of the smallest singular value."""
    s = np.geomspace(1, 1 / condition, 3)
    L, R = frame(8, 3, 5) * np.sqrt(s), frame(6, 3, 6) * np.sqrt(s)
    T, root = L @ R.T, np.sqrt(s)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        moves = [rng.standard_normal(f.shape) for f in (L, R)]
        if seed % 2:
            moves = [m * [0.0, 0.0, 1.0] for m in moves]
        distance = np.sqrt(sum(np.sum((m * root) ** 2) for m in moves))
        B, A = L + 0.1 * s[-1] / distance * moves[0], (R + 0.1 * s[-1] / distance * moves[1]).T
        for t in range(25):
            error = np.linalg.norm(B @ A - T)
            assert error <= theory.scaled_gd_bound(t, s[-1], lr) * (1 + 1e-9) + 1e-14
            B, A = scaled(B, A, T, lr)


def test_a_near_product_has_near_factors():
    """The distance of the bound is at most (√2 + 1)^½ times the error; factors balanced, then Procrustes."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        s = np.geomspace(1, 1 / rng.choice([1.0, 30.0, 1000.0]), 3)
        L, R, root = frame(8, 3, seed) * np.sqrt(s), frame(6, 3, seed + 100) * np.sqrt(s), np.sqrt(s)
        near = [f + 0.02 * s[-1] ** 0.5 * rng.standard_normal(f.shape) for f in (L, R)]
        u, values, vt = np.linalg.svd(near[0] @ near[1].T, full_matrices=False)
        B, A = u[:, :3] * np.sqrt(values[:3]), vt[:3].T * np.sqrt(values[:3])
        p, _, qt = np.linalg.svd((B.T @ L + A.T @ R) @ np.diag(s))
        turn = p @ qt
        distance = np.hypot(np.linalg.norm((B @ turn - L) * root), np.linalg.norm((A @ turn - R) * root))
        assert distance <= np.sqrt(np.sqrt(2) + 1) * np.linalg.norm(B @ A.T - L @ R.T) + 1e-14


def test_the_factor_of_the_bound_is_above_the_local_factor():
    for lr in (0.1, 0.3, 0.5, 2 / 3):
        bound = theory.scaled_gd_bound([0, 1], 1.0, lr)
        assert bound[1] / bound[0] >= theory.scaled_gd_factor(lr) - 1e-12


def test_alternating_factor_by_subspace_iteration():
    s = [3.0, 2.0, 1.5, 1.0]
    V = frame(6, 4, 7)
    T = frame(7, 4, 8) * s @ V.T
    space, tangents = np.random.default_rng(0).standard_normal((6, 2)), []
    for _ in range(30):
        space = np.linalg.qr(T.T @ (T @ space))[0]
        inside = V[:, :2].T @ space
        outside = space - V[:, :2] @ inside
        tangents.append(np.linalg.norm(outside @ np.linalg.inv(inside), 2))
    assert tangents[-1] / tangents[-2] == pytest.approx(theory.alternating_factor(s, 2), rel=1e-3)
    assert theory.alternating_factor([2.0, 1.0], 2) == 0


# -- starts that are subtracted from the weight ------------------------------------------------------------------------


def test_floor_of_a_subtracted_start_by_alternating_minimisation():
    rng = np.random.default_rng(0)
    T, B0, A0 = rng.standard_normal((6, 5)), rng.standard_normal((6, 2)), rng.standard_normal((2, 5))
    A = A0
    for _ in range(300):
        B = (T + B0 @ A0) @ np.linalg.pinv(A)
        A = np.linalg.pinv(B) @ (T + B0 @ A0)
    assert np.linalg.norm(B @ A - B0 @ A0 - T) == pytest.approx(theory.offset_floor(T, B0 @ A0, 2), rel=1e-8)


def test_beside_a_large_start_only_what_shares_a_space_with_it_is_reached():
    rng = np.random.default_rng(1)
    T, U, V = rng.standard_normal((6, 5)), frame(6, 2, 2), frame(5, 2, 3)
    want = np.linalg.norm((np.eye(6) - U @ U.T) @ T @ (np.eye(5) - V @ V.T))
    gaps = [theory.offset_floor(T, size * U @ V.T, 2) - want for size in (1e2, 1e4)]
    assert abs(gaps[0]) < 0.1
    assert abs(gaps[1]) < 0.02 * abs(gaps[0])


# -- several layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (3, 2), (4, 2)])
def test_two_layers_reach_the_floor_of_the_sum_of_the_ranks(ranks):
    """ΔW₁ = W₂⁻¹E₁, then ΔW₂ = E₂(W₁ + ΔW₁)⁻¹ for the two parts of the best approximation of the difference."""
    rng = np.random.default_rng(sum(ranks))
    n = 6
    W2, W1, target = (rng.standard_normal((n, n)) for _ in range(3))
    u, s, vt = np.linalg.svd(target - W2 @ W1)
    first, total = ranks[1], sum(ranks)
    d1 = np.linalg.solve(W2, u[:, :first] * s[:first] @ vt[:first])
    E2 = u[:, first:total] * s[first:total] @ vt[first:total]
    d2 = np.linalg.solve((W1 + d1).T, E2.T).T
    assert np.linalg.matrix_rank(d1, tol=1e-9) == ranks[1]
    assert np.linalg.matrix_rank(d2, tol=1e-9) == ranks[0]
    floor = theory.linear_network_floor(target, [W2, W1], ranks)
    reached = np.linalg.norm((W2 + d2) @ (W1 + d1) - target, 2)
    assert reached == pytest.approx(floor, rel=1e-9, abs=1e-11)
    for _ in range(20):  # and no random update of these ranks gets below it
        moves = [rng.standard_normal((n, r)) @ rng.standard_normal((r, n)) for r in ranks]
        assert np.linalg.norm((W2 + moves[0]) @ (W1 + moves[1]) - target, 2) >= floor - 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.scaled_gd_bound(1, 1.0, 0.7), "needs 0 < lr <= 2/3"),
        (lambda: theory.balanced_mode(1.0, 0.0, 1.0), "must be > 0"),
        (lambda: theory.local_spectrum([1.0, 0.0], 3, 3), "1 to 3 numbers > 0"),
        (lambda: theory.alternating_factor([1.0], 2), "rank must be between 1"),
        (lambda: theory.linear_network_floor(np.eye(2), [np.eye(2)], [1, 1]), "one rank for each of the 1 layers"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
