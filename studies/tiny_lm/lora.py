"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on the model's linear maps; their files in PEFT's layout."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from model import LanguageModel, write_json
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, the customary name

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # PEFT's name for the wrapped model


class LoRALinear(nn.Module):
    """A frozen linear map W and the update s B A, with s = alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).

    A (rank, inputs) is drawn as nn.Linear draws its weight, uniform on ±1/sqrt(inputs); B (outputs, rank) is zero.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(requires_grad=False), alpha / math.sqrt(rank)
        bound = linear.in_features**-0.5
        self.lora_A = nn.Parameter(torch.empty(rank, linear.in_features).uniform_(-bound, bound, generator=generator))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., inputs) to (..., outputs)."""
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)

    def update(self) -> Tensor:
        """Return s B A, (outputs, inputs)."""
        return self.scale * self.lora_B.detach() @ self.lora_A.detach()


def linear_maps(model: LanguageModel) -> Iterator[tuple[str, nn.ModuleDict, str]]:
    """Yield (name of the weight, the dictionary that holds the map, its key) for all linear maps of the layers."""
    for i, layer in enumerate(model.model.layers):
        for part in ("self_attn", "mlp"):
            for key in getattr(layer, part):
                yield f"model.layers.{i}.{part}.{key}.weight", getattr(layer, part), key


def freeze_all_but_linear_maps(model: LanguageModel) -> LanguageModel:
    """Leave the matrices of the layers to train; embedding and norms stay, as they do under LoRA."""
    model.requires_grad_(requires_grad=False)
    for _, holder, key in linear_maps(model):
        holder[key].requires_grad_()
    return model


def add_adapters(model: LanguageModel, rank: int, alpha: float, seed: int) -> LanguageModel:
    """Put an adapter on every linear map of the layers, in place; nothing else asks for gradients."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(requires_grad=False)
    for _, holder, key in list(linear_maps(model)):
        holder[key] = LoRALinear(holder[key], rank, alpha, generator)
    return model


def merge_adapters(model: LanguageModel) -> LanguageModel:
    """Replace every adapted map by the plain one with weight W + s B A, in place."""
    for _, holder, key in list(linear_maps(model)):
        if isinstance(holder[key], LoRALinear):
            update, holder[key] = holder[key].update(), holder[key].linear
            holder[key].weight.data += update
    return model


def save_adapters(model: LanguageModel, directory: Path, alpha: float, dtype: torch.dtype = torch.float16) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which peft.PeftModel reads."""
    directory.mkdir(parents=True, exist_ok=True)
    state, rank = {}, 0
    for name, holder, key in linear_maps(model):
        stem, rank = PREFIX + name.removesuffix(".weight"), holder[key].lora_A.shape[0]
        state[f"{stem}.lora_A.weight"] = holder[key].lora_A.detach().to(dtype).contiguous()
        state[f"{stem}.lora_B.weight"] = holder[key].lora_B.detach().to(dtype).contiguous()
    safetensors.torch.save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "use_rslora": True}
    config |= {"lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "target_modules": list(TARGETS)}
    config |= {"base_model_name_or_path": "tiny_lm", "inference_mode": True, "init_lora_weights": True}
    write_json(directory / "adapter_config.json", config)


def load_adapters(model: LanguageModel, directory: Path) -> LanguageModel:
    """Add what save_adapters wrote to a model without adapters, in place, in the model's dtype."""
    config = json.loads((directory / "adapter_config.json").read_text())
    state = safetensors.torch.load_file(directory / "adapter_model.safetensors")
    add_adapters(model, config["r"], config["lora_alpha"], seed=0)
    for name, holder, key in linear_maps(model):
        stem = PREFIX + name.removesuffix(".weight")
        holder[key].lora_A.data.copy_(state[f"{stem}.lora_A.weight"])
        holder[key].lora_B.data.copy_(state[f"{stem}.lora_B.weight"])
    return model
