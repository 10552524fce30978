"""The verb update: the difference of two checkpoints, matrix by matrix."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pandas as pd
import pytest

from nla_llm.cli.update_study import kind_of, short_names
from nla_llm.problems import open_safetensors
from nla_llm.study import Store

QUICK = ["--jobs", 0, "--rank", 1, "--rank", 4]
ADAPTERS = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def pair():
    """A base, and what rank 3 made of it: two layers of two matrices, and a vector."""
    rng = np.random.default_rng(0)
    base, tuned = {}, {}
    for layer in range(2):
        for kind, shape in (("q_proj", (24, 16)), ("up_proj", (16, 40))):
            name = f"model.layers.{layer}.{kind}.weight"
            base[name] = (
                rng.standard_normal(shape).astype(ml_dtypes.bfloat16).astype(float)
            )  # what training starts from
            update = rng.standard_normal((shape[0], 3)) @ rng.standard_normal((3, shape[1]))
            tuned[name] = base[name] + 0.02 * update * np.linalg.norm(base[name]) / np.linalg.norm(update)
    base["model.norm.weight"] = tuned["model.norm.weight"] = np.ones(16)
    return base, tuned


def records(path="results/nla_llm.sqlite"):
    with Store(path, create=False) as store:
        return pd.DataFrame([{**r.cell, **record} for r in store.results() for record in r.records])


def stored(arrays, dtype):
    return {name: array.astype(dtype) for name, array in arrays.items()}


@pytest.mark.usefixtures("no_reports")
def test_truncation_agrees_with_an_explicit_one(nla, save, pair):
    """In both norms, against matrices that are really truncated."""
    base, tuned = (stored(arrays, np.float32) for arrays in pair)
    outcome = nla(
        "update", save("b.safetensors", **base), save("t.safetensors", **tuned), "--jobs", 0, "--rank", 1, "--rank", 2
    )
    assert outcome.code == 0, outcome.err
    cut = records().query("what == 'truncation'").set_index(["tensor", "rank"])
    assert len(cut) == 8
    for (name, rank), row in cut.iterrows():
        delta = tuned[name].astype(float) - base[name].astype(float)
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        error = delta - (u[:, : int(rank)] * s[: int(rank)]) @ vt[: int(rank)]
        for norm, order in (("frobenius", "fro"), ("spectral", 2)):
            expected = np.linalg.norm(error, order) / np.linalg.norm(delta, order)
            assert row[f"relative_{norm}_lower"] <= expected * (1 + 1e-12)
            assert row[f"relative_{norm}"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.usefixtures("no_reports")
def test_facts_of_a_tensor(nla, save, pair):
    base, tuned = (stored(arrays, np.float32) for arrays in pair)
    nla("update", save("b.safetensors", **base), save("t.safetensors", **tuned), *QUICK)
    for row in records().query("what == 'tensor'").to_dict("records"):
        delta = tuned[row["tensor"]].astype(float) - base[row["tensor"]].astype(float)
        s = np.linalg.svd(delta, compute_uv=False)
        assert row["relative_update"] == pytest.approx(0.02, rel=1e-4)
        assert row["stable_rank"] == pytest.approx(np.sum(s**2) / s[0] ** 2, rel=1e-9)
        assert row["rank_90"] == np.argmax(np.cumsum(s**2) >= 0.9 * np.sum(s**2)) + 1
        assert row["above_noise"] == 3
        assert row["zero_share"] == np.mean(delta == 0) < 0.01


def test_report_and_what_is_left_out(nla, save, pair):
    """Nothing is left out silently."""
    base, tuned = (stored(arrays, np.float32) for arrays in pair)
    same = np.ones((3, 3), np.float32)
    base |= {"only.weight": same, "wide.weight": same, "same.weight": same, "whole.weight": same.astype(np.int32)}
    tuned |= {"wide.weight": np.ones((3, 4), np.float32), "same.weight": same, "whole.weight": same.astype(np.int32)}
    outcome = nla("update", save("b.safetensors", **base), save("tuned v2.safetensors", **tuned), *QUICK)
    assert outcome.code == 0, outcome.err
    assert Path("reports/update-tuned-v2.pdf").read_bytes().startswith(b"%PDF")
    names = {p.stem for p in Path("reports/update-tuned-v2").iterdir()}
    assert names == {"spectrum", "truncation", "table-tensors", "table-truncation"}
    for line in (
        "skipped, not a matrix: 1 (model.norm.weight)",
        "skipped, only in BASE: 1 (only.weight)",
        "skipped, of another shape in BASE than in TUNED: 1 (wide.weight)",
        "skipped, not stored as float16, bfloat16, float32, float64: 1 (whole.weight)",
        "skipped, equal in BASE and TUNED: there is no update: 1 (same.weight)",
    ):
        assert line in outcome.out
    assert "9 cells, 4 ok, 5 skipped" in outcome.out  # the four above, and what is the same in both


@pytest.mark.usefixtures("no_reports")
def test_sixteen_bits_hide_an_update_and_the_report_says_so(nla, save, pair):
    """Saved in float32, the same update is not warned of."""
    base = stored(pair[0], ml_dtypes.bfloat16)
    small = {name: base[name].astype(float) + (array - pair[0][name]) / 20 for name, array in pair[1].items()}
    narrow, wide = stored(small, ml_dtypes.bfloat16), stored(small, np.float32)
    warned = " ".join(nla("update", save("b.safetensors", **base), save("t.safetensors", **narrow), *QUICK).out.split())
    assert "Storage in 16 bits hides part of the update: in 4 of 4 matrices" in warned
    shares = records().query("what == 'tensor'")["zero_share"]
    assert shares.min() > 0.5
    quiet = nla("update", save("b32.safetensors", **stored(base, np.float32)), save("t32.safetensors", **wide), *QUICK)
    assert "Storage in 16 bits" not in quiet.out


@pytest.mark.usefixtures("no_reports")
def test_a_second_run_computes_nothing(nla, save, pair):
    base, tuned = (stored(arrays, np.float32) for arrays in pair)
    arguments = save("b.safetensors", **base), save("t.safetensors", **tuned), *QUICK, "--tensors", "*q_proj*"
    assert "2 ok" in nla("update", *arguments).out
    assert "2 ok, 3 skipped; 3 computed now" in nla("update", *arguments).out  # what is skipped is looked at again


@pytest.mark.usefixtures("no_reports")
def test_sharded_directories_and_workers(nla, save, pair, tmp_path):
    base, tuned = (stored(arrays, np.float32) for arrays in pair)
    save("base/model.safetensors", **base)
    names = sorted(tuned)
    weight_map = {}
    for number, part in enumerate((names[:2], names[2:])):
        shard = f"model-{number}.safetensors"
        save(f"tuned/{shard}", **{name: tuned[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    (tmp_path / "tuned" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    outcome = nla("update", "base", "tuned", "--rank", 2, "--jobs", 1)
    assert outcome.code == 0, outcome.err
    assert records().query("what == 'truncation'")["relative_frobenius"].between(0.05, 0.9).all()


@pytest.mark.usefixtures("no_reports")
def test_a_real_adapter_has_the_rank_it_was_trained_with(nla, save):
    """ΔW = up @ down of a published LoRA of rank one, added to a base."""
    if not ADAPTERS.is_dir():
        pytest.skip("the folder shared/data with real adapters is not here")
    files = open_safetensors(ADAPTERS / "lora_disney.safetensors")
    down = next(name for name in files.names() if "down" in name)
    up = down.replace("down", "up")
    if up not in files:
        pytest.skip(f"no pair of {down} in the adapter")
    delta = files.tensor(up).astype(float) @ files.tensor(down).astype(float)
    base = np.zeros_like(delta)
    nla("update", save("b.safetensors", w=base), save("t.safetensors", w=delta), "--rank", 1, "--jobs", 0)
    (row,) = records().query("what == 'truncation'").to_dict("records")
    assert row["relative_spectral"] < 1e-6
    (whole,) = records().query("what == 'tensor'").to_dict("records")
    assert whole["stable_rank"] == pytest.approx(1)


def test_mistakes_are_told_in_a_sentence(nla, save, pair, tmp_path):
    base, tuned = (stored(arrays, np.float32) for arrays in pair)
    b, t = save("b.safetensors", **base), save("t.safetensors", **tuned)
    assert "missing does not exist" in nla("update", b, "missing").sentence
    assert "--rank must be at least 1" in nla("update", b, t, "--rank", 0).sentence
    told = nla("update", b, t, "--tensors", "*attn*").sentence
    assert "no tensor of b.safetensors and t.safetensors can be compared: 5 not asked for by --tensors" in told
    name = "model.layers.0.q_proj.weight"
    broken = save("nan.safetensors", **(tuned | {name: np.full((24, 16), np.nan, np.float32)}))
    told = nla("update", b, broken).sentence
    assert name in told
    assert "NaN" in told
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    assert "pickled" in nla("update", b, "pickled").sentence


def test_two_equal_checkpoints(nla, save, pair):
    """Every cell is skipped with the reason, the report says so, and nothing breaks."""
    b = save("b.safetensors", **stored(pair[0], np.float32))
    outcome = nla("update", b, b, *QUICK)
    assert outcome.code == 0
    assert "5 skipped" in outcome.out
    assert Path("reports/update-b.pdf").exists()


def test_names():
    assert kind_of("transformer.h.11.attn.c_proj.weight") == "c_proj"
    assert kind_of("w") == "w"
    one = pd.DataFrame({"tensor": ["a.b.weight"]})
    assert short_names(one)["tensor"].to_list() == ["a.b.weight"]
