import getpass
import json
import socket
from pathlib import Path

import pytest

from nla_llm.study import provenance


@pytest.fixture(scope="module")
def found():
    return provenance.collect(["run", f"--store={Path.home()}/results.sqlite", "--dask", "tcp://10.0.0.1:8786"])


def test_it_is_json_and_names_what_may_explain_a_number(found):
    assert json.loads(json.dumps(found)) == found
    assert {"python", "packages", "blas", "cpu", "cores", "memory_gib", "system", "git", "seeds"} <= set(found)
    assert found["packages"]["numpy"] == __import__("numpy").__version__
    assert any("threads" in library for library in found["blas"])
    assert found["cpu"]


def test_it_holds_nothing_private(found):
    text = json.dumps(found, ensure_ascii=False)
    assert str(Path.home()) not in text
    assert str(Path(provenance.__file__).parent) not in text
    assert "10.0.0.1" not in text
    assert not any(library.startswith("/") for library in found["blas"])
    if len(socket.gethostname()) > 4:
        assert socket.gethostname() not in text
    if getpass.getuser() != "root":
        assert getpass.getuser() not in text
    assert found["arguments"] == ["run", "--store=…/results.sqlite", "--dask", "tcp://…"]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/data/models/q.safetensors", "…/q.safetensors"),
        ("~/models/base", "…/base"),
        ("C:\\Users\\me\\a.txt", "…/a.txt"),
        ("\\\\server\\share\\a.txt", "…/a.txt"),
        ("--out=/x/y", "--out=…/y"),
        ("../up/a.txt", "../up/a.txt"),
        ("studies/my_study.py", "studies/my_study.py"),
        ("[Errno 2] No such file: '/a b/c d.txt'", "[Errno 2] No such file: '…/c d.txt'"),
        ("1/2 and a / b", "1/2 and a / b"),
    ],
)
def test_paths_are_cut_to_their_names(text, clean):
    assert provenance.scrub(text) == clean


def test_the_host_name_is_hidden(monkeypatch):
    monkeypatch.setattr(provenance, "_hosts", lambda: {"box17"})
    assert provenance.scrub("lost box17 at box17.local, not box1717") == "lost … at ….local, not box1717"


def test_the_user_name_is_hidden_in_paths_and_left_in_words(monkeypatch):
    monkeypatch.setattr(provenance, "_users", lambda: {"run"})
    assert provenance.scrub("run/a of work/run/b in a run") == "…/a of work/…/b in a run"


def test_no_git_is_no_error(monkeypatch):
    monkeypatch.setattr(provenance.shutil, "which", lambda name: None)
    assert provenance.git() is None


def test_a_package_inside_a_foreign_repository_has_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "_PACKAGE", tmp_path / "nla_llm")
    assert provenance.git() is None
