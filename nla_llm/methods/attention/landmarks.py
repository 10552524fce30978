"""Landmarks: attention through a few representative queries and keys, and a core inverse."""
