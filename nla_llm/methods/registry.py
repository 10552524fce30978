"""What a method is, what it promises, and the names under which methods are found."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import import_module
from importlib.metadata import entry_points
from inspect import Parameter, ismodule, signature
from math import inf, isfinite, sqrt
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from nla_llm.arithmetic import untallied
from nla_llm.backend import largest, namespace, number

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from nla_llm.operators import Operator

__all__ = [
    "Method",
    "Properties",
    "Unsupported",
    "describe",
    "method",
    "methods",
    "properties_of",
    "register",
    "require",
]

FAMILIES = (
    "nla_llm.methods.attention.yardsticks",
    "nla_llm.methods.attention.kernels.elementwise",
    "nla_llm.methods.attention.kernels.deterministic_features",
    "nla_llm.methods.attention.kernels.fitted_features",
    "nla_llm.methods.attention.kernels.random_features",
    "nla_llm.methods.attention.kernels.exponential_features",
    "nla_llm.methods.attention.kernels.hybrid_features",
    "nla_llm.methods.attention.kernels.series_features",
    "nla_llm.methods.attention.kernels.sketches",
    "nla_llm.methods.attention.randomised.randomised_attention",
    "nla_llm.methods.attention.randomised.control_variates",
    "nla_llm.methods.attention.sampled.sampled_keys",
    "nla_llm.methods.attention.sampled.hyper",
    "nla_llm.methods.attention.sampled.thinning",
    "nla_llm.methods.attention.landmarks.nystrom",
    "nla_llm.methods.attention.landmarks.pivoted_cholesky",
    "nla_llm.methods.attention.landmarks.cur",
    "nla_llm.methods.attention.landmarks.clustered",
    "nla_llm.methods.attention.landmarks.projections",
    "nla_llm.methods.attention.sparse.patterns",
    "nla_llm.methods.attention.sparse.strided",
    "nla_llm.methods.attention.sparse.content_sparse",
    "nla_llm.methods.attention.sparse.hashed",
    "nla_llm.methods.attention.sparse.sparse_low_rank",
    "nla_llm.methods.attention.hierarchical.h_matrix",
    "nla_llm.methods.attention.hierarchical.h_transformer",
    "nla_llm.methods.attention.hierarchical.monarch",
    "nla_llm.methods.update.truncation",
    "nla_llm.methods.update.quantised.single",
    "nla_llm.methods.update.quantised.alternating",
    "nla_llm.methods.update.lora.lora",
    "nla_llm.methods.update.randomised",
    "nla_llm.methods.update.pivoted",
    "nla_llm.methods.update.adaptive",
    "nla_llm.methods.update.data_aware",
)

T = TypeVar("T", bound=type)
_BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
_registry: dict[str, type] = {}


class Unsupported(ValueError):  # noqa: N818 - a refusal with a reason, not a malfunction
    """A method has no form for what the problem asks (causality, a window, a mask, a bias; numbers of that size)."""


@runtime_checkable
class Method(Protocol):
    """Anything that turns a problem into an operator. Nothing has to be subclassed.

    Optional attributes, read with ``getattr``: ``properties`` (:class:`Properties`), ``cost(problem)``,
    ``theory(problem)``, and ``target(problem)``, the operator aimed at where that is not softmax. What is absent is
    reported as absent, never assumed.
    """

    def __call__(self, problem: Any, rng: int | np.random.Generator | None = None) -> Operator:
        """Operator that stands in for ``problem.exact()``."""
        ...


@dataclass(frozen=True)
class Properties:
    """What a method declares; the conformance suite checks every sentence of it.

    Attributes
    ----------
    problem
        "attention" or "update".
    family
        What kind of method it is, in a word or two; several methods may share it.
    target
        What the operator approximates as its budget grows: "softmax", "update", or the name of another kernel.
    budget
        Name of the field that buys accuracy, or None.
    converges
        The error against the target falls towards rounding as the budget grows.
    unbiased
        The kernel before the division by row sums has the mean exp(logits), for every budget.
    row_stochastic
        Rows sum to one.
    nonnegative
        No entry is negative.
    deterministic
        ``rng`` is not needed.
    shift_invariant
        Adding a constant vector to all keys changes the result by rounding only.
    permutation_equivariant
        Permuting the keys permutes the columns of the result.
    yardstick
        Not an approximation but something to compare with: it is not expected to converge.
    partial
        May refuse some data with a FloatingPointError (a row whose kernel sums to zero).
    supports
        Which of "causal", "window", "key_mask", "bias" it has a form for.
    refusals
        For structures without a form, why there is none: part of the sentence with which they are refused.
    exceptions
        Names of conformance checks that the method is known to fail, each with the reason.
    """

    problem: str = "attention"
    family: str = "other"
    target: str = "softmax"
    budget: str | None = None
    converges: bool = False
    unbiased: bool = False
    row_stochastic: bool = True
    nonnegative: bool = False
    deterministic: bool = True
    shift_invariant: bool = False
    permutation_equivariant: bool = True
    yardstick: bool = False
    partial: bool = False
    supports: frozenset[str] = frozenset()
    refusals: Mapping[str, str] = field(default_factory=dict)
    exceptions: Mapping[str, str] = field(default_factory=dict)


def register(name: str) -> Callable[[T], T]:
    """Class decorator: make a method known under ``name``.

    Raises
    ------
    ValueError
        If another class holds the name already.
    """

    def add(cls: T) -> T:
        holder = _registry.get(name)
        if holder is not None and (holder.__module__, holder.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"the name {name!r} is taken by {holder.__module__}.{holder.__qualname__}; choose another")
        _registry[name] = cls
        cls.name = name  # type: ignore[attr-defined]
        return cls

    return add


def methods() -> tuple[str, ...]:
    """Registered names, those of installed packages (entry-point group ``nla_llm.methods``) included.

    Examples
    --------
    >>> "optimal_rank" in methods()
    True
    """
    _load()
    return tuple(sorted(_registry))


def registered(name: str) -> type:
    """Class that is registered under ``name``.

    Raises
    ------
    ValueError
        If there is none; the message names the nearest.
    """
    _load()
    if name not in _registry:
        raise ValueError(f"unknown method {name!r}{_nearest(name, _registry)}; nl.methods() lists all")
    return _registry[name]


def method(name: str, **options: Any) -> Any:
    """Make the method that is registered under ``name``.

    Raises
    ------
    ValueError
        If there is no such name, or no such option; the message names the nearest.

    Examples
    --------
    >>> method("positive_features", m=16).m
    16
    """
    cls = registered(name)
    parameters = signature(cls).parameters
    takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values())
    known = [p.name for p in parameters.values() if p.kind in _BY_NAME]
    for option in options:
        if option not in known and not takes_any:
            hint = _nearest(option, known)
            raise ValueError(f"{name} has no option {option!r}{hint}; its options are {', '.join(known) or 'none'}")
    try:
        return cls(**options)
    except TypeError as error:
        raise ValueError(f"{name}: {error}; its options are {', '.join(known) or 'none'}") from error


def describe(m: Any) -> dict[str, Any]:
    """Name and hyper-parameters of a method as plain values, enough to make it again.

    Examples
    --------
    >>> describe(method("random_keys", m=8))
    {'method': 'random_keys', 'm': 8}
    """
    options = {f.name: getattr(m, f.name) for f in fields(m)} if is_dataclass(m) else {}
    return {"method": getattr(m, "name", type(m).__name__), **options}


def properties_of(m: Any) -> Properties:
    """The declared properties of a method, the most modest ones where it declares none."""
    return getattr(m, "properties", None) or Properties(row_stochastic=False, permutation_equivariant=False)


def require(m: Any, problem: Any, *, any_size: bool = False) -> None:
    """Refuse a problem whose structure the method has no form for, or whose squares overflow its precision.

    Logits are inner products of queries and keys, and most methods take norms of both. Where those leave the range of
    the dtype, so do weights; ``any_size`` says that the method takes none, or in another precision.

    Raises
    ------
    Unsupported
        Naming what is missing and what the method does support; or the sizes, and what to pass instead.
    TypeError
        If the problem is of the wrong kind.
    """
    properties, name = properties_of(m), describe(m)["method"]
    kind = {"attention": "AttentionProblem", "update": "UpdateProblem"}[properties.problem]
    if type(problem).__name__ != kind:
        raise TypeError(f"{name} takes an {kind}, got {type(problem).__name__}")
    missing = sorted(problem.structure - properties.supports)
    if missing:
        have = ", ".join(sorted(properties.supports)) or "none of them"
        why = "".join(f" ({structure}: {properties.refusals[structure]})" for structure in missing
                      if structure in properties.refusals)  # fmt: skip
        raise Unsupported(
            f"{name} has no form with {' and '.join(missing)}{why}; of these structures it supports {have}"
        )
    if properties.problem == "attention" and not any_size:
        with untallied():  # a check of the input is no work of the method
            _fitting(name, problem)


_HEADROOM = 16.0  # |x + y|², for keys that are shifted by means too, against the larger of |x|² and |y|²


def _fitting(name: str, problem: Any) -> None:
    """Refuse queries and keys whose squared norms, scaled or not, are out of range of their dtype."""
    xp, factor = problem.xp, _HEADROOM * max(1.0, abs(problem.scale))
    entries = [number(xp.max(xp.abs(a))) for a in (problem.q, problem.k)]
    if factor * problem.d * max(entries) * max(entries) <= largest(problem.q):  # no norm is larger
        return
    norms = [_largest_norm(a, size) for a, size in zip((problem.q, problem.k), entries, strict=True)]
    needed = factor * max(norms) * max(norms)
    if needed <= largest(problem.q):
        return
    wider = [t for t in ("float32", "float64") if needed <= largest(xp.zeros(0, dtype=getattr(xp, t)))]
    advice = f"pass problem.astype(xp.{wider[0]}), or scale q or k down" if wider else "scale q or k down"
    raise Unsupported(
        f"{name} squares numbers of the size of q and k, whose norms are up to {norms[0]:.3g} and {norms[1]:.3g} with "
        f"scale={problem.scale:.3g}, and {problem.q.dtype} ends at {largest(problem.q):.3g}; {advice}"
    )


def _largest_norm(a: Any, size: float) -> float:
    """max |a_i| of the rows, whose largest entry is ``size``."""
    xp = namespace(a)
    unit = xp.astype(a, xp.float64) / (size or 1.0)
    return size * sqrt(number(xp.max(xp.sum(unit * unit, axis=-1))))


def settle(m: Any) -> None:
    """Make the hyper-parameters of a method plain Python values: the first line of its ``__post_init__``.

    A number of NumPy would turn arrays of float32 into float64, and costs and records have no use for it.

    Raises
    ------
    ValueError
        If a field declared as bool is neither True nor False: "no" and 0.5 count as True elsewhere.
    """
    for f in fields(m):
        value = getattr(m, f.name)
        if isinstance(value, np.generic):
            value = value.item()
            object.__setattr__(m, f.name, value)
        if f.type in {"bool", bool}:
            switch(f.name, value)


def switch(name: str, value: Any) -> None:
    """Raise a sentence unless ``value`` is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {value!r}")  # noqa: TRY004 - like any other bad option


