"""The verb attention: the user's own heads, from a file or from a model that reads a text."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pandas as pd
import pytest

import nla_llm as nl
from nla_llm.cli._heads import TensorHeads, numbers, stack
from nla_llm.problems.embedded import embedded_directory, embedded_model, heldout_tokens
from nla_llm.study import Store

QUICK = ["--m", 4, "--draws", 2, "--jobs", 0, "--method", "elu_features"]
MINE = """
import nla_llm as nl

class Mine:
    properties = nl.Properties(family="mine", supports=frozenset({"causal"}))

    def __call__(self, problem, rng=None):
        nl.methods.require(self, problem)
        return nl.operators.SoftmaxAttention(problem.q, problem.k, scale=problem.scale, causal=problem.causal, window=4)
"""


def records(path="results/nla_llm.sqlite"):
    with Store(path, create=False) as store:
        return pd.DataFrame([{**r.cell, **record} for r in store.results() for record in r.records])


def of(name, frame):
    return frame[frame["method"] == name].sort_values("head")


def dense_errors(problem, method):
    """Relative Frobenius and spectral errors of every head, from dense matrices alone."""
    logits = problem.scale * problem.q.astype(float) @ np.swapaxes(problem.k.astype(float), -1, -2)
    if problem.causal:
        logits = np.where(np.tri(problem.n_q, dtype=bool), logits, -np.inf)
    if problem.key_mask is not None:
        logits = np.where(problem.key_mask, logits, -np.inf)
    exact = np.exp(logits)
    exact /= exact.sum(axis=-1, keepdims=True)
    error = method(problem).dense() - exact
    return [np.linalg.norm(error, o, (-2, -1)) / np.linalg.norm(exact, o, (-2, -1)) for o in ("fro", 2)]


@pytest.mark.usefixtures("no_reports")
@pytest.mark.parametrize("causal", [False, True])
def test_errors_agree_with_dense_ones(nla, save, qkv, causal):
    outcome = nla("attention", save("heads.safetensors", **qkv), *QUICK, "--key-mask", "mask", *["--causal"][:causal])
    assert outcome.code == 0, outcome.err
    problem = nl.AttentionProblem(qkv["q"], qkv["k"], qkv["v"], causal=causal, key_mask=qkv["mask"])
    frobenius, spectral = dense_errors(problem, nl.method("elu_features"))
    found = of("elu_features", records())
    np.testing.assert_allclose(found["relative_frobenius"], frobenius, rtol=1e-5)
    np.testing.assert_allclose(found["relative_spectral"], spectral, rtol=2e-2)


def test_report_table_and_verdict(nla, save, qkv):
    """PDF, CSV, terminal; the yardsticks are there unasked."""
    outcome = nla("attention", save("my heads.safetensors", **qkv), *QUICK, "--m", 8)
    assert Path("reports/attention-my-heads.pdf").read_bytes().startswith(b"%PDF")
    assert {p.stem for p in Path("reports/attention-my-heads").iterdir()} == {"budget", "cost", "heads", "table-heads"}
    assert all(word in outcome.out for word in ("uniform", "random keys", "optimal rank", "elu", "wrote reports/"))
    assert "than uniform attention on most heads" in " ".join(outcome.out.split())
    assert "expected" not in outcome.out  # nothing is expected of unknown data


@pytest.mark.usefixtures("no_reports")
def test_a_second_run_computes_nothing_and_other_data_everything(nla, save, qkv):
    source = save("heads.safetensors", **qkv)
    cells = nla("attention", source, *QUICK).out
    assert "4 cells, 4 ok; 4 computed now" in cells
    assert "4 ok; 0 computed now" in nla("attention", source, *QUICK).out
    save("heads.safetensors", **(qkv | {"q": 2 * qkv["q"]}))
    assert "4 ok; 4 computed now" in nla("attention", source, *QUICK).out


def test_stored_precisions_other_names_and_no_values(nla, save, qkv):
    arrays = {"query": qkv["q"].astype(ml_dtypes.bfloat16), "key": qkv["k"].astype(np.float16)}
    outcome = nla("attention", save("a.safetensors", **arrays), *QUICK, "--q", "query", "--k", "key", "--name", "mine")
    assert outcome.code == 0, outcome.err
    assert Path("reports/mine.pdf").exists()
    problem = nl.AttentionProblem(*(a.astype(np.float32) for a in arrays.values()))
    expected = dense_errors(problem, nl.method("elu_features"))[0]
    np.testing.assert_allclose(of("elu_features", records())["relative_frobenius"], expected, rtol=1e-5)
    assert "output_error" not in records().columns


@pytest.mark.usefixtures("no_reports")
def test_the_first_tokens_and_a_scale(nla, save, qkv):
    nla("attention", save("heads.safetensors", **qkv), *QUICK, "--n", 12, "--scale", 0.1)
    q, k = qkv["q"][:, :12], qkv["k"][:, :12]
    expected = dense_errors(nl.AttentionProblem(q, k, scale=0.1), nl.method("elu_features"))[0]
    np.testing.assert_allclose(of("elu_features", records())["relative_frobenius"], expected, rtol=1e-5)


@pytest.mark.usefixtures("no_reports")
def test_a_method_of_ones_own_runs_in_workers(nla, save, qkv, tmp_path):
    """It supports no mask of keys: then its cell is skipped with the reason."""
    (tmp_path / "mine_window.py").write_text(MINE)
    source = save("heads.safetensors", **qkv)
    outcome = nla("attention", source, "--m", 4, "--draws", 2, "--jobs", 1, "--method", "mine_window:Mine")
    assert outcome.code == 0, outcome.out
    assert "Mine" in outcome.out
    problem = nl.AttentionProblem(qkv["q"], qkv["k"], qkv["v"])
    expected = [
        float(nl.measures.relative_error(problem.head(i).exact(), nl.operators.SoftmaxAttention(
            problem.q[i], problem.k[i], scale=problem.scale, window=4), norm="frobenius")) for i in range(2)
    ]  # fmt: skip
    np.testing.assert_allclose(of("mine_window:Mine", records())["relative_frobenius"], expected, rtol=1e-5)
    masked = nla("attention", source, *QUICK[:-2], "--method", "mine_window:Mine", "--key-mask", "mask")
    assert "skipped, Mine has no form with key_mask" in masked.out


@pytest.mark.usefixtures("no_reports")
def test_a_yardstick_whose_budget_exceeds_the_tokens_is_skipped(nla, save, qkv):
    outcome = nla("attention", save("heads.safetensors", **qkv), *QUICK, "--m", 100)
    assert outcome.code == 0
    assert "skipped, m = 100 exceeds the 24 tokens: 2 (random keys, optimal rank)" in outcome.out


def test_heads_of_a_checkpoint_that_reads_tokens(nla, tmp_path):
    np.save(tmp_path / "ids.npy", heldout_tokens(40))
    outcome = nla("attention", embedded_directory(), "--tokens", "ids.npy", "--layers", "0,2", "--n", 24, *QUICK)
    assert outcome.code == 0, outcome.err
    assert Path("reports/attention-tiny_lm.pdf").exists()
    found = records()
    assert sorted(found["layer"].unique()) == [0, 2]
    problem = embedded_model().capture(heldout_tokens(24), [2])[0]
    expected = dense_errors(problem, nl.method("elu_features"))[0].ravel()
    layer = of("elu_features", found[found["layer"] == 2])
    np.testing.assert_allclose(layer["relative_frobenius"], expected, rtol=1e-4)


@pytest.mark.usefixtures("no_reports")
def test_heads_of_a_checkpoint_that_reads_a_text(nla, tmp_path):
    pytest.importorskip("tokenizers", reason="a text needs the extra hf")
    (tmp_path / "text.txt").write_text("def mean(values):\n    return sum(values) / len(values)\n" * 3)
    outcome = nla("attention", embedded_directory(), "--text", "text.txt", "--layers", "1", *QUICK)
    assert outcome.code == 0, outcome.err


def test_stack_takes_heads_in_order():
    q, k = (
        np.random.default_rng(0).standard_normal((2, 3, 5, 4)),
        np.random.default_rng(1).standard_normal((2, 1, 5, 4)),
    )
    problem = nl.AttentionProblem(q, k, causal=True)
    part = stack(problem, 2, 5)
    np.testing.assert_array_equal(part.exact().dense(), problem.exact().dense().reshape(6, 5, 5)[2:5])


def test_digest_knows_content_and_options_but_not_the_place(save, qkv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = save("a.safetensors", **qkv), save("folder/b.safetensors", **qkv)
    c = save("c.safetensors", **(qkv | {"v": qkv["k"]}))
    assert TensorHeads(a).digest() == TensorHeads(b).digest() != TensorHeads(c).digest()
    assert TensorHeads(a).digest() != TensorHeads(a, causal=True).digest()


def test_numbers():
    assert numbers("4,0-2") == (4, 0, 1, 2)
    assert numbers(None) is None
    for bad in ("a", "3-1", "1,,2", "-1"):
        with pytest.raises(ValueError, match="layers are given"):
            numbers(bad)


def _nan(x):
    return np.where(np.arange(x.size).reshape(x.shape) == 7, np.nan, x)


BROKEN = {
    "nan": (lambda a: a | {"q": _nan(a["q"])}, [], ["'q'", "NaN"]),
    "no k": (lambda a: {"q": a["q"], "keys": a["k"]}, [], ["no tensor 'k'"]),
    "no such v": (lambda a: a, ["--v", "values"], ["no tensor 'values'"]),
    "shapes": (lambda a: a | {"k": a["k"][..., :3]}, [], ["same last axis", "(2, 24, 3)"]),
    "one axis": (lambda a: a | {"q": a["q"][0, 0]}, [], ["q must have at least two axes"]),
    "integers": (lambda a: a | {"q": a["q"].astype(np.int32)}, [], ["'q'", "int32"]),
    "mask": (lambda a: a | {"mask": a["q"]}, ["--key-mask", "mask"], ["'mask'", "zeros and ones"]),
    "mask hides all": (lambda a: a | {"mask": np.zeros(24, bool)}, ["--key-mask", "mask"], ["sees no key"]),
    "no mask": (lambda a: a, ["--key-mask", "pad"], ["no tensor 'pad'"]),
    "n": (lambda a: a, ["--n", 25], ["--n 25", "24"]),
    "n is zero": (lambda a: a, ["--n", 0], ["--n", "greater than or equal to 1"]),
    "m": (lambda a: a, ["--m", 0], ["--m must be at least 1"]),
    "scale": (lambda a: a, ["--scale", "nan"], ["scale must be one finite number"]),
    "unknown method": (lambda a: a, ["--method", "elu_feature"], ["'elu_feature'", "did you mean 'elu_features'"]),
    "wrong option": (lambda a: a, ["--method", "random_features:m=3"], ["did you mean"]),
    "update method": (lambda a: a, ["--method", "truncated_svd"], ["no method for attention"]),
    "twice": (lambda a: a, ["--method", "relu_features", "--method", "relu_features"], ["twice"]),
    "text for a file": (lambda a: a, ["--layers", "1"], ["--layers is for a checkpoint directory"]),
    "name": (lambda a: a, ["--name", "a/b"], ["file name", "a/b"]),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_told_in_a_sentence(nla, save, qkv, broken):
    change, options, words = broken
    told = nla("attention", save("heads.safetensors", **change(qkv)), *QUICK, *options).sentence
    assert all(word in told for word in words), told
    assert not Path("reports").exists()


def test_wrong_files(nla, tmp_path, save, qkv):
    assert "nothing.safetensors does not exist" in nla("attention", "nothing.safetensors").sentence
    (tmp_path / "weights.pt").write_bytes(b"\x80")
    assert "pickled" in nla("attention", "weights.pt").sentence
    (tmp_path / "text.safetensors").write_text("no tensors in here")
    assert "no safetensors file" in nla("attention", "text.safetensors").sentence
    (tmp_path / "reports").write_text("a file")
    told = nla("attention", save("heads.safetensors", **qkv), *QUICK).sentence
    assert "the report cannot be written to reports" in told


def test_wrong_uses_of_a_checkpoint(nla, tmp_path):
    model = embedded_directory()
    assert "--text FILE or --tokens" in nla("attention", model).sentence
    assert "--causal is for a file of tensors" in nla("attention", model, "--causal", "--tokens", "x.npy").sentence
    assert "cannot open 'x.npy'" in nla("attention", model, "--tokens", "x.npy").sentence
    np.save(tmp_path / "ids.npy", heldout_tokens(20))
    assert "--n 21" in nla("attention", model, "--tokens", "ids.npy", "--n", 21).sentence
    assert "layer" in nla("attention", model, "--tokens", "ids.npy", "--layers", "6").sentence
    np.save(tmp_path / "square.npy", np.zeros((2, 2), int))
    assert "shape (n,), got (2, 2)" in nla("attention", model, "--tokens", "square.npy").sentence
    (tmp_path / "empty").mkdir()
    assert "no config.json" in nla("attention", "empty", "--tokens", "ids.npy").sentence
