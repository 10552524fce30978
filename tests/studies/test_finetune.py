"""The fine-tuning of the embedded language model: adapters, their files and operations, text, search, export."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nla_llm.study import catalogue

torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = [pytest.mark.torch, pytest.mark.hf]

ROOT = Path(__file__).parents[2]
MODULES = ("finetune", "export", "runs", "lora", "docstrings", "train", "model", "text")
DOCUMENTED = '''"""Module: what it is for.

    It goes on.
"""
class A:
    """A class."""
    def f(self):
        """A method."""
        return "no docstring"
async def g():
    """A coroutine."""
def h(): pass
'''


@pytest.fixture(scope="module")
def tiny():
    """Modules of studies/tiny_lm by name, as when its scripts are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "studies" / "tiny_lm")
        importlib.import_module("finetune")
        yield {name: sys.modules[name] for name in MODULES}
        for name in MODULES:
            del sys.modules[name]


@pytest.fixture(scope="module")
def config(tiny, small_shape):
    return tiny["model"].Config(**small_shape)


@pytest.fixture
def model(tiny, config):
    return tiny["model"].LanguageModel(config).initialise(0)


def tuned(tiny, model, rank, seed=0):
    """Adapters with random B on a model, in place."""
    tiny["lora"].add_adapters(model, rank, 4.0, seed)
    generator = torch.Generator().manual_seed(seed)
    for _, holder, key in tiny["lora"].linear_maps(model):
        holder[key].lora_B.data.normal_(std=0.1, generator=generator)
    return model


TOKENS = torch.arange(2 * 20).view(2, 20)


def test_an_adapter_begins_as_no_update(tiny, model):
    before = model(TOKENS)
    assert torch.equal(tiny["lora"].add_adapters(model, 3, 4.0, seed=0)(TOKENS), before)


def test_an_update_has_its_rank_and_merges_into_the_weight(tiny, model):
    weights = {name: p.clone() for name, p in model.named_parameters()}
    adapted = tuned(tiny, model, 3)
    before = adapted(TOKENS)
    updates = {name: holder[key].update() for name, holder, key in tiny["lora"].linear_maps(adapted)}
    for name, update in updates.items():
        values = torch.linalg.svdvals(update.double())
        assert (values[3:] < 1e-6 * values[0]).all()
        assert values[2] > 1e-3 * values[0], name
    merged = tiny["lora"].merge_adapters(adapted)
    torch.testing.assert_close(merged(TOKENS), before, rtol=1e-4, atol=1e-5)
    for name, p in merged.named_parameters():
        torch.testing.assert_close(p, weights[name] + updates.get(name, 0))


def test_the_scale_is_alpha_over_the_root_of_the_rank(tiny):
    layer = tiny["lora"].LoRALinear(torch.nn.Linear(8, 6, bias=False), 4, 6.0, torch.Generator().manual_seed(0))
    layer.lora_B.data.fill_(1.0)
    torch.testing.assert_close(layer.update(), 3.0 * layer.lora_A.sum(0).expand(6, 8).detach())
    assert layer.lora_A.abs().max() <= 8**-0.5


def test_only_the_adapters_are_trained_and_they_lower_the_loss(tiny, model):
    adapted = tiny["lora"].add_adapters(model, 2, 4.0, seed=0)
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    tokens = torch.arange(400) % 7
    loss = tiny["model"].evaluate(adapted, tokens, 32)
    options = tiny["train"].Options(steps=30, lr=2e-2, batch_tokens=64, context=16, short_context=16)
    tiny["train"].train(adapted, tokens, options)
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert tiny["model"].evaluate(adapted, tokens, 32) < loss - 0.4


def test_the_full_fine_tuning_trains_the_matrices_that_lora_adapts(tiny, model):
    tiny["lora"].freeze_all_but_linear_maps(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, _, _ in tiny["lora"].linear_maps(model)}
    assert len(names) == 2 * 7


def test_adapters_are_written_in_the_layout_of_peft(tiny, config, model, tmp_path):
    import safetensors.torch

    adapted = tuned(tiny, model, 4)
    tiny["lora"].save_adapters(adapted, tmp_path, 4.0)
    stored = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    assert len(stored) == 2 * 2 * 7
    assert stored[name.format("A")].shape == (4, 24)
    assert stored[name.format("B")].shape == (16, 4)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["use_rslora"]) == (4, 4.0, True)
    again = tiny["lora"].load_adapters(tiny["model"].LanguageModel(config).initialise(0), tmp_path)
    for (_, a, key), (_, b, _) in zip(*(tiny["lora"].linear_maps(m) for m in (adapted, again)), strict=True):
        assert torch.equal(a[key].lora_A.half().float(), b[key].lora_A)
        assert torch.equal(a[key].lora_B.half().float(), b[key].lora_B)


