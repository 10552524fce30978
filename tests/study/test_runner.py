import os
import signal
import sqlite3
import sys
import threading
import time
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from nla_llm.study import Claim, Interrupted, RunError, Store, Study, catalogue, execution, run, runner, workers


def small(*, jobs=0, **options):
    return {"scale": "small", "jobs": jobs, "progress": False, **options}


def contents(path):
    """All that must not depend on how the cells were run."""
    with Store(path) as store:
        return [replace(result, seconds=0.0, run="", created="") for result in store.results()]


def executions(path):
    return path.read_text().splitlines() if path.exists() else []


def make(**parts):
    """Study that lives in this process."""
    given = {"cells": lambda scale: [{"n": n} for n in range(4)], "measure": lambda cell, seed: {"x": cell["n"]}}
    return Study("made", "t", "q", "s", **(given | parts))


def test_results_do_not_depend_on_workers_or_order(toy, tmp_path):
    study = catalogue.load(toy)
    turned = replace(study, cells=lambda scale: list(reversed(study.cells(scale))), source="")
    run(toy, store=tmp_path / "none.sqlite", **small(threads=1))
    run(turned, store=tmp_path / "turned.sqlite", **small(threads=1))
    summary = run(toy, store=tmp_path / "two.sqlite", **small(jobs=2, threads=1))
    expected = contents(tmp_path / "none.sqlite")
    assert expected == contents(tmp_path / "two.sqlite") == contents(tmp_path / "turned.sqlite")
    assert len({result.seed for result in expected}) == len(expected) == 6
    assert [r.cell["n"] for r in summary.studies[0].results] == [2, 2, 4, 4, 8, 8]  # in the order of the grid
    assert summary.exit_code == 0
    assert "confirmed: the mean is below 0.9" in str(summary)


def test_everything_that_can_happen_to_a_cell_has_a_word(toy, store_path, monkeypatch):
    monkeypatch.setattr(workers, "GRACE_SECONDS", 0.5)
    summary = run(toy, store=store_path, scale="full", jobs=2, timeout=1.0, progress=False)
    found = {result.cell["way"]: (result.status, result.reason) for result in summary.studies[0].results}
    assert {way: status for way, (status, _) in found.items()} == {
        "skip": "skipped",
        "diverge": "diverged",
        "overflow": "diverged",
        "raise": "failed",
        "exit": "failed",
        "hang": "timeout",
        "stubborn": "timeout",
        "die": "failed",
        "fine": "ok",
    }
    assert found["skip"][1] == "nothing to compute"
    assert "SIGKILL" in found["die"][1]
    assert "killed" in found["stubborn"][1]
    assert found["raise"][1].startswith("RuntimeError: cannot read …/weights.bin [toy.py:")
    assert summary.exit_code == 1
    assert summary.studies[0].counts == {"ok": 1, "failed": 3, "skipped": 1, "timeout": 2, "diverged": 2}


def test_finished_cells_are_not_run_again_and_failed_ones_are(store_path):
    ran = []

    def measure(cell, seed):
        ran.append(cell["n"])
        if cell["n"] == 2 and len(ran) <= 4:
            raise OSError("the disk was away")
        return {"x": 1}

    study = make(measure=measure)
    assert run(study, store=store_path, jobs=0, progress=False).exit_code == 1
    second = run(study, store=store_path, jobs=0, progress=False)
    assert sorted(ran[:4]) == [0, 1, 2, 3]  # in the order of the hash of their cells
    assert ran[4:] == [2]
    assert (second.exit_code, second.computed, second.studies[0].counts) == (0, 1, {"ok": 4})
    assert run(study, store=store_path, jobs=0, progress=False, resume=False).computed == 4
    assert len(ran) == 9


def test_another_version_of_the_code_is_computed_anew(store_path):
    versions = ["one", "one", "two"]
    computed = [
        run(make(code_version=lambda cell, v=v: v), store=store_path, jobs=0, progress=False).computed for v in versions
    ]
    assert computed == [4, 0, 4]


def wait_for(path, count):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(executions(path)) < count:
        time.sleep(0.01)


