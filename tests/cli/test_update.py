"""The verb update: the difference of two checkpoints, matrix by matrix, and adapters."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

import nla_llm
from nla_llm.cli.update_figures import kind_of
from nla_llm.cli.update_tables import short_names
from nla_llm.problems.adapters import open_adapter
from nla_llm.study import Store

QUICK = ["--jobs", 0, "--rank", 1, "--rank", 4]
DATA = Path(__file__).parents[2].parent / "shared" / "data"


def stored(arrays, dtype):
    return {name: array.astype(dtype) for name, array in arrays.items()}


def records(path="results/nla_llm.sqlite"):
    with Store(path, create=False) as store:
        return pd.DataFrame([{**r.cell, **record} for r in store.results() for record in r.records])


def merged(directory, base):
    """Base plus adapter, by the configuration and the names of PEFT."""
    adapter = open_adapter(directory)
    result = dict(base)
    for name, module in adapter.modules.items():
        left, right = adapter.factors(name)
        weight = f"{name.removeprefix('base_model.model.')}.weight"
        result[weight] = base[weight] + module.scale * (left @ right.T).reshape(base[weight].shape)
    return result


# -- the audit ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_reports")
def test_truncation_agrees_with_an_explicit_one(nla, saved, pair):
    """In both norms, against matrices that are really truncated."""
    base, tuned = (stored(arrays, np.float32) for arrays in pair)
    outcome = nla("update", *saved, "--jobs", 0, "--rank", 1, "--rank", 2)
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


def test_report_and_what_is_left_out(nla, save, pair):
    """Nothing is left out silently."""
    base, tuned = (stored(arrays, np.float32) for arrays in pair)
    same = np.ones((3, 3), np.float32)
    base |= {"only.weight": same, "wide.weight": same, "same.weight": same, "whole.weight": same.astype(np.int32)}
    tuned |= {"wide.weight": np.ones((3, 4), np.float32), "same.weight": same, "whole.weight": same.astype(np.int32)}
    tuned["new.weight"] = same
    outcome = nla("update", save("b.safetensors", **base), save("tuned v2.safetensors", **tuned), *QUICK)
    assert outcome.code == 0, outcome.err
    assert Path("reports/update-tuned-v2.pdf").read_bytes().startswith(b"%PDF")
    names = {p.stem for p in Path("reports/update-tuned-v2").iterdir()}
    tables = {f"table-{name}" for name in ("total", "tensors", "ranks", "truncation", "directions", "left-out")}
    assert names == {"spectrum", "ranks", "truncation"} | tables
    for line in (
        "skipped, only in BASE: 1 (only.weight)",
        "skipped, only in TUNED: 1 (new.weight)",
        "skipped, of another shape in BASE than in TUNED: 1 (wide.weight)",
        "skipped, not stored as float16, bfloat16, float32, float64: 1 (whole.weight)",
        "skipped, equal in BASE and TUNED: there is no update: 1 (same.weight)",
    ):
        assert line in outcome.out
    assert "10 cells, 5 ok, 5 skipped" in outcome.out
    left = pd.read_csv("reports/update-tuned-v2/table-left-out.csv")
    assert left.to_dict("records")[0] == {
        "why": "a norm or a bias, not a matrix",
        "tensors": 1,
        "largest change": 0.125,
        "of": "model.norm.weight",
    }


@pytest.mark.usefixtures("no_reports")
def test_sixteen_bits_hide_an_update_and_the_report_says_so(nla, save, pair):
    """Saved in float32, the same update is not warned of."""
    base = stored(pair[0], ml_dtypes.bfloat16)
    small = {name: base[name].astype(float) + (array - pair[0][name]) / 20 for name, array in pair[1].items()}
    narrow, wide = stored(small, ml_dtypes.bfloat16), stored(small, np.float32)
    warned = " ".join(nla("update", save("b.safetensors", **base), save("t.safetensors", **narrow), *QUICK).out.split())
    assert "Storage in 16 bits hides part of the update: in 4 of 4 matrices" in warned
    assert "only noise of storage is kept" in warned
    shares = records().query("what == 'tensor'")["unchanged"]
    assert shares.min() > 0.5
    quiet = nla("update", save("b32.safetensors", **stored(base, np.float32)), save("t32.safetensors", **wide), *QUICK)
    assert "Storage in 16 bits" not in quiet.out


@pytest.mark.usefixtures("no_reports")
def test_a_second_run_computes_nothing(nla, saved):
    assert "2 ok" in nla("update", *saved, *QUICK, "--tensors", "*q_proj*").out
    again = nla("update", *saved, *QUICK, "--tensors", "*q_proj*").out
    assert "2 ok, 3 skipped; 3 computed now" in again  # what is skipped is looked at again


@pytest.mark.usefixtures("no_reports")
def test_sharded_directories_and_workers(nla, save, pair, tmp_path):
    """The base in float32 and whole, the tuned in bfloat16 and in two shards."""
    base, tuned = stored(pair[0], np.float32), stored(pair[1], ml_dtypes.bfloat16)
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


# -- the adapter -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_reports")
@pytest.mark.parametrize(("dtype", "unit"), [("float32", 2.0**-23), ("bfloat16", 2.0**-8), ("float16", 2.0**-10)])
def test_the_adapter_is_the_update(nla, saved, pair, dtype, unit):
    """At the trained rank base plus adapter is the tuned model, to rounding of the factors."""
    outcome = nla("update", *saved, "--jobs", 0, "--rank", 3, "-o", "adapter", "--dtype", dtype)
    assert outcome.code == 0, outcome.err
    assert "wrote adapter, 4 matrices" in outcome.out
    assert "not in the adapter, a norm or a bias, not a matrix: 1 (model.norm.weight)" in outcome.out
    base, tuned = (stored(arrays, np.float32) for arrays in pair)
    result = merged("adapter", base)
    for name in set(base) - {"model.norm.weight"}:
        size = np.abs(tuned[name] - base[name]).max()
        assert np.abs(result[name] - tuned[name]).max() <= 8 * unit * size + 2.0**-22
    stored_as = {str(x.dtype) for x in load_file("adapter/adapter_model.safetensors").values()}
    assert stored_as == {dtype}
    assert sorted(p.name for p in Path("adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not list(Path().glob(".adapter*"))


@pytest.mark.usefixtures("no_reports")
@pytest.mark.parametrize("norm", ["spectral", "frobenius"])
def test_a_tolerance_is_met_by_what_is_written(nla, saved, pair, norm):
    outcome = nla("update", *saved, "--jobs", 0, "--tolerance", 0.5, "--norm", norm, "-o", "adapter")
    assert outcome.code == 0, outcome.err
    base, tuned = (stored(arrays, np.float32) for arrays in pair)
    result, order = merged("adapter", base), 2 if norm == "spectral" else None
    for name in set(base) - {"model.norm.weight"}:
        error = np.linalg.norm(result[name] - tuned[name], order)
        assert error <= 0.5 * np.linalg.norm(tuned[name] - base[name], order) * (1 + 1e-5)
    assert "confirmed: The tolerance is certainly met" in " ".join(outcome.out.split())


@pytest.mark.usefixtures("no_reports")
def test_a_budget_is_kept_and_spent_where_the_energy_is(nla, save, pair):
    base, tuned = (stored(arrays, np.float32) for arrays in pair)
    loud = "model.layers.1.q_proj.weight"
    tuned[loud] = base[loud] + 10 * (tuned[loud] - base[loud])
    b, t = save("b.safetensors", **base), save("t.safetensors", **tuned)
    outcome = nla("update", b, t, "--jobs", 0, "--budget", 180, "-o", "adapter")
    assert outcome.code == 0, outcome.err
    adapter = open_adapter("adapter")
    ranks = {name: adapter.factors(name)[0].shape[1] for name in adapter.modules}
    assert ranks["base_model.model.model.layers.1.q_proj"] == 3
    parameters = sum(x.size for x in load_file("adapter/adapter_model.safetensors").values())
    assert parameters <= 180
    assert len(ranks) < 4
    assert "not in the adapter, the budget gives it no rank: " in outcome.out


@pytest.mark.usefixtures("no_reports")
def test_kernels_and_embeddings(nla, save, tmp_path):
    """Each in the shape in which PEFT expects it."""
    rng = np.random.default_rng(1)
    shapes = {
        "conv.weight": (6, 4, 3, 3),
        "conv1.weight": (6, 4, 3),
        "embed_tokens.weight": (20, 8),
        "lm_head.weight": (20, 8),
    }
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    tuned = {name: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32) for name, x in base.items()}
    save("base/model.safetensors", **base)
    save("tuned/model.safetensors", **tuned)
    for tied in (False, True):
        for name in ("base", "tuned"):
            (tmp_path / name / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
        outcome = nla("update", "base", "tuned", "--jobs", 0, "--rank", 20, "-o", f"adapter{tied:d}")
        assert outcome.code == 0, outcome.err
        result = merged(f"adapter{tied:d}", base)
        for name, wanted in tuned.items():
            held = not tied or "conv" in name
            assert np.allclose(result[name], wanted if held else base[name], atol=1e-5), name
    shape = load_file("adapter0/adapter_model.safetensors")["base_model.model.conv.lora_A.weight"].shape
    assert shape == (6, 4, 3, 3)
    assert "the embedding is tied to the output head" in outcome.out


@pytest.mark.usefixtures("no_reports")
def test_inputs(nla, save, saved):
    """Activations of one layer: its outputs are kept better than by plain truncation."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3, 7, 16)) * np.logspace(0, -2, 16)).astype(np.float32)
    file = save("x.safetensors", **{"model.layers.0.q_proj": x})
    outcome = nla("update", *saved, "--jobs", 0, "--rank", 1, "--inputs", file)
    assert outcome.code == 0, outcome.err
    rows = records().query("what == 'tensor'").set_index("tensor")
    chosen = rows.loc["model.layers.0.q_proj.weight"]
    assert chosen["output_error"] <= chosen["output_error_plain"]
    assert rows["output_error"].notna().sum() == 1
    wrong = save("y.safetensors", **{"model.layers.0.q_proj": x[..., :5]})
    assert "takes (samples, 16)" in nla("update", *saved, "--rank", 1, "--inputs", wrong).sentence
    none = save("z.safetensors", other=x)
    table = {"embed_tokens.weight": np.eye(16, dtype=np.float32)}
    pair = save("e.safetensors", **table), save("f.safetensors", **{k: 2 * v for k, v in table.items()})
    looked_up = save("u.safetensors", **{"embed_tokens.weight": x})
    assert "acts on inputs from the right" in nla("update", *pair, "--rank", 1, "--inputs", looked_up).sentence
    assert "names no matrix of the pair" in nla("update", *saved, "--rank", 1, "--inputs", none).sentence


