"""The study behind ``nla-llm update``: what a fine-tune changed, and what of it fits into a low rank."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, final

import numpy as np

from nla_llm.cli.update_figures import figures_of
from nla_llm.cli.update_tables import claims_of, tables_of
from nla_llm.methods.update.lora.allocation import Layer, allocate
from nla_llm.problems import open_safetensors
from nla_llm.problems._writing import write_safetensors
from nla_llm.study import Skip, Study
from nla_llm.study.frames import succeeded
from nla_llm.study.updates import Factors, Wanted, matrix_records, vector_records

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from nla_llm.problems.pair import Pair, Plan
    from nla_llm.study import Cell

__all__ = ["RANKS", "Audit", "Inputs", "update_study", "within_budget"]

RANKS = (1, 4, 16, 64)
TAKES_INPUTS = ("linear", "convolution")  # an embedding, and Conv1D of GPT-2, have their inputs on the other side
_PROBE = 64  # singular values looked at first to share out a budget
REFERENCES = (
    "C. Eckart and G. Young, The approximation of one matrix by another of lower rank, Psychometrika 1, 1936.",
    "L. Mirsky, Symmetric gauge functions and unitarily invariant norms, Quarterly Journal of Mathematics 11, 1960.",
    "E. J. Hu et al., LoRA: low-rank adaptation of large language models, 2021, arXiv 2106.09685.",
    "M. Gavish and D. L. Donoho, The optimal hard threshold for singular values is 4/√3, 2014, arXiv 1305.5870.",
    "R. Shuttleworth et al., LoRA vs full fine-tuning: an illusion of equivalence, 2024, arXiv 2410.21228.",
    (
        "A. S. Bandeira and R. van Handel, Sharp nonasymptotic bounds on the norm of random matrices with independent "
        "entries, 2016, arXiv 1408.6185."
    ),
)


@final
@dataclass(frozen=True)
class Inputs:
    """Activations that enter a layer, by the name of its weight or of its module, (..., d_in)."""

    path: Path

    def of(self, weight: str) -> NDArray[Any] | None:
        """Activations of a layer as (samples, d_in); None where the file has none."""
        files = open_safetensors(self.path)
        name = next((n for n in (weight, weight.removesuffix(".weight")) if n in files), None)
        if name is None:
            return None
        values = files.tensor(name, None)
        return values.reshape(-1, values.shape[-1])

    def check(self, plan: Plan) -> None:
        """Check that some layer is named, and that widths agree.

        Raises
        ------
        ValueError
            If no name is that of a matrix, or an array has another width than its matrix.
        """
        files = open_safetensors(self.path)
        widths = {
            name: int(np.prod(found.shape[1:])) for name, found in plan.tensors.items() if found.kind in TAKES_INPUTS
        }
        known = {key: width for name, width in widths.items() for key in (name, name.removesuffix(".weight"))}
        matched = [name for name in files.names() if name in known]
        if not matched:
            raise ValueError(
                f"--inputs {self.path} names no matrix of the pair that acts on inputs from the right; it holds "
                f"{', '.join(files.names()[:3])}, "
                f"a matrix is {next(iter(widths), 'nowhere')}"
            )
        for name in matched:
            shape = files.shape(name)
            if len(shape) < 2 or shape[-1] != known[name]:
                raise ValueError(
                    f"--inputs {self.path}: {name!r} has shape {shape}, its matrix takes (samples, {known[name]})"
                )


@final
@dataclass(frozen=True)
class Audit:
    """What is asked of a pair, as a worker needs to know it.

    ``ranks`` are those of every matrix, ``own`` that of single ones, which a budget decides; ``parts`` is where factors
    wait for the adapter to be written.
    """

    pair: Pair
    stamp: str
    ranks: tuple[int, ...] = ()
    own: tuple[tuple[str, int], ...] = ()
    tolerance: float | None = None
    norm: str = "frobenius"
    inputs: Inputs | None = None
    dtype: str | None = None
    parts: Path | None = None

    def cells(self, plan: Plan) -> list[dict[str, Any]]:
        """A cell for each tensor, those that are left out with the reason."""
        own, cells = dict(self.own), []
        for tensor, found in plan.tensors.items():
            cell: dict[str, Any] = {"tensor": tensor, "data": found.digest, "bytes": found.nbytes}
            if found.equal:
                cell["left_out"] = "equal in BASE and TUNED: there is no update"
            elif found.kind == "vector":
                cell["barred"] = found.barred
            else:
                ranks = (own[tensor],) if tensor in own else self.ranks
                cell |= {"kind": found.kind, "barred": found.barred, "ranks": ",".join(map(str, ranks))}
                cell |= {"tolerance": self.tolerance, "norm": self.norm} if self.tolerance else {}
                cell |= {"dtype": self.dtype} if self.dtype else {}
                x = self.inputs_of(tensor, found.kind)
                cell |= {"inputs": _digest(x)} if x is not None else {}
            cells.append(cell)
        return cells + [{"tensor": name, "left_out": reason, "bytes": 0} for name, reason in plan.left_out.items()]

    def inputs_of(self, tensor: str, kind: str) -> NDArray[Any] | None:
        """Activations of a layer, where there are some and its matrix is stored as (d_out, d_in)."""
        return self.inputs.of(tensor) if self.inputs is not None and kind in TAKES_INPUTS else None

    def part(self, cell: Cell) -> Path | None:
        """Where the factors of a cell wait; None where none are kept."""
        if self.parts is None or "kind" not in cell or cell.get("barred") or "left_out" in cell:
            return None
        facts = json.dumps({key: value for key, value in cell.items() if key != "study"}, sort_keys=True)
        return self.parts / f"{hashlib.sha256(facts.encode()).hexdigest()[:24]}.safetensors"

    def measure(self, cell: Cell, seed: int) -> list[dict[str, Any]]:
        """Records of one tensor; its factors are written on the way."""
        if cell.get("left_out"):
            raise Skip(str(cell["left_out"]))
        if self.pair.stamp() != self.stamp:
            raise RuntimeError("the checkpoints were changed during the run: start it again")
        tensor = self.pair.open(str(cell["tensor"]))
        if "kind" not in cell:
            return vector_records(tensor)
        wanted = Wanted(
            ranks=tuple(int(rank) for rank in str(cell["ranks"]).split(",") if rank),
            tolerance=self.tolerance,
            norm=self.norm,
            dtype=self.dtype,
            inputs=self.inputs_of(tensor.name, str(cell["kind"])),
        )
        records, factors = matrix_records(tensor, wanted, seed)
        if (part := self.part(cell)) is not None:
            part.parent.mkdir(parents=True, exist_ok=True)
            _write_part(part, factors)
        return records


def update_study(name: str, audit: Audit, plan: Plan, cells: list[dict[str, Any]] | None = None) -> Study:
    """Study of the difference of two checkpoints, to be run like any other; what it leaves out it skips, with reasons.

    Parameters
    ----------
    name : str
        Name of the report.
    audit : Audit
    plan : Plan
    cells : list of dict, optional
        Some of the cells.
    """
    return Study(
        name=name,
        title=f"What the update changed: {name.removeprefix('update-')}",
        question=(
            "Which rank does the update of each weight matrix need, by every rule in use, what is lost at that rank, "
            "and what of the update is only the noise of its storage?"
        ),
        setup=_setup(audit, plan),
        cells=partial(_cells, audit.cells(plan) if cells is None else cells),
        measure=audit.measure,
        figures=figures_of,
        tables=tables_of,
        claims=claims_of,
        references=REFERENCES,
        size=_size,
    )


def _cells(grid: list[dict[str, Any]], _scale: str) -> list[dict[str, Any]]:
    return grid


def _size(cell: Cell) -> int:
    return int(cell.get("bytes") or 0)


def _setup(audit: Audit, plan: Plan) -> str:
    base, tuned = (path.resolve().name for path in (audit.pair.base, audit.pair.tuned))
    matrices = sum(found.kind != "vector" for found in plan.tensors.values())
    stored = f" Errors are those of the factors as they are stored, in {audit.dtype}." if audit.dtype else ""
    return (
        f"Base {base}, tuned {tuned}: {matrices} matrices that both hold with the same shape; kernels of "
        "convolutions are "
        "matrices with a row for each output. The difference is formed from the stored values. Up to the smaller "
        "dimension 1024 all its singular values are computed; of larger matrices the leading ones by block "
        "Lanczos, and "
        f"what that leaves is bracketed: ranks are then ranges.{stored} Doing nothing, a zero update, has error 1.\n\n"
        "Storage rounds weights to a grid. If entries of the trained update are independent and normal, of the size "
        "that explains the stored difference, then so large a share of them does not change, so much of the update "
        "survives, and the rest is noise of that size. Of two histories of the pair, the base being what training "
        "started from or a rounded copy of it, the one is taken that explains the share of unchanged entries, or "
        "else the median singular value."
    )


def within_budget(plan: Plan, audit: Audit, budget: int, run: Callable[[Audit], pd.DataFrame]) -> dict[str, int]:
    """Ranks that share out a budget of parameters among the matrices that an adapter can hold.

    Parameters
    ----------
    plan : Plan
    audit : Audit
    budget : int
        Parameters of the adapter.
    run : callable
        Measures the pair with the ranks of an audit, and gives the records.

    Raises
    ------
    ValueError
        If not even one matrix gets a rank of one.
    """
    shapes = {
        name: (found.shape[0], int(np.prod(found.shape[1:])))
        for name, found in plan.tensors.items()
        if found.kind != "vector" and not found.equal and not found.barred
    }
    sizes = {name: sum(shape) for name, shape in shapes.items()}
    if not sizes or budget < min(sizes.values()):
        least = min(sizes.values(), default=0)
        raise ValueError(f"--budget {budget} is below the {least} parameters of the smallest matrix at rank one")
    caps = {name: min(*shapes[name], budget // size) for name, size in sizes.items()}
    probed = {name: min(_PROBE, cap) for name, cap in caps.items()}
    while True:
        records = run(replace(audit, own=tuple((name, max(rank, 1)) for name, rank in probed.items())))
        found = records[records["what"] == "tensor"].set_index("tensor")["leading"]
        layers = [Layer(json.loads(found[name])[: probed[name]], *shapes[name]) for name in sizes]
        ranks = dict(zip(sizes, allocate(layers, budget, "energy_per_parameter"), strict=True))
        short = [name for name, rank in ranks.items() if rank == probed[name] < caps[name]]
        if not short:
            return ranks
        probed |= {name: min(2 * probed[name], caps[name]) for name in short}


def _write_part(path: Path, factors: Factors) -> None:
    arrays = {"left": factors.left, "right": factors.right}
    write_safetensors(path, {key: (a.shape, a.dtype.name) for key, a in arrays.items()}, arrays.__getitem__)


def read_part(path: Path, rank: int | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Left and right factor of a part."""
    files = open_safetensors(path)
    left, right = (files.tensor(key, None) for key in ("left", "right"))
    return left[:, :rank], right[:, :rank]


def _digest(values: NDArray[Any]) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).data).hexdigest()[:16]


def ranks_of(records: pd.DataFrame) -> Mapping[str, int]:
    """Rank of the stored factors of every matrix."""
    part = succeeded(records, what="tensor").reindex(columns=["tensor", "rank"])
    return {str(name): int(rank) for name, rank in zip(part["tensor"], part["rank"], strict=True)}
