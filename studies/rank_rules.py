"""Which rule finds the rank of an update: spikes in noise, and what storage in sixteen bits leaves of a fine-tune."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pandas as pd

from nla_llm.linalg import haar_orthogonal
from nla_llm.measures import Estimate, Spectrum
from nla_llm.measures.storage import count_binades, spacings
from nla_llm.study import Claim, Study, Table
from nla_llm.study.frames import groups, succeeded
from nla_llm.study.rules import median_noise, rank_rules, stored_update
from nla_llm.theory.updates import spiked_model

from ._rank_figures import TRUE_RANK, figures, setting

SEEDS = {"small": 3, "default": 6, "full": 16}
SPIKED = {"small": (200, 400), "default": (600, 1200), "full": (600, 1200)}
NOISY = {"small": (120, 240), "default": (300, 600), "full": (300, 600)}
STORED = {"small": 256, "default": 768, "full": 1024}
STRENGTHS = (4.0, 3.0, 2.4, 1.9, 1.5, 1.2, 0.6)  # the last is below the threshold β^¼ = 0.84
SIGNALS = {"strong": np.linspace(4, 2, 8), "weak": np.linspace(1.7, 1.1, 8)}
TRAINED = np.linspace(1, 0.2, TRUE_RANK)  # singular values of the trained update, up to a factor
SIZES = (1e-3, 1e-2)  # |ΔW|/|W|
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
RANKS = (1, 2, 4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256)


def cells(scale: str) -> list[dict[str, Any]]:
    """Spikes one by one, rules on spikes in noise, rules on stored pairs."""
    sizes, seeds = ("rows", "columns"), SEEDS[scale]
    spikes = [{"what": "spikes", **dict(zip(sizes, SPIKED[scale], strict=True)), "seeds": 2 * seeds}]
    rules = [
        {"what": "noisy", "signal": s, **dict(zip(sizes, NOISY[scale], strict=True)), "seeds": seeds} for s in SIGNALS
    ]
    stored = [
        {"what": "stored", "order": STORED[scale], "dtype": dtype, "size": size, "history": history, "seeds": seeds}
        for dtype in DTYPES
        for size in SIZES
        for history in ("stored", "rounded")
    ]
    return [*spikes, *rules, *stored]


def measure(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Records of one cell, means over seeds."""
    streams = np.random.default_rng(seed).spawn(cell["seeds"])
    return {"spikes": spike_records, "noisy": noisy_records, "stored": stored_records}[cell["what"]](cell, streams)


def spike_records(cell: dict[str, Any], streams: list[np.random.Generator]) -> list[dict[str, Any]]:
    """Singular values and squared cosines of seven spikes, beside the limits of Benaych-Georges and Nadakuditi."""
    shape = cell["rows"], cell["columns"]
    values, left, right = (np.empty((len(streams), len(STRENGTHS))) for _ in range(3))
    for i, rng in enumerate(streams):
        u, v = (haar_orthogonal(n, rng, columns=len(STRENGTHS)) for n in shape)
        noise = rng.standard_normal(shape) / np.sqrt(max(shape))
        found, s, wt = np.linalg.svd((u * STRENGTHS) @ v.T + noise, full_matrices=False)
        k = np.arange(len(STRENGTHS))
        values[i] = s[k]
        left[i], right[i] = np.sum(u * found[:, k], axis=0) ** 2, np.sum(v * wt[k].T, axis=0) ** 2
    theory = spiked_model(np.array(STRENGTHS), shape[0] / shape[1])
    return [
        {
            "kind": "spike",
            "strength": t,
            "quantity": name,
            "measured": Estimate.from_samples(data[:, j]),
            "theory": limit[j],
        }
        for name, data, limit in zip(("singular value", "left", "right"), (values, left, right), theory, strict=True)
        for j, t in enumerate(STRENGTHS)
    ]


def noisy_records(cell: dict[str, Any], streams: list[np.random.Generator]) -> list[dict[str, Any]]:
    """Rules on a matrix of rank eight in noise of which the size is known, or not."""
    shape = cell["rows"], cell["columns"]
    sigma = 1 / np.sqrt(max(shape))
    draws = []
    for rng in streams:
        u, v = (haar_orthogonal(n, rng, columns=8) for n in shape)
        truth = (u * SIGNALS[cell["signal"]]) @ v.T
        noisy = truth + sigma * rng.standard_normal(shape)
        draws.append(judged(noisy, truth, noise=sigma, edge=sigma * (np.sqrt(shape[0]) + np.sqrt(shape[1])), rng=rng))
    return over_seeds(draws, 8)


