"""How much of the gap between a fixed feature map and the best matrix of its rank can learning close?"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from nla_llm.backend import parallel
from nla_llm.study import Claim, Figure, Study, Table
from nla_llm.study.frames import groups, succeeded
from nla_llm.study.medians import median_claim, median_text

from . import _fitted_features as bench
from . import _fitted_figures as pictures
from ._fitted_features import FIXED, FLOOR, START, closed, last, middle, most

if TYPE_CHECKING:
    from collections.abc import Sequence


class Size(NamedTuple):
    """A scale: tokens of a window, layers, numbers of features and of windows, steps, draws of a random method."""

    n: int
    layers: tuple[int, ...]
    features: tuple[int, ...]
    windows: tuple[int, ...]
    steps: tuple[int, int]  # of all fits; of those of the middle number of features to less than all windows
    draws: int


SIZES = {
    "small": Size(96, (1, 4), (16, 32), (1, 4), (20, 40), 6),
    "default": Size(256, tuple(range(6)), (16, 32, 64, 128), (1, 4, 14), (40, 160), 6),
    "full": Size(256, tuple(range(6)), (16, 32, 64, 128, 256), (1, 4, 14), (160, 640), 12),
}


def cells(scale: str) -> list[dict[str, Any]]:
    """Fits for every number of features and of windows, and the fixed methods, with and without the causal mask.

    Without it only the middle number of features is fitted, to all windows.
    """
    size = SIZES[scale]
    centre, widest = size.features[len(size.features) // 2], size.windows[-1]
    found: list[dict[str, Any]] = []
    for layer in size.layers:
        given = {"layer": layer, "n": size.n}
        for m in size.features:
            for windows in size.windows:
                steps = size.steps[m == centre and windows < widest]
                masks = ("causal", "none") if m == centre and windows == widest else ("causal",)
                fit = {"what": "fit", "m": m, "windows": windows, "steps_at_most": steps, **given}
                found += [{**fit, "mask": mask} for mask in masks]
        for label in FIXED:
            budgets = (None,) if label in {"uniform", "elu + 1"} else size.features
            fixed = {"what": "fixed", "label": label, "draws": size.draws, **given}
            found += [{**fixed, "mask": "causal", "m": m} for m in budgets]
            found += [{**fixed, "mask": "none", "m": m} for m in budgets if m in {None, centre}]
    return found


def measure(cell: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Errors of every head on tokens of the calibration and on others."""
    return parallel(partial(bench.measure, seed=seed), [cell])[0]  # many small products: BLAS in one thread


def figures(records: pd.DataFrame) -> list[Figure]:
    """The four figures."""
    n, m = int(records["n"].iloc[0]), middle(records)
    fits = succeeded(records, what="fit")
    windows, steps = int(fits["windows"].max()), int(fits["steps_at_most"].min())
    text = f"{windows} windows of {n} tokens"
    captions = {
        "features": f"Relative errors on texts that no fit saw, against the number of features: maps fitted to {text} "
        f"by {steps} steps, fixed maps, and the yardsticks; causal attention of all heads, medians over heads with "
        "their intervals. elu + 1 has as many features as the head has dimensions. Under a causal mask the best "
        "matrix of rank m is no strict bound, as the masked product of features may have a larger rank.",
        "text": "Share that the fit closes of the gap between its start and the best matrix of rank m, against the "
        f"number of features, for three amounts of calibration text, after {steps} steps: above on unseen texts, "
        "below on the first window of the calibration. Medians over heads with their intervals; zero is the start, "
        "one the best matrix of that rank, uniform attention in grey. The fits are not converged. Above one a masked "
        "product of features is nearer to the causal matrix than any matrix of rank m.",
        "steps": f"Error against the steps of the fit, m = {m}: dashed on a window that was fitted, full on texts that "
        "were not. The texts differ, but are as hard before the fit: what parts them is overfitting. Where curves "
        "still fall at their end the fit was stopped early. Medians over heads with their intervals.",
        "layers": f"Errors by layer, m = {m}, {text}, {steps} steps; medians over the heads of a layer, bars to the "
        "extremes. Left the model as it is; right the same heads without their mask, fitted anew, where the best "
        "matrix of rank m is a strict bound. The two kinds of tokens are of different texts.",
    }
    return [
        Figure(
            "features",
            captions["features"],
            pictures.draw_features,
            pictures.by_features(records),
            size=(6.5, 3.4),
            panels=(1, 3),
        ),
        Figure("text", captions["text"], pictures.draw_text, pictures.by_text(records), size=(6.5, 4.8), panels=(2, 3)),
        Figure(
            "steps", captions["steps"], pictures.draw_steps, pictures.by_steps(records), size=(6.5, 3.3), panels=(1, 3)
        ),
        Figure(
            "layers",
            captions["layers"],
            pictures.draw_layers,
            pictures.by_layer(records),
            size=(6.5, 3.7),
            panels=(1, 2),
        ),
    ]


