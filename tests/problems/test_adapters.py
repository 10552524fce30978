"""Adapters: every layout is read, what is written is what PEFT loads."""

import importlib.util
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nla_llm.problems.adapters import PeftModule, open_adapter, write_peft, write_smaller
from nla_llm.problems.checkpoint import CheckpointError

DATA = Path(__file__).parents[2].parent / "shared" / "data"
DOWN, UP = np.arange(8.0).reshape(2, 4).astype(np.float32), np.arange(6.0).reshape(3, 2).astype(np.float32) - 2

LAYOUTS = {
    "PEFT": ("base_model.model.m.lora_A.weight", "base_model.model.m.lora_B.weight"),
    "PEFT ": ("base_model.model.m.lora_A.default.weight", "base_model.model.m.lora_B.default.weight"),
    "loralib": ("m.lora_A", "m.lora_B"),
    "kohya": ("lora_unet_m.lora_down.weight", "lora_unet_m.lora_up.weight"),
    "diffusers": ("unet.m.lora.down.weight", "unet.m.lora.up.weight"),
    "diffusers ": ("m.to_q_lora.down.weight", "m.to_q_lora.up.weight"),
    "diffusers  ": ("m.lora_linear_layer.down.weight", "m.lora_linear_layer.up.weight"),
    "cloneofsimo": ("unet:3:down", "unet:3:up"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    down, up = LAYOUTS[layout]
    save_file({down: DOWN, up: UP, "other": DOWN}, tmp_path / "a.safetensors")
    adapter = open_adapter(tmp_path / "a.safetensors")
    ((name, module),) = adapter.modules.items()
    assert module.layout == layout.strip()
    left, right = adapter.factors(name)
    assert np.array_equal(left @ right.T, UP @ DOWN)
    assert module.scale == 1
    assert adapter.left_out == {"other": "no factor of a low-rank pair"}


def test_embeddings_and_kernels(tmp_path):
    """An embedding is stored as the transpose of BA; a kernel's factors are flattened."""
    rng = np.random.default_rng(0)
    key = "base_model.model."
    arrays = {
        f"{key}e.lora_embedding_A": rng.standard_normal((2, 10)),
        f"{key}e.lora_embedding_B": rng.standard_normal((4, 2)),
        f"{key}c.lora_A.weight": rng.standard_normal((2, 3, 5, 5)),
        f"{key}c.lora_B.weight": rng.standard_normal((6, 2, 1, 1)),
    }
    save_file({k: v.astype(np.float32) for k, v in arrays.items()}, tmp_path / "a.safetensors")
    adapter = open_adapter(tmp_path / "a.safetensors")
    left, right = adapter.factors(f"{key}e")
    assert np.allclose(
        left @ right.T, (arrays[f"{key}e.lora_embedding_B"] @ arrays[f"{key}e.lora_embedding_A"]).T, atol=1e-6
    )
    left, right = adapter.factors(f"{key}c")
    assert (left.shape, right.shape) == ((6, 2), (75, 2))


def test_scales(tmp_path):
    """alpha/r from a tensor, from the configuration with its patterns, and alpha/√r where it says so."""
    down, up = LAYOUTS["kohya"]
    save_file({down: DOWN, up: UP, "lora_unet_m.alpha": np.array(8, np.float32)}, tmp_path / "k.safetensors")
    assert open_adapter(tmp_path / "k.safetensors").modules["lora_unet_m"].scale == 4
    keys = {f"base_model.model.{n}.lora_{h}.weight": x for n in ("x.q", "x.k") for h, x in (("A", DOWN), ("B", UP))}
    (tmp_path / "peft").mkdir()
    save_file(keys, tmp_path / "peft" / "adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 6, "alpha_pattern": {"k": 10}}
    for rslora, divisor in ((False, 2), (True, np.sqrt(2))):
        (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": rslora}))
        scales = {n[-1]: m.scale for n, m in open_adapter(tmp_path / "peft").modules.items()}
        assert scales == pytest.approx({"q": 6 / divisor, "k": 10 / divisor})


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"m.lora_down.weight": DOWN}, "other factor is missing"),
        ({"m.lora_down.weight": DOWN, "m.lora_up.weight": UP.T}, "do not multiply"),
        ({"m.lora_down.weight": DOWN, "m.lora_up.weight": UP, "m.lora_mid.weight": UP}, "three factors"),
        ({"m.lora_down.weight": DOWN, "m.lora_up.weight": UP, "m.dora_scale": UP}, "DoRA"),
        ({"m.lora_A.weight": DOWN, "m.lora_B.weight": UP, "m.lora_magnitude_vector.weight": UP}, "DoRA"),
    ],
)
def test_what_is_no_pair_is_left_out_with_the_reason(tmp_path, extra, words):
    down, up = LAYOUTS["cloneofsimo"]
    save_file({down: DOWN, up: UP} | {k: np.ascontiguousarray(v) for k, v in extra.items()}, tmp_path / "a.safetensors")
    adapter = open_adapter(tmp_path / "a.safetensors")
    assert set(adapter.modules) == {"unet:3"}
    assert any(words in reason for reason in adapter.left_out.values())


