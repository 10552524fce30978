import os
import stat

import pytest

from nla_llm.report import files
from nla_llm.report.files import ReportError, write_files


def test_files_are_written_and_replaced(tmp_path):
    write_files(tmp_path / "new", {"a.csv": b"1", "sub/b.csv": b"2"})
    write_files(tmp_path / "new", {"a.csv": b"3"})
    found = {str(p.relative_to(tmp_path / "new")): p.read_bytes() for p in (tmp_path / "new").rglob("*") if p.is_file()}
    assert found == {"a.csv": b"3", "sub/b.csv": b"2"}


def test_nobody_is_locked_out_of_a_report(tmp_path):
    write_files(tmp_path, {"a": b""})
    (tmp_path / "plain").write_bytes(b"")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_nothing_is_renamed_before_all_is_written(tmp_path, monkeypatch):
    write_files(tmp_path, {"a": b"old"})
    calls = []

    def second_fails(handle):
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", second_fails)
    with pytest.raises(ReportError, match="No space left"):
        write_files(tmp_path, {"a": b"new", "b": b"new"})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"old"}


def test_a_folder_in_the_way_is_kept(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(ReportError, match=r"\(a: a folder has this name\)"):
        write_files(tmp_path, {"a": b"new"})
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_gets_a_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ReportError, match="make the folder writable"):
        write_files(tmp_path, {"a": b"new"})
    tmp_path.chmod(0o700)
