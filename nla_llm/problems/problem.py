"""What is approximated in attention: the softmax matrix of queries and keys. Everything is validated here, once."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from nla_llm.backend import Array, is_array, namespace, number
from nla_llm.operators import SoftmaxAttention
from nla_llm.problems._checks import check_floating, check_matrix, check_one_library

if TYPE_CHECKING:
    from collections.abc import Callable

    from nla_llm.operators import Operator

__all__ = ["AttentionProblem"]


@dataclass(frozen=True, eq=False, init=False)
class AttentionProblem:
    """Queries, keys and values of softmax attention, P = softmax(scale · q kᵀ + bias) over the visible keys.

    Parameters
    ----------
    q, k
        Queries (..., n_q, d) and keys (..., n_k, d), floating. Leading axes (batch, heads) broadcast, so grouped-query
        attention is q (h_kv, g, n, d) against k (h_kv, 1, n, d).
    v
        Values (..., n_k, d_v), or None where only the matrix is of interest.
    scale
        Factor of the logits, 1/√d unless given. It is applied to the product q kᵀ, once.
    causal
        Query i sees keys j ≤ i; needs n_q = n_k.
    window
        Query i sees keys with |i − j| < window (with ``causal``: i − window < j ≤ i); needs n_q = n_k.
    key_mask
        Boolean (..., n_k), True = keep.
    bias
        Added to the logits, broadcasting against (..., n_q, n_k); finite, or −∞ to hide an entry.

    Raises
    ------
    TypeError
        If an argument is not an array or not floating.
    ValueError
        If shapes do not fit, an axis is empty, an entry is not finite, or a query sees no key.

    Examples
    --------
    >>> import numpy as np
    >>> problem = AttentionProblem(np.zeros((4, 2)), np.zeros((4, 2)), causal=True)
    >>> problem.n_q, problem.d, float(problem.exact().dense()[1, 1])
    (4, 2, 0.5)
    """

    q: Array
    k: Array
    v: Array | None
    scale: float
    causal: bool
    window: int | None
    key_mask: Array | None
    bias: Array | None

    def __init__(
        self,
        q: Array,
        k: Array,
        v: Array | None = None,
        *,
        scale: float | None = None,
        causal: bool = False,
        window: int | None = None,
        key_mask: Array | None = None,
        bias: Array | None = None,
    ) -> None:
        check_matrix("q", q)
        check_matrix("k", k)
        if v is not None:
            check_matrix("v", v)
        # a Python float: one of NumPy would turn the logits of float32 queries into float64
        scale = float(q.shape[-1]) ** -0.5 if scale is None else _finite_number("scale", scale, "1/sqrt(d)")
        fields = {"q": q, "k": k, "v": v, "scale": scale, "causal": causal, "window": window}
        for name, value in (fields | {"key_mask": key_mask, "bias": bias}).items():
            object.__setattr__(self, name, value)
        self._check()

    # -- sizes -----------------------------------------------------------------------------------------------------

    @property
    def n_q(self) -> int:
        """Number of queries."""
        return int(self.q.shape[-2])

    @property
    def n_k(self) -> int:
        """Number of keys."""
        return int(self.k.shape[-2])

    @property
    def d(self) -> int:
        """Dimension of a head."""
        return int(self.q.shape[-1])

    @property
    def d_v(self) -> int:
        """Columns of the values, d where there are none."""
        return int(self.d if self.v is None else self.v.shape[-1])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading axes of the attention matrix."""
        shapes = [a.shape[:-2] for a in (self.q, self.k, self.bias) if a is not None]
        shapes += [] if self.key_mask is None else [self.key_mask.shape[:-1]]
        return tuple(np.broadcast_shapes(*shapes))

    @property
    def structure(self) -> frozenset[str]:
        """What restricts the attention: any of 'causal', 'window', 'key_mask', 'bias'."""
        present = {
            "causal": self.causal,
            "window": self.window is not None,
            "key_mask": self.key_mask is not None,
            "bias": self.bias is not None,
        }
        return frozenset(name for name, here in present.items() if here)

    @property
    def xp(self) -> Any:
        """Array namespace of the queries and keys."""
        return namespace(self.q, self.k)

    # -- what is made from it --------------------------------------------------------------------------------------

    def exact(self, dtype: Any = None) -> Operator:
        """Exact attention matrix, the reference: in float64 unless ``dtype`` names another precision."""
        xp = self.xp
        dtype = xp.float64 if dtype is None else dtype
        q, k = xp.astype(self.q, dtype, copy=False), xp.astype(self.k, dtype, copy=False)
        bias = None if self.bias is None else xp.astype(self.bias, dtype, copy=False)
        return SoftmaxAttention(
            q, k, scale=self.scale, causal=self.causal, window=self.window, key_mask=self.key_mask, bias=bias
        )

    def scaled_inputs(self) -> tuple[Array, Array]:
        """x = √|scale| q and y = ± √|scale| k, the halves whose products x·y are the logits without the bias.

        Examples
        --------
        >>> import numpy as np
        >>> x, y = AttentionProblem(np.eye(2), np.eye(2), scale=-4.0).scaled_inputs()
        >>> (x @ y.T).tolist()
        [[-4.0, 0.0], [0.0, -4.0]]
        """
        root = abs(self.scale) ** 0.5
        return root * self.q, (root if self.scale >= 0 else -root) * self.k

    def map(self, function: Callable[[Array], Array]) -> Self:
        """The same problem with ``function`` applied to every array; not validated again."""

        def apply(a: Array | None) -> Array | None:
            return None if a is None else function(a)

        return self._with(
            q=function(self.q),
            k=function(self.k),
            v=apply(self.v),
            key_mask=apply(self.key_mask),
            bias=apply(self.bias),
        )

    def head(self, index: tuple[int, ...] | int) -> Self:
        """The problem of one entry of the batch axes."""
        index = index if isinstance(index, tuple) else (index,)
        batch = self.batch_shape
        whole = all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in index)
        if len(index) > len(batch) or not whole or any(not -n <= i < n for i, n in zip(index, batch, strict=False)):
            raise ValueError(f"index must be whole numbers within the batch axes {batch}, got {index}")

        def pick(a: Array | None, axes: int) -> Array | None:
            if a is None:
                return None
            xp = namespace(a)
            return xp.broadcast_to(a, (*batch, *a.shape[a.ndim - axes :]))[(*index, ...)]

        return self._with(
            q=pick(self.q, 2),
            k=pick(self.k, 2),
            v=pick(self.v, 2),
            key_mask=pick(self.key_mask, 1),
            bias=pick(self.bias, 2),
        )

    def unmasked(self) -> Self:
        """The same queries, keys and values where every query sees every key: no causality, window, mask or bias.

        Examples
        --------
        >>> import numpy as np
        >>> sorted(AttentionProblem(np.eye(2), np.eye(2), causal=True).unmasked().structure)
        []
        """
        return self._with(causal=False, window=None, key_mask=None, bias=None)

    def astype(self, dtype: Any) -> Self:
        """The same problem with q, k, v and bias in ``dtype``, refused where that is not floating or overflows."""
        xp = self.xp
        rounded = self.map(lambda a: a if xp.isdtype(a.dtype, "bool") else xp.astype(a, dtype, copy=False))
        for name, a in (("q", rounded.q), ("k", rounded.k), ("v", rounded.v)):
            if a is not None:
                check_matrix(name, a)
        return rounded

    def _with(self, **changes: Any) -> Self:
        new = object.__new__(type(self))
        for name in self.__dataclass_fields__:
            object.__setattr__(new, name, changes.get(name, getattr(self, name)))
        return new

    # -- validation ------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        q, k, v = self.q, self.k, self.v
        check_one_library(q=q, k=k, v=v, key_mask=self.key_mask, bias=self.bias)
        if q.dtype != k.dtype:
            raise TypeError(f"q and k must have the same dtype, got {q.dtype} and {k.dtype}; convert one of them")
        if q.shape[-1] != k.shape[-1]:
            raise ValueError(f"q and k must have the same last axis d, got q {q.shape} and k {k.shape}")
        if v is not None and v.shape[-2] != k.shape[-2]:
            raise ValueError(f"v must have as many rows as k, got v {v.shape} and k {k.shape}")
        largest_logit = self._check_size_of_logits()
        if not isinstance(self.causal, bool | np.bool_):
            raise TypeError(f"causal must be True or False, got {self.causal!r}")
        if (self.causal or self.window is not None) and self.n_q != self.n_k:
            raise ValueError(
                f"causal and window need as many queries as keys, got n_q={self.n_q} and n_k={self.n_k}; "
                "for decoding pass the whole sequence, or a key_mask"
            )
        whole = isinstance(self.window, int | np.integer) and not isinstance(self.window, bool)
        if self.window is not None and not (whole and self.window >= 1):
            raise ValueError(f"window must be a whole number >= 1 (1 sees the token itself), got {self.window!r}")
        self._check_mask_and_bias(largest_logit)
        try:
            batch = self.batch_shape
            if v is not None:
                np.broadcast_shapes(batch, v.shape[:-2])
        except ValueError:
            shapes = {n: a.shape for n in ("q", "k", "v", "key_mask", "bias") if (a := getattr(self, n)) is not None}
            raise ValueError(f"the leading axes of the arrays do not broadcast: {shapes}") from None
        self._check_every_query_sees_a_key()

    def _check_size_of_logits(self) -> float:
        """Finite entries are not enough: the logits must be finite in float64; a bound of their size."""
        xp = self.xp
        largest = [number(xp.max(xp.abs(a))) for a in (self.q, self.k)]
        if not isfinite(self.scale * self.d * largest[0] * largest[1]):
            raise ValueError(
                f"logits up to scale * d * max|q| * max|k| = {self.scale:.3g} * {self.d} * {largest[0]:.3g} * "
                f"{largest[1]:.3g} overflow float64, so their softmax is undefined; scale q or k down"
            )
        return abs(self.scale) * self.d * largest[0] * largest[1]

    def _check_mask_and_bias(self, largest_logit: float) -> None:
        xp = self.xp
        if self.key_mask is not None:
            if not (is_array(self.key_mask) and namespace(self.key_mask).isdtype(self.key_mask.dtype, "bool")):
                raise TypeError("key_mask must be a boolean array (..., n_k), True = keep; pass mask.astype(bool)")
            if self.key_mask.ndim < 1 or self.key_mask.shape[-1] != self.n_k:
                raise ValueError(f"key_mask must be (..., n_k={self.n_k}), got {self.key_mask.shape}")
        if self.bias is not None:
            check_floating("bias", self.bias)
            if self.bias.ndim < 2 or tuple(self.bias.shape[-2:]) != (self.n_q, self.n_k):
                raise ValueError(f"bias must be (..., n_q={self.n_q}, n_k={self.n_k}), got {self.bias.shape}")
            if bool(xp.any(xp.isnan(self.bias) | (self.bias == xp.inf))):
                raise ValueError(
                    "bias has entries that are NaN or +inf; only finite entries and -inf (hidden) make sense"
                )
            largest = number(xp.max(self.bias))
            if not isfinite(largest_logit + max(largest, 0.0)):
                raise ValueError(
                    f"bias up to {largest:.3g} on logits up to {largest_logit:.3g} overflows float64, so their softmax "
                    "is undefined; make the bias smaller, or scale q or k down"
                )

    def _check_every_query_sees_a_key(self) -> None:
        """A row without a visible key has no softmax; refuse it rather than invent one."""
        if self.key_mask is None and self.bias is None:
            return
        xp = self.xp
        visible: Array = None if self.key_mask is None else self.key_mask[..., None, :]
        if self.bias is not None:
            shown = self.bias != -xp.inf
            visible = shown if visible is None else visible & shown
        op = self.exact(self.q.dtype)
        assert isinstance(op, SoftmaxAttention)  # noqa: S101 - for the type checker
        for start in range(0, self.n_q, 1024):
            stop = min(start + 1024, self.n_q)
            block = visible if visible.shape[-2] == 1 else visible[..., start:stop, :]
            keep = op.structure(start, stop, 0, self.n_k)
            seen = xp.any(block if keep is None else block & keep, axis=-1)
            if not bool(xp.all(seen)):
                raise ValueError(
                    f"some query among rows {start}..{stop - 1} sees no key at all (key_mask, bias, causal and window "
                    "together hide every key), so its softmax is undefined; drop such queries"
                )


def _finite_number(name: str, value: Any, default: str) -> float:
    try:
        number = float("nan") if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    except OverflowError:  # a whole number beyond every float
        number = float("inf")
    if not isfinite(number):
        raise ValueError(f"{name} must be one finite number, got {value!r}; leave it out for {default}")
    return number