def tables(records: pd.DataFrame) -> list[Table]:
    """Share of each gap by number of features, amount of text and tokens; by layer."""
    gaps = {start: last(closed(records, start)) for start in bench.MAPS}
    rows = [
        {
            "m": int(m),
            "windows": int(windows),
            "mask": mask,
            "tokens": tokens,
            **{f"from {start}": median_text(select(found, key), "share_frobenius") for start, found in gaps.items()},
            "spectral": median_text(part, "share_spectral"),
            "output": median_text(part, "share_output"),
        }
        for key, part in groups(gaps[START], ["m", "windows", "mask", "tokens"])
        for m, windows, mask, tokens in [key]
    ]
    m = middle(records)
    seen = most(gaps[START])
    layers = [
        {
            "layer": int(layer),
            "mask": mask,
            **{
                f"{tokens}, {words}": median_text(part[part["tokens"] == tokens], f"share_{e}")
                for e, words in (("frobenius", "Frobenius"), ("output", "output"))
                for tokens in ("unseen", "calibration")
            },
        }
        for (mask, layer), part in groups(seen[seen["m"] == m].sort_values(["mask", "layer"]), ["mask", "layer"])
    ]
    return [
        Table(
            "shares",
            "Share closed of the gap between a fixed map and the best matrix of rank m, medians over heads with their "
            "intervals: in the Frobenius norm from three fixed maps; in the spectral norm and for the output from the "
            "start of the fit. A negative share is an error larger than that of the fixed map.",
            pd.DataFrame(rows),
        ),
        Table(
            "layers",
            f"Share closed of the gap by layer, m = {m}, all calibration text: medians over the heads of the layer, "
            "with the extremes.",
            pd.DataFrame(layers),
        ),
    ]


def select(found: pd.DataFrame, key: Sequence[Any]) -> pd.DataFrame:
    """Records of one number of features, amount of text, mask and kind of tokens."""
    m, windows, mask, tokens = key
    right = (found["m"] == m) & (found["windows"] == windows) & (found["mask"] == mask) & (found["tokens"] == tokens)
    return found[right]


# -- claims ------------------------------------------------------------------------------------------------------------


def claims(records: pd.DataFrame) -> list[Claim | partial[list[Claim]]]:
    """What the records say."""
    m, shares = middle(records), closed(records)
    causal = shares[(shares["mask"] == "causal") & (shares["m"] == m)]
    unseen, seen = (causal[causal["tokens"] == tokens] for tokens in ("unseen", "calibration"))
    windows, n = int(shares["windows"].max()), int(shares["n"].iloc[0])
    best = last(most(unseen))
    where = f"m = {m}, {windows} windows of {n} tokens, {best['steps'].iloc[0]:.0f} steps"
    return [
        median_claim(
            f"Learning closes at least a tenth of the gap between the unfitted map and the best matrix of its rank, on "
            f"unseen tokens ({where})",
            best["share_frobenius"],
            0.1,
            ">",
            what="share closed",
        ),
        median_claim(
            f"Learned features mimic softmax: nine tenths of that gap are closed on unseen tokens ({where})",
            best["share_frobenius"],
            0.9,
            ">",
            what="share closed",
            expected="refuted",
            source="read into Zhang et al. 2024, arXiv 2402.04347, section 4",
        ),
        partial(overfitting, unseen, seen, where),
        partial(budgets, records, shares, where),
    ]


def overfitting(unseen: pd.DataFrame, seen: pd.DataFrame, where: str) -> list[Claim]:
    """Tokens seen against tokens not seen; few and many steps; little and much text."""
    few, n = unseen["windows"].min(), int(unseen["n"].iloc[0])
    alone = unseen[unseen["windows"] == few]
    first, final = (alone[alone["steps"] == s] for s in (alone["steps"].min(), alone["steps"].max()))
    some = sorted(unseen["windows"].unique())[-2]
    return [
        median_claim(
            f"The share closed is larger on the tokens of the calibration than on unseen ones ({where})",
            difference(last(most(seen)), last(most(unseen)), "share_frobenius"),
            0.0,
            ">",
            what="difference of the shares",
        ),
        median_claim(
            f"Fitted to one window of {n} tokens, more steps make the error on unseen tokens larger",
            difference(final, first, "frobenius"),
            0.0,
            ">",
            what=f"error after {final['steps'].iloc[0]:.0f} steps less that after {first['steps'].iloc[0]:.0f}",
        ),
        median_claim(
            f"More text closes more of the gap on unseen tokens: {unseen['windows'].max():.0f} windows against "
            f"{some:.0f}",
            difference(last(most(unseen)), last(unseen[unseen["windows"] == some]), "share_frobenius"),
            0.0,
            ">",
            what="difference of the shares",
        ),
    ]


