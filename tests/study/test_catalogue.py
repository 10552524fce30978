import shutil

import pytest

from nla_llm.study import catalogue

FILE = """
from nla_llm.study import Study
{extra}
measure = lambda cell, seed: {{"x": {value}}}
study = Study("{name}", "t", "q", "s", lambda scale: [{{"n": 1}}], measure, headline={headline!r})
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "folder", lambda: tmp_path)

    def write(name, *, value="1", headline="", extra="", inside=None):
        (tmp_path / f"{name}.py").write_text(
            FILE.format(name=inside or name, value=value, headline=headline, extra=extra)
        )
        return tmp_path / f"{name}.py"

    return write


def test_only_python_files_directly_in_the_folder_count(folder, tmp_path):
    folder("beta")
    folder("alpha", headline="small")
    folder("_helpers")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "gamma.py").write_text("")
    (tmp_path / "notes.txt").write_text("")
    assert catalogue.names() == ["alpha", "beta"]
    assert catalogue.headline() == ["alpha"]


def test_an_unknown_name_suggests_the_nearest(folder):
    folder("attention_error")
    with pytest.raises(catalogue.UnknownStudy, match="did you mean attention_error"):
        catalogue.load("atention_eror")
    with pytest.raises(ValueError, match="the studies are: attention_error"):
        catalogue.load("zzz")
    with pytest.raises(ValueError, match=r"no file 'my_study.py'.*attention_error"):
        catalogue.load("my_study.py")


def test_a_file_is_loaded_by_its_path(toy):
    study = catalogue.load(toy)
    assert (study.name, study.source) == ("toy", str(toy))


def test_an_edited_file_is_seen_and_has_another_version(folder):
    first = catalogue.load(folder("alpha", value="1"))
    second = catalogue.load(folder("alpha", value="2"))
    assert [study.measure({}, 0)["x"] for study in (first, second)] == [1, 2]
    assert first.version({}) != second.version({})


def test_helpers_beside_a_study_are_imported_and_count_for_its_version(folder, tmp_path):
    path = folder("alpha", value="VALUE", extra="from ._helpers import VALUE")
    versions = []
    for value in (1, 22):
        (tmp_path / "_helpers.py").write_text(f"VALUE = {value}\n")
        study = catalogue.load(path)
        assert study.measure({}, 0) == {"x": value}
        versions.append(study.version({}))
    assert versions[0] != versions[1]


def test_the_version_does_not_depend_on_where_the_file_is(tmp_path, toy):
    copy = tmp_path / "toy.py"
    shutil.copy(toy, copy)
    assert catalogue.load(copy).version({}) == catalogue.load(toy).version({})


def test_broken_files_are_told_by_name(folder, tmp_path):
    folder("alpha", inside="beta")
    with pytest.raises(ValueError, match="defines a study named 'beta'"):
        catalogue.load("alpha")
    (tmp_path / "ends.py").write_text("raise SystemExit(0)")
    with pytest.raises(ValueError, match=r"ends\.py cannot be imported: SystemExit"):
        catalogue.load(tmp_path / "ends.py")
    (tmp_path / "broken.py").write_text("1 +")
    with pytest.raises(ValueError, match=r"broken\.py cannot be imported: SyntaxError"):
        catalogue.load("broken")
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"empty\.py must define study = Study"):
        catalogue.load("empty")


def test_studies_of_other_packages_are_found(folder, monkeypatch, toy):
    folder("alpha")
    foreign = catalogue.load(toy)
    entry = type("Entry", (), {"name": "toy", "load": lambda self: foreign})()
    monkeypatch.setattr(catalogue, "entry_points", lambda group: [entry])
    assert catalogue.names() == ["alpha", "toy"]
    assert catalogue.load("toy").source == "toy"
