"""The typesetter: a document as plain data, set by the template of this package.

All text reaches Typst as JSON beside the template, never as a piece of program, so any character may stand in it.
"""

from __future__ import annotations

import json
import re
from importlib import resources
from typing import Any, Literal

import typst

__all__ = ["compile_pdf", "render"]

# Neither XML nor paper has a place for them: control characters, and halves of surrogate pairs.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")

# Outside of these blocks the fonts that come with Typst have (nearly) nothing; then, and only then, the machine's own
# fonts are asked, at the price that the bytes of the PDF depend on them.
_EMBEDDED = re.compile(r"[\u0000-\u2bff\u2e00-\u2e7f\ua700-\ua7ff\ufb00-\ufb06\ufe00-\ufe0f\U0001d400-\U0001d7ff]*")


def compile_pdf(document: dict[str, Any]) -> bytes:
    """Set a document (see ``template.typ`` of this folder for its fields) and return the PDF.

    The same document gives the same bytes: there is no date in it, and its fonts come with the typesetter.

    Raises
    ------
    RuntimeError
        If Typst refuses the document.
    """
    return render(document, "pdf")


def render(document: dict[str, Any], file_format: Literal["pdf", "png", "svg"], ppi: float | None = None) -> bytes:
    """Set a document as "pdf", or a one-page document as "png" or "svg"."""
    content = json.dumps(_printable(document), ensure_ascii=False, allow_nan=False)
    template = resources.files(__package__).joinpath("template.typ").read_bytes()
    compiler = typst.Compiler(
        template,
        sys_inputs={"document": content},
        ignore_system_fonts=_EMBEDDED.fullmatch(content) is not None,
    )
    output = compiler.compile(format=file_format, ppi=ppi)
    if not isinstance(output, bytes):
        raise TypeError(f"a report is one file, got {type(output).__name__} for format {file_format!r}")
    return output


def _printable(value: Any) -> Any:
    """The same data with a replacement sign for every character that cannot be printed."""
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {name: _printable(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_printable(entry) for entry in value]
    return value
