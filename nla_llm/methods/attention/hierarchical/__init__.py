"""Hierarchical attention: a near field, and far blocks compressed level by level."""
