"""Projections along the sequence: Gaussian, and onto the optimal subspace."""