@pytest.mark.filterwarnings("ignore")  # of other people's code
def test_peft_reads_them(tiny, model, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    tiny["model"].save_model(model, tmp_path / "base", torch.float32)
    adapted = tuned(tiny, model, 4)
    tiny["lora"].save_adapters(adapted, tmp_path / "adapter", 4.0, torch.float32)
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, adapted(TOKENS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0, 1, 8])
def test_operations_of_a_step_are_those_that_torch_counts(tiny, rank):
    from torch.utils.flop_counter import FlopCounterMode

    bench, windows = catalogue.load("lora_vs_svd").claims.__globals__["bench"], torch.arange(17)[None]
    model = tiny["runs"].Run(rank, 0).model()
    with FlopCounterMode(display=False) as counter:
        tiny["model"].loss_on(model, windows).backward()
    operators = counter.get_flop_counts()["Global"]
    products = sum(count for op, count in operators.items() if str(op) in {"aten.mm", "aten.addmm"})
    head = 4 * model.config.vocab_size * model.config.hidden_size
    assert products == 16 * (bench.step_operations(rank) + head)
    assert bench.trained_parameters(rank) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_docstrings_are_found_and_nothing_else(tiny):
    found = tiny["docstrings"].docstrings(DOCUMENTED)
    assert sorted(found) == ["A class.", "A coroutine.", "A method.", "Module: what it is for.\n\nIt goes on."]


def test_no_docstring_is_read_twice_and_the_split_depends_on_names_alone(tiny, tmp_path, monkeypatch):
    package = tmp_path / "documented"
    (package / "tests").mkdir(parents=True)
    long = "words " * 50
    (package / "__init__.py").write_text(f'"""{long}"""\n')
    (package / "a.py").write_text(f'"""{long}"""\ndef f():\n    """{long} once more"""\n')
    (package / "b.py").write_text(f'"""{long}"""\n')
    (package / "tests" / "c.py").write_text(f'"""{long} in a test"""\n')
    monkeypatch.syspath_prepend(tmp_path)
    texts = tiny["docstrings"].read_docstrings(["documented"])
    assert list(texts) == ["documented/__init__.py", "documented/a.py"]
    assert texts["documented/a.py"] == f"{long} once more\n"
    names = [f"{i}.py" for i in range(500)]
    parts = tiny["docstrings"].split_names(names)
    assert sorted(name for part in parts.values() for name in part) == sorted(names)
    assert all(10 <= len(parts[part]) <= 40 for part in ("validation", "heldout"))
    again = tiny["docstrings"].split_names(names[::-1][:250])
    assert all(set(again[part]) <= set(parts[part]) for part in parts)


def test_the_search_goes_on_until_its_best_is_inside(tiny, tmp_path, monkeypatch):
    module, tried = tiny["finetune"], []
    monkeypatch.setattr(module, "train", lambda model, tokens, options: tried.append(options.lr))
    monkeypatch.setattr(module, "evaluate", lambda model, tokens, windows: np.log(tried[-1] / 0.1) ** 2)
    tokens = {"train": None, "validation": None}
    lr = module.search_rate(1, tokens, tmp_path / "search.json", module.OPTIONS)
    assert lr == 0.1
    assert tried == [0.0046, 0.01, 0.022, 0.046, 0.1, 0.22]
    assert module.search_rate(1, tokens, tmp_path / "search.json", module.OPTIONS) == 0.1
    assert len(tried) == 6  # read, not searched again


def test_runs_and_their_export(tiny, config, model, tmp_path, monkeypatch):
    base, work, output = (tmp_path / name for name in ("base", "work", "output"))
    names = [f"{i}.py" for i in range(120)]
    texts = {name: f"{name}: the quick brown fox jumps over the lazy dog. " * 4 for name in names}
    tokenizer = tiny["text"].train_tokenizer(texts.values(), 300)
    tiny["model"].save_model(model, base)
    tokenizer.save(str(base / "tokenizer.json"))
    tiny["text"].save_pieces(base / "heldout.npz", {"old": torch.arange(50)})
    options = replace(tiny["runs"].OPTIONS, steps=3, batch_tokens=32, context=16, short_context=16, evaluate_every=3)
    for name in ("finetune", "export", "runs"):
        monkeypatch.setattr(tiny[name], "BASE", base)
        monkeypatch.setattr(tiny[name], "OPTIONS", options)
    monkeypatch.setattr(tiny["runs"].Run.model, "__defaults__", (base,))
    monkeypatch.setattr(tiny["finetune"], "read_docstrings", lambda: texts)
    monkeypatch.setattr(tiny["finetune"], "search_rate", lambda *_: 1e-2)
    threads = torch.get_num_threads()
    tiny["finetune"].main(["--work", str(work), "--runs", "full-0", "full-1", "lora-2-1"])
    tiny["finetune"].main(["--work", str(work), "--export", str(output)])
    torch.set_num_threads(threads)
    assert {path.name for path in output.iterdir()} == {
        "full-0.safetensors",
        "lora-2-1",
        "heldout.npz",
        "training.json",
    }
    record = json.loads((output / "training.json").read_text())
    assert list(record["runs"]) == ["full-0", "full-1", "lora-2-1"]
    assert len(record["second_full_update"]) == 14
    assert record["runs"]["full-0"]["tokens"] == record["runs"]["lora-2-1"]["tokens"] == 3 * 32
    assert str(tmp_path) not in json.dumps(record)
    stored = tiny["lora"].load_adapters(tiny["model"].load_model(base), output / "lora-2-1")
    assert record["runs"]["lora-2-1"]["losses"]["old"] == [
        pytest.approx(tiny["model"].evaluate(stored, torch.arange(50)), abs=1e-4)
    ]
