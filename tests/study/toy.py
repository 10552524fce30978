"""A study that is quick, and that fails in every way it is asked to: it stands for the real ones in these tests."""

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from nla_llm.study import Claim, Diverged, Figure, Skip, Study, Table

SLEEP = float(os.environ.get("TOY_SLEEP", "0"))
LOG = os.environ.get("TOY_LOG")


def cells(scale):
    if scale == "full":
        ways = ["skip", "diverge", "overflow", "raise", "exit", "hang", "stubborn", "die", "fine"]
        return [{"way": way} for way in ways]
    return [{"way": "fine", "n": n, "repeat": r} for n in (2, 4, 8) for r in range(2 if scale == "small" else 4)]


def mean_of_uniforms(cell, seed):
    draws = np.random.default_rng(seed).random(100 * cell.get("n", 1))
    spread = draws.std() / np.sqrt(draws.size)
    mean = SimpleNamespace(
        value=draws.mean(),
        lower=draws.mean() - 5 * spread,
        upper=draws.mean() + 5 * spread,
        confidence=0.9999,
        how="mean of draws",
    )
    return {"mean": mean, "infinite": float("inf"), "undefined": float("nan"), "draws": draws.size}


def hang(swallow):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            time.sleep(0.05)
        except Exception:  # noqa: S110 - what careless code does; the time limit must get through
            pass
        except BaseException:
            if not swallow:
                raise


def overflow():
    with np.errstate(over="raise"):
        return np.float32(1e30) * np.float32(1e30)


def crash():
    raise RuntimeError(f"cannot read {Path('/secret/folder/weights.bin')}")


def leave():
    raise SystemExit(3)


def measure(cell, seed):
    if LOG:
        with Path(LOG).open("a") as file:
            file.write(f"{sorted(cell.items())}\n")
    time.sleep(SLEEP)
    match cell["way"]:
        case "skip":
            raise Skip("nothing to compute")
        case "diverge":
            raise Diverged("the norm grew to 1e300")
        case "overflow":
            overflow()
        case "raise":
            crash()
        case "exit":
            leave()
        case "hang":
            hang(swallow=False)
        case "stubborn":
            hang(swallow=True)
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
    return mean_of_uniforms(cell, seed)


def draw(figure, data):
    figure.subplots().plot(data["n"], data["mean"])


study = Study(
    name="toy",
    title="Means of uniform numbers",
    question="Is their mean one half?",
    setup="100 n draws",
    cells=cells,
    measure=measure,
    figures=lambda records: [Figure("means", "Means.", draw, records[["n", "mean"]])],
    tables=lambda records: [Table("means", "Means.", records[["n", "mean"]])],
    claims=lambda records: [
        Claim.decide("the mean is below 0.9", records["mean_lower"].min(), records["mean_upper"].max(), 0.9)
    ],
    references=("Anybody, any year",),
)
