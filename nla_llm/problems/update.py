"""What is approximated in fine-tuning: the update of a weight matrix, an array or an operator that is never formed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from nla_llm.backend import Array, namespace
from nla_llm.operators import Dense, Operator, widened
from nla_llm.problems._checks import check_matrix, check_one_library

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["UpdateProblem"]


@dataclass(frozen=True, eq=False)
class UpdateProblem:
    """The update of a weight matrix, ΔW = W_tuned − W_base, that a cheaper matrix is to replace.

    Parameters
    ----------
    delta
        The update (..., d_out, d_in), floating: an array, or an operator, of which nothing is ever formed here. Entries
        of an operator are not looked at, so it is its maker who answers for their being finite.
    base
        The matrix that it updates, an array of the same shape, or None.
    inputs
        Calibration inputs (samples, d_in), an array or an operator, or None. Only their Gram matrix matters to methods
        that look at them, so a triangular factor of it will do (``linalg.triangular_factor`` of a stream of blocks).

    Raises
    ------
    TypeError, ValueError
        If an array is not real and floating, has NaN or infinite entries or an empty axis, or if shapes do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from nla_llm.operators import LowRank
    >>> UpdateProblem(np.eye(3)).exact().shape, UpdateProblem(LowRank(np.ones((3, 1)), np.ones((5, 1)))).d_in
    ((3, 3), 5)
    """

    delta: Array | Operator
    base: Array | None = None
    inputs: Array | Operator | None = None

    def __post_init__(self) -> None:
        _check_matrix_or_operator("delta", self.delta)
        if self.base is not None:
            check_matrix("base", self.base)
            if tuple(self.base.shape) != tuple(self.delta.shape):
                raise ValueError(f"base must have the shape of delta {self.delta.shape}, got {self.base.shape}")
        if self.inputs is not None:
            _check_matrix_or_operator("inputs", self.inputs)
            if len(self.inputs.shape) != 2 or self.inputs.shape[-1] != self.delta.shape[-1]:
                raise ValueError(f"inputs must be (samples, d_in={self.delta.shape[-1]}), got {self.inputs.shape}")
        fields = {"delta": self.delta, "base": self.base, "inputs": self.inputs}
        check_one_library(**{name: a.like if isinstance(a, Operator) else a for name, a in fields.items()})

    @classmethod
    def between(cls, base: Array, tuned: Array, *, inputs: Array | Operator | None = None) -> Self:
        """The update from ``base`` to ``tuned``."""
        check_matrix("base", base)
        check_matrix("tuned", tuned)
        check_one_library(base=base, tuned=tuned)
        if base.shape != tuned.shape:
            raise ValueError(f"base and tuned must have the same shape, got {base.shape} and {tuned.shape}")
        with np.errstate(over="ignore"):  # what overflows is refused
            delta = tuned - base
        return cls(delta, base=base, inputs=inputs)

    # -- sizes -----------------------------------------------------------------------------------------------------

    @property
    def d_out(self) -> int:
        """Rows of the update."""
        return int(self.delta.shape[-2])

    @property
    def d_in(self) -> int:
        """Columns of the update."""
        return int(self.delta.shape[-1])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading axes."""
        return tuple(self.delta.shape[:-2])

    @property
    def structure(self) -> frozenset[str]:
        """An update has no masks."""
        return frozenset()

    @property
    def like(self) -> Array:
        """An array of the library, dtype and device of the update."""
        return self.delta.like if isinstance(self.delta, Operator) else self.delta

    @property
    def xp(self) -> Any:
        """Array namespace of the update."""
        return namespace(self.like)

    # -- what is made from it --------------------------------------------------------------------------------------

    @property
    def operator(self) -> Operator:
        """The update as an operator in the precision in which it is held: what engines work on; nothing is copied."""
        return self.delta if isinstance(self.delta, Operator) else Dense(self.delta)

    def exact(self, dtype: Any = None) -> Operator:
        """The update itself, the reference: in float64 unless ``dtype`` names another precision.

        An operator is widened without being formed, factor by factor; one that keeps its arrays to itself stays in its
        own precision.
        """
        dtype = self.xp.float64 if dtype is None else dtype
        if not isinstance(self.delta, Operator):
            return Dense(self.xp.astype(self.delta, dtype, copy=False))
        if dtype == self.xp.float64:
            return widened(self.delta)
        return self.delta.map(lambda a: namespace(a).astype(a, dtype, copy=False))

    def map(self, function: Callable[[Array], Array]) -> Self:
        """The same problem with ``function`` applied to every array, those of operators too; not validated again."""
        new = object.__new__(type(self))
        for name in ("delta", "base", "inputs"):
            a = getattr(self, name)
            changed = a if a is None else a.map(function) if isinstance(a, Operator) else function(a)
            object.__setattr__(new, name, changed)
        return new

    def astype(self, dtype: Any) -> Self:
        """The same problem in another precision, refused where that is not floating or overflows."""
        with np.errstate(over="ignore"):  # what overflows is refused
            rounded = self.map(lambda a: namespace(a).astype(a, dtype, copy=False))
        for name in ("delta", "base", "inputs"):
            if getattr(rounded, name) is not None:
                _check_matrix_or_operator(name, getattr(rounded, name))
        return rounded


def _check_matrix_or_operator(name: str, a: Any) -> None:
    if not isinstance(a, Operator):
        check_matrix(name, a)
    elif 0 in a.shape:
        raise ValueError(f"{name} has an empty axis, shape {a.shape}; at least one row and one column are needed")
