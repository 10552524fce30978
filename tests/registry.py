"""One row for each registered method: a new row inherits the whole test grid.

A name that is registered without a row fails ``tests/testing/test_conformance.py``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nla_llm.methods import method


@dataclass(frozen=True)
class Row:
    """A registered name, options that make a small instance, and the checks that are known to fail with the reason."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    expected_failures: dict[str, str] = field(default_factory=dict)

    def make(self) -> Any:
        return method(self.name, **self.options)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])


ROWS = (
    # yardsticks
    Row("uniform"),
    Row("random_keys", {"m": 8}),
    Row("optimal_rank", {"m": 8}),
    # kernels
    Row("elu_features"),
    Row("relu_features"),
    # deterministic features
    Row("taylor_features", {"degree": 2}),
    Row("taylor_features", {"degree": 3}),
    Row("polynomial_features", {"degree": 2}),
    Row("cosformer"),
    Row("cosformer", {"length": 500}),
    # fitted features
    Row("fitted_features", {"m": 8}),
    Row("fitted_features", {"m": 7, "tied": True}),
    # random features
    Row("positive_features", {"m": 16}),
    Row("positive_features", {"m": 16, "orthogonal": True}),
    Row("positive_features", {"m": 16, "recentre": True}),
    Row("positive_features", {"m": 16, "directions": "simplex"}),
    Row("positive_features", {"m": 16, "directions": "sobol"}),
    Row("positive_features", {"m": 16, "directions": "regularised"}),
    Row("positive_features", {"m": 16, "directions": "hadamard"}),
    Row("positive_features", {"m": 16, "directions": "hadamard1"}),
    Row("hyperbolic_features", {"m": 16}),
    Row("hyperbolic_features", {"m": 16, "orthogonal": True}),
    Row("hyperbolic_features", {"m": 16, "directions": "simplex"}),
    Row("trigonometric_features", {"m": 16}),
    Row("trigonometric_features", {"m": 16, "orthogonal": True}),
    Row("trigonometric_features", {"m": 16, "directions": "simplex"}),
    # exponential features
    Row("phase_features", {"m": 16}),
    Row("phase_features", {"m": 16, "orthogonal": True}),
    Row("gerf_features", {"m": 16}),
    Row("gerf_features", {"m": 16, "rho": 0.6, "orthogonal": True}),
    Row("gerf_features", {"m": 16, "directions": "simplex", "recentre": True}),
    Row("saderf_features", {"m": 16, "orthogonal": True}),
    Row("sderf_features", {"m": 16}),
    Row("sderf_features", {"m": 16, "orthogonal": True, "recentre": True}),
    Row("hybrid_features", {"m": 16}),
    Row("hybrid_features", {"m": 16, "weight": "gaussian", "width": 0.7}),
    # series features
    Row("maclaurin_features", {"m": 16}),
    Row("maclaurin_features", {"m": 16, "stratified": True}),
    Row("poisson_features", {"m": 16}),
    Row("poisson_features", {"m": 16, "rate": 0.2}),
    # sketches
    Row("product_sketch", {"m": 16}),
    Row("product_sketch", {"m": 16, "degree": 3, "kind": "gaussian"}),
    Row("product_sketch", {"m": 16, "kind": "complex_rademacher"}),
    Row("product_sketch", {"m": 16, "degree": 1, "kind": "complex_gaussian"}),
    Row("tensor_sketch", {"m": 16}),
    Row("tensor_sketch", {"m": 7, "degree": 3}),
    Row("poly_sketch", {"m": 6}),
    Row(
        "poly_sketch",
        {"m": 16, "degree": 8},
        {"theory": "the mean of 500 products of 16 Gaussian factors is too skew for a Student test"},
    ),
    # randomised
    Row("randomised_attention", {"m": 4}),
    Row("lara", {"m": 8}),
    Row("lara", {"m": 8, "proposals": 4}),
    Row("lara", {"m": 8, "weighting": "query"}),
    Row("eva", {"m": 8}),
    Row("eva", {"m": 8, "window": 20}),
    Row("eva", {"m": 2, "window": 7}),
    Row("eva", {"m": 8, "sampled": False}),
    # sampled keys
    Row("sampled_keys", {"m": 16}),
    Row("sampled_keys", {"m": 16, "probabilities": "value_norms"}),
    Row("sampled_keys", {"m": 16, "probabilities": "key_norms"}),
    Row("sampled_keys", {"m": 16, "probabilities": "optimal"}),
    Row("sampled_keys", {"m": 16, "stratified": True}),
    Row("kdeformer", {"m": 16}),
    Row("kdeformer", {"m": 16, "queries": 5, "stratified": True}),
    Row("hyper_attention", {"m": 16}),
    Row("hyper_attention", {"m": 9, "bits": 3}),
    Row("thinformer", {"m": 16}),
    Row("thinformer", {"m": 5, "bucket": 8}),
    Row("thinformer", {"m": 16, "bucket": 8, "greedy": True}),
    # landmarks
    Row("nystromformer", {"m": 8}),
    Row("nystromformer", {"m": 8, "core": "pinv"}),
    Row("nystromformer", {"m": 8, "core": "ridge"}),
    Row("skyformer", {"m": 8}),
    Row("skyformer", {"m": 8, "core": "exact"}),
    # columns
    Row("rpcholesky", {"m": 8}),
    Row("rpcholesky", {"m": 8, "balance": 1}),
    Row("cur_attention", {"m": 8}),
    Row("cur_attention", {"m": 8, "sampling": "uniform"}),
    Row("cur_attention", {"m": 8, "sampling": "ridge_leverage"}),
    Row("cur_attention", {"m": 8, "core": "optimal"}),
    # clustered
    Row("clustered_attention", {"m": 8}),
    Row("improved_clustered_attention", {"m": 8, "k": 5}),
    # projections
    Row("linformer", {"m": 8}),
    Row("linformer", {"m": 8, "projection": "mean"}),
    Row("gaussian_projection", {"m": 8}),
    Row("gaussian_projection", {"m": 8, "subspace": "optimal"}),
    # sparse
    Row("sliding_window", {"m": 8}),
    Row("longformer", {"m": 8}),
    Row("bigbird", {"m": 8}),
    Row("block_sparse", {"m": 8}),
    Row("strided_attention", {"m": 8}),
    Row("strided_attention", {"m": 8, "stride": 20}),
    Row("top_k", {"m": 8}),
    Row("reformer", {"m": 8}),
    Row("reformer", {"m": 8, "rounds": 3}),
    Row("scatterbrain", {"m": 8}),
    Row("scatterbrain", {"m": 7, "features": 16, "directions": "orthogonal"}),
    # hierarchical
    Row("h_matrix", {"m": 4}),
    Row("h_matrix", {"m": 3, "admissibility": "strong"}),
    Row("h_matrix", {"m": 4, "order": "projection"}),
    Row("h_transformer", {"m": 4}),
    Row("h_transformer", {"m": 3}),
    Row("monarch", {"m": 6}),
    Row("monarch", {"m": 5, "steps": 1}),
    # updates
    Row("truncated_svd", {"rank": 4}),
    Row("zero_update"),
    # quantised
    Row("quantised"),
    Row("quantised", {"format": "int8", "block": None}),
    Row("lqer", {"rank": 4, "block": 16}),
    Row("lqer", {"rank": 4, "weighting": "activations", "format": "int4_affine"}),
    Row("qera", {"rank": 4}),
    Row("qera", {"rank": 4, "weighting": "diagonal", "format": "nf4_double"}),
    Row("loftq", {"rank": 4, "iterations": 3}),
    Row("qpissa", {"rank": 4}),
    Row("qpissa", {"rank": 4, "iterations": 3}),
    Row("caldera", {"rank": 4, "iterations": 2}),
    # low-rank adaptation
    Row("lora", {"rank": 4}),
    Row("lora", {"rank": 4, "optimiser": "alternating", "initialisation": "kaiming", "steps": 3}),
    Row("lora", {"rank": 4, "optimiser": "gradient_descent", "lr": 0.1, "steps": 5, "scaling": "rank_stabilised"}),
    Row("lora", {"rank": 4, "optimiser": "momentum", "lr": 0.01, "steps": 5, "noise": 0.1}),
    Row("lora", {"rank": 3, "optimiser": "adam", "lr": 0.01, "steps": 5, "initialisation": "lora_ga"}),
    Row("lora", {"rank": 4, "optimiser": "lora_plus", "lr": 0.01, "steps": 5}),
    Row("lora", {"rank": 4, "initialisation": "lora_one", "steps": 5}),
    Row("randomised_svd", {"rank": 4}),
    Row("randomised_svd", {"rank": 4, "oversampling": 3, "power_steps": 0}),
    Row("krylov_svd", {"rank": 4, "steps": 2}),
    Row("krylov_svd", {"rank": 4, "block": 8, "steps": 3}),
    Row("single_pass_svd", {"rank": 4}),
    Row("rank_revealing_qr", {"rank": 4}),
    Row("interpolative", {"rank": 4}),
    Row("cur_update", {"rank": 4}),
    Row("adaptive_rank", {"tolerance": 0.3}),
    Row("adaptive_rank", {"tolerance": 0.3, "norm": "spectral"}),
    Row("data_aware_svd", {"rank": 4}),
)