def stored_records(cell: dict[str, Any], streams: list[np.random.Generator]) -> list[dict[str, Any]]:
    """Rules on a pair of which both are stored in sixteen bits; the trained update is known."""
    n, dtype = cell["order"], DTYPES[cell["dtype"]]
    draws, facts = [], []
    for rng in streams:
        start = (0.02 * rng.standard_normal((n, n))).astype(np.float32)
        base = start.astype(dtype).astype(np.float64)
        start = base if cell["history"] == "stored" else start.astype(np.float64)
        u, v = (haar_orthogonal(n, rng, columns=TRUE_RANK) for _ in range(2))
        truth = (u * TRAINED) @ v.T
        truth *= cell["size"] * np.linalg.norm(start) / np.linalg.norm(truth)
        tuned = (start + truth).astype(np.float32).astype(dtype).astype(np.float64)
        delta = tuned - base
        fit = stored_update(
            spacings(cell["dtype"], np.dtype(np.float32)),
            count_binades(tuned.astype(np.float32)),
            float(np.sum(delta**2)),
            unchanged=float(np.mean(delta == 0)),
            median_noise=median_noise(delta, rng),
            stored=(cell["dtype"], cell["dtype"]),
        )
        gain = float(np.sum(delta * truth) / np.sum(truth**2))
        draws.append(judged(delta, truth, noise=fit.noise, edge=2 * fit.noise * np.sqrt(n), rng=rng))
        facts.append(
            {
                "unchanged": float(np.mean(delta == 0)),
                "expected_unchanged": fit.unchanged,
                "survives": gain,
                "expected_survives": fit.gain,
                "noise_ratio": fit.noise / float(np.std(delta - gain * truth)),
                "history_found": float(fit.history == cell["history"]),
            }
        )
    means = {name: Estimate.from_samples([fact[name] for fact in facts]) for name in facts[0]}
    return [{"kind": "pair"} | means, *over_seeds(draws, TRUE_RANK)]


def judged(
    noisy: np.ndarray, truth: np.ndarray, *, noise: float, edge: float, rng: np.random.Generator
) -> dict[str, Any]:
    """Ranks by every rule, and the error of truncation at every rank as a distance from the truth, relative to it."""
    u, s, vt = np.linalg.svd(noisy, full_matrices=False)
    spectrum = Spectrum(s, s, Estimate.exact(float(np.sum(s**2)), "dense"), order=s.size)
    found = rank_rules(spectrum, noisy.shape, noise=noise, median_noise=median_noise(noisy, rng), edge=edge)
    # ‖A_r − T‖² = ‖T‖² + Σ (σ_i² − 2 σ_i u_iᵀ T v_i)
    along = np.einsum("ij,ij->j", u, truth @ vt.T)
    total = float(np.sum(truth**2))
    squares = total + np.concatenate([[0.0], np.cumsum(s**2 - 2 * s * along)])
    return {
        "ranks": {name: rank.low for name, rank in found.items()},
        "errors": np.sqrt(np.maximum(squares, 0.0) / total),
    }


def over_seeds(draws: list[dict[str, Any]], truth: int) -> list[dict[str, Any]]:
    """A record for each rule, and one for each rank of truncation."""
    best = [float(draw["errors"].min()) for draw in draws]
    records: list[dict[str, Any]] = []
    for name in draws[0]["ranks"]:
        ranks = [draw["ranks"][name] for draw in draws]
        excess = [draw["errors"][r] / b for draw, r, b in zip(draws, ranks, best, strict=True)]
        records.append(
            {
                "kind": "rule",
                "rule": name,
                "rank": Estimate.from_samples(ranks),
                "smallest": min(ranks),
                "largest": max(ranks),
                "exact": float(np.mean([r == truth for r in ranks])),
                "excess": Estimate.from_samples(excess),
                "truth": truth,
            }
        )
    order = draws[0]["errors"].size
    errors = {r: Estimate.from_samples([draw["errors"][r] for draw in draws]) for r in RANKS if r < order}
    return records + [{"kind": "error", "r": r, "error": error} for r, error in errors.items()]


# -- tables ---------------------------------------------------------------------------------------------------------


