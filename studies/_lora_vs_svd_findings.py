"""What the records of LoRA and the truncated SVD come to: summaries for figures and tables, and claims."""

from __future__ import annotations

from functools import partial
from typing import Any

import pandas as pd

from nla_llm.measures import Estimate
from nla_llm.problems.embedded_updates import embedded_updates
from nla_llm.study import Claim
from nla_llm.study.frames import succeeded
from nla_llm.study.medians import medians

from . import _lora_vs_svd as bench

BIDERMAN = "Biderman et al. 2024, arXiv 2405.09673"


def piecewise(records: pd.DataFrame, domain: str) -> pd.DataFrame:
    """Loss of every piece (rows) under every update and rank (columns; rank 0: none), mean over the seeds of LoRA."""
    part = succeeded(records, what="loss")
    part = part[part["domain"] == domain].assign(rank=part["rank"].fillna(0).astype(int))
    return part.pivot_table(index="piece", columns=["update", "rank"], values="loss", aggfunc="mean")


def difference(losses: pd.DataFrame, of: tuple[str, int], against: tuple[str, int]) -> Estimate:
    """Mean difference of the losses over the pieces, in pairs."""
    return Estimate.from_samples((losses[of] - losses[against]).to_numpy())


def changes(records: pd.DataFrame) -> pd.DataFrame:
    """Loss above that of the full update on the new domain, above that of the base on the old one."""
    rows = []
    ok = succeeded(records, what="loss")
    sizes = ["total_frobenius", "total_size"]
    total = ok.assign(rank=ok["rank"].fillna(0)).groupby(["update", "rank"])[sizes].mean()
    for domain, reference in (("new", ("full", 0)), ("old", ("none", 0))):
        losses = piecewise(records, domain)
        for update, rank in losses.columns:
            e = difference(losses, (update, rank), reference)
            row = {"domain": domain, "update": update, "rank": rank, "loss": losses[update, rank].mean()}
            row |= {"value": float(e.value), "lower": float(e.lower), "upper": float(e.upper)}
            rows.append(row | total.loc[(update, rank)].to_dict())
    return pd.DataFrame(rows)


def matrices(records: pd.DataFrame) -> pd.DataFrame:
    """Records of the matrices that have a rank."""
    part = succeeded(records, what="matrix")
    return part[part["rank"] > 0]


def medians_of(part: pd.DataFrame, columns: dict[str, str], kind: str) -> pd.DataFrame:
    """Medians over the matrices of several columns, in one long table whose column ``kind`` names them.

    A matrix counts once, with the mean over its seeds: more seeds are no further matrices, and would make the interval
    too narrow.
    """
    keys, numbers = ["update", "rank", "name"], list(columns.values())
    once = part.astype(dict.fromkeys(numbers, float)).groupby(keys, sort=False)[numbers].mean().reset_index()
    tables = [
        medians(once.dropna(subset=[column]), ["update", "rank"], column)
        .rename(columns={"median": "value"})
        .assign(**{kind: name})
        for name, column in columns.items()
    ]
    return pd.concat(tables, ignore_index=True)


def norms(records: pd.DataFrame) -> pd.DataFrame:
    """Relative errors by update and rank, and those of the second full fine-tuning."""
    part = matrices(records)
    measures = {name: name for name in ("frobenius", "spectral", "output")}
    data = medians_of(part[part["update"] != "full"], measures, "norm")
    second = embedded_updates().record.get("second_full_update")
    if second is None:
        return data
    frame = pd.DataFrame([row | {"update": "second", "rank": 0, "name": name} for name, row in second.items()])
    more = medians_of(frame, {name: name for name in ("frobenius", "spectral")}, "norm")
    return pd.concat([data, more], ignore_index=True)


def similarities(records: pd.DataFrame) -> pd.DataFrame:
    """Similarity of spaces by side, update and rank; between seeds; of random spaces."""
    part = matrices(records)
    approximations = part[part["update"] != "full"]
    sides = ("left", "right")
    found = [medians_of(approximations, {side: f"similarity_{side}" for side in sides}, "side")]
    lora = part[part["update"] == "lora"]
    for label in ("seeds", "random"):
        if f"{label}_left" not in lora.columns:  # of one seed alone nothing is known
            continue
        named = lora.dropna(subset=[f"{label}_left"]).assign(update=label)
        found.append(medians_of(named, {side: f"{label}_{side}" for side in sides}, "side"))
    return pd.concat(found, ignore_index=True).sort_values("side", kind="stable")


def conditions(records: pd.DataFrame) -> pd.DataFrame:
    """Condition numbers of product and factors by update and rank."""
    part = matrices(records)
    columns = {what: f"condition_{what}" for what in ("product", "left", "right")}
    return medians_of(part[part["update"] != "full"], columns, "factor")


