"""Sparse patterns: the keys that a query sees, by place or by content, alone or plus low rank."""
