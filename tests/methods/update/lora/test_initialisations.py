"""Each start against the law that its paper states."""

import numpy as np
import pytest

import nla_llm as nl
from nla_llm.backend import to_numpy
from nla_llm.methods.update.lora.initialisations import INITIALISATIONS, LORA_GA_GAMMA, start
from nla_llm.methods.update.lora.objectives import regression
from nla_llm.methods.update.lora.training import train

D_OUT, D_IN, RANK, SAMPLES = 9, 7, 2, 40
RNG = np.random.default_rng(3)
W, DELTA = RNG.standard_normal((D_OUT, D_IN)), RNG.standard_normal((D_OUT, D_IN))
X = RNG.standard_normal((SAMPLES, D_IN)) @ RNG.standard_normal((D_IN, D_IN))
PROBLEM = nl.UpdateProblem(DELTA, base=W, inputs=X)
SCALE = 0.5


def best(matrix, rank):
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def made(name, kind="data", problem=PROBLEM, rng=0):
    return start(name, problem, regression(problem, kind, scale=SCALE), RANK, np.random.default_rng(rng))


def close(a, b, atol=1e-12):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["gaussian", "kaiming", "eva"])
def test_a_zero_left_factor_leaves_the_model_unchanged(name):
    B, A = made(name)
    assert not B.any()
    assert np.linalg.matrix_rank(A) == RANK


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_the_model_starts_unchanged_but_for_one_step_of_lora_one(name):
    adapter = nl.method("lora", rank=RANK, initialisation=name, objective="data", steps=0)
    op = adapter(PROBLEM, rng=0 if INITIALISATIONS[name].random else None)
    assert (np.abs(op.dense()).max() > 0.1) == (name == "lora_one")
    assert op.rank == (2 * RANK if INITIALISATIONS[name].offset else RANK)


def test_variances_of_the_random_starts():
    wide = nl.UpdateProblem(np.ones((4, 2000)))
    gaussian = start("gaussian", wide, regression(wide, "frobenius"), 4, np.random.default_rng(0)).A
    kaiming = start("kaiming", wide, regression(wide, "frobenius"), 4, np.random.default_rng(0)).A
    # relative standard errors of a variance over 8000 entries: √(2/8000) for normal, √(0.8/8000) for uniform ones
    assert gaussian.var() * 2000 == pytest.approx(1, rel=4 * 0.016)
    assert kaiming.var() * 2000 == pytest.approx(1 / 3, rel=4 * 0.01)
    assert np.abs(kaiming).max() <= 2000**-0.5 < np.abs(gaussian).max()


def test_pissa_takes_the_leading_and_milora_the_trailing_part_of_the_weight():
    close(SCALE * np.matmul(*made("pissa")), best(W, RANK))
    close(SCALE * np.matmul(*made("milora")), W - best(W, D_IN - RANK))
    for B, A in (made("pissa"), made("milora")):
        close(B.T @ B, A @ A.T)  # balanced


def test_olora_is_the_head_of_a_qr_factorisation():
    B, A = made("olora")
    close(B.T @ B, np.eye(RANK))
    rest = W - B @ A
    close(B.T @ rest, np.zeros((RANK, D_IN)))  # what stays is orthogonal to it
    close(np.tril(A, -1), np.zeros_like(A))


def test_eva_rows_are_right_singular_vectors_of_the_inputs():
    A = made("eva").A
    close(A @ A.T, np.eye(RANK))
    gram = X.T @ X
    values = np.linalg.eigvalsh(gram)[::-1][:RANK]
    close(gram @ A.T, A.T * values, atol=1e-9 * values[0])


def test_corda_is_best_in_the_norm_of_the_covariance():
    """s·B₀A₀ C is the best approximation of rank r of W C; the trailing choice is what the others leave."""
    C = X.T @ X / SAMPLES
    size = np.linalg.norm(W @ C)
    close(SCALE * np.matmul(*made("corda")) @ C, best(W @ C, RANK), atol=1e-11 * size)
    close(SCALE * np.matmul(*made("corda_knowledge")) @ C, W @ C - best(W @ C, D_IN - RANK), atol=1e-11 * size)


def test_corda_refuses_a_singular_covariance():
    problem = nl.UpdateProblem(DELTA, base=W, inputs=X[:5])
    with pytest.raises(ValueError, match="5 samples of dimension 7 make singular"):
        made("corda", problem=problem)


def test_the_first_step_of_lora_ga_is_the_best_of_rank_2r():
    """sBA − sB₀A₀ after one step of small rate: −η s² c² times the gradient cut to rank 2r."""
    rate = 1e-7
    options = {"alpha": SCALE * RANK, "objective": "data", "initialisation": "lora_ga", "lr": rate, "steps": 1}
    op = nl.method("lora", rank=RANK, optimiser="gradient_descent", **options)(PROBLEM)
    gradient = -DELTA @ X.T @ X / SAMPLES
    size = D_OUT**0.5 / LORA_GA_GAMMA
    want = -rate * SCALE**2 * size * best(gradient, 2 * RANK)
    close(op.dense(), want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("kind", ["frobenius", "data"])
def test_lora_one_starts_with_the_best_step_of_rank_r(kind):
    gradient = -DELTA if kind == "frobenius" else -DELTA @ X.T @ X / SAMPLES
    close(SCALE * np.matmul(*made("lora_one", kind)), -best(gradient, RANK), atol=1e-12 * np.abs(gradient).max())


def test_lora_one_starts_at_the_optimum_of_the_frobenius_norm():
    """There the gradient is −ΔW: the start is the answer, which says nothing about other losses."""
    trained = train(nl.method("lora", rank=RANK, initialisation="lora_one", steps=0), nl.UpdateProblem(DELTA))
    tail = np.linalg.norm(np.linalg.svd(DELTA, compute_uv=False)[RANK:])
    assert trained.final() == pytest.approx(tail / np.linalg.norm(DELTA), rel=1e-12)


@pytest.mark.parametrize("name", INITIALISATIONS)
def test_on_every_library_in_the_precision_of_the_update(name, xp):
    problem = PROBLEM.map(lambda a: xp.asarray(a.astype(np.float32)))
    B, A = made(name, problem=problem)
    assert B.dtype == A.dtype == xp.float32
    wide = made(name)
    close(to_numpy(B) @ to_numpy(A), wide.B @ wide.A, atol=1e-3 * max(1, np.abs(wide.B @ wide.A).max()))


@pytest.mark.parametrize(
    ("name", "missing"), [("pissa", "base"), ("eva", "inputs"), ("corda", "base and inputs"), ("olora", "base")]
)
def test_what_a_start_needs_is_named(name, missing):
    with pytest.raises(ValueError, match=f"initialisation='{name}' is made from {missing}; pass UpdateProblem"):
        made(name, "frobenius", nl.UpdateProblem(DELTA))


def test_ranks_that_do_not_fit():
    with pytest.raises(ValueError, match=r"rank=8 exceeds the dimensions of the update, 9 x 7"):
        nl.method("lora", rank=8)(PROBLEM, rng=0)
    with pytest.raises(ValueError, match=r"2 times rank=4 exceeds"):
        nl.method("lora", rank=4, initialisation="lora_ga")(PROBLEM)
    with pytest.raises(ValueError, match="takes 2 directions from 1 samples"):
        made("eva", problem=nl.UpdateProblem(DELTA, inputs=X[:1]))