def costs() -> pd.DataFrame:
    """What a training step costs, by rank; rank 0 is the full fine-tuning."""
    record = embedded_updates().record
    frozen, rows = bench.frozen_operations(record["options"]["context"]), []
    for name, seconds in record["step_processor_seconds"].items():
        rank = record["runs"][name]["rank"]
        rows.append(
            {"rank": rank, "parameters": bench.trained_parameters(rank), "operations": bench.step_operations(rank)}
            | {"whole": bench.step_operations(rank) + frozen}
            | {f"seconds_{word}": value for word, value in seconds.items()}
        )
    return pd.DataFrame(rows)


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(records: pd.DataFrame) -> list[partial[Any]]:
    """What the records say."""
    compared = [partial(at_every_rank, records, **comparison) for comparison in COMPARISONS]
    others = (farther_than_nothing, second_time, awareness, savings, spaces, amplified)
    return [partial(gain, records), *compared, *(partial(claim, records) for claim in others)]


# which update is claimed to have the lower loss, and the verdict that is expected
COMPARISONS: tuple[dict[str, Any], ...] = (
    {
        "sentence": "At every rank the trained LoRA has a lower loss on the new domain than the truncated SVD of the "
        "full update",
        "domain": "new",
        "lower": "lora",
        "higher": "truncated_svd",
    },
    {
        "sentence": "At every rank the truncated SVD of the full update forgets less of the old domain than the "
        "trained LoRA",
        "domain": "old",
        "lower": "truncated_svd",
        "higher": "lora",
    },
    {
        "sentence": "LoRA learns less than the full fine-tuning on as many tokens: its loss on the new domain is "
        "higher at every rank",
        "domain": "new",
        "lower": "full",
        "higher": "lora",
        "source": BIDERMAN,
    },
    {
        "sentence": "LoRA forgets less than the full fine-tuning: its loss on the old domain is lower at every rank",
        "domain": "old",
        "lower": "lora",
        "higher": "full",
        "expected": "refuted",
        "source": BIDERMAN,
    },
)


def gain(records: pd.DataFrame) -> Claim:
    """The full fine-tuning against the base."""
    found = difference(piecewise(records, "new"), ("none", 0), ("full", 0))
    sentence = "The full fine-tuning lowers the loss on the new domain by more than half a nat"
    return Claim.decide(sentence, float(found.lower), float(found.upper), 0.5, ">", number=nats(found))


def nats(e: Estimate) -> str:
    """A difference of losses in words."""
    return f"{float(e.value):.3f} [{float(e.lower):.3f}, {float(e.upper):.3f}] nats (95 %)"


def at_every_rank(
    records: pd.DataFrame, *, domain: str, lower: str, higher: str, sentence: str, **verdict: Any
) -> Claim:
    """Whether one update has a lower loss than another at every rank at which LoRA was trained."""
    losses = piecewise(records, domain)
    ranks = sorted(rank for update, rank in losses.columns if update == "lora")
    pairs = [[(u, 0 if u in bench.WITHOUT_RANK else rank) for u in (lower, higher)] for rank in ranks]
    found = [difference(losses, *pair) for pair in pairs]
    place = max(range(len(ranks)), key=lambda i: float(found[i].upper))
    return Claim.decide(
        sentence,
        max(float(e.lower) for e in found),  # refuted as soon as one rank refutes it
        max(float(e.upper) for e in found),
        0.0,
        "<",
        number=f"least clear at rank {ranks[place]}: {nats(found[place])}",
        **verdict,
    )


def farther_than_nothing(records: pd.DataFrame) -> Claim:
    """The distance of LoRA from the full update, of which the norm is one."""
    lora = succeeded(records, what="loss", update="lora")
    distance, size = lora["total_frobenius"], lora["total_size"]
    runs = embedded_updates().record["runs"].values()
    rates = {kind: {f"{run['lr']:g}" for run in runs if bool(run["rank"]) is kind} for kind in (True, False)}
    return Claim.decide(
        "Every trained LoRA is farther from the full update than no update at all, in the Frobenius norm",
        float(distance.min()),
        float(distance.max()),
        1.0,
        ">",
        number=f"relative distances {distance.min():.3g} to {distance.max():.3g}, relative norms {size.min():.3g} to "
        f"{size.max():.3g}; learning rates {', '.join(rates[True])}, {', '.join(rates[False])} in full",
    )


