"""Numbers and sentences as a report prints them."""

from __future__ import annotations

import math
import re
from typing import Any

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_NARROW = "\u202f"  # narrow no-break space between groups of thousands
_MINUS = "\u2212"
_LONG_WORD = re.compile(r"[^\s\u00a0]{26,}")
_PIECE = re.compile(r".{0,11}[_/]|.{12}")
_FIXED = "\u00a0"  # no-break space
_GLUE = re.compile(r"(?<=\S) (?=[=<>≤≥≈±×%] ?\S?)|(?<=[=<>≤≥≈±×]) (?=\S)")
_LINK = re.compile(
    r"(?P<code>`[^`\n]+`)|(?P<url>https?://[^\s<>\"]*[^\s<>\".,;:)\]])|arxiv[: ]\s?(?P<arxiv>\d{4}\.\d{4,5})(?:v\d+)?"
    r"|\bdoi[: ]\s?(?P<doi>10\.\d{4,9}/[^\s<>\"]*[^\s<>\".,;:)\]])",
    re.IGNORECASE,
)


def format_number(value: float, digits: int = 4) -> str:
    """Print a number in few digits; powers of ten as such, thousands in groups.

    Examples
    --------
    >>> format_number(0.123456), format_number(1.5e-7), format_number(float("nan")), format_number(-float("inf"))
    ('0.1235', '1.5×10⁻⁷', 'n/a', '−∞')
    >>> format_number(8388608)
    '8\u202f388\u202f608'
    """
    if isinstance(value, int) and abs(value) < 10**12:
        return _group(f"{value}")
    number = float(value)
    if not math.isfinite(number):
        return _special(number)
    if number == 0 or 1e-3 <= abs(number) < 1e5:
        return _group(f"{number:.{digits}g}") if abs(number) < 10**digits else _group(f"{number:.0f}")
    mantissa, exponent = f"{number:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return _group(mantissa) + _power(int(exponent))


def format_estimate(value: float, lower: float, upper: float) -> str:
    """Print an estimate as ``value [lower, upper]`` with no more digits than its interval deserves.

    Two digits of the width of the interval are kept, and its ends are rounded outwards, so what is printed holds the
    interval. An exact number (both ends equal to it) is printed alone; a missing end is said to be missing.

    Examples
    --------
    >>> format_estimate(0.12348, 0.1211, 0.12566)
    '0.1235 [0.1211, 0.1257]'
    >>> format_estimate(12345.6, 12000.0, 13000.0), format_estimate(0.5, 0.5, 0.5)
    ('12\u202f300 [12\u202f000, 13\u202f000]', '0.5')
    >>> format_estimate(2.5e-7, 2.1e-7, 3.2e-7)
    '2.5 [2.1, 3.2]×10⁻⁷'
    >>> format_estimate(0.3, 0.2, float("inf"))
    '0.3 [0.2, ∞]'
    """
    value, lower, upper = float(value), float(lower), float(upper)
    if lower == upper == value or math.isnan(value):
        return format_number(value)
    if not (math.isfinite(lower) and math.isfinite(upper) and math.isfinite(value)):
        ends = ", ".join("?" if math.isnan(end) else format_number(end) for end in (lower, upper))
        return f"{format_number(value)} [{ends}]"
    size = max(abs(value), abs(lower), abs(upper))
    width = max(abs(upper - lower), size * 1e-6)  # past six digits nobody reads on
    shift = 0 if 1e-3 <= size < 1e5 else math.floor(math.log10(size))
    unit = math.floor(math.log10(width) + 1e-9) - 1 - shift  # the last digit kept is that of 10^unit
    scale = 10.0**-shift
    middle = _fixed(round(value * scale / 10.0**unit), unit)
    low = _fixed(math.floor(_snap(lower * scale / 10.0**unit)), unit)
    high = _fixed(math.ceil(_snap(upper * scale / 10.0**unit)), unit)
    return f"{middle} [{low}, {high}]" + (_power(shift) if shift else "")


def format_column(values: list[float]) -> list[str]:
    """Print numbers that stand under one another with the same number of decimals, where their sizes allow it.

    Examples
    --------
    >>> format_column([0.5, 0.125, 2.0])
    ['0.500', '0.125', '2.000']
    """
    sizes = [abs(v) for v in values if math.isfinite(v) and v != 0]
    if not sizes or max(sizes) >= 1e5 or min(sizes) < 1e-3 or max(sizes) / min(sizes) > 1e4:
        return [format_number(v) for v in values]
    needed = max(_decimals(v) for v in values if math.isfinite(v))
    wanted = max(0, 3 - math.floor(math.log10(max(sizes))) if max(sizes) < 1e4 else 0)
    decimals = min(needed, max(wanted, 2 - math.floor(math.log10(min(sizes)))))
    return [_group(f"{v:.{decimals}f}") if math.isfinite(v) else _special(v) for v in values]


