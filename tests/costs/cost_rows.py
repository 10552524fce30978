"""The rows of the law: every registered method with hyper-parameters that fit any of the problems below."""

import numpy as np

import nla_llm as nl

OPTIONS = {
    "optimal_rank": [{"m": 3}],
    "random_keys": [{"m": 3}],
    "positive_features": [{"m": 7}, {"m": 10, "orthogonal": True}, {"m": 4, "recentre": True}],
    "hyperbolic_features": [{"m": 6}, {"m": 3, "orthogonal": True}],
    "trigonometric_features": [{"m": 6}, {"m": 9, "orthogonal": True}, {"m": 4, "recentre": True}],
    "truncated_svd": [{"rank": 2}],
}
SMALLEST = 3  # the largest m or rank that is bounded by a dimension above


def rows():
    return [nl.method(name, **options) for name in nl.methods() for options in OPTIONS.get(name, [{}])]


def attention_rows():
    return [m for m in rows() if m.properties.problem == "attention"]


def update_rows():
    return [m for m in rows() if m.properties.problem == "update"]


def attention_problem(n_q, n_k, d=4, d_v=3, *, seed=0, mask=False, batch=(), **structure):
    """Gaussian inputs whose first coordinate is positive, so that every pair of a query and a key shares a feature."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((*batch, *shape)) for shape in ((n_q, d), (n_k, d), (n_k, d_v)))
    q[..., 0], k[..., 0] = np.abs(q[..., 0]) + 0.1, np.abs(k[..., 0]) + 0.1
    key_mask = None
    if mask:
        key_mask = rng.random((*batch, n_k)) < 0.7
        key_mask[..., 0] = True
    return nl.AttentionProblem(q, k, v, key_mask=key_mask, **structure)