def budgets(records: pd.DataFrame, shares: pd.DataFrame, where: str) -> list[Claim]:
    """Numbers of features, the mask, and the yardsticks."""
    m = middle(records)
    fitted = last(most(shares[shares["tokens"] == "unseen"]))
    causal = fitted[fitted["mask"] == "causal"]
    wide, narrow = (causal[causal["m"] == k] for k in (causal["m"].max(), causal["m"].min()))
    best, free = causal[causal["m"] == m], fitted[(fitted["m"] == m) & (fitted["mask"] == "none")]
    fixed, kept = succeeded(records, what="fixed"), fitted[fitted["m"] == m]
    found = [
        median_claim(
            f"With more features the fit closes a larger share of the gap: m = {wide['m'].iloc[0]:.0f} against "
            f"{narrow['m'].iloc[0]:.0f}",
            difference(wide, narrow, "share_frobenius"),
            0.0,
            ">",
            what="difference of the shares",
            expected="refuted",
        ),
        median_claim(
            f"Without the causal mask the fit closes a smaller share of the gap ({where})",
            difference(free.assign(mask="causal"), best, "share_frobenius"),
            0.0,
            "<",
            what="difference of the shares",
        ),
        median_claim(
            f"No fit comes nearer to softmax on unseen tokens than the best matrix of rank {m}, though with the causal "
            "mask that is no strict bound",
            pd.Series([(kept["frobenius"] / kept["frobenius_floor"]).min()]),
            1.0,
            ">",
            what=f"smallest ratio over {len(kept)} heads with and without the mask",
        ),
    ]
    seen = last(shares[(shares["tokens"] == "calibration") & (shares["mask"] == "causal")])
    tight = seen[(seen["windows"] == seen["windows"].min()) & (seen["m"] == seen["m"].min())]
    found.append(
        median_claim(
            f"Under the causal mask the best matrix of rank {tight['m'].iloc[0]:.0f} is no bound: a fit to one window "
            "is nearer to softmax there",
            tight["frobenius"] / tight["frobenius_floor"],
            1.0,
            "<",
            what="error over that of the best matrix",
        )
    )
    for label in FIXED:
        if label != FLOOR:
            rival = fixed[
                (fixed["label"] == label) & (fixed["tokens"] == "unseen") & (fixed["m"].isna() | (fixed["m"] == m))
            ]
            found.append(
                median_claim(
                    f"On unseen tokens the fitted map is nearer to softmax than {label} ({where})",
                    difference(best, rival, "frobenius"),
                    0.0,
                    "<",
                    what="difference of the relative Frobenius errors",
                )
            )
    return found


def difference(records: pd.DataFrame, rivals: pd.DataFrame, column: str) -> pd.Series:
    """Differences on the same heads."""
    keys = ["mask", "layer", "head"]
    both = records[[*keys, column]].merge(rivals[[*keys, column]], on=keys, suffixes=("", "_rival"))
    return both[column] - both[f"{column}_rival"]


study = Study(
    name="fitted_features",
    title="What learning can do for a feature map",
    question="How much of the gap between a fixed feature map and the best matrix of its rank can learning close, on "
    "how much text, and what is left of it on tokens that were not seen?",
    setup=(
        "Maps of all heads of the embedded model, Hedgehog's exponentials of an affine map and of its negative, are "
        "fitted by L-BFGS to the exact rows of windows of held-out text, from the published start, and judged on the "
        "first of these windows and on two windows of other texts. Errors are relative; the share closed is (error of "
        "the start − error of the fit)/(error of the start − error of the best matrix of rank m), head by head. The "
        "fit is judged several times on its way and continues from where it was, with a fresh memory of L-BFGS. The "
        "model is causal and is fitted as it is; since the masked product of features may have a rank above m, the "
        "middle number of features is also fitted without the mask, where the bound is strict."
    ),
    cells=cells,
    measure=measure,
    figures=figures,
    tables=tables,
    claims=claims,
    references=("M. Zhang et al., The hedgehog and the porcupine, 2024, arXiv 2402.04347.",),
)
