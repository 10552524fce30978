"""Property tests for methods: a conformance suite, and hypothesis strategies for other people's test suites."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["checks", "conformance", "report", "strategies", "subject"],
    submod_attrs={
        "conformance": ["check_method", "check_names"],
        "report": ["ConformanceError", "Report", "Result"],
    },
)
