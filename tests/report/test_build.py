import errno
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import sympy

from nla_llm.report import ReportError, files, style
from nla_llm.report.build import Result, build, build_summary
from nla_llm.study.claims import Claim
from nla_llm.study.content import Figure, Table

NASTY = "#let x = 1; $a$ \\ *b* <c> @ref _u_ [y] // ~ -- \"q\" 'r' {z} Ünï κ₂ \x07"
VISIBLE = ["#let x = 1;", "$a$", "\\", "*b*", "<c>", "@ref", "_u_", "[y]", "{z}", "Ünï", "κ"]


def test_report_holds_everything_a_reader_asks_for(tmp_path, make_study, records, provenance, read_pdf):
    path = build(make_study(), records, provenance, tmp_path / "reports")
    text, pages = read_pdf(path)
    assert path == tmp_path / "reports" / "toy.pdf"
    assert 1 <= pages <= 3
    assert path.stat().st_size < 1_000_000
    wanted = [
        "A toy study",
        "How wrong is a toy?",
        "One seed.",
        "10 records: 9 ok, 1 failed",
        "confirmed",
        "refuted",
        "open",
    ]
    wanted += ["slope 0.50 [0.49, 0.51]", "against expectation", "as expected", "Error against the number of features."]
    wanted += [
        "Errors at 64 features.",
        "a made-up reason",
        "A reference",
        "arXiv 2006.16236",
        "numpy 2.0",
        "wall seconds",
        "12.5",
    ]
    for words in [*wanted, "toy/error.csv", "0.375", "[0.350, 0.413]"]:
        assert words in text, words


def test_data_stand_beside_the_report_and_say_where_an_interval_is_missing(tmp_path, make_study, records):
    build(make_study(), records, {}, tmp_path)
    data = pd.read_csv(tmp_path / "toy" / "error.csv")
    assert sorted(p.name for p in (tmp_path / "toy").iterdir()) == ["error.csv", "table-costs.csv", "table-errors.csv"]
    np.testing.assert_array_equal(data["error"], records.loc[records.status == "ok", "error"])
    assert list(data["error_bar"]) == ["interval"] * 6 + ["exact"] * 3
    assert "2*d*n**2" in (tmp_path / "toy" / "table-costs.csv").read_text()


def test_same_input_gives_the_same_bytes(tmp_path, make_study, records, provenance):
    first = build(make_study(), records, provenance, tmp_path / "a").read_bytes()
    second = build(make_study(), records, provenance, tmp_path / "b").read_bytes()
    assert first == second
    assert build(make_study(title="Another"), records, provenance, tmp_path / "c").read_bytes() != first


def test_no_character_of_a_user_is_a_command(tmp_path, make_study, records, read_pdf):
    study = make_study(
        title=f"T {NASTY}",
        question=NASTY,
        setup=NASTY,
        references=[NASTY],
        claims=lambda df: [Claim(NASTY, "open", NASTY, source=NASTY)],
        tables=lambda df: [Table("t", NASTY, pd.DataFrame({NASTY: [NASTY, sympy.Symbol(NASTY)]}))],
        figures=lambda df: [Figure("f", NASTY, lambda f, d: f.subplots(), pd.DataFrame({"a": [1]}))],
    )
    text, _ = read_pdf(build(study, records.assign(reason=NASTY), {NASTY: {NASTY: [NASTY]}}, tmp_path))
    for piece in VISIBLE:
        assert text.count(piece) >= 6, piece


def test_empty_records_say_so(tmp_path, make_study, read_pdf):
    text, _ = read_pdf(build(make_study(figures=_boom, tables=_boom, claims=_boom), pd.DataFrame(), None, tmp_path))
    assert "There are no records" in text
    assert "The figures are missing: KeyError" in text
    assert "The claims could not be made" in text


def test_a_claim_that_cannot_be_made_costs_no_other(tmp_path, make_study, records, read_pdf):
    def lost_claim():
        return _boom(records)

    study = make_study(claims=lambda records: [lost_claim, Claim("The other holds.", "confirmed", "1")])
    text, _ = read_pdf(build(study, records, None, tmp_path))
    assert "Of the claims, “lost claim” is missing: KeyError" in text
    assert "The other holds." in text


def test_all_failed_says_why(tmp_path, make_study, records, read_pdf):
    failed = records.assign(status="timeout", reason="no result after 60 s")
    text, _ = read_pdf(build(make_study(), failed, None, tmp_path))
    assert "No cell gave a result" in text
    assert "There is no data for this figure" in text
    assert "no result after 60 s" in text
    assert (tmp_path / "toy" / "error.csv").read_text().startswith("method,")


