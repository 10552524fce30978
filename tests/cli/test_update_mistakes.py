"""The verb update, given what cannot be done: a sentence, and nothing is left behind."""

import json
from pathlib import Path

import numpy as np
import pytest

QUICK = ["--jobs", 0, "--rank", 1, "--rank", 4]


def test_mistakes_are_told_in_a_sentence(nla, save, saved, pair, tmp_path):
    b, t = saved
    assert "missing does not exist" in nla("update", b, "missing").sentence
    assert "--rank must be at least 1" in nla("update", b, t, "--rank", 0).sentence
    told = nla("update", b, t, "--tensors", "*attn*").sentence
    assert "no tensor of b.safetensors and t.safetensors can be compared: 5 not asked for by --tensors" in told
    name = "model.layers.0.q_proj.weight"
    nan = {name: np.full((24, 16), np.nan, np.float32)}
    broken = save(
        "nan.safetensors",
        **({k: x.astype(np.float32) for k, x in pair[1].items()} | nan),
    )
    told = nla("update", b, broken).sentence
    assert name in told
    assert "NaN" in told
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"\x80")
    assert "pickled" in nla("update", b, "pickled").sentence


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rank", 2, "--tolerance", 0.1], "--rank and --tolerance each decide the rank"),
        (["--tolerance", 0.1, "--budget", 100], "--tolerance and --budget each decide"),
        (["--tolerance", 1.5], "between 0 and 1"),
        (["-o", "out"], "a single --rank, or --tolerance, or --budget"),
        (["--rank", 1, "--rank", 2, "-o", "out"], "a single --rank"),
        (["--budget", 10, "-o", "out"], "--budget 10 is below the 40 parameters"),
        (["--tolerance", 0.1, "--inputs", "x.safetensors"], "--inputs goes with --rank"),
        (["--adapter", "b.safetensors"], "BASE is for a pair of checkpoints"),
    ],
)
def test_options_that_contradict_each_other(nla, saved, arguments, words):
    assert words in nla("update", *saved, *arguments).sentence


def test_neither_pair_nor_adapter(nla, saved):
    assert "pass two checkpoints, BASE and TUNED, or one adapter" in nla("update").sentence
    assert "no pair of low-rank factors" in nla("update", "--adapter", saved[0]).sentence


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: (10**12).to_bytes(8, "little") + raw[8:], "announce a header of"),
        (lambda raw: raw[:-7], "truncated or its header lies"),
        (lambda raw: raw.replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1), "damaged"),
        (lambda raw: raw[:8] + b"[" + raw[9:], "damaged"),
    ],
)
def test_damaged_files(nla, saved, damage, words):
    """A huge header, one that lies about offsets or overlaps, one that is no JSON."""
    raw = Path(saved[1]).read_bytes()
    Path("bad.safetensors").write_bytes(damage(raw))
    assert words in nla("update", saved[0], "bad.safetensors").sentence


@pytest.mark.parametrize("shard", ["../t.safetensors", "/etc/passwd", "a/../t.safetensors", ""])
def test_an_index_names_files_beside_it_and_no_others(nla, saved, shard):
    Path("tricky").mkdir()
    index = {"weight_map": {"model.norm.weight": shard}}
    Path("tricky/model.safetensors.index.json").write_text(json.dumps(index))
    assert "not the name of a file beside it" in nla("update", saved[0], "tricky").sentence


def test_two_equal_checkpoints(nla, saved):
    """Every cell is skipped with the reason, the report says so, and nothing breaks."""
    outcome = nla("update", saved[0], saved[0], *QUICK)
    assert outcome.code == 0
    assert "5 skipped" in outcome.out
    assert "there is no update" in outcome.out
    assert Path("reports/update-b.pdf").exists()
    assert "needs a module" in nla("update", saved[0], saved[0], "--rank", 1, "--jobs", 0, "-o", "out").sentence
    assert not Path("out").exists()
