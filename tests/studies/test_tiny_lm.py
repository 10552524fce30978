"""The trainer of the embedded language model, on a model of a few thousand weights."""

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = [pytest.mark.torch, pytest.mark.hf]

ROOT = Path(__file__).parents[2]
DATA = ROOT / "nla_llm" / "data" / "tiny_lm"
TEXT = {
    f"{name}.txt": f"{name}: the quick brown fox jumps over the lazy dog. " * 40 for name in ("one", "two", "three")
}


@pytest.fixture(scope="module")
def lm():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "studies" / "tiny_lm")  # as when the script is run
        yield importlib.import_module("train")
        for name in ("train", "model", "text"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def config(lm, small_shape):
    return lm.Config(**small_shape)


@pytest.fixture(scope="module")
def options(lm):
    return lm.Options(
        steps=12, lr=2e-2, batch_tokens=128, context=32, short_context=16, evaluate_every=4, checkpoint_every=5
    )


@pytest.fixture(scope="module")
def tokens(lm):
    return torch.cat([*lm.encode(lm.train_tokenizer(TEXT.values(), 300), TEXT).values()])


def test_the_loss_falls_below_the_unigram_entropy(lm, config, options, tokens):
    model = lm.LanguageModel(config).initialise(0)
    before = lm.evaluate(model, tokens, 32)
    progress = lm.train(model, tokens, replace(options, steps=60), validation=tokens)
    assert before > math.log(config.vocab_size) - 1
    assert lm.evaluate(model, tokens, 32) < lm.unigram_entropy(tokens, config.vocab_size) - 1
    assert [point["step"] for point in progress.curve] == list(range(4, 61, 4))


def test_a_resumed_run_equals_an_uninterrupted_one(lm, config, options, tokens, tmp_path):
    whole, parts = (lm.LanguageModel(config).initialise(1) for _ in range(2))
    lm.train(whole, tokens, options)
    draw = lm.draw_batch

    def draw_until_7(tokens, step, share, options):
        if step == 7:
            raise KeyboardInterrupt
        return draw(tokens, step, share, options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm, "draw_batch", draw_until_7)
        with pytest.raises(KeyboardInterrupt):
            lm.train(parts, tokens, options, checkpoint=tmp_path / "run.pt")
    resumed = lm.LanguageModel(config).initialise(2)  # everything comes from the checkpoint of step 5
    progress = lm.train(resumed, tokens, options, checkpoint=tmp_path / "run.pt")
    assert progress.step == 12
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_frozen_parameters_stay(lm, config, options, tokens):
    model = lm.LanguageModel(config).initialise(0)
    model.requires_grad_(requires_grad=False)
    moving = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    before = {name: p.clone() for name, p in model.named_parameters()}
    lm.train(model, tokens, options)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["model.layers.0.self_attn.q_proj.weight"]
    assert moving.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_saved_is_loaded_exactly(lm, config, tmp_path, dtype):
    model = lm.LanguageModel(config).initialise(3)
    lm.save_model(model, tmp_path, dtype)
    again = lm.load_model(tmp_path)
    assert again.config == config
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight.to(dtype).float()), name


def test_the_first_row_sees_itself_and_zero_queries_give_flat_rows(lm, config):
    model = lm.LanguageModel(config).initialise(0)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    np.testing.assert_allclose(lm.head_entropies(model, torch.arange(40)), 1.0, rtol=1e-6)


def test_causal(lm, config):
    model = lm.LanguageModel(config).initialise(0)
    tokens = torch.arange(20)[None]
    changed = tokens.clone()
    changed[0, 10:] += 50
    with torch.no_grad():
        a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :10], b[:, :10])
    assert not torch.allclose(a[:, 10:], b[:, 10:])


def test_one_file_alone_is_refused(lm):
    with pytest.raises(ValueError, match="at least two"):
        lm.heldout_names(["one.txt"])
    assert len(lm.heldout_names(TEXT)) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_layout_is_that_of_transformers(lm, config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = lm.LanguageModel(config).initialise(5)
    lm.save_model(model, tmp_path, torch.float32)
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = torch.arange(2 * 48).view(2, 48)
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)


def test_the_command_line_writes_the_whole_folder(lm, tmp_path):
    for name, text in TEXT.items():
        (tmp_path / name).write_text(text)
    arguments = ["--text", *(str(tmp_path / name) for name in TEXT), "--steps", "2", "--batch-tokens", "64"]
    threads = torch.get_num_threads()
    lm.main([*arguments, "--output", str(tmp_path / "model"), "--checkpoint", str(tmp_path / "run.pt")])
    torch.set_num_threads(threads)
    names = ["config.json", "heldout.npz", "model.safetensors", "tokenizer.json", "training.json"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == names
    report = json.loads((tmp_path / "model" / "training.json").read_text())
    assert report["step"] == 2
    assert report["text"]["files"] == len(TEXT)
    assert str(tmp_path) not in (tmp_path / "model" / "training.json").read_text()


def test_the_shipped_model_has_learned(lm):
    report = json.loads((DATA / "training.json").read_text())
    assert report["validation_loss"] < report["validation_unigram_entropy"] - 2
    with np.load(DATA / "heldout.npz") as held:
        offsets, tokens = held["offsets"], torch.from_numpy(held["tokens"].astype(np.int64))
        files = held["files"].tolist()
    assert (np.diff(offsets) >= 1024).all()
    assert set(files) <= set(report["text"]["validation_files"])
    piece = tokens[offsets[0] : offsets[1]]
    assert lm.evaluate(lm.load_model(DATA), piece) == pytest.approx(report["heldout_losses"][files[0]], abs=1e-3)
