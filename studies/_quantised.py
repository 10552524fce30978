"""What the study of quantised matrices measures: matrices of known spectra, those of the model, and its loss."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

import nla_llm as nl
from nla_llm.arithmetic.quantisers import quantiser
from nla_llm.measures import Estimate
from nla_llm.methods.update.quantised.alternating import alternation
from nla_llm.operators import LowRank, Sum
from nla_llm.problems import embedded, gallery
from nla_llm.problems.llama import LlamaModel
from nla_llm.theory.quantisation import gaussian_error
from nla_llm.theory.yardsticks import eckart_young

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from nla_llm.operators import Operator

    Matrix = NDArray[np.float64]

SPECTRA = {"independent entries": 0.0, "σ = 1/√i": 0.5, "σ = 1/i": 1.0}
RANK = 16  # of the comparison by spectra
ORDER = 256  # of the matrices of known spectra
ALONE, LEAST = "no correction", "least for Q(W)"
METHODS = {
    "LQER": ("lqer", {}),
    "LoftQ": ("loftq", {}),
    "QPiSSA": ("qpissa", {}),
    "QPiSSA, 5 turns": ("qpissa", {"iterations": 5}),
    "L²QER": ("lqer", {"weighting": "activations"}),
    "QERA": ("qera", {}),
    "CALDERA": ("caldera", {}),
}
UNWEIGHTED = tuple(METHODS)[:4]
NORMS = ("nuclear", "frobenius", "spectral")
CALIBRATION, UNSEEN, TOKENS = 6, 7, 512  # held-out texts for weights and for output errors; tokens of a text for losses


def norms(values: Matrix) -> dict[str, float]:
    """Norms of a matrix from its singular values."""
    return {norm: float(eckart_young(values, 0, norm)) for norm in NORMS}


def singular_values(matrix: Matrix) -> Matrix:
    """All of them, in float64."""
    return np.asarray(np.linalg.svd(matrix, compute_uv=False))


def stored(op: Operator) -> Operator:
    """The operator as its bits are counted: factors of 16 bits, where they are not quantised already."""
    if not isinstance(op, Sum):
        return op
    base, correction = op.terms
    assert isinstance(correction, LowRank)  # noqa: S101 - for the type checker
    left, right = (f.astype(np.float16).astype(f.dtype) for f in (correction.left, correction.right))
    return Sum(base, LowRank(left, right))


def approximation(label: str, problem: nl.UpdateProblem, name: str, rank: int) -> tuple[Matrix, Fraction]:
    """The matrix in the place of the given one, formed, and the bits of an entry."""
    if label == ALONE:
        method = nl.method("quantised", format=name)
        return method(problem).dense(), method.bits(problem)
    kind, options = METHODS[label]
    method = nl.method(kind, rank=rank, format=name, **options)
    op = method(problem)
    return (op if kind == "caldera" else stored(op)).dense(), method.bits(problem)


# -- matrices of known spectra -----------------------------------------------------------------------------------------


def matrices(spectrum: str, count: int, seed: int) -> list[Matrix]:
    """Independent Gaussian entries, or given singular values between Haar frames."""
    rngs = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(count)]
    exponent = SPECTRA[spectrum]
    if exponent == 0:
        return [rng.standard_normal((ORDER, ORDER)) for rng in rngs]
    return [gallery.power_law_update(ORDER, ORDER, exponent, rng=rng).delta for rng in rngs]


def alone_records(cell: dict[str, Any], formats: Iterable[str], seed: int) -> list[dict[str, Any]]:
    """Relative errors of quantising alone, in each format, beside what quadrature promises of independent entries."""
    drawn = matrices(cell["spectrum"], cell["draws"], seed)
    sizes = [norms(singular_values(W)) for W in drawn]
    records = []
    for name in formats:
        q = quantiser(name)
        errors = [norms(singular_values(W - q(W).matrix)) for W in drawn]
        gaussian = SPECTRA[cell["spectrum"]] == 0 and not q.affine and not q.nested
        record = {"label": ALONE, "form": name, "bits": float(q.bits_per_entry((ORDER, ORDER)))}
        record["promised"] = gaussian_error(q.levels, 64) ** 0.5 if gaussian else None
        records.append(record | means({n: [e[n] / s[n] for e, s in zip(errors, sizes, strict=True)] for n in NORMS}))
    return records


def means(samples: dict[str, list[float]]) -> dict[str, Estimate]:
    """Means with their Student-t intervals."""
    return {name: Estimate.from_samples(values) for name, values in samples.items()}


def spectrum_records(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Relative errors of every method without weights, PiSSA's ratio, and the lead of QPiSSA over LoftQ in it."""
    rank, name, found, bits = cell["rank"], cell["form"], {}, {}
    for W in matrices(cell["spectrum"], cell["draws"], seed):
        problem, sizes = nl.UpdateProblem(W), norms(singular_values(W))
        alone = singular_values(W - approximation(ALONE, problem, name, 0)[0])
        errors = {LEAST: {n: float(eckart_young(alone, rank, n)) for n in NORMS}}
        for label in UNWEIGHTED:
            op, bits[label] = approximation(label, problem, name, rank)
            errors[label] = norms(singular_values(W - op))
        for label, error in errors.items():
            row = {n: error[n] / sizes[n] for n in NORMS}
            row["ratio"] = 100 * (1 - error["nuclear"] / float(alone.sum()))
            if label == "QPiSSA":
                row["lead"] = 100 * (errors["LoftQ"]["nuclear"] - error["nuclear"]) / float(alone.sum())
            if label == "LQER":
                row["over_least"] = error["frobenius"] / errors[LEAST]["frobenius"]
            for key, value in row.items():
                found.setdefault((label, key), []).append(value)
    labels = dict.fromkeys(label for label, _ in found)
    return [
        {"label": label, "bits": float(bits.get(label, bits["LQER"]))}
        | means({key: values for (owner, key), values in found.items() if owner == label})
        for label in labels
    ]


