import math
import os
import sqlite3
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from nla_llm.study import Result, Store, StoreError, catalogue, store_file
from nla_llm.study.store_file import APPLICATION_ID


def result(n=1, *, status="ok", records=({"x": 1.5},), version="v1", **more):
    return Result("demo", {"study": "demo", "n": n}, version, status, more.pop("reason", ""), records, 7, 0.25, **more)


@pytest.fixture
def store(store_path):
    with Store(store_path) as opened:
        yield opened


def fill(path, count=200):
    with Store(path) as store:
        run = store.begin({})
        for n in range(count):
            store.put(result(n, run=run))


def test_results_come_back_as_they_were(store):
    sent = [
        result(n, records=({"x": n / 3, "word": "é", "none": None, "yes": True, "big": 2**70},), run="r")
        for n in (1, 2)
    ]
    for one in sent:
        store.put(one)
    assert [replace(one, created="") for one in store.results("demo")] == sent
    assert [r.cell["n"] for r in store.select([sent[1].key, "absent", sent[0].key])] == [2, 1]


def test_nan_and_infinities_survive(store):
    store.put(result(records=({"a": math.nan, "b": math.inf, "c": -math.inf},)))
    frame = store.frame("demo", only_current=False)
    assert np.isnan(frame["a"][0])
    assert (frame["b"][0], frame["c"][0]) == (math.inf, -math.inf)


def test_an_identical_key_is_never_there_twice(store):
    for value in (1, 2):
        store.put(result(records=({"x": value},)))
    assert [one.records for one in store.results()] == [({"x": 2},)]


def test_a_failure_does_not_replace_a_result_unless_told_to(store):
    store.put(result())
    store.put(result(status="timeout", records=()))
    assert [one.status for one in store.results()] == ["ok"]
    store.put(result(status="timeout", records=()), replace_ok=True)
    assert [one.status for one in store.results()] == ["timeout"]
    store.put(result())
    assert [one.status for one in store.results()] == ["ok"]


def test_the_file_is_in_wal_mode_and_bears_our_mark(store, store_path):
    with sqlite3.connect(store_path) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert database.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    database.close()
    assert [file.name for file in store_path.parent.iterdir() if file.name.startswith(".")] == []


def foreign_database(path):
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE precious (a)")
        database.execute("INSERT INTO precious VALUES (1)")
    database.close()


def later_version(path):
    fill(path, 1)
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()


def truncated(size):
    def make(path):
        fill(path)
        with path.open("r+b") as file:
            file.truncate(size if size >= 0 else path.stat().st_size + size)

    return make


def garbled(path):
    fill(path)
    content = bytearray(path.read_bytes())
    content[4096:-4096] = b"\x5a" * (len(content) - 8192)
    path.write_bytes(content)


DAMAGES = {
    "empty file": (truncated(0), "damaged"),
    "half a header": (truncated(50), "damaged"),
    "few pages": (truncated(8192), "damaged"),
    "odd size": (truncated(10000), "damaged"),
    "last page lost": (truncated(-4096), "damaged"),
    "garbled": (garbled, "damaged"),
    "text": (lambda path: path.write_text("dear diary\n" * 100), "not a store"),
    "short text": (lambda path: path.write_text("x"), "not a store"),
    "database of another program": (foreign_database, "another program"),
    "later version": (later_version, "later"),
}


