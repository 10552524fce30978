"""The methods: one file for a family, one small frozen object for a method."""

from nla_llm.methods.registry import (
    Method,
    Properties,
    Unsupported,
    describe,
    method,
    methods,
    properties_of,
    register,
)

__all__ = ["Method", "Properties", "Unsupported", "describe", "method", "methods", "properties_of", "register"]
