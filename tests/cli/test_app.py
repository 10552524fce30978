"""The command line as a whole: help, version, exit codes, and errors in one sentence."""

import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import pytest

import nla_llm
from nla_llm.cli.terminal import sentence, show_frame, show_studies
from nla_llm.study import Store

VERBS = ["list", "run", "report", "attention", "update", "check", "cost", "info"]


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_screen_and_shows_an_example(nla, verb):
    outcome = nla(verb, "--help")
    assert outcome.code == 0
    assert f"Example: nla-llm {verb}" in outcome.out
    assert len(outcome.out.strip().splitlines()) <= 30
    assert max(map(len, outcome.out.splitlines())) <= 80


def test_help_of_the_command_names_every_verb(nla):
    out = nla("--help").out
    assert len(out.strip().splitlines()) <= 30
    assert all(f" {verb} " in out for verb in VERBS)


def test_version(nla):
    assert nla("--version").out.strip() == f"nla-llm {nla_llm.__version__}"


def test_list_names_methods_and_studies(nla):
    out = nla("list").out
    assert "optimal_rank" in out
    assert re.search(r"positive_features +m,", out)
    assert "properties" not in out
    assert "attention_error" in out


def test_list_fits_a_terminal_of_80_letters(nla, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = nla("list").out
    assert "…" not in out
    assert re.search(r"optimal_rank +m +softmax +yes +key, +closed", out)
    assert re.search(r"h_matrix +m, +softmax +yes +key +floor *\n +admissibility,", out)  # words are not cut


def test_a_table_that_is_too_wide_breaks_its_headings_between_words(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "26")
    show_frame(pd.DataFrame({"tensor": ["0.q_proj"], "Frobenius 0.1": [6], "energy 90 %": [5]}))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:2]] == [["Frobenius", "energy"], ["tensor", "0.1", "90", "%"]]
    assert lines[3].split() == ["0.q_proj", "6", "5"]


def test_info_tells_of_blas(nla):
    assert "numpy" in nla("info").out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "atention_error"], ["atention_error", "did you mean attention_error"]),
        (["run", "missing.py"], ["no file", "missing.py"]),
        (["run", "--export", "records.xlsx"], ["--export", ".csv or .parquet"]),
        (["run", "--jobs", "-1"], ["jobs", "-1"]),
        (["run", "--scale", "huge"], ["huge", "small"]),
        (["report"], ["there is no store", "nla-llm run"]),
        (["check", "unifrom"], ["unifrom", "did you mean 'uniform'"]),
        (["check", "no_such_module:Thing"], ["cannot import 'no_such_module'"]),
        (["check", "json:Thing"], ["module 'json' has no 'Thing'"]),
        (["check", "sys:version"], ["not a method"]),
        (["check", "random_keys", "m"], ["name=value", "'m'"]),
        (["check", "random_keys", "k=3"], ["no option 'k'", "m"]),
        (["cost", "elu_feature"], ["did you mean 'elu_features'"]),
        (["cost", "elu_features", "--n", "0"], ["--n", "at least 1"]),
        (["cost", "elu_features", "--plot", "x.gif"], ["--plot", "x.gif"]),
        (["cost", "elu_features", "--plot", "no/x.svg"], ["--plot", "no folder"]),
        (["cost"], ["Missing argument"]),
        (["nonsense"], ["No such command"]),
        (["info", "--nonsense"], ["No such option"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].islower() else "",
)
def test_a_mistake_is_told_in_a_sentence(nla, arguments, words):
    told = nla(*arguments).sentence
    assert all(word in told for word in words), told


def test_a_foreign_store_is_refused_and_left_as_it_is(nla, tmp_path):
    store = tmp_path / "notes.sqlite"
    store.write_text("my notes")
    told = nla("run", "attention_error", "--scale", "small", "--store", store.name).sentence
    assert "not a store" in told
    assert store.read_text() == "my notes"


def test_a_report_of_nothing_is_refused_and_the_old_one_left(nla, tmp_path):
    with Store(tmp_path / "empty.sqlite"):
        pass
    old = tmp_path / "reports" / "cost_crossover.pdf"
    old.parent.mkdir()
    old.write_text("an earlier report")
    told = nla("report", "cost_crossover", "--store", "empty.sqlite").sentence
    assert "no results of cost_crossover" in told
    assert "nla-llm run cost_crossover --scale default" in told
    assert old.read_text() == "an earlier report"


def test_a_report_of_the_headline_studies_says_how_to_run_them(nla, tmp_path):
    """Their scales differ, so a scale in the advice would be wrong for some."""
    with Store(tmp_path / "empty.sqlite"):
        pass
    assert nla("report", "--store", "empty.sqlite").sentence.endswith("compute them with: nla-llm run")
    told = nla("report", "--scale", "small", "--store", "empty.sqlite").sentence
    assert told.endswith("compute them with: nla-llm run --scale small")


def test_verdicts_in_a_pipe_are_one_line_each(capsys):
    line = "  confirmed: " + " ".join(20 * ["a long claim"])
    show_studies([SimpleNamespace(lines=lambda: [line])])
    assert capsys.readouterr().out.splitlines() == [line]


def test_a_missing_package_is_told_in_a_sentence(nla, monkeypatch):
    def missing():
        raise ImportError("a text needs the package tokenizers: pip install tokenizers")

    monkeypatch.setattr("nla_llm.study.collect", missing)
    assert nla("info").sentence == "a text needs the package tokenizers: pip install tokenizers"


def test_ctrl_c_tells_what_was_kept(nla, monkeypatch):
    def stopped():
        raise KeyboardInterrupt("stopped: 3 cells computed and kept, 4 left; the same command goes on")

    monkeypatch.setattr("nla_llm.study.collect", stopped)
    outcome = nla("info")
    assert outcome.code == 130
    assert outcome.err.strip() == "stopped: 3 cells computed and kept, 4 left; the same command goes on"


def test_python_m_is_the_same_command(tmp_path):
    """Also: help in less than a second, tracebacks never."""
    command = [sys.executable, "-m", "nla_llm", "run", "nonsense"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)  # noqa: S603 - ourselves
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("there is no study 'nonsense'")


def test_help_starts_quickly(tmp_path):
    """The best of three, as a loaded machine is not what is measured."""
    command = [sys.executable, "-m", "nla_llm", "--help"]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)  # noqa: S603 - ourselves
        times.append(time.perf_counter() - start)
    assert min(times) < float(os.environ.get("NLA_LLM_HELP_SECONDS", "0.7"))


def test_errors_of_the_system_name_the_file():
    assert sentence(PermissionError(13, "Permission denied", "/x/y")) == "cannot open '/x/y': permission denied"
    assert sentence(ValueError("m must be 1")) == "m must be 1"
    assert sentence(RuntimeError()) == "RuntimeError"