def test_study_with_nothing_to_show(tmp_path, make_study, records, read_pdf):
    none = make_study(figures=_nothing, tables=_nothing, claims=_nothing, references=(), setup="")
    text, _ = read_pdf(build(none, records, {}, tmp_path))
    assert "The study has no figures." in text
    assert "The study has no claims." in text


def test_one_bad_figure_costs_no_other(tmp_path, make_study, records, read_pdf):
    data = pd.DataFrame({"x": [1.0, 2.0, 3.0], "y": [1.0, np.nan, np.inf]})
    good = Figure("good", "Gaps.", lambda f, d: style.line(f.subplots(), d.x, d.y), data)
    bad = Figure("bad", "Breaks.", lambda f, d: 1 / 0, data)
    text, _ = read_pdf(build(make_study(figures=lambda df: [bad, good]), records, {}, tmp_path))
    assert "could not be drawn: ZeroDivisionError" in text
    assert "These data carry no intervals." in text
    assert set(pd.read_csv(tmp_path / "toy" / "good.csv")["error_bar"]) == {"none"}
    assert (tmp_path / "toy" / "bad.csv").exists()


def test_long_names_and_tables(tmp_path, make_study, records, read_pdf):
    body = pd.DataFrame({"count": range(150), "word": ["w" * 70] * 150, "share": np.linspace(0, 1, 150)})
    study = make_study(name="n" * 120, title="long " * 60, tables=lambda df: [Table("t", "Long.", body)])
    text, pages = read_pdf(build(study, records, {}, tmp_path))
    assert pages >= 4
    assert text.count("count word share") >= 3  # the head is repeated


def test_two_figures_of_one_name_are_refused(tmp_path, make_study, records):
    figure = Figure("same", "", _nothing, pd.DataFrame())
    with pytest.raises(ValueError, match="more than one figure named"):
        build(make_study(figures=lambda df: [figure, figure]), records, {}, tmp_path)


def test_provenance_of_a_wrong_type_is_refused(tmp_path, make_study, records):
    with pytest.raises(TypeError, match="provenance must be a mapping"):
        build(make_study(), records, 3, tmp_path)


def test_full_disk_leaves_the_old_report_whole(tmp_path, make_study, records, monkeypatch):
    path = build(make_study(), records, {}, tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(ReportError, match=r"No space left on device.*another folder"):
        build(make_study(title="Newer"), records, {}, tmp_path)
    assert path.exists()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_file_in_the_way_gets_a_sentence(tmp_path, make_study, records):
    (tmp_path / "reports").write_text("not a folder")
    with pytest.raises(ReportError, match="cannot be written"):
        build(make_study(), records, {}, tmp_path / "reports")
    assert (tmp_path / "reports").read_text() == "not a folder"


def test_summary_is_one_page(tmp_path, make_study, records, provenance, read_pdf):
    names = ["attention", "costs", "spectra", "updates"]
    results = [Result(make_study(name=name, title=f"About {name}"), records, provenance) for name in names]
    path = build_summary(results, tmp_path)
    text, pages = read_pdf(path)
    assert (path.name, pages) == ("summary.pdf", 1)
    assert "4 studies, 40 records, 16 claims: 4 confirmed, 8 refuted, 4 open. Against expectation: 4." in text
    for name in names:
        assert f"About {name}" in text
        assert f"Figure 1 of {name}.pdf" in text
    assert "package 0.1.0" in text


def test_summary_takes_what_a_run_returns(tmp_path, make_study, records, provenance, read_pdf):
    run = SimpleNamespace(
        study=make_study(), records=records, provenance=(provenance, {**provenance, "package": "0.2.0"})
    )
    text, _ = read_pdf(build_summary([run], tmp_path))
    assert "package 0.1.0; 0.2.0" in text


def test_summary_survives_studies_without_results(tmp_path, make_study, read_pdf):
    broken = make_study(name="broken", figures=_boom, claims=_boom)
    text, pages = read_pdf(build_summary([Result(broken, pd.DataFrame())], tmp_path))
    assert pages == 1
    assert "There are no records" in text
    assert read_pdf(build_summary([], tmp_path, name="none"))[1] == 1


def test_summary_never_replaces_the_report_of_a_study(tmp_path, make_study, records):
    with pytest.raises(ValueError, match="rename the study"):
        build_summary([Result(make_study(name="summary"), records)], tmp_path)


def _boom(records):
    raise KeyError("m")


def _nothing(*_):
    return []
