"""What the study of LoRA and the truncated SVD measures: updates, their errors, losses and costs."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

import nla_llm as nl
from nla_llm.measures import Estimate, output_error, principal_angles, subspace_similarity
from nla_llm.measures.ranks import Spectrum
from nla_llm.operators import LowRank
from nla_llm.problems.embedded import embedded_model, heldout_tokens
from nla_llm.problems.embedded_updates import embedded_updates
from nla_llm.theory.updates import random_projection_norm, random_subspace_similarity

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from nla_llm.operators import Operator

CALIBRATION = range(16, 24)  # pieces of the new domain on which inputs are captured; losses are taken on the first ones
WITHOUT_RANK = ("none", "full")
UPDATES = {
    "none": "no update",
    "full": "full update",
    "truncated_svd": "truncated SVD of the full update",
    "data_aware_svd": "data-aware truncation of the full update",
    "lora": "LoRA, trained",
}


def domain_tokens(domain: str, n: int, piece: int) -> NDArray[np.int64]:
    """Held-out tokens (n,) of the domain of the fine-tuning, or of that of the model."""
    return embedded_updates().heldout.piece(piece, n) if domain == "new" else heldout_tokens(n, piece)


@cache
def tuned_model() -> nl.problems.LlamaModel:
    """The model with the full update."""
    return embedded_model().updated(embedded_updates().full)


@cache
def inputs(n: int, pieces: tuple[int, ...]) -> dict[str, NDArray[np.float64]]:
    """Name of a weight → triangular factor of what it is applied to in the fully tuned model, float64.

    ‖X M‖_F = ‖R M‖_F for every M where X = Q R, so the factor is all that errors of outputs need.
    """
    tokens = np.stack([domain_tokens("new", n, piece) for piece in pieces])
    read = tuned_model().linear_inputs(tokens)
    # maps that read the same hidden states share their memory
    distinct = {x.ctypes.data: x for x in read.values()}
    factors = {at: np.linalg.qr(x.astype(np.float64), mode="r") for at, x in distinct.items()}
    return {name: factors[x.ctypes.data] for name, x in read.items()}


def problem(name: str, n: int) -> nl.UpdateProblem:
    """The full update of a matrix, with the matrix and calibration inputs, in float64."""
    delta, base = embedded_updates().full[name], embedded_model().weights[name]
    return nl.UpdateProblem(delta.astype(np.float64), base=base.astype(np.float64), inputs=calibration(n)[name])


def calibration(n: int) -> dict[str, NDArray[np.float64]]:
    """Inputs on the pieces that are kept for it."""
    return inputs(n, tuple(CALIBRATION))


def replacement(update: str, rank: int, seed: int, name: str, n: int) -> Operator:
    """What stands in the place of the full update of a matrix."""
    if update == "full":
        return problem(name, n).exact()
    if update == "lora":
        return adapter(rank, seed)[name]
    options = {} if update == "none" else {"rank": rank}
    return nl.method("zero_update" if update == "none" else update, **options)(problem(name, n))


@cache
def adapter(rank: int, seed: int) -> dict[str, LowRank]:
    """An adapter in float64."""
    found = embedded_updates().adapter(rank, seed)
    return {name: LowRank(op.left.astype(np.float64), op.right.astype(np.float64)) for name, op in found.items()}


# -- losses ------------------------------------------------------------------------------------------------------------


def loss_records(cell: dict[str, Any]) -> list[dict[str, Any]]:
    """Loss on every piece of both domains with one update in all matrices."""
    update, rank, seed, n = cell["update"], cell["rank"] or 0, cell["seed"] or 0, cell["n"]
    found = {name: replacement(update, rank, seed, name, cell["calibration"]) for name in embedded_updates().full}
    model = embedded_model() if update == "none" else embedded_model().updated(found)
    full = {name: delta.astype(np.float64) for name, delta in embedded_updates().full.items()}
    whole = total_norm(full.values())
    norms = {
        "total_frobenius": total_norm(full[name] - op.dense() for name, op in found.items()) / whole,
        "total_size": total_norm(op.dense() for op in found.values()) / whole,
    }
    return [
        {"domain": domain, "piece": piece, "loss": float(model.loss(domain_tokens(domain, n, piece)))} | norms
        for domain in ("new", "old")
        for piece in range(cell[f"{domain}_pieces"])
    ]


def total_norm(matrices: Iterable[NDArray[Any]]) -> float:
    """Frobenius norm of all matrices together."""
    return float(np.sqrt(sum(np.linalg.norm(a) ** 2 for a in matrices)))


# -- matrices ----------------------------------------------------------------------------------------------------------


def matrix_records(name: str, ranks: list[int], n: int, pieces: int) -> Iterator[dict[str, Any]]:
    """Errors, subspaces and conditioning of every update of one matrix."""
    p = problem(name, n)
    exact, u, s, vt = p.exact(), *np.linalg.svd(p.delta, full_matrices=False)
    spectrum, tests = Spectrum.dense(p.delta), inputs(n, tuple(range(pieces)))[name].T
    yield {"update": "none", "rank": 0} | errors(exact, spectrum, replacement("none", 0, 0, name, n), tests)
    for rank in ranks:
        full = LowRank(u[:, :rank] * s[:rank], vt[:rank].T)
        yield {"update": "full", "rank": rank} | amplification(p, full, spectrum.frobenius())
        for update, seed in [("truncated_svd", None), ("data_aware_svd", None), *lora_seeds(rank)]:
            op = replacement(update, rank, seed or 0, name, n)
            record = {"update": update, "rank": rank, "seed": seed}
            record |= errors(exact, spectrum, op, tests) | factors(op) | subspaces(u, vt, op)
            if update == "lora":
                record |= amplification(p, op, Spectrum.dense(op.dense()).frobenius())
                record |= between_seeds(name, rank, seed)
            yield record


def lora_seeds(rank: int) -> list[tuple[str, int]]:
    """Seeds of which an adapter of that rank is shipped."""
    return [("lora", seed) for r, seed in embedded_updates().adapters if r == rank]


def errors(exact: Operator, spectrum: Spectrum, op: Operator, tests: NDArray[np.float64]) -> dict[str, Any]:
    """Relative errors in both norms and of the outputs on test inputs, and the relative size of the update."""
    rest = Spectrum.dense(exact.dense() - op.dense())
    return {
        "frobenius": rest.frobenius() / spectrum.frobenius(),
        "spectral": rest.value(1) / spectrum.value(1),
        "output": output_error(exact, op, tests),
        "size": Spectrum.dense(op.dense()).frobenius() / spectrum.frobenius(),
    }


def factors(op: LowRank) -> dict[str, Estimate]:
    """Condition numbers of the two factors and of their product on its rank."""
    product, r = Spectrum.dense(op.dense()), op.rank
    found = {"condition_product": product.value(1) / product.value(r)}
    for side in ("left", "right"):
        factor = Spectrum.dense(getattr(op, side))
        found[f"condition_{side}"] = factor.value(1) / factor.value(r)
    return found


def subspaces(u: NDArray[Any], vt: NDArray[Any], op: LowRank) -> dict[str, Any]:
    """Similarity of the column and row spaces with those of the leading singular vectors of the full update."""
    r, found = op.rank, {}
    for side, basis, factor in (("left", u[:, : op.rank], op.left), ("right", vt[:r].T, op.right)):
        found[f"similarity_{side}"] = subspace_similarity(basis, np.linalg.qr(factor)[0])
        found[f"smallest_angle_{side}"] = float(principal_angles(basis, factor)[0])
        found[f"random_{side}"] = random_subspace_similarity(r, r, len(factor))
    return found


def between_seeds(name: str, rank: int, seed: int | None) -> dict[str, Estimate]:
    """Similarity of the row and column spaces that LoRA finds from two seeds; recorded with the first."""
    others = [other for _, other in lora_seeds(rank) if other > (seed or 0)]
    found = {}
    for other in others[:1]:
        pair = [adapter(rank, s)[name] for s in (seed or 0, other)]
        for side in ("left", "right"):
            bases = (np.linalg.qr(getattr(op, side))[0] for op in pair)
            found[f"seeds_{side}"] = subspace_similarity(*bases)
    return found


def amplification(p: nl.UpdateProblem, op: LowRank, size: Estimate) -> dict[str, Any]:
    """‖ΔW‖_F/‖Uᵀ W V‖_F for the directions of an update, beside random directions and those of W itself."""
    rank, base = op.rank, Spectrum.dense(p.base)
    u, v = np.linalg.qr(op.left)[0], np.linalg.qr(op.right)[0]
    projected = Estimate.exact(np.linalg.norm(u.T @ p.base @ v), "from the two bases", rounding=1e-13)
    chance = random_projection_norm(float(base.frobenius().value), rank, p.d_out, p.d_in)
    own = float(np.linalg.norm(base.values[:rank]))
    return {
        "amplification": size / projected,
        "amplification_random": float(size.value) / chance,
        "amplification_own": float(size.value) / own,
        "projection_over_random": projected / Estimate.exact(chance, "in expectation"),
    }


# -- costs -------------------------------------------------------------------------------------------------------------


def trained_parameters(rank: int) -> int:
    """Trained numbers: those of the factors, or all entries of the matrices for rank 0."""
    shapes = [delta.shape for delta in embedded_updates().full.values()]
    return sum(rank * (m + n) if rank else m * n for m, n in shapes)


def step_operations(rank: int) -> int:
    """Operations for one token of one training step in the adapted matrices; rank 0 trains them in full.

    A matrix that reads something trained below takes 6 m n in full and 4 m n + 6 r (m + n) by LoRA: forwards, gradient
    of the input, gradient of what is trained. In the first layer q, k and v read what is frozen and need no gradient of
    their input: 4 m n, and 2 m n + 6 r m + 4 r n. Elementwise work is left out.
    """
    total = 0
    for name, delta in embedded_updates().full.items():
        m, n = delta.shape
        first = name.startswith("model.layers.0.self_attn.") and "o_proj" not in name
        full = 4 if first else 6
        total += (full - 2) * m * n + rank * (6 * m + (4 if first else 6) * n) if rank else full * m * n
    return total


def frozen_operations(n: int) -> int:
    """Operations for one token in what nobody trains: causal attention on n tokens, and the output matrix."""
    c = embedded_model().config
    attention = c.num_hidden_layers * 3 * 2 * (n + 1) * c.num_attention_heads * c.head_dim
    return attention + 4 * c.vocab_size * c.hidden_size
