"""Ensembles of directions: their laws, and projections against the dense matrix."""

import numpy as np

from nla_llm.methods.attention.directions import draw_directions

EPS = np.finfo(np.float64).eps


def drawn(ensemble, m, d, seed=0):
    return draw_directions(ensemble, m, d, np.random.default_rng(seed), like=np.zeros(1)).dense()


def test_independent_directions_are_standard_normal_numbers():
    np.testing.assert_array_equal(drawn("iid", 6, 3), np.random.default_rng(0).standard_normal((6, 3)))


def test_orthogonal_directions_are_orthogonal_within_blocks():
    blocks = drawn("orthogonal", 6, 3)
    for block in (blocks[:3], blocks[3:]):
        gram = block @ block.T
        assert np.abs(gram - np.diag(np.diagonal(gram))).max() < 100 * EPS * gram.max()
