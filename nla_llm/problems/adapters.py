"""Low-rank adapters on disk: read in the layouts in use, written in that of PEFT or in the one they came in."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import numpy as np
from safetensors import safe_open

from nla_llm.problems._writing import published, write_file, write_safetensors
from nla_llm.problems.checkpoint import CheckpointError, open_safetensors, read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from os import PathLike

    from numpy.typing import NDArray

    from nla_llm.problems.checkpoint import TensorFiles
    from nla_llm.problems.pair import Kind

__all__ = ["Adapter", "Module", "PeftModule", "open_adapter", "write_peft"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# layout -> what the names of the two factors end with: the one that is applied first, the one that is applied last
_LAYOUTS = {
    "PEFT": (r"\.lora_A(\.\w+)?\.weight$", r".lora_B\1.weight"),
    "PEFT embedding": (r"\.lora_embedding_A(\.\w+)?$", r".lora_embedding_B\1"),
    "loralib": (r"\.lora_A$", ".lora_B"),
    "kohya": (r"\.lora_down\.weight$", ".lora_up.weight"),
    "diffusers": (r"(\.lora|_lora|\.lora_linear_layer)\.down\.weight$", r"\1.up.weight"),
    "cloneofsimo": (r":down$", ":up"),
}


class Module(NamedTuple):
    """Where an adapter holds the factors of one module, and the factor by which they are scaled."""

    layout: str
    down: str
    up: str
    alpha: str | None  # name of a tensor
    scale: float


@final
class Adapter:
    """The modules of an adapter, whose factors are read when they are asked for.

    Attributes
    ----------
    modules : dict of Module
        By name.
    left_out : dict of str
        Tensors that belong to no pair of factors, with the reason.
    """

    def __init__(self, files: TensorFiles, directory: Path | None, config: dict[str, Any]) -> None:
        self.files, self.directory, self.config = files, directory, config
        self.modules: dict[str, Module] = {}
        self.left_out: dict[str, str] = {}
        self._sort()

    def factors(self, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """``left`` (d_out, r) and ``right`` (d_in, r), with ΔW = scale · left rightᵀ, in float64; kernels flattened."""
        module = self.modules[name]
        up, down = (self._matrix(tensor) for tensor in (module.up, module.down))
        return (down.T, up) if module.layout == "PEFT embedding" else (up, down.T)

    def stored_dtype(self, name: str) -> str:
        """Dtype in which the factors of a module are stored."""
        return self.files.stored_dtype(self.modules[name].up)

    def metadata(self) -> dict[str, str]:
        """Metadata in the header of the file."""
        with safe_open(self.file, framework="numpy") as file:
            return dict(file.metadata() or {})

    @property
    def file(self) -> Path:
        """The file of the factors."""
        return self.files.file(self.files.names()[0])

    def _matrix(self, tensor: str) -> NDArray[Any]:
        values = self.files.tensor(tensor, np.float64)
        return values.reshape(values.shape[0], -1)

    def _sort(self) -> None:
        """Find pairs of factors; say of every other tensor why it is left out."""
        used: set[str] = set()
        for down in self.files.names():
            for layout, (first, last) in _LAYOUTS.items():
                found = re.search(first, down)
                if found is None:
                    continue
                name, up = down[: found.start()], down[: found.start()] + found.expand(last)
                alpha = f"{name}.alpha" if f"{name}.alpha" in self.files else None
                reason = self._misfit(name, down, up)
                if reason:
                    self.left_out[down] = reason
                else:
                    self.modules[name] = Module(layout, down, up, alpha, self._scale(name, down, alpha))
                    used |= {down, up, *([alpha] if alpha else ())}
                break
        for tensor in self.files.names():
            if tensor not in used and tensor not in self.left_out:
                self.left_out[tensor] = "no factor of a low-rank pair"

    def _misfit(self, name: str, down: str, up: str) -> str:
        """Why a factor is no half of a pair; empty where it is."""
        if up not in self.files:
            return "its other factor is missing"
        if f"{name}.lora_mid.weight" in self.files:
            return "a product of three factors"
        if f"{name}.dora_scale" in self.files or any(
            f"{name}.lora_magnitude_vector{end}" in self.files for end in ("", ".weight", ".default.weight")
        ):
            return "a low-rank pair with norms of its own (DoRA)"
        shapes = self.files.shape(down), self.files.shape(up)
        if any(len(shape) < 2 or 0 in shape for shape in shapes):
            return "not a matrix"
        width = shapes[1][1] if len(shapes[1]) == 2 or math.prod(shapes[1][2:]) == 1 else 0
        if width != shapes[0][0]:
            return f"of shapes {shapes[0]} and {shapes[1]}, which do not multiply"
        return ""

    def _scale(self, name: str, down: str, alpha: str | None) -> float:
        rank = self.files.shape(down)[0]
        if alpha is not None:
            return float(self.files.tensor(alpha, np.float64)) / rank
        if not self.config:
            return 1.0
        short = name.removeprefix("base_model.model.")
        value = _by_pattern(self.config.get("alpha_pattern"), short, self.config.get("lora_alpha", rank))
        return float(value) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def _by_pattern(pattern: Any, name: str, default: Any) -> Any:
    """Value of the first entry whose key ends the name, as PEFT looks it up."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def open_adapter(path: str | PathLike[str]) -> Adapter:
    """An adapter: a safetensors file, or a directory with adapter_model.safetensors and adapter_config.json.

    Understood are the layouts of PEFT, loralib, kohya, diffusers and cloneofsimo. Where neither the file nor a
    configuration tells the scale alpha/r, it is taken as one.

    Raises
    ------
    CheckpointError
        If there is no such file, it is damaged or pickled, or holds no pair of low-rank factors.
    """
    path = Path(path)
    config: dict[str, Any] = {}
    file = path
    if path.is_dir():
        files = [path / WEIGHTS] if (path / WEIGHTS).is_file() else sorted(path.glob("*.safetensors"))
        pickled = sorted(path.glob("adapter_model.bin"))
        if len(files) != 1:
            if pickled and not files:
                open_safetensors(pickled[0])  # raises, with how to convert it
            raise CheckpointError(f"{path} holds {len(files)} safetensors files; pass the file of the adapter")
        file = files[0]
    beside = file.parent / CONFIG
    if beside.is_file() and (path.is_dir() or file.name == WEIGHTS):
        config = read_json(beside, missing="")
    found = Adapter(open_safetensors(file), path if path.is_dir() else None, config)
    if not found.modules:
        some = ", ".join(f"{name} ({reason})" for name, reason in list(found.left_out.items())[:3])
        raise CheckpointError(
            f"{file} holds no pair of low-rank factors in a known layout; it holds {some or 'nothing'}"
        )
    return found


