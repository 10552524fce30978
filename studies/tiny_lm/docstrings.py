"""The text of the fine-tuning: docstrings of installed packages, a file a module, split by the hash of its name."""

import ast
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from text import name_hash

PACKAGES = ("numpy", "scipy", "sympy")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(source: str) -> list[str]:
    """Return the docstrings of a module, its classes and functions, without their indentation, in ast.walk's order."""
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, DOCUMENTED))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def read_docstrings(packages: Iterable[str] = PACKAGES, shortest: int = 200) -> dict[str, str]:
    """Return name -> docstrings of the modules of the packages, tests left out.

    A docstring that an earlier module has already is left out, so that no part of the split repeats another; so are
    modules with fewer characters than ``shortest``.
    """
    seen: set[str] = set()
    texts = {}
    for package in packages:
        root = Path(importlib.util.find_spec(package).origin).parent
        for path in sorted(root.rglob("*.py")):
            name = path.relative_to(root.parent)
            if "tests" in name.parts:
                continue
            new = [text for text in dict.fromkeys(docstrings(path.read_text(encoding="utf-8"))) if text not in seen]
            seen.update(new)
            if sum(map(len, new)) >= shortest:
                texts[name.as_posix()] = "\n\n".join(new) + "\n"
    return texts


def split_names(names: Iterable[str], every: int = 24) -> dict[str, list[str]]:
    """Return the names by part: one in ``every`` held out, another one for validation, the others to train on."""
    parts: dict[str, list[str]] = {"train": [], "validation": [], "heldout": []}
    for name in sorted(names):
        parts[{0: "heldout", 1: "validation"}.get(name_hash(name) % every, "train")].append(name)
    return parts