def aligned(numbers: list[str]) -> list[str]:
    """Pad printed numbers with spaces of the width of digits, so that their points stand under one another.

    Examples
    --------
    >>> aligned(["0.134", "0.4", "12"])
    ['0.134', '0.4\u2007\u2007', '12\u2008\u2007\u2007\u2007']
    """
    if any("×" in number for number in numbers):
        return numbers
    tails = [len(number.partition(".")[2]) for number in numbers]
    return [
        number
        if not number[-1:].isdigit() or tail == max(tails)
        else number + ("" if "." in number else "\u2008") + "\u2007" * (max(tails) - tail)
        for number, tail in zip(numbers, tails, strict=True)
    ]


def paragraphs(text: str) -> list[list[dict[str, str]]]:
    """Paragraphs of a text (they are parted by an empty line), each as its runs; see `runs`."""
    parts = re.split(r"\n\s*\n", text.strip())
    return [runs(" ".join(part.split())) for part in parts if part.strip()]


def runs(text: str) -> list[dict[str, str]]:
    r"""Runs of plain text, ``code`` between back-ticks, and links to addresses, arXiv numbers and DOIs.

    Nothing else has a meaning, so a text can hold any character.

    Examples
    --------
    >>> runs("see arXiv 2009.14794, `m`")[1:]
    [{'text': 'arXiv\xa02009.14794', 'url': 'https://arxiv.org/abs/2009.14794'}, {'text': ', '}, {'code': 'm'}]
    """
    found: list[dict[str, str]] = []
    end = 0
    for match in _LINK.finditer(text):
        found.append({"text": text[end : match.start()]})
        found.append(_run(match))
        end = match.end()
    found.append({"text": text[end:]})
    return [_glued(run) for run in found if run.get("text") != ""]


def _glued(run: dict[str, str]) -> dict[str, str]:
    """Keep relations, arXiv numbers and percentages on one line."""
    if "text" not in run:
        return run
    held = run["text"].replace(" ", _FIXED) if "url" in run else _GLUE.sub(_FIXED, run["text"])
    return {**run, "text": breakable(held)}


def breakable(text: str) -> str:
    """Let a word that may be wider than a column be broken, by invisible spaces of no width.

    Examples
    --------
    >>> breakable("a short text"), breakable("n" * 40).count("\u200b")
    ('a short text', 3)
    """
    return _LONG_WORD.sub(lambda word: _PIECE.sub("\\g<0>\u200b", word.group()), text)


def _run(match: re.Match[str]) -> dict[str, str]:
    whole = match.group()
    if match["code"]:
        return {"code": whole.strip("`")}
    if match["arxiv"]:
        return {"text": whole, "url": f"https://arxiv.org/abs/{match['arxiv']}"}
    if match["doi"]:
        return {"text": whole, "url": f"https://doi.org/{match['doi']}"}
    return {"text": whole, "url": whole}


def plain(value: Any, limit: int = 400) -> str:
    """Text of any value on one line, shortened in the middle where it is very long."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def _special(number: float) -> str:
    return "n/a" if math.isnan(number) else "∞" if number > 0 else f"{_MINUS}∞"


def _decimals(number: float) -> int:
    digits = f"{number:.6g}"
    return 0 if "e" in digits else len(digits.partition(".")[2])


def _snap(number: float) -> float:
    """The nearest integer where binary rounding alone keeps ``number`` from being one."""
    nearest = round(number)
    return float(nearest) if abs(number - nearest) <= 1e-9 * max(1.0, abs(number)) else number


def _fixed(count: int, unit: int) -> str:
    if unit >= 0:
        return _group(str(count * 10**unit))
    return _group(f"{count * 10.0**unit:.{-unit}f}")


def _power(exponent: int) -> str:
    return f"×10{str(exponent).translate(_SUPERSCRIPTS)}"


def _group(digits: str) -> str:
    whole, point, rest = digits.lstrip("-").partition(".")
    if len(whole) > 4:
        whole = f"{int(whole):,}".replace(",", _NARROW)
    return f"{_MINUS if digits.startswith('-') else ''}{whole}{point}{rest}"