def turn_records(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Errors of LoftQ turn by turn over those of its first, and in how many draws the turn raised the Frobenius one."""
    quantise, rows = quantiser(cell["form"]), []
    for W in matrices(cell["spectrum"], cell["draws"], seed):
        steps = islice(alternation(W, quantise, cell["rank"]), cell["turns"])
        rows.append([norms(singular_values(W - op.dense())) for op in steps])
    records = []
    for t in range(cell["turns"]):
        record: dict[str, Any] = {"turn": t + 1}
        for n in ("frobenius", "nuclear"):
            record[n] = Estimate.from_samples([row[t][n] / row[0][n] for row in rows])
        record["rises"] = sum(row[t]["frobenius"] > row[max(t - 1, 0)]["frobenius"] * (1 + 1e-12) for row in rows)
        records.append(record)
    return records


# -- matrices of the model ---------------------------------------------------------------------------------------------


@cache
def activations(piece: int) -> dict[str, Matrix]:
    """Inputs of every linear map of the model on a held-out text."""
    inputs = embedded.embedded_model().linear_inputs(embedded.heldout_tokens(piece=piece))
    return {name: x.astype(np.float64) for name, x in inputs.items()}


@cache
def unseen(name: str) -> Matrix:
    """Triangular factor of the inputs on the text that no method has seen: all that an output error needs."""
    return np.asarray(np.linalg.qr(activations(UNSEEN)[name])[1])


@cache
def problem_of(name: str) -> nl.UpdateProblem:
    """The matrix of that name with its calibration inputs."""
    weight = embedded.embedded_model().weights[name].astype(np.float64)
    return nl.UpdateProblem(weight, inputs=activations(CALIBRATION)[name])


@cache
def residuals(name: str, form: str) -> tuple[Matrix, Matrix]:
    """Singular values of W − Q(W), and of its product with the unseen inputs."""
    W = problem_of(name).delta
    residual = W - quantiser(form)(W).matrix
    return singular_values(residual), singular_values(residual @ unseen(name).T)


@cache
def sizes_of(name: str) -> dict[str, float]:
    """Norms of a matrix, and of its output on the unseen inputs."""
    W = problem_of(name).delta
    return norms(singular_values(W)) | {"output": float(np.linalg.norm(W @ unseen(name).T))}


def model_records(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Errors of every matrix of the model, and the loss when all of them are replaced."""
    model, records, replaced, bits = embedded.embedded_model(), [], {}, Fraction(0)
    for name in activations(CALIBRATION):
        problem = problem_of(name)
        matrix, stored_bits = approximation(cell["label"], problem, cell["form"], cell["rank"])
        error, size, (values, through) = problem.delta - matrix, sizes_of(name), residuals(name, cell["form"])
        found = norms(singular_values(error)) | {"output": float(np.linalg.norm(error @ unseen(name).T))}
        least = {n: float(eckart_young(values, cell["rank"], n)) for n in NORMS}
        least["output"] = float(eckart_young(through, cell["rank"]))
        record = {"tensor": name.removeprefix("model.layers.").removesuffix(".weight")}
        record |= {n: found[n] / size[n] for n in found} | {f"over_{n}": found[n] / least[n] for n in found}
        records.append(record | {"ratio": 100 * (1 - found["nuclear"] / float(values.sum()))})
        replaced[name], bits = matrix.astype(np.float32), bits + stored_bits * matrix.size
    entries = sum(W.size for W in replaced.values())
    changed = LlamaModel(model.config, {**model.weights, **replaced})
    losses = [changed.loss(embedded.heldout_tokens(TOKENS, i)) - plain_loss(i) for i in range(cell["pieces"])]
    whole = {
        "tensor": "all",
        "increase": Estimate.from_samples(losses),
        **{f"piece_{i}": x for i, x in enumerate(losses)},
    }
    return [record | {"bits": float(bits / entries)} for record in (*records, whole)]


@cache
def plain_loss(piece: int) -> float:
    """Loss of the model as it is."""
    return float(embedded.embedded_model().loss(embedded.heldout_tokens(TOKENS, piece)))
