"""Sparse attention: windows, global tokens, blocks, largest entries, hashed buckets; sparse plus low rank."""
