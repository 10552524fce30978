"""A quantised matrix plus a low-rank correction."""
