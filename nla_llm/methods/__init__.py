"""The methods: one package or file for a family, one small frozen object for a method.

The package is also the function that lists them: ``nl.methods()`` gives the registered names.
"""

import sys
from types import ModuleType

from nla_llm.methods.registry import (
    Method,
    Properties,
    Unsupported,
    describe,
    method,
    methods,
    properties_of,
    register,
    registered,
    require,
)

__all__ = [
    "Method",
    "Properties",
    "Unsupported",
    "describe",
    "method",
    "methods",
    "properties_of",
    "register",
    "registered",
    "require",
]


class _Listing(ModuleType):
    """A package that can be called: ``nl.methods`` is both the place of the methods and the list of their names."""

    def __call__(self) -> tuple[str, ...]:
        return methods()


sys.modules[__name__].__class__ = _Listing