def tables(records: pd.DataFrame) -> list[Table]:
    """How often each rule is right, rule by rule; what storage does to each pair."""
    rules = succeeded(records)
    rules = rules[rules["kind"] == "rule"]
    rows = []
    for (what, signal, dtype, size, history), part in groups(rules, ["what", "signal", "dtype", "size", "history"]):
        name = f"{signal} spikes" if what == "noisy" else setting({"dtype": dtype, "size": size, "history": history})
        ranks = {r["rule"]: f"{r['rank']:.4g}{'' if r['exact'] < 1 else ' ✓'}" for r in part.to_dict("records")}
        rows.append({"matrix": name, "true": int(part["truth"].iloc[0]), **ranks})
    pairs = succeeded(records, what="stored")
    pairs = pairs[pairs["kind"] == "pair"]
    storage = [
        {
            "pair": setting(row),
            "unchanged": f"{100 * row['unchanged']:.1f} %",
            "model": f"{100 * row['expected_unchanged']:.1f} %",
            "survives": f"{100 * row['survives']:.1f} %",
            "model ": f"{100 * row['expected_survives']:.1f} %",
            "noise, model/real": f"{row['noise_ratio']:.3f}",
            "history found": f"{100 * row['history_found']:.0f} %",
        }
        for row in pairs.to_dict("records")
    ]
    return [
        Table(
            "ranks",
            "Rank by every rule, mean over seeds; ✓ where it is the true rank at every seed. GD: the threshold "
            "of Gavish and "
            "Donoho, for noise that is known (of storage, by the model) or told by the median singular value.",
            pd.DataFrame(rows),
            leads=True,
        ),
        Table(
            "storage",
            "What storage leaves of the trained update, as it is and as the model says from the stored pair "
            "alone: entries that "
            "did not change, the share of the update that survives, the noise, and how often the model tells the "
            "history of "
            "the pair.",
            pd.DataFrame(storage),
        ),
    ]


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(records: pd.DataFrame) -> list[Claim]:
    """What the records say."""
    return [*spike_claims(records), *rule_claims(records), *peer_claims(records), *model_claims(records)]


def spike_claims(records: pd.DataFrame) -> list[Claim]:
    """The limits, to three per cent."""
    spikes = succeeded(records, what="spikes")
    seen = spikes[spikes["strength"] >= 1.5]
    found = []
    for quantity, part in seen.groupby("quantity", sort=False):
        ends = np.sort(
            np.abs([part["measured_lower"] / part["theory"] - 1, part["measured_upper"] / part["theory"] - 1]), axis=0
        )
        inside = (part["measured_lower"] <= part["theory"]) & (part["theory"] <= part["measured_upper"])
        low, high = float(np.where(inside, 0.0, ends[0]).max()), float(ends[1].max())
        mean = float((part["measured"] / part["theory"] - 1).abs().max())
        name = quantity if quantity == "singular value" else f"squared cosine of the {quantity} vector"
        sentence = f"The {name} of a spike of strength 1.5 or more is within 3 % of its limit"
        number = f"means at most {100 * mean:.2g} % off, ends of the intervals {100 * high:.2g} %"
        source = "Benaych-Georges and Nadakuditi 2012, arXiv 1103.2221"
        found.append(Claim.decide(sentence, low, high, 0.03, "<=", number=number, source=source))
    return found


def rule_claims(records: pd.DataFrame) -> list[Claim]:
    """Which rules find the rank, and what truncation at the rank they find costs."""
    rules = succeeded(records)
    rules = rules[rules["kind"] == "rule"]
    source = "Gavish and Donoho 2014, arXiv 1305.5870"
    found = []
    strong = rules[(rules["what"] == "noisy") & (rules["signal"] == "strong")].set_index("rule")
    for rule, noise in (("GD storage", "known noise"), ("GD median", "the noise that the median tells")):
        low = float(strong.loc[rule, "exact"])
        sentence = f"On strong spikes in noise the threshold of Gavish and Donoho for {noise} finds the true rank"
        found.append(
            Claim.decide(sentence, low, low, 1.0, ">=", number=f"in {100 * low:.0f} % of the draws", source=source)
        )
    stored = rules[rules["what"] == "stored"]
    for rule, noise in (
        ("GD storage", "noise of storage, by the model,"),
        ("GD median", "noise that the median tells"),
    ):
        part = stored[stored["rule"] == rule]
        low, high = float(part["excess_lower"].max()), float(part["excess_upper"].max())
        sentence = (
            f"Truncated by that threshold for the {noise} a stored update is as near to the trained one, to 2 %, "
            "as at the "
            "best of all ranks"
        )
        exact = f"the true rank in {100 * part['exact'].mean():.0f} % of the draws"
        number = f"error at most {part['excess'].max():.3f} times the least; {exact}"
        expected = "refuted" if rule == "GD median" else "confirmed"
        found.append(Claim.decide(sentence, low, high, 1.02, "<=", number=number, expected=expected, source=source))
    energy = stored[
        (stored["size"] == min(SIZES)) & (stored["dtype"] == "bfloat16") & (stored["rule"] == "energy 90 %")
    ]
    order = float(energy["order"].iloc[0])
    low, high = (float(energy[end].agg(how)) / order for end, how in (("smallest", "min"), ("largest", "max")))
    sentence = f"90 % of the energy of a bfloat16 update of size 1e-3, rank {TRUE_RANK}, takes over 30 % of all ranks"
    return [*found, Claim.decide(sentence, low, high, 0.3, ">", number=f"{100 * low:.0f} to {100 * high:.0f} %")]


