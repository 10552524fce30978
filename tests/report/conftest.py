import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
import sympy

from nla_llm.report import style
from nla_llm.study.claims import Claim
from nla_llm.study.content import Figure, Table
from nla_llm.study.study import Study

SIZES = [16, 64, 256]


def _records():
    rows = [
        {
            "method": f"{family}_features",
            "m": m,
            "error": 3 / m**0.5,
            "error_lower": 2.8 / m**0.5,
            "error_upper": 3.3 / m**0.5,
        }
        for family in ("trigonometric", "positive")
        for m in SIZES
    ]
    rows += [{"method": "uniform", "m": m, "error": 0.8, "error_lower": 0.8, "error_upper": 0.8} for m in SIZES]
    frame = pd.DataFrame(rows).assign(status="ok", reason="", seconds=0.1)
    bad = {
        "method": "elu_features",
        "m": 16,
        "status": "failed",
        "reason": "ValueError: a made-up reason",
        "seconds": 1.0,
    }
    return pd.concat([frame, pd.DataFrame([bad])], ignore_index=True)


def _draw(figure, data):
    ax = figure.subplots()
    for method, part in data.groupby("method"):
        if method == "uniform":
            style.yardstick(ax, part.m, part.error, part.error_lower, part.error_upper, "uniform")
        else:
            style.line(ax, part.m, part.error, part.error_lower, part.error_upper, method, method)
    style.theory_line(ax, SIZES, 3 / np.sqrt(SIZES), "positive")
    style.log_axes(ax, x=2)
    style.label(ax, "features $m$", "relative error")


def _figures(records):
    ok = records[records.status == "ok"]
    return [Figure("error", "Error against the number of features.", _draw, ok, (5, 3))]


def _tables(records):
    n, d = sympy.symbols("n d")
    ok = records[(records.status == "ok") & (records.m == 64)].drop(columns=["status", "reason", "seconds"])
    costs = pd.DataFrame({"method": ["exact", "elu_features"], "operations": [2 * n**2 * d, 4 * n * d**2]})
    return [Table("errors", "Errors at 64 features.", ok), Table("costs", "Costs as formulas.", costs)]


def _claims(records):
    return [
        Claim(
            "The error falls like one over the root of m.",
            "confirmed",
            "slope 0.50 [0.49, 0.51]",
            source="arXiv 2009.14794",
        ),
        Claim("Features beat uniform attention.", "refuted", "not at m = 16"),
        Claim("Denominators are positive.", "refuted", "42 %", expected="refuted"),
        Claim("Orthogonality halves the error.", "open", "0.4 to 1.1"),
    ]


@pytest.fixture
def records():
    return _records()


@pytest.fixture
def make_study():
    """Make a toy study, with some of its fields replaced."""

    def make(**fields):
        given = {
            "name": "toy",
            "title": "A toy study",
            "question": "How wrong is a toy?",
            "setup": "Three sizes.\n\nOne seed.",
            "cells": lambda scale: [],
            "measure": lambda cell, seed: {},
            "figures": _figures,
            "tables": _tables,
            "claims": _claims,
            "references": ["A reference, arXiv 2006.16236."],
        }
        return Study(**{**given, **fields})

    return make


@pytest.fixture
def provenance():
    return {"package": "0.1.0", "packages": {"numpy": "2.0"}, "git": None, "wall_seconds": 12.5}


@pytest.fixture
def read_pdf():
    """Text of a PDF on single spaces, and its pages; skips where poppler is not installed."""
    tool = shutil.which("pdftotext")
    if tool is None:
        pytest.skip("pdftotext (poppler) is not installed")

    def read(path):
        command = [tool, "-layout", str(path), "-"]
        raw = subprocess.run(command, capture_output=True, check=True).stdout.decode()  # noqa: S603 - fixed command
        pages = raw.count("\f")
        clean = raw.replace("\u200b", "").replace("\u2007", " ").replace("\u00a0", " ").replace("\u202f", " ")
        return re.sub(r"\s+", " ", clean), pages

    return read