@pytest.mark.parametrize(("damage", "word"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_and_foreign_files_are_refused_and_left_alone(store_path, damage, word):
    store_path.parent.mkdir()
    damage(store_path)
    before = store_path.read_bytes()
    with pytest.raises(StoreError, match=word) as caught:
        Store(store_path)
    assert str(store_path) in str(caught.value)
    assert store_path.read_bytes() == before


def test_a_store_whose_log_was_not_merged_is_whole(store_path, tmp_path):
    copy = tmp_path / "copy.sqlite"
    with Store(store_path) as store:
        for n in range(50):
            store.put(result(n))
        copy.write_bytes(store_path.read_bytes())
        copy.with_name("copy.sqlite-wal").write_bytes(store_path.with_name(store_path.name + "-wal").read_bytes())
    with Store(copy) as other:
        assert len(list(other.results())) == 50


def test_folders_and_missing_files_get_a_sentence(tmp_path):
    with pytest.raises(StoreError, match="is a folder"):
        Store(tmp_path)
    with pytest.raises(StoreError, match="there is no store"):
        Store(tmp_path / "absent.sqlite", create=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be used"):
        Store(tmp_path / "file" / "store.sqlite")


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="needs a user without all rights")
def test_a_read_only_folder_gets_a_sentence(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot be"):
        Store(tmp_path / "store.sqlite")


def test_a_store_on_a_read_only_medium_can_be_read(store_path, monkeypatch):
    fill(store_path, 3)
    monkeypatch.setattr(store_file.os, "access", lambda *_: False)
    with Store(store_path, create=False) as store:
        assert len(list(store.results())) == 3
        with pytest.raises(StoreError, match="read-only"):
            store.put(result(9))


def test_a_full_disk_gets_a_sentence_and_loses_nothing(store, store_path):
    store.put(result())
    pages = store._database.execute("PRAGMA page_count").fetchone()[0]
    store._database.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreError, match="full"):
        store.put(result(2, records=({"x": "long" * 10**5},)))
    store.close()
    with Store(store_path) as again:
        assert [one.cell["n"] for one in again.results()] == [1]


def test_frame_has_a_row_for_every_record_and_every_failure(store):
    store.put(result(1, records=({"x": 1}, {"x": 2})))
    store.put(result(2, status="failed", records=(), reason="why"))
    frame = store.frame("demo", only_current=False)
    assert list(frame.columns) == ["study", "n", "x", "status", "reason", "seconds"]
    assert list(frame["n"]) == [1, 1, 2]
    assert list(frame["status"]) == ["ok", "ok", "failed"]


def test_frame_keeps_to_the_code_as_it_is_and_to_the_grid(store, toy):
    study = catalogue.load(toy)
    small, default = study.grid("small"), study.grid("default")
    for version, mean in (("old", 0.0), (study.version({}), 1.0)):
        for cell in default:
            store.put(Result("toy", cell, version, "ok", "", ({"mean": mean},), 1, 0.1))
    assert len(store.frame(study, only_current=False)) == 2 * len(default)
    assert set(store.frame(study)["mean"]) == {1.0}
    frame = store.frame(study, scale="small")
    assert [(n, r) for n, r in zip(frame["n"], frame["repeat"], strict=True)] == [(c["n"], c["repeat"]) for c in small]


def test_exports_hold_every_row_and_value(store, tmp_path):
    run = store.begin({})
    store.put(result(1, records=({"x": math.inf, "y": math.nan, "mixed": "a", "count": 1},), run=run))
    store.put(result(2, records=({"x": -math.inf, "y": 0.1, "mixed": 2, "count": 2.5, "more": True},), run=run))
    store.put(result(3, status="failed", records=(), reason='a "quoted",\nreason', run=run))
    assert store.export_csv(tmp_path / "a.csv") == store.export_parquet(tmp_path / "a.parquet") == 3
    from_csv, from_parquet = pd.read_csv(tmp_path / "a.csv"), pd.read_parquet(tmp_path / "a.parquet")
    assert list(from_csv.columns) == list(from_parquet.columns)
    for frame in (from_csv, from_parquet):
        assert list(frame["x"])[:2] == [math.inf, -math.inf]
        assert np.isnan(frame["y"][0])
        assert frame["y"][1] == 0.1
        assert list(frame["mixed"])[:2] == ["a", "2"]
        assert list(frame["seed"]) == [7, 7, 7]
        assert frame["reason"][2] == 'a "quoted",\nreason'
        assert set(frame["run"]) == {run}
    assert (tmp_path / "a.csv").read_text().splitlines()[1].split(",")[2:4] == ["inf", "nan"]


def test_exports_do_not_overwrite_unless_told_to(store, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        store.export_csv(path)
    assert path.read_text() == "mine"
    store.export_csv(path, overwrite=True)
    assert path.read_text().startswith("study,status")
    assert list(tmp_path.glob(".*")) == []


def test_parquet_without_pyarrow_names_the_extra(store, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"nla-llm\[parquet\]"):
        store.export_parquet(tmp_path / "a.parquet")


def test_provenance_is_kept_by_run(store):
    first, second = store.begin({"a": 1}), store.begin({"a": 2})
    store.finish(first, {"a": 1, "wall_seconds": 2.0})
    assert store.provenance(first) == {"a": 1, "wall_seconds": 2.0}
    assert set(store.runs()) == {first, second}
    with pytest.raises(ValueError, match="has no run"):
        store.provenance("absent")
