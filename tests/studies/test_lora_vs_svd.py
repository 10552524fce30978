"""What the study of LoRA and the truncated SVD measures, on matrices small enough to be checked another way."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import nla_llm as nl
from nla_llm.measures.ranks import Spectrum
from nla_llm.operators import LowRank
from nla_llm.problems.embedded import embedded_model
from nla_llm.problems.embedded_updates import embedded_updates
from nla_llm.study import catalogue

NAME = "model.layers.2.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def findings():
    return SimpleNamespace(**catalogue.load("lora_vs_svd").claims.__globals__)


@pytest.fixture(scope="module")
def bench(findings):
    return findings.bench


@pytest.fixture
def p():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((40, 9)) * np.geomspace(10, 0.1, 9)
    return nl.UpdateProblem(rng.standard_normal((7, 9)), base=rng.standard_normal((7, 9)), inputs=inputs)


def test_the_triangular_factor_stands_for_the_inputs(bench):
    delta = bench.problem(NAME, 64).delta
    tokens = np.stack([embedded_updates().heldout.piece(piece, 64) for piece in bench.CALIBRATION])
    x = bench.tuned_model().linear_inputs(tokens)[NAME].astype(np.float64)
    factor = bench.calibration(64)[NAME]
    assert x.shape == (8 * 64, 192)
    assert factor.shape == (192, 192)
    assert np.linalg.norm(factor @ delta.T) == pytest.approx(np.linalg.norm(x @ delta.T), rel=1e-12)


def test_every_update_that_is_compared_has_its_rank_and_error(bench):
    delta, s = bench.problem(NAME, 64).delta, np.linalg.svd(bench.problem(NAME, 64).delta, compute_uv=False)
    found = {u: bench.replacement(u, 4, 0, NAME, 64).dense() for u in bench.UPDATES}
    assert np.array_equal(found["full"], delta)
    assert not found["none"].any()
    assert np.linalg.norm(delta - found["truncated_svd"]) == pytest.approx(np.linalg.norm(s[4:]), rel=1e-10)
    for update in ("truncated_svd", "data_aware_svd", "lora"):
        assert np.linalg.matrix_rank(found[update]) == 4, update
    x = bench.calibration(64)[NAME]
    lost = {u: np.linalg.norm(x @ (delta - found[u]).T) for u in ("truncated_svd", "data_aware_svd", "lora")}
    tail = np.linalg.svd(x @ delta.T, compute_uv=False)[4:]
    assert lost["data_aware_svd"] == pytest.approx(np.linalg.norm(tail), rel=1e-10)
    assert lost["data_aware_svd"] < min(lost["truncated_svd"], lost["lora"])


def test_errors_are_those_of_dense_matrices(bench, p):
    rng = np.random.default_rng(1)
    op, tests = LowRank(rng.standard_normal((7, 2)), rng.standard_normal((9, 2))), rng.standard_normal((9, 30))
    found, rest = bench.errors(p.exact(), Spectrum.dense(p.delta), op, tests), p.delta - op.dense()
    wanted = {
        "frobenius": np.linalg.norm(rest) / np.linalg.norm(p.delta),
        "spectral": np.linalg.norm(rest, 2) / np.linalg.norm(p.delta, 2),
        "output": np.linalg.norm(rest @ tests) / np.linalg.norm(p.delta @ tests),
        "size": np.linalg.norm(op.dense()) / np.linalg.norm(p.delta),
    }
    for name, value in wanted.items():
        assert float(found[name].value) == pytest.approx(value, rel=1e-12), name


def test_the_truncated_svd_has_the_spaces_and_the_conditioning_that_it_must(bench, p):
    u, s, vt = np.linalg.svd(p.delta, full_matrices=False)
    op = nl.method("truncated_svd", rank=3)(p)
    spaces, conditions = bench.subspaces(u, vt, op), bench.factors(op)
    assert float(spaces["similarity_left"].value) == pytest.approx(1)
    assert float(spaces["similarity_right"].value) == pytest.approx(1)
    assert spaces["smallest_angle_left"] < 1e-7
    assert spaces["random_right"] == pytest.approx(3 / 9)
    assert float(conditions["condition_product"].value) == pytest.approx(s[0] / s[2])
    assert float(conditions["condition_left"].value) == pytest.approx(s[0] / s[2])
    assert float(conditions["condition_right"].value) == pytest.approx(1)


def test_amplification_of_w_by_itself_is_one(bench, p):
    u, s, vt = np.linalg.svd(p.base)
    op = LowRank(u[:, :2] * s[:2], vt[:2].T)
    found = bench.amplification(p, op, Spectrum.dense(op.dense()).frobenius())
    assert float(found["amplification"].value) == pytest.approx(1)
    assert found["amplification_own"] == pytest.approx(1)
    assert float(found["projection_over_random"].value) == pytest.approx(found["amplification_random"])


def test_random_directions_are_amplified_as_often_as_the_closed_form_says(bench, p):
    rng, squares = np.random.default_rng(2), []
    for _ in range(4000):
        op = LowRank(rng.standard_normal((7, 2)), rng.standard_normal((9, 2)))
        ratio = bench.amplification(p, op, Spectrum.dense(op.dense()).frobenius())["projection_over_random"]
        squares.append(float(ratio.value) ** 2)
    assert np.mean(squares) == pytest.approx(1, abs=4 * np.std(squares) / 4000**0.5)


def test_operations_of_one_layer_by_hand(bench):
    shapes = {"q": (192, 192), "k": (64, 192), "v": (64, 192), "o": (192, 192), "g": (512, 192), "u": (512, 192)}
    shapes |= {"d": (192, 512)}
    later = sum(6 * m * n for m, n in shapes.values())
    first = later - sum(2 * m * n for name, (m, n) in shapes.items() if name in "qkv")
    assert bench.step_operations(0) == first + 5 * later
    assert bench.trained_parameters(0) == later
    assert 2 / 3 < bench.step_operations(1) / bench.step_operations(0) < 0.69
    ratio = 2 / 3 + 2 * 64 / 192  # 2/3 + 2 r/d for square matrices
    assert bench.step_operations(64) / bench.step_operations(0) == pytest.approx(ratio, rel=0.2)


def test_losses_are_recorded_piece_by_piece(bench):
    sizes = {"n": 32, "new_pieces": 2, "old_pieces": 1, "calibration": 32}
    rows = bench.loss_records({"update": "none", "rank": None, "seed": None} | sizes)
    assert [(row["domain"], row["piece"]) for row in rows] == [("new", 0), ("new", 1), ("old", 0)]
    assert rows[1]["loss"] == embedded_model().loss(embedded_updates().heldout.piece(1, 32))
    assert rows[0]["total_frobenius"] == 1
    full = bench.loss_records({"update": "full", "rank": None, "seed": None} | sizes)
    assert full[0]["total_frobenius"] == 0
    assert full[0]["loss"] == bench.tuned_model().loss(embedded_updates().heldout.piece(0, 32))


def loss_rows(losses):
    """Records of losses, of (update, rank, seed) on pieces of the new domain."""
    common = {"status": "ok", "what": "loss", "domain": "new", "total_frobenius": 1.0, "total_size": 1.0}
    return pd.DataFrame(
        [
            {"update": update, "rank": rank or None, "seed": seed, "piece": piece, "loss": loss} | common
            for (update, rank, seed), values in losses.items()
            for piece, loss in enumerate(values)
        ]
    )


@pytest.mark.parametrize(
    ("at_rank_2", "verdict"), [([2.0, 3.1], "confirmed"), ([5.0, 5.9], "refuted"), ([2.9, 4.1], "open")]
)
def test_a_comparison_holds_only_if_it_holds_at_every_rank(findings, at_rank_2, verdict):
    records = loss_rows(
        {
            ("lora", 1, 0): [1.0, 2.0],
            ("lora", 1, 1): [1.2, 2.1],
            ("truncated_svd", 1, None): [4.0, 5.0],
            ("lora", 2, 0): at_rank_2,
            ("truncated_svd", 2, None): [3.0, 4.0],
        }
    )
    words = {"sentence": "LoRA is better", "lower": "lora", "higher": "truncated_svd"}
    claim = findings.at_every_rank(records, domain="new", **words)
    assert claim.verdict == verdict
    assert "least clear at rank 2" in claim.number


def test_losses_are_paired_over_pieces_and_averaged_over_seeds(findings):
    records = loss_rows({("none", 0, None): [9.0, 1.0], ("lora", 1, 0): [8.0, 0.4], ("lora", 1, 1): [8.2, 0.2]})
    losses = findings.piecewise(records, "new")
    found = findings.difference(losses, ("lora", 1), ("none", 0))
    assert float(found.value) == pytest.approx(-0.8)
    assert float(found.upper - found.lower) == pytest.approx(2 * 12.706 * 0.1, rel=1e-3)  # Student, one degree


def test_a_matrix_counts_once_whatever_the_number_of_its_seeds(findings):
    rows = [
        {"update": "lora", "rank": 1, "name": f"m{i}", "seed": seed, "frobenius": value + seed}
        for i, value in enumerate([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
        for seed in (0, 1)
    ]
    both, one = (
        findings.medians_of(pd.DataFrame(chosen), {"frobenius": "frobenius"}, "norm").iloc[0]
        for chosen in (rows, rows[::2])
    )
    assert (both["value"], both["lower"], both["upper"], both["heads"]) == (4.5, 1.5, 7.5, 7)
    assert (one["value"], one["lower"], one["upper"], one["heads"]) == (4.0, 1.0, 7.0, 7)


def test_the_size_of_a_difference_counts_whatever_its_sign(findings):
    pair = {("truncated_svd", 1, None): [1.0, 2.0, 3.0], ("data_aware_svd", 1, None): [0.5, 1.5001, 2.5]}
    assert findings.awareness(loss_rows(pair)).verdict == "refuted"
    pair["data_aware_svd", 1, None] = [0.99, 1.9901, 2.99]
    assert findings.awareness(loss_rows(pair)).verdict == "confirmed"
