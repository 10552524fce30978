"""What is promised: closed forms, bounds and first-order predictions, each checked by something independent of it."""

import lazy_loader

from nla_llm.theory.bound import Theory

_getattr, _dir, _all = lazy_loader.attach(
    __name__,
    submodules=["bound", "first_order", "random_features", "softmax", "updates", "yardsticks"],
    submod_attrs={
        "first_order": ["FirstOrderError", "first_order_error"],
        "random_features": ["kernel_theory", "log_relative_variance", "recentring_shift", "relative_variance"],
    },
)
__getattr__ = _getattr
__all__ = ["Theory", *_all]  # noqa: PLE0604 - the names come from the table above


def __dir__() -> list[str]:
    return [*_dir(), "Theory"]
