"""Whatever the documentation shows runs: docstrings, the README's recipes, the recipe for adding a method."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
from pathlib import Path

import pytest

import nla_llm

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    name
    for _, name, _ in pkgutil.walk_packages(nla_llm.__path__, "nla_llm.")
    if not name.startswith("nla_llm._studies") and not name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert results.failed == 0


def test_docstrings_have_examples():
    """The finder above would pass on an empty set: there must be many, all over the package."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [t for name in MODULES for t in finder.find(importlib.import_module(name)) if t.examples]
    assert len(examples) > 100


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


RECIPES = [
    (path.name, number, code)
    for path in (ROOT / "README.md", ROOT / "docs" / "adding-a-method.md")
    for number, code in enumerate(blocks(path, "python"))
]


@pytest.mark.parametrize(("path", "number", "code"), RECIPES, ids=[f"{p}-{n}" for p, n, _ in RECIPES])
def test_recipes_run(path, number, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, f"{path} block {number}", "exec"), {"__name__": "__main__"})  # noqa: S102 - our own text


def test_the_first_recipe_fits_twenty_lines():
    lines = [line for line in blocks(ROOT / "README.md", "python")[0].splitlines() if line.strip()]
    assert len(lines) <= 20


def test_the_readme_has_the_two_commands():
    main, tests = (blocks(ROOT / "README.md", "sh")[i].strip() for i in (0, 1))
    assert main.endswith("nla-llm run")
    assert tests.endswith("pytest -n auto")
    assert "\n" not in main + tests


def test_commands_in_the_readme_exist():
    from typer.main import get_command

    from nla_llm.cli.app import app

    verbs = set(get_command(app).commands)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    used = {shlex.split(line)[1] for line in re.findall(r"(?:^|`)(nla-llm [^`\n]+)", text, re.MULTILINE)}
    assert used - {"--help"} <= verbs
    assert {"attention", "update", "check"} <= used


def test_links_in_the_documentation_lead_somewhere():
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert "://" in target or (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_registry_is_followed():
    """Steps of docs/adding-a-method.md that a machine can check, for every registered method."""
    from dataclasses import is_dataclass

    import nla_llm as nl
    from nla_llm.methods.registry import FAMILIES

    for name in nl.methods():
        cls = nl.methods.registered(name)
        assert is_dataclass(cls), name
        assert cls.__dataclass_params__.frozen, name
        assert getattr(cls, "__final__", False), f"{name} is not final"
        assert isinstance(cls.properties, nl.Properties), name
        assert callable(getattr(cls, "cost", None)), f"{name} has no cost"
        assert cls.__doc__, name
        assert cls.__module__ in FAMILIES, name