def test_mistakes(tmp_path):
    save_file({"w": DOWN}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"no pair of low-rank factors .* w "):
        open_adapter(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        open_adapter(tmp_path / "none.safetensors")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(CheckpointError, match="pickled"):
        open_adapter(tmp_path / "pickled")
    save_file({"w": DOWN}, tmp_path / "v.safetensors")
    with pytest.raises(CheckpointError, match="holds 2 safetensors"):
        open_adapter(tmp_path)
    with pytest.raises(ValueError, match="needs a module"):
        write_peft(tmp_path / "out", [], lambda _: (DOWN, UP))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_smaller_adapter_keeps_layout_dtype_and_the_rest(tmp_path, layout):
    down, up = LAYOUTS[layout]
    arrays = {down: DOWN.astype(np.float16), up: UP.astype(np.float16), "other": DOWN}
    save_file(arrays, tmp_path / "a.safetensors", metadata={"unet:3:rank": "2", "by": "somebody"})
    adapter = open_adapter(tmp_path / "a.safetensors")
    (name,) = adapter.modules
    left, right = np.ones((3, 1)), np.array([[1.0], [2], [3], [4]])
    write_smaller(adapter, tmp_path / "out", {name: 1}, lambda _: (left, right))
    read = load_file(tmp_path / "out" / "a.safetensors")
    assert set(read) == set(arrays)
    assert read[down].dtype == np.float16
    assert np.array_equal(read[up].astype(float) @ read[down].astype(float), left @ right.T)
    assert np.array_equal(read["other"], DOWN)
    again = open_adapter(tmp_path / "out" / "a.safetensors")
    assert again.metadata()["by"] == "somebody"
    if layout == "cloneofsimo":
        assert again.metadata()["unet:3:rank"] == "1"


def test_a_smaller_adapter_has_a_scale_of_one(tmp_path):
    """alpha follows the rank, in the tensor and in the configuration."""
    down, up = LAYOUTS["kohya"]
    save_file({down: DOWN, up: UP, "lora_unet_m.alpha": np.array(8, np.float32)}, tmp_path / "k.safetensors")
    write_smaller(
        open_adapter(tmp_path / "k.safetensors"),
        tmp_path / "out",
        {"lora_unet_m": 1},
        lambda _: (UP[:, :1], DOWN[:1].T),
    )
    assert open_adapter(tmp_path / "out" / "k.safetensors").modules["lora_unet_m"].scale == 1
    (tmp_path / "peft").mkdir()
    keys = {f"base_model.model.{n}.lora_{h}.weight": x for n in ("q", "k") for h, x in (("A", DOWN), ("B", UP))}
    save_file(keys, tmp_path / "peft" / "adapter_model.safetensors")
    config = {"r": 2, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q", "k"]}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(config))
    ranks = {"base_model.model.q": 1, "base_model.model.k": 2}
    cut = {1: (UP[:, :1], DOWN[:1].T), 2: (UP, DOWN.T)}
    write_smaller(open_adapter(tmp_path / "peft"), tmp_path / "small", ranks, lambda name: cut[ranks[name]])
    again = open_adapter(tmp_path / "small")
    assert {name: module.scale for name, module in again.modules.items()} == dict.fromkeys(ranks, 1.0)
    assert again.config["target_modules"] == ["q", "k"]


@pytest.mark.parametrize(("file", "rank"), [("lora_disney.safetensors", 1), ("analog_svd_rank4.safetensors", 4)])
def test_published_adapters(file, rank):
    if not DATA.is_dir():
        pytest.skip("the folder shared/data with real adapters is not here")
    adapter = open_adapter(DATA / file)
    assert len(adapter.modules) == 192
    left, right = adapter.factors("unet:0")
    assert left.shape[1] == right.shape[1] == rank
    assert set(adapter.left_out) == ({"<s1>", "<s2>"} if rank == 1 else set())


@pytest.mark.hf
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_peft_merges_what_was_written(tmp_path, dtype):
    """Every kind of layer, each with a rank of its own: merged weights equal base + BA to rounding of the dtype."""
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    import torch
    from peft import PeftModel

    torch.manual_seed(0)
    modules = {
        "embed_tokens": (torch.nn.Embedding(50, 12), "embedding"),
        "conv": (torch.nn.Conv2d(4, 6, 3), "convolution"),
        "conv1": (torch.nn.Conv1d(4, 6, 3), "convolution"),
        "conv3": (torch.nn.Conv3d(2, 3, 2), "convolution"),
        "point": (torch.nn.Conv2d(4, 6, 1), "convolution"),
        "q_proj": (torch.nn.Linear(12, 20), "linear"),
        "deep_q_proj": (torch.nn.Linear(12, 8, bias=False), "linear"),
    }
    net = torch.nn.ModuleDict({name: module for name, (module, _) in modules.items()}).to(torch.float32)
    base = {name: weight.detach().numpy().copy() for name, weight in net.state_dict().items()}
    rng, wanted, factors = np.random.default_rng(0), [], {}
    for rank, (name, (module, kind)) in enumerate(modules.items(), start=1):
        shape = tuple(module.weight.shape)
        pair = (rng.standard_normal((n, rank)) for n in (shape[0], int(np.prod(shape[1:]))))
        numpy_dtype = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
        factors[f"{name}.weight"] = tuple(x.astype(np.float32).astype(numpy_dtype).astype(np.float32) for x in pair)
        wanted.append(PeftModule(f"{name}.weight", kind, shape, rank))
    write_peft(tmp_path / "adapter", wanted, factors.__getitem__, dtype=dtype)
    merged = PeftModel.from_pretrained(net, tmp_path / "adapter").merge_and_unload()
    for name, weight in merged.state_dict().items():
        if name in factors:
            left, right = factors[name]
            expected = base[name].reshape(left.shape[0], -1) + left @ right.T
            unit = {"float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-10}[dtype]
            error = np.abs(weight.numpy().reshape(left.shape[0], -1) - expected).max()
            assert error <= 8 * unit * np.abs(expected).max(), name