def write_smaller(
    adapter: Adapter,
    directory: Path,
    ranks: Mapping[str, int],
    factors: Callable[[str], tuple[NDArray[Any], NDArray[Any]]],
    *,
    force: bool = False,
) -> None:
    """Write an adapter with other factors, in the layout and the dtypes it came in; what it held besides is kept.

    Parameters
    ----------
    adapter : Adapter
    directory : Path
        That will exist afterwards, or not at all.
    ranks : mapping of int
        Rank of every module.
    factors : callable
        ``factors(name)`` gives left (d_out, r) and right (d_in, r) with ΔW = left rightᵀ where the file or its
        configuration says the scale, and without that scale where it does not.
    force : bool
        Whether to take the place of what is there.
    """
    files = adapter.files
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    made: dict[str, tuple[str, str]] = {}
    for name, module in adapter.modules.items():
        r = ranks[name]
        up, down = files.shape(module.up), files.shape(module.down)
        made |= {module.down: (name, "down"), module.up: (name, "up")}
        shapes[module.down] = (r, *down[1:]), files.stored_dtype(module.down)
        shapes[module.up] = (up[0], r, *up[2:]), files.stored_dtype(module.up)
        if module.alpha is not None:
            made[module.alpha] = (name, "alpha")
            shapes[module.alpha] = files.shape(module.alpha), files.stored_dtype(module.alpha)
    kept = [tensor for tensor in files.names() if tensor not in made and files.stored_dtype(tensor) in _KEPT]
    shapes |= {tensor: (files.shape(tensor), files.stored_dtype(tensor)) for tensor in kept}

    def tensor(key: str) -> NDArray[Any]:
        if key not in made:
            return files.tensor(key, np.float64)
        name, part = made[key]
        if part == "alpha":
            return np.full(shapes[key][0], float(ranks[name]))
        left, right = factors(name)
        if adapter.modules[name].layout == "PEFT embedding":
            left, right = right, left
        return (left if part == "up" else right.T).reshape(shapes[key][0])

    metadata = adapter.metadata()
    for name, rank in ranks.items():
        if f"{name}:rank" in metadata:
            metadata[f"{name}:rank"] = str(rank)
    with published(directory, force=force) as aside:
        write_safetensors(aside / adapter.file.name, shapes, tensor, metadata)
        if adapter.config:
            short = {name.removeprefix("base_model.model."): rank for name, rank in ranks.items()}
            patterns = _patterns(short)
            _write_json(aside / CONFIG, adapter.config | patterns | {"use_rslora": False})


