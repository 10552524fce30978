"""Records of an update: against explicit decompositions, and the same for large matrices as for small ones."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from nla_llm.measures import leading
from nla_llm.problems.pair import Pair
from nla_llm.study import updates
from nla_llm.study.updates import Wanted, matrix_records, rounded, vector_records


@pytest.fixture
def tensor(tmp_path):
    def make(base, tuned, dtype=np.float32):
        for name, values in (("base", base), ("tuned", tuned)):
            save_file({"w": np.ascontiguousarray(values).astype(dtype)}, tmp_path / f"{name}.safetensors")
        return Pair(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors").open("w")

    return make


def arrays(shape=(60, 90), rank=4, size=0.05, seed=0):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    update = (
        rng.standard_normal((shape[0], rank)) @ (rng.standard_normal((rank, shape[1])).T * np.arange(rank, 0, -1)).T
    )
    update += 0.05 * rng.standard_normal(shape)
    return base, base + size * update


def of(records, what):
    return [record for record in records if record["what"] == what]


@pytest.fixture
def as_if_large(monkeypatch):
    """The limits are lowered, not the matrices enlarged."""
    for module in (leading, updates):
        monkeypatch.setattr(module, "FULL_ORDER", 20)
        monkeypatch.setattr(module, "DENSE_ENTRIES", 20)


def check(records, factors, delta, base, ranks):
    s = np.linalg.svd(delta, compute_uv=False)
    (whole,) = of(records, "tensor")
    assert whole["stable_rank"].contains(np.sum(s**2) / s[0] ** 2)
    assert whole["relative_update"].contains(np.linalg.norm(delta) / np.linalg.norm(base))
    for record, rank in zip(of(records, "truncation"), ranks, strict=True):
        u, values, vt = np.linalg.svd(delta)
        error = (
            delta - (u[:, :rank] * values[:rank]) @ vt[:rank]
            if rank < ranks[-1]
            else delta - factors.left @ factors.right.T
        )
        for norm, order in (("frobenius", None), ("spectral", 2)):
            assert record[norm].contains(np.linalg.norm(error, order)), (rank, norm)
            assert record[f"relative_{norm}"].contains(np.linalg.norm(error, order) / np.linalg.norm(delta, order))
            weight = record[f"weight_{norm}"]
            true = np.linalg.norm(error, order) / np.linalg.norm(base, order)
            assert weight.lower * (1 - 1e-9) <= true <= weight.upper * (1 + 1e-9)
    energy = np.cumsum(s**2) / np.sum(s**2)
    for rule in of(records, "rule"):
        if rule["rule"].startswith("energy"):
            true = int(np.argmax(energy >= float(rule["rule"].split()[1]) / 100)) + 1
            assert rule["low"] <= true <= rule["high"]


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_records_against_an_explicit_decomposition(tensor, shape):
    base, tuned = arrays(shape)
    records, factors = matrix_records(tensor(base, tuned, np.float64), Wanted((1, 3)), 0)
    check(records, factors, tuned - base, base, (1, 3))
    assert all(rule["low"] == rule["high"] for rule in of(records, "rule"))


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
@pytest.mark.usefixtures("as_if_large")
def test_records_of_a_large_matrix_hold_the_truth(tensor, shape):
    base, tuned = (x.astype(np.float32) for x in arrays(shape))
    records, factors = matrix_records(tensor(base, tuned), Wanted((2, 6)), 0)
    check(records, factors, tuned.astype(float) - base, base.astype(float), (2, 6))


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tolerance_is_met_by_the_stored_factors(tensor, request, norm, large, dtype):
    """By the least rank that does, or one or two more where rounding costs them."""
    if large:
        request.getfixturevalue("as_if_large")
    base, tuned = arrays()
    records, factors = matrix_records(tensor(base, tuned), Wanted((), 0.3, norm, dtype), 0)
    delta = tuned.astype(np.float32).astype(float) - base.astype(np.float32)
    order = 2 if norm == "spectral" else None
    error = np.linalg.norm(delta - factors.left.astype(float) @ factors.right.astype(float).T, order)
    assert error <= 0.3 * np.linalg.norm(delta, order)
    (whole,) = of(records, "tensor")
    assert whole["met"] is True
    s = np.linalg.svd(delta, compute_uv=False)
    tails = [
        np.linalg.norm(s[r:], np.inf if order == 2 else 2) / np.linalg.norm(s, np.inf if order == 2 else 2)
        for r in range(9)
    ]
    least = int(np.argmax(np.array(tails) <= 0.3))
    assert least <= whole["rank"] <= least + 2


def test_inputs_give_the_best_error_of_the_outputs(tensor):
    """The optimum is the tail of the singular values of ΔW Xᵀ; fewer samples than columns do not matter."""
    base, tuned = arrays((30, 40), rank=12)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((25, 40)) * np.logspace(0, -3, 40)
    records, factors = matrix_records(tensor(base, tuned, np.float64), Wanted((3,), inputs=x), 0)
    delta = tuned - base
    s = np.linalg.svd(delta @ x.T, compute_uv=False)
    error = np.linalg.norm((delta - factors.left @ factors.right.T) @ x.T)
    assert error == pytest.approx(np.linalg.norm(s[3:]), rel=1e-3)
    (whole,) = of(records, "tensor")
    assert whole["output_error"] == pytest.approx(error / np.linalg.norm(s), rel=1e-6)
    assert whole["output_error"] < whole["output_error_plain"]


def test_rank_zero_is_the_whole_update(tensor):
    base, tuned = arrays()
    (record,) = of(matrix_records(tensor(base, tuned), Wanted((0,)), 0)[0], "truncation")
    assert float(record["relative_frobenius"]) == pytest.approx(1)


def test_a_rank_beyond_the_order_loses_nothing(tensor):
    base, tuned = arrays((6, 9))
    records, factors = matrix_records(tensor(base, tuned), Wanted((64,)), 0)
    assert float(of(records, "truncation")[0]["relative_spectral"]) == 0
    assert factors.left.shape == (6, 6)


@pytest.mark.parametrize("large", [False, True])
def test_intruders_and_amplification(tensor, request, large):
    """A large new direction is an intruder, a scaled one of the base is not; amplification by hand."""
    if large:
        request.getfixturevalue("as_if_large")
    u, v = (np.linalg.qr(np.random.default_rng(s).standard_normal((30, 30)))[0] for s in (0, 1))
    base = (u * np.linspace(2, 1, 30)) @ v.T
    mixed = u @ np.ones(30) / np.sqrt(30)
    new, old = (base + 20 * np.outer(x, v @ np.ones(30) / np.sqrt(30)) for x in (mixed, u[:, 0]))
    counts = [of(matrix_records(tensor(base, t), Wanted((1,)), 0)[0], "tensor")[0] for t in (new, old)]
    assert [c["intruders_low"] for c in counts] == [c["intruders_high"] for c in counts] == [1, 0]
    within = abs(mixed @ base @ v @ np.ones(30) / np.sqrt(30))
    assert counts[0]["amplification"] == pytest.approx(20 / within, rel=1e-5)


def test_a_pair_in_sixteen_bits_is_seen_through(tensor):
    rng = np.random.default_rng(1)
    base = (rng.standard_normal((128, 96)) / 8).astype(ml_dtypes.bfloat16).astype(np.float64)
    update = rng.standard_normal((128, 4)) @ rng.standard_normal((4, 96))
    update *= 0.01 * np.linalg.norm(base) / np.linalg.norm(update)
    records, _ = matrix_records(tensor(base, base + update, ml_dtypes.bfloat16), Wanted((4,)), 0)
    ranks = {rule["rule"]: rule["low"] for rule in of(records, "rule")}
    assert ranks["GD storage"] == ranks["above noise"] == 4
    assert ranks["energy 99 %"] > 10
    (whole,) = of(records, "tensor")
    assert (whole["history"], whole["worth"]) == ("stored", 4)
    assert len(json.loads(whole["leading"])) == 4


def test_vectors_and_equal_matrices(tensor):
    (record,) = vector_records(tensor(np.array([3.0, 4.0]), np.array([3.0, 4.5])))
    assert record["relative_update"] == pytest.approx(0.1)
    assert record["unchanged"] == 0.5
    assert vector_records(tensor(np.zeros(2), np.ones(2)))[0]["relative_update"] is None
    with pytest.raises(ZeroDivisionError, match="no update"):
        matrix_records(tensor(np.ones((2, 2)), np.ones((2, 2))), Wanted((1,)), 0)


def test_a_base_of_zeros(tensor):
    """An update that starts from nothing has no size relative to it."""
    records, _ = matrix_records(tensor(np.zeros((9, 7)), arrays((9, 7))[0]), Wanted((2,)), 0)
    assert of(records, "tensor")[0]["relative_update"] is None
    assert of(records, "truncation")[0]["weight_frobenius"] is None


def test_factors_that_overflow_are_refused():
    with pytest.raises(ValueError, match="overflows float16; pass --dtype bfloat16"):
        rounded(np.array([1e6]), "float16")
    assert rounded(np.array([1e6]), "bfloat16").tolist() == [float(np.float32(1e6).astype(ml_dtypes.bfloat16))]
