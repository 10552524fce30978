import math
import re

import numpy as np
import pytest

from nla_llm.report import text

_DIGITS = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹−", "-0123456789-", "\u202f")


def _read(printed):
    """Numbers of a printed estimate."""
    plain = printed.translate(_DIGITS)
    body, _, power = plain.partition("×10")
    scale = 10.0 ** int(power or 0)
    return [float(number) * scale for number in re.findall(r"-?\d+(?:\.\d+)?", body)]


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 1.0, 37.0, 1e4, 1e12])
def test_printed_interval_holds_the_interval_and_little_more(scale):
    rng = np.random.default_rng(0)
    for _ in range(100):
        value = scale * rng.standard_normal()
        lower, upper = value - scale * rng.exponential(0.05), value + scale * rng.exponential(0.05)
        shown, low, high = _read(text.format_estimate(value, lower, upper))
        slack = 1e-9 * scale
        assert low <= lower + slack
        assert high >= upper - slack
        assert high - low <= 1.25 * (upper - lower)
        assert abs(shown - value) <= 0.06 * (upper - lower) + slack
        assert low - slack <= shown <= high + slack


@pytest.mark.parametrize(
    ("estimate", "printed"),
    [
        ((0.5, 0.5, 0.5), "0.5"),
        ((math.nan, 0, 1), "n/a"),
        ((1.0, 0.5, math.inf), "1 [0.5, ∞]"),
        ((1.0, math.nan, math.nan), "1 [?, ?]"),
        ((-0.25, -0.3, -0.2), "−0.25 [−0.30, −0.20]"),
        ((0.0, 0.0, 0.0), "0"),
        ((0.3, 0.1 + 0.2 - 0.05, 0.35), "0.30 [0.25, 0.35]"),
    ],
)
def test_format_estimate(estimate, printed):
    assert text.format_estimate(*estimate) == printed


def test_format_number_keeps_integers_whole():
    assert text.format_number(123456789) == "123\u202f456\u202f789"
    assert text.format_number(4096) == "4096"
    assert text.format_number(123456.7) == "1.235×10⁵"


def test_columns_share_their_decimals():
    assert text.format_column([0.5, -12.25, math.nan]) == ["0.50", "−12.25", "n/a"]
    assert text.format_column([1e-9, 1.0]) == ["1×10⁻⁹", "1"]
    assert text.format_column([]) == []


def test_only_code_and_addresses_are_marked():
    assert text.runs("*a* _b_ $c$ #d `") == [{"text": "*a* _b_ $c$ #d `"}]
    assert text.runs("`a_b`") == [{"code": "a_b"}]
    assert [run.get("url") for run in text.runs("https://example.org/a, arXiv:2106.09685v2 doi 10.1000/x.")] == [
        "https://example.org/a",
        None,
        "https://arxiv.org/abs/2106.09685",
        None,
        "https://doi.org/10.1000/x",
        None,
    ]


def test_nothing_is_lost_between_runs():
    sentence = "see arXiv 2009.14794 and `m` at https://example.org/x_y (and a word " + "w" * 90 + ")"
    joined = "".join(run.get("text", run.get("code", "")) for run in text.runs(sentence))
    assert joined.replace("\u200b", "").replace("\u00a0", " ") == sentence.replace("`", "")


def test_paragraphs_end_at_empty_lines():
    assert text.paragraphs("one\ntwo\n\nthree\n") == [[{"text": "one two"}], [{"text": "three"}]]
    assert text.paragraphs("  ") == []
