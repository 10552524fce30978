"""Profiles of hypothesis, array libraries, and the registry of methods, for all tests.

``HYPOTHESIS_PROFILE=thorough pytest`` draws many examples from fresh seeds; the default draws few, always the same.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Any

import hypothesis
import pytest
from registry import ROWS

hypothesis.settings.register_profile("fast", max_examples=25, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("thorough", max_examples=100, deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

LIBRARIES = ("numpy", "array-api-strict", "torch")


def load_namespace(library: str) -> Any:
    """Array namespace of a library; the test is skipped where the library is not installed."""
    module = library.replace("-", "_")
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{library} is not installed")
    if library == "array-api-strict":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it is stricter than any real library: that is the point
            return importlib.import_module(module)
    return importlib.import_module(f"array_api_compat.{module}")


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.torch] if name == "torch" else []) for name in LIBRARIES])
def xp(request: pytest.FixtureRequest) -> Any:
    """Array namespace: the test runs once for each library. Make arrays with ``xp.asarray(numpy_array)``."""
    return load_namespace(request.param)


@pytest.fixture(params=ROWS, ids=str)
def row(request: pytest.FixtureRequest) -> Any:
    """A row of ``tests/registry.py``: the test runs once for each registered method."""
    return request.param
