"""The rows of the law: every registered method, and attention problems that suit all of them."""

import numpy as np
from registry import ROWS

import nla_llm as nl


def rows_of(kind):
    """Methods of ``tests/registry.py`` for problems of one kind: "attention" or "update"."""
    methods = [row.make() for row in ROWS]
    return [m for m in methods if m.properties.problem == kind]


def smallest_size(method):
    """Least number of tokens, rows or columns that a method takes."""
    if method.name in {"nystromformer", "skyformer", "rpcholesky", "cur_attention", "improved_clustered_attention"}:
        return 3 * method.m  # as many visible keys as landmarks: a mask shows 70 % of them
    if method.properties.family in {"pattern", "content", "sparse + low rank", "hierarchical"}:
        return method.m
    if method.name in {"thinformer", "linformer", "gaussian_projection", "lara", "eva", "monarch"}:
        return method.m
    if method.name == "lora":
        return 2 * method.rank  # LoRA-GA takes the singular vectors r + 1 to 2r
    if method.properties.problem == "update":
        return getattr(method, "rank", 1)
    return method.m if method.name in {"clustered_attention", "random_keys", "optimal_rank"} else 1


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
