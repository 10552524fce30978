"""Provenance: under which versions, on which processor and from which commit a number was computed.

It goes into reports that people publish, so it holds no host name, no user name and no path of the machine.
"""

from __future__ import annotations

import getpass
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from nla_llm.backend import thread_count

from .cells import SEED_BITS

if TYPE_CHECKING:
    from collections.abc import Sequence

_PACKAGE = Path(__file__).resolve().parent.parent
_OPTIONAL = ("torch", "distributed", "pyarrow", "transformers", "tokenizers", "peft", "array-api-strict")
_FALLBACK = ("numpy", "scipy", "pandas", "sympy", "matplotlib", "array-api-compat", "threadpoolctl")
_ROOT = r"(?:[A-Za-z]:[\\/]|~?/|\\\\)"
_PATH = re.compile(rf"""(?<=['"]){_ROOT}[^'"\n]+(?=['"])|(?<![\w.:/\\…'"]){_ROOT}[^\s'"=,;:<>|]+""")
_ADDRESS = re.compile(r"\b([a-z][a-z0-9+.-]*)://[^\s'\"]+")


def collect(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything about the machine and the code that may explain a number, as JSON.

    Parameters
    ----------
    arguments : sequence of str, optional
        The command line; that of this process by default.

    Examples
    --------
    >>> found = collect(["run", "--store", "/somewhere/private/results.sqlite"])
    >>> found["arguments"]
    ['run', '--store', '…/results.sqlite']
    >>> "numpy" in found["packages"]
    True
    """
    return {
        "package": _version("nla-llm") or "not installed",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": packages(),
        "blas": blas(),
        "cpu": cpu(),
        "cores": thread_count(),
        "memory_gib": memory_gib(),
        "system": " ".join(part for part in (platform.system(), platform.release(), platform.machine()) if part),
        "git": git(),
        "seeds": f"the first {SEED_BITS} bits of the SHA-256 of the JSON of each cell; kept with each result",
        "arguments": [scrub(argument) for argument in (sys.argv[1:] if arguments is None else arguments)],
    }


def scrub(text: str) -> str:
    """Text without absolute paths, network addresses, the host's and the user's name.

    Examples
    --------
    >>> scrub("cannot read '/data/models/base/config.json'")
    "cannot read '…/config.json'"
    >>> scrub("--dask=tcp://cluster.example:8786")
    '--dask=tcp://…'
    """
    text = _ADDRESS.sub(lambda match: f"{match[1]}://…", text)
    text = _PATH.sub(lambda match: f"…/{PurePath(match[0].replace(chr(92), '/')).name}", text)
    for host in _hosts():
        text = re.sub(rf"(?<![\w-]){re.escape(host)}(?![\w-])", "…", text)
    for user in _users():  # a bare word may be any word, a part of a relative path is a person
        text = re.sub(rf"(?:^|(?<=[/\\])){re.escape(user)}(?=[/\\])", "…", text)
    return text.encode("utf-8", "replace").decode()


@cache
def _hosts() -> set[str]:
    return {socket.gethostname(), platform.node()} - {"", "localhost"}


@cache
def _users() -> set[str]:
    with suppress(OSError, KeyError):  # a container without a user data base has no name to hide
        return {getpass.getuser()} - {"", "root"}
    return set()


def packages() -> dict[str, str]:
    """Versions of the dependencies, and of the optional packages that are installed."""
    try:
        declared = requires("nla-llm") or []
    except PackageNotFoundError:
        declared = []
    needed = [re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0] for line in declared if "extra ==" not in line]
    found = {name: _version(name) for name in sorted({*(needed or _FALLBACK), *_OPTIONAL})}
    return {name: text for name, text in found.items() if text is not None}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def blas() -> list[str]:
    """Libraries with threads of their own that NumPy and SciPy have loaded, with their numbers of threads."""
    import scipy.linalg  # noqa: F401, PLC0415 - loads the libraries to be listed
    from threadpoolctl import threadpool_info  # noqa: PLC0415 - for this list only

    found = {
        " ".join(str(library[name]) for name in ("internal_api", "version", "architecture") if library.get(name))
        + f", {library['num_threads']} threads ({library['user_api']})"
        for library in threadpool_info()
    }
    return sorted(found)


def cpu() -> str:
    """Model of the processor."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(
            r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", info.read_text(errors="replace"), re.MULTILINE
        )
        if match:
            return match[1].strip()
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def memory_gib() -> float | None:
    """Memory of the machine in GiB; None where the system does not tell."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def git() -> dict[str, Any] | None:
    """Commit of the checkout that the package runs from, and whether the code differs from it; None outside one."""
    root = _PACKAGE.parent
    if _git(root, "ls-files", "--error-unmatch", "nla_llm/__init__.py") is None:
        return None  # also for a package installed inside somebody else's repository
    changed = _git(root, "status", "--porcelain", "--", "nla_llm", "studies", "pyproject.toml")
    return {"commit": (_git(root, "rev-parse", "HEAD") or "").strip(), "dirty": bool((changed or "").strip())}


def _git(root: Path, *arguments: str) -> str | None:
    return _output("git", "-C", str(root), *arguments)


def _output(*command: str) -> str | None:
    program = shutil.which(command[0])
    if program is None:
        return None
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(  # noqa: S603 - fixed commands, found on the user's own path
            [program, *command[1:]], capture_output=True, text=True, timeout=10, check=False, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
