import io
import itertools

from rich.console import Console

from nla_llm.study import Result, progress


def result(n, status="ok", reason=""):
    return Result("demo", {"study": "demo", "n": n}, "v1", status, reason, (), 7, 0.25)


def shown(results, *, total=None, **console):
    out = Console(file=io.StringIO(), width=100, **console)
    with progress.progress(len(results) if total is None else total, console=out) as advance:
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