def one_of(name: str, value: Any, known: Collection[str]) -> None:
    """Raise a sentence unless ``value`` is one of the known words."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def positive(name: str, value: Any, *, at_most: float = inf, other: str = "") -> None:
    """Raise a sentence, with what ``other`` allows, unless ``value`` is a finite number above zero."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not (number and isfinite(value) and 0 < value <= at_most):
        most = "" if at_most == inf else f" and <= {at_most:g}"
        raise ValueError(f"{name} must be a number > 0{most}{other}, got {value!r}")


def whole_number(name: str, value: Any, *, at_least: int = 1) -> None:
    """Raise a sentence unless ``value`` is a whole number that is large enough."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
        raise ValueError(f"{name} must be a whole number >= {at_least}, got {value!r}")


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


_loaded = False


def _load() -> None:
    """Import the families once, then whatever other packages offer."""
    global _loaded  # noqa: PLW0603 - imports happen once in a process
    if _loaded:
        return
    _loaded = True  # from here on: a package may ask for a method while it is being loaded
    try:
        for module in FAMILIES:
            import_module(module)
        for entry in entry_points(group="nla_llm.methods"):
            _register_entry(entry.name, entry.load())
    except BaseException:
        _loaded = False  # half a registry is none: the next call fails in the same way
        raise


def _register_entry(name: str, loaded: Any) -> None:
    """Register the class that an entry point names; a module has registered its own classes on import."""
    if isinstance(loaded, type):
        register(name)(loaded)
    elif not ismodule(loaded):
        raise TypeError(
            f"the entry point {name!r} of the group nla_llm.methods is {loaded!r}, of type {type(loaded).__name__}; "
            "it must name a class, or a module that registers its classes"
        )