_KEPT = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class PeftModule:
    """The update of one weight in an adapter to be written: its name, the kind and shape of its tensor, its rank.

    Examples
    --------
    >>> PeftModule("lm_head.weight", "linear", (30, 20), 4).module
    'lm_head'
    """

    weight: str
    kind: Kind
    shape: tuple[int, ...]
    rank: int

    @property
    def module(self) -> str:
        """Name of the module."""
        return self.weight.removesuffix(".weight")

    def tensors(self) -> list[tuple[str, tuple[int, ...], int]]:
        """Name, shape and source of PEFT's A and B: 0 for the factor on the side of the rows, 1 for the other."""
        key, r = f"base_model.model.{self.module}", self.rank
        rows, columns = self.shape[0], math.prod(self.shape[1:])
        match self.kind:
            case "embedding":  # stored as (vocabulary, width); PEFT adds (B A)ᵀ
                return [(f"{key}.lora_embedding_A", (r, rows), 0), (f"{key}.lora_embedding_B", (columns, r), 1)]
            case "transposed":
                return [(f"{key}.lora_A.weight", (r, rows), 0), (f"{key}.lora_B.weight", (columns, r), 1)]
            case _:
                ones = (1,) * (len(self.shape) - 2)  # a kernel: A is one with fewer outputs, B of width one
                return [
                    (f"{key}.lora_A.weight", (r, *self.shape[1:]), 1),
                    (f"{key}.lora_B.weight", (rows, r, *ones), 0),
                ]


def write_peft(
    directory: Path,
    modules: list[PeftModule],
    factors: Callable[[str], tuple[NDArray[Any], NDArray[Any]]],
    *,
    dtype: str = "float32",
    base: str = "",
    force: bool = False,
) -> None:
    """Write an adapter that ``peft.PeftModel.from_pretrained`` loads; every scale alpha/r is one.

    Parameters
    ----------
    directory : Path
        That will exist afterwards, or not at all.
    modules : list of PeftModule
    factors : callable
        ``factors(weight)`` gives left (rows, r) and right (columns, r) of the update of the tensor as it is stored.
    dtype : {"float32", "float16", "bfloat16"}
    base : str
        Path or name of the base model, for the configuration.
    force : bool
        Whether to take the place of what is there.

    Raises
    ------
    ValueError
        If there is no module.
    FileExistsError
        If the directory exists, without ``force``.
    """
    if not modules:
        raise ValueError("an adapter needs a module: no matrix has an update of rank one or more that it can hold")
    shapes, source = {}, {}
    for module in modules:
        a, b = module.tensors()
        for (key, shape, side), transposed in ((a, True), (b, False)):
            shapes[key] = shape, dtype
            source[key] = module.weight, side, transposed

    def tensor(key: str) -> NDArray[Any]:
        weight, side, transposed = source[key]
        values = factors(weight)[side]
        return (values.T if transposed else values).reshape(shapes[key][0])

    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base or None,
        "inference_mode": True,
        "target_modules": [module.module for module in modules],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(module.kind == "transposed" for module in modules),
        "init_lora_weights": True,
        "use_rslora": False,
        "modules_to_save": None,
        **_patterns({module.module: module.rank for module in modules}),
    }
    with published(directory, force=force) as aside:
        write_safetensors(aside / WEIGHTS, shapes, tensor, {"format": "pt"})
        _write_json(aside / CONFIG, config)


def _patterns(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Entries of the configuration that give every module its rank and a scale of one."""
    common = max(ranks.values())
    # PEFT takes a key for the end of a name, unless it begins with ^
    exact = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    return {"r": common, "lora_alpha": common, "rank_pattern": exact, "alpha_pattern": exact}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_file(path, lambda stream: stream.write(json.dumps(content, indent=2).encode() + b"\n"))
