"""What the study of fitted features measures: errors of fixed and of fitted maps on tokens seen and not seen."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import nla_llm as nl
from nla_llm.problems import embedded
from nla_llm.study.frames import succeeded
from nla_llm.study.measuring import operators

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray


STEPS = (5, 20, 40, 160, 640)  # of a fit, after which it is judged
CALIBRATION, UNSEEN = (1, 2, 3, 4), (0, 6)  # pieces of held-out text; of the latter one window each
FIXED = {
    "uniform": ("uniform", {}),
    "random keys": ("random_keys", {}),
    "optimal rank": ("optimal_rank", {}),
    "elu + 1": ("elu_features", {}),
    "Hedgehog, unfitted": ("fitted_features", {}),
    "positive, orthogonal": ("positive_features", {"directions": "orthogonal"}),
}
START, FLOOR = "Hedgehog, unfitted", "optimal rank"
MAPS = (START, "elu + 1", "positive, orthogonal")
ERRORS = {"frobenius": "Frobenius error of P", "spectral": "spectral error of P", "output": "error of P v"}


# -- what is measured --------------------------------------------------------------------------------------------------


@cache
def captured(n: int, piece: int, start: int) -> list[nl.AttentionProblem]:
    """Attention problems of all layers on one window of held-out text."""
    return embedded.embedded_model().capture(embedded.heldout_tokens(None, piece)[start : start + n])


def window(n: int, piece: int, start: int, layer: int, mask: str) -> nl.AttentionProblem:
    """The problem of one layer, with or without its mask."""
    p = captured(n, piece, start)[layer]
    return p if mask == "causal" else p.unmasked()


def calibration(n: int, count: int, layer: int, mask: str) -> list[nl.AttentionProblem]:
    """The first windows of the calibration text, one from each piece in turn."""
    places = [(piece, start) for start in range(0, 1024 - n + 1, n) for piece in CALIBRATION]
    return [window(n, *place, layer, mask) for place in places[:count]]


def unseen(n: int, layer: int, mask: str) -> list[nl.AttentionProblem]:
    """Windows of texts that no fit sees."""
    return [window(n, piece, 0, layer, mask) for piece in UNSEEN]


class Exact(NamedTuple):
    """Exact attention and its size in the three errors, head by head."""

    dense: NDArray[Any]
    output: NDArray[Any]
    sizes: dict[str, NDArray[Any]]


@cache
def exact_windows(n: int, layer: int, mask: str, kind: str) -> list[tuple[nl.AttentionProblem, Exact]]:
    """The windows on which fits are judged: of the calibration the first, which every fit has seen."""
    judged = unseen(n, layer, mask) if kind == "unseen" else calibration(n, 1, layer, mask)
    return [(p, exact_of(p)) for p in judged]


def exact_of(p: nl.AttentionProblem) -> Exact:
    """Exact attention in float64."""
    dense = p.exact().dense()
    output = dense @ p.v.astype(np.float64)
    return Exact(dense, output, sizes(dense, output))


def sizes(matrix: NDArray[Any], output: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Norms of a matrix and of an output, head by head."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return {
        "frobenius": np.linalg.norm(values, axis=-1),
        "spectral": values[..., 0],
        "output": np.linalg.norm(output, axis=(-2, -1)),
    }


def judge(method: Any, cell: dict[str, Any], kind: str, seed: int) -> list[dict[str, float]]:
    """Relative errors of every head: medians over draws, means over windows."""
    found = []
    for p, exact in exact_windows(cell["n"], cell["layer"], cell["mask"], kind):
        draws = []
        for op in operators(p, method, draws=cell.get("draws", 1), seed=seed):
            matrix = exact.dense - op.dense()
            error = sizes(matrix, matrix @ p.v.astype(np.float64))
            draws.append([np.ravel(error[name] / exact.sizes[name]) for name in ERRORS])
        found.append(np.median(draws, axis=0))
    return [dict(zip(ERRORS, map(float, head), strict=True)) for head in np.mean(found, axis=0).T]


def measure(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Errors of every head on tokens of the calibration and on others, before the fit and after some steps of it."""
    if cell["what"] == "fixed":
        name, options = FIXED[cell["label"]]
        method = nl.method(name, **options) if cell["m"] is None else nl.method(name, m=cell["m"], **options)
        return records_of(method, cell, seed, steps=0)
    method, before, found = nl.method("fitted_features", m=cell["m"]), 0, []
    problems = calibration(cell["n"], cell["windows"], cell["layer"], cell["mask"])
    for steps in (s for s in STEPS if s <= cell["steps_at_most"]):
        method, before = method.fit(*problems, steps=steps - before), steps
        found += records_of(method, cell, seed, steps=steps)
    return found


def records_of(method: Any, cell: dict[str, Any], seed: int, *, steps: int) -> list[dict[str, Any]]:
    """One record for each head and kind of tokens."""
    return [
        {"tokens": kind, "steps": steps, "head": head, **error}
        for kind in ("unseen", "calibration")
        for head, error in enumerate(judge(method, cell, kind, seed))
    ]


# -- what the records say ----------------------------------------------------------------------------------------------

HEAD = ["mask", "layer", "head", "tokens"]


def closed(records: pd.DataFrame, start: str = START) -> pd.DataFrame:
    """Records of the fits with the share that they close of the gap between a fixed map and the best of that rank.

    Columns ``share_`` and the error.
    """
    fixed, fits = succeeded(records, what="fixed"), succeeded(records, what="fit")
    return with_shares(fits, fixed, start)


def with_shares(shown: pd.DataFrame, fixed: pd.DataFrame, start: str = START) -> pd.DataFrame:
    """Any records beside the start and the floor of the same head and number of features."""
    found = shown
    for label, name in ((start, "start"), (FLOOR, "floor")):
        part = fixed[fixed["label"] == label].rename(columns={error: f"{error}_{name}" for error in ERRORS})
        keys = HEAD if part["m"].isna().all() else [*HEAD, "m"]
        found = found.merge(part[[*keys, *(f"{error}_{name}" for error in ERRORS)]], on=keys)
    gaps = {
        f"share_{e}": (found[f"{e}_start"] - found[e]) / (found[f"{e}_start"] - found[f"{e}_floor"]) for e in ERRORS
    }
    return found.assign(**gaps)


def last(fits: pd.DataFrame) -> pd.DataFrame:
    """Fits after as many steps as all have."""
    return fits[fits["steps"] == fits["steps_at_most"].min()]


def most(fits: pd.DataFrame) -> pd.DataFrame:
    """Fits to the largest amount of text."""
    return fits[fits["windows"] == fits["windows"].max()]


def middle(records: pd.DataFrame) -> int:
    """Number of features that is fitted without a mask too."""
    return int(records.loc[(records["what"] == "fit") & (records["mask"] == "none"), "m"].iloc[0])