@pytest.mark.usefixtures("no_reports")
def test_nothing_is_overwritten_without_force(nla, saved):
    command = ("update", *saved, "--jobs", 0, "--rank", 1, "-o", "adapter")
    assert nla(*command).code == 0
    before = Path("adapter/adapter_model.safetensors").read_bytes()
    assert "--force" in nla(*command[:-3], 2, "-o", "adapter").sentence
    assert Path("adapter/adapter_model.safetensors").read_bytes() == before
    assert nla(*command[:-3], 2, "-o", "adapter", "--force").code == 0
    assert open_adapter("adapter").config["r"] == 2


@pytest.mark.usefixtures("no_reports")
def test_a_full_disk_leaves_no_adapter(nla, saved, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("nla_llm.problems.adapters.write_safetensors", full)
        outcome = nla("update", *saved, "--jobs", 0, "--rank", 1, "-o", "adapter")
    assert outcome.code == 2
    assert "No space left" in outcome.err
    assert not Path("adapter").exists()
    assert nla("update", *saved, "--jobs", 0, "--rank", 1, "-o", "adapter").code == 0


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is of POSIX systems")
def test_a_killed_run_goes_on_where_it_was(save, tmp_path):
    """Killed once the first factors lie there: they are not computed again, and no adapter is there before the end."""
    rng = np.random.default_rng(0)
    base = {f"layer.{i}.weight": rng.standard_normal((300, 200)).astype(np.float32) for i in range(12)}
    tuned = {name: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32) for name, x in base.items()}
    save("b.safetensors", **base)
    save("t.safetensors", **tuned)
    command = [
        sys.executable,
        "-m",
        "nla_llm",
        "update",
        "b.safetensors",
        "t.safetensors",
        "--rank",
        "4",
        "-o",
        "adapter",
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(nla_llm.__file__).parents[1])}
    first = subprocess.Popen(  # noqa: S603 - our own command
        [*command, "--jobs", "0"], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    parts = tmp_path / ".adapter.factors"
    for _ in range(1200):
        if first.poll() is not None or len(list(parts.glob("*.safetensors"))) >= 2:
            break
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (tmp_path / "adapter").exists()
    done = {path: path.stat().st_mtime_ns for path in parts.glob("[!.]*.safetensors")}
    assert 2 <= len(done) < 12
    kept = tmp_path / "kept"
    kept.mkdir()
    for path in done:
        os.link(path, kept / path.name)  # the parts go when the adapter is written
    second = subprocess.run(  # noqa: S603 - our own command
        [*command, "--jobs", "0"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "12 ok" in second.stdout
    assert {path.name: (kept / path.name).stat().st_mtime_ns for path in done} == {p.name: t for p, t in done.items()}
    assert len(open_adapter(tmp_path / "adapter").modules) == 12
    assert not parts.exists()


# -- adapters that are there -------------------------------------------------------------------------------------------


def test_an_adapter_is_audited_and_made_smaller(nla, saved):
    assert nla("update", *saved, "--jobs", 0, "--rank", 3, "-o", "adapter").code == 0
    outcome = nla("update", "--adapter", "adapter", "--tolerance", 0.5, "-o", "smaller")
    assert outcome.code == 0, outcome.err
    assert Path("reports/adapter-adapter.pdf").read_bytes().startswith(b"%PDF")
    whole, small = open_adapter("adapter"), open_adapter("smaller")
    for name in whole.modules:
        (left, right), (up, down) = whole.factors(name), small.factors(name)
        scale = small.modules[name].scale
        assert np.linalg.norm(left @ right.T - scale * up @ down.T) <= 0.5 * np.linalg.norm(left @ right.T)
        assert up.shape[1] < 3
    assert nla("update", "--adapter", "smaller", "--rank", 1, "-o", "smaller").code == 2


@pytest.mark.usefixtures("no_reports")
def test_a_published_extraction_was_clamped(nla):
    if not DATA.is_dir():
        pytest.skip("the folder shared/data with real adapters is not here")
    outcome = nla("update", "--adapter", DATA / "analog_svd_rank4.safetensors", "--rank", 1)
    assert "The factors were clamped: in 192 of 192 modules" in " ".join(outcome.out.split())
    outcome = nla("update", "--adapter", DATA / "lora_disney.safetensors")
    assert "clamped" not in outcome.out
    assert "left as it is, no factor of a low-rank pair: 2 (<s1>, <s2>)" in outcome.out


def test_names():
    assert kind_of("transformer.h.11.attn.c_proj.weight") == "c_proj"
    assert kind_of("w") == "w"
    one = pd.DataFrame({"tensor": ["a.b.weight"]})
    assert short_names(one)["tensor"].to_list() == ["a.b.weight"]
