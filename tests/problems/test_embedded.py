"""The shipped model: complete, exact in float32, trained, and equal to what transformers makes of the same files."""

import json
import math
import sys
import warnings

import numpy as np
import pytest

from nla_llm.problems.checkpoint import Checkpoint
from nla_llm.problems.embedded import (
    embedded_directory,
    embedded_model,
    heldout_files,
    heldout_problems,
    heldout_tokens,
    training_record,
)
from nla_llm.problems.llama import load_llama

TEXT = "def mean(values):\n    return sum(values) / len(values)\n"


def test_the_directory_is_complete_and_small():
    names = {"config.json", "model.safetensors", "tokenizer.json", "heldout.npz", "training.json"}
    files = {path.name: path.stat().st_size for path in embedded_directory().iterdir() if path.is_file()}
    assert names <= set(files)
    assert sum(files.values()) <= 8 * 2**20


def test_it_is_the_model_that_was_asked_for():
    config = embedded_model().config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (192, 6, 2048)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 2, 32)
    assert config.max_position_embeddings == 1024
    assert config.tie_word_embeddings
    assert 2_000_000 <= sum(math.prod(shape) for shape in config.shapes().values()) <= 4_000_000
    assert embedded_model() is embedded_model()


def test_float32_weights_are_the_stored_float16_ones():
    model, checkpoint = embedded_model(), Checkpoint(embedded_directory())
    assert set(checkpoint.names()) == set(model.weights)
    for name, weight in model.weights.items():
        assert checkpoint.stored_dtype(name) == "float16"
        assert weight.dtype == np.float32
        assert np.array_equal(weight, checkpoint.tensor(name, dtype=np.float16))


def test_float32_is_as_wrong_as_its_epsilon():
    tokens = heldout_tokens(256)
    x, y = embedded_model().logits(tokens), load_llama(embedded_directory(), dtype="float64").logits(tokens)
    error = np.abs(x - y).max() / np.abs(y).max()
    assert 1e-9 < error < 256 * 2.0**-23  # 256 is empirical: six layers, widths of hundreds


def test_heldout_pieces_have_a_length_and_a_name():
    files = heldout_files()
    assert len(files) == len(set(files)) >= 4
    for piece in range(len(files)):
        tokens = heldout_tokens(piece=piece)
        assert tokens.dtype == np.int64
        assert tokens.shape == (1024,)
        assert 0 <= tokens.min() <= tokens.max() < 2048
    assert np.array_equal(heldout_tokens(100, piece=1), heldout_tokens(piece=1)[:100])
    assert not np.array_equal(heldout_tokens(piece=0), heldout_tokens(piece=1))
    assert set(files) <= set(training_record()["text"]["validation_files"])


def test_tokens_that_were_not_kept_are_refused():
    with pytest.raises(ValueError, match=r"piece must be in 0 \.\.\. \d+, got 99"):
        heldout_tokens(piece=99)
    with pytest.raises(ValueError, match=r"piece must be in 0 \.\.\. \d+, got -1"):
        heldout_tokens(piece=-1)
    for n in (0, 1025, -1):
        with pytest.raises(ValueError, match=rf"n must be in 1 \.\.\. 1024, .*got {n}"):
            heldout_tokens(n)


def test_changing_what_was_returned_changes_nothing_else():
    first = heldout_tokens(8)
    first[:] = 0
    assert heldout_tokens(8).any()


def test_it_has_learned_its_language():
    model = embedded_model()
    batch = np.stack([heldout_tokens(512, piece) for piece in range(4)])
    loss = model.loss(batch)
    count = np.bincount(batch.ravel(), minlength=2048) + 1
    p = count / count.sum()
    assert loss < -np.mean(np.log(p[batch])) - 1  # even against the frequencies of the scored text itself
    shuffled = np.random.default_rng(0).permuted(batch, axis=1)
    assert model.loss(shuffled) > loss + 1  # and the order of the tokens matters to it


@pytest.mark.parametrize("piece", [0, 3])
def test_losses_are_those_that_the_trainer_recorded(piece):
    recorded = training_record()["heldout_losses"][heldout_files()[piece]]
    assert math.isclose(embedded_model().loss(heldout_tokens(piece=piece)), recorded, abs_tol=1e-4)  # four decimals


def test_it_is_two_nats_better_than_the_frequencies_of_its_tokens():
    record = training_record()
    assert record["validation_loss"] < record["validation_unigram_entropy"] - 2


def test_its_record_says_how_it_was_made():
    record = training_record()
    assert record["parameters"] == sum(math.prod(shape) for shape in embedded_model().config.shapes().values())
    assert {"versions", "options", "text", "curve", "validation_loss", "validation_unigram_entropy"} <= set(record)
    assert "seed" in record["options"]


@pytest.mark.hf
def test_a_text_can_be_captured():
    pytest.importorskip("tokenizers")
    model = embedded_model()
    ids = model.encode(TEXT)
    assert ids.dtype == np.int64
    assert 5 < ids.size < len(TEXT)
    problems = model.capture(TEXT)
    assert len(problems) == 6
    assert problems[3].q.shape == (2, 3, ids.size, 32)
    assert np.array_equal(problems[3].q, model.capture(ids)[3].q)
    assert model.loss(TEXT) == model.loss(ids)


@pytest.mark.hf
def test_the_tokenizer_is_the_one_the_heldout_text_was_encoded_with():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(embedded_directory() / "tokenizer.json"))
    tokens = heldout_tokens(200)
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
    assert "import" in text or "def " in text
    assert np.array_equal(embedded_model().encode(text)[:150], tokens[tokens != 0][:150])


def test_without_tokenizers_a_text_gets_a_sentence_and_ids_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # makes its import fail
    with pytest.raises(ImportError, match="pip install tokenizers; token ids work without"):
        embedded_model().capture(TEXT)
    assert len(embedded_model().capture(heldout_tokens(8))) == 6


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")  # of other people's code
def test_logits_equal_those_of_transformers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        torch = pytest.importorskip("torch")
        theirs = transformers.LlamaForCausalLM.from_pretrained(embedded_directory(), dtype=torch.float32)
    tokens = heldout_tokens()
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens)[None]).logits[0].numpy()
    found = embedded_model().logits(tokens)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_config_and_record_are_plain_json():
    for name in ("config.json", "training.json"):
        text = (embedded_directory() / name).read_text(encoding="utf-8")
        assert isinstance(json.loads(text), dict)
        assert "/home/" not in text


def test_held_out_problems_are_those_that_the_model_captures():
    found, wanted = heldout_problems(24, 1), embedded_model().capture(heldout_tokens(24, 1))
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(one.q, other.q)
        assert np.array_equal(one.v, other.v)