def test_kill_loses_at_most_the_running_cells(start, store_path, toy, tmp_path):
    process = start(jobs=2, sleep=0.15)
    wait_for(tmp_path / "log.txt", 7)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = contents(store_path)
    begun = len(executions(tmp_path / "log.txt"))
    assert begun - 2 <= len(kept) < 12  # two workers, so at most two cells were running
    time.sleep(0.5)
    assert len(executions(tmp_path / "log.txt")) == begun  # the workers ended with their parent
    summary = run(toy, store=store_path, jobs=0, progress=False)
    assert summary.computed == 12 - len(kept)
    assert [result for result in contents(store_path) if result in kept] == kept
    assert summary.studies[0].counts == {"ok": 12}


def test_two_runs_at_once_share_a_store(start, store_path):
    both = [start(sleep=0.02, log=f"log{i}.txt") for i in range(2)]
    assert [(process.wait(60), process.stderr.read()) for process in both] == [(0, "")] * 2
    assert len(contents(store_path)) == 12
    with sqlite3.connect(store_path) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    with Store(store_path) as store:
        assert len(store.runs()) == 2


def test_ctrl_c_at_a_terminal_ends_workers_quietly(start, store_path, tmp_path):
    process = start(jobs=2, sleep=0.15)
    wait_for(tmp_path / "log.txt", 5)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to all processes of the command
    _, said = process.communicate(timeout=20)
    assert said.count("Traceback") == 1, said  # of the parent, none of a worker
    kept = contents(store_path)
    assert len(executions(tmp_path / "log.txt")) - 2 <= len(kept) < 12
    assert f"stopped: {len(kept)} cells computed and kept, {12 - len(kept)} left" in said


def test_ctrl_c_keeps_what_is_finished(store_path):
    ran = []

    def measure(cell, seed):
        ran.append(cell["n"])
        if len(ran) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return {"x": 1}

    with pytest.raises(Interrupted, match="2 cells computed and kept, 2 left") as caught:
        run(make(measure=measure), store=store_path, jobs=0, progress=False)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert caught.value.exit_code == 130
    assert caught.value.summary.provenance["interrupted"]
    assert [result.cell["n"] for result in contents(store_path)] == sorted(ran[:2])


def test_any_executor_will_do(toy, store_path, tmp_path):
    with ThreadPoolExecutor(2) as threads:
        run(toy, store=store_path, executor=threads, **small())
    run(toy, store=tmp_path / "none.sqlite", **small())
    assert contents(store_path) == contents(tmp_path / "none.sqlite")


def test_a_late_cell_in_a_thread_is_a_timeout_although_nothing_stops_it(store_path):
    study = make(cells=lambda scale: [{"n": 0}], measure=lambda cell, seed: time.sleep(0.2) or {"x": 1})
    with ThreadPoolExecutor(1) as threads:
        summary = run(study, store=store_path, executor=threads, timeout=0.05, progress=False)
    assert summary.studies[0].counts == {"timeout": 1}


def test_a_broken_executor_loses_no_cell(store_path):
    class Breaking(Executor):
        taken = 0

        def submit(self, function, *arguments):
            self.taken += 1
            if self.taken > 3:
                raise BrokenExecutor("no more")
            future = Future()
            if self.taken == 1:
                future.set_result(function(*arguments))
            else:
                future.set_exception(BrokenExecutor("a process died"))
            return future

    summary = run(make(), store=store_path, executor=Breaking(), progress=False)
    assert summary.studies[0].counts == {"ok": 1, "failed": 3}
    assert all("executor" in result.reason for result in summary.studies[0].failures)
    assert run(make(), store=store_path, jobs=0, progress=False).studies[0].counts["ok"] >= 1


