"""Kernel attention: feature maps of queries and keys, fixed, fitted or random."""
