"""Sketches of polynomial kernels: product sketches, TensorSketch, PolySketch."""
