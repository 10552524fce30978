"""Updates of the embedded model: one full fine-tuning on another domain, and LoRA of several ranks on the same text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from nla_llm.operators import LowRank
from nla_llm.problems._heldout import Heldout
from nla_llm.problems.adapters import open_adapter
from nla_llm.problems.checkpoint import open_safetensors, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["EmbeddedUpdates", "embedded_updates"]

_PREFIX = "base_model.model."  # PEFT's name for the model that it wraps


@final
@dataclass(frozen=True)
class EmbeddedUpdates:
    """Updates of the linear maps of all layers, and text of the domain that they are for.

    The text is docstrings of NumPy, SciPy and SymPy; studies/tiny_lm/finetune.py made both. Weights are named as those
    of the model; values are in float32, from stored float16.

    Parameters
    ----------
    directory
        Holds full-0.safetensors, a folder lora-RANK-SEED in PEFT's layout for each adapter, heldout.npz, training.json.

    Examples
    --------
    >>> updates = embedded_updates()
    >>> updates.full["model.layers.0.self_attn.k_proj.weight"].shape
    (64, 192)
    >>> updates.adapter(4, seed=1)["model.layers.0.self_attn.k_proj.weight"]
    LowRank(64, 192)
    """

    directory: Path

    @cached_property
    def full(self) -> Mapping[str, NDArray[np.float32]]:
        """Name of a weight → its update (d_out, d_in) by the full fine-tuning."""
        tensors = open_safetensors(self.directory / "full-0.safetensors")
        return {name: tensors.tensor(name) for name in tensors.names()}

    @cached_property
    def adapters(self) -> list[tuple[int, int]]:
        """Rank and seed of every adapter."""
        found = (re.fullmatch(r"lora-(\d+)-(\d+)", path.name) for path in self.directory.iterdir())
        return sorted((int(m[1]), int(m[2])) for m in found if m)

    def adapter(self, rank: int, seed: int = 0) -> dict[str, LowRank]:
        """Name of a weight → its update s·B·A by LoRA, with the factors s·B (d_out, rank) and Aᵀ (d_in, rank).

        The scale s = α/√rank (Kalajdzievski 2023, arXiv 2312.03732) is part of the left factor.

        Raises
        ------
        ValueError
            If there is no such adapter.
        """
        if (rank, seed) not in self.adapters:
            raise ValueError(f"no adapter of rank {rank} and seed {seed}; (rank, seed) is one of {self.adapters}")
        found = open_adapter(self.directory / f"lora-{rank}-{seed}")
        updates = {}
        for name, module in found.modules.items():
            left, right = found.factors(name)
            factors = (a.astype(np.float32) for a in (module.scale * left, right))
            updates[f"{name.removeprefix(_PREFIX)}.weight"] = LowRank(*factors)
        return updates

    @cached_property
    def heldout(self) -> Heldout:
        """Pieces of 1024 tokens of files that were neither trained nor tuned on, ``heldout.piece(index, n)``."""
        return Heldout(self.directory / "heldout.npz")

    @cached_property
    def record(self) -> dict[str, Any]:
        """How the updates were made: text, options, search of the learning rates, curves, losses."""
        return read_json(self.directory / "training.json", missing="the record of the fine-tuning is gone")


@cache
def embedded_updates() -> EmbeddedUpdates:
    """The shipped updates; the same object at every call.

    Examples
    --------
    >>> embedded_updates().adapters[:2]
    [(1, 0), (1, 1)]
    >>> embedded_updates().heldout.piece(0, 16).shape
    (16,)
    """
    return EmbeddedUpdates(Path(str(files("nla_llm") / "data" / "tiny_lm_updates")))
