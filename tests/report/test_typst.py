import importlib
from types import SimpleNamespace

import pytest

from nla_llm.report import typst


class _StopError(Exception):
    pass


@pytest.mark.parametrize(("words", "embedded"), [("Ünï κ₂ ‖P‖ ≤ ×10⁻⁷ ✓", True), ("漢字", False)])
def test_fonts_of_the_machine_are_asked_only_for_what_no_embedded_font_has(monkeypatch, words, embedded):
    seen = {}

    def compiler(template, **options):
        seen.update(options)
        raise _StopError

    monkeypatch.setattr(typst, "typst", SimpleNamespace(Compiler=compiler))
    with pytest.raises(_StopError):
        typst.compile_pdf({"title": words})
    assert seen["ignore_system_fonts"] is embedded


def test_fonts_of_the_template_are_embedded():
    families = importlib.import_module("typst").Fonts(include_system_fonts=False).families()
    assert {"Libertinus Serif", "New Computer Modern Math", "DejaVu Sans Mono"} <= set(families)


def test_a_document_that_is_not_one_is_refused():
    with pytest.raises(RuntimeError):
        typst.compile_pdf({"title": "no kind"})
