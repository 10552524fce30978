"""Every registered attention method as it stands in comparisons: a label, a registered name, options."""

from __future__ import annotations

from typing import Any, NamedTuple

import nla_llm as nl
from nla_llm.methods.registry import registered


class Entry(NamedTuple):
    """A method at a budget that is still open.

    An oracle is given its operator for nothing. ``oracle`` is the label of the entry whose budget it gets at a level of
    cost: of a method that looks for by itself what the oracle is given, or its own, and then its application alone is
    charged.
    """

    label: str
    method: str
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    oracle: str = ""

    @property
    def budget(self) -> str | None:
        """Name of the field that buys accuracy; None too where the entry fixes it."""
        name: str | None = registered(self.method).properties.budget  # type: ignore[attr-defined]
        return None if name in self.options else name

    def make(self, budget: int = 1) -> Any:
        """The method at a budget."""
        options = self.options if self.budget is None else {**self.options, self.budget: budget}
        return nl.method(self.method, **options)


YARDSTICKS = (
    Entry("uniform", "uniform"),
    Entry("random keys", "random_keys"),
    Entry("optimal rank", "optimal_rank", oracle="optimal rank"),
)
METHODS = (
    # deterministic features
    Entry("elu + 1", "elu_features"),
    Entry("relu", "relu_features"),
    Entry("cosFormer", "cosformer"),
    Entry("Taylor, degree 2", "taylor_features", {"degree": 2}),
    Entry("polynomial, degree 2", "polynomial_features", {"degree": 2}),
    Entry("Hedgehog, unfitted", "fitted_features"),
    # random features: directions
    Entry("positive, i.i.d.", "positive_features"),
    Entry("positive, orthogonal", "positive_features", {"directions": "orthogonal"}),
    Entry("positive, regularised", "positive_features", {"directions": "regularised"}),
    Entry("positive, Hadamard", "positive_features", {"directions": "hadamard"}),
    Entry("positive, simplex", "positive_features", {"directions": "simplex"}),
    Entry("positive, Sobol", "positive_features", {"directions": "sobol"}),
    Entry("positive, orthogonal, recentred", "positive_features", {"directions": "orthogonal", "recentre": True}),
    # random features: functions
    Entry("hyperbolic, orthogonal", "hyperbolic_features", {"directions": "orthogonal"}),
    Entry("trigonometric, orthogonal", "trigonometric_features", {"directions": "orthogonal"}),
    Entry("random phase, orthogonal", "phase_features", {"directions": "orthogonal"}),
    Entry("GERF, recentred", "gerf_features", {"recentre": True}),
    Entry("SADERF, recentred", "saderf_features", {"recentre": True}),
    Entry("SDERF, recentred", "sderf_features", {"recentre": True}),
    Entry("hybrid", "hybrid_features"),
    # series and sketches
    Entry("random Maclaurin", "maclaurin_features"),
    Entry("random Maclaurin, stratified", "maclaurin_features", {"stratified": True}),
    Entry("Poisson", "poisson_features"),
    Entry("product sketch, degree 2", "product_sketch", {"degree": 2}),
    Entry("TensorSketch, degree 2", "tensor_sketch", {"degree": 2}),
    Entry("PolySketch, degree 4", "poly_sketch", {"degree": 4}),
    # randomised attention
    Entry("RA, m = 4", "randomised_attention", {"m": 4}),
    Entry("LARA", "lara"),
    Entry("EVA", "eva"),
    # sampled keys
    Entry("sampled keys, uniform", "sampled_keys"),
    Entry("sampled keys, by value norms", "sampled_keys", {"probabilities": "value_norms"}),
    Entry("KDEformer", "kdeformer"),
    Entry("HyperAttention", "hyper_attention"),
    Entry("Thinformer", "thinformer"),
    # landmarks, columns, clusters
    Entry("Nyströmformer", "nystromformer"),
    Entry("Nyströmformer, pinv", "nystromformer", {"core": "pinv"}),
    Entry("Skyformer", "skyformer"),
    Entry("RPCholesky", "rpcholesky"),
    Entry("CUR", "cur_attention"),
    Entry("clustered", "clustered_attention"),
    Entry("improved clustered", "improved_clustered_attention"),
    # projections along the sequence
    Entry("Linformer, Gaussian", "linformer"),
    Entry("Linformer, means", "linformer", {"projection": "mean"}),
    Entry("Gaussian projection", "gaussian_projection", oracle="optimal rank"),
    # sparse
    Entry("sliding window", "sliding_window"),
    Entry("Longformer", "longformer"),
    Entry("BigBird", "bigbird"),
    Entry("block sparse", "block_sparse"),
    Entry("strided", "strided_attention"),
    Entry("Reformer", "reformer"),
    Entry("Scatterbrain", "scatterbrain"),
    Entry("top-k", "top_k", oracle="sliding window"),
    # hierarchical and structured
    Entry("H-matrix", "h_matrix"),
    Entry("H-matrix, ordered", "h_matrix", {"order": "projection"}),
    Entry("H-Transformer-1D", "h_transformer"),
    Entry("Monarch", "monarch"),
)
ROSTER = {entry.label: entry for entry in (*YARDSTICKS, *METHODS)}
