"""Two made-up checkpoints of 1 GB each in the layout of Llama, and what ``nla-llm update`` takes for them.

Printed: seconds, the largest resident memory of the processes above that of the same command on a pair of a few
kilobytes, beside the largest tensor; and whether the adapter loads in PEFT, where that is installed.

    OMP_NUM_THREADS=2 python benchmarks/update.py
    OMP_NUM_THREADS=2 python benchmarks/update.py --layers 2 --rank 64      # a first look
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from nla_llm.problems._writing import write_safetensors

TRUE_RANK, SIZE = 16, 1e-2  # of the updates, relative to the weights
SHARD = 4e8  # bytes


def shapes(hidden, inner, vocabulary, layers):
    found = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for layer in range(layers):
        for name, shape in {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (hidden // 8, hidden),
            "self_attn.v_proj": (hidden // 8, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            found[f"model.layers.{layer}.{name}.weight"] = shape
        found[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
        found[f"model.layers.{layer}.post_attention_layernorm.weight"] = (hidden,)
    return found | {"model.norm.weight": (hidden,)}


def tensor(shape, number, tuned):
    """Weights of standard deviation 0.02 rounded to bfloat16 by truncation, plus the update for the tuned model."""
    rng = np.random.default_rng([number, 0])
    base = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    base.view(np.uint32)[...] &= 0xFFFF0000  # what training starts from lies on the grid
    if tuned and len(shape) == 2:
        rng = np.random.default_rng([number, 1])
        left, right = (rng.standard_normal((n, TRUE_RANK), dtype=np.float32) for n in shape)
        base += (left * np.float32(0.02 * SIZE / math.sqrt(TRUE_RANK))) @ right.T
    return base


def write(directory, found, tuned):
    directory.mkdir()
    shards, size = [{}], 0
    for name, shape in found.items():
        if size > SHARD:
            shards, size = [*shards, {}], 0
        shards[-1][name] = (shape, "bfloat16")
        size += 2 * math.prod(shape)
    numbers = {name: number for number, name in enumerate(found)}
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05}-of-{len(shards):05}.safetensors"
        write_safetensors(directory / file, shard, lambda n: tensor(found[n], numbers[n], tuned))
        weight_map |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def config(directory, arguments):
    content = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.inner,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": arguments.vocabulary,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(content))


def peak(pid, found, done):
    """Largest sum of the peaks of a process and of those descendants that live at the same time, until told to stop."""
    while not done.is_set():
        todo, total = [pid], 0
        while todo:
            one = todo.pop()
            try:
                status = Path(f"/proc/{one}/status").read_text()
                todo += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
            except OSError:
                continue
            line = next((line for line in status.splitlines() if line.startswith("VmHWM")), "VmHWM 0")
            total += int(line.split()[1]) * 1024
        found.append(total)
        time.sleep(0.05)


def update(folder, base, tuned, arguments, output):
    """Seconds of the clock, seconds of the processor, and memory of the command and its workers."""
    command = [sys.executable, "-m", "nla_llm", "update", base, tuned, "--rank", arguments.rank, "-o", output]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(list(map(str, command)), cwd=folder, stdout=subprocess.DEVNULL)  # noqa: S603 - our own
    found, done = [0], threading.Event()
    watcher = threading.Thread(target=peak, args=(process.pid, found, done))
    watcher.start()
    code = process.wait()
    done.set()
    watcher.join()
    assert code == 0, f"the command ended with {code}"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, used, max(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"hidden": 2048, "inner": 5632, "vocabulary": 32000, "layers": 9, "rank": 16}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", type=Path, help="where to put the checkpoints; a temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        found = shapes(arguments.hidden, arguments.inner, arguments.vocabulary, arguments.layers)
        for which in ("base", "tuned"):
            write(folder / which, found, which == "tuned")
            config(folder / which, arguments)
            write(folder / f"small-{which}", {"model.layers.0.q_proj.weight": (48, 32)}, which == "tuned")
        size = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
        largest = max(2 * math.prod(shape) for shape in found.values())
        _, _, least = update(folder, "small-base", "small-tuned", arguments, "small-adapter")
        seconds, used, memory = update(folder, "base", "tuned", arguments, "adapter")
        print(f"two checkpoints of {size / 1e9:.2f} GB, rank {arguments.rank}, {os.cpu_count()} cores,", end=" ")
        print(f"OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')}, load {os.getloadavg()[0]:.1f}")
        print(
            f"{seconds:.0f} s, {used:.0f} s of processor time; largest tensor {largest / 1e6:.0f} MB; memory "
            f"{memory / 1e6:.0f} MB, of which the same"
        )
        print(
            f"command on a few kilobytes takes {least / 1e6:.0f} MB: {(memory - least) / largest:.2f} times that tensor"
        )
        try:
            import transformers  # noqa: PLC0415 - optional
            from peft import PeftModel  # noqa: PLC0415 - optional
        except ImportError:
            print("PEFT is not installed: the adapter was not loaded")
            return
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype="bfloat16")
        loaded = PeftModel.from_pretrained(model, folder / "adapter")
        print(f"PEFT loads the adapter: {sum('lora_A' in n for n, _ in loaded.named_parameters())} modules")


if __name__ == "__main__":
    main()
