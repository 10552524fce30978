"""Hierarchical attention: near field exact, far field compressed."""
