"""Pairs of checkpoints: matched tensors, kinds of layers, rows a few at a time."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from nla_llm.problems import pair as pairs
from nla_llm.problems.checkpoint import CheckpointError
from nla_llm.problems.pair import Pair, kind_of_layer, plan_of


def arrays(seed=0, **shapes):
    rng = np.random.default_rng(seed)
    return {name.replace("__", "."): rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture
def saved(tmp_path):
    def save(base, tuned, config=None):
        for name, content in (("base", base), ("tuned", tuned)):
            (tmp_path / name).mkdir(exist_ok=True)
            save_file(content, tmp_path / name / "model.safetensors")
            if config is not None:
                (tmp_path / name / "config.json").write_text(json.dumps(config))
        return Pair(tmp_path / "base", tmp_path / "tuned")

    return save


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (8, 4), "linear"),
        ("lm_head.weight", (8, 4), "linear"),
        ("embed_out.weight", (8, 4), "linear"),
        ("model.embed_tokens.weight", (8, 4), "embedding"),
        ("transformer.wte.weight", (8, 4), "embedding"),
        ("embeddings.word_embeddings.weight", (8, 4), "embedding"),
        ("conv_in.weight", (8, 4, 3), "convolution"),
        ("conv_in.weight", (8, 4, 3, 3), "convolution"),
        ("conv_in.weight", (8, 4, 3, 3, 3), "convolution"),
        ("model.norm.weight", (8,), "vector"),
        ("q_proj.bias", (8,), "vector"),
    ],
)
def test_kinds_of_layers(name, shape, kind):
    assert kind_of_layer(name, shape) == kind


def test_gpt2_stores_its_matrices_transposed():
    assert kind_of_layer("h.0.attn.c_attn.weight", (4, 12), "gpt2") == "transposed"
    assert kind_of_layer("h.0.attn.c_attn.weight", (4, 12), "gpt_neo") == "linear"


@pytest.mark.parametrize(
    "dtypes", [(np.float32, np.float32), (ml_dtypes.bfloat16, np.float16), (np.float64, np.float32)]
)
@pytest.mark.parametrize("shape", [(7, 5), (6, 2, 3, 3), (9,)])
def test_blocks_together_are_the_whole(saved, monkeypatch, dtypes, shape):
    """In blocks of a row or two, whatever the two are stored in."""
    monkeypatch.setattr(pairs, "_BLOCK", 11)
    base, tuned = (arrays(seed, w=shape)["w"].astype(dtype) for seed, dtype in enumerate(dtypes))
    tensor = saved({"w": base}, {"w": tuned}).open("w")
    rows = (shape[0], -1)
    assert np.array_equal(tensor.matrix("base"), base.astype(float).reshape(rows))
    seen = [(start, b, t) for start, b, t in tensor.blocks()]
    assert len(seen) > 1 or shape == (9,)
    assert np.array_equal(np.concatenate([t for _, _, t in seen]), tuned.astype(float).reshape(rows))
    assert all(b.dtype == (np.float64 if np.float64 in dtypes else np.float32) for _, b, _ in seen)


def test_the_hash_is_of_the_contents(saved):
    one = plan_of(saved(arrays(0, w=(5, 4)), arrays(1, w=(5, 4)))).tensors["w"]
    same = plan_of(saved(arrays(0, w=(5, 4)), arrays(1, w=(5, 4)))).tensors["w"]
    other = plan_of(saved(arrays(0, w=(5, 4)), arrays(2, w=(5, 4)))).tensors["w"]
    assert one.digest == same.digest != other.digest
    assert not one.equal
    assert plan_of(saved(arrays(0, w=(5, 4)), arrays(0, w=(5, 4)))).tensors["w"].equal


def test_equal_values_in_different_dtypes_are_equal(saved):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert plan_of(saved({"w": x}, {"w": x.astype(ml_dtypes.bfloat16)})).tensors["w"].equal


def test_what_is_left_out_says_on_which_side_it_is_missing(saved):
    base = arrays(both=(3, 4), base_only=(3, 4), shape=(3, 4), experts__up=(2, 3, 4)) | {"i": np.ones((2, 2), np.int32)}
    tuned = arrays(both=(3, 4), tuned_only=(2, 2), shape=(4, 3), experts__up=(2, 3, 4)) | {
        "i": np.ones((2, 2), np.int32)
    }
    base["none"] = tuned["none"] = np.zeros((0, 3), np.float32)
    plan = plan_of(saved(base, tuned))
    assert plan.left_out == {
        "base_only": "only in BASE",
        "tuned_only": "only in TUNED",
        "shape": "of another shape in BASE than in TUNED",
        "experts.up": "a stack of the matrices of several experts",
        "i": "not stored as float16, bfloat16, float32, float64",
        "none": "empty or a single number",
    }


@pytest.mark.parametrize(
    ("config", "head", "tied"),
    [
        ({"tie_word_embeddings": True}, True, True),
        ({"text_config": {"tie_word_embeddings": True}}, True, True),
        ({"tie_word_embeddings": False}, False, False),
        ({}, True, False),
        ({}, False, True),
    ],
)
def test_a_tied_embedding_is_barred_from_adapters(saved, config, head, tied):
    """By the configuration, or because no head is stored."""
    names = ["model.embed_tokens.weight", "q.weight", *(["lm_head.weight"] if head else [])]
    base, tuned = ({name: arrays(seed, w=(6, 4))["w"] for name in names} for seed in (0, 1))
    plan = plan_of(saved(base, tuned, config))
    assert bool(plan.tensors["model.embed_tokens.weight"].barred) == tied
    assert not plan.tensors["q.weight"].barred


def test_nan_and_nothing_in_common(saved):
    tuned = arrays(1, w=(5, 4))
    tuned["w"][3, 2] = np.inf
    with pytest.raises(CheckpointError, match=r"'w' in .*tuned.* infinite"):
        plan_of(saved(arrays(0, w=(5, 4)), tuned))
    with pytest.raises(ValueError, match="1 only in BASE; 1 only in TUNED"):
        plan_of(saved(arrays(a=(2, 2)), arrays(b=(2, 2))))


def test_reading_is_told_byte_by_byte(saved):
    seen = []
    plan_of(saved(arrays(0, w=(5, 4), v=(3,)), arrays(1, w=(5, 4), v=(3,))), None, seen.append)
    assert sum(seen) == 2 * 4 * 23


def test_a_file_that_is_written_to_changes_the_stamp(saved):
    before = saved(arrays(0, w=(5, 4)), arrays(1, w=(5, 4))).stamp()
    assert saved(arrays(0, w=(5, 4)), arrays(2, w=(5, 5))).stamp() != before
