import io
import itertools

from rich.console import Console

from nla_llm.study import Result, progress


def result(n, status="ok", reason=""):
    return Result("demo", {"study": "demo", "n": n}, "v1", status, reason, (), 7, 0.25)


def shown(results, *, total=None, size=None, **console):
    out = Console(file=io.StringIO(), width=100, **console)
    with progress.progress(len(results) if total is None else total, console=out, size=size) as advance:
        for one in results:
            advance(one)
    return out.file.getvalue()


def test_without_a_terminal_there_are_few_plain_lines():
    text = shown([result(n) for n in range(500)])
    assert text.startswith("500 of 500 cells in ")
    assert text.count("\n") == 1


def test_time_left_is_told_now_and_then(monkeypatch):
    ticks = itertools.count(0, 20)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks))
    lines = shown([result(n) for n in range(4)], total=8).splitlines()
    assert lines == ["2 of 8 cells, about 2 min left", "4 of 8 cells, about 80 s left"]


def test_trouble_is_told_at_once_with_its_brackets():
    text = shown([result(1, "failed", "KeyError: 'x' [study.py:1 measure]"), result(2)])
    assert text.splitlines()[0] == "failed: demo (n=1): KeyError: 'x' [study.py:1 measure]"


def test_many_troubles_do_not_flood_the_terminal():
    lines = shown([result(n, "failed", "why") for n in range(100)]).splitlines()
    assert len(lines) == 12
    assert lines[10] == "more cells did not end well; the summary counts them"


def test_a_terminal_has_a_bar_with_count_and_time():
    text = shown([result(n) for n in range(3)] + [result(9, "timeout", "late")], force_terminal=True)
    assert "timeout: demo (n=9): late" in text
    assert "4/4" in text
    assert "0:00:0" in text


def test_nothing_is_shown_when_switched_off(capsys):
    with progress.progress(3, enabled=False) as advance:
        advance(result(1, "failed", "why"))
    assert capsys.readouterr() == ("", "")


def test_bytes_are_counted_where_cells_say_how_many(monkeypatch):
    """A large cell is more of the way than a small one."""
    ticks = itertools.count(0, 20)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(ticks))
    sizes = {0: 3_000_000, 1: 1_000_000, 2: 196_000_000}
    lines = shown([result(n) for n in sizes], total=200_000_000, size=lambda one: sizes[one.cell["n"]]).splitlines()
    assert lines == ["4.0 MB of 0.20 GB, about 33 min left", "0.20 GB of 0.20 GB in 60 s"]


def test_a_bar_of_bytes():
    text = shown([result(0), result(1)], total=3000, size=lambda one: 1000 * (one.cell["n"] + 1), force_terminal=True)
    assert "3.0/3.0 kB" in text
