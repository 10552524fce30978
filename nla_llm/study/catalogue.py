"""The studies that can be run by name: those shipped, those of installed packages, and any file.

Shipped studies are the Python files directly in ``nla_llm/_studies`` (an installed wheel) or in ``studies/`` of the
checkout, except those whose names start with an underscore. Other packages add theirs through the entry-point group
``nla_llm.studies``.
"""

from __future__ import annotations

import difflib
import hashlib
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, cast

from .study import Study
from .versions import version_of

GROUP = "nla_llm.studies"
_PACKAGE = Path(__file__).resolve().parent.parent


class UnknownStudy(ValueError):  # noqa: N818 - reads as the sentence it carries
    """No study has the given name, and no file is there."""


def folder() -> Path:
    """Folder of the shipped studies."""
    shipped = _PACKAGE / "_studies"
    return shipped if shipped.is_dir() else _PACKAGE.parent / "studies"


def names() -> list[str]:
    """Names of all studies that can be loaded without naming a file, in alphabetical order."""
    return sorted({*_shipped(), *_foreign()})


def headline() -> list[str]:
    """Names of the studies that ``nla-llm run`` runs without arguments."""
    return [name for name in _shipped() if load(name).headline]


def load(name: str | Path) -> Study:
    """Study of that name, or the one that the Python file ``name`` defines.

    Its module is executed anew at every call, so an edited file is seen.

    Raises
    ------
    UnknownStudy
        A ``ValueError``: if there is none; the sentence names the nearest ones.
    ValueError
        If the file cannot be imported, or defines no ``study = Study(...)``, or a shipped one under another name.
    """
    text = str(name)
    if text in _shipped():
        study = _from_file(_shipped()[text])
        if study.name != text:
            raise ValueError(f"studies/{text}.py defines a study named {study.name!r}; let name and file agree")
        return replace(study, source=text)
    if text in _foreign():
        return replace(_study_of(_foreign()[text].load(), f"entry point {text!r} of group {GROUP}"), source=text)
    if text.endswith(".py") and Path(text).is_file():
        path = Path(text).resolve()
        return replace(_from_file(path), source=str(path))
    raise UnknownStudy(_unknown(text))


def _unknown(text: str) -> str:
    if text.endswith(".py"):
        known = ", ".join(names()) or "none"
        return f"there is no file {text!r}; pass a file that defines study = Study(...), or a known study: {known}"
    near = difflib.get_close_matches(text, names(), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the studies are: {', '.join(names()) or 'none'}."
    return f"there is no study {text!r}; {hint} A file of your own is given with its ending, as in my_study.py"


def _shipped() -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder().glob("*.py")) if not path.name.startswith("_")}


def _foreign() -> dict[str, Any]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _from_file(path: Path) -> Study:
    try:
        module = _import(path)
    except (Exception, SystemExit) as error:  # whatever a file does when it is executed
        raise ValueError(f"the study file {path.name} cannot be imported: {type(error).__name__}: {error}") from error
    return _study_of(module, path.name)


def _study_of(found: Any, where: str) -> Study:
    study = getattr(found, "study", None) if isinstance(found, ModuleType) else found
    if not isinstance(study, Study):
        raise ValueError(f"{where} must define study = Study(...), got {type(study).__name__}")  # noqa: TRY004 - the file is bad, not an argument's type
    version_of(study.measure)  # of the text that was imported, not of one edited since
    return study


class _Uncached(SourceFileLoader):
    """Loader that compiles the source as it stands: byte code cached by whole seconds could be of an older text."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


def _import(path: Path) -> ModuleType:
    """Import a file as a module of a package that is its folder, so that ``from ._helpers import f`` works in it."""
    parent = f"nla_llm_studies_{hashlib.sha256(str(path.parent).encode()).hexdigest()[:12]}"
    for name in [name for name in sys.modules if name.startswith(f"{parent}._")]:
        del sys.modules[name]
    package = sys.modules.setdefault(parent, ModuleType(parent))
    package.__path__ = [str(path.parent)]
    name = f"{parent}.{path.stem}"
    spec = cast("ModuleSpec", spec_from_file_location(name, path, loader=_Uncached(name, str(path))))
    module = sys.modules[name] = module_from_spec(spec)
    cast("_Uncached", spec.loader).exec_module(module)
    return module
