"""Version of the code behind a number: a hash of every source that may change it.

Simple and safe rather than clever: all Python files of ``nla_llm`` up to the studies' floor, the data shipped
with them (the embedded model), the file that defines the study and the files beside it whose names start with
an underscore. A changed comment recomputes too much; a changed formula never recomputes too little.
"""

from __future__ import annotations

import hashlib
import inspect
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

PACKAGE = Path(__file__).resolve().parent.parent
_ABOVE = {"report", "testing", "cli", "_studies", "__pycache__", "__main__.py", "cli.py", "__init__.pyi"}


def _hash_files(files: Iterable[Path], root: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{file.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()


@cache
def package_version() -> str:
    """Hash of the sources and data of the package that compute; read once in a process, as the sources are."""
    below = (path for path in PACKAGE.iterdir() if path.name not in _ABOVE and path.suffix in {"", ".py"})
    files = (file for path in below for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    data = PACKAGE / "data"
    kept = (f for f in files if f.suffix == ".py" or (data in f.parents and f.suffix != ".pyc" and f.name[0] != "."))
    return _hash_files(kept, PACKAGE)


@cache
def version_of(measure: Any) -> str:
    """Version of what ``measure`` computes: the package, and the file in which ``measure`` is written.

    Examples
    --------
    >>> version_of(version_of) == version_of(version_of)
    True
    """
    digest = hashlib.sha256(package_version().encode())
    digest.update(_source_version(inspect.unwrap(getattr(measure, "func", measure))).encode())
    return digest.hexdigest()[:16]


def _source_version(function: Any) -> str:
    code = getattr(function, "__code__", None)
    if code is None and not hasattr(function, "__module__"):
        return repr(function)
    file = Path(code.co_filename if code is not None else inspect.getsourcefile(type(function)) or "")
    if file.is_file():
        return _hash_files([file, *file.parent.glob("_[!_]*.py")], file.parent)
    return _code_version(code) if code is not None else repr(type(function))


def _code_version(code: Any) -> str:
    """Hash of the byte code of a function that has no file: one typed at a prompt or in a notebook."""
    constants = [_code_version(c) if hasattr(c, "co_code") else repr(c) for c in code.co_consts]
    return hashlib.sha256(repr((code.co_code, code.co_names, constants)).encode()).hexdigest()