def test_dask_is_an_executor(toy, store_path, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        run(toy, store=store_path, dask=cluster.scheduler_address, **small())
    run(toy, store=tmp_path / "none.sqlite", **small())
    assert contents(store_path) == contents(tmp_path / "none.sqlite")


def test_dask_that_is_not_there_gets_a_sentence(toy, store_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(RunError, match=r"nla-llm\[dask\]"):
        run(toy, store=store_path, dask="tcp://127.0.0.1:1", **small())


def test_exclusive_cells_come_last_and_one_at_a_time(store_path):
    running, most, order, lock = 0, {"alone": 0, "shared": 0}, [], threading.Lock()

    def measure(cell, seed):
        nonlocal running
        with lock:
            running += 1
            most[cell["study"]] = max(most[cell["study"]], running)
            order.append(cell["study"])
        time.sleep(0.05)
        with lock:
            running -= 1
        return {}

    both = [replace(make(measure=measure, exclusive=True), name="alone"), replace(make(measure=measure), name="shared")]
    with ThreadPoolExecutor(4) as threads:
        run(both, store=store_path, executor=threads, progress=False)
    assert order == ["shared"] * 4 + ["alone"] * 4
    assert most["alone"] == 1 < most["shared"]


@pytest.mark.parametrize(
    ("verdict", "expected", "code"),
    [
        ("confirmed", "confirmed", 0),
        ("open", "confirmed", 0),
        ("refuted", "refuted", 0),
        ("refuted", "confirmed", 3),
        ("confirmed", "refuted", 3),
    ],
)
def test_claims_decide_the_exit_code(store_path, verdict, expected, code):
    study = make(claims=lambda records: [Claim("a claim", verdict, "1", expected)])
    assert run(study, store=store_path, jobs=0, progress=False).exit_code == code


def test_failed_cells_weigh_more_than_claims(store_path):
    study = make(
        measure=lambda cell, seed: {"x": 1 / cell["n"]}, claims=lambda records: [Claim("a claim", "refuted", "1")]
    )
    summary = run(study, store=store_path, jobs=0, progress=False)
    assert summary.exit_code == 1
    assert "ZeroDivisionError" in str(summary)


def test_claims_that_cannot_be_judged_are_told(store_path):
    study = make(claims=lambda records: [Claim.decide("a claim", *records["absent"], 1)])
    summary = run(study, store=store_path, jobs=0, progress=False)
    assert summary.exit_code == 1
    assert "claims could not be judged: KeyError" in str(summary)
    assert summary.studies[0].counts == {"ok": 4}


def test_a_study_of_this_process_is_refused_to_workers_with_advice(store_path):
    with pytest.raises(RunError, match="jobs=0"):
        run(make(), store=store_path, jobs=1, progress=False)


def test_code_that_changed_during_the_run_fails_instead_of_mixing(toy):
    study = catalogue.load(toy)
    cell = study.grid("small")[0]
    assert execution.run_cell(str(toy), cell, study.version(cell)).status == "ok"
    stale = execution.run_cell(str(toy), cell, "of yesterday")
    assert stale.status == "failed"
    assert "another version" in stale.reason


def test_workers_with_other_sources_stop_the_run(toy, store_path, monkeypatch):
    monkeypatch.setattr(workers, "package_version", lambda: "of yesterday")
    with pytest.raises(RunError, match="was changed"):
        run(toy, store=store_path, **small(jobs=1))
    with Store(store_path) as store:
        assert [store.provenance(one)["interrupted"] for one in store.runs()] == [True]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"jobs": -1}, "jobs"),
        ({"jobs": 1.5}, "jobs"),
        ({"threads": 0}, "threads"),
        ({"timeout": 0}, "timeout"),
        ({"scale": "huge"}, "scale"),
        ({"executor": object(), "dask": "a"}, "either"),
    ],
)
def test_bad_arguments_are_refused_by_name(toy, store_path, options, word):
    with pytest.raises(ValueError, match=word):
        run(toy, store=store_path, **({"progress": False} | options))
    assert not store_path.exists()


def test_no_study_and_the_same_study_twice_are_refused(toy, store_path):
    with pytest.raises(ValueError, match="no study to run"):
        run([], store=store_path)
    with pytest.raises(ValueError, match="more than once"):
        run([toy, toy], store=store_path)


def test_provenance_tells_how_it_was_run(toy, store_path):
    summary = run(toy, store=store_path, arguments=["run", str(toy)], **small())
    facts = summary.provenance
    assert facts["arguments"] == ["run", "…/toy.py"]
    assert facts["run"]["scale"] == "small"
    assert facts["wall_seconds"] > 0
    assert summary.studies[0].provenance == (facts,)
    assert runner.DEFAULT_TIMEOUT == 600


def test_the_provenance_of_a_mixed_run_tells_which_study_has_which_scale():
    studies = [SimpleNamespace(name=name) for name in ("a", "b", "c")]
    assert runner._scales(studies, ["small", "default", "small"]) == "small (a, c), default (b)"


def test_a_claim_that_cannot_be_judged_costs_no_other(store_path):
    def lost(records):
        return Claim.decide("a claim", *records["absent"], 1)

    kept = Claim("another", "confirmed", "1")
    study = make(claims=lambda records: [partial(lost, records), kept, lambda: [kept]])
    summary = run(study, store=store_path, jobs=0, progress=False)
    assert summary.exit_code == 1
    assert summary.studies[0].claims == (kept, kept)
    assert summary.studies[0].trouble.startswith("lost could not be judged: KeyError")