def peer_claims(records: pd.DataFrame) -> list[Claim]:
    """Figures of truncation tools on such pairs, from the base as it is stored; they are for order 768."""
    stored = succeeded(records, what="stored")
    stored = stored[(stored["dtype"] == "bfloat16") & (stored["history"] == "stored")]
    small = stored[stored["size"] == min(SIZES)]
    found = []
    pair = small[small["kind"] == "pair"].iloc[0]
    low, high = pair["unchanged_lower"], pair["unchanged_upper"]
    sentence = "At size 1e-3 more than three quarters of the entries stored in bfloat16 do not change"
    found.append(Claim.decide(sentence, low, high, 0.75, ">", number=f"{100 * low:.1f} to {100 * high:.1f} %"))
    errors = small[small["kind"] == "error"].set_index("r")
    if 128 in errors.index:
        low = errors.loc[128, "error_lower"] - errors.loc[TRUE_RANK, "error_upper"]
        high = errors.loc[128, "error_upper"] - errors.loc[TRUE_RANK, "error_lower"]
        sentence = f"... and rank 128 of the stored update is further from the trained one than rank {TRUE_RANK}"
        number = f"{errors.loc[128, 'error']:.3f} against {errors.loc[TRUE_RANK, 'error']:.3f}"
        found.append(Claim.decide(sentence, low, high, 0.0, ">", number=number))
    return found


def model_claims(records: pd.DataFrame) -> list[Claim]:
    """What the model of storage says from the stored pair alone."""
    pairs = succeeded(records, what="stored")
    pairs = pairs[pairs["kind"] == "pair"]
    gaps = {
        "the share of entries that did not change": (pairs["expected_unchanged"] - pairs["unchanged"], 0.015),
        "the share of the trained update that survives": (pairs["expected_survives"] - pairs["survives"], 0.02),
        "the size of the noise, relative": (pairs["noise_ratio"] - 1, 0.03),
    }
    found = []
    for what, (gap, allowed) in gaps.items():
        worst = float(gap.abs().max())
        sentence = f"The model of storage tells {what} to {allowed:g}, from the two stored matrices alone"
        found.append(Claim.decide(sentence, worst, worst, allowed, "<=", number=f"at most {worst:.2g} off"))
    known = float(pairs["history_found"].min())
    sentence = "... and whether training started from the base as it is stored"
    return [
        *found,
        Claim.decide(sentence, known, known, 1.0, ">=", number=f"right in {100 * known:.0f} % at the worst setting"),
    ]


study = Study(
    name="rank_rules",
    title="The rank of an update: rules against the truth",
    question="Which rule finds the rank of an update that is known to have one, in noise and after storage in 16 bits?",
    setup=(
        "Spikes: a matrix of known rank plus independent normal noise of variance 1/n, n the larger side, so "
        "that a spike "
        "shows if its strength exceeds β^¼, β the ratio of the sides. Stored pairs: weights N(0, 0.02²) "
        "before training, an "
        "update of rank 16 with singular values falling linearly from 1 to 0.2 and random singular vectors, "
        "of relative size "
        "1e-3 or 1e-2, added in float64; base and tuned rounded to bfloat16 or float16. Training started "
        "from the base as it "
        "is stored, or from weights of which the stored base is a rounded copy. The rules see the difference "
        "of the stored "
        "pair alone. Truncation is judged by its distance from the update that was trained."
    ),
    cells=cells,
    measure=measure,
    figures=figures,
    tables=tables,
    claims=claims,
    references=(
        "M. Gavish and D. L. Donoho, The optimal hard threshold for singular values is 4/√3, 2014, arXiv 1305.5870.",
        "F. Benaych-Georges and R. R. Nadakuditi, The singular values and vectors of low rank perturbations of large "
        "rectangular random matrices, 2012, arXiv 1103.2221.",
        "J. J. Bussgang, Crosscorrelation functions of amplitude-distorted Gaussian signals, MIT Research "
        "Laboratory of "
        "Electronics, technical report 216, 1952.",
    ),
)
