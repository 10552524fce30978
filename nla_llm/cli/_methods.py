"""Methods as they are named on the command line: NAME or MODULE:OBJECT, with options."""

from __future__ import annotations

import hashlib
import inspect
import sys
from ast import literal_eval
from importlib import import_module
from pathlib import Path
from typing import Any

from nla_llm.methods import method as make_method
from nla_llm.methods import properties_of
from nla_llm.methods.registry import registered

__all__ = ["code_of", "found", "make", "parse", "parse_options"]


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Where a method is, and its options.

    Raises
    ------
    ValueError
        If an option is not of the form name=value.

    Examples
    --------
    >>> parse("positive_features:directions=orthogonal,recentre=True")
    ('positive_features', {'directions': 'orthogonal', 'recentre': True})
    >>> parse("my_package.my_file:MyMethod:m=8")
    ('my_package.my_file:MyMethod', {'m': 8})
    """
    where, colon, last = text.rpartition(":")
    if not colon or "=" not in last:
        return text, {}
    return where, parse_options(last.split(","))


def parse_options(words: list[str]) -> dict[str, Any]:
    """Options out of words name=value; a value that is no Python literal is text.

    Raises
    ------
    ValueError
        If a word is of another form, or a name comes twice.

    Examples
    --------
    >>> parse_options(["m=64", "directions=iid"])
    {'m': 64, 'directions': 'iid'}
    """
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"options are given as name=value, as in m=64; got {word!r}")
        if name in options:
            raise ValueError(f"option {name} is given twice")
        try:
            options[name] = literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options


def found(where: str) -> Any:
    """The registered class, or the object at MODULE:OBJECT, which is looked for from the current folder too.

    Raises
    ------
    ValueError, TypeError
        If there is none, or it cannot be called; for a registered name the sentence has the nearest.
    """
    if ":" not in where:
        return registered(where)
    module, _, attribute = where.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        imported = import_module(module)
    except (Exception, SystemExit) as error:  # whatever somebody's module does when it is imported
        raise ValueError(
            f"cannot import {module!r} ({type(error).__name__}: {error}); "
            "MODULE is a dotted name that is found from this folder"
        ) from error
    try:
        thing = getattr(imported, attribute)
    except AttributeError as error:
        raise ValueError(f"module {module!r} has no {attribute!r}; write MODULE:OBJECT") from error
    if not callable(thing):
        raise TypeError(f"{where} is not a method: it cannot be called with a problem")
    return thing


def make(where: str, options: dict[str, Any], *, budget: int | None = None) -> Any:
    """The method: a registered one or a class is made with its options, and with ``budget`` where it has one.

    Raises
    ------
    ValueError, TypeError
        If it cannot be found or made.
    """
    thing = found(where)
    if not isinstance(thing, type):
        if options:
            raise ValueError(f"{where} is an instance, which takes no options; got {', '.join(options)}")
        return thing
    name = properties_of(thing).budget
    options = options if name is None or budget is None or name in options else {**options, name: budget}
    if ":" not in where:
        return make_method(where, **options)
    try:
        made = thing(**options)
    except TypeError as error:
        raise ValueError(f"{where} cannot be made: {error}; give its options as name=value") from error
    if not callable(made):
        raise TypeError(f"{where} is not a method: its instances cannot be called with a problem")
    return made


def code_of(thing: Any) -> str | None:
    """Hash of the file that defines a method of somebody else: where it changed, results are computed anew."""
    cls = thing if isinstance(thing, type) or inspect.isfunction(thing) else type(thing)
    if cls.__module__.partition(".")[0] == "nla_llm":
        return None  # the version of the package covers it
    try:
        file = inspect.getsourcefile(cls)
    except TypeError:
        file = None
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16] if file else None