def second_time(records: pd.DataFrame) -> Claim:
    """What other batches alone change, beside what truncation does."""
    runs, second = (embedded_updates().record[key] for key in ("runs", "second_full_update"))
    part = matrices(records)
    rank = int(part["rank"].max())
    cut = (
        part[(part["update"] == "truncated_svd") & (part["rank"] == rank)].set_index("name")["frobenius"].astype(float)
    )
    other = pd.Series({name: distance["frobenius"] for name, distance in second.items()}).loc[cut.index]
    ahead = medians(pd.DataFrame({"rank": rank, "lead": other - cut}), ["rank"], "lead").iloc[0]
    first, again = (pd.Series(runs[f"full-{seed}"]["losses"]["new"]) for seed in (0, 1))
    return Claim.decide(
        "A second full fine-tuning, with other batches alone, is farther from the first in the Frobenius norm than the "
        f"truncated SVD of rank {rank} is",
        float(ahead["lower"]),
        float(ahead["upper"]),
        0.0,
        ">",
        number=f"median distances {other.median():.3g} and {cut.median():.3g}; the losses of the two differ by "
        f"{nats(Estimate.from_samples((again - first).to_numpy()))}",
    )


def awareness(records: pd.DataFrame) -> Claim:
    """The two truncations against one another."""
    losses = piecewise(records, "new")
    ranks = [rank for update, rank in losses.columns if update == "data_aware_svd"]
    found = [difference(losses, ("data_aware_svd", rank), ("truncated_svd", rank)) for rank in ranks]
    ends = [(float(e.lower), float(e.upper)) for e in found]
    place = max(range(len(ranks)), key=lambda i: max(-ends[i][0], ends[i][1]))
    return Claim.decide(
        "The data-aware truncation changes the loss of the truncated SVD by less than a tenth of a nat at every rank",
        max(max(0.0, low, -high) for low, high in ends),  # the size of a difference, at the rank where it is largest
        max(max(-low, high) for low, high in ends),
        0.1,
        "<",
        number=f"least clear at rank {ranks[place]}: {nats(found[place])}",
    )


def savings(_: pd.DataFrame) -> list[Claim]:
    """Orders of magnitude, of what."""
    found, talk = costs().set_index("rank"), "Saad 2024, gains of a few orders of magnitude"
    full, one = found.loc[0], found.loc[found.index[found.index > 0].min()]
    numbers, work = full["parameters"] / one["parameters"], full["operations"] / one["operations"]
    slow, fast = (full[f"seconds_{a}"] / one[f"seconds_{b}"] for a, b in (("least", "most"), ("most", "least")))
    middle = full["seconds_median"] / one["seconds_median"]
    sentence = "LoRA of rank 1 saves {} by an order of magnitude"
    return [
        Claim.decide(
            "LoRA of rank 1 trains two orders of magnitude fewer numbers, and its optimiser keeps as many fewer",
            numbers, numbers, 100.0, ">=", number=f"a factor of {numbers:.4g}", source=talk,
        ),
        Claim.decide(
            sentence.format("operations of a training step"),
            work, work, 10.0, ">=", number=f"a factor of {work:.3g} in the adapted matrices", expected="refuted",
            source=talk,
        ),
        Claim.decide(
            sentence.format("processor time of a training step"),
            slow, fast, 10.0, ">=", number=f"a factor of {middle:.3g} [{slow:.3g}, {fast:.3g}]", expected="refuted",
            source=talk,
        ),
    ]  # fmt: skip


def spaces(records: pd.DataFrame) -> list[Claim]:
    """The spaces of LoRA against random ones."""
    data = similarities(records).set_index(["side", "update", "rank"]).sort_index()
    claims = []
    for side, words in (("left", "column"), ("right", "row")):
        lora, chance = data.loc[(side, "lora")], data.loc[(side, "random"), "value"]
        least = (lora["lower"] / chance).idxmin()
        row = lora.loc[least]
        claims.append(
            Claim.decide(
                f"At every rank the {words} spaces of LoRA are closer to those of the full update than random ones are",
                float(row["lower"] / chance[least]),
                float(row["upper"] / chance[least]),
                1.0,
                ">",
                number=f"least clear at rank {least:.0f}: φ = {row['value']:.3g} [{row['lower']:.3g}, "
                f"{row['upper']:.3g}], random {chance[least]:.3g}",
            )
        )
    return claims


def amplified(records: pd.DataFrame) -> Claim:
    """The directions of the full update in W, against chance."""
    part = matrices(records)
    found = medians(part[part["update"] == "full"], ["rank"], "projection_over_random")
    least = found.loc[found["lower"].idxmin()]
    return Claim.decide(
        "The directions of the full update are stronger in W than random ones at every rank, so random "
        "directions have the larger amplification factor",
        float(least["lower"]),
        float(least["upper"]),
        1.0,
        ">",
        number=f"‖Uᵀ W V‖ is {least['median']:.3g} [{least['lower']:.3g}, {least['upper']:.3g}] times that of "
        f"random directions at rank {least['rank']:.0f}",
        source="Hu et al. 2021, Table 7",
    )
